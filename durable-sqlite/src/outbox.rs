use async_trait::async_trait;
use durable_core::storage::{OutboxWriter, Raise, Raised, RunId, Spawn, Spawned};
use durable_core::{Definition, Event, Host, RaiseIn, SpawnIn};
use futures_util::TryStreamExt;
use serde::Serialize;
use sqlx::sqlite::SqliteExecutor;
use sqlx::{AssertSqlSafe, Either};
use std::borrow::Borrow;
use std::marker::PhantomData;

use crate::rows::{boxed, get, run};
use crate::script::{Answer, Arg, NOW, arguments};

/// `host.spawn_in(&mut *tx, …)` and `host.raise_in(&mut *tx, …)`: starts and messages inside the service's own transaction
/// on the same file, or inside [`proc.transaction`](crate::Transactions::transaction).
///
/// Begin the transaction with `pool.begin_with("BEGIN IMMEDIATE")` and keep it short: SQLite has one writer, and nobody
/// else writes meanwhile. A process in memory learns of a message at its instance's next look.
pub trait Outbox {
    /// Starts a process if the transaction commits; idempotent by its id, as [`Host::spawn`].
    ///
    /// ```
    /// use durable_sqlite::{Definition, Host, Outbox};
    ///
    /// const SHIP: Definition<i64, ()> = Definition::new("ship");
    ///
    /// async fn order(host: &Host, pool: &sqlx::SqlitePool, item: i64) -> Result<(), Box<dyn std::error::Error>> {
    ///     let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    ///     sqlx::query("INSERT INTO orders (item) VALUES (?)").bind(item).execute(&mut *tx).await?;
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
        X: SqliteExecutor<'c> + 'c,
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
        X: SqliteExecutor<'c> + 'c,
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
        X: SqliteExecutor<'c> + 'c,
        I: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        SpawnIn::new(self, InTransaction { executor, transaction: PhantomData }, definition, id, input)
    }

    fn raise_in<'c, X, T, Q>(
        &self,
        executor: X,
        id: impl Into<String>,
        event: Event<T>,
        payload: &Q,
    ) -> RaiseIn<'c, InTransaction<'c, X>>
    where
        X: SqliteExecutor<'c> + 'c,
        T: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        RaiseIn::new(self, InTransaction { executor, transaction: PhantomData }, id, event, payload)
    }
}

/// What is written through: a connection in a transaction.
#[derive(Debug)]
pub struct InTransaction<'c, X> {
    executor: X,
    transaction: PhantomData<&'c ()>,
}

impl<'c, X: SqliteExecutor<'c>> InTransaction<'c, X> {
    /// Runs statements; after an error the transaction is as the driver left it.
    async fn run(self, sql: String, args: Vec<Arg>) -> sqlx::Result<Vec<Answer>> {
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments(args)?);
        let mut stream = self.executor.fetch_many(query);
        let (mut answers, mut current) = (Vec::new(), Answer::default());
        while let Some(item) = stream.try_next().await? {
            match item {
                Either::Right(row) => current.rows.push(row),
                Either::Left(done) => {
                    current.changes = done.rows_affected();
                    answers.push(std::mem::take(&mut current));
                }
            }
        }
        Ok(answers)
    }
}

fn decoded(why: impl std::fmt::Display) -> sqlx::Error {
    sqlx::Error::Decode(why.to_string().into())
}

// The tables are named with their database: the transaction may have temporary ones of the same names.
#[async_trait]
impl<'c, X: SqliteExecutor<'c> + 'c> OutboxWriter for InTransaction<'c, X> {
    type Error = sqlx::Error;

