//! The database under the engine's feet: rows that somebody has deleted, and a clock that is set back. Rows that somebody
//! has changed are each database's own: `rows_that_were_changed_by_hand`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use chrono::TimeDelta;
use durable_core::storage::{InstanceId, Storage, StorageError};
use durable_core::*;
use durable_tests::crash::shared::Shared;
use durable_tests::orphans::orphans;
use durable_tests::*;
use std::time::Duration;

const IT: Definition<u32, u32> = Definition::new("it");
const GO: Event<u32> = Event::new("Go");
const MINUTE: Duration = Duration::from_secs(60);

/// What each database calls things.
trait Hands: Shared {
    /// SQL for a time a day after that in the column.
    fn a_day_after(column: &str) -> String;

    /// Names of instances that there never were, in SQL.
    const STRANGERS: &'static [&'static str];

    /// A table beside that of processes.
    fn table(name: &str) -> String {
        Self::PROCESSES.replace("processes", name)
    }

    /// Deletes the rows of a table that belong to the current run of an id.
    fn delete(&self, table: &str, id: &str) -> impl Future<Output = ()> + Send {
        let (table, processes) = (Self::table(table), Self::PROCESSES);
        let sql = format!("DELETE FROM {table} WHERE run IN (SELECT run FROM {processes} WHERE id = '{id}')");
        async move { self.execute(&sql).await }
    }

    /// Every time that is stored is a day later than it was: as if the clock had been set back by a day.
    fn set_back(&self) -> impl Future<Output = ()> + Send {
        let times = [
            ("processes", &["wake_at", "created_at", "status_at", "finished_at"][..]),
            ("steps", &["recorded_at"]),
            ("events", &["raised_at", "taken_at"]),
            ("instances", &["started_at", "heartbeat_at"]),
        ];
        async move {
            for (table, columns) in times {
                let set = columns.iter().map(|column| format!("{column} = {}", Self::a_day_after(column)));
                let set = set.collect::<Vec<_>>().join(", ");
                self.execute(&format!("UPDATE {} SET {set}", Self::table(table))).await;
            }
        }
    }
}

impl Hands for SqliteFile {
    const STRANGERS: &'static [&'static str] = &[
        "'00000000-0000-7000-8000-00000000000a'",
        "'00000000-0000-7000-8000-00000000000A'",
        "'nobody'",
        "''",
        "hex(randomblob(16))",
        "x'00ff'",
    ];

    fn a_day_after(column: &str) -> String {
        format!("strftime('%Y-%m-%dT%H:%M:%fZ', {column}, '+1 day')")
    }
}

impl Hands for PostgresSchema {
    const STRANGERS: &'static [&'static str] = &["'00000000-0000-7000-8000-00000000000a'", "gen_random_uuid()"];

    fn a_day_after(column: &str) -> String {
        format!("{column} + interval '1 day'")
    }
}

impl Hands for MssqlSchema {
    const STRANGERS: &'static [&'static str] = &["0x0000000000007000800000000000000A", "CONVERT(BINARY(16), NEWID())"];

    fn a_day_after(column: &str) -> String {
        format!("DATEADD(DAY, 1, {column})")
    }
}

on_each_database!(
    rows_that_are_gone,
    instances_that_are_gone,
    dead_instances_that_are_gone,
    who_is_reinstated_writes_no_more,
    owners_that_nobody_knows,
    a_clock_that_is_set_back,
);

/// Counts its steps; waits for two messages between them.
async fn start<B: Sql>(backend: &B, effects: &Effects) -> Host {
    serving(quick(backend).await, effects).await
}

/// Looks for what is missing every few seconds.
async fn often(backend: &impl Backend) -> HostBuilder {
    quick(backend).await.heartbeat(Duration::from_millis(100), Duration::from_secs(1))
}

async fn serving(builder: HostBuilder, effects: &Effects) -> Host {
    let effects = effects.clone();
    let it = move |proc: Process, input: u32| {
        let effects = effects.clone();
        async move {
            let first = proc.step("first", || async {
                effects.add(format!("{} first", proc.id()));
                Ok::<_, Failure>(input)
            });
            let first = first.await?;
            let second = proc.event(GO).await? + proc.event(GO).await?;
            let last = proc.step("last", || async {
                effects.add(format!("{} last", proc.id()));
                Ok::<_, Failure>(first + second)
            });
            Ok::<_, Failure>(last.await?)
        }
    };
    builder.register(IT, it).start().await.unwrap()
}

