//! Claims: what is due, once, by one.

use chrono::TimeDelta;
use std::collections::HashSet;

use super::Subject;
use super::scene::{Actor, KIND, NAMESPACE, spawn};
use crate::storage::{Batch, Op, Outcome, RunId, Spawn, Status, Storage};

/// Not before its time, not while somebody owns it, not once it has ended.
pub async fn only_what_is_due_is_claimed<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let owned = actor.start("owned").await;
    let ended = actor.start("ended").await;
    actor.finish(ended, 1, Status::Failed).await;
    let stuck = actor.start("stuck").await;
    actor.finish(stuck, 1, Status::Stuck).await;
    let later = actor.start("later").await;
    actor.park(later, 1, Some(actor.now().await + TimeDelta::hours(1)), Some(0)).await;
    let soon = actor.start("soon").await;
    actor.park(soon, 1, Some(actor.now().await - TimeDelta::hours(1)), None).await;
    actor.one(Op::Spawn(spawn("new"))).await;
    let claimed: HashSet<RunId> = actor.claim(99).await.into_iter().map(|claimed| claimed.run).collect();
    assert_eq!(claimed, HashSet::from([soon, actor.row("new").await.run]));
    let row = actor.row("soon").await;
    assert_eq!(
        (row.status, row.owner, row.claim, row.calm_claim, row.wake_at),
        (Status::Running, Some(actor.id), 2, 1, None)
    );
    assert_eq!(actor.row("owned").await.run, owned);
}

/// A limited claim takes those that have been due for longest.
pub async fn the_earliest_first<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let now = actor.now().await;
    for (id, ago) in [("b", 20), ("a", 30), ("c", 10)] {
        let run = actor.start(id).await;
        actor.park(run, 1, Some(now - TimeDelta::seconds(ago)), None).await;
    }
    let mut order = Vec::new();
    for _ in 0..3 {
        let claimed = actor.claim(1).await;
        assert_eq!(claimed.len(), 1);
        order.push(actor.load(claimed[0].run).await.process.id);
    }
    assert_eq!(order, ["a".into(), "b".into(), "c".into()] as [Box<str>; 3]);
}

/// Two that claim at the same time get different ones.
pub async fn each_process_once<S: Subject>(subject: &S) {
    const MANY: usize = 200;
    let (first, second) = (subject.open().await, subject.open().await);
    let (one, two) = (Actor::new(&first).await, Actor::new(&second).await);
    one.commit((0..MANY).map(|n| Op::Spawn(spawn(&format!("p-{n}")))).collect()).await.unwrap();
    async fn all<S: Storage>(actor: &Actor<'_, S>) -> Vec<RunId> {
        let mut mine = Vec::new();
        loop {
            let claimed = actor.claim(7).await;
            if claimed.is_empty() {
                return mine;
            }
            mine.extend(claimed.iter().map(|claimed| claimed.run));
        }
    }
    let (a, b) = tokio::join!(all(&one), all(&two));
    let different: HashSet<RunId> = a.iter().chain(&b).copied().collect();
    assert_eq!((a.len() + b.len(), different.len()), (MANY, MANY));
}

/// Neither another kind nor another namespace.
pub async fn only_the_kind_and_namespace<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    actor.one(Op::Spawn(Spawn { kind: "other".into(), ..spawn("other kind") })).await;
    actor.one(Op::Spawn(Spawn { kind: KIND.to_uppercase().into(), ..spawn("other case") })).await;
    let elsewhere = Batch { namespace: "elsewhere".into(), ..actor.batch(vec![Op::Spawn(spawn("p"))]) };
    storage.commit(&elsewhere).await.unwrap();
    assert!(actor.claim(9).await.is_empty());
    assert_eq!(storage.find(NAMESPACE, "p", None).await.unwrap(), None);
    let raise = Op::Raise(super::scene::raise("p", "m"));
    assert_eq!(actor.one(raise).await, Outcome::Raised(crate::storage::Raised::NotFound));
    // The same id in two namespaces is two processes.
    actor.one(Op::Spawn(spawn("p"))).await;
    assert_eq!(actor.claim(9).await.len(), 1);
}

/// Parked it is nobody's, calm, and says what it waits for.
pub async fn a_park_gives_back<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let due = actor.now().await + TimeDelta::days(400);
    assert_eq!(actor.park(run, 1, Some(due), Some(0)).await, Outcome::Recorded);
    let row = actor.row("p").await;
    assert_eq!((row.status, row.owner, row.calm_claim), (Status::Waiting, None, 1));
    assert_eq!(row.wake_at.unwrap().timestamp_millis(), due.timestamp_millis());
    assert_eq!(row.waiting_for.as_deref(), Some("something"));
}

/// Whatever signals came, one that is only given back is due when it says.
pub async fn a_released_one_is_due<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    actor.raise("p", "m").await;
    assert_eq!(actor.park(run, 1, Some(actor.now().await), None).await, Outcome::Recorded);
    assert_eq!(actor.claim(9).await.len(), 1);
}

/// A page at a time.
pub async fn what_is_owned<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let mut mine = Vec::new();
    for n in 0..7 {
        mine.push((actor.start(&format!("mine-{n}")).await, 1));
        other.start(&format!("other-{n}")).await;
    }
    mine.sort();
    let mut found: Vec<(RunId, i64)> = Vec::new();
    loop {
        let page = storage.owned(actor.id, found.last().map(|(run, _)| *run), 3).await.unwrap();
        if page.is_empty() {
            break;
        }
        assert!(page.len() <= 3);
        found.extend(page);
    }
    assert_eq!(found, mine);
}
