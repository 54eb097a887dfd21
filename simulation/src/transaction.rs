//! Transactional steps: the service's accounts stand in the same database as the records.

use async_trait::async_trait;
use durable_core::storage::{
    Batch, Committed, Ending, Fence, InstanceId, Op, Open, Outcome, Record, RecordKey, RecordOp, RecordState, Result,
    RolledBack, RunId, Slot, Storage, StorageError, Transactional, Tx,
};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

use crate::link::Link;
use crate::tally::Place;
use crate::world::{World, at_once};

/// What a transaction is to write.
#[derive(Debug, Default)]
pub struct Writes {
    /// How much is added to the account that belongs to the step.
    pub amount: u64,
}

struct OpenTransaction {
    link: Link,
    slot: Slot<Writes>,
}

#[async_trait]
impl Transactional for Link {
    type Tx = Tx<Writes>;

    async fn begin(&self, _: Duration) -> Result<Open<Tx<Writes>>> {
        self.read(&[Place::BeforeCommit], |_| Ok(())).await?;
        let (tx, slot) = Tx::new(Writes::default());
        Ok(Open { tx, ending: Box::new(OpenTransaction { link: self.clone(), slot }) })
    }

    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        while self.world.inner().commits.get(&run).is_some_and(|under_way| *under_way > 0) {
            sleep(Duration::from_millis(20)).await;
        }
        self.read(&[Place::AfterCommit], |world| at_once(world.memory.record(run, key))).await
    }
}

/// A commit that is on its way, until it has happened or is lost.
struct UnderWay(Arc<World>, RunId);

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(under_way) = self.0.inner().commits.get_mut(&self.1) {
            *under_way -= 1;
        }
    }
}

#[async_trait]
impl Ending for OpenTransaction {
    async fn commit(self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        let Some(writes) = self.slot.take() else { return Ok(Committed::Escaped) };
        let (record, link) = (record.clone(), self.link.clone());
        let make = move || {
            *link.world.inner().commits.entry(record.run).or_default() += 1;
            let under_way = UnderWay(link.world.clone(), record.run);
            move |world: &Arc<World>| {
                let result = commit(world, link.host, instance, &record, &writes);
                drop(under_way);
                result
            }
        };
        self.link.send((&[Place::BeforeCommit], &[Place::AfterCommit]), make).await
    }

    async fn rollback(self: Box<Self>) -> Result<RolledBack> {
        self.link.read(&[Place::BeforeCommit], |_| Ok(RolledBack::Open)).await
    }

    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool> {
        error.downcast_ref::<StorageError>().map(StorageError::is_transient)
    }
}

/// Writes the record and the accounts as one, if the instance may.
fn commit(world: &World, host: usize, instance: InstanceId, record: &RecordOp, writes: &Writes) -> Result<Committed> {
    let id = world.inner().ledger.id(record.run).to_owned();
    if let Some(stands) = at_once(world.memory.record(record.run, &record.key))?
        && stands.state != RecordState::Pending
    {
        return Ok(Committed::Exists);
    }
    let row = at_once(world.memory.find("default", &id, Some(record.run)))?;
    if !record.shielded && row.is_some_and(|row| row.cancelled_at.is_some()) {
        return Ok(Committed::Cancelled);
    }
    // Not the writer's: any generation of a living instance.
    let fence = Fence { instance, generation: world.inner().ledger.generation(instance) };
    let ops = vec![Op::Record(record.clone())];
    let batch = Batch::new(fence, "default", ops);
    match &world.commit(host, &batch)?[..] {
        [Outcome::Recorded] => {
            let place = (record.run, record.key.clone());
            *world.inner().accounts.entry(place).or_default() += writes.amount;
            Ok(Committed::Recorded)
        }
        _ => Ok(Committed::Lost),
    }
}
