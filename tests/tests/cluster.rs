//! Several instances on one PostgreSQL: servers that crash, clocks that are apart, other versions. Each ends with the exact
//! check of what the instances did.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::crash::check::check;
use durable_tests::crash::deadly::Fuse;
use durable_tests::crash::journal::{self, Journal, What};
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::crash::shared::{Shared, read};
use durable_tests::crash::workload::{self, Bench};
use durable_tests::proxy::Proxied;
use durable_tests::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

const WORKER: &str = env!("CARGO_BIN_EXE_worker");

fn test(test: impl Future<Output = ()>) {
    PostgresSchema::run(test);
}

async fn ended(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        tokio::time::timeout(LONG, task).await.expect("an instance does not end").unwrap();
    }
}

// --- The server ----------------------------------------------------------------------------------------------------

const SLOW: Definition<u32, u32> = Definition::new("slow");
const SLOW_STEPS: [&str; 2] = ["one", "two"];

async fn slow(bench: Bench, proc: Process, input: u32) -> Result<u32, Failure> {
    let one = workload::step(&bench, &proc, SLOW_STEPS[0], input).await?;
    let two = workload::step(&bench, &proc, SLOW_STEPS[1], input).await?;
    bench.journal.write(&proc, What::End);
    Ok(one + two)
}

/// Interleaving 9. The server crashes again and again while three instances are in the middle of long steps: whose
/// heartbeats and locks were all lost at once takes nobody for dead, and no step runs twice.
#[test]
fn a_server_that_crashes() {
    Server::run(async |server| {
        const MANY: u32 = 30;
        let schema = PostgresSchema::on(server.url());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut hosts = Vec::new();
        for number in 1..=3 {
            let journal = Journal::open(&path, number).unwrap();
            let bench = Bench { journal, fuse: Fuse::new(None), pace: Duration::from_secs(5) };
            let builder = Host::builder(schema.storage().await).max_processes(MANY as usize / 3);
            hosts.push(
                builder.register(SLOW, move |proc, input| slow(bench.clone(), proc, input)).start().await.unwrap(),
            );
        }
        schema.execute(PostgresSchema::COUNT_TAKEOVERS).await;
        let mut handles = Vec::new();
        for n in 0..MANY {
            handles.push(hosts[n as usize % 3].spawn(SLOW, format!("p-{n}"), &n).await.unwrap());
        }
        for pause in [500, 1200, 2500, 700] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            server.crash_and_start().await;
        }
        for (n, handle) in (0..).zip(&handles) {
            assert_eq!(handle.output().await.unwrap(), 2 * n);
        }
        assert_eq!(schema.taken_over().await, 0, "somebody was taken for dead");
        let lines = journal::read(&path);
        let (records, processes) = read(&schema).await;
        let wrong = check(&lines, &records, &processes, &SLOW_STEPS);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let mut begun = BTreeMap::new();
        for line in &lines {
            if let What::Begin { step, .. } = &line.what {
                *begun.entry((&line.id, step)).or_insert(0) += 1;
            }
        }
        assert_eq!(begun.len(), 2 * MANY as usize);
        begun.retain(|_, times| *times > 1);
        assert!(begun.is_empty(), "they ran more than once: {begun:?}");
        let programs: std::collections::BTreeSet<u32> = lines.iter().map(|line| line.program).collect();
        assert_eq!(programs.len(), 3, "all of them had work");
        for host in hosts {
            host.shutdown(Duration::from_secs(5)).await;
        }
    });
}

