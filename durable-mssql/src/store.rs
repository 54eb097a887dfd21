use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::housekeeping::{self, Housekeeping, Todo};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, Result, RunId, Sorted, Storage, StorageError,
};
use durable_core::storage::{chores, inbox};
use std::time::Duration;

use crate::batch::Committed;
use crate::fence::BUSY;
use crate::names::Schema;
use crate::rows::{self, get, readable};
use crate::session::{Bounds, Sessions};
use crate::sql::{Parts, Sql};
use crate::{Mssql, batch, fence, heart, read};

/// How many parts of the inbox are moved on at most before the call goes on.
const SWEPT: usize = 5;

/// Behind every clone of a [`Mssql`].
pub(crate) struct Shared {
    pub(crate) schema: Schema,
    /// For batches.
    pub(crate) writing: Sessions,
    /// For the engine's looks at what there is to do.
    pub(crate) sessions: Sessions,
    /// For callers' questions, which may be many, and slow.
    pub(crate) asking: Sessions,
    /// For the service's own transactions: apart, so that they never wait for the engine, nor it for them.
    pub(crate) transactions: Sessions,
    /// Session locks exclude others here, so they prove life and death.
    pub(crate) locks: bool,
    pub(crate) bounds: Bounds,
}

impl Mssql {
    /// Runs a script for the engine.
    pub(crate) async fn run(&self, sql: Sql) -> Result<Parts> {
        self.0.sessions.run(sql).await
    }

    /// Runs a script for a caller.
    async fn ask(&self, sql: Sql) -> Result<Parts> {
        self.0.asking.run(sql).await
    }

    /// One that does something to an instance under its lock: how many rows it has changed, or found.
    async fn alone(&self, sessions: &Sessions, sql: Sql) -> Result<usize> {
        let rows = sessions.run(sql).await?.rows();
        let row = rows.first().ok_or_else(|| StorageError::unavailable("no answer"))?;
        if get::<i32>(row, 0)? == BUSY {
            return Err(StorageError::unavailable("the instance's lock did not come free in time"));
        }
        usize::try_from(get::<i32>(row, 1)?).map_err(StorageError::schema)
    }

