//! Processes: started once, ended once, found again.

use chrono::TimeDelta;

use super::Subject;
use super::scene::{Actor, KIND, NAMESPACE, key, load, record, spawn, spawned, with_effect};
use crate::process::latest;
use crate::storage::{
    Counted, Effect, Fate, Filter, Forget, Load, Op, OpKind, Order, Outcome, Park, Poll, RunId, Spawn, Spawned, Status,
    Storage, Target, What,
};

/// What is given back is due by the storage's clock, however far ahead that of its instance is.
pub async fn what_is_given_back_is_due<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let later = Some(chrono::Utc::now() + TimeDelta::days(1));
    for (id, seen, due) in [("given-back", None, true), ("parked", Some(0), false)] {
        let run = actor.start(id).await;
        let park = Park { run, claim: 1, wake_at: later, seen, waiting_for: None, deaths: 0 };
        assert_eq!(actor.commit(vec![Op::Park(park)]).await.unwrap(), [Outcome::Recorded]);
        let row = actor.row(id).await;
        assert_eq!(row.wake_at.unwrap() <= row.status_at, due, "{id}: {row:?}");
    }
}

/// The same id again is the process that is there, whatever else is different.
pub async fn a_start_is_there_once<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let first = spawn("p");
    assert_eq!(actor.one(Op::Spawn(first.clone())).await, Outcome::Spawned(spawned(&first, false)));
    let row = actor.row("p").await;
    assert_eq!((row.status, row.owner, row.claim, &*row.kind), (Status::Waiting, None, 0, KIND));
    assert!(row.wake_at.unwrap() <= actor.now().await);
    let other = Spawn { kind: "other".into(), input: "2".into(), digest: "other".into(), take: true, ..spawn("p") };
    assert_eq!(actor.one(Op::Spawn(other)).await, Outcome::Spawned(spawned(&first, true)));
    assert_eq!(actor.one(Op::Spawn(first.clone())).await, Outcome::Spawned(spawned(&first, false)), "its own token");
    assert_eq!(actor.row("p").await, row);
    for id in ["P", "p.", "ṕ"] {
        assert_eq!(storage.find(NAMESPACE, id, None).await.unwrap(), None, "{id:?} is another id");
    }
}

/// Taken at once it is the instance's, under claim 1.
pub async fn a_start_that_is_taken<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let row = actor.row("p").await;
    assert_eq!(
        (row.run, row.status, row.owner, row.claim, row.wake_at),
        (run, Status::Running, Some(actor.id), 1, None)
    );
    assert!(actor.claim(9).await.is_empty());
}

/// Only what has ended is replaced; the former run stays, with its records.
pub async fn a_restart_keeps_the_former_run<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let first = actor.start("p").await;
    actor.one(Op::Record(record(first, 1, key("a", "")))).await;
    let restart = || Spawn { restart_finished: true, take: true, ..spawn("p") };
    let Outcome::Spawned(there) = actor.one(Op::Spawn(restart())).await else { panic!() };
    assert_eq!((there.run, there.existed), (first, true));
    actor.finish(first, 1, Status::Completed).await;
    let other_kind = Spawn { kind: "other".into(), ..restart() };
    assert!(matches!(actor.one(Op::Spawn(other_kind)).await, Outcome::Spawned(Spawned { existed: true, .. })));
    let second = restart();
    for _ in 0..2 {
        assert_eq!(actor.one(Op::Spawn(second.clone())).await, Outcome::Spawned(spawned(&second, false)));
    }
    assert_eq!(actor.row("p").await.run, second.run);
    assert!(actor.load(second.run).await.records.is_empty());
    assert_eq!(actor.load(first).await.records.len(), 1);
    let former = storage.find(NAMESPACE, "p", Some(first)).await.unwrap().unwrap();
    assert_eq!((former.run, former.status), (first, Status::Completed));
    // Its own token again, although a third run has replaced it since.
    actor.finish(second.run, 1, Status::Completed).await;
    let third = restart();
    actor.one(Op::Spawn(third.clone())).await;
    assert_eq!(actor.one(Op::Spawn(second.clone())).await, Outcome::Spawned(spawned(&second, false)));
    assert_eq!(actor.row("p").await.run, third.run);
}

