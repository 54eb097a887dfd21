use durable_core::storage::{Result, StorageError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::connect::connect;
use crate::errors::reading;

/// A connection for one user at a time, in the order in which they come; opened when it is first needed.
#[derive(Default)]
pub(crate) struct Single(Arc<Mutex<Option<SqliteConnection>>>);

/// The connection, while it is used. It is given back by [`Lent::done`]; otherwise it is closed, whatever happened to
/// its user: a transaction that a dropped future has left open goes with it, and the next one opens a new connection.
pub(crate) struct Lent {
    home: Turn,
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

    pub(crate) async fn lend(&self, options: &SqliteConnectOptions) -> Result<Lent> {
        let mut home = self.turn().await;
        let (connection, fresh) = match home.take() {
            Some(connection) => (connection, false),
            None => (connect(options).await.map_err(reading)?, true),
        };
        Ok(Lent { home, connection, fresh })
    }
}

impl Lent {
    /// The connection, and where it is to be given back.
    pub(crate) fn part(self) -> (Turn, SqliteConnection) {
        (self.home, self.connection)
    }

    /// Gives the connection back, unless its user does not know what it has done.
    pub(crate) fn done<T>(self, result: Result<T>) -> Result<T> {
        let Self { mut home, connection, .. } = self;
        if !matches!(result, Err(StorageError::Unknown(_))) {
            *home = Some(connection);
        }
        result
    }
}
