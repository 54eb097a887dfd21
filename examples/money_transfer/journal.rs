//! Which attempts of steps were made, by which program: for the check at the end, which trusts neither the engine nor
//! the accounts.

use durable_core::Process;
use sqlx::Row;
use sqlx::sqlite::SqlitePool;
use std::path::Path;

use crate::{Error, files};

#[derive(Clone)]
pub struct Journal(SqlitePool);

/// Which step of which execution makes an attempt.
#[derive(Clone)]
pub struct Call {
    pub id: String,
    pub execution: i64,
    pub step: &'static str,
    /// The idempotency key, where there is one.
    pub key: String,
}

impl Call {
    pub fn of(proc: &Process, step: &'static str) -> Self {
        Self { id: proc.id().to_owned(), execution: proc.execution(), step, key: String::new() }
    }
}

/// An attempt that was noted.
pub struct Noted {
    pub id: String,
    pub execution: i64,
    pub step: String,
    pub key: String,
}

impl Journal {
    pub async fn open(folder: &Path) -> Result<Self, Error> {
        let journal = Self(files::pool(&files::journal(folder)).await?);
        sqlx::raw_sql(
            "CREATE TABLE IF NOT EXISTS calls (call INTEGER PRIMARY KEY, id TEXT NOT NULL, execution INTEGER NOT NULL,
                 step TEXT NOT NULL, key TEXT NOT NULL, program INTEGER NOT NULL, state TEXT NOT NULL)",
        )
        .execute(&journal.0)
        .await?;
        Ok(journal)
    }

    /// An attempt begins; its number.
    pub async fn begin(&self, call: Call) -> Result<i64, sqlx::Error> {
        let insert =
            sqlx::query("INSERT INTO calls (id, execution, step, key, program, state) VALUES (?, ?, ?, ?, ?, 'begun')");
        let insert = insert.bind(call.id).bind(call.execution).bind(call.step).bind(call.key);
        Ok(insert.bind(std::process::id()).execute(&self.0).await?.last_insert_rowid())
    }

    /// An attempt was answered.
    pub async fn end(&self, number: i64) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE calls SET state = 'ended' WHERE call = ?").bind(number).execute(&self.0).await.map(|_| ())
    }

    /// How many attempts of a program have not been answered.
    pub async fn under_way(&self, program: u32) -> Result<i64, Error> {
        let count = sqlx::query("SELECT count(*) FROM calls WHERE program = ? AND state = 'begun'").bind(program);
        Ok(count.fetch_one(&self.0).await?.get(0))
    }

    /// Whether an attempt of this step has begun.
    pub async fn has_begun(&self, id: &str, step: &str) -> Result<bool, Error> {
        let calls = sqlx::query("SELECT 1 FROM calls WHERE id = ? AND step = ? LIMIT 1").bind(id).bind(step);
        Ok(calls.fetch_optional(&self.0).await?.is_some())
    }

    /// A program was stopped or killed: of which processes it had attempts under way.
    pub async fn cut_off(&self, program: u32) -> Result<Vec<String>, Error> {
        let update = "UPDATE calls SET state = 'cut off' WHERE program = ? AND state = 'begun' RETURNING id";
        Ok(sqlx::query_scalar(update).bind(program).fetch_all(&self.0).await?)
    }

    /// All attempts, in order.
    pub async fn calls(&self) -> Result<Vec<Noted>, Error> {
        let rows = sqlx::query("SELECT id, execution, step, key FROM calls ORDER BY call").fetch_all(&self.0).await?;
        let noted = |row: sqlx::sqlite::SqliteRow| Noted {
            id: row.get(0),
            execution: row.get(1),
            step: row.get(2),
            key: row.get(3),
        };
        Ok(rows.into_iter().map(noted).collect())
    }
}
