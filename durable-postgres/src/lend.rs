use durable_core::storage::{Result, StorageError};
use sqlx::postgres::{PgConnection, PgRow};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::connect::{Options, connect};
use crate::errors::reading;
use crate::session::Bounds;
use crate::sql::{Commits, Sql};

/// Connections, lent to one call at a time. Not the driver's pool: that takes back a connection whose user went away in
/// the middle of a transaction with the transaction open, and asks each one that comes back whether it still lives.
pub(crate) struct Connections {
    options: Options,
    idle: Arc<Mutex<Vec<PgConnection>>>,
    places: Arc<Semaphore>,
}

/// A connection while it is used. It is given back by [`Lent::done`]; otherwise it is closed, whatever happened to its
/// user: what a dropped future has left open goes with it.
pub(crate) struct Lent {
    pub(crate) home: Home,
    pub(crate) connection: PgConnection,
}

/// Where a connection is to be given back, and the place that it takes until then.
pub(crate) struct Home {
    idle: Arc<Mutex<Vec<PgConnection>>>,
    _place: OwnedSemaphorePermit,
}

impl Home {
    /// Gives it back.
    pub(crate) fn keep(self, connection: PgConnection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
}

impl Connections {
    pub(crate) fn new(options: Options, most: usize) -> Self {
        let places = Arc::new(Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS)));
        Self { options, idle: Arc::default(), places }
    }

    /// Takes a connection that was opened already.
    pub(crate) fn keep(&self, connection: PgConnection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn bounds(&self) -> Bounds {
        self.options.bounds
    }

    /// Runs one statement: one that reads, or that may as well run twice, so that a lost answer is no worse than none.
    pub(crate) async fn run(&self, sql: Sql) -> Result<Vec<PgRow>> {
        let mut lent = self.lend().await?;
        let result = within(self.bounds().answer(), unavailable, sql.run(&mut lent.connection, Commits::No)).await;
        lent.done(result)
    }

    pub(crate) async fn lend(&self) -> Result<Lent> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let lend = async {
            // The semaphore is never closed.
            let place = self.places.clone().acquire_owned().await.map_err(StorageError::unavailable)?;
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match idle {
                Some(connection) => connection,
                None => connect(&self.options).await.map_err(reading)?,
            };
            Ok(Lent { home: Home { idle: self.idle.clone(), _place: place }, connection })
        };
        let lent = tokio::time::timeout(PATIENCE, lend).await;
        lent.map_err(|_| StorageError::unavailable("no connection came free, or could be opened, within 10 s"))?
    }
}

/// The answer, if it comes in time; else the caller's future is dropped, and its connection is to be closed.
pub(crate) async fn within<T>(
    bound: Duration,
    silence: fn(String) -> StorageError,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    let answer = tokio::time::timeout(bound, answer).await;
    answer.unwrap_or_else(|_| Err(silence(format!("the server has not answered for {bound:?}"))))
}

/// What was asked for may happen as well as not, and that makes no difference.
pub(crate) fn unavailable(why: String) -> StorageError {
    StorageError::unavailable(why)
}

/// What was asked for may have happened.
pub(crate) fn unknown(why: String) -> StorageError {
    StorageError::unknown(why)
}

impl Lent {
    /// Gives the connection back, unless what went wrong may be its own fault.
    pub(crate) fn done<T>(self, result: Result<T>) -> Result<T> {
        let trusted = match &result {
            Ok(_) | Err(StorageError::Fenced | StorageError::Refused(_) | StorageError::Blocked(_)) => true,
            Err(_) => false,
        };
        if trusted {
            self.home.keep(self.connection);
        } else {
            // Others that the server has dropped at the same time are not tried one after the other.
            self.home.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        result
    }
}
