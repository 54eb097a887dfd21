use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Loaded, NewInstance, Outcome, Peer, Peers, Poll, Polled, ProcessRow,
    Record, RecordKey, Result, RunId, Storage, StorageError,
};
use sqlx::postgres::{PgConnection, PgRow};
use std::time::Duration;

use crate::lend::Connections;
use crate::listen::{Hints, concerns_others};
use crate::names::Schema;
use crate::rows::{self, readable, time_text};
use crate::sql::{Commits, Sql};
use crate::{Postgres, batch, heart, read};

/// Behind every clone of a [`Postgres`].
pub(crate) struct Shared {
    pub(crate) schema: Schema,
    pub(crate) connections: Connections,
    /// Session locks exclude others here, so they prove life and death.
    pub(crate) locks: bool,
    pub(crate) hints: Hints,
}

impl Postgres {
    async fn read(&self, sql: Sql) -> Result<Vec<PgRow>> {
        let mut lent = self.0.connections.lend().await?;
        let result = sql.run(&mut lent.connection, Commits::No).await;
        lent.done(result)
    }

    /// Runs one statement, which commits by itself. It is one that may as well run twice, so a lost answer is no worse
    /// than none.
    async fn write(&self, text: impl Fn(&mut Sql, &Schema) -> String) -> Result<Vec<PgRow>> {
        let mut sql = Sql::default();
        sql.text = text(&mut sql, &self.0.schema);
        self.read(sql).await
    }
}

