use async_trait::async_trait;
use durable_core::storage::{OutboxWriter, Raise, Raised, RunId, Spawn, Spawned};
use durable_core::{Definition, Event, Host, RaiseIn, SpawnIn};
use serde::Serialize;
use sqlx::PgExecutor;
use std::borrow::Borrow;
use std::marker::PhantomData;
use uuid::Uuid;

use crate::names::Schema;
use crate::rows::{boxed, get};
use crate::sql::Sql;
use crate::{Postgres, batch};

/// `host.spawn_in(&mut *tx, …)` and `host.raise_in(&mut *tx, …)`: starts and messages inside the service's own transaction in
/// the same database, or inside [`proc.transaction`](crate::Transactions::transaction).
///
/// They only insert into an inbox, so a transaction may stay open for as long as it likes: it holds up nobody. What it has
/// put in is moved on by the first instance that comes by once it is committed, or by the first call that asks for that
/// process. Should that be impossible by then (the id was taken by another kind meanwhile, the process has ended), it
/// is dropped, and a warning says whose it was and why.
pub trait Outbox {
    /// Starts a process if the transaction commits; idempotent by its id, as [`Host::spawn`].
    ///
    /// ```
    /// use durable_postgres::{Definition, Host, Outbox};
    ///
    /// const SHIP: Definition<i64, ()> = Definition::new("ship");
    ///
    /// async fn order(host: &Host, pool: &sqlx::PgPool, item: i64) -> Result<(), Box<dyn std::error::Error>> {
    ///     let mut tx = pool.begin().await?;
    ///     sqlx::query("INSERT INTO orders (item) VALUES ($1)").bind(item).execute(&mut *tx).await?;
    ///     host.spawn_in(&mut *tx, SHIP, format!("ship {item}"), &item).await?;
    ///     Ok(tx.commit().await?)
    /// }
    /// ```
    fn spawn_in<'c, X, I, O, E, Q>(
        &self,
        executor: X,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnIn<'c, InTransaction<'c, X>, O, E>
    where
        X: PgExecutor<'c> + 'c,
        I: Borrow<Q>,
        Q: Serialize + ?Sized;

    /// Sends a message if the transaction commits, as [`Handle::raise`](crate::Handle::raise).
    fn raise_in<'c, X, T, Q>(
        &self,
        executor: X,
        id: impl Into<String>,
        event: Event<T>,
        payload: &Q,
    ) -> RaiseIn<'c, InTransaction<'c, X>>
    where
        X: PgExecutor<'c> + 'c,
        T: Borrow<Q>,
        Q: Serialize + ?Sized;
}

impl Outbox for Host {
    fn spawn_in<'c, X, I, O, E, Q>(
        &self,
        executor: X,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnIn<'c, InTransaction<'c, X>, O, E>
    where
        X: PgExecutor<'c> + 'c,
        I: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        SpawnIn::new(self, InTransaction::new(self, executor), definition, id, input)
    }

    fn raise_in<'c, X, T, Q>(
        &self,
        executor: X,
        id: impl Into<String>,
        event: Event<T>,
        payload: &Q,
    ) -> RaiseIn<'c, InTransaction<'c, X>>
    where
        X: PgExecutor<'c> + 'c,
        T: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        RaiseIn::new(self, InTransaction::new(self, executor), id, event, payload)
    }
}

/// What is written through: a connection in a transaction.
#[derive(Debug)]
pub struct InTransaction<'c, X> {
    executor: X,
    /// None if the host's storage is another.
    schema: Option<Schema>,
    transaction: PhantomData<&'c ()>,
}

impl<X> InTransaction<'_, X> {
    fn new(host: &Host, executor: X) -> Self {
        let schema = host.storage::<Postgres>().map(|storage| storage.0.schema.clone());
        Self { executor, schema, transaction: PhantomData }
    }

    fn schema(&self) -> sqlx::Result<&Schema> {
        self.schema.as_ref().ok_or_else(|| {
            sqlx::Error::Configuration("the host's storage is not PostgreSQL: use the `Outbox` of its own crate".into())
        })
    }
}

fn decoded(why: impl std::fmt::Display) -> sqlx::Error {
    sqlx::Error::Decode(why.to_string().into())
}

#[async_trait]
impl<'c, X: PgExecutor<'c> + 'c> OutboxWriter for InTransaction<'c, X> {
    type Error = sqlx::Error;

    async fn spawn(self, namespace: &str, spawn: &Spawn) -> sqlx::Result<Spawned> {
        let sql = put_start(self.schema()?, namespace, spawn);
        let rows = sql.fetch(self.executor).await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let run: Uuid = get(row, 0).map_err(decoded)?;
        let (kind, digest) = (boxed(get(row, 1).map_err(decoded)?), boxed(get(row, 2).map_err(decoded)?));
        Ok(Spawned { run: RunId(run), existed: run != spawn.run.0, kind, digest })
    }

