//! Programs beside this one, with an engine each: this program, started again.

use durable_core::Status;
use futures_util::{StreamExt, stream};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::processes::FLIGHT;
use crate::site::At;
use crate::workloads::CONCURRENT;
use crate::{Error, claims};

/// What such a program does.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Role {
    /// Starts processes that do not end, and says so; then it is killed.
    Flight,
    /// Waits for a line, then runs what is there until its input ends; then says how many claims it made.
    Share,
}

pub(crate) struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn start(role: Role, at: &At, count: usize) -> Result<Self, Error> {
        let role = match role {
            Role::Flight => "flight",
            Role::Share => "share",
        };
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--role", role, "--count", &count.to_string()])
            .args(at.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("a program has no output")?);
        let input = child.stdin.take();
        Ok(Self { child, input, output })
    }

    /// The label of its engine.
    pub(crate) fn label(&self) -> String {
        label(self.child.id())
    }

    /// What it says next.
    pub(crate) fn says(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err("a program has ended by itself".into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    /// Lets it begin.
    pub(crate) fn begin(&mut self) -> Result<(), Error> {
        Ok(self.input.as_mut().ok_or("a program has no input")?.write_all(b"begin\n")?)
    }

    /// Lets it end in order; its last words.
    pub(crate) fn end(mut self) -> Result<String, Error> {
        self.input = None;
        let words = self.says()?;
        self.child.wait()?;
        Ok(words)
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) -> Result<(), Error> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn label(program: u32) -> String {
    format!("bench {program}")
}

/// This is such a program.
pub async fn run(role: Role, at: At, count: usize) -> Result<(), Error> {
    match role {
        Role::Flight => fly(at, count).await,
        Role::Share => share(at).await,
    }
}

async fn fly(at: At, count: usize) -> Result<(), Error> {
    let me = std::process::id();
    let host = at.host().await?.label(label(me)).start().await?;
    let starts = stream::iter(0..count).map(|n| {
        let host = host.clone();
        async move { host.spawn(FLIGHT, format!("f-{me}-{n}"), &()).await }
    });
    let handles: Vec<_> = starts.buffer_unordered(CONCURRENT).collect().await;
    for handle in handles {
        let handle = handle?;
        while handle.status().await?.status != Status::Running {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    println!("in flight");
    std::future::pending().await
}

async fn share(at: At) -> Result<(), Error> {
    claims::count()?;
    let host = at.host().await?.label(label(std::process::id()));
    println!("ready");
    let line = || tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
    line().await??;
    let host = host.start().await?;
    line().await??;
    host.shutdown(Duration::from_secs(5)).await;
    let (claims, empty) = claims::counted();
    println!("{claims} {empty}");
    Ok(())
}
