use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::chores;
use durable_core::storage::housekeeping::{self, Housekeeping, Todo};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, NewInstance, Outcome, Peer, Peers, Poll, Polled,
    ProcessRow, Record, RecordKey, Result, RunId, Scales, Storage, StorageError,
};
use serde_json::json;
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Mutex;

use crate::Sqlite;
use crate::breath::Breath;
use crate::errors::{is_busy, named, reading};
use crate::files::Files;
use crate::lend::Single;
use crate::life::Lives;
use crate::rows::{self, boxed, get, time};
use crate::script::{Answer, Arg, NOW, Script};
use crate::{batch, fence, heart, reads};

/// Behind every clone of a [`Sqlite`].
pub(crate) struct Shared {
    pub(crate) options: SqliteConnectOptions,
    /// The one connection that writes, in the order of those who wait for it.
    pub(crate) writer: Single,
    /// For the service's own transactions, in the writer's turn. Another one, because what a service's SQL leaves on a
    /// connection (a temporary table, say) must not meet the engine's.
    pub(crate) transactor: Single,
    pub(crate) readers: SqlitePool,
    /// For lists and counts, which may take long: they must not keep the engine from reading.
    pub(crate) browsers: SqlitePool,
    pub(crate) watcher: Mutex<Watcher>,
    pub(crate) files: Arc<Files>,
    pub(crate) lives: Lives,
    /// How many heartbeats of this program wait for the write lock: batches let them pass. Shared because a heartbeat has a
    /// connection and a thread of its own.
    pub(crate) hearts_waiting: AtomicUsize,
    pub(crate) breath: Breath,
}

/// Notices other connections' commits.
pub(crate) struct Watcher {
    connection: SqliteConnection,
    /// The journal's length and time at the last look.
    journal: Option<(u64, SystemTime)>,
    /// `PRAGMA data_version` at the last look.
    version: u64,
}

impl Watcher {
    pub(crate) fn new(connection: SqliteConnection) -> Self {
        Self { connection, journal: None, version: 0 }
    }

    /// A number that changes with every commit of another connection. The journal's length and time tell at next to no
    /// cost that somebody wrote; whether that was a commit, SQLite says.
    async fn look(&mut self, journal: &Path) -> u64 {
        let written = std::fs::metadata(journal).and_then(|file| Ok((file.len(), file.modified()?))).ok();
        if written == self.journal {
            return self.version;
        }
        self.journal = written;
        let mut script = Script::default();
        script.add("PRAGMA data_version", []);
        if let Ok(answers) = script.run(&mut self.connection).await {
            let version = all(&answers).next().and_then(|row| get::<i64>(row, 0).ok());
            self.version = version.unwrap_or(0).unsigned_abs();
        }
        self.version
    }
}

impl Shared {
    /// Runs a script that writes. A lock that another program holds is waited for, in short tries: SQLite's own waiting
    /// sleeps longer and longer and is not fair.
    pub(crate) async fn write(&self, script: impl Fn() -> Script) -> Result<Vec<Answer>> {
        let mut lent = self.writer.lend(&self.options, &self.files).await?;
        self.let_hearts_pass().await;
        let result = patiently(script, &mut lent.connection).await;
        lent.done(result)
    }

    /// Runs a script of one statement, and says how many rows it changed.
    async fn change(&self, script: impl Fn() -> Script) -> Result<u64> {
        Ok(self.write(script).await?.first().map_or(0, |answer| answer.changes))
    }

