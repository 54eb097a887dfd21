//! The inbox: what transactions of the service's have put there becomes processes and messages, by the script of a batch.

use async_trait::async_trait;
use durable_core::storage::inbox::{Inbox, Waiting};
use durable_core::storage::{Op, Outcome, Result, Sorted};
use tiberius::Row;
use uuid::Uuid;

use super::{Committed, Gate, INBOX, Of, run};
use crate::fence;
use crate::json::{Column, Table};
use crate::names::Schema;
use crate::rows::{get, text};
use crate::session::Client;
use crate::sql::{Commits, Sql};

/// The lock of a namespace's inbox: alone for whoever moves something on, shared for whoever must know that nobody does.
pub(super) fn lock(of: &Of<'_>) -> String {
    of.schema.lock(format_args!("inbox/{}", of.namespace))
}

/// Takes these out, alone; [`INBOX`] if another has been faster.
pub(super) fn take(sql: &mut Sql, of: &Of<'_>, numbers: &[i64]) {
    let lock = sql.text(lock(of));
    sql.push(fence::take(&lock, "Exclusive"));
    let mut table = Table::new(&[("number", Column::Number)]);
    numbers.iter().for_each(|number| table.row([(*number).into()]));
    let (j, count) = (table.named(sql, "j"), sql.count(numbers.len()));
    sql.push(format!("IF @verdict = 0 DELETE i FROM {of}.inbox AS i JOIN {j} ON i.number = j.number"));
    sql.push(format!("IF @verdict = 0 AND @@ROWCOUNT < {count} SET @verdict = {INBOX}"));
}

/// What waits in a namespace's inbox: all of it, or what is for these ids.
pub(crate) struct Rows<'c> {
    pub(crate) client: &'c mut Client,
    pub(crate) schema: &'c Schema,
    pub(crate) namespace: &'c str,
    pub(crate) ids: Option<&'c [&'c str]>,
}

#[async_trait]
impl Inbox for Rows<'_> {
    async fn waiting(&mut self, most: usize, except: &[Box<str>]) -> Result<Vec<(i64, Result<Waiting>)>> {
        let sql = waiting(self.schema, self.namespace, self.ids, except, most);
        let rows = sql.run(self.client, Commits::No).await?.rows();
        rows.iter().map(|row| Ok((get(row, 0)?, one(row)))).collect()
    }

    async fn take(&mut self, numbers: &[i64], ops: &[Op]) -> Result<Option<Vec<Outcome>>> {
        let (schema, namespace, gate) = (self.schema, self.namespace, Gate::Moving(numbers));
        let of = Of { schema, instance: Uuid::nil(), generation: 0, namespace, gate };
        Ok(match run(self.client, &of, ops, &Sorted::new(ops), None).await? {
            Committed::Done(outcomes) => Some(outcomes),
            Committed::Inbox => None,
        })
    }

    async fn refuse(&mut self, number: i64, why: &str) -> Result<()> {
        let mut sql = Sql::default();
        let (schema, number, why) = (self.schema, sql.number(number), sql.text(why));
        sql.push(format!(
            "UPDATE i SET refused = {why} FROM {schema}.inbox AS i WHERE i.number = {number} AND i.refused IS NULL"
        ));
        sql.run(self.client, Commits::No).await.map(drop)
    }
}

pub(crate) fn waiting(schema: &Schema, namespace: &str, ids: Option<&[&str]>, except: &[Box<str>], most: usize) -> Sql {
    let mut sql = Sql::default();
    let (namespace, rows) = (sql.text(namespace), sql.count(most));
    let mut table = |ids: &mut dyn Iterator<Item = &str>, is: &str, name: &str| {
        let mut table = Table::new(&[("id", Column::Key(256))]);
        ids.for_each(|id| table.row([id.into()]));
        format!("AND i.id {is} (SELECT {name}.id FROM {})", table.named(&mut sql, name))
    };
    let ids = ids.map(|ids| table(&mut ids.iter().copied(), "IN", "j")).unwrap_or_default();
    let except =
        if except.is_empty() { String::new() } else { table(&mut except.iter().map(|id| &**id), "NOT IN", "h") };
    sql.push(format!(
        "SELECT TOP ({rows}) i.number, i.what, i.id, i.name, i.token, i.payload, i.digest, i.restart
         FROM {schema}.inbox AS i WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
         WHERE i.namespace = {namespace} AND i.refused IS NULL {ids} {except} ORDER BY i.number"
    ));
    sql
}

fn one(row: &Row) -> Result<Waiting> {
    let text = |column| text(row, column);
    Ok(Waiting::new([text(1)?, text(2)?, text(3)?, text(4)?, text(5)?, text(6)?], get(row, 7)?))
}
