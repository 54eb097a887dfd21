//! What the database itself has counted.

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use std::time::Duration;

use crate::Error;
use crate::site::{At, Place, Site};

/// Commits and statements of a measurement. Of SQLite there are none to be had: its file does not count them.
pub(crate) struct Counts {
    url: String,
    before: Option<(i64, i64)>,
}

impl Counts {
    /// From now on.
    pub(crate) async fn begin(place: &Place) -> Result<Self, Error> {
        let Place::Postgres { url } = place else { return Ok(Self { url: String::new(), before: None }) };
        Ok(Self { url: url.clone(), before: Some(read(url, "").await?) })
    }

    /// In words, for each of so many steps on this site. The engine has been shut down.
    pub(crate) async fn each(self, site: &Site, steps: usize) -> Result<String, Error> {
        let (Some((commits, _)), At::Postgres { schema, .. }) = (self.before, &site.at) else {
            return Ok(String::new());
        };
        let (until, statements) = read(&self.url, schema).await?;
        let each = |count: i64| count as f64 / steps as f64;
        let mut words = format!("; {:.3} commits", each(until - commits));
        if statements > 0 {
            words.push_str(&format!(", {:.3} statements", each(statements)));
        }
        words.push_str(" a step");
        Ok(words)
    }
}

/// The commits of the whole database, and the statements that name this schema, as far as `pg_stat_statements` is there.
async fn read(url: &str, schema: &str) -> Result<(i64, i64), Error> {
    let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
    // A session hands in its counts at its end.
    let gone = "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'bench\\_%')";
    for _ in 0..200 {
        if sqlx::query_scalar(gone).fetch_one(&mut connection).await? {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let commits = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()";
    let commits = sqlx::query_scalar(commits).fetch_one(&mut connection).await?;
    let there = "SELECT EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'pg_stat_statements')";
    let statements = if !schema.is_empty() && sqlx::query_scalar(there).fetch_one(&mut connection).await? {
        // Where the library is not loaded the view is there, and an error.
        let sql =
            format!("SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE query LIKE '%{schema}%'");
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap_or_default()
    } else {
        0
    };
    connection.close().await?;
    Ok((commits, statements))
}
