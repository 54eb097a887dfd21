use durable_core::storage::{Result, StorageError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Row};
use std::future::{Future, IntoFuture};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

use crate::Sqlite;
use crate::breath::Breath;
use crate::errors::{is_busy, named, reading};
use crate::files::Files;
use crate::lend::Single;
use crate::life::Lives;
use crate::migrate;
use crate::store::{Shared, Watcher};

/// How a SQLite database is opened, to be awaited. See [`Sqlite::open`].
#[derive(Clone)]
#[must_use = "nothing is opened before it is awaited"]
pub struct Open {
    url: String,
    synchronous: SqliteSynchronous,
    verify_only: bool,
    readers: u32,
}

impl Open {
    pub(crate) fn new(url: String) -> Self {
        Self { url, synchronous: SqliteSynchronous::Full, verify_only: false, readers: 4 }
    }

    /// `PRAGMA synchronous = NORMAL` instead of `FULL`.
    ///
    /// # What it risks
    /// After a **power failure** or a crash of the operating system the last commits may be gone: steps that were
    /// recorded run again, and what others were told is undone. The database itself stays whole, and a crash of the
    /// program alone loses nothing.
    pub fn synchronous_normal(mut self) -> Self {
        self.synchronous = SqliteSynchronous::Normal;
        self
    }

    /// Checks the schema and refuses it if it does not fit, instead of bringing it up to date.
    pub fn verify_only(mut self) -> Self {
        self.verify_only = true;
        self
    }

    /// How many connections read beside the one that writes; 4 by default.
    pub fn readers(mut self, readers: u32) -> Self {
        self.readers = readers.max(1);
        self
    }

    /// Options that fit for the service's own connections to the same file.
    fn options(&self) -> Result<SqliteConnectOptions> {
        let options = if self.url.starts_with("sqlite:") {
            SqliteConnectOptions::from_str(&self.url).map_err(|e| {
                StorageError::schema(format!(
                    "{:?} is not a SQLite address: {e}; give a path or `sqlite://path`",
                    self.url
                ))
            })?
        } else if let Some((scheme, _)) = self.url.split_once("://") {
            return Err(StorageError::schema(format!(
                "{scheme:?} is not SQLite's; give a path or `sqlite://path`, or use the storage of that database"
            )));
        } else {
            SqliteConnectOptions::new().filename(&self.url)
        };
        if self.url.contains(":memory:") || self.url.contains("mode=memory") {
            return Err(StorageError::schema(
                "a SQLite database in memory does not outlive the program; give a file, or use `memory::Memory` in tests",
            ));
        }
        Ok(options
            .create_if_missing(!self.verify_only)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(self.synchronous)
            .foreign_keys(false)
            .statement_cache_capacity(256)
            // A transaction's rows must fit, or the database's thread would wait for this program in the middle of it.
            .row_buffer_size(65_536)
            .log_statements(tracing::log::LevelFilter::Trace)
            .log_slow_statements(tracing::log::LevelFilter::Debug, Duration::from_secs(1)))
    }

