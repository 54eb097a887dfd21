//! Starts the transfers, and kills and stops the workers that run them.

use durable_core::storage::{Filter, InstanceId, Storage};
use durable_core::{Host, RunId, Status};
use futures_util::future::try_join_all;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::journal::Journal;
use crate::place::Place;
use crate::saga::{self, TRANSFER, Transfer};
use crate::worker::Worker;
use crate::{Accounts, Args, Error, files, ledger};

/// A worker was killed or stopped, and others took over from it.
pub struct Blow {
    pub killed: bool,
    pub program: u32,
    /// Until every process that it had run was run by another one.
    pub seconds: f64,
}

struct Demo<'a, S> {
    args: &'a Args,
    address: &'a str,
    storage: S,
    host: Host,
    journal: Journal,
    /// What must be free to be written when a program is stopped.
    shared: Vec<PathBuf>,
    bar: ProgressBar,
    workers: Vec<Worker>,
    /// How many workers there should be.
    size: usize,
    /// How many processes each takes on at a time, so that all have some.
    room: usize,
}

/// Starts all transfers, part by part; in the midst of a part a worker is killed or stopped. There is one part more than
/// that, for a worker that was too fast.
pub async fn run(args: &Args, address: &str, place: &Place, storage: impl Storage + Clone) -> Result<Vec<Blow>, Error> {
    let on_sqlite = matches!(place, Place::Sqlite(_));
    let workers = args.workers.unwrap_or(if on_sqlite { 1 } else { 3 });
    // With one there is nobody to take over from it while it is stopped; nor can anybody while it holds SQLite's one
    // right to write, as each transaction does.
    let pauses = u32::from(workers > 1 && !(on_sqlite && args.accounts == Accounts::Database));
    let blows_due = (args.kills + pauses) as usize;
    let parts = args.kills + pauses + 1;
    let mut shared = vec![files::journal(&args.folder), files::bank(&args.folder)];
    match place {
        Place::Sqlite(path) => shared.push(path.clone()),
        #[cfg(feature = "postgres")]
        Place::Postgres { .. } => {}
    }
    println!("{place}");
    let accounts = match args.accounts {
        Accounts::Bank => "a bank elsewhere",
        Accounts::Database => "tables in the same database",
    };
    let stopped = if pauses == 0 { "" } else { ", one is stopped for longer than its heartbeat may be silent" };
    let workers_are =
        if workers == 1 { "1 worker, which".to_owned() } else { format!("{workers} workers, of which one") };
    println!(
        "{} transfers between {} accounts ({accounts}), some of which are cancelled; {workers_are} is killed {} times{stopped}\n",
        args.transfers,
        saga::ACCOUNTS,
        args.kills
    );
    let started = Instant::now();
    let mut demo = Demo {
        args,
        address,
        // This program starts and watches; it registers no function, so it runs none of them.
        host: Host::builder(storage.clone()).label("money_transfer").start().await?,
        storage,
        journal: Journal::open(&args.folder).await?,
        shared,
        bar: bar(args.transfers),
        workers: Vec::new(),
        size: workers as usize,
        room: (args.transfers / parts / workers + 1).max(4) as usize,
    };
    for _ in 0..workers {
        demo.workers.push(demo.worker()?);
    }
    let mut blows = Vec::new();
    let mut begun = 0;
    for part in 0..parts {
        let until = args.transfers * (part + 1) / parts;
        // All at once, so that the part lasts.
        let host = &demo.host;
        let starts = (begun..until)
            .map(|n| async move { host.spawn(TRANSFER, saga::id(n), &Transfer::number(n)).await.map(|_| ()) });
        try_join_all(starts).await?;
        for n in (begun..until).filter(|n| n % CANCELLED == 2) {
            demo.cancel_at_some_moment(n);
        }
        let midst = begun + (until - begun) / 4;
        begun = until;
        if blows.len() < blows_due {
            // The stop is in the middle.
            let killed = pauses == 0 || blows.len() != blows_due / 2;
            blows.extend(demo.blow(killed, midst, begun).await?);
        }
    }
    if blows.len() < blows_due {
        return Err("the transfers ended before a worker could be killed; give more with `--transfers`".into());
    }
    while demo.look().await? < args.transfers {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    demo.bar.finish_and_clear();
    for worker in &mut demo.workers {
        worker.kill()?;
    }
    demo.host.shutdown(Duration::from_secs(5)).await;
    println!("  all have ended after {:.1} s\n", started.elapsed().as_secs_f64());
    Ok(blows)
}

/// One transfer of so many is cancelled.
const CANCELLED: u32 = 4;

impl<S: Storage> Demo<'_, S> {
    /// Cancels a transfer at a random moment: in or after any of its steps.
    fn cancel_at_some_moment(&self, n: u32) {
        let steps: &[&str] = match self.args.accounts {
            Accounts::Bank => &saga::STEPS,
            Accounts::Database => &ledger::STEPS,
        };
        let random = uuid::Uuid::now_v7().as_u128() as u64;
        let step = steps[random as usize % steps.len()];
        let (handle, journal) = (self.host.get(saga::id(n)), self.journal.clone());
        tokio::spawn(async move {
            while !journal.has_begun(handle.id(), step).await? {
                // It may fail before it comes to that.
                if handle.status().await?.status.is_finished() {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(saga::moment(random >> 8)).await;
            // It may have ended by now.
            let _ = handle.cancel().await;
            Ok::<_, Error>(())
        });
    }

    fn worker(&self) -> Result<Worker, Error> {
        Worker::start(self.args, self.address, self.room)
    }

    /// How many transfers have ended.
    async fn look(&mut self) -> Result<u32, Error> {
        for worker in &mut self.workers {
            worker.runs()?;
        }
        let counts = self.host.processes().kind(TRANSFER).count().await?;
        if let Some(stuck) = counts.iter().find(|count| count.status == Status::Stuck) {
            return Err(format!("{} transfers are stuck", stuck.count).into());
        }
        let ended = counts.iter().filter(|count| count.status.is_finished()).map(|count| count.count).sum::<u64>();
        self.bar.set_position(ended);
        Ok(u32::try_from(ended)?)
    }

    /// Kills or stops the busiest worker once so many transfers have ended, in the middle of a step, and waits until
    /// others have taken over. Nothing if all that had begun ended before.
    async fn blow(&mut self, killed: bool, midst: u32, begun: u32) -> Result<Option<Blow>, Error> {
        loop {
            let ended = self.look().await?;
            if ended >= begun {
                return Ok(None);
            }
            if ended >= midst
                && let Some(at) = self.busiest().await?
            {
                let program = self.workers[at].id();
                if killed {
                    self.workers.swap_remove(at).kill()?;
                } else if !self.stop(at).await? {
                    continue;
                }
                let since = Instant::now();
                let ids = self.journal.cut_off(program).await?;
                let orphans = self.owned_with(&ids).await?;
                // The only worker there is takes over from itself; and one that was faster than the kill does not count.
                if self.workers.is_empty() || ids.is_empty() {
                    self.workers.push(self.worker()?);
                }
                if ids.is_empty() {
                    continue;
                }
                self.taken_over(&orphans).await?;
                let seconds = since.elapsed().as_secs_f64();
                let (signal, then) = if killed { ("kill -9", "") } else { ("kill -STOP", ", then goes on") };
                let line = format!(
                    "  {signal} {program}: {} steps were under way, {ended} transfers had ended; its {} processes were \
                     taken over after {seconds:.1} s{then}",
                    ids.len(),
                    orphans.len()
                );
                self.bar.suspend(|| println!("{line}"));
                if !killed {
                    self.workers[at].go_on()?;
                } else if self.workers.len() < self.size {
                    self.workers.push(self.worker()?);
                }
                return Ok(Some(Blow { killed, program, seconds }));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The worker with the most steps under way, if any has one.
    async fn busiest(&self) -> Result<Option<usize>, Error> {
        let mut busiest = None;
        for (at, worker) in self.workers.iter().enumerate() {
            busiest = busiest.max(Some((self.journal.under_way(worker.id()).await?, at)));
        }
        Ok(busiest.filter(|(steps, _)| *steps > 0).map(|(_, at)| at))
    }

    /// Stops a worker, unless it holds the one right to write to a file of SQLite's: nobody could take over then.
    async fn stop(&self, at: usize) -> Result<bool, Error> {
        let worker = &self.workers[at];
        worker.stop()?;
        let free = files::are_free(&self.shared).await? && self.journal.under_way(worker.id()).await? > 0;
        if !free {
            worker.go_on()?;
        }
        Ok(free)
    }

    /// What is owned by the instance that owns these: runs, and under which claims.
    async fn owned_with(&self, ids: &[String]) -> Result<HashMap<RunId, i64>, Error> {
        let filter = Filter { status: Some(Status::Running), limit: usize::MAX, ..Filter::default() };
        let running = self.storage.list("default", &filter).await?;
        let mut owners: HashMap<InstanceId, usize> = HashMap::new();
        for owner in running.iter().filter(|row| ids.iter().any(|id| **id == *row.id)).filter_map(|row| row.owner) {
            *owners.entry(owner).or_default() += 1;
        }
        let owner = owners.into_iter().max_by_key(|(_, count)| *count).map(|(owner, _)| owner);
        Ok(running.into_iter().filter(|row| row.owner == owner).map(|row| (row.run, row.claim)).collect())
    }

    /// Waits until each of these has been claimed by another instance.
    async fn taken_over(&mut self, orphans: &HashMap<RunId, i64>) -> Result<(), Error> {
        const PATIENCE: Duration = Duration::from_secs(60);
        let since = Instant::now();
        let filter = Filter { status: None, limit: usize::MAX, ..Filter::default() };
        while since.elapsed() < PATIENCE {
            let rows = self.storage.list("default", &filter).await?;
            let waits = |run: &RunId, claim: i64| {
                rows.iter().any(|row| row.run == *run && row.claim <= claim && !row.status.is_finished())
            };
            if !orphans.iter().any(|(run, claim)| waits(run, *claim)) {
                return Ok(());
            }
            self.look().await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(format!("nobody took over within {} s", PATIENCE.as_secs()).into())
    }
}

fn bar(length: u32) -> ProgressBar {
    let bar = ProgressBar::new(u64::from(length));
    if let Ok(style) = ProgressStyle::with_template("  {wide_bar} {pos}/{len} transfers") {
        bar.set_style(style);
    }
    bar
}
