//! What is asked of a system that is measured: it runs in a program of its own, is asked on its standard input and answers
//! on its standard output, a line of JSON each.
//!
//! Depends on no driver of a database, so that systems which cannot be linked together can all have it.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Whatever went wrong: the program ends with it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A system.
#[async_trait]
pub trait Peer: Send + Sync + 'static {
    /// A process with so many steps, from its start to its output.
    async fn run(&self, id: String, steps: u32) -> Result<(), Error>;

    /// Starts a process that waits for a year.
    async fn wait(&self, id: String) -> Result<(), Error>;

    /// Ends what runs in the background.
    async fn end(&self) -> Result<(), Error>;
}

/// What a system says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    /// Name and version.
    pub system: String,
    /// The database and what makes it durable.
    pub database: String,
    /// How it is set up here.
    pub settings: String,
    /// With how many processes at once it does most.
    pub concurrent: usize,
}

/// A question.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Processes with so many steps, so many at once, as many as asked for or as start within so many seconds.
    Run { processes: usize, steps: u32, concurrent: usize, seconds: f64 },
    /// Processes that wait, up to so many altogether or as many as start within so many seconds.
    Wait { processes: usize, concurrent: usize, seconds: f64 },
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// It is there.
    Ready(About),
    /// So many processes so far.
    Done(usize),
    /// All ran: how many, in how many seconds, with how many seconds of the program's processor time; how many
    /// milliseconds each took, if it was one at a time.
    Ran { processes: usize, seconds: f64, processor: f64, times: Vec<f64> },
    /// So many wait, and nothing else is done; the resident memory in bytes.
    Waiting { processes: usize, resident: f64 },
}

/// How such a program is called: `program peer system address durability [setup]`.
pub struct Called {
    /// The system's name.
    pub system: String,
    /// The address of a database, or the path of a file.
    pub address: String,
    /// Whether to be as durable as the database can, and not as the system is by itself.
    pub full: bool,
    /// Whether to make tables and end.
    pub setup: bool,
}

impl Called {
    /// From the program's arguments, if it is called so.
    pub fn new() -> Option<Self> {
        let mut arguments = std::env::args().skip(1);
        let mut next = || arguments.next();
        if next()? != "peer" {
            return None;
        }
        let (system, address, durability) = (next()?, next()?, next()?);
        Some(Self { system, address, full: durability == "full", setup: next().is_some() })
    }

    /// The arguments.
    pub fn arguments(&self) -> Vec<&str> {
        let mut all = vec!["peer", &self.system, &self.address, if self.full { "full" } else { "own" }];
        all.extend(self.setup.then_some("setup"));
        all
    }
}

/// A setting of a system's, or what the environment says instead: to try others.
pub fn setting(name: &str, value: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(value)
}

/// With so many connections.
pub fn connections(value: usize) -> usize {
    setting("PEER_CONNECTIONS", value)
}

/// With so many processes at once.
pub fn concurrent(value: usize) -> usize {
    setting("PEER_CONCURRENT", value)
}

/// The version of a package, from the text of a lock file.
pub fn version(lock: &str, package: &str) -> String {
    let after = lock.split(&format!("name = \"{package}\"\nversion = \"")).nth(1);
    let version = after.and_then(|text| text.split('"').next());
    format!("{package} {}", version.unwrap_or("?"))
}

/// Answers until its input ends.
pub async fn serve(called: &Called, about: About, peer: Arc<dyn Peer>) -> Result<(), Error> {
    answer(&Answer::Ready(about))?;
    let (mut waiting, mut asked) = (0, 0);
    while !called.setup {
        let line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).map(|_| line)
        });
        let line = line.await??;
        if line.is_empty() {
            break;
        }
        match serde_json::from_str(&line)? {
            Ask::Run { processes, steps, concurrent, seconds } => {
                asked += 1;
                let (before, started) = (processor()?, Instant::now());
                let (done, times) = each(0..processes, concurrent, seconds, {
                    let peer = peer.clone();
                    move |n| {
                        let peer = peer.clone();
                        async move { peer.run(format!("run-{asked}-{n}"), steps).await }
                    }
                })
                .await?;
                let (seconds, processor) = (started.elapsed().as_secs_f64(), processor()? - before);
                answer(&Answer::Ran { processes: done, seconds, processor, times })?;
            }
            Ask::Wait { processes, concurrent, seconds } => {
                let peer = peer.clone();
                let wait = move |n| {
                    let peer = peer.clone();
                    async move { peer.wait(format!("wait-{n}")).await }
                };
                waiting += each(waiting..processes, concurrent, seconds, wait).await?.0;
                idle().await?;
                answer(&Answer::Waiting { processes: waiting, resident: resident()? })?;
            }
        }
    }
    peer.end().await
}

/// Says it at once.
fn answer(answer: &Answer) -> Result<(), Error> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", serde_json::to_string(answer)?)?;
    Ok(output.flush()?)
}

/// Does something for each of these numbers, so many at once; how many it did, and how long each took if it was one at a
/// time.
async fn each<F, R>(
    numbers: std::ops::Range<usize>,
    concurrent: usize,
    seconds: f64,
    work: F,
) -> Result<(usize, Vec<f64>), Error>
where
    F: Fn(usize) -> R + Clone + Send + 'static,
    R: Future<Output = Result<(), Error>> + Send,
{
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let (next, done) = (Arc::new(AtomicUsize::new(numbers.start)), Arc::new(AtomicUsize::new(0)));
    let mut workers = JoinSet::new();
    for _ in 0..concurrent.min(numbers.len()) {
        let (next, done, work) = (next.clone(), done.clone(), work.clone());
        workers.spawn(async move {
            let mut times = Vec::new();
            loop {
                let (n, started) = (next.fetch_add(1, Ordering::Relaxed), Instant::now());
                if n >= numbers.end || started >= until {
                    return Ok::<_, Error>(times);
                }
                work(n).await?;
                done.fetch_add(1, Ordering::Relaxed);
                if concurrent == 1 {
                    times.push(started.elapsed().as_secs_f64() * 1e3);
                }
            }
        });
    }
    let mut all = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    loop {
        tokio::select! {
            worker = workers.join_next() => match worker {
                Some(times) => all.extend(times??),
                None => return Ok((done.load(Ordering::Relaxed), all)),
            },
            _ = tick.tick() => answer(&Answer::Done(done.load(Ordering::Relaxed)))?,
        }
    }
}

/// Returns once this program has nearly nothing to do.
async fn idle() -> Result<(), Error> {
    let mut before = processor()?;
    let mut quiet = 0;
    while quiet < 4 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = processor()?;
        quiet = if now - before < 0.05 { quiet + 1 } else { 0 };
        before = now;
    }
    Ok(())
}

/// Processor time of this program in seconds.
pub fn processor() -> Result<f64, Error> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, in parentheses, may contain spaces. The kernel's unit for programs is a hundredth of a second.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

/// Resident memory of this program in bytes.
pub fn resident() -> Result<f64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS in /proc/self/status")?;
    let kib: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kib * 1024.0)
}
