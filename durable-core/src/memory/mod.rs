//! A storage in memory, for the tests of services: the same semantics as the databases', nothing to set up, and the
//! runtime's clock, so that under `tokio::time::pause` a process that waits a year takes no time at all.
//!
//! ```
//! # use durable_core::*;
//! # use durable_core::memory::Memory;
//! # use std::time::Duration;
//! const REMIND: Definition<(), ()> = Definition::new("remind");
//!
//! # async fn test() {
//! tokio::time::pause();
//! let host = Host::builder(Memory::new())
//!     .register(REMIND, async |proc: Process, ()| {
//!         proc.delay("a year", Duration::from_secs(365 * 24 * 3600)).await?;
//!         Ok::<_, Failure>(())
//!     })
//!     .start()
//!     .await
//!     .unwrap();
//! host.spawn(REMIND, "r-1", &()).await.unwrap().output().await.unwrap();
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
//! ```

mod db;

use async_trait::async_trait;
use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, Result, RunId, Storage, StorageError, Wanted,
};
use db::Db;

/// A storage in memory. Clones are the same storage, for several hosts; what it holds is gone with the last one.
#[derive(Clone)]
pub struct Memory(Arc<Shared>);

struct Shared {
    db: Mutex<Db>,
    /// Counts writes, births and deaths.
    version: watch::Sender<u64>,
    /// What time it was when.
    clock: Mutex<(DateTime<Utc>, Instant)>,
}

impl Memory {
    /// An empty one.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self::starting_at(Utc::now())
    }

    /// An empty one, by whose clock it is this time now: for what happens at the end of a year, say.
    pub fn starting_at(now: DateTime<Utc>) -> Self {
        let clock = Mutex::new((now, Instant::now()));
        Self(Arc::new(Shared { db: Mutex::default(), version: watch::Sender::new(1), clock }))
    }

    fn db(&self) -> MutexGuard<'_, Db> {
        self.0.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, (DateTime<Utc>, Instant)> {
        self.0.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its clock jumps, as a server's does that is set.
    pub fn jump(&self, by: TimeDelta) {
        let mut clock = self.clock();
        clock.0 = clock.0.checked_add_signed(by).unwrap_or(clock.0);
    }

    fn now(&self) -> DateTime<Utc> {
        let (at, instant) = *self.clock();
        (at + TimeDelta::from_std(instant.elapsed()).unwrap_or(TimeDelta::MAX)).trunc_subsecs(3)
    }

    fn wrote(&self) {
        self.0.version.send_modify(|version| *version += 1);
    }
}

#[async_trait]
impl Storage for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn heartbeat_thread(&self) -> bool {
        false
    }

    fn announces_everything(&self) -> bool {
        true
    }

    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        let now = self.now();
        let alive = self.db().enlist(instance, now);
        self.wrote();
        Ok((Box::new(MemoryHeart { memory: self.clone(), instance: instance.id, alive: Some(alive) }), now))
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        self.db().refence(instance, generation)
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        let outcomes = self.db().commit(batch, self.now())?;
        self.wrote();
        // Like a database's answer it comes later than the call: whoever is ready goes first.
        tokio::task::yield_now().await;
        Ok(outcomes)
    }

    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        let db = self.db();
        let states: Vec<_> = load.runs.iter().map(|wanted| (wanted.run, db.load(*wanted, load.records))).collect();
        let weight: usize = states.iter().filter_map(|(_, state)| Some(state.as_ref()?.weight())).sum();
        let loaded = |(run, state)| Loaded { run, state: Ok(state) };
        Ok((weight <= load.most).then(|| states.into_iter().map(loaded).collect()))
    }

    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        let db = self.db();
        let weight = |wanted: &Wanted| Some((wanted.run, db.load(*wanted, load.records)?.weight()));
        Ok(load.runs.iter().filter_map(weight).collect())
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        Ok(self.db().owned(instance, after, limit))
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        Ok(self.db().poll(poll, self.now()))
    }

    async fn changed(&self, cursor: &mut u64, at_most: Duration) {
        let mut versions = self.0.version.subscribe();
        let seen = *cursor;
        if let Ok(Ok(version)) = tokio::time::timeout(at_most, versions.wait_for(|version| *version != seen)).await {
            *cursor = *version;
        }
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        Ok(Peers { now: self.now(), peers: self.db().peers(namespace, me) })
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        let fenced = self.db().fence(seen);
        self.wrote();
        Ok(fenced)
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        let released = self.db().release(fenced, limit, self.now());
        self.wrote();
        Ok(released)
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.db().retire(instance, self.now());
        self.wrote();
        Ok(())
    }

    /// Nobody else can delete anything here.
    async fn reinstate(&self) -> Result<usize> {
        Ok(0)
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        Ok(self.db().find(namespace, id, run))
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        Ok(self.db().record(run, key))
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        Ok(self.db().list(namespace, filter))
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        Ok(self.db().count(namespace, filter))
    }
}

struct MemoryHeart {
    memory: Memory,
    instance: InstanceId,
    /// The proof of life: dropped with the heart.
    alive: Option<Arc<()>>,
}

impl Drop for MemoryHeart {
    fn drop(&mut self) {
        self.alive = None;
        self.memory.wrote();
    }
}

#[async_trait]
impl Heart for MemoryHeart {
    async fn beat(&mut self) -> Result<DateTime<Utc>> {
        let now = self.memory.now();
        if self.memory.db().beat(self.instance, now) { Ok(now) } else { Err(StorageError::Fenced) }
    }
}
