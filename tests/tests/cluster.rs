//! Several instances on one PostgreSQL: networks that cut, stall and lose answers, servers that crash. Each ends with the
//! exact check of what the instances did.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Op, Outcome, Storage, StorageError};
use durable_core::*;
use durable_tests::crash::check::check;
use durable_tests::crash::deadly::Fuse;
use durable_tests::crash::journal::{self, Journal, What};
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::crash::shared::{Shared, read};
use durable_tests::crash::workload::{self, Bench};
use durable_tests::ops::*;
use durable_tests::proxy::Proxy;
use durable_tests::*;
use std::collections::BTreeMap;
use std::time::Duration;
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

// --- The network ---------------------------------------------------------------------------------------------------

/// The answer to a batch breaks off behind each of its bytes: the storage says whether it knows, what it knows is true,
/// and the same batch again, by a later generation, finds its own success or makes up for it.
async fn answers_cut_everywhere(several: bool) {
    let schema = PostgresSchema::new().await;
    let direct = schema.storage().await;
    let proxy = Proxy::before(schema.url()).await;
    // Nothing but the batch is under way.
    let storage = Postgres::connect(&proxy.url).schema(schema.name()).listen(false).await.unwrap();
    let (me, _heart) = enlist(&direct).await;
    start(&direct, me, "target").await;
    let success = [Outcome::Recorded, Outcome::Finished { wakes: vec![] }];
    let (mut generation, mut tries, mut unknown, mut bytes) = (0, 0, 0, 0);
    loop {
        let mut batches = Vec::new();
        // The first one opens a connection and prepares the statements there, the second one is measured.
        for id in [format!("first-{bytes}"), format!("second-{bytes}"), format!("p-{bytes}")] {
            let (op, run) = spawn(&id, true);
            direct.commit(&batch(me, generation, vec![op])).await.unwrap();
            let mut ops = vec![record(run, "a"), finish(run)];
            if several {
                ops.extend([raise("target", &id), Op::Cancel { id: "target".into() }]);
            }
            batches.push((run, ops));
        }
        let (run, ops) = batches.remove(2);
        let mut length = 0;
        for (_, ops) in batches {
            let answered = proxy.answered();
            storage.commit(&batch(me, generation, ops)).await.unwrap();
            length = proxy.answered() - answered;
        }
        let lost = proxy.lost();
        proxy.cut_next_answer(Some(bytes));
        let result = storage.commit(&batch(me, generation, ops.clone())).await;
        if let Ok(outcomes) = result {
            assert_eq!(outcomes[..2], success, "{bytes}");
            break;
        }
        assert_eq!(proxy.lost(), lost + 1, "{bytes}: {result:?}");
        generation += 1;
        direct.refence(me, generation).await.unwrap();
        let written = schema.number(&format!("SELECT count(*) FROM {{s}}.steps WHERE run = '{}'", run.0)).await == 1;
        match result {
            Err(StorageError::Unavailable(_)) => assert!(!written, "{bytes}"),
            Err(StorageError::Unknown(_)) => unknown += 1,
            other => panic!("{bytes}: {other:?}"),
        }
        let outcomes = direct.commit(&batch(me, generation, ops)).await.unwrap();
        assert_eq!(outcomes[..2], success, "{bytes}");
        // The end is that of the commit; what comes before it is much alike.
        let middle = 30..length.saturating_sub(40);
        bytes += if !long() && middle.contains(&bytes) { middle.len() / 4 + 1 } else { 1 };
        tries += 1;
    }
    println!("{tries} answers of up to {bytes} bytes cut, {unknown} of them unknown");
    assert!(unknown > 10 && (!several || tries > unknown + 10), "{unknown} of {tries} were unknown");
    let odd = "SELECT count(*) FROM {s}.processes p WHERE id <> 'target'
        AND (status <> 'completed' OR 1 <> (SELECT count(*) FROM {s}.steps s WHERE s.run = p.run))";
    assert_eq!(schema.number(odd).await, 0);
    let messages = schema.number("SELECT count(DISTINCT event_id) - count(*) FROM {s}.events").await;
    assert_eq!(messages, 0, "each message once");
}

#[test]
fn answers_of_a_statement_cut_everywhere() {
    test(answers_cut_everywhere(false));
}

