//! Hints between instances: `NOTIFY` after a commit that concerns others, `LISTEN` on a connection of its own. What is
//! missed is found by polling.

use chrono::{TimeDelta, Utc};
use durable_core::storage::{Batch, Op, Outcome, Raised};
use sqlx::AssertSqlSafe;
use sqlx::Executor;
use sqlx::postgres::PgListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::errors::code;
use crate::heart::listener;
use crate::lend::{unavailable, within};
use crate::names::Schema;
use crate::sql::{Commits, Sql};
use crate::store::Shared;

/// Between two hints: `NOTIFY` takes a lock of the whole server when it commits.
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) struct Hints {
    channel: String,
    enabled: bool,
    /// Counts what was heard.
    heard: watch::Sender<u64>,
    listening: Mutex<Option<JoinHandle<()>>>,
    /// Somebody is to be told.
    untold: AtomicBool,
    /// A task is telling.
    telling: AtomicBool,
    /// Other instances were there at the last look.
    company: AtomicBool,
}

impl Hints {
    pub(crate) fn new(schema: &Schema, enabled: bool) -> Self {
        Self {
            channel: schema.tag(),
            enabled,
            heard: watch::Sender::new(1),
            listening: Mutex::default(),
            untold: AtomicBool::new(false),
            telling: AtomicBool::new(false),
            company: AtomicBool::new(true),
        }
    }

    /// Whether there is anybody to tell. Who comes between two looks polls.
    pub(crate) fn has_company(&self, company: bool) {
        self.company.store(company, Ordering::Relaxed);
    }

    /// Has the others told that something was written: after its commit, outside of its transaction, at most one hint at
    /// a time.
    pub(crate) fn tell(shared: &Arc<Shared>) {
        let hints = &shared.hints;
        if !hints.enabled || !hints.company.load(Ordering::Relaxed) {
            return;
        }
        hints.untold.store(true, Ordering::SeqCst);
        if !hints.telling.swap(true, Ordering::SeqCst) {
            tokio::spawn(Telling(Some(shared.clone())).tell());
        }
    }

    /// See [`Storage::changed`](durable_core::storage::Storage::changed).
    pub(crate) async fn changed(shared: &Arc<Shared>, cursor: &mut u64, at_most: Duration) {
        let hints = &shared.hints;
        hints.listen(shared);
        let mut versions = hints.heard.subscribe();
        let seen = *cursor;
        if let Ok(Ok(version)) = tokio::time::timeout(at_most, versions.wait_for(|version| *version != seen)).await {
            *cursor = *version;
        }
    }

    /// Sees to it that somebody listens. On the runtime of who asks: one that has gone took its listener with it.
    fn listen(&self, shared: &Arc<Shared>) {
        if !self.enabled {
            return;
        }
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if listening.as_ref().is_none_or(JoinHandle::is_finished) {
            *listening = Some(tokio::spawn(listen(Arc::downgrade(shared))));
        }
    }

    fn hear(&self) {
        self.heard.send_modify(|version| *version += 1);
    }
}

