use durable_core::storage::{Result, StorageError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::sync::{Mutex, MutexGuard};

use crate::connect::connect;
use crate::errors::reading;

/// A connection for one user at a time, in the order in which they come; opened when it is first needed.
#[derive(Default)]
pub(crate) struct Single(Mutex<Option<SqliteConnection>>);

/// The connection, while it is used. It is given back by [`Lent::done`]; otherwise it is closed, whatever happened to
/// its user: a transaction that a dropped future has left open goes with it, and the next one opens a new connection.
pub(crate) struct Lent<'s> {
    home: MutexGuard<'s, Option<SqliteConnection>>,
    pub(crate) connection: SqliteConnection,
}

impl Single {
    pub(crate) fn new(connection: SqliteConnection) -> Self {
        Self(Mutex::new(Some(connection)))
    }

    pub(crate) async fn lend(&self, options: &SqliteConnectOptions) -> Result<Lent<'_>> {
        let mut home = self.0.lock().await;
        let connection = match home.take() {
            Some(connection) => connection,
            None => connect(options).await.map_err(reading)?,
        };
        Ok(Lent { home, connection })
    }
}

impl Lent<'_> {
    /// Gives the connection back, unless its user does not know what it has done.
    pub(crate) fn done<T>(self, result: Result<T>) -> Result<T> {
        let Self { mut home, connection } = self;
        if !matches!(result, Err(StorageError::Unknown(_))) {
            *home = Some(connection);
        }
        result
    }
}
