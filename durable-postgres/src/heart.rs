//! The heartbeat and the proof of life: a session lock that the server releases when the program dies.
//!
//! The lock is held by a session of its own, on the connection on which the heart beats. A task listens on that
//! connection: when the server drops it, or a pooler does, it takes the lock again on a new one at once, and says so with
//! a heartbeat, long before anybody has looked twice.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{Heart, InstanceId, LockState, NewInstance, Peer, Result, StorageError, millis};
use sqlx::postgres::{PgConnection, PgListener, PgPoolOptions, PgRow};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::connect::Options;
use crate::errors::reading;
use crate::lend::{unavailable, within};
use crate::names::Schema;
use crate::rows::{get, time};
use crate::session::{self, Bounds, Whose};
use crate::sql::{Commits, Sql};
use crate::store::Shared;

/// One run of a server: locks of another one are gone, whatever a heartbeat says. After a crash of one of its processes
/// the server goes on with its memory cleared, and so with other statistics; a standby that takes over has others, too.
const LIFETIME: &str = "concat_ws('/', pg_catalog.pg_postmaster_start_time(),
    (SELECT stats_reset FROM pg_catalog.pg_stat_bgwriter))";

/// Whether a row of `pg_locks` is the session lock with the key `key`.
fn is_lock(key: &str) -> String {
    format!(
        "l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
             AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
             AND l.classid = (({key} >> 32) & 4294967295)::oid AND l.objid = ({key} & 4294967295)::oid"
    )
}

fn key(instance: InstanceId) -> i64 {
    let mixed = Uuid::new_v5(&instance.0, b"durable instance");
    mixed.as_u64_pair().0 as i64
}

/// Whether a session lock keeps out another session. Where it does not (a pooler that lends sessions by the transaction,
/// a database that only knows the function's name) it proves nothing.
pub(crate) async fn locks_are_real(one: &mut PgConnection, other: &mut PgConnection) -> sqlx::Result<bool> {
    use sqlx::{Executor, Row};
    let key = key(InstanceId::new());
    let lock = || sqlx::query("SELECT pg_try_advisory_lock($1)").bind(key).persistent(false);
    let unlock = || sqlx::query("SELECT pg_advisory_unlock($1)").bind(key).persistent(false);
    let first: bool = one.fetch_one(lock()).await?.get(0);
    let second: bool = other.fetch_one(lock()).await?.get(0);
    // And it must be seen by those who only look.
    let seen = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_locks l WHERE l.pid <> pg_backend_pid() AND {})",
        is_lock("$1::bigint")
    )));
    let seen: bool = other.fetch_one(seen.bind(key).persistent(false)).await?.get(0);
    for (connection, taken) in [(one, first), (other, second)] {
        if taken {
            connection.execute(unlock()).await?;
        }
    }
    Ok(first && !second && seen)
}

/// The others, and the time in the first row.
pub(crate) fn peers_statement(schema: &Schema, namespace: &str, me: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let (namespace, me) = (sql.bind(namespace), sql.bind(me.0));
    let is_lock = is_lock("i.lock_key");
    sql.text = format!(
        "SELECT NULL::uuid, clock_timestamp(), false, false, false, NULL::integer, NULL::bigint, NULL::text[]
         UNION ALL
         SELECT i.instance, i.heartbeat_at, f.fenced_at IS NOT NULL, coalesce(i.locked_in = {LIFETIME}, false),
             EXISTS (SELECT 1 FROM pg_catalog.pg_locks l WHERE {is_lock}), i.comeback_ms, i.expiry_ms, i.kinds
         FROM {schema}.instances i LEFT JOIN {schema}.fences f ON f.instance = i.instance
         WHERE i.namespace = {namespace} AND i.instance <> {me}"
    );
    sql
}

pub(crate) fn peer(row: &PgRow, locks_are_real: bool) -> Result<Peer> {
    let (said_held, is_held): (bool, bool) = (get(row, 3)?, get(row, 4)?);
    let lock = match (locks_are_real && said_held, is_held) {
        (true, true) => LockState::Held,
        (true, false) => LockState::Free,
        (false, _) => LockState::Unknown,
    };
    let (comeback, expiry) = (millis(get::<i32>(row, 5)?.into()), millis(get(row, 6)?));
    let (instance, heartbeat_at) = (InstanceId(get(row, 0)?), time(row, 1)?);
    let kinds: Vec<Option<String>> = get(row, 7).unwrap_or_default();
    let kinds = kinds.into_iter().flatten().map(Box::from).collect();
    Ok(Peer { instance, heartbeat_at, lock, fenced: get(row, 2)?, comeback, expiry, kinds })
}

