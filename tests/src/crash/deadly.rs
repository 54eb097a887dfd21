//! A storage that kills its program at a chosen boundary: in front of, or behind, the n-th commit of an operation.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Op, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, RecordState, Result, RunId, Storage,
};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where the program dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Behind the commit, not in front of it.
    pub after: bool,
    /// The commit of what.
    pub of: Of,
    /// The how manieth.
    pub nth: u32,
}

/// What a commit is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A start.
    Spawn,
    /// A final record.
    Record,
    /// A pending record.
    Pending,
    /// A message.
    Raise,
    /// The parking of a process.
    Park,
    /// The end of a process.
    Finish,
    /// A claim.
    Claim,
    /// No commit: the effect of a step, inside its closure.
    Effect,
}

impl Of {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Spawn, Self::Record, Self::Pending, Self::Raise, Self::Park, Self::Finish, Self::Claim, Self::Effect];

    fn is(self, op: &Op) -> bool {
        match (self, op) {
            (Self::Record, Op::Record(record)) => record.state != RecordState::Pending,
            (Self::Pending, Op::Record(record)) => record.state == RecordState::Pending,
            (Self::Spawn, Op::Spawn(_))
            | (Self::Raise, Op::Raise(_))
            | (Self::Park, Op::Park(_))
            | (Self::Finish, Op::Finish(_))
            | (Self::Claim, Op::Claim { .. }) => true,
            _ => false,
        }
    }
}

impl std::fmt::Display for Boundary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{:?}:{}", if self.after { "after" } else { "before" }, self.of, self.nth)
    }
}

impl FromStr for Boundary {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let [side, of, nth] = parts[..] else { return Err(format!("no boundary: {text}")) };
        let of = Of::ALL.into_iter().find(|it| format!("{it:?}") == of).ok_or(format!("no operation: {of}"))?;
        Ok(Self { after: side == "after", of, nth: nth.parse().map_err(|e| format!("{nth}: {e}"))? })
    }
}

/// Kills its program at a boundary.
#[derive(Clone)]
pub struct Deadly<S> {
    inner: S,
    fuse: Fuse,
    /// Every so manieth record is not written, though it is said to be: a mistake that the checker must find.
    forgets: Option<u32>,
}

/// Counts down to the boundary.
#[derive(Clone)]
pub struct Fuse {
    boundary: Option<Boundary>,
    count: Arc<AtomicU32>,
}

impl Fuse {
    /// Without a boundary it never goes off.
    pub fn new(boundary: Option<Boundary>) -> Self {
        Self { boundary, count: Arc::default() }
    }

    /// Passes a point; does not return if it is the boundary.
    pub fn pass(&self, of: Of, after: bool) {
        if self.boundary.is_some_and(|b| b.of == of && b.after == after)
            && self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.boundary.map_or(0, |b| b.nth)
        {
            die();
        }
    }
}

/// Dies at once, as by `kill -9`.
pub fn die() -> ! {
    signal(std::process::id(), "KILL");
    // The signal is on its way.
    loop {
        std::thread::park();
    }
}

/// Sends a signal to a program.
pub fn signal(program: u32, signal: &str) {
    let status = std::process::Command::new("kill").args([&format!("-{signal}"), &program.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{signal} {program}");
}

impl<S> Deadly<S> {
    /// Dies at the boundary, if there is one.
    pub fn new(inner: S, fuse: Fuse) -> Self {
        Self { inner, fuse, forgets: None }
    }

    /// Says of every `nth` record that it was written, and does not write it.
    pub fn forgets(mut self, nth: Option<u32>) -> Self {
        self.forgets = nth;
        self
    }

    /// The batch without what is forgotten, and the places of that.
    fn forget(&self, batch: &Batch, nth: u32) -> (Batch, Vec<usize>) {
        let forgotten = |(_, op): &(usize, &Op)| {
            Of::Record.is(op) && (self.fuse.count.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(nth)
        };
        let forgotten: Vec<usize> = batch.ops.iter().enumerate().filter(forgotten).map(|(at, _)| at).collect();
        let mut rest = batch.clone();
        for at in forgotten.iter().rev() {
            rest.ops.remove(*at);
        }
        (rest, forgotten)
    }

    fn pass(&self, batch: &Batch, after: bool) {
        if let Some(boundary) = self.fuse.boundary {
            for _ in batch.ops.iter().filter(|op| boundary.of.is(op)) {
                self.fuse.pass(boundary.of, after);
            }
        }
    }
}

#[async_trait]
impl<S: Storage> Storage for Deadly<S> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        self.inner.transactional()
    }
    fn heartbeat_thread(&self) -> bool {
        self.inner.heartbeat_thread()
    }
    fn announces_everything(&self) -> bool {
        self.inner.announces_everything()
    }
    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        self.inner.enlist(instance).await
    }
    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        self.inner.refence(instance, generation).await
    }
    fn prepare(&self, batch: &Batch) {
        self.inner.prepare(batch);
    }
    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        self.pass(batch, false);
        if let Some(nth) = self.forgets {
            let (rest, forgotten) = self.forget(batch, nth);
            let mut outcomes = self.inner.commit(&rest).await?;
            for at in forgotten {
                outcomes.insert(at, Outcome::Recorded);
            }
            self.pass(batch, true);
            return Ok(outcomes);
        }
        let outcomes = self.inner.commit(batch).await?;
        self.pass(batch, true);
        Ok(outcomes)
    }
    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        self.inner.load(load).await
    }
    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        self.inner.weigh(load).await
    }
    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        self.inner.owned(instance, after, limit).await
    }
    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        self.inner.poll(poll).await
    }
    async fn changed(&self, cursor: &mut u64, at_most: Duration) {
        self.inner.changed(cursor, at_most).await;
    }
    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        self.inner.peers(namespace, me).await
    }
    async fn fence(&self, seen: &Peer) -> Result<bool> {
        self.inner.fence(seen).await
    }
    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        self.inner.release(fenced, limit).await
    }
    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.inner.retire(instance).await
    }
    async fn reinstate(&self) -> Result<usize> {
        self.inner.reinstate().await
    }
    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        self.inner.find(namespace, id, run).await
    }
    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        self.inner.record(run, key).await
    }
    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        self.inner.list(namespace, filter).await
    }
    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        self.inner.count(namespace, filter).await
    }
}
