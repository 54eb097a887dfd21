//! The heartbeat and the proof of life: an application lock of the session's, which the server releases when the program
//! dies.
//!
//! The heart has a session of its own. A task waits for the end of its connection: when the server drops it, it takes the
//! lock again on a new one at once, and says so with a heartbeat, long before anybody has looked twice.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{Heart, InstanceId, LockState, NewInstance, Peer, Result, StorageError, millis};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tiberius::Row;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::names::Schema;
use crate::rows::{get, maybe_id, time};
use crate::session::Session;
use crate::sql::{Commits, Sql, hex};
use crate::store::Shared;

/// One run of a server: locks of another one are gone, whatever a heartbeat says. The temporary database is made anew at
/// each start, and everybody may see when; but on Azure, where after a failover all locks look free at once. There a lock
/// proves nothing, and the heartbeat decides.
const LIFETIME: &str = "COALESCE((SELECT CONVERT(NVARCHAR(40), d.create_date, 126) FROM sys.databases AS d
    WHERE d.name = N'tempdb'), N'unknown')";
/// What stands there where nobody may see when.
const HIDDEN: &str = "unknown";

pub(crate) fn lock(schema: &Schema, instance: Uuid) -> String {
    schema.lock(format_args!("alive/{}", hex(instance)))
}

fn take(lock: &str) -> String {
    format!("EXECUTE sp_getapplock {lock}, N'Exclusive', N'Session', 0")
}

fn holds(lock: &str) -> String {
    format!("APPLOCK_MODE(N'public', {lock}, N'Session') = N'Exclusive'")
}

/// Whether a session's lock keeps out another session, and can be seen from there. Where it cannot it proves nothing.
pub(crate) async fn locks_are_real(one: &mut Session, other: &mut Session, schema: &Schema) -> Result<bool> {
    let resource = lock(schema, Uuid::now_v7());
    let mut sql = Sql::default();
    let lock = sql.text(&resource);
    sql.push(take(&lock));
    sql.push(format!("SELECT CONVERT(BIT, CASE WHEN {} THEN 1 ELSE 0 END)", holds(&lock)));
    let first = yes(&sql.run(one, Commits::No).await?.rows())?;
    let mut sql = Sql::default();
    let lock = sql.text(&resource);
    sql.push(format!("SELECT CONVERT(BIT, APPLOCK_TEST(N'public', {lock}, N'Exclusive', N'Session'))"));
    let free = yes(&sql.run(other, Commits::No).await?.rows())?;
    // The first session ends with the caller; its lock goes before that.
    let mut sql = Sql::default();
    let lock = sql.text(&resource);
    sql.push(format!("IF {} EXECUTE sp_releaseapplock {lock}, N'Session'", holds(&lock)));
    sql.run(one, Commits::No).await?;
    Ok(first && !free)
}

fn yes(rows: &[Row]) -> Result<bool> {
    Ok(rows.first().map(|row| get(row, 0)).transpose()?.unwrap_or(false))
}

/// The time, and the others.
pub(crate) fn peers(schema: &Schema, namespace: &str, me: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let (namespace, me) = (sql.text(namespace), sql.id(me.0));
    sql.push("SELECT SYSUTCDATETIME()");
    sql.push(format!(
        "SELECT i.instance, i.heartbeat_at, CONVERT(BIT, CASE WHEN f.fenced_at IS NULL THEN 0 ELSE 1 END),
             CONVERT(BIT, CASE WHEN i.locked_in = {LIFETIME} AND i.locked_in <> N'{HIDDEN}' THEN 1 ELSE 0 END),
             CONVERT(BIT, APPLOCK_TEST(N'public', i.lock_name, N'Exclusive', N'Session')), i.comeback_ms, i.expiry_ms, i.kinds
         FROM {schema}.instances AS i LEFT JOIN {schema}.fences AS f ON f.instance = i.instance
         WHERE i.namespace = {namespace} AND i.instance <> {me}"
    ));
    sql
}

