//! What a storage does for itself whenever an instance looks for work: it moves rows of the inbox on, and does a part of the
//! chores.

use async_trait::async_trait;

use super::Result;
use super::rows::{Poll, Polled};

/// What there is to do besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Todo {
    /// Rows wait in the inbox.
    pub inbox: bool,
    /// [Chores](super::chores) are due.
    pub chores: bool,
}

/// A storage that looks after itself.
#[async_trait]
pub trait Housekeeping: Sync {
    /// One look, in one round trip.
    async fn look(&self, poll: &Poll) -> Result<(Polled, Todo)>;

    /// [Moves on](super::inbox::move_on) some rows of the namespace's inbox. Says whether rows are left.
    async fn move_on(&self, namespace: &str) -> Result<bool>;

    /// Does [a part of the chores](super::chores::work). Says whether there may be more.
    async fn work(&self) -> Result<bool>;
}

/// [`Storage::poll`](super::Storage::poll) for such a storage: it looks, does what there is to do, and looks again at what
/// that has made due. A failure of the housekeeping is logged; the look succeeds all the same.
///
/// # Errors
/// Those of [`Housekeeping::look`].
pub async fn poll(storage: &dyn Housekeeping, poll: &Poll) -> Result<Polled> {
    let (polled, todo) = storage.look(poll).await?;
    if todo == Todo::default() {
        return Ok(polled);
    }
    let mut more = false;
    if todo.inbox {
        more |= left("rows stay in the inbox", storage.move_on(&poll.namespace).await);
    }
    if todo.chores {
        more |= left("chores are left", storage.work().await);
    }
    let (polled, _) = storage.look(poll).await?;
    Ok(Polled { more, ..polled })
}

fn left(what: &str, more: Result<bool>) -> bool {
    more.unwrap_or_else(|error| {
        tracing::warn!("{what} for now: {error}");
        false
    })
}
