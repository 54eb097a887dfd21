//! Where is measured: a fresh database for each measurement, a file of SQLite's or a schema of PostgreSQL's, which is
//! gone afterwards.

use durable_core::{Host, HostBuilder, RunId};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor};
use std::path::PathBuf;

use crate::Error;
use crate::processes::{self, FLIGHT, MESSAGE, STEPS, TRANSACTIONS, YEAR};
use crate::raw::{self, Raw};

/// Which database, and where.
#[derive(Clone)]
pub enum Place {
    /// Files in this folder.
    Sqlite {
        /// On the disk that is to be measured.
        folder: PathBuf,
    },
    /// Schemas of a database.
    Postgres {
        /// The database's address.
        url: String,
    },
}

impl Place {
    /// As the command line names it.
    pub fn new(storage: &str, folder: PathBuf) -> Result<Self, Error> {
        match storage.split_once("://") {
            None if storage == "sqlite" => Ok(Self::Sqlite { folder }),
            Some(("postgres" | "postgresql", _)) => Ok(Self::Postgres { url: storage.to_owned() }),
            _ => Err("no such storage; there are: sqlite, postgres://user:password@host/database".into()),
        }
    }

    /// Short, for a table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sqlite { .. } => "sqlite",
            Self::Postgres { .. } => "postgres",
        }
    }

    /// A fresh database.
    pub fn site(&self) -> Result<Site, Error> {
        Ok(match self {
            Self::Sqlite { folder } => {
                let folder = tempfile::Builder::new().prefix("durable-bench-").tempdir_in(folder)?;
                Site { at: At::Sqlite { path: folder.path().join("bench.db") }, _folder: Some(folder) }
            }
            Self::Postgres { url } => {
                let schema = format!("bench_{}", RunId::new().0.simple());
                // So that the sessions of this measurement can be told from others.
                let and = if url.contains('?') { '&' } else { '?' };
                let url = format!("{url}{and}application_name={schema}");
                Site { at: At::Postgres { url, schema }, _folder: None }
            }
        })
    }

    /// A fresh database for statements without the engine, with the engine's tables.
    pub async fn raw(&self) -> Result<(Box<dyn Raw>, Site), Error> {
        let site = self.site()?;
        site.at.lay_out().await?;
        Ok((site.at.raw().await?, site))
    }
}

/// A database that is gone once this is dropped.
pub struct Site {
    /// How to get there.
    pub at: At,
    _folder: Option<tempfile::TempDir>,
}

impl Drop for Site {
    fn drop(&mut self) {
        let At::Postgres { url, schema } = &self.at else { return };
        let (url, sql) = (url.clone(), format!("DROP SCHEMA IF EXISTS {schema} CASCADE"));
        // In a thread of its own: whoever drops it may be on a runtime.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
                connection.execute("SET lock_timeout = 10000").await?;
                connection.execute(AssertSqlSafe(sql)).await?;
                Ok::<_, Error>(())
            })
        });
        if !matches!(dropping.join(), Ok(Ok(()))) {
            eprintln!("schema {schema} could not be dropped");
        }
    }
}

/// How to get to a database.
#[derive(Clone)]
pub enum At {
    /// A file.
    Sqlite {
        /// Its path.
        path: PathBuf,
    },
    /// A schema of a database.
    Postgres {
        /// The database's address.
        url: String,
        /// The schema's name.
        schema: String,
    },
}

impl At {
    /// From the arguments of a worker program.
    pub fn new(address: String, schema: Option<String>) -> Self {
        match schema {
            Some(schema) => Self::Postgres { url: address, schema },
            None => Self::Sqlite { path: address.into() },
        }
    }

    /// The arguments of a worker program.
    pub(crate) fn arguments(&self) -> Vec<String> {
        match self {
            Self::Sqlite { path } => vec!["--at".into(), path.display().to_string()],
            Self::Postgres { url, schema } => vec!["--at".into(), url.clone(), "--schema".into(), schema.clone()],
        }
    }

    /// What a table of the service's is called.
    pub(crate) fn table(&self, name: &str) -> String {
        match self {
            Self::Sqlite { .. } => name.to_owned(),
            Self::Postgres { schema, .. } => format!("{schema}.{name}"),
        }
    }

    /// An engine with all processes that are measured.
    pub async fn host(&self) -> Result<HostBuilder, Error> {
        let host = match self {
            Self::Sqlite { path } => {
                let path = path.to_str().ok_or("the folder's path is not UTF-8")?;
                Host::builder(durable_sqlite::Sqlite::open(path).await?)
                    .register(TRANSACTIONS, processes::durable_sqlite::transactions)
            }
            Self::Postgres { url, schema } => {
                Host::builder(durable_postgres::Postgres::connect(url).schema(schema).await?)
                    .register(TRANSACTIONS, processes::durable_postgres::transactions)
            }
        };
        Ok(host
            .register(STEPS, processes::steps)
            .register(YEAR, processes::year)
            .register(MESSAGE, processes::message)
            .register(FLIGHT, processes::flight))
    }

    /// An engine that runs nothing, to start and to watch.
    pub(crate) async fn watcher(&self) -> Result<Host, Error> {
        let host = match self {
            Self::Sqlite { path } => Host::builder(durable_sqlite::Sqlite::open(path.display().to_string()).await?),
            Self::Postgres { url, schema } => {
                Host::builder(durable_postgres::Postgres::connect(url).schema(schema).await?)
            }
        };
        Ok(host.label("watcher").start().await?)
    }

    /// The engine's tables, without the engine.
    pub async fn lay_out(&self) -> Result<(), Error> {
        match self {
            Self::Sqlite { path } => raw::sqlite::lay_out(path).await,
            Self::Postgres { url, schema } => raw::postgres::lay_out(url, schema).await,
        }
    }

    /// A connection for statements without the engine.
    pub async fn raw(&self) -> Result<Box<dyn Raw>, Error> {
        Ok(match self {
            Self::Sqlite { path } => Box::new(raw::sqlite::Sqlite::open(path).await?),
            Self::Postgres { url, schema } => Box::new(raw::postgres::Postgres::open(url, schema).await?),
        })
    }
}
