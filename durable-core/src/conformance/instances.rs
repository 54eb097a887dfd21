//! Instances: who may write, who lives, who takes over.

use super::Subject;
use super::scene::{Actor, KIND, NAMESPACE, new_instance, spawn};
use crate::storage::{InstanceId, LockState, Op, Outcome, Peer, Poll, RunId, Spawn, Status, Storage, StorageError};

/// Another instance as this one sees it.
async fn seen<S: Storage>(by: &Actor<'_, S>, whom: InstanceId) -> Option<Peer> {
    let peers = by.storage.peers(NAMESPACE, by.id).await.unwrap().peers;
    assert!(peers.iter().all(|peer| peer.instance != by.id), "nobody sees itself");
    peers.into_iter().find(|peer| peer.instance == whom)
}

/// From the moment that the fence stands no batch is written, whatever is in it.
pub async fn a_fence_stops_batches<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (zombie, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = zombie.start("p").await;
    let peer = seen(&other, zombie.id).await.unwrap();
    assert!(!peer.fenced);
    assert!(storage.fence(&peer).await.unwrap());
    assert!(storage.fence(&peer).await.unwrap(), "again");
    for op in [
        Op::Spawn(spawn("new")),
        Op::Raise(super::scene::raise("p", "m")),
        Op::Record(super::scene::record(run, 1, super::scene::key("a", ""))),
        Op::Finish(super::scene::finish(run, 1, Status::Completed)),
        Op::cancel("p".into()),
        Op::Claim { kind: KIND.into(), limit: 1 },
    ] {
        let refused = zombie.commit(vec![op]).await;
        assert!(matches!(refused, Err(StorageError::Fenced)), "{refused:?}");
    }
    assert!(matches!(storage.refence(zombie.id, 9).await, Err(StorageError::Fenced)));
    assert_eq!(other.row("p").await.status, Status::Running);
    assert!(other.load(run).await.records.is_empty());
    let unknown = Actor { id: InstanceId::new(), heart: None, ..Actor::new(&storage).await };
    assert!(matches!(unknown.commit(vec![Op::Spawn(spawn("x"))]).await, Err(StorageError::Fenced)), "never enlisted");
}

/// Only owners that nobody knows are reinstated, and only other hands make them so.
pub async fn owners_that_are_known<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (owner, fenced) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let run = owner.start("p").await;
    fenced.start("q").await;
    assert!(storage.fence(&seen(&owner, fenced.id).await.unwrap()).await.unwrap());
    assert_eq!(storage.reinstate().await.unwrap(), 0);
    owner.commit(vec![Op::Finish(super::scene::finish(run, 1, Status::Completed))]).await.unwrap();
    assert_eq!(owner.row("q").await.owner, Some(fenced.id));
}

/// Whose answer was lost asks again: it is the instance that it was.
pub async fn enlisting_again<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (mut actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let again = async |actor: &mut Actor<'_, S::Storage>| {
        actor.heart = None;
        actor.heart = Some(storage.enlist(&new_instance(actor.id)).await.unwrap().0);
    };
    storage.refence(actor.id, 2).await.unwrap();
    let before = seen(&other, actor.id).await.unwrap();
    again(&mut actor).await;
    let peer = seen(&other, actor.id).await.unwrap();
    assert_eq!((peer.heartbeat_at, peer.fenced), (before.heartbeat_at, false));
    assert!(matches!(actor.commit(vec![]).await, Err(StorageError::Fenced)), "its generation is what it was");
    actor.generation = 2;
    actor.commit(vec![]).await.unwrap();
    assert!(storage.fence(&peer).await.unwrap());
    again(&mut actor).await;
    assert!(matches!(actor.commit(vec![]).await, Err(StorageError::Fenced)), "and so is its fence");
    assert!(seen(&other, actor.id).await.unwrap().fenced);
}

/// A commit that is still on its way when its answer is given up cannot arrive any more.
pub async fn a_higher_generation_stops_lower_ones<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let mut actor = Actor::new(&storage).await;
    storage.refence(actor.id, 3).await.unwrap();
    storage.refence(actor.id, 3).await.unwrap();
    storage.refence(actor.id, 2).await.unwrap();
    for generation in [0, 2, 4] {
        actor.generation = generation;
        let refused = actor.commit(vec![Op::Spawn(spawn("p"))]).await;
        assert!(matches!(refused, Err(StorageError::Fenced)), "{generation}: {refused:?}");
    }
    actor.generation = 3;
    assert!(matches!(actor.one(Op::Spawn(spawn("p"))).await, Outcome::Spawned(_)));
}

/// Who was seen silent and has beaten since is not fenced.
pub async fn a_heartbeat_saves_from_the_fence<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (mut actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let before = seen(&other, actor.id).await.unwrap();
    // The database's clock may be no finer than a millisecond.
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    actor.heart.as_mut().unwrap().beat().await.unwrap();
    let after = seen(&other, actor.id).await.unwrap();
    assert!(after.heartbeat_at > before.heartbeat_at);
    assert!(!storage.fence(&before).await.unwrap());
    assert!(matches!(actor.one(Op::Spawn(spawn("p"))).await, Outcome::Spawned(_)));
    assert!(storage.fence(&after).await.unwrap());
}

