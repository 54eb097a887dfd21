//! Mailboxes: in order, once, and no wake-up lost.

use super::Subject;
use super::scene::{Actor, NAMESPACE, key, raise, record, with_effect};
use crate::storage::{Effect, Op, OpKind, Outcome, Poll, Raised, RecordOp, RunId, Status, Storage};

fn numbers(state: &crate::storage::RunState) -> Vec<i64> {
    state.events.iter().map(|event| event.number).collect()
}

/// One after the other, also within a batch, and for each process by itself.
pub async fn messages_are_numbered_in_their_order<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let (a, b) = (actor.start("a").await, actor.start("b").await);
    let raises = ["a1", "b1", "a2", "b2", "a3"].map(|id| Op::Raise(raise(&id[..1], id)));
    let outcomes = actor.commit(raises.to_vec()).await.unwrap();
    let number = |outcome: &Outcome| match outcome {
        Outcome::Raised(Raised::Delivered { number, mine: true, .. }) => *number,
        other => panic!("{other:?}"),
    };
    assert_eq!(outcomes.iter().map(number).collect::<Vec<_>>(), [1, 1, 2, 2, 3]);
    assert_eq!(actor.raise("b", "b3").await, Raised::Delivered { run: b, number: 3, mine: true });
    let state = actor.load(a).await;
    assert_eq!((numbers(&state), state.process.signals), (vec![1, 2, 3], 3));
    assert_eq!(state.events.iter().map(|event| &*event.payload).collect::<Vec<_>>(), ["\"a1\"", "\"a2\"", "\"a3\""]);
}

/// The same id again is the same message, in the same batch order or later, also after the end; another run does not
/// know it.
pub async fn a_message_id_is_taken_once<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let run = actor.start("p").await;
    let first = actor.raise("p", "m").await;
    assert_eq!(first, Raised::Delivered { run, number: 1, mine: true });
    actor.raise("p", "n").await;
    assert_eq!(actor.raise("p", "m").await, first);
    assert_eq!(actor.load(run).await.process.signals, 2);
    actor.finish(run, 1, Status::Completed).await;
    assert_eq!(actor.raise("p", "m").await, Raised::Delivered { run, number: 1, mine: false });
    assert_eq!(actor.raise("p", "other").await, Raised::Finished);
    assert_eq!(numbers(&actor.load(run).await), [1, 2], "what was left stays");
}

/// A waiting process is due at once.
pub async fn a_message_wakes<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    assert_eq!(owner.park(run, 1, None, Some(0)).await, Outcome::Recorded);
    assert!(other.claim(9).await.is_empty());
    assert_eq!(other.raise("p", "m").await, Raised::Delivered { run, number: 1, mine: false });
    assert_eq!(other.claim(9).await.len(), 1);
    assert_eq!(numbers(&other.load(run).await), [1]);
}

/// Consumed with the record that says so.
pub async fn a_taken_message_is_not_loaded_again<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    for id in ["1", "2", "3"] {
        owner.raise("p", id).await;
    }
    let take =
        |number| RecordOp { op: OpKind::Event, takes: Some(number), ..record(run, 1, key("e", &format!("#{number}"))) };
    assert_eq!(other.one(Op::Record(take(1))).await, Outcome::Lost);
    assert_eq!(numbers(&owner.load(run).await), [1, 2, 3], "a record that is not written takes nothing");
    owner.one(Op::Record(take(2))).await;
    assert_eq!(numbers(&owner.load(run).await), [1, 3]);
}

/// Who is not there, and who has ended.
pub async fn nobody_and_the_dead<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let (run, stuck) = (actor.start("p").await, actor.start("stuck").await);
    actor.finish(run, 1, Status::Cancelled).await;
    actor.finish(stuck, 1, Status::Stuck).await;
    let raises = ["p", "nobody", "stuck"].map(|id| Op::Raise(raise(id, "m")));
    let outcomes = actor.commit(raises.to_vec()).await.unwrap();
    assert_eq!(outcomes[0], Outcome::Raised(Raised::Finished));
    assert_eq!(outcomes[1], Outcome::Raised(Raised::NotFound));
    assert_eq!(outcomes[2], Outcome::Raised(Raised::Delivered { run: stuck, number: 1, mine: false }));
    assert!(actor.claim(9).await.is_empty(), "a stuck process waits for its resume");
}

/// A message and the record of having sent it: both, with the outcome in the record; or neither.
pub async fn a_durable_message_and_its_record<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let (from, to, ended) = (owner.start("from").await, owner.start("to").await, owner.start("ended").await);
    owner.finish(ended, 1, Status::Completed).await;
    let send = |run, id: &str| with_effect(run, OpKind::Raise, Effect::Raise(raise(id, "m")));
    assert_eq!(other.one(Op::Record(send(from, "to"))).await, Outcome::Lost);
    assert!(owner.load(to).await.events.is_empty(), "no record, no message");
    for (id, outcome) in [
        ("to", Raised::Delivered { run: to, number: 1, mine: true }),
        ("ended", Raised::Finished),
        ("nobody", Raised::NotFound),
    ] {
        let op = send(from, id);
        assert_eq!(owner.one(Op::Record(op.clone())).await, Outcome::Raised(outcome), "{id}");
        assert_eq!(&*storage.record(from, &op.key).await.unwrap().unwrap().payload, outcome.as_json());
        assert_eq!(owner.one(Op::Record(op)).await, Outcome::Raised(outcome), "{id}, again");
    }
    assert_eq!(numbers(&owner.load(to).await), [1]);
}

/// Decided in the transaction: whoever has not seen all signals does not park.
pub async fn a_park_that_missed_a_message<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    other.raise("p", "m").await;
    assert_eq!(owner.park(run, 1, None, Some(0)).await, Outcome::Signalled(1));
    assert_eq!(owner.row("p").await.status, Status::Running);
    assert_eq!(owner.park(run, 1, None, Some(1)).await, Outcome::Recorded);
    // In one batch messages come before parks.
    let second = owner.start("q").await;
    let park =
        crate::storage::Park { run: second, claim: 1, wake_at: None, seen: Some(0), waiting_for: None, deaths: 0 };
    let outcomes = owner.commit(vec![Op::Park(park), Op::Raise(raise("q", "m"))]).await.unwrap();
    assert_eq!(outcomes[0], Outcome::Signalled(1));
}

/// The owner is told at its next look, until it says that it has seen.
pub async fn a_signal_of_another_instance_is_seen<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    let signalled = async || {
        let poll = Poll { instance: owner.id, namespace: NAMESPACE.into(), kinds: vec![], watched: vec![] };
        storage.poll(&poll).await.unwrap().signalled
    };
    let nothing: Vec<(RunId, i64)> = Vec::new();
    owner.raise("p", "own").await;
    assert_eq!(signalled().await, nothing, "the owner knows what it wrote itself");
    other.raise("p", "m").await;
    assert_eq!(signalled().await, [(run, 2)]);
    other.one(Op::cancel("p".into())).await;
    owner.one(Op::Seen { run, claim: 1, signals: 2 }).await;
    assert_eq!(signalled().await, [(run, 3)], "it has not seen all");
    assert_eq!(owner.one(Op::Seen { run, claim: 1, signals: 3 }).await, Outcome::Recorded);
    assert_eq!(signalled().await, nothing);
}
