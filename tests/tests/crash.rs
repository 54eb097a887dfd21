//! Programs that die by SIGKILL at every boundary around a step and at random, alone and three at a time; and programs
//! that are stopped for longer than their heartbeat may be silent. What they leave is checked exactly.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_tests::crash::deadly::{Boundary, Of};
use durable_tests::crash::journal::{Line, What};
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::crash::shared::Shared;
use durable_tests::crash::worker::Worker;
use durable_tests::{Backend, PostgresSchema, Sql, SqliteFile, long, on_each_database, run, until};
use sqlx::Executor;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

const WORKER: &str = env!("CARGO_BIN_EXE_worker");

/// A worker dies at the boundary, and everything is as it should be in the end: others are there, or it is started again.
/// Says whether it died at all.
async fn dies_at<B: Shared>(boundary: Boundary, programs: usize) -> bool {
    let scene = Scene::<B>::new(WORKER, 2 * programs as u32, Duration::ZERO).await;
    let mut first = scene.start(Some(boundary));
    let mut others: Vec<Worker> = (1..programs).map(|_| scene.start(None)).collect();
    let died = !first.wait(LONG);
    if others.is_empty() {
        others.push(scene.start(None));
    }
    for other in &mut others {
        assert!(other.wait(LONG), "another worker failed");
    }
    scene.check().await;
    died
}

macro_rules! boundaries {
    ($($name:ident: $side:literal $of:ident $nth:expr),* $(,)?) => {
        $(async fn $name<B: Shared>() {
            let boundary = |nth| Boundary { after: $side == "after", of: Of::$of, nth };
            for nth in $nth {
                assert!(dies_at::<B>(boundary(nth), 1).await, "it never came to {}", boundary(nth));
            }
            // With others there it may not come so far.
            dies_at::<B>(boundary($nth[0]), 3).await;
        })*
        on_each_database!($($name),*);
    };
}

boundaries! {
    before_an_effect: "before" Effect [1, 3, 9],
    after_an_effect_before_its_record: "after" Effect [1, 4, 10],
    before_a_record: "before" Record [1, 2, 5, 11],
    after_a_record: "after" Record [1, 3, 6, 12],
    before_a_pending_record: "before" Pending [1, 2, 4],
    after_a_pending_record: "after" Pending [1, 3, 5],
    while_starting: "before" Spawn [1, 2],
    after_starting: "after" Spawn [1, 2],
    while_raising: "before" Raise [1],
    after_raising: "after" Raise [1, 2],
    while_parking: "before" Park [1, 2],
    after_parking: "after" Park [1, 2],
    while_claiming: "before" Claim [1],
    after_claiming: "after" Claim [1],
    while_completing: "before" Finish [1, 2],
    after_completing: "after" Finish [1, 2],
}

/// Kills workers at random until so many have died, then lets them end.
async fn at_random<B: Shared>(programs: usize, processes: u32, kills: usize, seed: u64) {
    let scene = Scene::<B>::new(WORKER, processes, Duration::from_millis(2)).await;
    let mut random = Random(seed);
    let mut workers: Vec<Worker> = (0..programs).map(|_| scene.start(None)).collect();
    let mut killed = 0;
    while killed < kills {
        tokio::time::sleep(Duration::from_millis(10 + random.below(120))).await;
        let victim = random.below(programs as u64) as usize;
        match workers[victim].ended() {
            // All ended: there is nothing left to kill.
            Some(true) => break,
            Some(false) => panic!("a worker failed"),
            None => {
                workers[victim].kill();
                killed += 1;
                workers[victim] = scene.start(None);
            }
        }
    }
    for worker in &mut workers {
        assert!(worker.wait(LONG), "a worker failed after {killed} kills");
    }
    scene.check().await;
}

async fn one_program_killed_at_random<B: Shared>() {
    for seed in 0..if long() { 40 } else { 4 } {
        at_random::<B>(1, 40, 8, seed).await;
    }
}

async fn three_programs_killed_at_random<B: Shared>() {
    for seed in 0..if long() { 40 } else { 4 } {
        at_random::<B>(3, 60, 10, 1000 + seed).await;
    }
}

on_each_database!(one_program_killed_at_random, three_programs_killed_at_random);