pub(crate) async fn enlist(shared: &Arc<Shared>, new: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
    let life = Life { shared: shared.clone(), instance: new.id, comeback_ms: AtomicI32::new(0) };
    let mut session = life.begin().await?;
    let mut sql = Sql::default();
    let (instance, key) = (sql.bind(new.id.0), sql.bind(key(new.id)));
    let (namespace, label) = (sql.bind(&*new.namespace), sql.bind(&*new.label));
    let kinds = sql.bind(new.kinds.iter().map(|kind| &**kind).collect::<Vec<&str>>());
    let (comeback, expiry) = (sql.bind(life.comeback_ms.load(Ordering::Relaxed)), sql.bind(new.expiry_ms()));
    let schema = &shared.schema;
    sql.text = format!(
        "WITH fence AS (INSERT INTO {schema}.fences (instance, generation) VALUES ({instance}, 0) ON CONFLICT DO NOTHING),
         entry AS (INSERT INTO {schema}.instances (instance, namespace, label, kinds, started_at, heartbeat_at, lock_key,
                 locked_in, comeback_ms, expiry_ms)
             VALUES ({instance}, {namespace}, {label}, {kinds}, clock_timestamp(), clock_timestamp(), {key}, {}, {comeback},
                 {expiry})
             ON CONFLICT DO NOTHING)
         SELECT clock_timestamp()",
        holds(shared, "$2")
    );
    let rows = run(&mut session, sql, shared.connections.bounds()).await?;
    let now = rows.first().map(|row| time(row, 0)).transpose()?;
    let now = now.ok_or_else(|| StorageError::schema("the database did not tell its time"))?;
    let (orders, ordered) = mpsc::channel(1);
    let task = tokio::spawn(life.keep(session, ordered));
    Ok((Box::new(PgHeart { orders, task }), now))
}

/// The server's run, if this session holds the lock; else null.
fn holds(shared: &Shared, key: &str) -> String {
    let real = shared.locks;
    let is_lock = is_lock(key);
    format!(
        "CASE WHEN {real} AND EXISTS (SELECT 1 FROM pg_catalog.pg_locks l
             WHERE l.pid = pg_backend_pid() AND {is_lock}) THEN {LIFETIME} END"
    )
}

async fn run(session: &mut PgListener, sql: Sql, bounds: Bounds) -> Result<Vec<PgRow>> {
    use sqlx::Acquire;
    let answer = async {
        let connection = session.acquire().await.map_err(reading)?;
        sql.run(connection, Commits::No).await
    };
    within(bounds.beat(), unavailable, answer).await
}

/// Keeps an instance's lock, and its heartbeat.
struct Life {
    shared: Arc<Shared>,
    instance: InstanceId,
    /// How long a session that holds the lock took to be had, at most.
    comeback_ms: AtomicI32,
}

type Order = oneshot::Sender<Result<DateTime<Utc>>>;

impl Life {
    /// A new session that holds the lock.
    async fn begin(&self) -> Result<PgListener> {
        let since = Instant::now();
        let mut session = listener(self.shared.connections.options()).await.map_err(reading)?;
        if self.shared.locks {
            self.lock(&mut session).await?;
        }
        let took = i32::try_from(since.elapsed().as_millis()).unwrap_or(i32::MAX);
        self.comeback_ms.fetch_max(took, Ordering::Relaxed);
        Ok(session)
    }

    /// Takes the lock, if it is free: the server may not have noticed yet that an earlier session has gone.
    async fn lock(&self, session: &mut PgListener) -> Result<bool> {
        let mut sql = Sql::default();
        let key = sql.bind(key(self.instance));
        sql.text = format!("SELECT pg_try_advisory_lock({key})");
        let rows = run(session, sql, self.shared.connections.bounds()).await?;
        Ok(rows.first().map(|row| get(row, 0)).transpose()?.unwrap_or(false))
    }