impl Drop for Hints {
    fn drop(&mut self) {
        if let Some(task) = self.listening.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

/// Whoever holds it tells; dropped on the way, another may.
struct Telling(Option<Arc<Shared>>);

impl Telling {
    async fn tell(mut self) {
        while let Some(shared) = &self.0 {
            while shared.hints.untold.swap(false, Ordering::SeqCst) {
                if let Err(error) = notify(shared).await {
                    tracing::debug!("other instances could not be told: {error}");
                }
                tokio::time::sleep(PAUSE).await;
            }
            shared.hints.telling.store(false, Ordering::SeqCst);
            // Said between the last look and this moment, by somebody who saw that somebody was telling.
            if !shared.hints.untold.load(Ordering::SeqCst) || shared.hints.telling.swap(true, Ordering::SeqCst) {
                self.0 = None;
            }
        }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.hints.telling.store(false, Ordering::SeqCst);
        }
    }
}

async fn notify(shared: &Shared) -> durable_core::storage::Result<()> {
    let mut lent = shared.connections.lend().await?;
    let mut sql = Sql::default();
    let channel = sql.bind(&*shared.hints.channel);
    sql.text = format!("SELECT pg_notify({channel}, '')");
    let bound = shared.connections.bounds().answer();
    let result = within(bound, unavailable, sql.run(&mut lent.connection, Commits::No)).await;
    lent.done(result).map(|_| ())
}

/// Listens until the storage is gone. Where nothing can be heard it tries again now and then: it may have been an
/// exceptionally slow moment.
async fn listen(shared: Weak<Shared>) {
    const LONGEST: Duration = Duration::from_secs(5);
    const DEAF: Duration = Duration::from_secs(300);
    let mut told = false;
    let mut pause = PAUSE;
    let mut tested = false;
    loop {
        let begun = match shared.upgrade() {
            Some(shared) => begin(&shared, &mut tested).await,
            None => return,
        };
        match begun {
            Ok(Some(mut listening)) => {
                pause = PAUSE;
                // What was missed while nobody listened.
                if let Some(shared) = shared.upgrade() {
                    shared.hints.hear();
                }
                while let Ok(Some(_)) = listening.try_recv().await {
                    let Some(shared) = shared.upgrade() else { return };
                    shared.hints.hear();
                }
            }
            Ok(None) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "this program does not hear notifications (a transaction-mode pooler, or a database without \
                         them?): it finds what others wrote by polling"
                    );
                }
                tokio::time::sleep(DEAF).await;
            }
            Err(error) => tracing::debug!("listening failed: {error}"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST);
    }
}

/// None if what this program says to itself is not heard.
async fn begin(shared: &Shared, tested: &mut bool) -> Result<Option<PgListener>, String> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut listening = listener(shared.connections.options()).await.map_err(|e| text(&e))?;
    let channel = &shared.hints.channel;
    // The channel's name is made of the schema's checked one.
    match listening.execute(AssertSqlSafe(format!("LISTEN \"{channel}\""))).await {
        // The database does not know the statement.
        Err(error) if code(&error).is_some_and(|code| ["0A", "42"].iter().any(|class| code.starts_with(class))) => {
            return Ok(None);
        }
        listens => listens.map_err(|e| text(&e))?,
    };
    if !*tested {
        notify(shared).await.map_err(|e| text(&e))?;
        match tokio::time::timeout(PATIENCE, listening.try_recv()).await {
            Ok(Ok(Some(_))) => *tested = true,
            Ok(Ok(None)) => return Err("the connection was lost".to_owned()),
            Ok(Err(error)) => return Err(text(&error)),
            Err(_) => return Ok(None),
        }
    }
    Ok(Some(listening))
}

/// By this program's clock: it may be wrong by that much.
const SOON: TimeDelta = TimeDelta::seconds(5);

/// Whether a batch has written something that another instance may be waiting for. In case of doubt it has.
pub(crate) fn concerns_others(batch: &Batch, outcomes: &[Outcome]) -> bool {
    batch.ops.iter().zip(outcomes).any(|(op, outcome)| match (op, outcome) {
        (Op::Spawn(spawn), Outcome::Spawned(spawned)) => !spawn.take && !spawned.existed,
        (Op::Record(_), Outcome::Spawned(spawned)) => !spawned.existed,
        (_, Outcome::Raised(raised)) => matches!(raised, Raised::Delivered { mine: false, .. }),
        // Its output may be awaited through a handle elsewhere.
        (Op::Finish(_), Outcome::Finished { .. }) => true,
        // One that is due later is found by polling until then.
        (Op::Park(park), Outcome::Recorded) => park.wake_at.is_some_and(|at| at <= Utc::now() + SOON),
        (Op::Order(_), _) => true,
        _ => false,
    })
}
