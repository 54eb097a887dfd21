use durable_core::storage::StorageError;
use std::fmt;
use tiberius::error::Error;

use crate::sql::Commits;

/// What the server said, without the values that it quotes.
#[derive(Debug)]
pub(crate) struct Told {
    number: u32,
    message: Box<str>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (error {})", self.message, self.number)
    }
}

impl std::error::Error for Told {}

/// What an error's number tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Another transaction was chosen, or was first; this one is rolled back, and may be run again at once.
    Again,
    /// Another session has locked what it needs for longer than it may wait; rolled back.
    Held,
    /// Rolled back, and may work later.
    Later,
    /// A row of that key came to be there between the look and the insert.
    Duplicate,
    /// The content is refused.
    Refused,
    /// Not our tables, or no right to them.
    Schema,
    /// The session or the server is going; whether a commit happened is open.
    Gone,
    /// Not known to this version.
    Other,
}

/// Sorts an error's number. The transient ones of Azure are from its documentation ("Troubleshooting transient
/// connection errors in Azure SQL Database").
pub(crate) fn class(number: u32) -> Class {
    match number {
        // A deadlock's victim; an update conflict under row versioning.
        1205 | 3960 | 3961 => Class::Again,
        1222 => Class::Held,
        2601 | 2627 => Class::Duplicate,
        // No locks, memory or disk left; a log that is full, a database that is read-only or being recovered; a
        // resource governor's or Azure's limit.
        1204 | 701 | 802 | 8628 | 8645 | 8651 | 1101 | 1105 | 9001 | 9002 | 3906 | 845 | 921 | 922 | 927 | 945
        | 952 | 978 | 982 | 983 | 976 | 10928 | 10929 | 10936 | 40501 | 40549 | 40550 | 40551 | 40552 | 40553
        | 49918 | 49919 | 49920 | 41301 | 41302 | 41305 | 41325 | 41839 => Class::Later,
        // No such login or database, or not yet: often set right without this program.
        4060 | 4064 | 18401 | 18451 | 18452 | 18456 | 18461 | 18486 | 18487 | 18488 | 40532 | 40613 | 42108 | 42109
        | 615 | 916 | 40914 | 40615 => Class::Later,
        // Too long, null, out of range, not a number or a date, against a constraint, not JSON, a key that is too long.
        8152 | 2628 | 515 | 547 | 220 | 232 | 8115 | 245 | 241 | 242 | 295 | 8114 | 13608 | 13609 | 1946 | 511
        | 9420 | 7139 => Class::Refused,
        // No such object or column, no right, settings that its indexes do not allow.
        208 | 207 | 229 | 230 | 262 | 297 | 300 | 2812 | 2760 | 1934 | 213 | 468 | 8144 | 201 => Class::Schema,
        // Shut down, failed over, killed, moved.
        6002 | 6005 | 596 | 3617 | 17142 | 17197 | 40143 | 40166 | 40197 | 40540 | 40542 | 233 | 64 | 20 | 10053
        | 10054 | 10060 | 121 => Class::Gone,
        _ => Class::Other,
    }
}

/// Sorts a driver's error by what the caller may do next.
pub(crate) fn sort(error: Error, commits: Commits) -> StorageError {
    let committing = commits == Commits::Yes;
    let Error::Server(token) = &error else {
        return match error {
            Error::Conversion(_) | Error::Utf8 | Error::Utf16 | Error::Encoding(_) | Error::ParseInt(_) => {
                StorageError::schema(error)
            }
            error if committing => StorageError::unknown(error),
            error => StorageError::unavailable(error),
        };
    };
    by_number(token.code(), token.message(), committing)
}

fn by_number(number: u32, said: &str, committing: bool) -> StorageError {
    let told = Told { number, message: message(number, said) };
    match class(number) {
        Class::Again | Class::Later | Class::Duplicate => StorageError::unavailable(told),
        Class::Held => StorageError::blocked(told),
        Class::Refused => StorageError::refused(told),
        Class::Schema => StorageError::schema(told),
        Class::Gone | Class::Other if committing => StorageError::unknown(told),
        Class::Gone | Class::Other => StorageError::unavailable(told),
    }
}

/// An error of a call that writes nothing by itself.
pub(crate) fn reading(error: Error) -> StorageError {
    sort(error, Commits::No)
}

/// The server quotes what it refuses: a key, a value that is cut off.
fn message(number: u32, said: &str) -> Box<str> {
    match number {
        2601 | 2627 => "a row of that key is there already".into(),
        2628 | 8152 => "a value is too long for its column".into(),
        241 | 242 | 245 | 295 | 8114 | 8115 | 220 | 232 => "a value is not what its column holds".into(),
        547 => "a constraint does not allow this".into(),
        _ => said.into(),
    }
}

/// Whether a batch that failed so should be run again at once: the server has rolled it back for the sake of another one.
pub(crate) fn passes_at_once(error: &Error) -> bool {
    error.code().is_some_and(|number| matches!(class(number), Class::Again | Class::Duplicate))
}

/// Whether another try may not meet the error, which a service's statement met.
pub(crate) fn passes(error: &Error) -> bool {
    match error.code() {
        Some(number) => matches!(class(number), Class::Again | Class::Held | Class::Later | Class::Gone),
        None => matches!(error, Error::Io { .. } | Error::Tls(_) | Error::Protocol(_) | Error::Routing { .. }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sorted_by_what_may_be_done() {
        let sorted = |number: u32| {
            let of = |committing| match by_number(number, "said", committing) {
                StorageError::Unavailable(_) => "unavailable",
                StorageError::Blocked(_) => "blocked",
                StorageError::Unknown(_) => "unknown",
                StorageError::Refused(_) => "refused",
                StorageError::Schema(_) => "schema",
                StorageError::Damaged(_) => "damaged",
                _ => "other",
            };
            (of(true), of(false))
        };
        assert_eq!(sorted(1222), ("blocked", "blocked"));
        for number in [1205, 3960, 2627, 2601, 9002, 701, 3906, 40501, 40613, 49920, 10928, 4060, 18456] {
            assert_eq!(sorted(number), ("unavailable", "unavailable"), "{number}");
        }
        for number in [6005, 40197, 596, 10054, 50000, 33_557_097] {
            assert_eq!(sorted(number), ("unknown", "unavailable"), "{number}");
        }
        for number in [8152, 2628, 515, 547, 8114, 13609] {
            assert_eq!(sorted(number), ("refused", "refused"), "{number}");
        }
        for number in [208, 207, 229, 2812, 1934] {
            assert_eq!(sorted(number), ("schema", "schema"), "{number}");
        }
        let error = by_number(2627, "The duplicate key value is (a secret).", true).to_string();
        assert!(error.contains("2627") && !error.contains("secret"), "{error}");
        let lost = || Error::Io { kind: tiberius::error::IoErrorKind::UnexpectedEof, message: "gone".into() };
        assert!(matches!(sort(lost(), Commits::Yes), StorageError::Unknown(_)));
        assert!(matches!(sort(lost(), Commits::No), StorageError::Unavailable(_)));
        assert!(passes(&lost()) && !passes_at_once(&lost()));
    }
}