async fn rows_that_are_gone<B: Hands>() {
    let (backend, effects) = (B::new().await, Effects::default());
    // Nobody serves this kind yet.
    let host = quick(&backend).await.start().await.unwrap();
    host.spawn(IT, "message", &1).await.unwrap().raise(GO, &1).await.unwrap();
    backend.delete("events", "message").await;
    host.shutdown(MINUTE).await;
    let host = start(&backend, &effects).await;
    let mut handles = Vec::new();
    for id in ["steps", "process", "sound"] {
        handles.push(host.spawn(IT, id, &1).await.unwrap());
    }
    until("all are parked", async || host.in_memory() == 0 && effects.all().len() == 4).await;
    // A step whose record is gone happens again; a message that is gone never came.
    backend.delete("steps", "steps").await;
    for id in ["steps", "sound", "message"] {
        for n in 2..4 {
            host.get(id).raise(GO, &n).await.unwrap();
        }
        assert_eq!(host.get(id).of(IT).output().await.unwrap(), 6, "{id}");
    }
    assert_eq!((effects.count("steps first"), effects.count("sound first")), (2, 1));
    // A process whose row is gone is gone, and whatever else is left of it is nobody's.
    let waits = tokio::spawn({
        let handle = handles[1].clone();
        async move { handle.output().await }
    });
    backend.delete("processes", "process").await;
    let (old, same) = (&handles[1], host.get("process"));
    for handle in [old.clone(), same.of(IT)] {
        assert!(matches!(handle.status().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(handle.raise(GO, &1).await, Err(RaiseError::NotFound { .. })));
        assert!(matches!(handle.cancel().await, Err(HandleError::NotFound { .. })));
    }
    assert!(matches!(waits.await.unwrap(), Err(OutputError::NotFound(_))));
    let again = host.spawn(IT, "process", &2).await.unwrap();
    assert_ne!(again.run(), old.run());
    until("it begins anew", async || effects.count("process first") == 2).await;
    // While it is in memory, too: whatever comes of it is dropped.
    backend.delete("processes", "process").await;
    assert!(matches!(again.raise(GO, &1).await, Err(RaiseError::NotFound { .. })));
    let sound = host.spawn(IT, "another", &1).await.unwrap();
    for n in 2..4 {
        sound.raise(GO, &n).await.unwrap();
    }
    assert_eq!(sound.output().await.unwrap(), 6);
    until("it is dropped", async || host.in_memory() == 0).await;
    host.shutdown(MINUTE).await;
}

/// Instances whose rows are gone go on as new ones, and what they owned is handed back.
async fn instances_that_are_gone<B: Hands>() {
    for table in ["fences", "instances"] {
        let (backend, effects) = (B::new().await, Effects::default());
        let hosts = [start(&backend, &effects).await, start(&backend, &effects).await];
        let mut handles = Vec::new();
        for n in 0..10 {
            handles.push(hosts[n % 2].spawn(IT, format!("it-{n}"), &1).await.unwrap());
        }
        let idle = quick(&backend).await.start().await.unwrap();
        backend.execute(&format!("DELETE FROM {}", B::table(table))).await;
        let sound = hosts[0].spawn(IT, "sound", &1).await.unwrap();
        handles.push(sound);
        for handle in &handles {
            for n in 2..4 {
                handle.raise(GO, &n).await.unwrap();
            }
        }
        for handle in &handles {
            assert_eq!(handle.output().await.unwrap(), 6, "{table}");
        }
        until("all have their rows again", async || orphans(&backend).await.is_empty()).await;
        for host in hosts.into_iter().chain([idle]) {
            host.shutdown(MINUTE).await;
        }
        // Of those that owned nothing, too, nothing is left.
        let looks = serving(often(&backend).await, &effects).await;
        until("there is one alone", async || {
            let alone = async |table: &str| backend.number(&count_of(&B::table(table))).await == 1;
            alone("instances").await && alone("fences").await
        })
        .await;
        looks.shutdown(MINUTE).await;
    }
}

fn count_of(table: &str) -> String {
    format!("SELECT CAST(count(*) AS BIGINT) FROM {table}")
}

/// What they owned is handed back by whoever comes next.
async fn dead_instances_that_are_gone<B: Hands>() {
    for table in ["fences", "instances"] {
        let (backend, effects) = (B::new().await, Effects::default());
        let never = async |_: Process, _: u32| std::future::pending::<Result<u32, Failure>>().await;
        let dies = quick(&backend).await.register(IT, never).start().await.unwrap();
        for n in 0..10 {
            dies.spawn(IT, format!("it-{n}"), &1).await.unwrap();
        }
        drop(dies);
        backend.execute(&format!("DELETE FROM {}", B::table(table))).await;
        let lives = start(&backend, &effects).await;
        for n in 0..10 {
            let handle = lives.get(format!("it-{n}")).of(IT);
            for n in 2..4 {
                handle.raise(GO, &n).await.unwrap();
            }
            assert_eq!(handle.output().await.unwrap(), 6, "{table}");
        }
        lives.shutdown(MINUTE).await;
        assert_eq!(orphans(&backend).await, Vec::<String>::new(), "{table}");
    }
}

/// One that lives, and does not know yet that a row of it is gone, is fenced off before anybody else gets what it owns.
async fn who_is_reinstated_writes_no_more<B: Hands>() {
    let backend = B::new().await;
    let storage = backend.storage().await;
    let (me, _heart) = ops::enlist(&storage).await;
    let run = ops::start(&storage, me, "p").await;
    backend.execute(&format!("DELETE FROM {}", B::table("instances"))).await;
    ops::commit(&storage, me, vec![ops::record(run, "before")]).await;
    assert_eq!(storage.reinstate().await.unwrap(), 1);
    assert_eq!(storage.reinstate().await.unwrap(), 0);
    let refused = storage.commit(&ops::batch(me, 0, vec![ops::record(run, "after")])).await;
    assert!(matches!(refused, Err(StorageError::Fenced)), "{refused:?}");
    let peers = storage.peers("default", InstanceId::new()).await.unwrap().peers;
    assert!(matches!(&peers[..], [peer] if peer.fenced && peer.instance == me), "{peers:?}");
    assert_eq!((storage.release(me, 10).await.unwrap(), storage.release(me, 10).await.unwrap()), (1, 0));
    assert_eq!(orphans(&backend).await, Vec::<String>::new());
}

/// Processes that somebody has given to an instance that there never was are handed back by those that run.
async fn owners_that_nobody_knows<B: Hands>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = serving(often(&backend).await, &effects).await;
    let mut handles = Vec::new();
    for (n, _) in B::STRANGERS.iter().enumerate() {
        handles.push(host.spawn(IT, format!("it-{n}"), &1).await.unwrap());
    }
    let firsts = B::STRANGERS.len();
    until("all are parked", async || host.in_memory() == 0 && effects.all().len() == firsts).await;
    for (n, owner) in B::STRANGERS.iter().enumerate() {
        let set = format!("status = 'running', wake_at = NULL, owner = {owner}");
        backend.execute(&format!("UPDATE {} SET {set} WHERE id = 'it-{n}'", B::PROCESSES)).await;
    }
    for handle in &handles {
        until("it is handed back", async || handle.status().await.is_ok_and(|it| it.status == Status::Waiting)).await;
        for n in 2..4 {
            handle.raise(GO, &n).await.unwrap();
        }
        assert_eq!(handle.output().await.unwrap(), 6);
    }
    assert_eq!(effects.all().len(), firsts * 2, "nothing happened twice");
    host.shutdown(MINUTE).await;
    assert_eq!(orphans(&backend).await, Vec::<String>::new());
}

