use durable_core::storage::StorageError;
use sqlx::Error;
use std::fmt;

/// What the server said, without the details in which it quotes the values that it was given.
#[derive(Debug)]
pub(crate) struct Told {
    code: Box<str>,
    message: Box<str>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code)
    }
}

impl std::error::Error for Told {}

/// Sorts a driver's error by what the caller may do next. `committing`: it came from a commit, or from a statement that
/// commits by itself; then a connection that was lost leaves open whether it happened.
pub(crate) fn sort(error: Error, committing: bool) -> StorageError {
    let Some(code) = code(&error) else {
        return match error {
            Error::ColumnDecode { .. }
            | Error::Decode(_)
            | Error::ColumnNotFound(_)
            | Error::ColumnIndexOutOfBounds { .. } => StorageError::schema(error),
            Error::Encode(_) => StorageError::refused(error),
            _ if committing => StorageError::unknown(error),
            _ => StorageError::unavailable(error),
        };
    };
    let message = match &error {
        Error::Database(database) => database.message().into(),
        _ => "".into(),
    };
    by_code(Told { code, message }, committing)
}

fn by_code(told: Told, committing: bool) -> StorageError {
    let code = told.code.clone();
    match (code.get(..2).unwrap_or_default(), &*code) {
        // Going down, the server may say so after the commit: while it waits for a standby to confirm it, say.
        ("08", _) | (_, "57P01" | "57P02") if committing => StorageError::unknown(told),
        // A lock that did not come free in time, a statement that took too long.
        (_, "55P03" | "57014") => StorageError::blocked(told),
        // A commit whose node was lost: CockroachDB, and some poolers.
        (_, "40003") if committing => StorageError::unknown(told),
        // A connection refused or lost, no memory or disk, too many connections, a deadlock, a time-out, a server
        // that starts or goes down: none of it was written.
        ("08" | "40" | "53" | "55" | "57", _) => StorageError::unavailable(told),
        // A standby; a transaction that was ended because its client was away for too long.
        (_, "25006" | "25P03") => StorageError::unavailable(told),
        // Who may log in where is often set right without this program.
        ("28" | "3D", _) => StorageError::unavailable(told),
        // Content that is not what the column holds, too large, or against a constraint.
        ("22" | "23" | "54", _) => StorageError::refused(told),
        // Damaged: reading it again does not help.
        ("XX", "XX001" | "XX002") => StorageError::schema(told),
        // No such table, column or schema, or no right to it.
        ("3F", _) | (_, "42P01" | "42703" | "42501" | "42883" | "42P10") => StorageError::schema(told),
        // A plan that no longer fits its table, a statement that a pooler's other connection knows: a new connection
        // helps.
        (_, "0A000" | "26000") => StorageError::unavailable(told),
        _ if committing => StorageError::unknown(told),
        _ => StorageError::unavailable(told),
    }
}

/// An error of a call that writes nothing by itself.
pub(crate) fn reading(error: Error) -> StorageError {
    sort(error, false)
}

/// Whether another try may not meet the error: a connection that was lost, a deadlock, a serialisation failure, a server
/// that goes down.
pub(crate) fn passes(error: &Error) -> bool {
    match code(error).as_deref() {
        Some(code) => {
            // Not a statement that took too long: it would again.
            let class = matches!(code.get(..2), Some("08" | "40" | "53")) || code.starts_with("57P");
            // Statements that the connection keeps, and that no longer fit: another connection helps.
            class || matches!(code, "55P03" | "25P03" | "25006" | "0A000" | "26000")
        }
        None => matches!(error, Error::Io(_) | Error::Tls(_) | Error::Protocol(_) | Error::PoolTimedOut),
    }
}

/// Whether a row stands there already.
pub(crate) fn is_duplicate(error: &StorageError) -> bool {
    matches!(error, StorageError::Refused(why) if why.downcast_ref::<Told>().is_some_and(|told| &*told.code == "23505"))
}

/// The server's SQLSTATE.
pub(crate) fn code(error: &Error) -> Option<Box<str>> {
    match error {
        Error::Database(database) => database.code().map(|code| (*code).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sorted_by_what_may_be_done() {
        let sorted = |code: &str, committing| match by_code(Told { code: code.into(), message: "m".into() }, committing)
        {
            StorageError::Unavailable(_) => "unavailable",
            StorageError::Blocked(_) => "blocked",
            StorageError::Unknown(_) => "unknown",
            StorageError::Refused(_) => "refused",
            StorageError::Schema(_) => "schema",
            StorageError::Damaged(_) => "damaged",
            _ => "other",
        };
        for code in
            ["40001", "40P01", "53100", "53200", "53300", "57P03", "25006", "25P03", "28P01", "3D000", "0A000", "26000"]
        {
            assert_eq!((sorted(code, true), sorted(code, false)), ("unavailable", "unavailable"), "{code}");
        }
        for code in ["55P03", "57014"] {
            assert_eq!((sorted(code, true), sorted(code, false)), ("blocked", "blocked"), "{code}");
        }
        assert_eq!(sorted("40003", true), "unknown");
        for code in ["08006", "57P01", "57P02", "XX000"] {
            assert_eq!((sorted(code, true), sorted(code, false)), ("unknown", "unavailable"), "{code}");
        }
        for code in ["22P02", "22001", "22021", "23505", "23502", "54000", "54001"] {
            assert_eq!((sorted(code, true), sorted(code, false)), ("refused", "refused"), "{code}");
        }
        for code in ["42P01", "42703", "42501", "3F000", "XX001"] {
            assert_eq!((sorted(code, true), sorted(code, false)), ("schema", "schema"), "{code}");
        }
        let lost = || Error::Io(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        assert!(matches!(sort(lost(), true), StorageError::Unknown(_)));
        assert!(matches!(sort(lost(), false), StorageError::Unavailable(_)));
    }
}
