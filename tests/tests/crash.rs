//! Programs that die by SIGKILL at every boundary around a step and at random, alone and three at a time; and programs
//! that are stopped for longer than their heartbeat may be silent. What they leave is checked exactly.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_tests::crash::deadly::{Boundary, Of};
use durable_tests::crash::scene::{LONG, Scene};
use durable_tests::crash::worker::Worker;
use durable_tests::{long, run};
use std::time::{Duration, Instant};

/// Dies at the boundary, is started again, and everything is as it should be. Says whether it died at all.
async fn dies_at(boundary: Boundary) -> bool {
    let scene = Scene::new(env!("CARGO_BIN_EXE_worker"), 2, Duration::ZERO).await;
    let died = !scene.start(Some(boundary)).wait(LONG);
    let restarted = Instant::now();
    assert!(scene.start(None).wait(LONG), "the second worker failed");
    scene.check().await;
    // Without waiting for a heartbeat to expire: the lock file told that the first one was dead.
    assert!(restarted.elapsed() < LONG / 2);
    died
}

macro_rules! boundaries {
    ($($name:ident: $side:literal $of:ident $nth:expr),* $(,)?) => {
        $(#[test]
        fn $name() {
            run(async {
                for nth in $nth {
                    let boundary = Boundary { after: $side == "after", of: Of::$of, nth };
                    assert!(dies_at(boundary).await, "it never came to {boundary}");
                }
            });
        })*
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

/// A small generator: the tests are the same at each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Kills workers at random until so many have died, then lets them end.
async fn at_random(programs: usize, processes: u32, kills: usize, seed: u64) {
    let scene = Scene::new(env!("CARGO_BIN_EXE_worker"), processes, Duration::from_millis(2)).await;
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

#[test]
fn one_program_killed_at_random() {
    run(async {
        for seed in 0..if long() { 40 } else { 4 } {
            at_random(1, 40, 8, seed).await;
        }
    });
}

#[test]
fn three_programs_killed_at_random() {
    run(async {
        for seed in 0..if long() { 40 } else { 4 } {
            at_random(3, 60, 10, 1000 + seed).await;
        }
    });
}

/// Stops a worker until the write lock is in the wanted state: held by it (`inside`) or free.
async fn stop(scene: &Scene, worker: &Worker, inside: bool) {
    let since = Instant::now();
    loop {
        worker.signal("STOP");
        if scene.is_write_locked().await == inside {
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
#[test]
fn stopped_outside_a_transaction() {
    run(async {
        let scene = Scene::new(env!("CARGO_BIN_EXE_worker"), 40, Duration::from_millis(15)).await;
        let mut first = scene.start(None);
        scene.until_begun(60).await;
        scene.count_takeovers().await;
        let mut second = scene.start(None);
        stop(&scene, &first, false).await;
        assert!(second.wait(LONG), "the second worker failed");
        first.signal("CONT");
        assert!(first.wait(LONG), "the first worker failed");
        scene.check().await;
        assert!(scene.taken_over().await > 0, "nothing was taken over");
    });
}

/// Stopped past its heartbeat inside a transaction: nobody can write, so nobody's silence counts; when it goes on, so do
/// all.
#[test]
fn stopped_inside_a_transaction() {
    run(async {
        let scene = Scene::new(env!("CARGO_BIN_EXE_worker"), 300, Duration::from_millis(1)).await;
        let mut first = scene.start(None);
        scene.until_begun(100).await;
        scene.count_takeovers().await;
        let mut second = scene.start(None);
        stop(&scene, &first, true).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(scene.is_write_locked().await);
        first.signal("CONT");
        assert!(first.wait(LONG), "the first worker failed");
        assert!(second.wait(LONG), "the second worker failed");
        scene.check().await;
        assert_eq!(scene.taken_over().await, 0, "somebody was taken for dead");
    });
}

/// Somebody takes processes away from an owner that lives, as a take-over without a fence would: the owner's late
/// records are refused row by row, and it lets go.
#[test]
fn processes_taken_away_by_hand() {
    run(async {
        let scene = Scene::new(env!("CARGO_BIN_EXE_worker"), 30, Duration::from_millis(20)).await;
        let mut first = scene.start(None);
        scene.until_begun(30).await;
        let mut second = scene.start(None);
        for _ in 0..10 {
            scene
                .sql(
                    "UPDATE durable_processes SET owner = NULL, status = 'waiting', calm_claim = claim,
                         wake_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE status = 'running'",
                )
                .await;
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        assert!(first.wait(LONG) && second.wait(LONG));
        // It could not know, so it may have begun something while the other one ran; nothing of it was recorded.
        let mut wrong = scene.wrong().await;
        wrong.retain(|wrong| !wrong.ends_with("had begun"));
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
