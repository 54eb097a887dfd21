//! Programs beside this one, with an engine each: this program, started again.

use durable_core::Status;
use futures_util::{StreamExt, stream};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::figures::percentile;
use crate::processes::{FLIGHT, GO, MESSAGE};
use crate::site::At;
use crate::workloads::CONCURRENT;
use crate::{Error, claims, machine};

/// What such a program does.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Role {
    /// Starts processes that do not end, and says so; then it is killed.
    Flight,
    /// Waits for a line, then runs what is there until its input ends; then says how many claims it made.
    Share,
    /// Starts processes that wait for a message, and says how many; once all are parked it sends some of them theirs,
    /// and says how much memory it took at most, and how many milliseconds a message: p50, p99.
    Park,
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
            Role::Park => "park",
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
        Role::Park => park(at, count).await,
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

/// To how many of them.
const MESSAGES: usize = 1000;

async fn park(at: At, count: usize) -> Result<(), Error> {
    let host = at.host().await?.start().await?;
    let mut starts = stream::iter(0..count)
        .map(|n| {
            let host = host.clone();
            async move { Ok::<_, Error>((n, host.spawn(MESSAGE, format!("p-{n}"), &()).await?)) }
        })
        .buffer_unordered(CONCURRENT);
    let (mut some, mut started) = (Vec::new(), 0);
    while let Some(start) = starts.next().await {
        let (n, handle) = start?;
        if n % (count / MESSAGES) == 0 {
            some.push(handle);
        }
        started += 1;
        if started % 5000 == 0 {
            println!("{started}");
        }
    }
    let waiting = host.processes().kind(MESSAGE).status(Status::Waiting);
    loop {
        let parked: u64 = waiting.count().await?.iter().map(|counted| counted.count).sum();
        if parked == count as u64 && host.in_memory() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let mut times = Vec::new();
    for handle in &some {
        let started = Instant::now();
        handle.raise(GO, &()).await?;
        handle.output().await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    println!("{} {} {}", machine::peak()?, percentile(&mut times, 0.5), percentile(&mut times, 0.99));
    host.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