pub(crate) fn peer(row: &Row, locks_are_real: bool) -> Result<Peer> {
    let (said_held, free): (bool, bool) = (get(row, 3)?, get(row, 4)?);
    let lock = match (locks_are_real && said_held, free) {
        (true, false) => LockState::Held,
        (true, true) => LockState::Free,
        (false, _) => LockState::Unknown,
    };
    let instance = maybe_id(row, 0)?.map(InstanceId).ok_or_else(|| StorageError::schema("an instance has no id"))?;
    let (comeback, expiry) = (millis(get(row, 5)?), millis(get(row, 6)?));
    let kinds = get::<&str>(row, 7).ok().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    Ok(Peer { instance, heartbeat_at: time(row, 1)?, lock, fenced: get(row, 2)?, comeback, expiry, kinds })
}

pub(crate) async fn enlist(shared: &Arc<Shared>, new: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
    let life = Life { shared: shared.clone(), instance: new.id, comeback_ms: AtomicI64::new(0) };
    let mut session = life.begin().await?;
    let rows = life.enter(new)?.run(&mut session, Commits::No).await?.rows();
    let now = rows.first().map(|row| time(row, 0)).transpose()?;
    let now = now.ok_or_else(|| StorageError::schema("the database did not tell its time"))?;
    let (orders, ordered) = mpsc::channel(1);
    let task = tokio::spawn(life.keep(session, ordered));
    Ok((Box::new(MssqlHeart { orders, task }), now))
}

/// Keeps an instance's lock, and its heartbeat.
pub(crate) struct Life {
    pub(crate) shared: Arc<Shared>,
    pub(crate) instance: InstanceId,
    /// How long a session that holds the lock took to be had, at most.
    pub(crate) comeback_ms: AtomicI64,
}

type Order = oneshot::Sender<Result<DateTime<Utc>>>;

impl Life {
    /// A new session, which holds the lock if it is free: the server may not have noticed yet that an earlier one is gone.
    async fn begin(&self) -> Result<Session> {
        let since = Instant::now();
        let mut session = self.shared.sessions.own().await?;
        if self.shared.locks {
            self.lock().run(&mut session, Commits::No).await?;
        }
        let took = i64::try_from(since.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.comeback_ms.fetch_max(took, Ordering::Relaxed);
        Ok(session)
    }

    fn lock(&self) -> Sql {
        let mut sql = Sql::default();
        let lock = sql.text(lock(&self.shared.schema, self.instance.0));
        sql.push(format!("IF NOT {} {}", holds(&lock), take(&lock)));
        sql
    }

    /// The server's run, if this session holds the lock; else null.
    fn locked_in(&self, sql: &mut Sql) -> String {
        if !self.shared.locks {
            return "NULL".to_owned();
        }
        let lock = sql.text(lock(&self.shared.schema, self.instance.0));
        format!("CASE WHEN {} THEN {LIFETIME} END", holds(&lock))
    }

    /// The instance's rows, unless they are there.
    pub(crate) fn enter(&self, new: &NewInstance) -> Result<Sql> {
        let mut sql = Sql::default();
        let (me, namespace, label) = (sql.id(new.id.0), sql.text(&*new.namespace), sql.text(&*new.label));
        let kinds = sql.text(serde_json::to_string(&new.kinds).map_err(StorageError::refused)?);
        let lock = sql.text(lock(&self.shared.schema, new.id.0));
        let comeback = sql.number(self.comeback_ms.load(Ordering::Relaxed));
        let expiry = sql.number(new.expiry_ms());
        let (schema, locked_in) = (&self.shared.schema, self.locked_in(&mut sql));
        sql.push(format!("DECLARE @me BINARY(16) = {me}, @now DATETIME2(6) = SYSUTCDATETIME()"));
        sql.push("BEGIN TRANSACTION");
        sql.push(format!(
            "INSERT INTO {schema}.fences (instance, generation) SELECT @me, 0
             WHERE NOT EXISTS (SELECT 1 FROM {schema}.fences AS f WHERE f.instance = @me)"
        ));
        sql.push(format!(
            "INSERT INTO {schema}.instances (instance, namespace, label, kinds, started_at, heartbeat_at, lock_name,
                 locked_in, comeback_ms, expiry_ms)
             SELECT @me, {namespace}, {label}, {kinds}, @now, @now, {lock}, {locked_in}, {comeback}, {expiry}
             WHERE NOT EXISTS (SELECT 1 FROM {schema}.instances AS i WHERE i.instance = @me)"
        ));
        sql.push("COMMIT TRANSACTION");
        sql.push("SELECT SYSUTCDATETIME()");
        Ok(sql)
    }

