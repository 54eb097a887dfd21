use durable_core::storage::Storage;
use durable_core::{Host, HostBuilder, with};
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::bank::Bank;
use crate::ledger::{self, Ledger};
use crate::place::Place;
use crate::saga::{TRANSFER, transfer};
use crate::{Accounts, Args, Error};

/// Runs transfers, so many at a time, until it is killed, or whoever has started it is gone.
pub async fn run(args: &Args, place: Place, room: usize) -> Result<(), Error> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let host = match &place {
        Place::Sqlite(path) => {
            let storage = durable_sqlite::Sqlite::open(path.display().to_string()).await?;
            match args.accounts {
                Accounts::Bank => with_bank(storage, args).await?,
                Accounts::Database => {
                    let ledger = Arc::new(Ledger::open(&place, &args.folder).await?);
                    Host::builder(storage).register(TRANSFER, with(&ledger, ledger::durable_sqlite::transfer))
                }
            }
        }
        #[cfg(feature = "postgres")]
        Place::Postgres { url, schema } => {
            let storage = durable_postgres::Postgres::connect(url).schema(schema).await?;
            match args.accounts {
                Accounts::Bank => with_bank(storage, args).await?,
                Accounts::Database => {
                    let ledger = Arc::new(Ledger::open(&place, &args.folder).await?);
                    Host::builder(storage).register(TRANSFER, with(&ledger, ledger::durable_postgres::transfer))
                }
            }
        }
    };
    let label = format!("worker {}", std::process::id());
    let _host = host.label(label).max_processes(room).call_timeout(Duration::from_secs(60)).start().await?;
    std::future::pending().await
}

async fn with_bank(storage: impl Storage, args: &Args) -> Result<HostBuilder, Error> {
    let bank = Arc::new(Bank::open(&args.folder).await?);
    Ok(Host::builder(storage).register(TRANSFER, with(&bank, transfer)))
}

/// A worker program: this one, started again.
pub struct Worker(Child);

impl Worker {
    pub fn start(args: &Args, storage: &str, room: usize) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--worker", &room.to_string(), "--storage", storage, "--schema", &args.schema, "--accounts"]);
        command.arg(args.accounts.to_string()).arg("--folder").arg(&args.folder).stdin(Stdio::piped());
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

    /// `kill -STOP`.
    pub fn stop(&self) -> Result<(), Error> {
        self.signal(Signal::STOP)
    }

    /// `kill -CONT`.
    pub fn go_on(&self) -> Result<(), Error> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), Error> {
        Ok(kill_process(Pid::from_child(&self.0), signal)?)
    }

    /// An error if it has ended by itself.
    pub fn runs(&mut self) -> Result<(), Error> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("worker {} has ended by itself ({status})", self.id()).into()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