    pub(crate) async fn let_hearts_pass(&self) {
        let since = Instant::now();
        while self.hearts_waiting.load(Ordering::Acquire) > 0 && since.elapsed() < Duration::from_millis(100) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn read_in(
        &self,
        pool: &SqlitePool,
        statements: impl IntoIterator<Item = (String, Vec<Arg>)>,
    ) -> Result<Vec<Answer>> {
        let answers = read(pool, statements).await.map_err(|error| self.named(error))?;
        self.files.check().map_err(StorageError::unavailable)?;
        Ok(answers)
    }

    pub(crate) fn named(&self, error: StorageError) -> StorageError {
        named(self.options.get_filename(), error)
    }

    /// Runs statements that read one snapshot.
    pub(crate) async fn read(&self, statements: impl IntoIterator<Item = (String, Vec<Arg>)>) -> Result<Vec<Answer>> {
        self.read_in(&self.readers, statements).await
    }

    /// The same, as long as their rows are welcome.
    async fn read_while(
        &self,
        statements: Vec<(String, Vec<Arg>)>,
        welcome: impl FnMut(usize, &SqliteRow) -> bool + Send + 'static,
    ) -> Result<Option<Vec<Answer>>> {
        let answers = read_while(&self.readers, statements, Box::new(welcome)).await;
        let answers = answers.map_err(|error| self.named(error))?;
        self.files.check().map_err(StorageError::unavailable)?;
        Ok(answers)
    }

    /// Runs a statement that may go through many rows.
    async fn browse(&self, statement: (String, Vec<Arg>)) -> Result<Vec<Answer>> {
        self.read_in(&self.browsers, [statement]).await
    }
}

/// Says of a row of the nth statement whether it is welcome.
type Welcome = Box<dyn FnMut(usize, &SqliteRow) -> bool + Send>;

/// Runs statements that read one snapshot, as long as their rows are welcome.
async fn read_while(
    pool: &SqlitePool,
    statements: Vec<(String, Vec<Arg>)>,
    mut welcome: Welcome,
) -> Result<Option<Vec<Answer>>> {
    let mut connection = pool.acquire().await.map_err(reading)?;
    let mut script = Script::default();
    script.add("BEGIN", []);
    for (sql, args) in statements {
        script.add(&sql, args);
    }
    script.add("COMMIT", []);
    // In a task of its own: its reader may go away, its transaction must not stay.
    let read = tokio::spawn(async move { script.run_while(&mut connection, |nth, row| welcome(nth - 1, row)).await });
    let answers = read.await.map_err(StorageError::unavailable)??;
    Ok(answers.map(|mut answers| {
        answers.pop();
        answers.remove(0);
        answers
    }))
}

async fn read(pool: &SqlitePool, statements: impl IntoIterator<Item = (String, Vec<Arg>)>) -> Result<Vec<Answer>> {
    let mut statements: Vec<_> = statements.into_iter().collect();
    if let [(sql, args)] = &mut statements[..] {
        // One statement is a snapshot by itself, and leaves nothing open if its reader goes away.
        let mut connection = pool.acquire().await.map_err(reading)?;
        let mut script = Script::default();
        script.add(sql, std::mem::take(args));
        return script.run(&mut connection).await;
    }
    Ok(read_while(pool, statements, Box::new(|_, _| true)).await?.unwrap_or_default())
}

/// How long a call waits for a lock that another program holds, before it says that the storage is not available.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) async fn patiently(script: impl Fn() -> Script, connection: &mut SqliteConnection) -> Result<Vec<Answer>> {
    let since = Instant::now();
    loop {
        match script().run(connection).await {
            Err(StorageError::Unavailable(why)) if is_busy(&*why) && since.elapsed() < PATIENCE => {}
            answer => return answer,
        }
    }
}

#[async_trait]
impl Housekeeping for Sqlite {
    async fn look(&self, poll: &Poll) -> Result<(Polled, Todo)> {
        let watched: Vec<String> = poll.watched.iter().map(ToString::to_string).collect();
        let answers = self
            .0
            .read([(
                format!(
                    "SELECT 'now', NULL, {NOW}, NULL
                     UNION ALL
                     SELECT 'due', k.value, (SELECT min(p.wake_at) FROM durable_processes p WHERE p.namespace = ?
                         AND p.kind = k.value AND p.status = 'waiting' AND p.wake_at IS NOT NULL), NULL
                     FROM json_each(?) k
                     UNION ALL
                     SELECT 'chores', NULL, NULL, NULL WHERE EXISTS (SELECT 1 FROM durable_chores WHERE due_at <= {NOW})
                     UNION ALL
                     SELECT 'signalled', run, NULL, signals FROM durable_processes WHERE owner = ? AND signalled = 1
                     UNION ALL
                     SELECT 'ended', w.value, NULL, NULL FROM json_each(?) w LEFT JOIN durable_processes p
                         ON p.run = w.value WHERE p.status IS NULL OR p.status IN ('completed', 'failed', 'cancelled')"
                ),
                vec![
                    (&*poll.namespace).into(),
                    json!(poll.kinds).to_string().into(),
                    poll.instance.to_string().into(),
                    json!(watched).to_string().into(),
                ],
            )])
            .await?;
        let mut polled = Polled::default();
        let mut todo = Todo::default();
        for row in all(&answers) {
            match get::<&str>(row, 0)? {
                "now" => polled.now = time("now", get(row, 2)?)?,
                "chores" => todo.chores = true,
                "due" => {
                    // A time that somebody has written in another form is due: the claim clears it away.
                    if let Some(at) = get::<Option<&str>>(row, 2)? {
                        polled.due.push((boxed(get(row, 1)?), time("wake_at", at).unwrap_or(polled.now)));
                    }
                }
                "signalled" => polled.signalled.extend(readable(rows::run(row, 1)).zip(get(row, 3).ok())),
                _ => polled.ended.extend(readable(rows::run(row, 1))),
            }
        }
        Ok((polled, todo))
    }

