use async_trait::async_trait;
use durable_core::storage::{OutboxWriter, Raise, Raised, RunId, Spawn, Spawned};
use durable_core::{Definition, Event, Host, RaiseIn, SpawnIn};
use futures_io::{AsyncRead, AsyncWrite};
use serde::Serialize;
use std::borrow::Borrow;
use tiberius::Client;
use tiberius::error::Error;
use uuid::Uuid;

use crate::names::Schema;
use crate::rows::{get, run, text};
use crate::sql::{Sql, hex};
use crate::{Mssql, batch};

/// `host.spawn_in(&mut client, …)` and `host.raise_in(&mut client, …)`: starts and messages inside the service's own
/// transaction in the same database, or inside [`proc.transaction`](crate::Transactions::transaction).
///
/// They only insert into an inbox, so a transaction may stay open for as long as it likes: it holds up nobody. What it has
/// put in is moved on by the first instance that comes by once it is committed, or by the first call that asks for that
/// process. Should that be impossible by then (the id was taken by another kind meanwhile, the process has ended), an error
/// is logged.
pub trait Outbox {
    /// Starts a process if the transaction commits; idempotent by its id, as [`Host::spawn`].
    ///
    /// ```
    /// use durable_mssql::{Client, Definition, Host, Outbox};
    ///
    /// const SHIP: Definition<i64, ()> = Definition::new("ship");
    ///
    /// async fn order(host: &Host, client: &mut Client, item: i64) -> Result<(), Box<dyn std::error::Error>> {
    ///     client.begin_transaction().await?;
    ///     client.execute("INSERT INTO dbo.orders (item) VALUES (@P1)", &[&item]).await?;
    ///     host.spawn_in(client, SHIP, format!("ship {item}"), &item).await?;
    ///     Ok(client.commit_transaction().await?)
    /// }
    /// ```
    fn spawn_in<'c, S, I, O, E, Q>(
        &self,
        client: &'c mut Client<S>,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnIn<'c, InTransaction<'c, S>, O, E>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        I: Borrow<Q>,
        Q: Serialize + ?Sized;

    /// Sends a message if the transaction commits, as [`Handle::raise`](crate::Handle::raise).
    fn raise_in<'c, S, T, Q>(
        &self,
        client: &'c mut Client<S>,
        id: impl Into<String>,
        event: Event<T>,
        payload: &Q,
    ) -> RaiseIn<'c, InTransaction<'c, S>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        T: Borrow<Q>,
        Q: Serialize + ?Sized;
}

impl Outbox for Host {
    fn spawn_in<'c, S, I, O, E, Q>(
        &self,
        client: &'c mut Client<S>,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnIn<'c, InTransaction<'c, S>, O, E>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        I: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        SpawnIn::new(self, InTransaction::new(self, client), definition, id, input)
    }

    fn raise_in<'c, S, T, Q>(
        &self,
        client: &'c mut Client<S>,
        id: impl Into<String>,
        event: Event<T>,
        payload: &Q,
    ) -> RaiseIn<'c, InTransaction<'c, S>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        T: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        RaiseIn::new(self, InTransaction::new(self, client), id, event, payload)
    }
}

/// What is written through: a connection in a transaction.
pub struct InTransaction<'c, S: AsyncRead + AsyncWrite + Unpin + Send> {
    client: &'c mut Client<S>,
    /// None if the host's storage is another.
    schema: Option<Schema>,
}

impl<'c, S: AsyncRead + AsyncWrite + Unpin + Send> InTransaction<'c, S> {
    fn new(host: &Host, client: &'c mut Client<S>) -> Self {
        Self { client, schema: host.storage::<Mssql>().map(|storage| storage.0.schema.clone()) }
    }

    fn schema(&self) -> tiberius::Result<&Schema> {
        self.schema.as_ref().ok_or_else(|| {
            Error::Protocol("the host's storage is not SQL Server: use the `Outbox` of its own crate".into())
        })
    }
}

fn decoded(why: impl std::fmt::Display) -> Error {
    Error::Conversion(why.to_string().into())
}

#[async_trait]
impl<S: AsyncRead + AsyncWrite + Unpin + Send> OutboxWriter for InTransaction<'_, S> {
    type Error = Error;

    async fn spawn(self, namespace: &str, spawn: &Spawn) -> tiberius::Result<Spawned> {
        let rows = put_start(self.schema()?, namespace, spawn).fetch(self.client).await?.rows();
        let row = rows.first().ok_or_else(|| decoded("a start has no answer"))?;
        let run = run(row, 0).map_err(decoded)?;
        let (kind, digest) = (text(row, 1).map_err(decoded)?, text(row, 2).map_err(decoded)?);
        Ok(Spawned { run, existed: run != spawn.run, kind, digest })
    }

    async fn raise(self, namespace: &str, raise: &Raise) -> tiberius::Result<Raised> {
        let rows = put_message(self.schema()?, namespace, raise).fetch(self.client).await?.rows();
        let row = rows.first().ok_or_else(|| decoded("a message has no answer"))?;
        let delivered = Raised::Delivered { run: RunId(Uuid::nil()), number: 0, mine: false };
        Ok(match (get::<i32>(row, 0).map_err(decoded)?, get::<i32>(row, 1).map_err(decoded)?) {
            (_, 1) => delivered,
            (1, _) => Raised::Finished,
            _ => Raised::NotFound,
        })
    }
}

