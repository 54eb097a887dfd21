//! Records: written once, by the owner, all or nothing, byte for byte.

use super::Subject;
use super::scene::{Actor, finish, key, left_by, raise, record, spawn, with_effect};
use crate::limits;
use crate::storage::{
    Effect, Load, Loaded, Op, OpKind, Outcome, RecordKey, RecordOp, RecordState, RunId, RunState, Scope, Spawn, Status,
    Storage, StorageError, Wanted,
};

/// What was committed is read, alone and with its run.
pub async fn a_record_is_there_once_committed<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let op = RecordOp { attempts: 3, state: RecordState::Failed, ..record(run, 1, key("a", "k")) };
    assert_eq!(storage.record(run, &op.key).await.unwrap(), None);
    assert_eq!(actor.one(Op::Record(op.clone())).await, Outcome::Recorded);
    assert_eq!(storage.record(run, &op.key).await.unwrap(), Some(left_by(&op)));
    assert_eq!(subject.open().await.record(run, &op.key).await.unwrap(), Some(left_by(&op)), "on any connection");
    assert_eq!(actor.load(run).await.records, [(op.key.clone(), left_by(&op))]);
    let without = storage.load(&Load::signals(&[run])).await.unwrap().unwrap().remove(0).state.unwrap().unwrap();
    assert!(without.records.is_empty());
}

/// A pending record makes way for the next one, also if the engine has forgotten that it is there.
pub async fn a_pending_record_is_overwritten<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    for known in ["known", "forgotten"] {
        for (attempts, state) in [(1, RecordState::Pending), (2, RecordState::Pending), (3, RecordState::Done)] {
            let replaces = known == "known" && attempts > 1;
            let payload = attempts.to_string().into();
            let op = RecordOp { attempts, state, replaces, payload, ..record(run, 1, key("a", known)) };
            let beside = record(run, 1, key("b", &format!("{known}-{attempts}")));
            let outcomes = actor.commit(vec![Op::Record(op.clone()), Op::Record(beside.clone())]).await.unwrap();
            assert_eq!(outcomes, [Outcome::Recorded, Outcome::Recorded]);
            for op in [op, beside] {
                assert_eq!(storage.record(run, &op.key).await.unwrap(), Some(left_by(&op)));
            }
        }
    }
}

/// A final record stays, whoever else writes it; the neighbours in the batch are written.
pub async fn a_final_record_is_not<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let first = record(run, 1, key("a", ""));
    actor.one(Op::Record(first.clone())).await;
    actor.park(run, 1, Some(actor.now().await), None).await;
    assert_eq!(actor.claim(9).await.len(), 1);
    for replaces in [false, true] {
        let again = RecordOp { replaces, payload: "2".into(), ..record(run, 2, key("a", "")) };
        let other = record(run, 2, key("b", if replaces { "replaces" } else { "" }));
        let outcomes = actor.commit(vec![Op::Record(again), Op::Record(other.clone())]).await.unwrap();
        assert_eq!(outcomes, [Outcome::Lost, Outcome::Recorded]);
        assert_eq!(storage.record(run, &first.key).await.unwrap(), Some(left_by(&first)));
        assert_eq!(storage.record(run, &other.key).await.unwrap(), Some(left_by(&other)));
    }
}

/// Nor by another write of the same claim: a transaction whose answer was lost may have recorded it after all.
pub async fn a_final_record_stays_as_it_is<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let states = [RecordState::Done, RecordState::Failed, RecordState::Pending];
    for (nth, state) in states.into_iter().enumerate() {
        for replaces in [false, true] {
            let at = key("a", &format!("{nth} {replaces}"));
            let first = RecordOp { op: OpKind::Transaction, ..record(run, 1, at.clone()) };
            assert_eq!(actor.one(Op::Record(first.clone())).await, Outcome::Recorded);
            let later =
                RecordOp { op: OpKind::Transaction, state, replaces, seq: 2, payload: "2".into(), ..first.clone() };
            let other = record(run, 1, key("b", &format!("{nth} {replaces}")));
            let outcomes = actor.commit(vec![Op::Record(later), Op::Record(other)]).await.unwrap();
            assert_eq!(outcomes, [Outcome::Lost, Outcome::Recorded]);
            assert_eq!(storage.record(run, &at).await.unwrap(), Some(left_by(&first)));
            assert_eq!(actor.one(Op::Record(first.clone())).await, Outcome::Recorded, "its own again");
        }
    }
}