#[test]
fn answers_of_a_transaction_cut_everywhere() {
    test(answers_cut_everywhere(true));
}

async fn through(proxy: &Proxy, schema: &PostgresSchema) -> Postgres {
    PostgresSchema::storage_at(&format!("{}#{}", proxy.url, schema.name()), false).await
}

/// Three instances, each with a network of its own, which cuts, stalls, loses answers and becomes slow.
async fn a_bad_network(seed: u64) {
    let scene = Scene::<PostgresSchema>::new(WORKER, 90, Duration::from_millis(80)).await;
    scene.backend.storage().await;
    let mut random = Random(seed);
    let (mut proxies, mut tasks) = (Vec::new(), Vec::new());
    for number in 1..=3 {
        let proxy = Proxy::before(scene.backend.url()).await;
        tasks.push(scene.start_here(through(&proxy, &scene.backend).await, number));
        proxies.push(proxy);
    }
    let mut faults = 0;
    while faults < 60 && !tasks.iter().all(JoinHandle::is_finished) {
        let proxy = &proxies[random.below(3) as usize];
        let pause = Duration::from_millis(5 + random.below(60));
        match random.below(5) {
            0 => proxy.cut(),
            1 => proxy.cut_next_answer(Some(random.below(1500) as usize)),
            2 => proxy.network(|network| network.swallows = true),
            3 => proxy.network(|network| network.stalled = true),
            _ => proxy.network(|network| network.latency = Duration::from_millis(random.below(8))),
        }
        tokio::time::sleep(pause).await;
        // Stalled ones stay so for a while.
        proxy.network(|network| network.swallows = false);
        if random.below(3) > 0 {
            proxy.network(|network| network.stalled = false);
        }
        faults += 1;
    }
    for proxy in &proxies {
        proxy.network(|network| *network = Default::default());
        proxy.cut();
    }
    ended(tasks).await;
    println!("{faults} faults, {} answers lost", proxies.iter().map(Proxy::lost).sum::<usize>());
    assert!(faults >= 10, "they ended after {faults} faults");
    scene.check().await;
}

#[test]
fn bad_networks() {
    test(async {
        for seed in 0..if long() { 20 } else { 2 } {
            a_bad_network(seed).await;
        }
    });
}

/// An instance is cut off for longer than its heartbeat may be silent, and goes on as a program: another one takes over
/// although its session still holds its lock. It begins nothing meanwhile, and what it sends late is refused.
#[test]
fn an_instance_that_is_cut_off() {
    test(async {
        let scene = Scene::<PostgresSchema>::new(WORKER, 40, Duration::from_millis(100)).await;
        scene.backend.storage().await;
        let proxy = Proxy::before(scene.backend.url()).await;
        let first = scene.start_here(through(&proxy, &scene.backend).await, 1);
        scene.until_begun(60).await;
        scene.count_takeovers().await;
        proxy.network(|network| network.stalled = true);
        let second = scene.start_here(scene.backend.storage().await, 2);
        ended(vec![second]).await;
        assert!(scene.backend.taken_over().await > 0, "nothing was taken over");
        proxy.network(|network| network.stalled = false);
        ended(vec![first]).await;
        scene.check().await;
    });
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

/// The same with short steps and short times: every batch is in danger.
#[test]
fn a_server_that_crashes_under_load() {
    Server::run(async |server| {
        let scene = Scene::on(PostgresSchema::on(server.url()), WORKER, 200, Duration::from_millis(30));
        let mut tasks = Vec::new();
        for number in 1..=3 {
            tasks.push(scene.start_here(scene.backend.storage().await, number));
        }
        scene.until_begun(100).await;
        let mut crashes = 0;
        while crashes < 5 && !tasks.iter().all(JoinHandle::is_finished) {
            server.crash_and_start().await;
            crashes += 1;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ended(tasks).await;
        assert!(crashes > 2, "they ended after {crashes} crashes");
        scene.check().await;
        assert!(!server.log().contains("deadlock detected"));
    });
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
        let scene = Scene::<PostgresSchema>::new(WORKER, 90, Duration::from_millis(60)).await;
        let schema = &scene.backend;
        schema.storage().await;
        let mut workers: Vec<_> = (0..3).map(|_| scene.start(None)).collect();
        scene.until_begun(100).await;
        schema.execute(LATER).await;
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