/// Those that await it are signalled: in memory here, in memory elsewhere, parked; and later they find how it ended.
pub async fn an_end_wakes_those_that_await_it<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let target = actor.start("target").await;
    let (here, there, parked) = (actor.start("here").await, other.start("there").await, actor.start("parked").await);
    let wait = |run| Op::Await { run, id: "target".into(), target: None };
    assert_eq!(actor.one(wait(here)).await, Outcome::Awaits(Some((target, None))));
    other.one(wait(there)).await;
    actor.one(wait(parked)).await;
    actor.park(parked, 1, None, Some(0)).await;
    assert_eq!(actor.one(Op::Await { run: here, id: "nobody".into(), target: None }).await, Outcome::Awaits(None));
    let open = Target { run: target, id: "target".into(), fate: Fate::Open };
    assert_eq!(actor.load(here).await.targets, [open]);
    let signals = storage.load(&Load::signals(&[here])).await.unwrap().unwrap().remove(0).state.unwrap().unwrap();
    assert!(signals.targets.is_empty());
    assert_eq!(actor.finish(target, 1, Status::Completed).await, Outcome::Finished { wakes: vec![here] });
    let ended = (Status::Completed, Some("7".into()));
    assert_eq!(actor.one(wait(here)).await, Outcome::Awaits(Some((target, Some(ended.clone())))));
    for run in [here, there, parked] {
        let state = actor.load(run).await;
        assert_eq!(state.process.signals, 1);
        let at = actor.row("target").await.finished_at.unwrap();
        let ended = Target { run: target, id: "target".into(), fate: Fate::Ended(ended.clone(), at) };
        assert_eq!(state.targets, [ended]);
    }
    let poll = Poll { instance: other.id, namespace: NAMESPACE.into(), kinds: vec![KIND.into()], watched: vec![] };
    assert_eq!(storage.poll(&poll).await.unwrap().signalled, [(there, 1)]);
    assert_eq!(actor.claim(9).await.iter().map(|c| c.run).collect::<Vec<_>>(), [parked]);
    // With the record the waiting is over; with one that is not written it is not.
    let lost = crate::storage::RecordOp { awaited: Some(target), ..record(there, 2, key("o", "")) };
    assert_eq!(other.one(Op::Record(lost)).await, Outcome::Lost);
    assert_eq!(actor.load(there).await.targets.len(), 1);
    let op = crate::storage::RecordOp { awaited: Some(target), ..record(here, 1, key("o", "")) };
    actor.one(Op::Record(op)).await;
    assert!(actor.load(here).await.targets.is_empty());
}

/// Of a run that another instance owns, or under another claim: it goes on, awaits what it awaited, and nobody is woken.
pub async fn an_end_that_is_lost_changes_nothing<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let (target, waiter) = (actor.start("target").await, actor.start("waiter").await);
    let wait = Op::Await { run: waiter, id: "target".into(), target: None };
    assert_eq!(actor.one(wait).await, Outcome::Awaits(Some((target, None))));
    let before = actor.load(waiter).await.process;
    for run in [target, waiter] {
        assert_eq!(other.finish(run, 1, Status::Completed).await, Outcome::Lost);
        assert_eq!(actor.finish(run, 2, Status::Completed).await, Outcome::Lost);
    }
    assert_eq!(actor.load(waiter).await.process, before);
    let ended = actor.finish(target, 1, Status::Failed).await;
    assert_eq!(ended, Outcome::Finished { wakes: vec![waiter] });
    assert_eq!(actor.finish(target, 1, Status::Completed).await, Outcome::Lost);
    assert_eq!(actor.load(waiter).await.process.signals, 1);
    assert_eq!(actor.finish(target, 1, Status::Failed).await, ended, "the same again wakes those that still wait");
}

/// A start and the record of it: both, with what the id has in the record; or neither.
pub async fn a_durable_start_and_its_record<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let parent = owner.start("parent").await;
    let existing = spawn("existing");
    owner.one(Op::Spawn(existing.clone())).await;
    let start = |spawn: &Spawn| with_effect(parent, OpKind::Spawn, Effect::Spawn(spawn.clone()));
    let child = spawn("child");
    assert_eq!(other.one(Op::Record(start(&child))).await, Outcome::Lost);
    assert_eq!(storage.find(NAMESPACE, "child", None).await.unwrap(), None, "no record, no child");
    let there = spawned(&existing, true);
    // Asked for with this input, with another one, and with any.
    let asked = |digest: &str| crate::storage::RecordOp { payload: digest.into(), ..start(&spawn("existing")) };
    for (start, expected, other) in [
        (start(&child), spawned(&child, false), "false"),
        (asked(&existing.digest), there.clone(), "false"),
        (asked("another"), there.clone(), "true"),
        (asked(""), there, "false"),
    ] {
        for _ in 0..2 {
            assert_eq!(owner.one(Op::Record(start.clone())).await, Outcome::Spawned(expected.clone()));
            let payload = storage.record(parent, &start.key).await.unwrap().unwrap().payload;
            assert_eq!(payload, expected.to_json(&start.payload));
            assert!(payload.ends_with(&format!("\"other_input\":{other}}}")), "{payload}");
        }
    }
}

