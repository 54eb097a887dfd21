use durable_sqlite::storage::Storage;
use durable_sqlite::{Host, with};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::bank::Bank;
use crate::saga::{TRANSFER, transfer};

/// Runs transfers until it is killed.
pub async fn run(storage: impl Storage, bank: Bank) -> Result<(), Error> {
    let bank = Arc::new(bank);
    // A few at a time, so that the demo takes a while.
    let _host = Host::builder(storage)
        .label("worker")
        .max_processes(16)
        .call_timeout(Duration::from_secs(60))
        .register(TRANSFER, with(&bank, transfer))
        .start()
        .await?;
    std::future::pending().await
}

/// The worker program: this one, started again.
pub struct Worker(Child);

impl Worker {
    pub fn start(storage: &str, folder: &Path) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--worker", "--storage", storage, "--folder"]).arg(folder).stdin(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    pub fn has_ended(&mut self) -> Result<bool, Error> {
        Ok(self.0.try_wait()?.is_some())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
