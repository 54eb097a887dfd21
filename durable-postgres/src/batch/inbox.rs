//! The inbox: what transactions of the service's have put there becomes processes and messages, by the statements of a batch.

use async_trait::async_trait;
use durable_core::storage::inbox::{Inbox, Waiting};
use durable_core::storage::{Op, Outcome, Result, Sorted};
use sqlx::Executor;
use sqlx::postgres::{PgConnection, PgRow};
use uuid::Uuid;

use super::{Gate, Of, whole};
use crate::errors::reading;
use crate::names::Schema;
use crate::rows::{boxed, get};
use crate::sql::{Commits, Sql};

/// What waits in a namespace's inbox: all of it, or what is for these ids.
pub(crate) struct Rows<'c> {
    pub(crate) connection: &'c mut PgConnection,
    pub(crate) schema: &'c Schema,
    pub(crate) namespace: &'c str,
    pub(crate) ids: Option<&'c [&'c str]>,
}

#[async_trait]
impl Inbox for Rows<'_> {
    async fn waiting(&mut self, most: usize, except: &[Box<str>]) -> Result<Vec<(i64, Result<Waiting>)>> {
        let rows =
            waiting(self.schema, self.namespace, self.ids, except, most).run(self.connection, Commits::No).await?;
        rows.iter().map(|row| Ok((get(row, 0)?, one(row)))).collect()
    }

    async fn take(&mut self, numbers: &[i64], ops: &[Op]) -> Result<Option<Vec<Outcome>>> {
        self.connection.execute("BEGIN; SET LOCAL lock_timeout = 100").await.map_err(reading)?;
        let written = self.write(numbers, ops).await;
        whole::end(self.connection, written).await
    }

    async fn refuse(&mut self, number: i64, why: &str) -> Result<()> {
        let mut sql = Sql::default();
        let (schema, number, why) = (self.schema, sql.bind(number), sql.bind(why));
        sql.text = format!("UPDATE {schema}.inbox SET refused = {why} WHERE number = {number} AND refused IS NULL");
        sql.run(self.connection, Commits::No).await.map(drop)
    }
}

impl Rows<'_> {
    async fn write(&mut self, numbers: &[i64], ops: &[Op]) -> Result<Option<Vec<Outcome>>> {
        let schema = self.schema;
        let held = held(schema, numbers).run(self.connection, Commits::No).await?;
        if held.len() < numbers.len() {
            return Ok(None);
        }
        let of = Of { schema, instance: Uuid::nil(), generation: 0, namespace: self.namespace, gate: Gate::Open };
        let outcomes = whole::write(self.connection, &of, ops, &Sorted::new(ops)).await?;
        let mut sql = Sql::default();
        let numbers = sql.bind(numbers.to_vec());
        sql.text = format!("DELETE FROM {schema}.inbox WHERE number = ANY ({numbers})");
        sql.run(self.connection, Commits::No).await?;
        Ok(Some(outcomes))
    }
}

pub(crate) fn waiting(schema: &Schema, namespace: &str, ids: Option<&[&str]>, except: &[Box<str>], most: usize) -> Sql {
    let mut sql = Sql::default();
    let namespace = sql.bind(namespace);
    let ids = ids.map(|ids| format!("AND id = ANY ({})", sql.bind(ids.to_vec()))).unwrap_or_default();
    let except = if except.is_empty() {
        String::new()
    } else {
        let except: Vec<&str> = except.iter().map(|id| &**id).collect();
        format!("AND id <> ALL ({})", sql.bind(except))
    };
    let most = sql.bind(i64::try_from(most).unwrap_or(i64::MAX));
    sql.text = format!(
        "SELECT number, what, id, name, token, payload::text, digest, restart FROM {schema}.inbox
         WHERE namespace = {namespace} AND refused IS NULL {ids} {except} ORDER BY number LIMIT {most}"
    );
    sql
}

/// Those that are there still, locked. Who comes at the same time waits.
pub(crate) fn held(schema: &Schema, numbers: &[i64]) -> Sql {
    let mut sql = Sql::default();
    let numbers = sql.bind(numbers.to_vec());
    sql.text = format!("SELECT number FROM {schema}.inbox WHERE number = ANY ({numbers}) ORDER BY number FOR UPDATE");
    sql
}

fn one(row: &PgRow) -> Result<Waiting> {
    let text = |column| get::<&str>(row, column).map(boxed);
    Ok(Waiting::new([text(1)?, text(2)?, text(3)?, text(4)?, text(5)?, text(6)?], get(row, 7)?))
}