/// A value is overwritten by later claims too.
pub async fn a_value_is_overwritten<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    for claim in 1..=3 {
        let (replaces, payload) = (claim == 3, claim.to_string().into());
        let op = RecordOp { op: OpKind::Value, replaces, payload, ..record(run, claim, key("v", "")) };
        assert_eq!(actor.one(Op::Record(op.clone())).await, Outcome::Recorded);
        assert_eq!(storage.record(run, &op.key).await.unwrap(), Some(left_by(&op)));
        actor.park(run, claim, Some(actor.now().await), None).await;
        actor.claim(9).await;
    }
}

/// A batch whose answer was lost is sent again under a higher generation: the same outcomes, nothing twice.
pub async fn the_same_batch_again_changes_nothing<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let mut actor = Actor::new(&storage).await;
    let (a, b, c) = (actor.start("a").await, actor.start("b").await, actor.start("c").await);
    actor.raise("a", "m1").await;
    let ops = vec![
        Op::Spawn(Spawn { take: true, ..spawn("new") }),
        Op::Raise(raise("a", "m2")),
        Op::Record(RecordOp { takes: Some(1), ..record(a, 1, key("r", "")) }),
        Op::Record(record(b, 1, key("r", ""))),
        Op::Record(with_effect(b, OpKind::Raise, Effect::Raise(raise("a", "m3")))),
        Op::Record(with_effect(c, OpKind::Spawn, Effect::Spawn(spawn("child")))),
        Op::Await { run: a, id: "c".into(), target: None },
        Op::Finish(finish(b, 1, Status::Completed)),
        Op::Park(crate::storage::Park { run: c, claim: 1, wake_at: None, seen: None, waiting_for: None, deaths: 0 }),
    ];
    let first = actor.commit(ops.clone()).await.unwrap();
    let before = (actor.load(a).await, actor.row("new").await, actor.row("b").await, actor.row("c").await);
    storage.refence(actor.id, 1).await.unwrap();
    actor.generation = 1;
    let second = actor.commit(ops).await.unwrap();
    assert_eq!(first, second);
    let after = (actor.load(a).await, actor.row("new").await, actor.row("b").await, actor.row("c").await);
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
}

/// Of a run that another instance owns, or nobody, or that does not exist.
pub async fn only_the_owner_records<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    let op = Op::Record(record(run, 1, key("a", "")));
    assert_eq!(other.one(op.clone()).await, Outcome::Lost);
    assert_eq!(other.finish(run, 1, Status::Completed).await, Outcome::Lost);
    assert_eq!(other.park(run, 1, None, None).await, Outcome::Lost);
    assert_eq!(other.one(Op::AcceptCancel { run, claim: 1, seq: 1 }).await, Outcome::Lost);
    owner.park(run, 1, None, None).await;
    assert_eq!(owner.one(op).await, Outcome::Lost, "given back");
    assert_eq!(owner.one(Op::Record(record(RunId::new(), 1, key("a", "")))).await, Outcome::Lost);
    assert!(owner.load(run).await.records.is_empty());
}

/// An execution that was claimed anew writes no more under its old number.
pub async fn only_under_the_current_claim<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    actor.park(run, 1, Some(actor.now().await), None).await;
    assert_eq!(actor.claim(9).await[0].claim, 2);
    assert_eq!(actor.one(Op::Record(record(run, 1, key("a", "")))).await, Outcome::Lost);
    assert_eq!(actor.finish(run, 1, Status::Completed).await, Outcome::Lost);
    assert_eq!(actor.one(Op::Record(record(run, 2, key("a", "")))).await, Outcome::Recorded);
    assert_eq!(actor.row("p").await.status, Status::Running);
}

