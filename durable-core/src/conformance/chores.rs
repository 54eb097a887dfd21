//! What is too much for one transaction.

use super::Subject;
use super::scene::{Actor, NAMESPACE, key, load, record, spawn};
use crate::storage::chores::{DELETED, WOKEN};
use crate::storage::{Load, Op, Outcome, RunId, Spawn, Status, Storage};

/// All of them are woken once the storage has been looked at often enough, those that wait and those that are owned.
pub async fn very_many_that_await_one<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let target = actor.start("target").await;
    let mut waiters = Vec::new();
    for part in 0..4 {
        let starts: Vec<Spawn> =
            (0..WOKEN / 3).map(|n| Spawn { take: n % 2 == 0, ..spawn(&format!("w-{part}-{n}")) }).collect();
        let awaits =
            starts.iter().map(|start| Op::Await { run: start.run, id: "target".into(), target: None }).collect();
        waiters.extend(starts.iter().map(|start| start.run));
        actor.commit(starts.into_iter().map(Op::Spawn).collect()).await.unwrap();
        actor.commit(awaits).await.unwrap();
    }
    let gone = waiters.pop().unwrap();
    actor.one(Op::cancel(load(&storage, gone).await.unwrap().process.id)).await;
    assert!(matches!(actor.finish(target, 1, Status::Failed).await, Outcome::Finished { .. }));
    actor.idle().await;
    assert_eq!(signals(&storage, &waiters).await, vec![1; waiters.len()]);
    // It goes on; they await it still, and it ends again.
    actor.one(Op::resume("target".into(), Vec::new())).await;
    let claimed = actor.claim(usize::MAX).await;
    let claim = claimed.iter().find(|claimed| claimed.run == target).unwrap().claim;
    let few = waiters.split_off(waiters.len() / 2);
    actor.finish(target, claim, Status::Completed).await;
    actor.idle().await;
    assert_eq!(signals(&storage, &few).await, vec![2; few.len()]);
    assert_eq!(signals(&storage, &waiters).await, vec![2; waiters.len()]);
}

async fn signals(storage: &impl Storage, runs: &[RunId]) -> Vec<i64> {
    let loaded = storage.load(&Load::signals(runs)).await.unwrap().unwrap();
    loaded.into_iter().map(|loaded| loaded.state.unwrap().unwrap().process.signals).collect()
}

/// The process is gone at once, and what it has left is in nobody's way.
pub async fn a_deletion_of_very_many_rows<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    for part in 0..12 {
        let of = |n: i32| Op::Record(record(run, 1, key("step", &format!("{part}-{n}"))));
        actor.commit((0..1000).map(of).collect()).await.unwrap();
    }
    actor.finish(run, 1, Status::Completed).await;
    let deleted = actor.one(Op::delete("p".into())).await;
    assert!(matches!(deleted, Outcome::Asked { before: Some(_), more: false, .. }), "{deleted:?}");
    assert!(load(&storage, run).await.is_none());
    let again = actor.start("p").await;
    actor.one(Op::Record(record(again, 1, key("step", "0-0")))).await;
    actor.idle().await;
    for part in 0..12 {
        assert_eq!(storage.record(run, &key("step", &format!("{part}-999"))).await.unwrap(), None);
    }
    assert_eq!(actor.load(again).await.records.len(), 1);
}

/// They go in parts, the current one last.
pub async fn an_id_of_very_many_runs<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let mut last = actor.start("p").await;
    for _ in 0..DELETED + 2 {
        let next = Spawn { restart_finished: true, take: true, ..spawn("p") };
        actor.finish(last, 1, Status::Completed).await;
        last = next.run;
        actor.one(Op::Spawn(next)).await;
    }
    actor.finish(last, 1, Status::Completed).await;
    let mut parts = 0;
    while let Outcome::Asked { before: Some(before), more, .. } = actor.one(Op::delete("p".into())).await {
        assert_eq!(before, (last, Status::Completed));
        parts += 1;
        if !more {
            break;
        }
        assert!(storage.find(NAMESPACE, "p", None).await.unwrap().is_some());
    }
    assert!(parts <= 2, "{parts}");
    assert!(storage.find(NAMESPACE, "p", None).await.unwrap().is_none());
    assert!(load(&storage, last).await.is_none());
}
