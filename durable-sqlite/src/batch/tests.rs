use super::*;
use durable_core::storage::{
    Effect, Fence, Finish, Forget, InstanceId, OpKind, Park, Raise, RecordKey, RecordState, RunId, Scope, Spawn, Status,
};
use sqlx::Connection;

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
            payload: "1".into(),
            attempts: 0,
            takes: Some(1),
            effect,
            awaited: Some(RunId::new()),
        })
    };
    let forget = Forget {
        key: RecordKey { scope: Scope::Process, name: "n".into(), key: "".into() },
        audit: uuid::Uuid::now_v7(),
    };
    let finish = |claim| Finish { run, claim, status: Status::Completed, output: None, reason: None, unasked: None };
    let ops = vec![
        Op::Spawn(spawn(true)),
        Op::Raise(raise()),
        record(1, None),
        record(2, None),
        record(1, Some(Effect::Spawn(spawn(false)))),
        record(1, Some(Effect::Raise(raise()))),
        Op::Await { run, id: id.clone(), target: None },
        Op::AcceptCancel { run, claim: 1 },
        Op::Seen { run, claim: 1, signals: 1 },
        Op::Finish(finish(1)),
        Op::Finish(finish(2)),
        Op::Park(Park { run, claim: 1, wake_at: None, seen: Some(1), waiting_for: None }),
        Op::Cancel { id: id.clone() },
        Op::Resume { id: id.clone(), forget: vec![forget] },
        Op::Delete { id: id.clone() },
        Op::Claim { kind: "kind".into(), limit: 10 },
    ];
    Batch { fence: Fence { instance: InstanceId::new(), generation: 0 }, namespace: "n".into(), ops }
}

#[tokio::test]
async fn no_statement_of_a_batch_goes_through_a_table() {
    let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
    crate::migrate::migrate(&mut connection).await.unwrap();
    let mut scans = Vec::new();
    for (sql, plan) in Plan::new(&everything()).script.plans(&mut connection).await {
        // A virtual table over the batch's own rows, and subqueries of it, may be scanned.
        let of_table = |line: &&String| {
            line.starts_with("SCAN ")
                && !["SCAN j ", "SCAN h", "SCAN jsonb_each", "SCAN (", "SCAN CONSTANT"]
                    .iter()
                    .any(|own| line.starts_with(own))
        };
        // Whether there is any row at all.
        let of_table = |line: &&String| of_table(line) && !line.contains("SCAN durable_waiters USING COVERING INDEX");
        let all_owned = |line: &&String| line.contains("durable_processes_owner");
        let own: Vec<_> = plan.iter().filter(|line| of_table(line) || all_owned(line)).collect();
        if !own.is_empty() {
            scans.push(format!("{sql}\n{plan:#?}"));
        }
    }
    assert!(scans.is_empty(), "{}", scans.join("\n\n"));
}