    /// There is no inbox: a service's transaction writes its starts and messages itself.
    async fn move_on(&self, _: &str) -> Result<bool> {
        Ok(false)
    }

    async fn work(&self) -> Result<bool> {
        chores::work(&mut batch::All(&self.0)).await
    }
}

#[async_trait]
impl Storage for Sqlite {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        Some(self)
    }

    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        heart::enlist(&self.0, instance).await
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        let refenced = self.0.change(|| fence::refence(instance, generation)).await?;
        if refenced == 1 { Ok(()) } else { Err(StorageError::Fenced) }
    }

    fn prepare(&self, batch: &Batch) {
        batch::prepare(batch);
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        let mut lent = self.0.writer.lend(&self.0.options, &self.0.files).await?;
        self.0.let_hearts_pass().await;
        if let Some(pause) = self.0.breath.pause(Instant::now()) {
            tokio::time::sleep(pause).await;
        }
        let since = Instant::now();
        loop {
            match batch::commit(&mut lent.connection, batch).await {
                Err(StorageError::Unavailable(why)) if is_busy(&*why) && since.elapsed() < PATIENCE => {}
                answer => {
                    self.0.breath.wrote(Instant::now());
                    return lent.done(answer);
                }
            }
        }
    }

    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        let mut scales = Scales::of(load);
        let welcome = move |statement: usize, row: &SqliteRow| scales.add(reads::weight(statement, row));
        let answers = self.0.read_while(reads::load(load), welcome).await?;
        let loaded = answers.map(|answers| reads::loaded(load, &answers)).transpose();
        loaded.map_err(|error| self.0.named(error))
    }

    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        reads::weights(&self.0.read([reads::weigh(load)]).await?)
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        let after = after.map(|run| run.to_string()).unwrap_or_default();
        let sql = "SELECT run, claim FROM durable_processes WHERE owner = ? AND run > ? ORDER BY run LIMIT ?";
        let args = vec![instance.to_string().into(), after.into(), limit_arg(limit)];
        let answers = self.0.read([(sql.to_owned(), args)]).await?;
        Ok(all(&answers).filter_map(|row| readable(rows::run(row, 0)).zip(get(row, 1).ok())).collect())
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        housekeeping::poll(self, poll).await
    }

    async fn changed(&self, cursor: &mut u64, at_most: Duration) {
        const LOOK: Duration = Duration::from_millis(25);
        let end = tokio::time::Instant::now() + at_most;
        loop {
            let now = tokio::time::Instant::now();
            let version = self.0.watcher.lock().await.look(self.0.files.journal()).await;
            if now >= end || std::mem::replace(cursor, version) != version {
                return;
            }
            tokio::time::sleep_until(end.min(now + LOOK)).await;
        }
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        heart::peers(&self.0, namespace, me).await
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        Ok(self.0.change(|| fence::fence(seen)).await? == 1)
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        let released = self.0.change(|| fence::release(fenced, limit)).await?;
        if released == 0 {
            self.0.write(|| fence::forget(fenced)).await?;
            self.0.lives.remove(fenced);
        }
        usize::try_from(released).map_err(StorageError::schema)
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.0.change(|| fence::end(instance)).await?;
        while self.release(instance, 10_000).await? > 0 {}
        Ok(())
    }

    async fn reinstate(&self) -> Result<usize> {
        let answers = self.0.read([fence::strangers()]).await?;
        let strangers: Vec<&SqliteRow> = all(&answers).collect();
        for row in &strangers {
            let written: Result<&str> = get(row, 1);
            let instance = written.and_then(|text| Ok((text, rows::id::<InstanceId>("instance", text)?)));
            match instance {
                Ok((text, instance)) if text == instance.to_string() => {
                    let answers = self.0.write(|| fence::reinstate(instance)).await?;
                    // Of a fence alone nothing is left.
                    if answers.iter().rev().nth(1).is_some_and(|removed| removed.changes > 0) {
                        self.0.lives.remove(instance);
                    }
                }
                // Nobody can be called that, so there is nobody to fence off.
                _ => {
                    let bytes: &str = get(row, 0)?;
                    self.0.change(|| fence::release_all(bytes)).await?;
                }
            }
        }
        Ok(strangers.len())
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        let columns = rows::found();
        let query = match run {
            Some(run) => (
                format!("SELECT {columns} FROM durable_processes p WHERE p.run = ? AND p.namespace = ? AND p.id = ?"),
                vec![run.to_string().into(), namespace.into(), id.into()],
            ),
            None => (
                format!(
                    "SELECT {columns} FROM durable_processes p WHERE p.namespace = ? AND p.id = ? AND p.current = 1"
                ),
                vec![namespace.into(), id.into()],
            ),
        };
        let answers = self.0.read([query]).await?;
        all(&answers).next().map(rows::process).transpose()
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        let sql = format!(
            "SELECT {} FROM durable_steps s WHERE s.run = ? AND s.scope = ? AND s.name = ? AND s.key = ?",
            rows::RECORD
        );
        let args = vec![run.to_string().into(), (key.scope as i64).into(), (&*key.name).into(), (&*key.key).into()];
        let answers = self.0.read([(sql, args)]).await?;
        all(&answers).next().map(|row| rows::record(row).map(|(_, record)| record)).transpose()
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        let (conditions, mut args) = filtered(namespace, filter);
        args.push(limit_arg(filter.limit));
        let sql =
            format!("SELECT {} FROM durable_processes p WHERE {conditions} ORDER BY p.run LIMIT ?", rows::listed());
        let answers = self.0.browse((sql, args)).await?;
        Ok(all(&answers).filter_map(|row| readable(rows::process(row))).collect())
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        let (conditions, mut args) = filtered(namespace, filter);
        args.insert(0, namespace.into());
        let sql = format!(
            "SELECT p.kind, p.status, count(*), EXISTS (SELECT 1 FROM durable_instances i
                 CROSS JOIN json_each(CASE WHEN json_valid(i.kinds) THEN i.kinds ELSE '[]' END) k
                 LEFT JOIN durable_fences f ON f.instance = i.instance
                 WHERE i.namespace = ? AND f.fenced_at IS NULL AND k.value = p.kind)
             FROM durable_processes p WHERE {conditions} GROUP BY p.kind, p.status ORDER BY p.kind, p.status"
        );
        let answers = self.0.browse((sql, args)).await?;
        let counted = |row: &SqliteRow| {
            let count = u64::try_from(get::<i64>(row, 2)?).map_err(StorageError::schema)?;
            Ok(Counted { kind: boxed(get(row, 0)?), status: rows::status(get(row, 1)?)?, count, served: get(row, 3)? })
        };
        Ok(all(&answers).filter_map(|row| readable(counted(row))).collect())
    }
}

