//! A storage whose answers can be made to go wrong, one call at a time.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Op, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, Result, RunId, Storage, StorageError,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What goes wrong with a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not happen.
    Before,
    /// It happens, and the answer is lost.
    Lost,
    /// The answer is lost, and it happens later: when the engine has gone on, or never.
    Late,
    /// It happens, the answer is lost, and by the time that the engine asks again the instance has been fenced.
    LostAndFenced,
    /// The database refuses it for good.
    Refused,
    /// Another session has locked what it touches.
    Blocked,
    /// Nothing can be written: a right was taken away, say.
    Schema,
    /// Nothing can be relied on.
    Damaged,
}

type Choose = Box<dyn FnMut(&Batch) -> Option<Fault> + Send>;
type ChooseRead = Arc<dyn Fn(&[RunId]) -> Option<StorageError> + Send + Sync>;

/// A storage that asks at each commit what shall go wrong.
#[derive(Clone)]
pub struct Faulty<S> {
    inner: S,
    choose: Arc<Mutex<Choose>>,
    choose_read: ChooseRead,
    /// Commits whose answer was lost and that have not arrived yet.
    late: Arc<Mutex<Vec<Batch>>>,
    /// What became of those that arrived.
    pub arrived: Arc<Mutex<Vec<std::result::Result<Vec<Outcome>, String>>>>,
}

impl<S: Storage> Faulty<S> {
    /// Asks this for each batch.
    pub fn new(inner: S, choose: impl FnMut(&Batch) -> Option<Fault> + Send + 'static) -> Self {
        let choose: Choose = Box::new(choose);
        let choose_read: ChooseRead = Arc::new(|_| None);
        Self { inner, choose: Arc::new(Mutex::new(choose)), choose_read, late: Arc::default(), arrived: Arc::default() }
    }

    /// Asks this for each read of runs.
    pub fn reading(inner: S, choose: impl Fn(&[RunId]) -> Option<StorageError> + Send + Sync + 'static) -> Self {
        Self { choose_read: Arc::new(choose), ..Self::new(inner, |_| None) }
    }

    /// The first batch with an operation like this goes wrong.
    pub fn once(inner: S, fault: Fault, like: impl Fn(&Op) -> bool + Send + 'static) -> Self {
        let mut left = 1;
        Self::new(inner, move |batch| {
            let hit = left > 0 && batch.ops.iter().any(&like);
            left -= i32::from(hit);
            hit.then_some(fault)
        })
    }
}

fn lost() -> StorageError {
    StorageError::unknown("the connection was cut")
}

#[async_trait]
impl<S: Storage> Storage for Faulty<S> {
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
        let fault = (self.choose.lock().unwrap())(batch);
        match fault {
            None => {
                let outcomes = self.inner.commit(batch).await;
                // The originals arrive behind what came after them.
                let late = std::mem::take(&mut *self.late.lock().unwrap());
                for batch in late {
                    let arrived = self.inner.commit(&batch).await.map_err(|error| error.to_string());
                    self.arrived.lock().unwrap().push(arrived);
                }
                outcomes
            }
            Some(Fault::Before) => Err(StorageError::unavailable("no connection")),
            Some(Fault::Lost) => {
                self.inner.commit(batch).await?;
                Err(lost())
            }
            Some(Fault::LostAndFenced) => {
                self.inner.commit(batch).await?;
                loop {
                    let peers = self.inner.peers(&batch.namespace, InstanceId::new()).await?.peers;
                    let me = peers.iter().find(|peer| peer.instance == batch.fence.instance).unwrap();
                    // Unless a heartbeat has come in between.
                    if self.inner.fence(me).await? {
                        return Err(lost());
                    }
                }
            }
            Some(Fault::Late) => {
                self.late.lock().unwrap().push(batch.clone());
                Err(lost())
            }
            Some(Fault::Blocked) => Err(StorageError::blocked("somebody holds the row")),
            Some(Fault::Schema) => Err(StorageError::schema("permission denied")),
            Some(Fault::Damaged) => Err(StorageError::damaged("the file is damaged")),
            Some(Fault::Refused) => Err(StorageError::refused("the database does not like it")),
        }
    }
    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        match (self.choose_read)(&load.ids().collect::<Vec<_>>()) {
            Some(error) => Err(error),
            None => self.inner.load(load).await,
        }
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
