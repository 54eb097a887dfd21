use durable_core::storage::{Result, StorageError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::connect::connect;
use crate::errors::{is_busy, named, reading};
use crate::files::Files;

/// A connection for one user at a time, in the order in which they come; opened when it is first needed.
#[derive(Default)]
pub(crate) struct Single(Arc<Mutex<Option<SqliteConnection>>>);

/// The connection, while it is used. It is given back by [`Lent::done`]; otherwise it is closed, whatever happened to
/// its user: a transaction that a dropped future has left open goes with it, and the next one opens a new connection.
pub(crate) struct Lent {
    home: Turn,
    file: PathBuf,
    files: Arc<Files>,
    pub(crate) connection: SqliteConnection,
    /// It was opened for this.
    pub(crate) fresh: bool,
}

/// The turn of one of those who wait for a connection, with or without using it.
pub(crate) type Turn = OwnedMutexGuard<Option<SqliteConnection>>;

impl Single {
    pub(crate) fn new(connection: SqliteConnection) -> Self {
        Self(Arc::new(Mutex::new(Some(connection))))
    }

    /// Waits for one's turn.
    pub(crate) async fn turn(&self) -> Turn {
        self.0.clone().lock_owned().await
    }

    pub(crate) async fn lend(&self, options: &SqliteConnectOptions, files: &Arc<Files>) -> Result<Lent> {
        let file = options.get_filename();
        let mut home = self.turn().await;
        // None is opened then: its journal would be another one than that of those which are open.
        files.admit(home.as_mut()).await?;
        let (connection, fresh) = match home.take() {
            Some(connection) => (connection, false),
            None => (connect(options).await.map_err(|error| named(file, reading(error)))?, true),
        };
        Ok(Lent { home, file: file.to_owned(), files: files.clone(), connection, fresh })
    }
}

impl Lent {
    /// The connection, and where it is to be given back.
    pub(crate) fn part(self) -> (Turn, SqliteConnection) {
        (self.home, self.connection)
    }

    /// Gives the connection back, unless its user does not know what it has done, or what went wrong may be its own: one
    /// that was opened while the file could not be written can only read, for ever. An error tells the file.
    pub(crate) fn done<T>(self, result: Result<T>) -> Result<T> {
        let Self { mut home, file, files, connection, .. } = self;
        let sound = match &result {
            Ok(_) | Err(StorageError::Fenced | StorageError::Refused(_)) => true,
            Err(StorageError::Unavailable(why)) => is_busy(&**why),
            Err(_) => false,
        };
        if sound {
            *home = Some(connection);
        }
        // It may be in a file that is gone, from which the connection saves it when it is lent next.
        let result = result.and_then(|done| files.check_now_and_then().map(|()| done).map_err(StorageError::unknown));
        result.map_err(|error| named(&file, error))
    }
}