    async fn raise(self, namespace: &str, raise: &Raise) -> sqlx::Result<Raised> {
        let sql = put_message(self.schema()?, namespace, raise);
        let rows = sql.fetch(self.executor).await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let delivered = Raised::Delivered { run: RunId(Uuid::nil()), number: 0, mine: false };
        Ok(match (get::<bool>(row, 0).map_err(decoded)?, get::<bool>(row, 1).map_err(decoded)?) {
            (_, true) => delivered,
            (true, false) => Raised::Finished,
            (false, false) => Raised::NotFound,
        })
    }
}

/// Puts a start in, unless the id is there or about to be: says what the id has, or will have.
pub(crate) fn put_start(schema: &Schema, namespace: &str, spawn: &Spawn) -> Sql {
    let Spawn { run, id, kind, input, digest, restart_finished, .. } = spawn;
    let mut sql = Sql::default();
    let (namespace, id, kind) = (sql.bind(namespace), sql.bind(&**id), sql.bind(&**kind));
    let (run, input, digest) = (sql.bind(run.to_string()), sql.bind(&**input), sql.bind(&**digest));
    let restart = sql.bind(*restart_finished);
    let finished = batch::FINISHED;
    sql.text = format!(
        "WITH coming AS (SELECT i.token::pg_catalog.uuid AS run, i.name, i.digest FROM {schema}.inbox i
             WHERE i.namespace = {namespace} AND i.id = {id} AND i.what = 'start' AND i.refused IS NULL
             ORDER BY i.number DESC LIMIT 1),
         there AS (SELECT p.run, p.kind AS name, p.input_digest AS digest FROM {schema}.processes p
             WHERE p.namespace = {namespace} AND p.id = {id} AND p.current
                 AND NOT ({restart} AND p.kind = {kind} AND p.status IN {finished}) AND NOT EXISTS (SELECT 1 FROM coming)),
         put AS (INSERT INTO {schema}.inbox (namespace, what, id, name, token, payload, digest, restart, put_at)
             SELECT {namespace}, 'start', {id}, {kind}, {run}, {input}::pg_catalog.json, {digest}, {restart},
                 pg_catalog.clock_timestamp()
             WHERE NOT EXISTS (SELECT 1 FROM coming) AND NOT EXISTS (SELECT 1 FROM there)
             RETURNING token::pg_catalog.uuid AS run, name, digest)
         SELECT run, name, digest FROM coming UNION ALL SELECT run, name, digest FROM there
         UNION ALL SELECT run, name, digest FROM put"
    );
    sql
}

/// Puts a message in, unless one of that id is there or about to be. Says whether the process is there, and whether the
/// message is, or will be.
pub(crate) fn put_message(schema: &Schema, namespace: &str, raise: &Raise) -> Sql {
    let Raise { id, name, event_id, payload } = raise;
    let mut sql = Sql::default();
    let (namespace, id, name) = (sql.bind(namespace), sql.bind(&**id), sql.bind(&**name));
    let (event_id, payload) = (sql.bind(&**event_id), sql.bind(&**payload));
    let unfinished = batch::UNFINISHED;
    sql.text = format!(
        "WITH there AS (SELECT p.run, p.status IN {unfinished} AS lives FROM {schema}.processes p
             WHERE p.namespace = {namespace} AND p.id = {id} AND p.current),
         coming AS (SELECT i.what, i.token FROM {schema}.inbox i
             WHERE i.namespace = {namespace} AND i.id = {id} AND i.refused IS NULL),
         known AS (SELECT 1 FROM coming WHERE what = 'message' AND token = {event_id}
             UNION ALL SELECT 1 FROM {schema}.events e WHERE e.run = (SELECT run FROM there) AND e.event_id = {event_id}),
         put AS (INSERT INTO {schema}.inbox (namespace, what, id, name, token, payload, digest, restart, put_at)
             SELECT {namespace}, 'message', {id}, {name}, {event_id}, {payload}::pg_catalog.json, '', false,
                 pg_catalog.clock_timestamp()
             WHERE (EXISTS (SELECT 1 FROM there WHERE lives) OR EXISTS (SELECT 1 FROM coming WHERE what = 'start'))
                 AND NOT EXISTS (SELECT 1 FROM known)
             RETURNING 1)
         SELECT EXISTS (SELECT 1 FROM there), EXISTS (SELECT 1 FROM known) OR EXISTS (SELECT 1 FROM put)"
    );
    sql
}
