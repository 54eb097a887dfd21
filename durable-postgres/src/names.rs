use durable_core::storage::{Result, StorageError};
use std::fmt;

/// The schema that holds the tables, as it stands in front of each table's name: nothing that a service does to its
/// `search_path` can turn a statement to another table.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    name: Box<str>,
}

impl Schema {
    /// PostgreSQL cuts longer names off.
    const LONGEST: usize = 63;

    pub(crate) fn new(name: &str) -> Result<Self> {
        let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !letters || !begins || name.len() > Self::LONGEST || name.starts_with("pg_") {
            return Err(StorageError::schema(format!(
                "{name:?} cannot be the schema's name: up to {} letters, digits and underscores, not beginning with a \
                 digit or with `pg_`",
                Self::LONGEST
            )));
        }
        Ok(Self { name: name.into() })
    }

    /// The name without quotes, for a comparison with the catalogue.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What is this schema's own in a database, or in a session, is called this: the channel where hints about changes go,
    /// a prepared statement. Such a name is cut off like any other.
    pub(crate) fn tag(&self) -> String {
        let tag = format!("durable_{}", self.name);
        if tag.len() <= Self::LONGEST {
            return tag;
        }
        format!("durable_{}", uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, self.name.as_bytes()).simple())
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names() {
        for name in ["durable", "_a1", "Orders_2", &"x".repeat(63)] {
            let schema = Schema::new(name).unwrap();
            assert_eq!(schema.to_string(), format!("\"{name}\""));
            assert!(schema.tag().len() <= 63);
        }
        for name in ["", "1a", "a-b", "a\"b", "a.b", "é", "pg_x", "a b", &"x".repeat(64)] {
            let error = Schema::new(name).unwrap_err().to_string();
            assert!(error.contains("cannot be the schema's name"), "{error}");
        }
        assert_ne!(
            Schema::new(&"x".repeat(60)).unwrap().tag(),
            Schema::new(&"x".repeat(61)).unwrap().tag(),
            "cut off they would be the same"
        );
    }
}
