use futures_util::TryStreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqliteRow};
use sqlx::{Arguments, AssertSqlSafe, Either, Executor};
use std::sync::Arc;

use crate::errors::sort;
use durable_core::storage::{Result, StorageError};

/// The database's time, as it stands in every column of time.
pub(crate) const NOW: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";

/// A value bound to a statement.
#[derive(Clone, Debug)]
pub(crate) enum Arg {
    Text(Arc<str>),
    Int(i64),
    Null,
}

impl From<&str> for Arg {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}
impl From<String> for Arg {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}
impl From<Arc<str>> for Arg {
    fn from(text: Arc<str>) -> Self {
        Self::Text(text)
    }
}
impl From<i64> for Arg {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}
impl<T: Into<Arg>> From<Option<T>> for Arg {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// Statements that run one after the other in a single call to the database's thread: a transaction among them begins,
/// writes and commits without coming back in between, so nothing in this program can hold it open.
#[derive(Default)]
pub(crate) struct Script {
    sql: String,
    args: Vec<Arg>,
    statements: usize,
    /// The same text is not run again: its statements are not kept.
    pub(crate) once: bool,
    /// Where each statement, and its arguments, begin.
    #[cfg(test)]
    begins: Vec<(usize, usize)>,
}

#[cfg(test)]
thread_local! {
    /// What has been run on this thread.
    pub(crate) static RAN: std::cell::RefCell<Vec<(String, Vec<Arg>)>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// As the driver binds them.
pub(crate) fn arguments(args: Vec<Arg>) -> sqlx::Result<SqliteArguments> {
    let mut arguments = SqliteArguments::default();
    for arg in args {
        let added = match arg {
            Arg::Text(text) => arguments.add(text),
            Arg::Int(number) => arguments.add(number),
            Arg::Null => arguments.add(None::<i64>),
        };
        added.map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// What one statement of a script answered.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) rows: Vec<SqliteRow>,
    pub(crate) changes: u64,
}

impl Script {
    /// Adds a statement and says which one it is. The arguments are those of its `?`, in order.
    pub(crate) fn add(&mut self, sql: &str, args: impl IntoIterator<Item = Arg>) -> usize {
        #[cfg(test)]
        self.begins.push((self.sql.len(), self.args.len()));
        self.sql.push_str(sql.trim());
        self.sql.push_str(";\n");
        self.args.extend(args);
        self.statements += 1;
        self.statements - 1
    }

    /// Its statements, each with its arguments.
    #[cfg(test)]
    pub(crate) fn parts(&self) -> Vec<(String, Vec<Arg>)> {
        let ends = self.begins[1..].iter().copied().chain([(self.sql.len(), self.args.len())]);
        let part = |((from, args_from), (to, args_to)): ((usize, usize), (usize, usize))| {
            (self.sql[from..to].trim().trim_end_matches(';').to_owned(), self.args[args_from..args_to].to_vec())
        };
        self.begins.iter().copied().zip(ends).map(part).collect()
    }

    /// Runs it. After an error nothing of it is left: what it began is rolled back. **Dropped before it returns, it may
    /// leave a transaction open**: the connection must go with it ([`Lent`](crate::lend::Lent)).
    pub(crate) async fn run(self, connection: &mut SqliteConnection) -> Result<Vec<Answer>> {
        Ok(self.run_while(connection, |_, _| true).await?.unwrap_or_default())
    }

    /// The same, while `welcome` says yes to each row, which it gets with the place of the row's statement. [`None`] if it has
    /// said no; then nothing of the script is left either.
    pub(crate) async fn run_while(
        self,
        connection: &mut SqliteConnection,
        mut welcome: impl FnMut(usize, &SqliteRow) -> bool,
    ) -> Result<Option<Vec<Answer>>> {
        #[cfg(test)]
        RAN.with_borrow_mut(|ran| ran.extend(self.parts()));
        let arguments = arguments(self.args).map_err(StorageError::refused)?;
        // The text is put together from constants of this crate; what users give is bound.
        let query = sqlx::query_with(AssertSqlSafe(self.sql), arguments).persistent(!self.once);
        let mut answers = Vec::with_capacity(self.statements);
        let result: std::result::Result<bool, sqlx::Error> = async {
            let mut stream = (&mut *connection).fetch_many(query);
            let mut current = Answer::default();
            while let Some(item) = stream.try_next().await? {
                match item {
                    Either::Right(row) if !welcome(answers.len(), &row) => return Ok(false),
                    Either::Right(row) => current.rows.push(row),
                    Either::Left(done) => {
                        current.changes = done.rows_affected();
                        answers.push(std::mem::take(&mut current));
                    }
                }
            }
            Ok(true)
        }
        .await;
        if let Ok(true) = result {
            return Ok(Some(answers));
        }
        // Fails where nothing was begun or the error has rolled back already: either is what is wanted.
        let _ = connection.execute("ROLLBACK").await;
        // The last statement is the commit, or commits by itself.
        let committing = answers.len() + 1 >= self.statements;
        result.map(|_| None).map_err(|error| sort(error, committing))
    }
}
