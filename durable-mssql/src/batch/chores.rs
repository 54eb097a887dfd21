//! Chores: what is too much for one transaction.

use async_trait::async_trait;
use durable_core::storage::chores::Chores;
use durable_core::storage::{Result, StorageError};

use super::{UNFINISHED, WAKE};
use crate::names::Schema;
use crate::rows::get;
use crate::session::Client;
use crate::sql::{Commits, Sql};

/// All chores of a schema.
pub(crate) struct All<'c> {
    pub(crate) client: &'c mut Client,
    pub(crate) schema: &'c Schema,
}

#[async_trait]
impl Chores for All<'_> {
    async fn part(&mut self, most: usize, rows: usize) -> Result<bool> {
        let rows = part(self.schema, most, rows).run(self.client, Commits::No).await?.rows();
        let row = rows.first().ok_or_else(|| StorageError::unavailable("no answer"))?;
        Ok(get::<i32>(row, 0)? > 0)
    }

    async fn put_off(&mut self) -> Result<()> {
        put_off(self.schema).run(self.client, Commits::No).await.map(drop)
    }
}

/// The tables in which a run leaves rows, and the column that names it.
const LEFT: [(&str, &str); 4] = [("steps", "run"), ("events", "run"), ("audit", "run"), ("waiters", "waiter")];

/// It waits for no lock, and so in no circle. Whether something is left is seen whether it is locked or not.
pub(crate) fn part(schema: &Schema, most: usize, rows: usize) -> Sql {
    const FREE: &str = "WITH (UPDLOCK, READPAST, ROWLOCK, READCOMMITTEDLOCK)";
    const ANY: &str = "WITH (READUNCOMMITTED)";
    let mut sql = Sql::default();
    let (most, rows) = (sql.count(most), sql.count(rows));
    sql.declare("@chores TABLE (run BINARY(16) NOT NULL PRIMARY KEY, what NVARCHAR(16) NOT NULL)");
    sql.declare("@untold TABLE (target BINARY(16) NOT NULL, waiter BINARY(16) NOT NULL, PRIMARY KEY (target, waiter))");
    sql.declare("@held TABLE (run BINARY(16) NOT NULL PRIMARY KEY)");
    sql.push("DECLARE @did INT = 0, @me BINARY(16) = 0x00000000000000000000000000000000, @now DATETIME2(6) = SYSUTCDATETIME()");
    sql.push("BEGIN TRANSACTION");
    sql.push(format!(
        "INSERT INTO @chores (run, what) SELECT TOP ({most}) c.run, c.what FROM {schema}.chores AS c {FREE}
         WHERE c.due_at <= @now ORDER BY c.due_at"
    ));
    sql.push(format!(
        "INSERT INTO @untold (target, waiter) SELECT TOP ({rows}) w.target, w.waiter FROM {schema}.waiters AS w {FREE}
         WHERE w.told = 0 AND w.target IN (SELECT c.run FROM @chores AS c)"
    ));
    sql.push(format!(
        "INSERT INTO @held (run) SELECT p.run FROM {schema}.processes AS p {FREE}
         WHERE p.run IN (SELECT u.waiter FROM @untold AS u)"
    ));
    sql.push(format!(
        "UPDATE p SET signals = p.signals + 1, {WAKE} FROM {schema}.processes AS p
         WHERE p.run IN (SELECT h.run FROM @held AS h) AND p.status IN {UNFINISHED}"
    ));
    sql.push(format!(
        "UPDATE w SET told = 1 FROM {schema}.waiters AS w JOIN @untold AS u ON u.target = w.target AND u.waiter = w.waiter
         WHERE EXISTS (SELECT 1 FROM @held AS h WHERE h.run = u.waiter)
             OR NOT EXISTS (SELECT 1 FROM {schema}.processes AS p {ANY} WHERE p.run = u.waiter)"
    ));
    sql.push("SET @did = @did + @@ROWCOUNT");
    for (table, run) in LEFT {
        sql.push(format!(
            "DELETE TOP ({rows}) FROM {schema}.{table} {FREE}
             WHERE {run} IN (SELECT c.run FROM @chores AS c WHERE c.what = N'delete')"
        ));
        sql.push("SET @did = @did + @@ROWCOUNT");
    }
    let nothing_left = LEFT
        .map(|(table, run)| format!("NOT EXISTS (SELECT 1 FROM {schema}.{table} AS d {ANY} WHERE d.{run} = c.run)"))
        .join(" AND ");
    sql.push(format!(
        "DELETE c FROM {schema}.chores AS c WHERE c.run IN (SELECT o.run FROM @chores AS o)
             AND NOT EXISTS (SELECT 1 FROM {schema}.waiters AS w {ANY} WHERE w.target = c.run AND w.told = 0)
             AND (c.what = N'wake' OR ({nothing_left}))"
    ));
    sql.push("SET @did = @did + @@ROWCOUNT");
    // The others are next.
    sql.push(format!(
        "UPDATE c SET due_at = SYSUTCDATETIME() FROM {schema}.chores AS c WHERE c.run IN (SELECT o.run FROM @chores AS o)"
    ));
    sql.push("COMMIT TRANSACTION");
    sql.push("SELECT @did");
    sql
}

pub(crate) fn put_off(schema: &Schema) -> Sql {
    let mut sql = Sql::default();
    sql.push(format!(
        "UPDATE c SET due_at = DATEADD(MINUTE, 1, SYSUTCDATETIME()) FROM {schema}.chores AS c WHERE c.run = (
             SELECT TOP (1) o.run FROM {schema}.chores AS o WITH (READPAST, ROWLOCK, READCOMMITTEDLOCK)
             WHERE o.due_at <= SYSUTCDATETIME() ORDER BY o.due_at)"
    ));
    sql
}