/// Asked of one that never ran, of one that runs, of one that waits, of one that is stuck, of one that has ended.
pub async fn cancelling<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let cancel = async |id: &str| match actor.one(Op::cancel(id.into())).await {
        Outcome::Asked { before, wakes, .. } => (before.map(|(_, status)| status), wakes),
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(cancel("nobody").await, (None, vec![]));
    actor.one(Op::Spawn(spawn("new"))).await;
    let waiter = actor.start("waiter").await;
    actor.one(Op::Await { run: waiter, id: "new".into(), target: None }).await;
    assert_eq!(cancel("new").await, (Some(Status::Waiting), vec![waiter]));
    assert_eq!(actor.row("new").await.status, Status::Cancelled);
    assert!(actor.row("new").await.finished_at.is_some());
    let mine = actor.start("mine").await;
    assert_eq!(cancel("mine").await, (Some(Status::Running), vec![mine]));
    assert!(actor.row("mine").await.cancel_requested_at.is_some());
    assert_eq!(actor.one(Op::AcceptCancel { run: mine, claim: 1, seq: 7 }).await, Outcome::Recorded);
    assert_eq!(actor.one(Op::AcceptCancel { run: mine, claim: 1, seq: 9 }).await, Outcome::Recorded);
    assert_eq!(actor.row("mine").await.cancelled_seq, Some(7));
    assert!(actor.row("mine").await.cancelled_at.is_some());
    other.start("other").await;
    assert_eq!(cancel("other").await, (Some(Status::Running), vec![]));
    let parked = actor.start("parked").await;
    actor.park(parked, 1, None, Some(0)).await;
    assert_eq!(cancel("parked").await, (Some(Status::Waiting), vec![]));
    assert_eq!(actor.claim(9).await.iter().map(|c| c.run).collect::<Vec<_>>(), [parked]);
    let stuck = actor.start("stuck").await;
    actor.finish(stuck, 1, Status::Stuck).await;
    assert_eq!(cancel("stuck").await, (Some(Status::Stuck), vec![]));
    assert_eq!(actor.row("stuck").await.status, Status::Stuck);
    let ended = actor.start("ended").await;
    actor.finish(ended, 1, Status::Completed).await;
    assert_eq!(cancel("ended").await, (Some(Status::Completed), vec![]));
    assert_eq!(actor.row("ended").await.cancel_requested_at, None);
}

/// A stuck or failed process goes on, with its records, without those that it is told to forget, and calmly.
pub async fn resuming_and_forgetting<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let forget = || vec![Forget { key: key("b", ""), audit: uuid::Uuid::now_v7() }];
    for (id, status) in [("stuck", Status::Stuck), ("failed", Status::Failed)] {
        let run = actor.start(id).await;
        for name in ["a", "b"] {
            actor.one(Op::Record(record(run, 1, key(name, "")))).await;
        }
        let untimely = actor.one(Op::resume(id.into(), forget())).await;
        assert_eq!(
            untimely,
            Outcome::Asked { before: Some((run, Status::Running)), wakes: vec![], again: false, more: false }
        );
        assert_eq!(actor.load(run).await.records.len(), 2);
        actor.finish(run, 1, status).await;
        let asked = actor.one(Op::resume(id.into(), forget())).await;
        assert_eq!(asked, Outcome::Asked { before: Some((run, status)), wakes: vec![], again: false, more: false });
        let state = actor.load(run).await;
        assert_eq!(state.records.iter().map(|(key, _)| &*key.name).collect::<Vec<_>>(), ["a"]);
        let row = state.process;
        assert_eq!((row.status, row.reason, row.output, row.calm_claim), (Status::Waiting, None, None, 1));
        assert_eq!(actor.claim(9).await.len(), 1);
    }
    let nobody = actor.one(Op::resume("nobody".into(), vec![])).await;
    assert_eq!(nobody, Outcome::Asked { before: None, wakes: vec![], again: false, more: false });
}