/// The same with short times and many more processes: every batch is in danger. In the long form, for two minutes.
#[test]
fn a_server_that_crashes_under_load() {
    Server::run(async |server| {
        // A process takes at least eight times its pace: more than all the crashes.
        let (processes, pace, crashes) = if long() { (5000, 24_000, 35) } else { (200, 1000, 5) };
        let schema = PostgresSchema::on(server.url());
        let scene = Scene::on(schema, WORKER, processes, Duration::from_millis(pace));
        let mut tasks = Vec::new();
        for number in 1..=3 {
            tasks.push(scene.start_here(scene.backend.storage().await, number));
        }
        scene.until_begun(100).await;
        let mut random = Random(1);
        let since = Instant::now();
        for crash in 1..=crashes {
            // A crash that nobody is in the middle of anything at proves nothing.
            let ended = scene.lines().iter().filter(|line| matches!(line.what, What::End)).count();
            assert!(ended < processes as usize, "all had ended before crash {crash}");
            if crash == crashes {
                println!(
                    "{} of {processes} had not ended at the last crash, after {:?}",
                    processes as usize - ended,
                    since.elapsed()
                );
            }
            server.crash_and_start().await;
            let pause = if long() { 1000 + random.below(4000) } else { 200 };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        ended(tasks).await;
        scene.check().await;
        assert!(!server.log().contains("deadlock detected"));
    });
}

/// The server dies, and another one that has all that it had told takes its place, at another address.
#[test]
fn a_server_whose_place_another_one_takes() {
    Server::run(async |first| {
        let schema = PostgresSchema::on(first.url());
        let (processes, pace, rounds) = if long() { (1000, 2000, 5) } else { (150, 400, 1) };
        let scene = Scene::on(schema, WORKER, processes, Duration::from_millis(pace));
        let mut standby = Some(first.standby().await);
        let proxy = scene.backend.proxy().await;
        let mut tasks = Vec::new();
        for number in 1..=3 {
            tasks.push(scene.start_here(scene.backend.through(&proxy).await, number));
        }
        let mut servers = vec![first];
        for round in 1..=rounds {
            let old = servers.last().unwrap();
            let new = match standby.take() {
                Some(standby) => standby,
                None => old.standby().await,
            };
            scene.until_begun(round * 150).await;
            old.crash().await;
            // Its address may lead to the new one before that may be written to.
            proxy.lead_to(place(new.url()));
            until("they have found it read-only", async || new.log().contains("read-only transaction")).await;
            new.promote().await;
            servers.push(new);
            assert!(!tasks.iter().all(JoinHandle::is_finished), "they ended before");
        }
        ended(tasks).await;
        let scene = scene.copied_to(scene.backend.moved_to(servers.last().unwrap().url()));
        scene.check().await;
    });
}

/// `host:port` of an address.
fn place(url: &str) -> &str {
    url.split_once('@').and_then(|(_, rest)| rest.split_once('/')).unwrap().0
}

// --- Clocks --------------------------------------------------------------------------------------------------------

/// Programs whose clocks are minutes apart, and not the database's either: timers are on time, nobody is taken for dead,
/// and whoever dies is taken over.
#[test]
fn clocks_that_are_apart() {
    test(async {
        let Some(library) = faketime() else {
            return not_run("clocks that are apart", "libfaketime is not installed");
        };
        let scene = Scene::<PostgresSchema>::new(WORKER, 60, Duration::from_millis(60)).await;
        scene.backend.storage().await;
        scene.count_takeovers().await;
        let start = |clock: &str| {
            // The clock that only measures is nobody's to set.
            let unset = ("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            scene.start_with(&[("LD_PRELOAD", &library), ("FAKETIME", clock), unset])
        };
        let mut workers = vec![start("-7m"), start("+11m"), scene.start(None)];
        scene.until_begun(200).await;
        assert_eq!(scene.backend.taken_over().await, 0, "somebody was taken for dead");
        for (worker, clock) in workers.iter_mut().zip(["+3m", "-20m"]) {
            worker.kill();
            *worker = start(clock);
            scene.until_begun(scene.begun() + 60).await;
        }
        for worker in &mut workers {
            assert!(worker.wait(LONG), "a worker failed");
        }
        scene.check().await;
        let late = "SELECT count(*) FROM {s}.steps WHERE abs(extract(epoch FROM now() - recorded_at)) > 60";
        assert_eq!(scene.backend.number(late).await, 0, "times are the database's");
    });
}

fn faketime() -> Option<String> {
    const LIBRARY: &str = "faketime/libfaketime.so.1";
    let folders = std::fs::read_dir("/usr/lib").ok()?.filter_map(Result::ok).map(|entry| entry.path());
    let mut folders = folders.chain(["/usr/lib".into(), "/usr/lib64".into(), "/usr/local/lib".into()]);
    let library = folders.find(|folder: &std::path::PathBuf| folder.join(LIBRARY).exists())?.join(LIBRARY);
    library.to_str().map(str::to_owned)
}

// --- Upgrades ------------------------------------------------------------------------------------------------------

/// A later version's migration, which adds what this one does not know.
const LATER: &str = "
    ALTER TABLE {s}.processes ADD COLUMN priority integer NOT NULL DEFAULT 0;
    ALTER TABLE {s}.steps ADD COLUMN note text;
    ALTER TABLE {s}.events ADD COLUMN sender text;
    ALTER TABLE {s}.instances ADD COLUMN version bigint;
    CREATE TABLE {s}.notes (run uuid NOT NULL PRIMARY KEY, note text NOT NULL);
    CREATE INDEX processes_priority ON {s}.processes (priority) WHERE status = 'waiting';
    INSERT INTO {s}.migrations (version, name, checksum, oldest_code, applied_at)
        SELECT max(version) + 1, 'later', 'x', max(version), now() FROM {s}.migrations;";

/// Programs of this version go on while the schema becomes that of the next one, and while they are replaced one by one;
/// once the schema asks for later code, they are refused.
#[test]
fn a_rolling_upgrade() {
    test(async {
        let scene = Scene::<PostgresSchema>::new(WORKER, 90, Duration::from_secs(1)).await;
        let schema = &scene.backend;
        schema.storage().await;
        let mut workers: Vec<_> = (0..3).map(|_| scene.start(None)).collect();
        scene.until_begun(100).await;
        // One at a time: all in one transaction could lock tables in another order than the programs do, and be the one that
        // the server gives up. (What migrates for good tries again then.)
        for statement in LATER.split_inclusive(";\n") {
            schema.execute(statement).await;
        }
        for worker in &mut workers {
            scene.until_begun(scene.begun() + 60).await;
            worker.kill();
            *worker = scene.start(None);
        }
        for worker in &mut workers {
            assert!(worker.wait(LONG), "a worker failed");
        }
        scene.check().await;
        schema.execute("UPDATE {s}.migrations SET oldest_code = version WHERE name = 'later'").await;
        let refused = Postgres::connect(schema.url()).schema(schema.name()).await.unwrap_err();
        assert!(refused.to_string().contains("deploy a newer version of the service"), "{refused}");
        assert!(!scene.start(None).wait(LONG), "it runs on a schema that asks for later code");
    });
}