/// It finds out at its next beat, and beats no more.
pub async fn a_fenced_heart_stops<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (mut actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    let peer = seen(&other, actor.id).await.unwrap();
    storage.fence(&peer).await.unwrap();
    let beat = actor.heart.as_mut().unwrap().beat().await;
    assert!(matches!(beat, Err(StorageError::Fenced)), "{beat:?}");
    assert_eq!(seen(&other, actor.id).await.unwrap().heartbeat_at, peer.heartbeat_at);
}

/// In chunks; then the instance is gone.
pub async fn what_the_fenced_owned_is_released<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (zombie, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    for n in 0..5 {
        zombie.start(&format!("p-{n}")).await;
    }
    let peer = seen(&other, zombie.id).await.unwrap();
    assert_eq!(storage.release(zombie.id, 9).await.unwrap(), 0, "not while it may write");
    assert_eq!(storage.release(other.id, 9).await.unwrap(), 0);
    assert!(seen(&zombie, other.id).await.is_some(), "a living one that owns nothing stays");
    assert_eq!(storage.owned(zombie.id, None, 9).await.unwrap().len(), 5);
    storage.fence(&peer).await.unwrap();
    assert!(seen(&other, zombie.id).await.unwrap().fenced);
    let chunks = [storage.release(zombie.id, 3).await.unwrap(), storage.release(zombie.id, 3).await.unwrap()];
    assert_eq!(chunks, [3, 2]);
    assert_eq!(storage.release(zombie.id, 3).await.unwrap(), 0);
    assert_eq!(seen(&other, zombie.id).await, None);
    let mine = other.start("mine").await;
    assert_eq!(other.row("mine").await.run, mine);
    let row = other.row("p-0").await;
    assert_eq!(
        (row.status, row.owner, row.claim, row.calm_claim),
        (Status::Waiting, None, 1, 0),
        "a death is not calm"
    );
    assert_eq!(other.claim(9).await.len(), 5);
    assert!(matches!(zombie.commit(vec![]).await, Err(StorageError::Fenced)));
}

/// Held while the heart lives, free once it is dropped.
pub async fn proof_of_life<S: Subject>(subject: &S) {
    let (first, second) = (subject.open().await, subject.open().await);
    let mut actor = Actor::new(&first).await;
    let other = Actor::new(&second).await;
    let lock = async || seen(&other, actor.id).await.unwrap().lock;
    // A storage that has no such proof says so, and lives by its heartbeats.
    if lock().await == LockState::Unknown {
        return;
    }
    assert_eq!(lock().await, LockState::Held);
    assert_eq!(lock().await, LockState::Held, "looking does not take it");
    actor.heart = None;
    let mut free = false;
    for _ in 0..100 {
        free = seen(&other, actor.id).await.unwrap().lock == LockState::Free;
        if free {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(free, "it stays held");
}

/// An orderly end leaves nothing behind.
pub async fn retiring<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let (actor, other) = (Actor::new(&storage).await, Actor::new(&storage).await);
    actor.start("p").await;
    storage.retire(actor.id).await.unwrap();
    storage.retire(actor.id).await.unwrap();
    assert_eq!(seen(&other, actor.id).await, None);
    assert_eq!(other.claim(9).await.len(), 1);
    assert!(matches!(actor.commit(vec![Op::Spawn(spawn("x"))]).await, Err(StorageError::Fenced)));
}

/// What there is to do, for this instance only.
pub async fn polling<S: Subject>(subject: &S) {
    let storage = subject.open().await;
    let actor = Actor::new(&storage).await;
    let poll = async |kinds: &[&str], watched: Vec<RunId>| {
        let kinds = kinds.iter().map(|kind| (*kind).into()).collect();
        storage.poll(&Poll { instance: actor.id, namespace: NAMESPACE.into(), kinds, watched }).await.unwrap()
    };
    let idle = poll(&[KIND, "other"], vec![]).await;
    assert!(idle.due.is_empty() && idle.signalled.is_empty() && idle.ended.is_empty());
    actor.one(Op::Spawn(spawn("p"))).await;
    actor.one(Op::Spawn(Spawn { kind: "third".into(), ..spawn("q") })).await;
    let later = actor.start("later").await;
    let tomorrow = idle.now + chrono::TimeDelta::days(1);
    actor.park(later, 1, Some(tomorrow), Some(0)).await;
    let due = poll(&[KIND, "other"], vec![]).await.due;
    assert_eq!(due.len(), 1);
    assert!(&*due[0].0 == KIND && due[0].1 <= actor.now().await, "the earliest: {due:?}");
    assert_eq!(actor.claim(1).await.len(), 1);
    let due = poll(&[KIND], vec![]).await.due;
    assert_eq!(due[0].1.timestamp_millis(), tomorrow.timestamp_millis());
    let (ended, gone) = (actor.start("ended").await, RunId::new());
    assert!(poll(&[], vec![ended, later]).await.ended.is_empty());
    actor.finish(ended, 1, Status::Failed).await;
    let mut found = poll(&[], vec![ended, later, gone]).await.ended;
    found.sort();
    let mut expected = vec![ended, gone];
    expected.sort();
    assert_eq!(found, expected);
}