    /// One heartbeat, under a lock on the fence: it is not acknowledged once the fence stands. Says whether the session
    /// holds the lock, as it has told the others.
    async fn beat(&self, session: &mut PgListener) -> Result<(DateTime<Utc>, bool)> {
        let mut sql = Sql::default();
        let (instance, key) = (sql.bind(self.instance.0), sql.bind(key(self.instance)));
        let comeback = sql.bind(self.comeback_ms.load(Ordering::Relaxed));
        let (schema, holds) = (&self.shared.schema, holds(&self.shared, &key));
        sql.text = format!(
            "WITH fence AS MATERIALIZED (SELECT 1 FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NULL
                 FOR SHARE)
             UPDATE {schema}.instances
             SET heartbeat_at = clock_timestamp(), locked_in = {holds}, comeback_ms = {comeback}
             WHERE instance = {instance} AND EXISTS (SELECT 1 FROM fence)
             RETURNING heartbeat_at, locked_in IS NOT NULL"
        );
        let rows = run(session, sql, self.shared.connections.bounds()).await?;
        let row = rows.first().ok_or(StorageError::Fenced)?;
        Ok((time(row, 0)?, get(row, 1)?))
    }

    async fn beat_and_lock(&self, session: &mut PgListener) -> Result<DateTime<Utc>> {
        let (at, held) = self.beat(session).await?;
        if held || !self.shared.locks || !self.lock(session).await? {
            return Ok(at);
        }
        Ok(self.beat(session).await?.0)
    }

    /// Beats when it is told to, and whenever the session had to be begun anew.
    async fn keep(self, session: PgListener, mut orders: mpsc::Receiver<Order>) {
        const FIRST: Duration = Duration::from_millis(10);
        const LONGEST: Duration = Duration::from_millis(200);
        let mut session = Some(session);
        let mut pause = FIRST;
        loop {
            let order = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => Some(order),
                    None => return,
                },
                () = lost(&mut session, pause) => None,
            };
            let begun = session.is_none();
            let result = async {
                let mut with = match session.take() {
                    Some(session) => session,
                    None => self.begin().await?,
                };
                let beat = self.beat_and_lock(&mut with).await;
                if !matches!(beat, Err(StorageError::Unavailable(_) | StorageError::Unknown(_))) {
                    session = Some(with);
                }
                beat
            };
            let result = result.await;
            pause = if session.is_some() { FIRST } else { (pause * 2).min(LONGEST) };
            if begun && session.is_some() {
                tracing::debug!(instance = %self.instance, "the heart has a new session");
            }
            let fenced = matches!(result, Err(StorageError::Fenced));
            match order {
                Some(order) => {
                    let _ = order.send(result);
                }
                // Nobody asked, and there is nothing left to keep: the next order is told.
                None if fenced => {
                    while let Some(order) = orders.recv().await {
                        let _ = order.send(Err(StorageError::Fenced));
                    }
                    return;
                }
                None => {}
            }
        }
    }
}

/// Returns when the session's connection is lost; if there is none, when it is time to begin another one.
async fn lost(session: &mut Option<PgListener>, pause: Duration) {
    match session {
        Some(listening) => {
            // Nothing is listened to, so nothing comes until the connection ends.
            while let Ok(Some(_)) = listening.try_recv().await {}
            *session = None;
        }
        None => tokio::time::sleep(pause).await,
    }
}

/// A session on a connection of its own, which notices its end.
pub(crate) async fn listener(options: &Options) -> sqlx::Result<PgListener> {
    let bounds = options.bounds;
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .test_before_acquire(false)
        .acquire_timeout(Duration::from_secs(2))
        .after_connect(move |connection, _| Box::pin(session::set(connection, bounds, Whose::Engine)))
        .connect_lazy_with(options.options.clone());
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    listener.ignore_pool_close_event(true);
    Ok(listener)
}

/// Its orders go to the task that keeps the session. With it the session ends.
struct PgHeart {
    orders: mpsc::Sender<Order>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for PgHeart {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[async_trait]
impl Heart for PgHeart {
    async fn beat(&mut self) -> Result<DateTime<Utc>> {
        let gone = || StorageError::unavailable("the heart's task has ended");
        let (order, beat) = oneshot::channel();
        self.orders.send(order).await.map_err(|_| gone())?;
        beat.await.map_err(|_| gone())?
    }
}
