use durable_core::storage::StorageError;
use sqlx::Error;
use std::path::Path;

/// Sorts a driver's error by what the caller may do next. `committing`: it came from a commit, or from a statement that
/// commits by itself.
///
/// SQLite runs inside this program: what failed before its commit has not happened. Of a commit that failed while it
/// wrote, only a look can tell.
pub(crate) fn sort(error: Error, committing: bool) -> StorageError {
    const BUSY: i32 = 5;
    const LOCKED: i32 = 6;
    const READ_ONLY: i32 = 8;
    const CORRUPT: i32 = 11;
    const FULL: i32 = 13;
    const CANT_OPEN: i32 = 14;
    const TOO_BIG: i32 = 18;
    const CONSTRAINT: i32 = 19;
    const MISMATCH: i32 = 20;
    const NOT_A_DB: i32 = 26;
    const SHORT_READ: i32 = 522;
    let Some(code) = code(&error) else {
        return match &error {
            Error::PoolTimedOut | Error::PoolClosed => StorageError::unavailable(error),
            Error::ColumnDecode { .. }
            | Error::Decode(_)
            | Error::ColumnNotFound(_)
            | Error::ColumnIndexOutOfBounds { .. } => StorageError::schema(error),
            _ => StorageError::unknown(error),
        };
    };
    match code & 0xff {
        // It ends where there should be more of it.
        _ if code == SHORT_READ && committing => StorageError::unknown(damaged(&error)),
        _ if code == SHORT_READ => StorageError::damaged(damaged(&error)),
        BUSY | LOCKED | FULL | READ_ONLY | CANT_OPEN => StorageError::unavailable(error),
        CONSTRAINT | TOO_BIG | MISMATCH => StorageError::refused(error),
        CORRUPT => StorageError::damaged(damaged(&error)),
        NOT_A_DB => StorageError::damaged(format!(
            "the file is not a SQLite database ({error}); if it was one, it is damaged: stop the service and restore a \
             backup"
        )),
        _ if committing => StorageError::unknown(error),
        // A table that somebody has dropped, no memory, a file that cannot be read: it may pass.
        _ => StorageError::unavailable(error),
    }
}

/// What to say of a damaged file.
pub(crate) fn damaged(error: &dyn std::fmt::Display) -> String {
    format!(
        "the database file is damaged ({error}); stop the service and restore a backup, or what `sqlite3`'s .recover still \
         reads"
    )
}

/// An error of a call that writes nothing by itself.
pub(crate) fn reading(error: Error) -> StorageError {
    sort(error, false)
}

/// The same, with the name of the file. A lock that somebody else holds needs none, and is to be recognised.
pub(crate) fn named(file: &Path, error: StorageError) -> StorageError {
    let name = |why: &dyn std::fmt::Display| format!("{}: {why}", file.display());
    match error {
        StorageError::Unavailable(why) if !is_busy(&*why) => StorageError::unavailable(name(&why)),
        StorageError::Unknown(why) => StorageError::unknown(name(&why)),
        StorageError::Schema(why) => StorageError::schema(name(&why)),
        StorageError::Damaged(why) => StorageError::damaged(name(&why)),
        other => other,
    }
}

/// Whether somebody else holds a lock.
pub(crate) fn is_busy(why: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    const BUSY: i32 = 5;
    why.downcast_ref::<Error>().and_then(code).is_some_and(|code| code & 0xff == BUSY)
}

/// Whether another try may not meet the error.
pub(crate) fn passes(error: &Error) -> bool {
    const BUSY: i32 = 5;
    const LOCKED: i32 = 6;
    const NO_MEMORY: i32 = 7;
    const INTERRUPTED: i32 = 9;
    const IO: i32 = 10;
    const FULL: i32 = 13;
    match code(error) {
        Some(code) => matches!(code & 0xff, BUSY | LOCKED | NO_MEMORY | INTERRUPTED | IO | FULL),
        None => matches!(error, Error::Io(_) | Error::WorkerCrashed),
    }
}

/// SQLite's extended result code.
pub(crate) fn code(error: &Error) -> Option<i32> {
    match error {
        Error::Database(database) => database.code()?.parse().ok(),
        _ => None,
    }
}
