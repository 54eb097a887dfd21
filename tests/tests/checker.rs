//! The check of the crash tests, checked: every kind of broken invariant is found, in a journal that was tampered with
//! and in runs of an engine that was.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_tests::crash::check::{Ended, Recorded, check};
use durable_tests::crash::deadly::{Boundary, Of};
use durable_tests::crash::journal::{Line, What};
use durable_tests::crash::scene::Scene;
use durable_tests::crash::shared::{Shared, read};
use durable_tests::orphans::orphans;
use durable_tests::{Backend, PostgresSchema, Sql, SqliteFile, quick, run, until};
use std::time::Duration;

const STEPS: [&str; 2] = ["a", "b"];

fn line(program: u32, execution: i64, what: What) -> Line {
    Line { program, id: "p".into(), execution, what }
}
fn begin(program: u32, execution: i64, step: &str) -> Line {
    line(program, execution, What::Begin { step: step.into(), key: format!("key of {}", &step[..1]) })
}
fn effect(program: u32, execution: i64, step: &str) -> Line {
    line(program, execution, What::Effect { step: step.into() })
}
fn returned(program: u32, execution: i64, step: &str) -> Line {
    line(program, execution, What::Returned { step: step.into() })
}

/// Two steps; the program dies after the first one's record and in the second one.
fn sound() -> (Vec<Line>, Vec<Recorded>, Vec<Ended>) {
    let lines = vec![
        begin(1, 1, "a#1"),
        effect(1, 1, "a#1"),
        returned(1, 1, "a"),
        begin(1, 1, "b#1"),
        effect(1, 1, "b#1"),
        returned(2, 2, "a"),
        begin(2, 2, "b#1"),
        effect(2, 2, "b#1"),
        returned(2, 2, "b"),
        line(2, 2, What::End),
    ];
    let recorded = |step: &str, claim| Recorded { id: "p".into(), step: step.into(), claim, attempts: 0 };
    let ended = Ended { id: "p".into(), status: "completed".into(), claims: 2 };
    (lines, vec![recorded("a", 1), recorded("b", 2)], vec![ended])
}

fn wrong(change: impl FnOnce(&mut Vec<Line>, &mut Vec<Recorded>, &mut Vec<Ended>)) -> String {
    let (mut lines, mut records, mut processes) = sound();
    change(&mut lines, &mut records, &mut processes);
    check(&lines, &records, &processes, &STEPS).join("; ")
}

#[test]
fn a_sound_run_passes() {
    assert_eq!(wrong(|_, _, _| {}), "");
}

#[test]
fn every_broken_invariant_is_found() {
    let found = |text: String, expected: &str| assert!(text.contains(expected), "{expected:?} is not in {text:?}");
    found(wrong(|lines, _, _| lines.insert(6, begin(2, 2, "a#1"))), "begun again");
    found(wrong(|_, records, _| _ = records.pop()), "not recorded");
    found(wrong(|_, records, _| records.push(records[0].clone())), "recorded twice");
    found(wrong(|_, _, processes| processes[0].status = "failed".into()), "is failed");
    found(wrong(|_, records, _| records[1].claim = 3), "recorded by execution 3 of 2");
    found(wrong(|_, records, _| records[0].claim = 2), "recorded only by 2");
    found(
        wrong(|lines, _, _| lines[6] = line(2, 2, What::Begin { step: "b#1".into(), key: "other".into() })),
        "another idempotency key",
    );
    found(wrong(|lines, _, _| lines[7] = effect(1, 2, "b#1")), "two programs");
    found(wrong(|lines, _, _| lines.push(begin(1, 1, "b#1"))), "after 2 had begun");
    found(wrong(|lines, _, _| lines.insert(7, begin(2, 2, "b#1"))), "begun twice");
    found(wrong(|lines, _, _| lines[6] = begin(2, 2, "b#2")), "attempts failed");
    found(
        wrong(|lines, _, _| lines.retain(|line| !matches!(&line.what, What::Effect { step } if step == "b#1"))),
        "without an effect",
    );
}

async fn scene_is_over<B: Shared>(scene: &Scene<B>) -> bool {
    let (_, processes) = read(&scene.backend).await;
    processes.len() == 20 && processes.iter().all(|process| ["completed", "stuck"].contains(&&*process.status))
}

/// A storage that says of some records that they are written, and does not write them.
async fn a_storage_that_forgets_records<B: Shared>() {
    let mut scene = Scene::<B>::new(env!("CARGO_BIN_EXE_worker"), 20, Duration::ZERO).await;
    drop(scene.backend.storage().await);
    scene.forgets = Some(5);
    // Dies now and then, or nothing would be missed before the end.
    let boundary = Boundary { after: true, of: Of::Park, nth: 30 };
    let mut worker = scene.start(Some(boundary));
    until("it dies, or nothing goes on", async || worker.ended().is_some() || scene_is_over(&scene).await).await;
    worker.kill();
    // What was recorded behind it, and is asked for by nobody, makes a process stuck.
    scene.forgets = None;
    let _worker = scene.start(None);
    until("all have ended or are stuck", async || scene_is_over(&scene).await).await;
    assert!(!scene.wrong().await.is_empty());
}

#[test]
fn a_storage_that_forgets_records_is_found() {
    run(a_storage_that_forgets_records::<SqliteFile>());
}

#[test]
fn a_storage_that_forgets_records_is_found_on_postgres() {
    PostgresSchema::run(a_storage_that_forgets_records::<PostgresSchema>());
}

/// Rows that nothing will ever touch are found, each kind of them.
#[test]
fn rows_that_nothing_touches() {
    run(async {
        let backend = SqliteFile::new().await;
        let host = quick(&backend).await.start().await.unwrap();
        assert!(orphans(&backend).await.is_empty());
        let id = |n: u32| format!("'00000000-0000-0000-0000-00000000000{n}'");
        let (a, b, c, d, e, now) = (id(1), id(2), id(3), id(4), id(5), "'2026-11-24T00:00:00.000Z'");
        let process = |run: &str, current: u32, status: &str, owner: &str| {
            format!(
            "INSERT INTO durable_processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, signals,
                 signalled, input, input_digest, created_at, status_at)
             VALUES ({run}, 'n', {run}, {current}, 'k', '{status}', {owner}, 1, 0, 0, 0, '1', 'd', {now}, {now});"
        )
        };
        let rows = [
            format!("INSERT INTO durable_steps VALUES ({a}, 0, 's', '', 'step', 'done', '1', 0, 1, 1, {now});"),
            format!("INSERT INTO durable_events VALUES ({a}, 1, 'e', 'i', '1', {now}, NULL);"),
            format!("INSERT INTO durable_waiters (target, waiter) VALUES ({a}, {b});"),
            format!(
                "INSERT INTO durable_audit VALUES ({a}, {a}, {now}, 0, 's', '', 'step', 'done', '1', 0, 1, 1, {now});"
            ),
            format!("INSERT INTO durable_fences VALUES ({e}, 0, NULL);"),
            process(&b, 0, "completed", "NULL"),
            process(&c, 1, "running", "NULL"),
            process(&d, 1, "completed", &a),
            "DELETE FROM durable_fences WHERE instance IN (SELECT instance FROM durable_instances);".to_owned(),
        ];
        backend.execute(&rows.concat()).await;
        let found = orphans(&backend).await;
        assert_eq!(found.len(), 11, "{found:#?}");
        drop(host);
    });
}