/// Scope, name and key are apart, and compared exactly.
pub async fn names_and_keys_are_not_joined<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let mut keys: Vec<RecordKey> =
        [("a", "b"), ("ab", ""), ("a", "B"), ("A", "b"), ("a", ""), ("", "ab"), ("á", "b"), ("a%", "_")]
            .map(|(name, k)| key(name, k))
            .to_vec();
    keys.push(RecordKey { scope: Scope::Compensation, ..key("a", "b") });
    for (n, key) in keys.iter().enumerate() {
        let op = RecordOp { payload: n.to_string().into(), ..record(run, 1, key.clone()) };
        assert_eq!(actor.one(Op::Record(op)).await, Outcome::Recorded);
    }
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(&*storage.record(run, key).await.unwrap().unwrap().payload, n.to_string(), "{key}");
    }
    assert_eq!(actor.load(run).await.records.len(), keys.len());
}

/// Payloads are JSON text that nobody reformats.
pub async fn payloads_come_back_byte_for_byte<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let payloads = [
        "{ \"b\" : 1,\n\t\"a\":[ ] }",
        r#"{"a":1,"a":2}"#,
        r#""\u0000 \ud83d\ude00 'quoted' \"""#,
        "123456789012345678901234567890.000",
        "\"😀 é \u{202e}\"",
        "null",
        "\"\"",
    ];
    for (n, payload) in payloads.iter().enumerate() {
        let id = format!("p-{n}");
        let spawn = Spawn { take: true, input: (*payload).into(), ..spawn(&id) };
        let run = spawn.run;
        actor.one(Op::Spawn(spawn)).await;
        actor.one(Op::Raise(crate::storage::Raise { payload: (*payload).into(), ..raise(&id, "m") })).await;
        actor.one(Op::Record(RecordOp { payload: (*payload).into(), ..record(run, 1, key("a", "")) })).await;
        let state = actor.load(run).await;
        assert_eq!(&*state.process.input, *payload);
        assert_eq!(&*state.events[0].payload, *payload);
        assert_eq!(&*state.records[0].1.payload, *payload);
        let end = crate::storage::Finish { output: Some((*payload).into()), ..finish(run, 1, Status::Completed) };
        actor.one(Op::Finish(end)).await;
        assert_eq!(actor.row(&id).await.output.as_deref(), Some(*payload));
    }
}

/// The longest names, keys and ids, of characters that take two UTF-16 units and four bytes each; and a payload of 1 MiB.
pub async fn texts_up_to_their_limits<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let long = |units: usize| "😀".repeat(units / 2);
    let id = long(limits::MAX_ID);
    let spawn = Spawn { take: true, kind: long(limits::MAX_NAME).into(), ..spawn(&id) };
    let run = spawn.run;
    actor.one(Op::Spawn(spawn)).await;
    let event = crate::storage::Raise { name: long(limits::MAX_NAME).into(), ..raise(&id, &long(limits::MAX_ID)) };
    assert!(matches!(actor.one(Op::Raise(event)).await, Outcome::Raised(_)));
    // The engine puts a sign in front of keys that it makes from ids.
    let key = key(&long(limits::MAX_NAME), &format!("+{}", long(limits::MAX_ID)));
    let payload = format!("\"{}\"", "x".repeat(limits::DEFAULT_PAYLOAD - 2));
    let op = RecordOp { payload: payload.into(), ..record(run, 1, key.clone()) };
    assert_eq!(actor.one(Op::Record(op.clone())).await, Outcome::Recorded);
    assert_eq!(storage.record(run, &key).await.unwrap(), Some(left_by(&op)));
    assert_eq!(&*actor.row(&id).await.id, id);
}

/// A batch that is refused leaves nothing.
pub async fn a_batch_is_all_or_nothing<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let stale = crate::storage::Batch {
        fence: crate::storage::Fence { instance: actor.id, generation: -1 },
        ..actor.batch(vec![
            Op::Spawn(spawn("new")),
            Op::Raise(raise("p", "m")),
            Op::Record(record(run, 1, key("a", ""))),
            Op::Finish(finish(run, 1, Status::Completed)),
        ])
    };
    assert!(matches!(storage.commit(&stale).await, Err(StorageError::Fenced)));
    assert_eq!(storage.find(super::scene::NAMESPACE, "new", None).await.unwrap(), None);
    let state = actor.load(run).await;
    assert!(state.records.is_empty() && state.events.is_empty());
    assert_eq!(state.process.status, Status::Running);
}