/// Committed, or this transaction's own; and no lock is kept on what is only read, whatever the transaction's isolation.
const PLAIN: &str = "SET NOCOUNT ON; SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
const INBOX: &str = "WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)";

/// Puts a start in, unless the id is there or about to be: says what the id has, or will have.
pub(crate) fn put_start(schema: &Schema, namespace: &str, spawn: &Spawn) -> Sql {
    let Spawn { run, id, kind, input, digest, restart_finished, .. } = spawn;
    let mut sql = Sql::default();
    let (namespace, id, kind) = (sql.text(namespace), sql.text(&**id), sql.text(&**kind));
    let (run, input, digest) = (sql.text(hex(run.0)), sql.text(&**input), sql.text(&**digest));
    let (restart, finished) = (sql.bit(*restart_finished), batch::FINISHED);
    sql.push(PLAIN);
    sql.push("DECLARE @run BINARY(16), @kind NVARCHAR(128), @digest NVARCHAR(64)");
    sql.push(format!(
        "SELECT TOP (1) @run = CONVERT(BINARY(16), i.token, 2), @kind = i.name, @digest = i.digest
         FROM {schema}.inbox AS i {INBOX}
         WHERE i.namespace = {namespace} AND i.id = {id} AND i.what = N'start' AND i.refused IS NULL ORDER BY i.number DESC"
    ));
    sql.push(format!(
        "IF @run IS NULL SELECT @run = p.run, @kind = p.kind, @digest = p.input_digest
         FROM {schema}.processes AS p WHERE p.namespace = {namespace} AND p.id = {id} AND p.[current] = 1
             AND NOT ({restart} = 1 AND p.kind = {kind} AND p.status IN {finished})"
    ));
    sql.push(format!(
        "IF @run IS NULL
         BEGIN
             INSERT INTO {schema}.inbox (namespace, what, id, name, token, payload, digest, restart, put_at)
                 VALUES ({namespace}, N'start', {id}, {kind}, {run}, {input}, {digest}, {restart}, SYSUTCDATETIME());
             SELECT @run = CONVERT(BINARY(16), {run}, 2), @kind = {kind}, @digest = {digest};
         END"
    ));
    sql.push("SELECT @run, @kind, @digest");
    sql
}

/// Puts a message in, unless one of that id is there or about to be. Says whether the process is there, and whether the
/// message is, or will be.
pub(crate) fn put_message(schema: &Schema, namespace: &str, raise: &Raise) -> Sql {
    let Raise { id, name, event_id, payload } = raise;
    let mut sql = Sql::default();
    let (namespace, id, name) = (sql.text(namespace), sql.text(&**id), sql.text(&**name));
    let (event_id, payload, unfinished) = (sql.text(&**event_id), sql.text(&**payload), batch::UNFINISHED);
    let coming = format!(
        "SELECT 1 FROM {schema}.inbox AS i {INBOX} WHERE i.namespace = {namespace} AND i.id = {id} AND i.refused IS NULL"
    );
    sql.push(PLAIN);
    sql.push("DECLARE @run BINARY(16), @there INT = 0, @lives INT = 0, @known INT = 0");
    sql.push(format!(
        "SELECT @run = p.run, @there = 1, @lives = CASE WHEN p.status IN {unfinished} THEN 1 ELSE 0 END
         FROM {schema}.processes AS p WHERE p.namespace = {namespace} AND p.id = {id} AND p.[current] = 1"
    ));
    sql.push(format!(
        "IF EXISTS ({coming} AND i.what = N'message' AND i.token = {event_id})
             OR EXISTS (SELECT 1 FROM {schema}.events AS e WHERE e.run = @run AND e.event_id = {event_id})
         SET @known = 1"
    ));
    sql.push(format!(
        "IF @known = 0 AND (@lives = 1 OR EXISTS ({coming} AND i.what = N'start'))
         BEGIN
             INSERT INTO {schema}.inbox (namespace, what, id, name, token, payload, digest, restart, put_at)
                 VALUES ({namespace}, N'message', {id}, {name}, {event_id}, {payload}, N'', 0, SYSUTCDATETIME());
             SET @known = 1;
         END"
    ));
    sql.push("SELECT @there, @known");
    sql
}