/// Of a run that was followed by another one, nothing is changed any more; it can be deleted alone.
pub async fn orders_of_a_run<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let first = actor.start("p").await;
    actor.one(Op::Record(record(first, 1, key("a", "")))).await;
    let order =
        async |run: RunId, what: What| match actor.one(Op::Order(Order { id: "p".into(), run: Some(run), what })).await
        {
            Outcome::Asked { before, wakes, .. } => (before, wakes),
            outcome => panic!("{outcome:?}"),
        };
    let terminate = || What::Terminate { reason: "by hand".into() };
    let resume = || What::Resume { forget: vec![Forget { key: key("a", ""), audit: uuid::Uuid::now_v7() }] };
    assert_eq!(order(first, What::Cancel).await, (Some((first, Status::Running)), vec![first]));
    actor.finish(first, 1, Status::Failed).await;
    let second = Spawn { restart_finished: true, take: true, ..spawn("p") };
    actor.one(Op::Spawn(second.clone())).await;
    for what in [What::Cancel, terminate(), resume()] {
        assert_eq!(order(first, what).await, (Some((first, Status::Failed)), vec![]));
    }
    let row = actor.row("p").await;
    assert_eq!((row.run, row.status, row.cancel_requested_at), (second.run, Status::Running, None));
    assert_eq!(actor.load(first).await.records.len(), 1);
    let nobody = order(RunId::new(), What::Cancel).await;
    assert_eq!(nobody, (None, vec![]));
    // The current one runs, so it stays; the earlier one goes.
    assert_eq!(order(second.run, What::Delete).await, (Some((second.run, Status::Running)), vec![]));
    assert_eq!(order(first, What::Delete).await, (Some((first, Status::Failed)), vec![]));
    assert!(load(&storage, first).await.is_none());
    actor.idle().await;
    assert_eq!(storage.record(first, &key("a", "")).await.unwrap(), None);
    assert_eq!(actor.row("p").await.run, second.run);
    actor.finish(second.run, 1, Status::Completed).await;
    assert_eq!(order(second.run, What::Delete).await, (Some((second.run, Status::Completed)), vec![]));
    assert_eq!(storage.find(NAMESPACE, "p", None).await.unwrap(), None);
}

/// The owner loses the row; processes that await it are woken; what it awaits does not wake it any more.
pub async fn terminating<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = actor.start("p").await;
    let waiter = other.start("waiter").await;
    let target = other.start("target").await;
    other.one(Op::Await { run: waiter, id: "p".into(), target: None }).await;
    actor.one(Op::Await { run, id: "target".into(), target: None }).await;
    let terminate = || Op::Order(Order { id: "p".into(), run: None, what: What::Terminate { reason: "why".into() } });
    let asked = other.one(terminate()).await;
    assert_eq!(
        asked,
        Outcome::Asked { before: Some((run, Status::Running)), wakes: vec![waiter], again: false, more: false }
    );
    let row = actor.row("p").await;
    assert_eq!((row.status, row.owner, row.reason.as_deref()), (Status::Cancelled, None, Some("why")));
    assert!(row.finished_at.is_some() && row.cancel_requested_at.is_some());
    // Its owner's writes come too late.
    assert_eq!(actor.one(Op::Record(record(run, 1, key("a", "")))).await, Outcome::Lost);
    let park = Park { run, claim: 1, wake_at: None, seen: None, waiting_for: None, deaths: 0 };
    actor.one(Op::Park(park)).await;
    assert_eq!(actor.row("p").await.status, Status::Cancelled);
    assert_eq!(other.load(waiter).await.targets.len(), 1);
    other.finish(target, 1, Status::Completed).await;
    assert_eq!(actor.row("p").await.signals, row.signals);
    let late = other.one(terminate()).await;
    assert!(matches!(late, Outcome::Asked { before: Some((_, Status::Cancelled)), .. }));
    assert!(matches!(other.one(Op::delete("p".into())).await, Outcome::Asked { before: Some(_), .. }));
    assert_eq!(storage.find(NAMESPACE, "p", None).await.unwrap(), None);
}