#[async_trait]
impl Storage for Postgres {
    fn name(&self) -> &'static str {
        "postgres"
    }

    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        heart::enlist(&self.0, instance).await
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        // Waits for the lock that an earlier batch holds on the row, if it is still on its way; one that comes later
        // finds the row changed.
        let rows = self.write(|sql, schema| {
            let (instance, generation) = (sql.bind(instance.0), sql.bind(generation));
            format!(
                "UPDATE {schema}.fences SET generation = greatest(generation, {generation})
                 WHERE instance = {instance} AND fenced_at IS NULL RETURNING 1"
            )
        });
        if rows.await?.is_empty() { Err(StorageError::Fenced) } else { Ok(()) }
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        let mut lent = self.0.connections.lend().await?;
        let result = batch::commit(&mut lent.connection, &self.0.schema, batch).await;
        let outcomes = lent.done(result)?;
        if concerns_others(batch, &outcomes) {
            Hints::tell(&self.0);
        }
        Ok(outcomes)
    }

    async fn load(&self, runs: &[RunId], records: bool) -> Result<Vec<Loaded>> {
        if runs.is_empty() {
            return Ok(Vec::new());
        }
        let mut lent = self.0.connections.lend().await?;
        let result = read::load(&mut lent.connection, &self.0.schema, runs, records).await;
        lent.done(result)
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        read::owned(&self.read(read::owned_statement(&self.0.schema, instance, after, limit)).await?)
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        read::polled(&self.read(read::poll_statement(&self.0.schema, poll)).await?)
    }

    async fn changed(&self, cursor: &mut u64, at_most: Duration) {
        Hints::changed(&self.0, cursor, at_most).await;
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        let rows = self.read(heart::peers_statement(&self.0.schema, namespace, me)).await?;
        let Some((now, peers)) = rows.split_first() else {
            return Err(StorageError::schema("the database did not tell its time"));
        };
        let peers: Vec<Peer> = peers.iter().filter_map(|row| readable(heart::peer(row, self.0.locks))).collect();
        self.0.hints.has_company(!peers.is_empty());
        Ok(Peers { now: rows::time(now, 1)?, peers })
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        // Waits for the batch that holds the fence, and looks at the heartbeat after that.
        let rows = self.write(|sql, schema| {
            let (instance, heartbeat) = (sql.bind(seen.instance.0), sql.bind(time_text(seen.heartbeat_at)));
            format!(
                "WITH fence AS MATERIALIZED (SELECT instance, fenced_at FROM {schema}.fences WHERE instance = {instance}
                     FOR NO KEY UPDATE),
                 silent AS MATERIALIZED (SELECT instance FROM {schema}.instances WHERE instance = {instance}
                     AND heartbeat_at = {heartbeat}::timestamptz AND EXISTS (SELECT 1 FROM fence) FOR NO KEY UPDATE)
                 UPDATE {schema}.fences f SET fenced_at = coalesce(f.fenced_at, now()) FROM fence
                 WHERE f.instance = fence.instance AND (fence.fenced_at IS NOT NULL OR EXISTS (SELECT 1 FROM silent))
                 RETURNING 1"
            )
        });
        Ok(!rows.await?.is_empty())
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        loop {
            let rows = self
                .write(|sql, schema| {
                    let (instance, limit) = (sql.bind(fenced.0), sql.bind(read::limit_arg(limit)));
                    format!(
                        "WITH theirs AS MATERIALIZED (SELECT run FROM {schema}.processes WHERE owner = {instance}
                             AND EXISTS (SELECT 1 FROM {schema}.fences WHERE instance = {instance}
                                 AND fenced_at IS NOT NULL)
                             ORDER BY run LIMIT {limit} FOR NO KEY UPDATE)
                         UPDATE {schema}.processes p SET owner = NULL, status = 'waiting', wake_at = now(),
                             signalled = false, status_at = now()
                         FROM theirs WHERE p.run = theirs.run RETURNING 1"
                    )
                })
                .await?;
            if !rows.is_empty() {
                Hints::tell(&self.0);
                return Ok(rows.len());
            }
            // Another instance may have handed back what this one was about to, and there may be more.
            if self.forget(fenced).await? {
                return Ok(0);
            }
        }
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.write(|sql, schema| {
            let instance = sql.bind(instance.0);
            format!("UPDATE {schema}.fences SET fenced_at = coalesce(fenced_at, now()) WHERE instance = {instance}")
        })
        .await?;
        while self.release(instance, 10_000).await? > 0 {}
        Ok(())
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        let rows = self.read(read::find_statement(&self.0.schema, namespace, id, run)).await?;
        rows.first().map(rows::process).transpose()
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        let rows = self.read(read::record_statement(&self.0.schema, run, key)).await?;
        rows.first().map(|row| rows::record(row).map(|(_, record)| record)).transpose()
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        let rows = self.read(read::list_statement(&self.0.schema, namespace, filter)).await?;
        Ok(rows.iter().filter_map(|row| readable(rows::process(row))).collect())
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        Ok(read::counted(&self.read(read::count_statement(&self.0.schema, namespace, filter)).await?))
    }
}

impl Postgres {
    /// Removes what is left of a fenced instance that owns nothing any more. False if it owns something.
    async fn forget(&self, instance: InstanceId) -> Result<bool> {
        let rows = self.write(|sql, schema| {
            let instance = sql.bind(instance.0);
            format!(
                "WITH owns AS MATERIALIZED (SELECT 1 FROM {schema}.processes WHERE owner = {instance} LIMIT 1),
                 gone AS (DELETE FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NOT NULL
                     AND NOT EXISTS (SELECT 1 FROM owns) RETURNING instance),
                 removed AS (DELETE FROM {schema}.instances i USING gone WHERE i.instance = gone.instance RETURNING 1)
                 SELECT EXISTS (SELECT 1 FROM owns)
                     AND EXISTS (SELECT 1 FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NOT NULL)"
            )
        });
        let owns: bool = rows.await?.first().map(|row| rows::get(row, 0)).transpose()?.unwrap_or(false);
        Ok(!owns)
    }
}

/// A connection's use, for statements that are made in other modules.
pub(crate) async fn run(connection: &mut PgConnection, sql: Sql) -> Result<Vec<PgRow>> {
    sql.run(connection, Commits::No).await
}
