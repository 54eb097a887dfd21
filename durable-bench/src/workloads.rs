use durable_sqlite::{Host, HostBuilder, Sqlite, Status};
use futures_util::{StreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Error;
use crate::figures::{Figures, median, percentile};
use crate::processes::{self, FLIGHT, GO, MESSAGE, STEPS, YEAR};
use crate::raw::Raw;

/// How many calls are under way at once where a workload is about throughput.
const CONCURRENT: usize = 4000;

pub(crate) struct Bench {
    pub(crate) folder: PathBuf,
    pub(crate) rounds: usize,
    pub(crate) scale: usize,
}

async fn host(path: &Path) -> Result<HostBuilder, Error> {
    let path = path.to_str().ok_or("the folder's path is not UTF-8")?;
    Ok(Host::builder(Sqlite::open(path).await?)
        .register(STEPS, processes::steps)
        .register(YEAR, processes::year)
        .register(MESSAGE, processes::message)
        .register(FLIGHT, processes::flight))
}

fn bar(what: &str, length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:>24} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

impl Bench {
    fn file(&self) -> Result<(tempfile::TempDir, PathBuf), Error> {
        let folder = tempfile::Builder::new().prefix("durable-bench-").tempdir_in(&self.folder)?;
        let path = folder.path().join("bench.db");
        Ok((folder, path))
    }

    /// One process, step after step, beside one-row commits.
    pub(crate) async fn sequential(&self, figures: &mut Figures) -> Result<(), Error> {
        let steps = (1000 / self.scale).max(10);
        let (mut ours, mut raws) = (Vec::new(), Vec::new());
        let bar = bar("sequential", self.rounds);
        for round in 0..self.rounds {
            let (_folder, path) = self.file()?;
            let mut raw = Raw::open(&path.with_extension("raw")).await?;
            let times = raw.single(steps).await?;
            raws.push(steps as f64 / times.iter().sum::<Duration>().as_secs_f64());
            let host = host(&path).await?.start().await?;
            let started = Instant::now();
            host.spawn(STEPS, format!("s-{round}"), &u32::try_from(steps)?).await?.output().await?;
            ours.push(steps as f64 / started.elapsed().as_secs_f64());
            host.shutdown(Duration::from_secs(5)).await;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!("1 process of {steps} steps; raw: one-row commits");
        figures.add("sequential", median(ours), "steps/s", Some(median(raws)), note);
        Ok(())
    }

    /// Many processes of five steps, beside the same rows in batches.
    pub(crate) async fn many(&self, figures: &mut Figures) -> Result<(), Error> {
        const STEPS_EACH: usize = 5;
        let count = (20_000 / self.scale).max(100);
        let (mut ours, mut raws) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            let (_folder, path) = self.file()?;
            let mut raw = Raw::open(&path.with_extension("raw")).await?;
            let steps = (count * STEPS_EACH) as f64;
            raws.push(steps / raw.batches(count, STEPS_EACH, 1000).await?.as_secs_f64());
            let host = host(&path).await?.start().await?;
            let bar = bar(&format!("many {}/{}", round + 1, self.rounds), count);
            let started = Instant::now();
            let mut all = stream::iter(0..count)
                .map(|n| {
                    let host = host.clone();
                    async move {
                        let process = host.spawn(STEPS, format!("many-{n}"), &(STEPS_EACH as u32)).await?;
                        process.output().await?;
                        Ok::<_, Error>(())
                    }
                })
                .buffer_unordered(CONCURRENT);
            let mut done = 0;
            while let Some(result) = all.next().await {
                result?;
                done += 1;
                if done % 500 == 0 {
                    bar.set_position(done);
                }
            }
            ours.push(steps / started.elapsed().as_secs_f64());
            drop(all);
            bar.finish_and_clear();
            host.shutdown(Duration::from_secs(5)).await;
        }
        let note = format!("{count} processes of {STEPS_EACH} steps; raw: the same rows, 1,000 a commit");
        figures.add("many", median(ours), "steps/s", Some(median(raws)), note);
        Ok(())
    }

    /// Processes that wait for a year: memory for each while in memory, and once parked.
    pub(crate) async fn parked(&self, figures: &mut Figures) -> Result<(), Error> {
        let count = (100_000 / self.scale).max(1000);
        let (_folder, path) = self.file()?;
        // Long enough that all wait in memory at the same time.
        let quiet = Duration::from_secs(if self.scale == 1 { 30 } else { 5 });
        let host = host(&path).await?.max_processes(count * 2).quiet_time(quiet).start().await?;
        // The first ones pay for what is there once.
        let first = count / 100;
        self.wait_for_a_year(&host, 0..first).await?;
        let before = resident()?;
        let started = Instant::now();
        self.wait_for_a_year(&host, first..count).await?;
        let waiting = (resident()? - before) / (count - first) as f64;
        let fits = started.elapsed() < quiet && host.in_memory() == count;
        let note = format!("{count} processes{}", if fits { "" } else { "; some had parked already" });
        figures.add("parked", waiting, "B/waiting", None, note);
        host.shutdown(Duration::from_secs(5)).await;
        // What parks takes its leave at once, and few are in memory at a time: what is left over is what a parked one
        // costs, and not what the allocator keeps of those that waited.
        let (_folder, path) = self.file()?;
        let quiet = Duration::from_millis(50);
        let host = self::host(&path).await?.max_processes(CONCURRENT).quiet_time(quiet).start().await?;
        let parked = async |range: std::ops::Range<usize>| {
            self.wait_for_a_year(&host, range).await?;
            // Those that had no place come in as soon as there is one, so it stays empty only once all have parked.
            let mut empty = 0;
            while empty < 10 {
                empty = if host.in_memory() == 0 { empty + 1 } else { 0 };
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            resident()
        };
        let before = parked(0..count / 2).await?;
        let added = (parked(count / 2..count + count / 2).await? - before).max(0.0) / count as f64;
        figures.add("parked", added, "B/parked", None, format!("{count} more that waited and parked"));
        host.shutdown(Duration::from_secs(5)).await;
        Ok(())
    }

    async fn wait_for_a_year(&self, host: &Host, range: std::ops::Range<usize>) -> Result<(), Error> {
        let bar = bar("parked", range.len());
        let mut all = stream::iter(range.clone())
            .map(|n| {
                let host = host.clone();
                async move { host.spawn(YEAR, format!("year-{n}"), &()).await.map(|_| ()) }
            })
            .buffer_unordered(CONCURRENT);
        let mut done = 0;
        while let Some(result) = all.next().await {
            result?;
            done += 1;
            if done % 500 == 0 {
                bar.set_position(done);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// From spawn to output with one step, nothing else running; and from a message to a parked process to its end.
    pub(crate) async fn latency(&self, figures: &mut Figures) -> Result<(), Error> {
        let count = (1000 / self.scale).max(50);
        let (_folder, path) = self.file()?;
        let mut raw = Raw::open(&path.with_extension("raw")).await?;
        let host = host(&path).await?.quiet_time(Duration::from_millis(100)).start().await?;
        let (mut ours, mut raws) = (Vec::new(), Vec::new());
        let bar = bar("latency", count);
        for n in 0..count {
            raws.extend(raw.single(1).await?.iter().map(Duration::as_secs_f64));
            let started = Instant::now();
            host.spawn(STEPS, format!("l-{n}"), &1).await?.output().await?;
            ours.push(started.elapsed().as_secs_f64());
            bar.inc(1);
        }
        bar.finish_and_clear();
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let note = format!("{name}, spawn to output, one step; raw: one commit");
            let (value, raw) = (percentile(&mut ours, share) * 1e3, percentile(&mut raws, share) * 1e3);
            figures.add("latency", value, "ms", Some(raw), note);
        }
        let count = (200 / self.scale).max(20);
        let mut woken = Vec::new();
        let mut handles = Vec::new();
        for n in 0..count {
            handles.push(host.spawn(MESSAGE, format!("m-{n}"), &()).await?);
        }
        while host.in_memory() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for handle in &handles {
            let started = Instant::now();
            handle.raise(GO, &()).await?;
            handle.output().await?;
            woken.push(started.elapsed().as_secs_f64());
        }
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let note = format!("{name}, message to a parked process to its output, one step");
            figures.add("latency", percentile(&mut woken, share) * 1e3, "ms", None, note);
        }
        host.shutdown(Duration::from_secs(5)).await;
        Ok(())
    }

    /// A program with many processes in flight is killed; how long until another one runs them all again.
    pub(crate) async fn recovery(&self, figures: &mut Figures) -> Result<(), Error> {
        let count = (1000 / self.scale).max(100);
        let mut times = Vec::new();
        let bar = bar("recovery", self.rounds);
        for _ in 0..self.rounds {
            let (_folder, path) = self.file()?;
            let text = path.to_str().ok_or("the folder's path is not UTF-8")?;
            let mut worker = Command::new(std::env::current_exe()?)
                .args(["--recover", text, "--scale", &count.to_string()])
                .stdout(Stdio::piped())
                .spawn()?;
            let mut line = String::new();
            let out = worker.stdout.take().ok_or("the worker has no output")?;
            std::io::BufReader::new(out).read_line(&mut line)?;
            worker.kill()?;
            worker.wait()?;
            let started = Instant::now();
            let host = host(&path).await?.start().await?;
            for n in 0..count {
                host.get(format!("f-{n}")).of(FLIGHT).output().await?;
            }
            times.push(started.elapsed().as_secs_f64());
            host.shutdown(Duration::from_secs(5)).await;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!("{count} in flight, SIGKILL, from the new program's start to the end of the last one");
        figures.add("recovery", median(times), "s", None, note);
        Ok(())
    }
}

/// Starts processes and says so; then it is killed.
pub(crate) async fn recovery_worker(path: &str) -> Result<(), Error> {
    let count: usize = std::env::args().next_back().unwrap_or_default().parse()?;
    let host = host(Path::new(path)).await?.start().await?;
    let starts = stream::iter(0..count).map(|n| {
        let host = host.clone();
        async move { host.spawn(FLIGHT, format!("f-{n}"), &()).await }
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

/// Resident memory of this program in bytes.
fn resident() -> Result<f64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS in /proc/self/status")?;
    let kib: f64 = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
    Ok(kib * 1024.0)
}