    /// One heartbeat. It changes the row first, which a fence keeps from changing, and then looks for one: it is not
    /// acknowledged once the fence stands. Answers with the time and whether the session holds the lock, as it has told
    /// the others; with nothing if the instance is fenced.
    pub(crate) fn beat(&self) -> Sql {
        let mut sql = Sql::default();
        let (me, locked_in) = (sql.id(self.instance.0), self.locked_in(&mut sql));
        let comeback = sql.number(self.comeback_ms.load(Ordering::Relaxed));
        let schema = &self.shared.schema;
        sql.push(format!("DECLARE @me BINARY(16) = {me}, @locked_in NVARCHAR(64) = {locked_in}"));
        sql.push("BEGIN TRANSACTION");
        sql.push(format!(
            "UPDATE i SET heartbeat_at = SYSUTCDATETIME(), locked_in = @locked_in, comeback_ms = {comeback}
             FROM {schema}.instances AS i WHERE i.instance = @me"
        ));
        sql.push(format!(
            "IF EXISTS (SELECT 1 FROM {schema}.fences AS f WHERE f.instance = @me AND f.fenced_at IS NULL)
             BEGIN
                 COMMIT TRANSACTION;
                 SELECT i.heartbeat_at, CONVERT(BIT, CASE WHEN @locked_in IS NULL THEN 0 ELSE 1 END)
                     FROM {schema}.instances AS i WHERE i.instance = @me;
             END
             ELSE ROLLBACK TRANSACTION"
        ));
        sql
    }

    async fn one_beat(&self, session: &mut Session) -> Result<(DateTime<Utc>, bool)> {
        let rows = self.beat().run(session, Commits::No).await?.rows();
        let row = rows.first().ok_or(StorageError::Fenced)?;
        Ok((time(row, 0)?, get(row, 1)?))
    }

    async fn beat_and_lock(&self, session: &mut Session) -> Result<DateTime<Utc>> {
        let (at, held) = self.one_beat(session).await?;
        if held || !self.shared.locks {
            return Ok(at);
        }
        self.lock().run(session, Commits::No).await?;
        Ok(self.one_beat(session).await?.0)
    }

    /// Beats when it is told to, and whenever the session had to be begun anew.
    async fn keep(self, session: Session, mut orders: mpsc::Receiver<Order>) {
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

/// Returns when the session's connection has ended; if there is none, when it is time to begin another one.
async fn lost(session: &mut Option<Session>, pause: Duration) {
    match session {
        Some(idle) => {
            idle.socket().ended().await;
            *session = None;
        }
        None => tokio::time::sleep(pause).await,
    }
}

/// Its orders go to the task that keeps the session. With it the session ends.
struct MssqlHeart {
    orders: mpsc::Sender<Order>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for MssqlHeart {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[async_trait]
impl Heart for MssqlHeart {
    async fn beat(&mut self) -> Result<DateTime<Utc>> {
        let gone = || StorageError::unavailable("the heart's task has ended");
        let (order, beat) = oneshot::channel();
        self.orders.send(order).await.map_err(|_| gone())?;
        beat.await.map_err(|_| gone())?
    }
}
