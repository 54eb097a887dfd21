use durable_core::storage::{Result, StorageError};
use sqlx::postgres::PgConnection;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::connect::{Options, connect};
use crate::errors::reading;

/// Connections, lent to one call at a time. Not the driver's pool: that takes back a connection whose user went away in
/// the middle of a transaction with the transaction open, and asks each one that comes back whether it still lives.
pub(crate) struct Connections {
    options: Options,
    idle: Mutex<Vec<PgConnection>>,
    places: Semaphore,
}

/// A connection while it is used. It is given back by [`Lent::done`]; otherwise it is closed, whatever happened to its
/// user: what a dropped future has left open goes with it.
pub(crate) struct Lent<'c> {
    home: &'c Connections,
    pub(crate) connection: PgConnection,
    _place: SemaphorePermit<'c>,
}

impl Connections {
    pub(crate) fn new(options: Options, most: usize) -> Self {
        Self { options, idle: Mutex::default(), places: Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS)) }
    }

    /// Takes connections that were opened already.
    pub(crate) fn keep(&self, connections: impl IntoIterator<Item = PgConnection>) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).extend(connections);
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) async fn lend(&self) -> Result<Lent<'_>> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let lend = async {
            // The semaphore is never closed.
            let place = self.places.acquire().await.map_err(StorageError::unavailable)?;
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match idle {
                Some(connection) => connection,
                None => connect(&self.options).await.map_err(reading)?,
            };
            Ok(Lent { home: self, connection, _place: place })
        };
        let lent = tokio::time::timeout(PATIENCE, lend).await;
        lent.map_err(|_| StorageError::unavailable("no connection came free, or could be opened, within 10 s"))?
    }
}

impl Lent<'_> {
    /// Gives the connection back, unless what went wrong may be its own fault.
    pub(crate) fn done<T>(self, result: Result<T>) -> Result<T> {
        let trusted = match &result {
            Ok(_) | Err(StorageError::Fenced | StorageError::Refused(_)) => true,
            Err(_) => false,
        };
        if trusted {
            self.home.keep([self.connection]);
        } else {
            // Others that the server has dropped at the same time are not tried one after the other.
            self.home.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        result
    }
}
