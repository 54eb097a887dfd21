//! What the cases are made of.

use chrono::{DateTime, Utc};
use std::time::Duration;
use uuid::Uuid;

use crate::storage::{
    Batch, Claimed, Effect, Fence, Finish, Heart, InstanceId, Load, NewInstance, Op, OpKind, Outcome, Park, Poll,
    ProcessRow, Raise, Raised, Record, RecordKey, RecordOp, RecordState, Result, RunId, RunState, Scope, Spawn,
    Spawned, Status, Storage,
};

/// The namespace of the cases.
pub const NAMESPACE: &str = "cases";
/// Their kind.
pub const KIND: &str = "kind";

/// An instance, and what it may do.
pub struct Actor<'s, S> {
    /// Its storage.
    pub storage: &'s S,
    /// Its id.
    pub id: InstanceId,
    /// Its write generation.
    pub generation: i64,
    /// Its heart.
    pub heart: Option<Box<dyn Heart>>,
}

impl<'s, S: Storage> Actor<'s, S> {
    /// A new instance.
    pub async fn new(storage: &'s S) -> Self {
        let id = InstanceId::new();
        let (heart, _) = storage.enlist(&new_instance(id)).await.unwrap();
        Self { storage, id, generation: 0, heart: Some(heart) }
    }

    /// A batch of it.
    pub fn batch(&self, ops: Vec<Op>) -> Batch {
        let fence = Fence { instance: self.id, generation: self.generation };
        Batch::new(fence, NAMESPACE, ops)
    }

    /// Commits.
    pub async fn commit(&self, ops: Vec<Op>) -> Result<Vec<Outcome>> {
        self.storage.commit(&self.batch(ops)).await
    }

    /// Commits one operation, which works.
    pub async fn one(&self, op: Op) -> Outcome {
        self.commit(vec![op]).await.unwrap().remove(0)
    }

    /// Starts a process and takes it, with claim 1.
    pub async fn start(&self, id: &str) -> RunId {
        let spawn = Spawn { take: true, ..spawn(id) };
        let run = spawn.run;
        let Outcome::Spawned(spawned) = self.one(Op::Spawn(spawn)).await else { panic!() };
        assert_eq!((spawned.run, spawned.existed), (run, false));
        run
    }

    /// Sends a message.
    pub async fn raise(&self, id: &str, event_id: &str) -> Raised {
        match self.one(Op::Raise(raise(id, event_id))).await {
            Outcome::Raised(raised) => raised,
            other => panic!("{other:?}"),
        }
    }

    /// Claims.
    pub async fn claim(&self, limit: usize) -> Vec<Claimed> {
        match self.one(Op::Claim { kind: KIND.into(), limit }).await {
            Outcome::Claimed(claimed) => claimed,
            other => panic!("{other:?}"),
        }
    }

    /// Ends a run.
    pub async fn finish(&self, run: RunId, claim: i64, status: Status) -> Outcome {
        self.one(Op::Finish(finish(run, claim, status))).await
    }

    /// Gives a run back.
    pub async fn park(&self, run: RunId, claim: i64, wake_at: Option<DateTime<Utc>>, seen: Option<i64>) -> Outcome {
        self.one(Op::Park(Park { run, claim, wake_at, seen, waiting_for: Some("something".into()), deaths: 0 })).await
    }

    /// The state of a run.
    pub async fn load(&self, run: RunId) -> RunState {
        load(self.storage, run).await.expect("the run is there")
    }

    /// The row of a process.
    pub async fn row(&self, id: &str) -> ProcessRow {
        self.storage.find(NAMESPACE, id, None).await.unwrap().expect("the process is there")
    }

    /// Looks until nothing is left that looks do by the way.
    pub async fn idle(&self) {
        let kinds = vec![KIND.into()];
        let poll = Poll { instance: self.id, namespace: NAMESPACE.into(), kinds, watched: vec![] };
        while self.storage.poll(&poll).await.unwrap().more {}
    }

    /// The database's time.
    pub async fn now(&self) -> DateTime<Utc> {
        self.storage.peers(NAMESPACE, self.id).await.unwrap().now
    }
}

/// The state of a run, if it is there.
pub async fn load(storage: &impl Storage, run: RunId) -> Option<RunState> {
    let mut loaded = storage.load(&Load::whole(&[run])).await.unwrap().unwrap();
    assert_eq!(loaded.len(), 1);
    loaded.remove(0).state.unwrap()
}

/// An instance to enlist.
pub fn new_instance(id: InstanceId) -> NewInstance {
    let expiry = Duration::from_millis(12_345);
    NewInstance { id, namespace: NAMESPACE.into(), label: "case".into(), kinds: vec![KIND.into()], expiry }
}

/// A start.
pub fn spawn(id: &str) -> Spawn {
    Spawn {
        run: RunId::new(),
        id: id.into(),
        kind: KIND.into(),
        input: r#"{"an":"input"}"#.into(),
        digest: "digest".into(),
        take: false,
        restart_finished: false,
    }
}

/// What an id has now.
pub fn spawned(spawn: &Spawn, existed: bool) -> Spawned {
    Spawned { run: spawn.run, existed, kind: spawn.kind.clone(), digest: spawn.digest.clone() }
}

/// A message.
pub fn raise(id: &str, event_id: &str) -> Raise {
    Raise { id: id.into(), name: "event".into(), event_id: event_id.into(), payload: format!("\"{event_id}\"").into() }
}

/// The end of a run.
pub fn finish(run: RunId, claim: i64, status: Status) -> Finish {
    Finish { run, claim, status, output: Some("7".into()), reason: Some("because".into()) }
}

/// A key.
pub fn key(name: &str, key: &str) -> RecordKey {
    RecordKey { scope: Scope::Process, name: name.into(), key: key.into() }
}

/// A record.
pub fn record(run: RunId, claim: i64, key: RecordKey) -> RecordOp {
    RecordOp {
        run,
        claim,
        key,
        op: OpKind::Step,
        state: RecordState::Done,
        replaces: false,
        payload: "1".into(),
        shielded: false,
        attempts: 0,
        seq: 1,
        takes: None,
        effect: None,
        awaited: None,
    }
}

/// A record with an effect.
pub fn with_effect(run: RunId, op: OpKind, effect: Effect) -> RecordOp {
    let payload = match &effect {
        Effect::Spawn(spawn) => spawn.digest.clone(),
        Effect::Raise(_) => "".into(),
    };
    RecordOp { op, payload, effect: Some(effect), ..record(run, 1, key("effect", &Uuid::now_v7().to_string())) }
}

/// The record that an operation leaves.
pub fn left_by(op: &RecordOp) -> Record {
    Record {
        op: op.op,
        state: op.state,
        payload: op.payload.clone(),
        attempts: op.attempts,
        seq: op.seq,
        claim: op.claim,
    }
}
