//! What is too much for one transaction: waking very many that await one process, and clearing away what a deleted process
//! has left. A batch leaves a *chore* for it, in the same transaction; whichever instance looks next does a part of it. A
//! storage brings the transactions.

use async_trait::async_trait;

use super::Result;

/// So many processes at most are woken within a batch; where more await what has ended, all of them are woken by a chore.
pub const WOKEN: usize = 1000;
/// So many runs of one id at most go with one deletion; it is ordered again until none is left.
pub const DELETED: usize = 1000;
/// So many rows at most of what an ended process still awaits go with its end. What is left wakes nobody, and goes with the
/// process.
pub const UNAWAITED: usize = 10_000;

/// The chores of a database, of whatever namespace.
#[async_trait]
pub trait Chores: Send {
    /// Does a part of the `most` oldest chores that are due and that nobody else does at the moment: one transaction, which
    /// changes at most so many `rows` of each table. What another session has locked is passed over. Says whether anything
    /// came of it. A chore of which nothing is left goes; the others wait for their next turn.
    ///
    /// Idempotent: a lost answer is no worse than none.
    async fn part(&mut self, most: usize, rows: usize) -> Result<bool>;

    /// Puts the oldest chore that is due off for a minute.
    async fn put_off(&mut self) -> Result<()>;
}

/// Does a part of what is due, and says whether there may be more. A chore that fails while the database answers otherwise (a
/// damaged page, say) is put off, and told.
///
/// # Errors
/// The database is away.
pub async fn work(chores: &mut dyn Chores) -> Result<bool> {
    let mut failed = None;
    // Where many take too long, or one of them is at fault, fewer do not.
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
