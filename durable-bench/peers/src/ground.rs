//! A database of its own for each measurement, so that what the database counts is this measurement's.

use durable_bench::Error;
use durable_bench::site::{At, Place};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use uuid::Uuid;

pub(crate) struct Ground {
    place: Place,
    name: String,
    /// How this library gets there.
    pub(crate) at: At,
    _folder: Option<tempfile::TempDir>,
}

impl Ground {
    pub(crate) async fn new(place: &Place) -> Result<Self, Error> {
        let name = format!("bench_{}", Uuid::now_v7().simple());
        let (at, folder) = match place {
            Place::Sqlite { folder } => {
                let folder = tempfile::Builder::new().prefix("durable-bench-").tempdir_in(folder)?;
                (At::Sqlite { path: folder.path().join("bench.db") }, Some(folder))
            }
            Place::Postgres { url } => {
                execute(url, &format!("CREATE DATABASE {name} TEMPLATE template0")).await?;
                let schema = "durable".to_owned();
                let url = url.parse::<PgConnectOptions>()?.database(&name).to_url_lossy().to_string();
                // Without the library in the server this is refused, and nothing else needs it.
                let _ = execute(&url, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await;
                (At::Postgres { url, schema }, None)
            }
        };
        Ok(Self { place: place.clone(), name, at, _folder: folder })
    }

    /// Its address, or its path.
    pub(crate) fn address(&self) -> String {
        match &self.at {
            At::Postgres { url, .. } => url.clone(),
            At::Sqlite { path } => path.display().to_string(),
        }
    }

    /// All that is there, for counting.
    pub(crate) fn all(&self) -> At {
        match &self.at {
            At::Postgres { url, .. } => At::Postgres { url: url.clone(), schema: String::new() },
            at @ At::Sqlite { .. } => at.clone(),
        }
    }

    pub(crate) async fn end(self) -> Result<(), Error> {
        let Place::Postgres { url } = &self.place else { return Ok(()) };
        execute(url, &format!("DROP DATABASE {} WITH (FORCE)", self.name)).await
    }
}

async fn execute(url: &str, sql: &str) -> Result<(), Error> {
    let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
    connection.execute(AssertSqlSafe(sql.to_owned())).await?;
    Ok(connection.close().await?)
}
