//! No statement that runs again and again may go through a table, or through all that an instance owns.

use durable_core::storage::chores::Chores;
use durable_core::storage::*;
use sqlx::{Connection, SqliteConnection};

use crate::script::{Arg, RAN, Script};
use crate::{Sqlite, fence};

/// A batch with everything in it, in every form that a statement can take.
fn everything() -> Batch {
    let run = RunId::new();
    let id: Box<str> = "p-1".into();
    let spawn = |restart_finished| Spawn {
        run: RunId::new(),
        id: id.clone(),
        kind: "kind".into(),
        input: "1".into(),
        digest: "d".into(),
        take: true,
        restart_finished,
    };
    let raise = || Raise { id: id.clone(), name: "e".into(), event_id: "x".into(), payload: "1".into() };
    let record = |claim, effect| {
        Op::Record(RecordOp {
            run,
            claim,
            key: RecordKey { scope: Scope::Process, name: "n".into(), key: "k".into() },
            op: OpKind::Step,
            state: RecordState::Done,
            replaces: false,
            payload: "1".into(),
            attempts: 0,
            shielded: false,
            seq: 1,
            takes: Some(1),
            effect,
            awaited: Some(RunId::new()),
        })
    };
    let forget = Forget {
        key: RecordKey { scope: Scope::Process, name: "n".into(), key: "".into() },
        audit: uuid::Uuid::now_v7(),
    };
    let finish = |claim| Finish { run, claim, status: Status::Completed, output: None, reason: None };
    let ops = vec![
        Op::Spawn(spawn(true)),
        Op::Raise(raise()),
        record(1, None),
        record(2, None),
        record(1, Some(Effect::Spawn(spawn(false)))),
        record(1, Some(Effect::Raise(raise()))),
        Op::Await { run, id: id.clone(), target: None },
        Op::AcceptCancel { run, claim: 1, seq: 1 },
        Op::Seen { run, claim: 1, signals: 1 },
        Op::Finish(finish(1)),
        Op::Finish(finish(2)),
        Op::Park(Park { run, claim: 1, wake_at: None, seen: Some(1), waiting_for: None, deaths: 0 }),
        Op::cancel(id.clone()),
        Op::resume(id.clone(), vec![forget]),
        Op::delete(id.clone()),
        Op::Claim { kind: "kind".into(), limit: 10 },
    ];
    Batch::new(Fence { instance: InstanceId::new(), generation: 0 }, "n", ops)
}

#[tokio::test]
async fn no_statement_goes_through_a_table() {
    let folder = std::env::temp_dir().join(format!("durable-plans-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("plans.db");
    let storage = Sqlite::open(path.to_str().unwrap()).await.unwrap();
    let everything = everything();
    let Fence { instance, .. } = everything.fence;
    let new = NewInstance {
        id: instance,
        namespace: "n".into(),
        label: "l".into(),
        kinds: vec!["kind".into()],
        expiry: std::time::Duration::from_secs(10),
    };
    let (mut heart, _) = storage.enlist(&new).await.unwrap();
    RAN.take();
    storage.commit(&everything).await.unwrap();
    heart.beat().await.unwrap();
    storage.refence(instance, 1).await.unwrap();
    let run = RunId::new();
    for load in [Load::whole(&[run]), Load::signals(&[run])] {
        storage.load(&load).await.unwrap();
        storage.weigh(&load).await.unwrap();
    }
    storage.owned(instance, None, 10).await.unwrap();
    let kinds = vec!["kind".into()];
    storage.poll(&Poll { namespace: "n".into(), instance, kinds, watched: vec![run] }).await.unwrap();
    crate::batch::All(&storage.0).part(10, 10).await.unwrap();
    crate::batch::All(&storage.0).put_off().await.unwrap();
    storage.find("n", "p-1", None).await.unwrap();
    storage.find("n", "p-1", Some(run)).await.unwrap();
    storage.record(run, &RecordKey { scope: Scope::Process, name: "n".into(), key: "".into() }).await.unwrap();
    storage.reinstate().await.unwrap();
    storage.0.write(|| fence::reinstate(instance)).await.unwrap();
    storage.retire(instance).await.unwrap();
    let ran = RAN.take();
    assert!(ran.len() > 40, "all of them were seen: {}", ran.len());
    let url = format!("sqlite://{}", path.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    let mut scans = through_a_table(&mut connection, &ran).await;
    // What a service's `ANALYZE` finds out about large tables of ended processes must not lead SQLite astray.
    sqlx::raw_sql(GROWN).execute(&mut connection).await.unwrap();
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    scans.extend(through_a_table(&mut connection, &ran).await);
    // Nor may what it found out about tables that were nearly empty, and have grown since.
    for statistics in [
        "1 1 1 1 1 1 1",
        "0 0 0 0 0 0 0",
        "100000000 1 1 1 1 1 1",
        "100000000 100000000 100000000 100000000 100000000 100000000 100000000",
    ] {
        sqlx::query("UPDATE sqlite_stat1 SET stat = ?").bind(statistics).execute(&mut connection).await.unwrap();
        connection = SqliteConnection::connect(&url).await.unwrap();
        scans.extend(through_a_table(&mut connection, &ran).await);
    }
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(scans.is_empty(), "{}", scans.join("\n\n"));
}

const GROWN: &str = "
    WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 20000)
    INSERT INTO durable_processes (run, namespace, id, current, kind, status, claim, calm_claim, signals, signalled, input,
        input_digest, created_at, status_at, finished_at)
    SELECT printf('%036d', n), 'n', 'old-' || n, 1, 'kind', 'completed', 1, 0, 0, 0, '1', 'd', 'now', 'now', 'now' FROM s;
    INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
    SELECT run, 0, 'n', 'k', 'step', 'done', '1', 0, 1, 1, 'now' FROM durable_processes;
    ANALYZE";

/// The statements that go through more than they should, with their plans.
async fn through_a_table(connection: &mut SqliteConnection, ran: &[(String, Vec<Arg>)]) -> Vec<String> {
    let mut scans = Vec::new();
    let paged = |sql: &str| sql.contains("LIMIT") || sql.contains("fenced_at IS NOT NULL");
    for (sql, args) in ran {
        let mut script = Script::default();
        script.add(&format!("EXPLAIN QUERY PLAN {sql}"), args.clone());
        let answers = script.run(connection).await.unwrap();
        let plan: Vec<String> = answers[0].rows.iter().map(|row| crate::rows::get(row, 3).unwrap()).collect();
        // What the batch brings itself, and subqueries of it, may be gone through.
        // Nor are instances many.
        const OWN: [&str; 13] = ["g", "t", "j", "h", "k", "w", "r", "jsonb_each", "CONSTANT", "o", "e", "i", "f"];
        // Whether there is any row at all.
        let any = |line: &str| line.starts_with("SCAN durable_waiters USING COVERING INDEX");
        let scan = |line: &str| {
            let scanned = line.strip_prefix("SCAN ").and_then(|what| what.split(' ').next());
            scanned.is_some_and(|what| !what.starts_with('(') && !OWN.contains(&what))
        };
        // What an instance owns is gone through a page at a time where it is compared or handed back, and never by a batch.
        let owned = |line: &str| line.contains("durable_processes_owner") && !paged(sql);
        let bad: Vec<&String> = plan.iter().filter(|line| (scan(line) && !any(line)) || owned(line)).collect();
        if !bad.is_empty() {
            scans.push(format!("{sql}\n{plan:#?}"));
        }
    }
    scans
}
