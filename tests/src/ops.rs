//! Operations and batches, for tests that talk to a storage without an engine.

use durable_core::Status;
use durable_core::storage::{
    self, Batch, Effect, Fence, Finish, Heart, InstanceId, NewInstance, Op, OpKind, Outcome, Park, Raise, RecordKey,
    RecordOp, RecordState, RunId, Scope, Spawn, Storage,
};

/// The kind of all processes here.
pub const KIND: &str = "it";

/// Makes an instance known.
pub async fn enlist(storage: &impl Storage) -> (InstanceId, Box<dyn Heart>) {
    let id = InstanceId::new();
    let new = NewInstance {
        id,
        namespace: "default".into(),
        label: "test".into(),
        kinds: vec![KIND.into()],
        expiry: std::time::Duration::from_secs(10),
    };
    (id, storage.enlist(&new).await.unwrap().0)
}

/// A batch of this instance.
pub fn batch(instance: InstanceId, generation: i64, ops: Vec<Op>) -> Batch {
    Batch::new(Fence { instance, generation }, "default", ops)
}

/// Commits a batch of the first generation.
pub async fn commit(storage: &impl Storage, instance: InstanceId, ops: Vec<Op>) -> Vec<Outcome> {
    storage.commit(&batch(instance, 0, ops)).await.unwrap()
}

/// A start, taken by the instance or left to anybody.
pub fn spawn_op(id: &str, take: bool) -> Spawn {
    let (input, digest) = ("1".into(), "d".into());
    Spawn { run: RunId::new(), id: id.into(), kind: KIND.into(), input, digest, take, restart_finished: false }
}

/// The same as an operation, and its run.
pub fn spawn(id: &str, take: bool) -> (Op, RunId) {
    let spawn = spawn_op(id, take);
    let run = spawn.run;
    (Op::Spawn(spawn), run)
}

/// Starts a process that the instance owns.
pub async fn start(storage: &impl Storage, instance: InstanceId, id: &str) -> RunId {
    let (op, run) = spawn(id, true);
    commit(storage, instance, vec![op]).await;
    run
}

/// A record under claim 1.
pub fn record_op(run: RunId, name: &str, op: OpKind, effect: Option<Effect>) -> RecordOp {
    RecordOp {
        run,
        claim: 1,
        key: RecordKey { scope: Scope::Process, name: name.into(), key: "".into() },
        op,
        state: RecordState::Done,
        replaces: false,
        payload: "1".into(),
        attempts: 0,
        shielded: false,
        seq: 1,
        takes: None,
        effect,
        awaited: None,
    }
}

/// A step's record.
pub fn record(run: RunId, name: &str) -> Op {
    Op::Record(record_op(run, name, OpKind::Step, None))
}

/// A process starts another one.
pub fn started(run: RunId, name: &str, child: Spawn) -> Op {
    Op::Record(record_op(run, name, OpKind::Spawn, Some(Effect::Spawn(child))))
}

/// The end of a process.
pub fn finish(run: RunId) -> Op {
    let output = Some("7".into());
    Op::Finish(Finish { run, claim: 1, status: Status::Completed, output, reason: None })
}

/// A process waits, having seen so many signals.
pub fn park(run: RunId, seen: i64) -> Op {
    Op::Park(Park { run, claim: 1, wake_at: None, seen: Some(seen), waiting_for: None, deaths: 0 })
}

/// A message.
pub fn raise(id: &str, event_id: &str) -> Op {
    Op::Raise(Raise { id: id.into(), name: "Go".into(), event_id: event_id.into(), payload: "1".into() })
}

/// Commits a batch meanwhile.
pub fn in_background(
    storage: &(impl Storage + Clone),
    batch: Batch,
) -> tokio::task::JoinHandle<storage::Result<Vec<Outcome>>> {
    let storage = storage.clone();
    tokio::spawn(async move { storage.commit(&batch).await })
}
