use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::housekeeping::{self, Housekeeping, Todo};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, Result, RunId, Sorted, Storage, StorageError,
};
use durable_core::storage::{chores, inbox};
use sqlx::postgres::PgRow;
use std::time::Duration;

use crate::lend::{Connections, unavailable, within};
use crate::listen::{Hints, concerns_others};
use crate::names::Schema;
use crate::rows::{self, readable};
use crate::sql::Sql;
use crate::{Postgres, batch, fence, heart, read};

/// How many parts of the inbox are moved on at most before the call goes on.
const SWEPT: usize = 5;

/// Behind every clone of a [`Postgres`].
pub(crate) struct Shared {
    pub(crate) schema: Schema,
    /// For batches.
    pub(crate) writing: Connections,
    /// For the engine's looks at what there is to do.
    pub(crate) connections: Connections,
    /// For callers' questions, which may be many, and slow.
    pub(crate) asking: Connections,
    /// For the service's own transactions: apart, so that they never wait for the engine, nor it for them.
    pub(crate) transactions: Connections,
    /// Session locks exclude others here, so they prove life and death.
    pub(crate) locks: bool,
    pub(crate) hints: Hints,
}

impl Postgres {
    /// Runs one statement for the engine.
    pub(crate) async fn run(&self, sql: Sql) -> Result<Vec<PgRow>> {
        self.0.connections.run(sql).await
    }

    /// Runs one statement for a caller.
    async fn ask(&self, sql: Sql) -> Result<Vec<PgRow>> {
        self.0.asking.run(sql).await
    }

    /// Moves on what waits in the inbox, all of it or the rows for `ids`, in at most `parts` parts; and says whether
    /// that was all.
    async fn sweep(
        &self,
        connections: &Connections,
        namespace: &str,
        ids: Option<&[&str]>,
        parts: usize,
    ) -> Result<bool> {
        for _ in 0..parts {
            let mut lent = connections.lend().await?;
            let mut rows = batch::Rows { connection: &mut lent.connection, schema: &self.0.schema, namespace, ids };
            let moved = within(connections.bounds().answers(), unavailable, inbox::move_on(&mut rows)).await;
            let moved = moved.map_err(|error| match error {
                StorageError::Unknown(why) => StorageError::Unavailable(why),
                error => error,
            });
            if lent.done(moved)? == 0 {
                return Ok(true);
            }
            Hints::tell(&self.0);
        }
        Ok(false)
    }
}

#[async_trait]
impl Housekeeping for Postgres {
    async fn look(&self, poll: &Poll) -> Result<(Polled, Todo)> {
        read::polled(&self.run(read::poll_statement(&self.0.schema, poll)).await?)
    }

    async fn move_on(&self, namespace: &str) -> Result<bool> {
        self.sweep(&self.0.connections, namespace, None, SWEPT).await.map(|all| !all)
    }

    async fn work(&self) -> Result<bool> {
        let mut lent = self.0.connections.lend().await?;
        let mut chores = batch::All { connection: &mut lent.connection, schema: &self.0.schema };
        let more = within(self.0.connections.bounds().answers(), unavailable, chores::work(&mut chores)).await;
        let more = lent.done(more)?;
        Hints::tell(&self.0);
        Ok(more)
    }
}

#[async_trait]
impl Storage for Postgres {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        Some(self)
    }

    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        heart::enlist(&self.0, instance).await
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        let rows = self.0.writing.run(fence::refence(&self.0.schema, instance, generation)).await?;
        if rows.is_empty() { Err(StorageError::Fenced) } else { Ok(()) }
    }

    fn prepare(&self, batch: &Batch) {
        batch::prepare(&self.0.schema, batch);
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        let commit = async |swept: bool| {
            let mut lent = self.0.writing.lend().await?;
            let bounds = self.0.writing.bounds();
            let result = batch::commit(&mut lent.connection, &self.0.schema, batch, swept, bounds).await;
            lent.done(result)
        };
        let outcomes = match commit(false).await {
            // Or something waits in the inbox, which goes first. What is wrong there is not the batch's fault.
            Err(StorageError::Fenced) if Sorted::new(&batch.ops).names_an_id() => {
                let ids = Sorted::new(&batch.ops).ids();
                inbox::before_a_batch(self.sweep(&self.0.writing, &batch.namespace, Some(&ids), SWEPT).await)?;
                commit(true).await?
            }
            result => result?,
        };
        if concerns_others(batch, &outcomes) {
            Hints::tell(&self.0);
        }
        Ok(outcomes)
    }

    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        let mut lent = self.0.connections.lend().await?;
        let read = read::load(&mut lent.connection, &self.0.schema, load);
        match within(self.0.connections.bounds().answers(), unavailable, read).await {
            // To be closed: the rest would still have to be read.
            Ok(None) => Ok(None),
            result => lent.done(result),
        }
    }

    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        read::weights(&self.run(read::weigh_statement(&self.0.schema, load)).await?)
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        read::owned(&self.run(read::owned_statement(&self.0.schema, instance, after, limit)).await?)
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        housekeeping::poll(self, poll).await
    }

    async fn changed(&self, cursor: &mut u64, at_most: Duration) {
        Hints::changed(&self.0, cursor, at_most).await;
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        let rows = self.run(heart::peers_statement(&self.0.schema, namespace, me)).await?;
        let Some((now, peers)) = rows.split_first() else {
            return Err(StorageError::schema("the database did not tell its time"));
        };
        let peers: Vec<Peer> = peers.iter().filter_map(|row| readable(heart::peer(row, self.0.locks))).collect();
        self.0.hints.has_company(!peers.is_empty());
        Ok(Peers { now: rows::time(now, 1)?, peers })
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        Ok(!self.run(fence::fence(&self.0.schema, seen)).await?.is_empty())
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        loop {
            let released = self.run(fence::release(&self.0.schema, fenced, limit)).await?.len();
            if released > 0 {
                Hints::tell(&self.0);
                return Ok(released);
            }
            // Another instance may have handed back what this one was about to, and there may be more.
            let owns = self.run(fence::forget(&self.0.schema, fenced)).await?;
            if !owns.first().map(|row| rows::get(row, 0)).transpose()?.unwrap_or(false) {
                return Ok(0);
            }
        }
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.run(fence::end(&self.0.schema, instance)).await?;
        while self.release(instance, 10_000).await? > 0 {}
        Ok(())
    }

    async fn reinstate(&self) -> Result<usize> {
        let strangers = self.run(fence::strangers(&self.0.schema)).await?;
        for row in &strangers {
            self.run(fence::reinstate(&self.0.schema, InstanceId(rows::get(row, 0)?))).await?;
        }
        Ok(strangers.len())
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        let find = || self.ask(read::find_statement(&self.0.schema, namespace, id, run));
        let mut rows = find().await?;
        if rows.is_empty() {
            // It may wait in the inbox, or may have left it since.
            while !self.sweep(&self.0.asking, namespace, Some(&[id]), SWEPT).await? {}
            rows = find().await?;
        }
        rows.first().map(rows::process).transpose()
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        read::recorded(&self.ask(read::record_statement(&self.0.schema, run, key)).await?)
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        let rows = self.ask(read::list_statement(&self.0.schema, namespace, filter)).await?;
        Ok(rows.iter().filter_map(|row| readable(rows::process(row))).collect())
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        Ok(read::counted(&self.ask(read::count_statement(&self.0.schema, namespace, filter)).await?))
    }
}
