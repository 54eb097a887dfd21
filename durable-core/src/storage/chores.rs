//! What is too much for one transaction: waking very many processes that await one, and deleting the rows that a deleted
//! process has left. The batch writes a *chore* for it, in its own transaction; whichever instance looks next does a part of
//! it. A storage brings the transactions.

use async_trait::async_trait;

use super::Result;

/// How many waiting processes the end of one may wake within its batch. If more await it, a chore wakes all of them.
pub const WOKEN: usize = 1000;
/// How many runs of one id a single deletion takes. The engine orders it again until none is left.
pub const DELETED: usize = 1000;
/// How many of its own waiter rows a process's end deletes in its batch. Those that stay wake no process, and go when the
/// process is deleted.
pub const UNAWAITED: usize = 10_000;

/// The chores of a database, of whatever namespace.
#[async_trait]
pub trait Chores: Send {
    /// Does a part of the `most` oldest chores that are due, in one transaction that changes at most `rows` rows of each
    /// table. It passes over chores and rows that another session has locked, deletes the chores of which nothing is left, and
    /// says whether it has changed anything.
    ///
    /// The engine may call it again after a lost answer: a part that is done is not done twice.
    async fn part(&mut self, most: usize, rows: usize) -> Result<bool>;

    /// Moves the oldest due chore a minute into the future.
    async fn put_off(&mut self) -> Result<()>;
}

/// Does a part of the chores that are due, and says whether there may be more. If a part fails even with one row (a damaged
/// page, say), its chore is put off for a minute, and an error is logged.
///
/// # Errors
/// The database is away: the chore could not even be put off.
pub async fn work(chores: &mut dyn Chores) -> Result<bool> {
    let mut failed = None;
    // With fewer rows a part is faster, and meets fewer that may be damaged.
    for (most, rows) in [(200, 1000), (1, 50), (1, 1)] {
        match chores.part(most, rows).await {
            Ok(did) => return Ok(did || most == 1),
            Err(why) => failed = Some(why),
        }
    }
    chores.put_off().await?;
    if let Some(why) = failed {
        tracing::error!("a chore is put off for a minute: {why}");
    }
    Ok(true)
}
