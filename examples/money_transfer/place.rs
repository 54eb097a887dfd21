//! Where the processes are kept: a file of SQLite's, or a schema of its own in a PostgreSQL database.

use sqlx::{AnyConnection, Connection};
use std::fmt;
use std::path::PathBuf;

use crate::Error;

#[derive(Clone)]
pub enum Place {
    Sqlite(PathBuf),
    #[cfg(feature = "postgres")]
    Postgres {
        url: String,
        schema: String,
    },
}

impl Place {
    /// `storage` as it was given: a path, or `postgres://…`.
    pub fn new(storage: String, schema: String) -> Result<Self, Error> {
        if !storage.starts_with("postgres://") && !storage.starts_with("postgresql://") {
            return Ok(Self::Sqlite(storage.into()));
        }
        #[cfg(feature = "postgres")]
        return Ok(Self::Postgres { url: storage, schema });
        #[cfg(not(feature = "postgres"))]
        return Err(format!("schema {schema:?} in PostgreSQL needs `cargo run … --features postgres -- …`").into());
    }

    /// What a table is called in SQL.
    pub fn table(&self, name: &str) -> String {
        match self {
            Self::Sqlite(_) => name.to_owned(),
            #[cfg(feature = "postgres")]
            Self::Postgres { schema, .. } => format!("{schema}.{name}"),
        }
    }

    /// A connection of the demo's own.
    pub async fn connect(&self) -> Result<AnyConnection, Error> {
        sqlx::any::install_default_drivers();
        let url = match self {
            Self::Sqlite(path) => format!("sqlite://{}", path.display()),
            #[cfg(feature = "postgres")]
            Self::Postgres { url, .. } => url.clone(),
        };
        Ok(AnyConnection::connect(&url).await?)
    }

    /// Drops what an earlier demo left in the schema. A schema of somebody else's is left alone.
    #[cfg(feature = "postgres")]
    pub async fn clear(&self) -> Result<(), Error> {
        use sqlx::postgres::{PgConnectOptions, PgConnection};
        use sqlx::{AssertSqlSafe, ConnectOptions, Executor};
        const OURS: &str = "of the money_transfer demo, made anew at each start";
        let Self::Postgres { url, schema } = self else { return Ok(()) };
        // It refuses what cannot be a schema's name.
        let sql = durable_postgres::schema_sql(schema)?;
        let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
        let comment = "SELECT coalesce(obj_description(oid, 'pg_namespace'), '') FROM pg_namespace WHERE nspname = $1";
        let comment: Option<String> = sqlx::query_scalar(comment).bind(schema).fetch_optional(&mut connection).await?;
        if comment.is_some_and(|comment| comment != OURS) {
            let why = format!("schema {schema:?} is there and not the demo's own; give another one with `--schema`");
            return Err(why.into());
        }
        let sql = format!("DROP SCHEMA IF EXISTS {schema} CASCADE; {sql} COMMENT ON SCHEMA {schema} IS '{OURS}'");
        connection.execute(AssertSqlSafe(sql)).await?;
        Ok(connection.close().await?)
    }

    /// How a person looks at it.
    pub fn look(&self) -> String {
        match self {
            Self::Sqlite(path) => {
                format!("sqlite3 {} \"SELECT id, status, claim, reason FROM durable_processes\"", path.display())
            }
            #[cfg(feature = "postgres")]
            Self::Postgres { url, schema } => {
                let sql = format!("SELECT id, status, claim, reason FROM {schema}.processes");
                format!("psql {} -c \"{sql}\"", without_password(url))
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "SQLite, {}", path.display()),
            #[cfg(feature = "postgres")]
            Self::Postgres { url, schema } => write!(f, "PostgreSQL, {}, schema {schema}", without_password(url)),
        }
    }
}

/// The address, fit to be shown.
#[cfg(feature = "postgres")]
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return String::new() };
    let Some((user, rest)) = rest.rsplit_once('@') else { return url.to_owned() };
    format!("{scheme}://{}@{rest}", user.split(':').next().unwrap_or_default())
}
