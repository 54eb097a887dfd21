use durable_core::storage::{Result, StorageError};
use std::fmt;

/// The schema that holds the tables, as it stands in front of each table's name, with its database: nothing that a
/// service does to its session, `USE` included, can turn a statement to another table.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    name: Box<str>,
    database: Option<Box<str>>,
}

impl Schema {
    /// So that the names of locks, which hold it, are not too long.
    const LONGEST: usize = 63;

    /// In whatever database the statement runs in.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        let reserved = ["sys", "information_schema", "guest"].iter().any(|taken| name.eq_ignore_ascii_case(taken));
        if !letters || !begins || name.len() > Self::LONGEST || reserved {
            return Err(StorageError::schema(format!(
                "{name:?} cannot be the schema's name: up to {} letters, digits and underscores, not beginning with a \
                 digit, and not one of the server's own",
                Self::LONGEST
            )));
        }
        Ok(Self { name: name.into(), database: None })
    }

    /// In this database.
    pub(crate) fn within(self, database: &str) -> Self {
        Self { database: Some(database.replace(']', "]]").into()), ..self }
    }

    /// The name without brackets, for a comparison with the catalogue.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The database's name, to be put within brackets.
    pub(crate) fn database(&self) -> &str {
        self.database.as_deref().unwrap_or("master")
    }

    /// The name of a lock of this schema's: servers hold such names apart by database.
    pub(crate) fn lock(&self, what: impl fmt::Display) -> String {
        format!("durable/{}/{what}", self.name)
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(database) = &self.database {
            write!(f, "[{database}].")?;
        }
        write!(f, "[{}]", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names() {
        for name in ["durable", "dbo", "_a1", "Orders_2", &"x".repeat(63)] {
            assert_eq!(Schema::new(name).unwrap().to_string(), format!("[{name}]"));
        }
        for name in ["", "1a", "a-b", "a]b", "a.b", "é", "sys", "SYS", "a b", &"x".repeat(64)] {
            let error = Schema::new(name).unwrap_err().to_string();
            assert!(error.contains("cannot be the schema's name"), "{error}");
        }
        assert_eq!(Schema::new("s").unwrap().within("a]b").to_string(), "[a]]b].[s]");
    }
}
