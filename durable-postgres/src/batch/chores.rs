//! Chores: what is too much for one transaction.

use async_trait::async_trait;
use durable_core::storage::Result;
use durable_core::storage::chores::Chores;
use sqlx::Executor;
use sqlx::postgres::{PgConnection, PgRow};
use uuid::Uuid;

use super::parts::wake;
use super::{UNFINISHED, whole};
use crate::errors::reading;
use crate::names::Schema;
use crate::rows::get;
use crate::sql::{Commits, Sql};

/// All chores of a schema.
pub(crate) struct All<'c> {
    pub(crate) connection: &'c mut PgConnection,
    pub(crate) schema: &'c Schema,
}

#[async_trait]
impl Chores for All<'_> {
    async fn part(&mut self, most: usize, rows: usize) -> Result<bool> {
        self.connection.execute("BEGIN").await.map_err(reading)?;
        let did = self.some(most, rows).await;
        whole::end(self.connection, did).await
    }

    async fn put_off(&mut self) -> Result<()> {
        put_off(self.schema).run(self.connection, Commits::No).await.map(drop)
    }
}

impl All<'_> {
    async fn some(&mut self, most: usize, rows: usize) -> Result<bool> {
        let chores = taken(self.schema, most).run(self.connection, Commits::No).await?;
        let run = |row: &PgRow| get::<Uuid>(row, 0);
        let runs: Vec<Uuid> = chores.iter().map(run).collect::<Result<_>>()?;
        if runs.is_empty() {
            return Ok(false);
        }
        let deletes = |row: &&PgRow| get::<&str>(row, 1).is_ok_and(|what| what == "delete");
        let deleted: Vec<Uuid> = chores.iter().filter(deletes).map(run).collect::<Result<_>>()?;
        let mut statements = vec![told(self.schema, &runs, rows)];
        if !deleted.is_empty() {
            statements.extend(cleared(self.schema, &deleted, rows));
        }
        statements.push(done(self.schema, &runs));
        let mut did = 0;
        for sql in statements {
            did += sql.run(self.connection, Commits::No).await?.len();
        }
        // The others are next.
        turned(self.schema, &runs).run(self.connection, Commits::No).await?;
        Ok(did > 0)
    }
}

/// Those that are due, without those whose row another session has locked.
fn taken(schema: &Schema, most: usize) -> Sql {
    let mut sql = Sql::default();
    let most = sql.bind(i64::try_from(most).unwrap_or(i64::MAX));
    sql.text = format!(
        "SELECT run, what FROM {schema}.chores WHERE due_at <= now() ORDER BY due_at LIMIT {most}
         FOR UPDATE SKIP LOCKED"
    );
    sql
}

/// Signals those that await the runs and have not been told. It waits for no lock, and so in no circle.
fn told(schema: &Schema, runs: &[Uuid], rows: usize) -> Sql {
    let mut sql = Sql::default();
    let (runs, no_instance) = (sql.bind(runs.to_vec()), sql.bind(Uuid::nil()));
    let (rows, wake) = (sql.bind(i64::try_from(rows).unwrap_or(i64::MAX)), wake(&no_instance));
    sql.text = format!(
        "WITH untold AS MATERIALIZED (SELECT w.target, w.waiter FROM {schema}.waiters w
             WHERE w.target = ANY ({runs}) AND NOT w.told LIMIT {rows} FOR UPDATE SKIP LOCKED),
         held AS MATERIALIZED (SELECT p.run, p.status FROM {schema}.processes p
             WHERE p.run = ANY (ARRAY (SELECT waiter FROM untold)) FOR NO KEY UPDATE SKIP LOCKED),
         signalled AS (UPDATE {schema}.processes p SET signals = p.signals + 1, {wake} FROM held
             WHERE p.run = held.run AND held.status IN {UNFINISHED})
         UPDATE {schema}.waiters w SET told = true FROM untold u
         WHERE w.target = u.target AND w.waiter = u.waiter AND (u.waiter = ANY (ARRAY (SELECT run FROM held))
             OR (SELECT p.run FROM {schema}.processes p WHERE p.run = u.waiter) IS NULL)
         RETURNING 1"
    );
    sql
}

/// The tables in which a run leaves rows, and the column that names it.
const LEFT: [(&str, &str); 4] = [("steps", "run"), ("events", "run"), ("audit", "run"), ("waiters", "waiter")];

/// Clears away what the runs have left.
fn cleared(schema: &Schema, runs: &[Uuid], rows: usize) -> impl Iterator<Item = Sql> {
    LEFT.into_iter().map(move |(table, column)| {
        let mut sql = Sql::default();
        let (runs, rows) = (sql.bind(runs.to_vec()), sql.bind(i64::try_from(rows).unwrap_or(i64::MAX)));
        sql.text = format!(
            "DELETE FROM {schema}.{table} WHERE ctid = ANY (ARRAY (SELECT ctid FROM {schema}.{table}
                 WHERE {column} = ANY ({runs}) LIMIT {rows} FOR UPDATE SKIP LOCKED)) RETURNING 1"
        );
        sql
    })
}

/// Removes those of the chores of which nothing is left.
fn done(schema: &Schema, runs: &[Uuid]) -> Sql {
    let mut sql = Sql::default();
    let runs = sql.bind(runs.to_vec());
    let nothing_left = LEFT
        .map(|(table, column)| format!("(SELECT 1 FROM {schema}.{table} WHERE {column} = c.run LIMIT 1) IS NULL"))
        .join(" AND ");
    sql.text = format!(
        "DELETE FROM {schema}.chores c WHERE c.run = ANY ({runs})
             AND (SELECT 1 FROM {schema}.waiters WHERE target = c.run AND NOT told LIMIT 1) IS NULL
             AND (c.what = 'wake' OR {nothing_left})
         RETURNING 1"
    );
    sql
}

fn turned(schema: &Schema, runs: &[Uuid]) -> Sql {
    let mut sql = Sql::default();
    let runs = sql.bind(runs.to_vec());
    sql.text = format!("UPDATE {schema}.chores SET due_at = clock_timestamp() WHERE run = ANY ({runs})");
    sql
}

fn put_off(schema: &Schema) -> Sql {
    let mut sql = Sql::default();
    sql.text = format!(
        "UPDATE {schema}.chores SET due_at = clock_timestamp() + interval '1 minute' WHERE run = (
             SELECT run FROM {schema}.chores WHERE due_at <= now() ORDER BY due_at LIMIT 1
             FOR UPDATE SKIP LOCKED)"
    );
    sql
}

/// Every statement of it.
#[cfg(test)]
pub(crate) fn all(schema: &Schema) -> Vec<Sql> {
    let runs = [Uuid::now_v7()];
    let mut statements =
        vec![taken(schema, 10), told(schema, &runs, 10), done(schema, &runs), turned(schema, &runs), put_off(schema)];
    statements.extend(cleared(schema, &runs, 10));
    statements
}
