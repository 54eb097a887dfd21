use durable_core::storage::StorageError;
use sqlx::Error;

/// Sorts a driver's error by what the caller may do next.
///
/// SQLite runs inside this program: a call whose answer is an error has not committed, except where the error came
/// from the commit itself or from the file, when only a look can tell.
pub(crate) fn sort(error: Error) -> StorageError {
    const FULL: i32 = 13;
    const CONSTRAINT: i32 = 19;
    const TOO_BIG: i32 = 18;
    const MISMATCH: i32 = 20;
    const CORRUPT: i32 = 11;
    const NOT_A_DB: i32 = 26;
    const BUSY: i32 = 5;
    const LOCKED: i32 = 6;
    const READ_ONLY: i32 = 8;
    const CANT_OPEN: i32 = 14;
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
        BUSY | LOCKED | FULL | READ_ONLY | CANT_OPEN => StorageError::unavailable(error),
        CONSTRAINT | TOO_BIG | MISMATCH => StorageError::refused(error),
        CORRUPT => StorageError::schema(format!("the database file is damaged: {error}")),
        NOT_A_DB => StorageError::schema(format!("the file is not a SQLite database: {error}")),
        _ => StorageError::unknown(error),
    }
}

/// SQLite's extended result code.
pub(crate) fn code(error: &Error) -> Option<i32> {
    match error {
        Error::Database(database) => database.code()?.parse().ok(),
        _ => None,
    }
}