/// A row that cannot be understood is left out, and told: it must not hide the others.
pub(crate) fn readable<T>(row: Result<T>) -> Option<T> {
    row.inspect_err(|why| tracing::error!("a row is left out: {why}")).ok()
}

pub(crate) fn all(answers: &[Answer]) -> impl Iterator<Item = &SqliteRow> {
    answers.iter().flat_map(|answer| &answer.rows)
}

pub(crate) fn now_in(answers: &[Answer]) -> Result<DateTime<Utc>> {
    let row = all(answers).next().ok_or_else(|| StorageError::schema("the database did not tell its time"))?;
    time("now", get(row, 0)?)
}

pub(crate) fn limit_arg(limit: usize) -> Arg {
    i64::try_from(limit).unwrap_or(-1).into()
}

fn filtered(namespace: &str, filter: &Filter) -> (String, Vec<Arg>) {
    let mut conditions = "p.namespace = ?".to_owned();
    let mut args: Vec<Arg> = vec![namespace.into()];
    let mut and = |condition: &str, arg: Option<Arg>| {
        if let Some(arg) = arg {
            conditions.push_str(" AND ");
            conditions.push_str(condition);
            args.push(arg);
        }
    };
    and("p.kind = ?", filter.kind.as_deref().map(Arg::from));
    and("p.status = ?", filter.status.map(|status| status.as_str().into()));
    and("p.status_at <= ?", filter.unchanged_since.map(|since| crate::time_text(since).into()));
    and("p.run > ?", filter.after.map(|run| run.to_string().into()));
    (conditions, args)
}