/// Nobody is taken for dead who lives, nobody who has died is taken for living, and whatever is due comes.
async fn a_clock_that_is_set_back<B: Hands>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let hosts = [start(&backend, &effects).await, start(&backend, &effects).await];
    let mut handles = Vec::new();
    for n in 0..10 {
        handles.push(hosts[n % 2].spawn(IT, format!("it-{n}"), &1).await.unwrap());
    }
    until("all are parked", async || hosts.iter().all(|host| host.in_memory() == 0) && effects.all().len() == 10).await;
    backend.set_back().await;
    for handle in &handles {
        handle.raise(GO, &2).await.unwrap();
    }
    // Those of the one that dies are taken over.
    let [dies, lives] = hosts;
    drop(dies);
    for handle in &handles {
        let handle = lives.get(handle.id()).of(IT);
        handle.raise(GO, &3).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 6);
        let info = handle.status().await.unwrap();
        assert!(info.status_at <= info.created_at, "the clock was set back");
    }
    assert_eq!(effects.all().len(), 20, "nothing happened twice");
    let late = lives.spawn(IT, "late", &1).await.unwrap();
    assert_eq!(late.status().await.unwrap().status, Status::Running);
}

/// A timer is due by the storage's clock, whatever that does meanwhile; a clock that is set forth wakes it early, not
/// twice.
#[tokio::test(start_paused = true)]
async fn timers_when_the_clock_jumps() {
    const SLEEP: Definition<(), (bool, i64)> = Definition::new("sleep");
    let storage = Memory::new();
    let sleep = async |proc: Process, ()| {
        let delayed = proc.delay("an hour", 60 * MINUTE).await?;
        Ok::<_, Failure>((delayed.on_time(), (delayed.woke - delayed.due).num_hours()))
    };
    let host = Host::builder(storage.clone()).register(SLEEP, sleep).start().await.unwrap();
    for (jump, hours) in [(-2, 3), (-100, 101), (0, 1), (1, 0)] {
        let handle = host.spawn(SLEEP, format!("{jump}"), &()).await.unwrap();
        until_status(&handle, Status::Waiting).await;
        let since = tokio::time::Instant::now();
        storage.jump(TimeDelta::hours(jump));
        assert_eq!(handle.output().await.unwrap(), (true, 0), "{jump}");
        let slept = since.elapsed();
        let (least, most) = ((hours * 60 * MINUTE).saturating_sub(MINUTE), (hours + 1) * 60 * MINUTE + MINUTE);
        assert!(slept >= least && slept <= most, "{jump}: {slept:?}");
    }
}
