use durable_core::storage::{Result, StorageError};
use futures_util::TryStreamExt;
use sqlx::postgres::{PgArguments, PgConnection, PgRow, Postgres};
use sqlx::{Arguments, AssertSqlSafe, Encode, Type};
use std::fmt::{Display, Write};
use uuid::Uuid;

use crate::errors::sort;

type Query = sqlx::query::Query<'static, Postgres, PgArguments>;

/// A statement and what is bound to it.
#[derive(Default)]
pub(crate) struct Sql {
    pub(crate) text: String,
    arguments: PgArguments,
    count: usize,
    /// A value that the driver cannot send.
    unfit: Option<String>,
    /// The types of what is bound, for `PREPARE`.
    #[cfg(test)]
    pub(crate) types: Vec<String>,
}

/// What becomes of a connection that is lost on the way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commits {
    /// The statement is a transaction of its own, and writes.
    Yes,
    /// It only reads, or its transaction's commit comes later.
    No,
}

impl Sql {
    /// Binds a value; the answer stands for it in the text.
    pub(crate) fn bind<'q, T: Encode<'q, Postgres> + Type<Postgres>>(&mut self, value: T) -> String {
        #[cfg(test)]
        self.types.push(sqlx::TypeInfo::name(&T::type_info()).to_owned());
        if let Err(error) = self.arguments.add(value) {
            self.unfit.get_or_insert(error.to_string());
        }
        self.count += 1;
        format!("${}", self.count)
    }

    /// Rows that travel as one array for each column.
    pub(crate) fn rows(&mut self) -> Columns<'_> {
        Columns { sql: self, names: String::new(), arrays: String::new() }
    }

    /// Runs it in a transaction of the service's own.
    pub(crate) async fn fetch<'c>(self, executor: impl sqlx::PgExecutor<'c>) -> sqlx::Result<Vec<PgRow>> {
        if let Some(why) = self.unfit {
            return Err(sqlx::Error::Encode(why.into()));
        }
        sqlx::query_with(AssertSqlSafe(self.text), self.arguments).fetch_all(executor).await
    }

    fn query(self) -> Result<Query> {
        if let Some(why) = self.unfit {
            return Err(StorageError::refused(why));
        }
        // The text is put together from constants of this crate and the schema's checked name; what users give is bound.
        Ok(sqlx::query_with(AssertSqlSafe(self.text), self.arguments))
    }

    /// Runs it to its end: the server's last word is awaited, so what it commits is committed.
    pub(crate) async fn run(self, connection: &mut PgConnection, commits: Commits) -> Result<Vec<PgRow>> {
        self.query()?.fetch_all(connection).await.map_err(|error| sort(error, commits == Commits::Yes))
    }

    /// Runs one that reads, as long as its rows are welcome; none if they were not to the end. Then the rest of the answer is
    /// still to come.
    pub(crate) async fn run_while(
        self,
        connection: &mut PgConnection,
        mut welcome: impl FnMut(&PgRow) -> bool,
    ) -> Result<Option<Vec<PgRow>>> {
        let mut answer = self.query()?.fetch(connection);
        let mut rows = Vec::new();
        while let Some(row) = answer.try_next().await.map_err(|error| sort(error, false))? {
            if !welcome(&row) {
                return Ok(None);
            }
            rows.push(row);
        }
        Ok(Some(rows))
    }

    /// The same for a statement that is a transaction of its own, and whose answer is how many rows it has written.
    pub(crate) async fn write(self, connection: &mut PgConnection) -> Result<u64> {
        let written = self.query()?.execute(connection).await;
        written.map(|written| written.rows_affected()).map_err(|error| sort(error, true))
    }
}

/// A text that stands in a statement itself. It means the same whatever the session's encoding is, and whatever backslashes
/// mean there.
pub(crate) fn literal(text: &str) -> String {
    let mut literal = String::with_capacity(text.len() + 3);
    literal.push_str("E'");
    for char in text.chars() {
        match char {
            '\'' => literal.push_str("''"),
            '\\' => literal.push_str("\\\\"),
            ' '..='~' => literal.push(char),
            // Writing to a text cannot fail.
            _ => drop(write!(literal, "\\U{:08X}", u32::from(char))),
        }
    }
    literal.push('\'');
    literal
}

/// A UUID that stands in a statement itself.
pub(crate) fn uuid(uuid: Uuid) -> String {
    format!("'{uuid}'::pg_catalog.uuid")
}

/// See [`Sql::rows`].
pub(crate) struct Columns<'s> {
    sql: &'s mut Sql,
    names: String,
    arrays: String,
}

impl Columns<'_> {
    pub(crate) fn column<'q, T>(mut self, name: &str, values: impl Iterator<Item = T>) -> Self
    where
        Vec<T>: Encode<'q, Postgres> + Type<Postgres>,
    {
        let array = self.sql.bind(values.collect::<Vec<T>>());
        if !self.names.is_empty() {
            self.names.push_str(", ");
            self.arrays.push_str(", ");
        }
        self.names.push_str(name);
        self.arrays.push_str(&array);
        self
    }

    /// As a source of rows, with their places from 1 as `ord`.
    pub(crate) fn named(self, name: impl Display) -> String {
        format!("unnest({}) WITH ORDINALITY AS {name} ({}, ord)", self.arrays, self.names)
    }
}
