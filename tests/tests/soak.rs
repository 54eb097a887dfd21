//! Everything that processes do, again and again, with hosts that come, stop and die: what is in memory, what is open and
//! what is in the tables does not grow. Ten seconds, and ten minutes in the long form.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::crash::shared::Shared;
use durable_tests::orphans::orphans;
use durable_tests::*;
use std::time::{Duration, Instant};

const GO: Event<u32> = Event::new("Go");
const ORDER: Definition<u32, u32> = Definition::new("order");
const PARCEL: Definition<u32, u32> = Definition::new("parcel");

async fn order(proc: Process, input: u32) -> Result<u32, Failure> {
    let first = proc.step("first", || async { Ok::<_, Failure>(input) });
    let (first, same) = tokio::join!(first, proc.get("same", || input));
    proc.set("progress", first? + same?).await?;
    proc.delay("pause", Duration::from_millis(u64::from(input % 50))).await?;
    let parcel = proc.spawn(PARCEL, format!("{}/parcel", proc.id()), &input).await?;
    let size = parcel.output(&proc).await?;
    let go = proc.race("go").on(proc.event(GO), |n| n).on(proc.delay("never", Duration::from_secs(3600)), |_| 0);
    let go = go.await?;
    let second = proc.event(GO).timeout(Duration::from_millis(5)).await?.unwrap_or(0);
    Ok(proc.step("last", || async { Ok::<_, Failure>(size + go + second) }).await?)
}

async fn parcel(proc: Process, input: u32) -> Result<u32, Failure> {
    let packed = proc
        .step(
            "pack",
            async |attempt: Attempt| if attempt.number() < 2 { Err(Failure::new("not yet")) } else { Ok(input) },
        )
        .retry(Retry::fixed(Duration::from_millis(3)).max_attempts(3));
    Ok(packed.await?)
}

/// One order of a wave, from its start to its deletion.
async fn lives(host: Host, id: String, n: u32) {
    let handle = host.spawn(ORDER, &id, &n).await.unwrap();
    let cancelled = n.is_multiple_of(5);
    if cancelled {
        handle.cancel().await.unwrap();
    } else {
        handle.raise(GO, &1).id("one").await.unwrap();
        handle.raise(GO, &1).id("one").await.unwrap();
    }
    let output = handle.output().await;
    if !cancelled {
        assert_eq!(output.unwrap(), n + 1);
    }
    handle.delete().await.unwrap();
    let parcel = host.get(format!("{id}/parcel")).of(PARCEL);
    match parcel.output().await {
        // Nobody had started it yet.
        Err(OutputError::NotFound(_)) => {}
        output => {
            assert_eq!(output.unwrap(), n);
            parcel.delete().await.unwrap();
        }
    }
}

/// What may leak.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    kilobytes: usize,
    tasks: usize,
    threads: usize,
    files: usize,
    sessions: usize,
    stored_kilobytes: usize,
}

