//! The demo's own SQLite files: the bank's database and the journal.

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Executor};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Error;

pub fn bank(folder: &Path) -> PathBuf {
    folder.join("bank.db")
}

pub fn journal(folder: &Path) -> PathBuf {
    folder.join("journal.db")
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(Duration::from_secs(30))
}

/// One connection: whoever keeps such a file does one thing after the other.
pub async fn pool(path: &Path) -> Result<SqlitePool, Error> {
    let pool = SqlitePoolOptions::new().max_connections(1).acquire_timeout(Duration::from_secs(60));
    Ok(pool.connect_with(options(path)).await?)
}

/// Whether nobody keeps others from writing to these files.
pub async fn are_free(paths: &[PathBuf]) -> Result<bool, Error> {
    for path in paths.iter().filter(|path| path.exists()) {
        let mut connection = options(path).busy_timeout(Duration::from_millis(200)).connect().await?;
        match connection.execute("BEGIN IMMEDIATE; ROLLBACK").await {
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("5") => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