    async fn spawn(self, namespace: &str, spawn: &Spawn) -> sqlx::Result<Spawned> {
        let Spawn { run: new, id, kind, input, digest, restart_finished, .. } = spawn;
        let [namespace, id, kind]: [Arg; 3] = [namespace.into(), (&**id).into(), (&**kind).into()];
        let new_run: Arg = new.to_string().into();
        const COLUMNS: &str =
            "run, namespace, id, current, kind, status, claim, calm_claim, wake_at, signals, signalled,
            input, input_digest, created_at, status_at";
        // The former run makes way, and the new one takes its place, in one statement: whoever drops this halfway, and commits
        // all the same, must not commit half of it.
        let sql = format!(
            "INSERT INTO main.durable_processes ({COLUMNS})
             SELECT {COLUMNS} FROM (
                 SELECT 1 AS nth, p.run, p.namespace, p.id, 0 AS current, p.kind, p.status, p.claim, p.calm_claim, p.wake_at,
                     p.signals, p.signalled, p.input, p.input_digest, p.created_at, p.status_at
                 FROM main.durable_processes p
                 WHERE ? = 1 AND p.namespace = ? AND p.id = ? AND p.current = 1 AND p.kind = ? AND p.status IN {finished}
                 UNION ALL
                 SELECT 2, ?, ?, ?, 1, ?, 'waiting', 0, 0, {NOW}, 0, 0, ?, ?, {NOW}, {NOW})
             WHERE true ORDER BY nth
             ON CONFLICT (run) DO UPDATE SET current = 0 WHERE excluded.current = 0
             ON CONFLICT DO NOTHING;
             SELECT run, kind, input_digest FROM main.durable_processes
                 WHERE namespace = ? AND id = ? AND current = 1",
            finished = crate::batch::FINISHED,
        );
        let args = vec![
            i64::from(*restart_finished).into(),
            namespace.clone(),
            id.clone(),
            kind.clone(),
            new_run,
            namespace.clone(),
            id.clone(),
            kind,
            (&**input).into(),
            (&**digest).into(),
            namespace,
            id,
        ];
        let answers = self.run(sql, args).await?;
        let row = answers.last().and_then(|answer| answer.rows.first()).ok_or(sqlx::Error::RowNotFound)?;
        let found: RunId = run(row, 0).map_err(decoded)?;
        let kind = boxed(get(row, 1).map_err(decoded)?);
        let digest = boxed(get(row, 2).map_err(decoded)?);
        Ok(Spawned { run: found, existed: found != *new, kind, digest })
    }

    async fn raise(self, namespace: &str, raise: &Raise) -> sqlx::Result<Raised> {
        let Raise { id, name, event_id, payload } = raise;
        let [namespace, id, name]: [Arg; 3] = [namespace.into(), (&**id).into(), (&**name).into()];
        let [event_id, payload]: [Arg; 2] = [(&**event_id).into(), (&**payload).into()];
        // Counted first: were the message left out after that, no other would get its number. Its owner has to be told
        // whoever it is: the engine does not know of it.
        let sql = format!(
            "UPDATE main.durable_processes SET signals = signals + 1, {wake}
             WHERE namespace = ? AND id = ? AND current = 1 AND status IN {unfinished} AND NOT EXISTS (
                 SELECT 1 FROM main.durable_events e WHERE e.run = durable_processes.run AND e.event_id = ?);
             INSERT INTO main.durable_events (run, number, name, event_id, payload, raised_at)
             SELECT p.run, p.signals, ?, ?, ?, {NOW} FROM main.durable_processes p
             WHERE changes() = 1 AND p.namespace = ? AND p.id = ? AND p.current = 1;
             SELECT p.run, e.number FROM main.durable_processes p
                 LEFT JOIN main.durable_events e ON e.run = p.run AND e.event_id = ?
             WHERE p.namespace = ? AND p.id = ? AND p.current = 1",
            unfinished = crate::batch::UNFINISHED,
            wake = crate::batch::wake(),
        );
        let args = vec![
            // No instance's id.
            "".into(),
            namespace.clone(),
            id.clone(),
            event_id.clone(),
            name,
            event_id.clone(),
            payload,
            namespace.clone(),
            id.clone(),
            event_id,
            namespace,
            id,
        ];
        let answers = self.run(sql, args).await?;
        let Some(row) = answers.last().and_then(|answer| answer.rows.first()) else { return Ok(Raised::NotFound) };
        Ok(match get::<Option<i64>>(row, 1).map_err(decoded)? {
            Some(number) => Raised::Delivered { run: run(row, 0).map_err(decoded)?, number, mine: false },
            None => Raised::Finished,
        })
    }
}