impl Held {
    async fn now(backend: &impl Soaked) -> Self {
        let entries = |folder: &str| std::fs::read_dir(folder).unwrap().count();
        let memory = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = memory.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        Self {
            kilobytes: resident.split_whitespace().nth(1).unwrap().parse().unwrap(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            threads: entries("/proc/self/task"),
            files: entries("/proc/self/fd"),
            sessions: backend.sessions().await,
            stored_kilobytes: backend.stored().await / 1024,
        }
    }

    fn each(self, other: Self, choose: fn(usize, usize) -> usize) -> Self {
        Self {
            kilobytes: choose(self.kilobytes, other.kilobytes),
            tasks: choose(self.tasks, other.tasks),
            threads: choose(self.threads, other.threads),
            files: choose(self.files, other.files),
            sessions: choose(self.sessions, other.sessions),
            stored_kilobytes: choose(self.stored_kilobytes, other.stored_kilobytes),
        }
    }

    /// What is more here than there, by more than comes and goes.
    fn beyond(self, before: Self) -> Vec<String> {
        let checks = [
            // A short run is over before every connection has seen every statement.
            (
                "kilobytes",
                self.kilobytes,
                before.kilobytes,
                before.kilobytes / 10 + if long() { 8_000 } else { 24_000 },
            ),
            ("tasks", self.tasks, before.tasks, 10),
            ("threads", self.threads, before.threads, 4),
            ("files", self.files, before.files, 8),
            ("sessions", self.sessions, before.sessions, 4),
            // Room that rows have left is used again, on PostgreSQL once it was vacuumed, which a short run may not see.
            ("stored kilobytes", self.stored_kilobytes, before.stored_kilobytes, before.stored_kilobytes / 2 + 16_000),
        ];
        let grown = checks.into_iter().filter(|(_, now, before, more)| *now > before + more);
        grown.map(|(what, now, before, _)| format!("{before} {what} have become {now}")).collect()
    }
}

/// A database that tells how many sessions the test has there.
trait Soaked: Shared {
    fn sessions(&self) -> impl Future<Output = usize> + Send;
    /// How many bytes it takes.
    fn stored(&self) -> impl Future<Output = usize> + Send;
    /// How many instances have left a proof of life, if that is something that could stay.
    fn proofs(&self) -> Option<usize>;
}

impl Soaked for SqliteFile {
    /// They are files.
    async fn sessions(&self) -> usize {
        0
    }
    async fn stored(&self) -> usize {
        let length = |of: &str| std::fs::metadata(self.path() + of).map_or(0, |file| file.len() as usize);
        length("") + length("-wal")
    }
    fn proofs(&self) -> Option<usize> {
        Some(std::fs::read_dir(self.path() + "-instances").unwrap().count())
    }
}

impl Soaked for PostgresSchema {
    async fn sessions(&self) -> usize {
        let sql = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}'", self.name());
        self.number(&sql).await as usize
    }
    async fn stored(&self) -> usize {
        let sql = format!(
            "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
             WHERE relkind = 'r' AND relnamespace = '{}'::regnamespace",
            self.name()
        );
        self.number(&sql).await as usize
    }
    /// They end with their sessions.
    fn proofs(&self) -> Option<usize> {
        None
    }
}

async fn host<B: Soaked>(backend: &B) -> Host {
    quick(backend).await.register(ORDER, order).register(PARCEL, parcel).start().await.unwrap()
}

async fn soak<B: Soaked>() {
    const WAVE: u32 = 60;
    let length = Duration::from_secs(if long() { 600 } else { 10 });
    let backend = B::new().await;
    let prefix = B::PROCESSES.strip_suffix("processes").unwrap();
    let rows = async |table: &str| backend.number(&format!("SELECT count(*) FROM {prefix}{table}")).await;
    let mut hosts = [host(&backend).await, host(&backend).await];
    let since = Instant::now();
    let mut waves = Vec::new();
    while since.elapsed() < length || waves.len() < 8 {
        let wave = waves.len();
        let orders: Vec<_> =
            (0..WAVE).map(|n| tokio::spawn(lives(hosts[1].clone(), format!("order-{wave}-{n}"), n))).collect();
        // The other one comes and goes meanwhile: it stops, or it is dropped like a program that dies.
        if wave % 2 == 0 {
            hosts[0].shutdown(Duration::from_secs(5)).await;
        }
        hosts[0] = host(&backend).await;
        for order in orders {
            order.await.unwrap();
        }
        until("what they have left is cleared away", async || rows("chores").await == 0).await;
        for table in ["processes", "steps", "events", "waiters", "audit"] {
            assert_eq!(rows(table).await, 0, "{table} of wave {wave}, after everything was deleted");
        }
        until("those that have died are forgotten", async || rows("instances").await == 2).await;
        until("so are their locks", async || backend.proofs().is_none_or(|proofs| proofs == 2)).await;
        let left = orphans(&backend).await;
        assert!(left.is_empty(), "wave {wave}: {left:?}");
        let mut held = Held::now(&backend).await;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            held = held.each(Held::now(&backend).await, usize::min);
        }
        waves.push(held);
        // Who runs the orders is another one each time.
        hosts.swap(0, 1);
    }
    let most = |waves: &[Held]| waves.iter().fold(Held::default(), |most, held| most.each(*held, usize::max));
    let (first, second) = waves.split_at(waves.len() / 2);
    let (before, after) = (most(first), most(second));
    println!("{} waves: {before:?}, then {after:?}", waves.len());
    let grown = after.beyond(before);
    assert!(grown.is_empty(), "{grown:?}\n{waves:#?}");
}

#[test]
fn sqlite() {
    run(soak::<SqliteFile>());
}

#[test]
fn postgres() {
    PostgresSchema::run(soak::<PostgresSchema>());
}