/// All runs, and nothing else; those that await it are woken and find it gone.
pub async fn deleting<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let first = actor.start("p").await;
    actor.one(Op::Record(record(first, 1, key("a", "")))).await;
    let delete = async |id: &str| actor.one(Op::delete(id.into())).await;
    assert!(matches!(delete("p").await, Outcome::Asked { before: Some((_, Status::Running)), .. }));
    assert!(load(&storage, first).await.is_some());
    actor.finish(first, 1, Status::Completed).await;
    let second = Spawn { restart_finished: true, take: true, ..spawn("p") };
    actor.one(Op::Spawn(second.clone())).await;
    actor.raise("p", "m").await;
    let neighbour = actor.start("neighbour").await;
    actor.one(Op::Await { run: neighbour, id: "p".into(), target: None }).await;
    actor.finish(second.run, 1, Status::Stuck).await;
    let deleted = delete("p").await;
    assert_eq!(
        deleted,
        Outcome::Asked { before: Some((second.run, Status::Stuck)), wakes: vec![neighbour], again: false, more: false }
    );
    assert!(load(&storage, first).await.is_none() && load(&storage, second.run).await.is_none());
    assert_eq!(storage.find(NAMESPACE, "p", None).await.unwrap(), None);
    actor.idle().await;
    assert_eq!(storage.record(first, &key("a", "")).await.unwrap(), None);
    let targets = actor.load(neighbour).await.targets;
    assert_eq!(targets, [Target { run: second.run, id: "".into(), fate: Fate::Gone }]);
    assert_eq!(delete("p").await, Outcome::Asked { before: None, wakes: vec![], again: false, more: false });
    let again = spawn("p");
    assert_eq!(actor.one(Op::Spawn(again.clone())).await, Outcome::Spawned(spawned(&again, false)));
}

/// By id, by filter, a page at a time, by number.
pub async fn finding_listing_counting<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let mut runs = Vec::new();
    for n in 0..5 {
        runs.push(actor.start(&format!("p-{n}")).await);
    }
    actor.one(Op::Spawn(Spawn { kind: "unserved".into(), ..spawn("u") })).await;
    actor.finish(runs[4], 1, Status::Failed).await;
    let row = actor.row("p-4").await;
    assert_eq!(
        (row.status, row.output.as_deref(), row.reason.as_deref()),
        (Status::Failed, Some("7"), Some("because"))
    );
    assert!(row.finished_at.is_some() && row.created_at <= row.status_at);
    assert_eq!(storage.find(NAMESPACE, "p-4", Some(runs[3])).await.unwrap(), None);
    assert_eq!(storage.find("elsewhere", "p-4", Some(runs[4])).await.unwrap(), None);
    let list = async |filter: Filter| -> Vec<RunId> {
        storage.list(NAMESPACE, &filter).await.unwrap().iter().map(|row| row.run).collect()
    };
    let all = Filter { limit: 99, ..Filter::default() };
    assert_eq!(list(all.clone()).await.len(), 6);
    let mut in_order = runs.clone();
    in_order.sort();
    let of_kind = Filter { kind: Some(KIND.into()), ..all.clone() };
    assert_eq!(list(of_kind.clone()).await, in_order);
    assert_eq!(list(Filter { after: Some(in_order[1]), limit: 2, ..of_kind.clone() }).await, in_order[2..4]);
    assert_eq!(list(Filter { status: Some(Status::Failed), ..all.clone() }).await, [runs[4]]);
    let now = actor.now().await;
    let since = |hours| Filter { unchanged_since: Some(now + TimeDelta::hours(hours)), ..all.clone() };
    assert_eq!(list(since(1)).await.len(), 6);
    assert!(list(since(-1)).await.is_empty());
    let mut counted = storage.count(NAMESPACE, &all).await.unwrap();
    counted.sort_by(|a, b| (&a.kind, a.status).cmp(&(&b.kind, b.status)));
    let row = |kind: &str, status, count, served| Counted { kind: kind.into(), status, count, served };
    let expected = [
        row(KIND, Status::Running, 4, true),
        row(KIND, Status::Failed, 1, true),
        row("unserved", Status::Waiting, 1, false),
    ];
    assert_eq!(counted, expected);
    assert!(storage.count("elsewhere", &all).await.unwrap().is_empty());
}

/// The first and the last time that can be given.
pub async fn due_times_to_the_end_of_time<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let (past, future) = (actor.start("past").await, actor.start("future").await);
    actor.park(past, 1, Some(chrono::DateTime::UNIX_EPOCH), None).await;
    actor.park(future, 1, Some(latest()), Some(0)).await;
    assert_eq!(actor.row("future").await.wake_at, Some(latest()));
    assert_eq!(actor.row("past").await.wake_at, Some(chrono::DateTime::UNIX_EPOCH));
    assert_eq!(actor.claim(9).await.iter().map(|c| c.run).collect::<Vec<_>>(), [past]);
}
