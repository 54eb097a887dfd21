//! Networks that cut, stall and lose answers, between instances and the servers of their databases. Each ends with the exact
//! check of what the instances did.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Op, Outcome, Storage, StorageError};
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::ops::*;
use durable_tests::proxy::{Proxied, Proxy};
use durable_tests::{MssqlSchema, PostgresSchema, long};
use std::time::Duration;
use tokio::task::JoinHandle;

const WORKER: &str = env!("CARGO_BIN_EXE_worker");

/// One named test of each case for each database that is reached over a network.
macro_rules! on_each_server {
    ($($case:ident),* $(,)?) => {
        $(mod $case {
            use super::*;
            #[test]
            fn postgres() {
                PostgresSchema::run(super::$case::<PostgresSchema>());
            }
            #[test]
            fn mssql() {
                MssqlSchema::run(super::$case::<MssqlSchema>());
            }
        })*
    };
}

on_each_server!(
    answers_of_a_small_batch_cut_everywhere,
    answers_of_a_batch_about_others_cut_everywhere,
    bad_networks,
    connections_cut_at_any_byte,
    an_instance_that_is_cut_off,
);

async fn ended(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        tokio::time::timeout(LONG, task).await.expect("an instance does not end").unwrap();
    }
}

/// The answer to a batch breaks off behind each of its bytes: the storage says whether it knows, what it knows is true,
/// and the same batch again, by a later generation, finds its own success or makes up for it.
async fn answers_cut_everywhere<B: Proxied>(several: bool) {
    let schema = B::new().await;
    let direct = schema.storage().await;
    let proxy = schema.proxy().await;
    // Nothing but the batch is under way.
    let storage = schema.alone_through(&proxy).await;
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
                ops.extend([raise("target", &id), Op::cancel("target".into())]);
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
        let written =
            schema.number(&format!("SELECT count(*) FROM {} WHERE run = {}", B::STEPS, B::literal(run))).await == 1;
        match result {
            Err(StorageError::Unavailable(_)) => assert!(!written, "{bytes}"),
            Err(StorageError::Unknown(_)) => unknown += 1,
            other => panic!("{bytes}: {other:?}"),
        }
        let outcomes = direct.commit(&batch(me, generation, ops)).await.unwrap();
        assert_eq!(outcomes[..2], success, "{bytes}");
        // The end is that of the commit; what comes before it is much alike.
        let middle = 30..length.saturating_sub(40);
        bytes += if !long() && middle.contains(&bytes) { middle.len() / 4 + 1 } else { B::STRIDE };
        tries += 1;
    }
    println!("{tries} answers of up to {bytes} bytes cut, {unknown} of them unknown");
    assert!(unknown > 3 && (!several || B::STRIDE > 1 || tries > unknown + 10), "{unknown} of {tries} were unknown");
    let odd = format!(
        "SELECT count(*) FROM {} p WHERE id <> 'target'
             AND (status <> 'completed' OR 1 <> (SELECT count(*) FROM {} s WHERE s.run = p.run))",
        B::PROCESSES,
        B::STEPS
    );
    assert_eq!(schema.number(&odd).await, 0);
    let messages = schema.number("SELECT count(DISTINCT event_id) - count(*) FROM events").await;
    assert_eq!(messages, 0, "each message once");
}

async fn answers_of_a_small_batch_cut_everywhere<B: Proxied>() {
    answers_cut_everywhere::<B>(false).await;
}

async fn answers_of_a_batch_about_others_cut_everywhere<B: Proxied>() {
    answers_cut_everywhere::<B>(true).await;
}

/// Three instances, each with a network of its own, which cuts, stalls, loses answers and becomes slow.
async fn a_bad_network<B: Proxied>(seed: u64) {
    let scene = Scene::<B>::new(WORKER, 90, Duration::from_millis(80)).await;
    scene.backend.storage().await;
    let mut random = Random(seed);
    let (mut proxies, mut tasks) = (Vec::new(), Vec::new());
    for number in 1..=3 {
        let proxy = scene.backend.proxy().await;
        tasks.push(scene.start_here(scene.backend.through(&proxy).await, number));
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

async fn bad_networks<B: Proxied>() {
    for seed in 0..if long() { 20 } else { 2 } {
        a_bad_network::<B>(seed).await;
    }
}

/// Connections that end after any number of bytes, in the middle of what is sent or of what is answered.
async fn connections_cut_at_any_byte<B: Proxied>() {
    for seed in 0..if long() { 20 } else { 2 } {
        let scene = Scene::<B>::new(WORKER, 120, Duration::from_millis(60)).await;
        scene.backend.storage().await;
        let (mut proxies, mut tasks) = (Vec::new(), Vec::new());
        for number in 1..=3 {
            let proxy = scene.backend.proxy().await;
            tasks.push(scene.start_here(scene.backend.through(&proxy).await, number));
            // Those that are there already live on until they are cut.
            // The records of all processes, in one answer, still pass now and then.
            proxy.cut_within(Some(1 << 20), seed * 10 + u64::from(number));
            proxy.cut();
            proxies.push(proxy);
        }
        let lost = || proxies.iter().map(Proxy::lost).sum::<usize>();
        while lost() < 40 && !tasks.iter().all(JoinHandle::is_finished) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for proxy in &proxies {
            proxy.cut_within(None, seed);
            proxy.cut();
        }
        println!("seed {seed}: {} connections cut", lost());
        assert!(lost() >= 5, "seed {seed}: they ended after {} cuts", lost());
        ended(tasks).await;
        scene.check().await;
    }
}

/// An instance is cut off for longer than its heartbeat may be silent, and goes on as a program: another one takes over
/// although its session still holds its lock. It begins nothing meanwhile, and what it sends late is refused.
async fn an_instance_that_is_cut_off<B: Proxied>() {
    let scene = Scene::<B>::new(WORKER, 40, Duration::from_millis(100)).await;
    scene.backend.storage().await;
    let proxy = scene.backend.proxy().await;
    let first = scene.start_here(scene.backend.through(&proxy).await, 1);
    scene.until_begun(60).await;
    scene.count_takeovers().await;
    proxy.network(|network| network.stalled = true);
    let second = scene.start_here(scene.backend.storage().await, 2);
    ended(vec![second]).await;
    assert!(scene.backend.taken_over().await > 0, "nothing was taken over");
    proxy.network(|network| network.stalled = false);
    ended(vec![first]).await;
    scene.check().await;
}

/// The server's machine is gone without a word: nothing ever comes over the connections that there were, not even their end,
/// and new ones lead to another server. What was under way is made again on new ones.
#[test]
fn connections_that_fall_silent() {
    PostgresSchema::run(async {
        let scene = Scene::<PostgresSchema>::new(WORKER, 60, Duration::from_millis(50)).await;
        let proxy = Proxy::before(scene.backend.url()).await;
        let bound = Duration::from_millis(500);
        let connect =
            durable_postgres::Postgres::connect(&*proxy.url).schema(scene.backend.name()).timeouts(bound, bound);
        let host = scene.start_here(connect.await.unwrap(), 1);
        for begun in [20, 60, 100] {
            scene.until_begun(begun).await;
            proxy.mute();
        }
        tokio::time::timeout(LONG, host).await.expect("it waits for ever").unwrap();
        scene.check().await;
    });
}
