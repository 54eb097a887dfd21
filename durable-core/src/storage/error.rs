use std::fmt;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why a storage could not do what it was asked, sorted by what the caller may do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// It did not happen, and may work later: no connection, a locked or full database, a time-out before sending.
    #[error("the storage is not available: {0}")]
    Unavailable(#[source] Source),
    /// It did not happen: another session has locked a row that it touches, or a statement took too long. Operations on other
    /// rows may work meanwhile.
    #[error("the storage had to give up waiting: {0}")]
    Blocked(#[source] Source),
    /// It may have happened, or may happen yet: the answer was lost. Fence off the attempt before anything else.
    #[error("the storage's answer was lost: {0}")]
    Unknown(#[source] Source),
    /// The instance was taken over, or a newer generation of it writes: nothing was written, nothing ever will be.
    #[error("the instance has been fenced off")]
    Fenced,
    /// The database refuses the content for good; the same again is refused again. Nothing was written.
    #[error("the storage refuses this: {0}")]
    Refused(#[source] Source),
    /// What is stored cannot be understood by this code, the place is not a database of ours, or there is no right to it.
    /// Nothing was written. It may be mended, so the engine tries a batch again, and tells what is wrong meanwhile.
    #[error("{0}")]
    Schema(String),
    /// The database is damaged, and what is read of it may not be what was written: a SQLite file that was cut short or
    /// written over. Nothing was written. A database that knows which of its pages are damaged answers the others, and says
    /// [`Schema`](Self::Schema) of those. Here the engine splits neither a read nor a batch that meets the damage: it tries them
    /// again as they are, and tells of it, until a backup is restored.
    #[error("{0}")]
    Damaged(String),
}

impl StorageError {
    /// The call did not happen, for this reason, and may be made again.
    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::Unavailable(source.into())
    }
    /// The call did not happen, since another session has locked what it touches.
    pub fn blocked(source: impl Into<Source>) -> Self {
        Self::Blocked(source.into())
    }
    /// The call may have happened.
    pub fn unknown(source: impl Into<Source>) -> Self {
        Self::Unknown(source.into())
    }
    /// The content is refused for good.
    pub fn refused(source: impl Into<Source>) -> Self {
        Self::Refused(source.into())
    }
    /// Nothing that is read can be relied on.
    pub fn damaged(message: impl fmt::Display) -> Self {
        Self::Damaged(message.to_string())
    }
    /// The stored form is not one that this code understands.
    pub fn schema(message: impl fmt::Display) -> Self {
        Self::Schema(message.to_string())
    }
    /// A column holds what may not stand there.
    pub fn unknown_value(column: &str, holds: &str, knows: &str) -> Self {
        /// Whatever it is, it is told to people.
        const MOST: usize = 100;
        let cut: String = holds.chars().take(MOST).collect();
        let more = if cut.len() < holds.len() { "…" } else { "" };
        Self::schema(format!("{column} holds {cut:?}{more}, which this version does not know: it knows {knows}"))
    }
    /// Says where what cannot be understood stands: in which table, and in which row.
    #[must_use]
    pub fn at(self, table: &str, row: impl fmt::Display) -> Self {
        match self {
            Self::Schema(why) => Self::Schema(format!("{table}, {row}: {why}")),
            other => other,
        }
    }
    /// Whether trying again can help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Blocked(_) | Self::Unknown(_) | Self::Damaged(_))
    }
}