    /// Moves on what waits in the inbox, all of it or the rows for `ids`, in at most `parts` parts; and says whether
    /// that was all.
    async fn sweep(&self, sessions: &Sessions, namespace: &str, ids: Option<&[&str]>, parts: usize) -> Result<bool> {
        for _ in 0..parts {
            let mut lent = sessions.lend().await?;
            let mut rows = batch::Rows { client: &mut lent, schema: &self.0.schema, namespace, ids };
            let moved = inbox::move_on(&mut rows).await.map_err(|error| match error {
                StorageError::Unknown(why) => StorageError::Unavailable(why),
                error => error,
            });
            if lent.done(moved)? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn commit_one(&self, batch: &Batch, swept: bool) -> Result<Committed> {
        let mut lent = self.0.writing.lend().await?;
        let result = batch::commit(&mut lent, &self.0.schema, batch, swept).await;
        // One that was given another patience keeps it.
        if batch.patience.is_some() { result } else { lent.done(result) }
    }
}

#[async_trait]
impl Housekeeping for Mssql {
    async fn look(&self, poll: &Poll) -> Result<(Polled, Todo)> {
        read::polled(&self.run(read::poll_script(&self.0.schema, poll)).await?)
    }

    async fn move_on(&self, namespace: &str) -> Result<bool> {
        self.sweep(&self.0.sessions, namespace, None, SWEPT).await.map(|all| !all)
    }

    async fn work(&self) -> Result<bool> {
        let mut lent = self.0.sessions.lend().await?;
        let more = chores::work(&mut batch::All { client: &mut lent, schema: &self.0.schema }).await;
        lent.done(more)
    }
}

#[async_trait]
impl Storage for Mssql {
    fn name(&self) -> &'static str {
        "mssql"
    }

    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        Some(self)
    }

    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        heart::enlist(&self.0, instance).await
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        match self.alone(&self.0.writing, fence::refence(&self.0.schema, instance, generation)).await? {
            0 => Err(StorageError::Fenced),
            _ => Ok(()),
        }
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        if let Committed::Done(outcomes) = self.commit_one(batch, false).await? {
            return Ok(outcomes);
        }
        let ids = Sorted::new(&batch.ops).ids();
        inbox::before_a_batch(self.sweep(&self.0.writing, &batch.namespace, Some(&ids), SWEPT).await)?;
        match self.commit_one(batch, true).await? {
            Committed::Done(outcomes) => Ok(outcomes),
            Committed::Inbox => Err(StorageError::unavailable("the inbox does not empty")),
        }
    }

    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        let mut lent = self.0.sessions.lend().await?;
        match read::load(&mut lent, &self.0.schema, load).await {
            // To be closed: the rest would still have to be read.
            Ok(None) => Ok(None),
            result => lent.done(result),
        }
    }

    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        read::weights(&self.run(read::weigh_script(&self.0.schema, load)).await?.rows())
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        read::owned(&self.run(read::owned_script(&self.0.schema, instance, after, limit)).await?.rows())
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        housekeeping::poll(self, poll).await
    }

    /// There is nothing to hear: the caller's looks, which come more often while there is work, are spread a little, so
    /// that instances that were started together do not look together.
    async fn changed(&self, _: &mut u64, at_most: Duration) {
        let spread = uuid::Uuid::now_v7().as_u128() % 256;
        let part = at_most / 1024 * u32::try_from(spread).unwrap_or(0);
        tokio::time::sleep(at_most.saturating_sub(part)).await;
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        let parts = self.run(heart::peers(&self.0.schema, namespace, me)).await?;
        let [now, peers] = &parts[..] else { return Err(StorageError::schema("a look at the others has no answer")) };
        let now = now.first().ok_or_else(|| StorageError::schema("the database did not tell its time"))?;
        let peers = peers.iter().filter_map(|row| readable(heart::peer(row, self.0.locks))).collect();
        Ok(Peers { now: rows::time(now, 0)?, peers })
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        Ok(self.alone(&self.0.sessions, fence::fence(&self.0.schema, seen)).await? > 0)
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        loop {
            let released = self.alone(&self.0.sessions, fence::release(&self.0.schema, fenced, limit)).await?;
            // Another instance may have handed back what this one was about to, and there may be more.
            if released > 0 || self.alone(&self.0.sessions, fence::forget(&self.0.schema, fenced)).await? == 0 {
                return Ok(released);
            }
        }
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.alone(&self.0.sessions, fence::end(&self.0.schema, instance)).await?;
        while self.release(instance, 10_000).await? > 0 {}
        Ok(())
    }

    async fn reinstate(&self) -> Result<usize> {
        let strangers = self.run(fence::strangers(&self.0.schema)).await?.rows();
        for row in &strangers {
            if let Some(owner) = rows::maybe_id(row, 0)? {
                self.alone(&self.0.sessions, fence::reinstate(&self.0.schema, InstanceId(owner))).await?;
            }
        }
        Ok(strangers.len())
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        let find = async || {
            Ok::<_, StorageError>(self.ask(read::find_script(&self.0.schema, namespace, id, run)).await?.rows())
        };
        let mut rows = find().await?;
        if rows.is_empty() {
            // It may wait in the inbox, or may have left it since.
            while !self.sweep(&self.0.asking, namespace, Some(&[id]), SWEPT).await? {}
            rows = find().await?;
        }
        rows.first().map(rows::process).transpose()
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        read::recorded(&self.ask(read::record_script(&self.0.schema, run, key)).await?.rows())
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        let rows = self.ask(read::list_script(&self.0.schema, namespace, filter)).await?.rows();
        Ok(rows.iter().filter_map(|row| readable(rows::process(row))).collect())
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        Ok(read::counted(&self.ask(read::count_script(&self.0.schema, namespace, filter)).await?.rows()))
    }
}