/// As many operations as a batch holds by default, of several kinds, each with its own outcome.
pub async fn a_large_batch<S: Subject>(subject: &S) {
    const EACH: usize = 250;
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let starts: Vec<Spawn> = (0..EACH).map(|n| Spawn { take: true, ..spawn(&format!("p-{n}")) }).collect();
    let runs: Vec<RunId> = starts.iter().map(|spawn| spawn.run).collect();
    let outcomes = actor.commit(starts.into_iter().map(Op::Spawn).collect()).await.unwrap();
    for (outcome, run) in outcomes.iter().zip(&runs) {
        assert!(matches!(outcome, Outcome::Spawned(spawned) if spawned.run == *run && !spawned.existed));
    }
    let mut ops = Vec::new();
    for (n, run) in runs.iter().enumerate() {
        ops.push(Op::Record(record(*run, 1, key("a", &n.to_string()))));
        ops.push(Op::Raise(raise(&format!("p-{n}"), "m")));
        ops.push(Op::Finish(finish(*run, 1, Status::Failed)));
    }
    let outcomes = actor.commit(ops).await.unwrap();
    for (n, three) in outcomes.chunks(3).enumerate() {
        assert_eq!(three[0], Outcome::Recorded);
        assert!(matches!(three[1], Outcome::Raised(crate::storage::Raised::Delivered { run, .. }) if run == runs[n]));
        assert!(matches!(three[2], Outcome::Finished { .. }));
    }
}

/// A load that is too much reads nothing; what it comes to is told.
pub async fn a_load_may_be_bounded<S: Subject>(subject: &S) {
    const RUNS: usize = 6;
    const RECORDS: usize = 1500;
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let mut runs = Vec::new();
    let text = format!("\"{}\"", "\u{e9}".repeat(50));
    for n in 0..RUNS {
        let run = actor.start(&format!("p-{n}")).await;
        let of = |n: usize| RecordOp { payload: text.as_str().into(), ..record(run, 1, key("step", &n.to_string())) };
        actor.commit((0..RECORDS).map(|n| Op::Record(of(n))).collect()).await.unwrap();
        actor.raise(&format!("p-{n}"), "message").await;
        runs.push(run);
    }
    let gone = RunId::new();
    runs.push(gone);
    let load = Load::whole(&runs);
    let loaded = storage.load(&load).await.unwrap().unwrap();
    assert_eq!(loaded.iter().map(|loaded| loaded.run).collect::<Vec<_>>(), runs);
    let state = |loaded: Loaded| loaded.state.unwrap();
    let states: Vec<Option<RunState>> = loaded.into_iter().map(state).collect();
    assert!(states.iter().take(RUNS).all(|state| state.as_ref().unwrap().records.len() == RECORDS));
    assert!(states[RUNS].is_none());
    let weight: usize = states.iter().flatten().map(RunState::weight).sum();
    for most in [0, 100_000, weight - 1000] {
        assert!(storage.load(&Load { most, ..load.clone() }).await.unwrap().is_none(), "{most} of {weight}");
    }
    assert!(storage.load(&Load { most: weight * 2, ..load.clone() }).await.unwrap().is_some());
    // They may count characters instead of bytes, and are near to the truth in any case.
    let weights = storage.weigh(&load).await.unwrap();
    for (run, state) in runs.iter().zip(&states) {
        let weighed = weights.iter().find(|(weighed, _)| weighed == run).map_or(0, |(_, weight)| *weight);
        let weight = state.as_ref().map_or(0, RunState::weight);
        assert!(weighed >= weight / 3 && weighed <= weight * 2, "{weighed}, not {weight}");
    }
    let signals = Load { records: false, ..load.clone() };
    let light: usize = storage.weigh(&signals).await.unwrap().iter().map(|(_, weight)| weight).sum();
    assert!(light < weight / 50, "{light} of {weight}");
    assert!(storage.load(&Load { most: light * 2, ..signals }).await.unwrap().is_some());
    // What was seen is not read again.
    let wanted = |seen| Load { runs: vec![Wanted { run: runs[0], seen }], ..Load::signals(&[]) };
    for (seen, events) in [(0, 1), (1, 0)] {
        let loaded = storage.load(&wanted(seen)).await.unwrap().unwrap().remove(0).state.unwrap().unwrap();
        assert_eq!((loaded.events.len(), loaded.process.signals), (events, 1));
    }
    assert!(storage.load(&Load::whole(&[])).await.unwrap().unwrap().is_empty());
}
