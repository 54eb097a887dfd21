//! The order in which a schema grows, and which code may run on it.

use super::{Result, StorageError};

/// One step of a schema, the same in every backend: which version it makes, and the oldest version of the code that
/// may still run on it.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Its number: 1, 2, 3, ….
    pub version: i64,
    /// For people.
    pub name: &'static str,
    /// Its statements.
    pub sql: &'static str,
    /// Code that knows at least this version may run on the schema that it makes.
    pub oldest_code: i64,
}

/// A migration as the database remembers it.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Its number.
    pub version: i64,
    /// Of its statements.
    pub checksum: String,
    /// The oldest code that may run on it.
    pub oldest_code: i64,
}

impl Migration {
    /// A checksum of the statements, so that one that was changed after the fact is noticed. Line ends do not count.
    pub fn checksum(&self) -> String {
        uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, self.sql.replace('\r', "").as_bytes()).simple().to_string()
    }
}

/// Which of the migrations are still to be applied.
///
/// # Errors
/// [`StorageError::Schema`] if the database is too new for this code, or was changed by other hands.
pub fn pending<'m>(known: &'m [Migration], applied: &[Applied]) -> Result<Vec<&'m Migration>> {
    let newest_known = known.iter().map(|migration| migration.version).max().unwrap_or(0);
    // Each of those that this code does not know says who may live with it.
    let unknown = applied.iter().filter(|applied| applied.version > newest_known);
    if let Some(newest) = unknown.max_by_key(|applied| applied.oldest_code)
        && newest.oldest_code > newest_known
    {
        return Err(StorageError::schema(format!(
            "the database's schema is version {}, which needs code that knows at least version {}; this code knows \
             version {newest_known}: deploy a newer version of the service",
            newest.version, newest.oldest_code
        )));
    }
    let mut pending = Vec::new();
    for migration in known {
        match applied.iter().find(|applied| applied.version == migration.version) {
            Some(applied) if applied.checksum != migration.checksum() => {
                return Err(StorageError::schema(format!(
                    "migration {} ({}) was applied with other statements than this version of the code has; \
                     the schema was changed by other hands",
                    migration.version, migration.name
                )));
            }
            Some(_) => {}
            None => pending.push(migration),
        }
    }
    Ok(pending)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Migration = Migration { version: 1, name: "one", sql: "CREATE", oldest_code: 1 };
    const TWO: Migration = Migration { version: 2, name: "two", sql: "ALTER", oldest_code: 1 };

    fn applied(migration: Migration) -> Applied {
        Applied { version: migration.version, checksum: migration.checksum(), oldest_code: migration.oldest_code }
    }

    #[test]
    fn what_is_pending_and_what_is_refused() {
        let known = [ONE, TWO];
        let versions =
            |applied: &[Applied]| pending(&known, applied).map(|p| p.iter().map(|m| m.version).collect::<Vec<_>>());
        assert_eq!(versions(&[]).unwrap(), [1, 2]);
        assert_eq!(versions(&[applied(ONE)]).unwrap(), [2]);
        let newer = |oldest_code| Applied { version: 3, checksum: "x".into(), oldest_code };
        assert!(versions(&[applied(ONE), applied(TWO), newer(2)]).unwrap().is_empty(), "an additive one");
        let error = versions(&[applied(ONE), applied(TWO), newer(3)]).unwrap_err().to_string();
        assert!(error.contains("version 3") && error.contains("knows version 2"), "{error}");
        let newest = Applied { version: 4, checksum: "x".into(), oldest_code: 1 };
        let error = versions(&[applied(ONE), applied(TWO), newer(3), newest]).unwrap_err().to_string();
        assert!(error.contains("version 3"), "what came before the newest one counts, too: {error}");
        let error = versions(&[Applied { checksum: "other".into(), ..applied(ONE) }]).unwrap_err().to_string();
        assert!(error.contains("migration 1 (one)"), "{error}");
    }
}