    /// Opens the file. Other programs that open, migrate or recover it at the same time are waited for.
    async fn open(self) -> Result<Sqlite> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let since = Instant::now();
        loop {
            match self.open_once().await {
                Err(StorageError::Unavailable(why)) if is_busy(&*why) && since.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                opened => return opened,
            }
        }
    }

    async fn open_once(&self) -> Result<Sqlite> {
        let options = self.options()?;
        let path = options.get_filename().to_owned();
        is_whole(&path)?;
        let explain = |error: sqlx::Error| explain(&path, error);
        // The file is only ever opened by SQLite: closing it by other means would drop SQLite's own locks on it.
        let mut writer = connect(&options).await.map_err(explain)?;
        // One name for all programs, whatever links they came by, and whatever folder this one changes to.
        let path = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        let options = options.filename(&path);
        let version: String =
            sqlx::query("SELECT sqlite_version()").fetch_one(&mut writer).await.map_err(explain)?.get(0);
        if !is_recent(&version) {
            return Err(StorageError::schema(format!(
                "this program is linked with SQLite {version}; 3.51 or later is needed (sqlx's `sqlite` feature bundles one)"
            )));
        }
        let mode: String = sqlx::query("PRAGMA journal_mode").fetch_one(&mut writer).await.map_err(explain)?.get(0);
        if !mode.eq_ignore_ascii_case("wal") {
            return Err(StorageError::schema(format!(
                "{} is in journal mode {mode}, and WAL is not possible there (a network file system?)",
                path.display()
            )));
        }
        if self.verify_only { migrate::verify(&mut writer).await } else { migrate::migrate(&mut writer).await }
            .map_err(|error| named(&path, error))?;
        may_write(&mut writer).await.map_err(explain)?;
        let page: i64 = sqlx::query("PRAGMA page_size").fetch_one(&mut writer).await.map_err(explain)?.get(0);
        let files = Arc::new(Files::opened(&path, with_suffix(&path, "-wal"), page.unsigned_abs()));
        files.check().map_err(StorageError::unavailable)?;
        let readers = SqlitePoolOptions::new()
            .max_connections(self.readers)
            .acquire_timeout(Duration::from_secs(10))
            .connect_with(options.clone().busy_timeout(Duration::from_secs(5)))
            .await
            .map_err(explain)?;
        let browsers = SqlitePoolOptions::new()
            .max_connections(2)
            .min_connections(0)
            .connect_lazy_with(options.clone().busy_timeout(Duration::from_secs(5)));
        let watcher = connect(&options).await.map_err(explain)?;
        Ok(Sqlite(Arc::new(Shared {
            lives: Lives::beside(&path),
            files,
            options,
            writer: Single::new(writer),
            transactor: Single::default(),
            readers,
            browsers,
            watcher: Mutex::new(Watcher::new(watcher)),
            hearts_waiting: AtomicUsize::new(0),
            breath: Breath::new(Instant::now()),
        })))
    }
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the address: it may be meant for another database, and hold a password.
        f.debug_struct("Open").field("verify_only", &self.verify_only).finish_non_exhaustive()
    }
}

impl IntoFuture for Open {
    type Output = Result<Sqlite>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.open())
    }
}

/// A connection that waits only briefly for a lock: who calls tries again, so that nobody sleeps for long while the
/// lock is free. Opening it is tried for as long as others open, recover or migrate the file.
pub(crate) async fn connect(options: &SqliteConnectOptions) -> sqlx::Result<SqliteConnection> {
    const PATIENCE: Duration = Duration::from_secs(10);
    const BUSY: i32 = 5;
    let since = Instant::now();
    loop {
        match options.clone().busy_timeout(Duration::from_millis(50)).connect().await {
            Err(error)
                if crate::errors::code(&error).is_some_and(|code| code & 0xff == BUSY)
                    && since.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            connected => return connected,
        }
    }
}

/// Whether this program may write at all: SQLite opens what it may only read, and tells whoever writes there later.
async fn may_write(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    const BUSY: i32 = 5;
    // (`BEGIN IMMEDIATE` only begins to read there.)
    match sqlx::query("DELETE FROM durable_audit WHERE 0").execute(connection).await {
        // Somebody else writes.
        Err(error) if crate::errors::code(&error).is_some_and(|code| code & 0xff == BUSY) => Ok(()),
        wrote => wrote.map(drop),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Refuses a database that is gone while its journal is there: SQLite would take it for a new one, and delete the journal.
fn is_whole(path: &Path) -> Result<()> {
    let is_empty = |path: &Path| std::fs::metadata(path).map_or(true, |file| file.len() == 0);
    let journal = with_suffix(path, "-wal");
    if !is_empty(path) || is_empty(&journal) {
        return Ok(());
    }
    let (path, journal) = (path.display(), journal.display());
    Err(StorageError::schema(format!(
        "{path} is empty or gone, but its journal {journal} is there: it was deleted or damaged; restore a backup, or \
         remove the journal as well if a new database is what you want"
    )))
}

/// Whether it has `jsonb_each`, through which batches travel.
fn is_recent(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (3, 51)
}

/// An error at opening, with what the user may do about it.
fn explain(path: &Path, error: sqlx::Error) -> StorageError {
    const READ_ONLY: i32 = 8;
    const CANT_OPEN: i32 = 14;
    let shown = path.display();
    match crate::errors::code(&error).map(|code| code & 0xff) {
        Some(CANT_OPEN) => StorageError::unavailable(format!(
            "{shown} cannot be opened or created ({error}); does the folder exist, and may this program write to it?"
        )),
        Some(READ_ONLY) => StorageError::unavailable(format!(
            "{shown} cannot be written ({error}); the file, what SQLite has put beside it (-wal, -shm), and its \
             folder must be writable"
        )),
        _ => named(path, reading(error)),
    }
}