/// Stops a worker inside a transaction, or outside.
async fn stop(scene: &Scene<impl Shared>, worker: &Worker, inside: bool) {
    let since = Instant::now();
    loop {
        worker.signal("STOP");
        if scene.backend.is_held().await == inside {
            return;
        }
        worker.signal("CONT");
        assert!(
            since.elapsed() < LONG,
            "it is never stopped {} a transaction",
            if inside { "inside" } else { "outside" }
        );
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}

/// Stopped past its heartbeat outside a transaction: the other one takes over and ends everything; what the first one
/// writes when it goes on is refused, and it goes on as a new instance.
async fn stopped_outside_a_transaction<B: Shared>() {
    let scene = Scene::<B>::new(WORKER, 40, Duration::from_millis(15)).await;
    let mut first = scene.start(None);
    scene.until_begun(60).await;
    scene.count_takeovers().await;
    let mut second = scene.start(None);
    stop(&scene, &first, false).await;
    assert!(second.wait(LONG), "the second worker failed");
    first.signal("CONT");
    assert!(first.wait(LONG), "the first worker failed");
    scene.check().await;
    assert!(scene.backend.taken_over().await > 0, "nothing was taken over");
}

/// Stopped past its heartbeat inside a transaction of SQLite: nobody can write, so nobody's silence counts; when it goes
/// on, so do all.
#[test]
fn stopped_inside_the_transaction_of_sqlite() {
    run(async {
        let scene = Scene::<SqliteFile>::new(WORKER, 300, Duration::from_millis(1)).await;
        let mut first = scene.start(None);
        scene.until_begun(100).await;
        scene.count_takeovers().await;
        let mut second = scene.start(None);
        stop(&scene, &first, true).await;
        tokio::time::sleep(Duration::from_secs(if long() { 20 } else { 5 })).await;
        assert!(scene.backend.is_held().await);
        first.signal("CONT");
        assert!(first.wait(LONG), "the first worker failed");
        assert!(second.wait(LONG), "the second worker failed");
        scene.check().await;
        assert_eq!(scene.backend.taken_over().await, 0, "somebody was taken for dead");
    });
}

/// Somebody takes processes away from an owner that lives, as a take-over without a fence would: the owner's late
/// records are refused row by row, and it lets go.
async fn processes_taken_away_by_hand<B: Shared>() {
    let scene = Scene::<B>::new(WORKER, 30, Duration::from_millis(20)).await;
    let mut first = scene.start(None);
    scene.until_begun(30).await;
    let mut second = scene.start(None);
    let sql = format!(
        "UPDATE {} SET owner = NULL, status = 'waiting', calm_claim = claim, wake_at = {} WHERE status = 'running'",
        B::PROCESSES,
        B::NOW
    );
    for _ in 0..10 {
        scene.backend.execute(&sql).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(first.wait(LONG) && second.wait(LONG));
    // It could not know, so it may have begun something while the other one ran; nothing of it was recorded.
    let mut wrong = scene.wrong().await;
    wrong.retain(|wrong| !wrong.ends_with("had begun"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

on_each_database!(stopped_outside_a_transaction, processes_taken_away_by_hand);

/// Interleaving 8. Stopped inside a transaction of PostgreSQL: the server ends it, so that nobody waits for long, and the
/// program is taken over like any other that is silent. When it goes on it is a new instance.
#[test]
fn stopped_inside_a_transaction_of_postgres() {
    PostgresSchema::run(async {
        let scene = Scene::<PostgresSchema>::new(WORKER, 40, Duration::from_millis(150)).await;
        let schema = &scene.backend;
        drop(schema.storage().await);
        scene.count_takeovers().await;
        // The end of a process that others await takes several statements. One in their middle waits here.
        schema
            .execute(
                "CREATE FUNCTION {s}.awaited() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     NEW.awaited = true;
                     RETURN NEW;
                 END $$;
                 CREATE TRIGGER awaited BEFORE INSERT ON {s}.processes FOR EACH ROW EXECUTE FUNCTION {s}.awaited();
                 CREATE FUNCTION {s}.pass() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     PERFORM pg_advisory_xact_lock_shared(hashtext('{s}'));
                     RETURN NULL;
                 END $$;
                 CREATE TRIGGER pass AFTER UPDATE OF status ON {s}.processes FOR EACH ROW
                     WHEN (NEW.status = 'completed') EXECUTE FUNCTION {s}.pass()",
            )
            .await;
        let mut session = schema.connect().await;
        session.execute("SELECT pg_advisory_lock(hashtext(current_schema()))").await.unwrap();
        let mut first = scene.start(None);
        let waits = format!(
            "SELECT count(*) FROM pg_stat_activity
             WHERE application_name = '{}' AND wait_event = 'advisory' AND xact_start < query_start",
            schema.name()
        );
        until("it waits in a transaction that began before", async || schema.number(&waits).await > 0).await;
        first.stop();
        session.execute("SELECT pg_advisory_unlock_all()").await.unwrap();
        let mut second = scene.start(None);
        assert!(second.wait(LONG), "the second worker failed");
        assert!(scene.backend.taken_over().await > 0, "nothing was taken over");
        first.signal("CONT");
        assert!(first.wait(LONG), "the first worker failed");
        scene.check().await;
    });
}

/// With the default settings, one of three dies, and the others run what it ran: because its lock is free, long before
/// its heartbeat has expired.
async fn taken_over_within_seconds<B: Shared>() {
    const EXPIRY: i64 = 10_000;
    let mut scene = Scene::<B>::new(WORKER, 150, Duration::from_millis(150)).await;
    scene.defaults = true;
    let mut workers: Vec<Worker> = (0..3).map(|_| scene.start(None)).collect();
    scene.until_begun(150).await;
    scene.count_takeovers().await;
    // The one that runs most of them: often the first to connect has them all.
    let lines = scene.lines();
    let of = |worker: &Worker| lines.iter().filter(|line| line.program == worker.id()).count();
    workers.sort_by_key(of);
    let mut worker = workers.remove(2);
    let victim = worker.id();
    worker.kill();
    let since = Instant::now();
    // What it ran, as far as can be told from outside: whose last line is its own, and is not the end.
    let mut last = BTreeMap::new();
    for line in scene.lines() {
        last.insert(line.id.clone(), line);
    }
    last.retain(|_, line| line.program == victim && line.what != What::End);
    assert!(!last.is_empty(), "it ran nothing");
    let resumed =
        |line: &Line| line.program != victim && last.get(&line.id).is_some_and(|l| l.execution < line.execution);
    until("all are resumed", async || {
        let ids: BTreeSet<String> = scene.lines().into_iter().filter(resumed).map(|line| line.id).collect();
        ids.len() == last.len()
    })
    .await;
    println!("{} processes were resumed within {:.1?}", last.len(), since.elapsed());
    for worker in &mut workers {
        assert!(worker.wait(LONG), "a worker failed");
    }
    scene.check().await;
    assert!(scene.backend.taken_over().await > 0, "nothing was taken over");
    let silent = scene.backend.number("SELECT CAST(max(silent) AS BIGINT) FROM taken_over WHERE processes > 0").await;
    assert!(silent < EXPIRY, "it was silent for {silent} ms");
}

on_each_database!(taken_over_within_seconds);
