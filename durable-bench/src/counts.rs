//! What the database itself has counted.

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::Error;
use crate::machine::processor;
use crate::site::At;

/// What one step costs, as far as the database counts it.
#[derive(Clone, Copy, Default)]
pub struct Each {
    /// Rows that were written.
    pub rows: Option<f64>,
    /// Statements.
    pub statements: Option<f64>,
    /// Transactions.
    pub commits: Option<f64>,
    /// Microseconds of the program's processor time.
    pub processor: Option<f64>,
}

impl Display for Each {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let counts = [(self.commits, "commits"), (self.statements, "statements"), (self.rows, "rows")];
        let words = counts.into_iter().filter_map(|(count, what)| Some(format!("{:.3} {what}", count?)));
        let processor = self.processor.map(|micros| format!("{micros:.1} µs of processor time"));
        let words: Vec<String> = words.chain(processor).collect();
        if words.is_empty() { Ok(()) } else { write!(f, "; {} a step", words.join(", ")) }
    }
}

/// What was counted since something.
#[derive(Clone, Copy, Default)]
struct Counted {
    rows: Option<i64>,
    statements: Option<i64>,
    commits: Option<i64>,
}

/// The counts of a measurement.
pub struct Counts {
    of: Of,
    before: Counted,
    processor: f64,
}

enum Of {
    Postgres { url: String, schema: String },
    Sqlite { connection: SqliteConnection, index: &'static File },
}

impl Of {
    async fn counted(&self) -> Result<Counted, Error> {
        match self {
            Self::Postgres { url, schema } => postgres(url, schema).await,
            Self::Sqlite { index, .. } => {
                // `iChange` of the WAL's index: one more with each commit, whoever's it is.
                let mut changes = [0; 4];
                index.read_exact_at(&mut changes, 8)?;
                Ok(Counted { commits: Some(u32::from_ne_bytes(changes).into()), ..Counted::default() })
            }
        }
    }
}

impl Counts {
    /// From now on. Nothing runs there yet.
    pub async fn begin(at: &At) -> Result<Self, Error> {
        let of = match at {
            At::Postgres { url, schema } => Of::Postgres { url: url.clone(), schema: schema.clone() },
            At::Sqlite { path } => sqlite(path).await?,
        };
        Ok(Self { before: of.counted().await?, of, processor: processor()? })
    }

    /// For each of so many steps. What ran there has been shut down.
    pub async fn each(self, steps: usize) -> Result<Each, Error> {
        let processor = processor()? - self.processor;
        let (before, until) = (self.before, self.of.counted().await?);
        if let Of::Sqlite { connection, .. } = self.of {
            connection.close().await?;
        }
        let each =
            |until: Option<i64>, before: Option<i64>| Some((until? - before.unwrap_or_default()) as f64 / steps as f64);
        Ok(Each {
            rows: each(until.rows, before.rows),
            statements: each(until.statements, before.statements),
            commits: each(until.commits, before.commits),
            processor: Some(processor * 1e6 / steps as f64),
        })
    }
}

/// Stays connected, or the file with the counter would be gone with the last one that is.
async fn sqlite(path: &Path) -> Result<Of, Error> {
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let mut connection = options.pragma("journal_mode", "WAL").connect().await?;
    sqlx::query("SELECT count(*) FROM sqlite_schema").execute(&mut connection).await?;
    let mut index = path.as_os_str().to_owned();
    index.push("-shm");
    // Never closed: that would release the locks that SQLite has on it in this program.
    Ok(Of::Sqlite { connection, index: Box::leak(Box::new(File::open(index)?)) })
}

/// Commits and rows of the whole database; and the statements that name this schema, as far as `pg_stat_statements` is
/// there.
async fn postgres(url: &str, schema: &str) -> Result<Counted, Error> {
    let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.application_name("counts").connect().await?;
    // A session hands in its counts at its end.
    let gone = "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND
        datname = current_database() AND backend_type = 'client backend' AND
        (application_name LIKE 'bench\\_%' OR datname LIKE 'bench\\_%'))";
    for _ in 0..200 {
        if sqlx::query_scalar(gone).fetch_one(&mut connection).await? {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let sql = "SELECT xact_commit, tup_inserted + tup_updated + tup_deleted FROM pg_stat_database
        WHERE datname = current_database()";
    let row = sqlx::query(sql).fetch_one(&mut connection).await?;
    let there = "SELECT EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'pg_stat_statements')";
    let statements = if sqlx::query_scalar(there).fetch_one(&mut connection).await? {
        let sql = format!(
            "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE query LIKE '%{schema}%' AND
             dbid = (SELECT oid FROM pg_database WHERE datname = current_database())"
        );
        // Where the library is not loaded the view is there, and an error.
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await.ok()
    } else {
        None
    };
    connection.close().await?;
    Ok(Counted { rows: Some(row.get(1)), statements, commits: Some(row.get(0)) })
}
