use durable_core::storage::{Result, StorageError, shares};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Error, Executor, Row};
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::Postgres;
use crate::errors::{code, reading};
use crate::lend::Connections;
use crate::listen::Hints;
use crate::names::Schema;
use crate::session::{self, Bounds, Whose};
use crate::store::Shared;
use crate::{heart, migrate, pooler, transaction};

/// How a PostgreSQL database is connected to, to be awaited. See [`Postgres::connect`].
#[derive(Clone)]
#[must_use = "nothing is connected before it is awaited"]
pub struct Connect {
    url: String,
    schema: String,
    verify_only: bool,
    max_connections: usize,
    max_transactions: usize,
    listen: bool,
    bounds: Bounds,
}

impl Connect {
    pub(crate) fn new(url: String) -> Self {
        let schema = "durable".to_owned();
        Self {
            url,
            schema,
            verify_only: false,
            max_connections: 10,
            max_transactions: 8,
            listen: true,
            bounds: Bounds::default(),
        }
    }

    /// The schema that holds the tables; `durable` by default. Letters, digits and underscores.
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into();
        self
    }

    /// Checks the tables and refuses them if they do not fit, instead of bringing them up to date. For a role that may
    /// not create anything: it needs `USAGE` on the schema and `SELECT, INSERT, UPDATE, DELETE` on all tables in it.
    pub fn verify_only(mut self) -> Self {
        self.verify_only = true;
        self
    }

    /// How many connections it uses at most, besides one for each host's heartbeat and one that listens; 10 by default, and
    /// at least 3. Of 10, 3 write, 4 look for work, and 3 read for callers of `Host` and `Handle`: however many calls
    /// there are, and however slow, they delay only each other.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = connections;
        self
    }

    /// How many [transactional steps](crate::Transactions) may be open at the same time, each on a connection of its own; 8
    /// by default. Further ones wait.
    pub fn max_transactions(mut self, transactions: usize) -> Self {
        self.max_transactions = transactions.max(1);
        self
    }

    /// Whether it tells other instances of its writes and hears of theirs, by `NOTIFY` and `LISTEN`; true by default.
    /// Without, they are found by polling.
    pub fn listen(mut self, listen: bool) -> Self {
        self.listen = listen;
        self
    }

    /// How long a statement of the engine may take, and how long it may wait for a lock, before the server gives it up and
    /// the engine tries it again; 30 s and 2 s by default. The second should be below half of the hosts' expiry.
    ///
    /// For a server that has vanished the client itself gives up: after both times together, after four times that for what
    /// takes several statements, and for a heartbeat after 3 s more than the second.
    pub fn timeouts(mut self, statement: Duration, lock: Duration) -> Self {
        (self.bounds.statement, self.bounds.lock) = (statement, lock);
        self
    }

    /// How long the server lets a transaction of this program wait for the program; 4 s by default. What it has locked
    /// is free after that, so it should be below half of the hosts' expiry.
    pub fn idle_in_transaction_timeout(mut self, timeout: Duration) -> Self {
        self.bounds.idle_in_transaction = timeout;
        self
    }

    fn options(&self) -> Result<PgConnectOptions> {
        const FORM: &str = "give `postgres://user:password@host:5432/database`";
        match self.url.split_once("://") {
            Some(("postgres" | "postgresql", _)) => {}
            Some((scheme, _)) => {
                return Err(StorageError::schema(format!(
                    "{scheme:?} is not PostgreSQL's; {FORM}, or use the storage of that database"
                )));
            }
            None => return Err(StorageError::schema(format!("the address is not a URL; {FORM}"))),
        }
        let options = PgConnectOptions::from_str(&address(&self.url)?)
            .map_err(|error| StorageError::schema(format!("the address is not PostgreSQL's ({error}); {FORM}")))?;
        let options = if self.url.contains("statement-cache-capacity=") {
            options
        } else {
            options.statement_cache_capacity(256)
        };
        let options =
            if options.get_application_name().is_none() { options.application_name("durable") } else { options };
        // Whoever compiles TLS in wants to know whom they talk to, unless they say otherwise.
        let tls = cfg!(any(feature = "tls-rustls-aws-lc-rs", feature = "tls-rustls-ring-native-roots"));
        let said = ["sslmode=", "ssl-mode="].iter().any(|key| self.url.contains(key))
            || std::env::var_os("PGSSLMODE").is_some();
        let options =
            if tls && !said && !is_local(&options) { options.ssl_mode(PgSslMode::VerifyFull) } else { options };
        Ok(options
            .log_statements(tracing::log::LevelFilter::Trace)
            .log_slow_statements(tracing::log::LevelFilter::Debug, Duration::from_secs(1)))
    }

    async fn connect(self) -> Result<Postgres> {
        let schema = Schema::new(&self.schema)?;
        let options = self.options()?;
        let explain = |error: Error| explain(&options, error);
        let mut connection = options.connect().await.map_err(explain)?;
        let mut second = options.connect().await.map_err(explain)?;
        let version = sqlx::query("SELECT current_setting('server_version_num')::integer, version()");
        let version = sqlx::Executor::fetch_one(&mut connection, version).await.map_err(explain)?;
        let (number, words): (i32, String) = (version.get(0), version.get(1));
        if number < 140_000 {
            return Err(StorageError::schema(format!("the server is {words}; PostgreSQL 14 or later is needed")));
        }
        let lent = pooler::lends(&mut connection, &mut second).await.map_err(reading)?;
        let bounds = Bounds { lent, ..self.bounds };
        if lent {
            pooler::judge(&mut connection, &mut second, bounds).await?;
        }
        if self.verify_only {
            migrate::verify(&mut connection, &schema).await?;
        } else {
            migrate::migrate(&mut connection, &schema).await?;
        }
        for connection in [&mut connection, &mut second] {
            session::set(connection, bounds, Whose::Engine).await.map_err(reading)?;
        }
        let options = Options { options, bounds, whose: Whose::Engine, prepares: None };
        let locks = !lent && heart::locks_are_real(&mut connection, &mut second).await.map_err(reading)?;
        if !locks {
            let why = if lent {
                "a pooler lends sessions by the transaction"
            } else {
                "session locks do not exclude each other"
            };
            tracing::warn!("{why} here: a dead instance is noticed by its heartbeat alone");
        }
        // A transactional step's record stands in the text of the statement that writes it: that text is never logged.
        let silent = options.options.clone().disable_statement_logging();
        let prepares = locks.then(|| transaction::prepare(&schema).into());
        let service = Options { options: silent, whose: Whose::Service, prepares, ..options.clone() };
        let transactions = Connections::new(service, self.max_transactions);
        let [writing, connections, asking] =
            shares(self.max_connections).map(|most| Connections::new(options.clone(), most));
        writing.keep(connection);
        connections.keep(second);
        let hints = Hints::new(&schema, self.listen && !lent);
        Ok(Postgres(Arc::new(Shared { schema, writing, connections, asking, transactions, locks, hints })))
    }
}

impl std::fmt::Debug for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the address: it holds the password.
        f.debug_struct("Connect").field("schema", &self.schema).field("verify_only", &self.verify_only).finish()
    }
}

impl IntoFuture for Connect {
    type Output = Result<Postgres>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.connect())
    }
}

/// Where and as whom to connect, and what to set there.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) options: PgConnectOptions,
    pub(crate) bounds: Bounds,
    pub(crate) whose: Whose,
    /// What each session is made ready with, where it is one session from its beginning to its end.
    pub(crate) prepares: Option<Arc<str>>,
}

/// A session.
pub(crate) async fn connect(options: &Options) -> sqlx::Result<PgConnection> {
    let mut connection = options.options.connect().await?;
    session::set(&mut connection, options.bounds, options.whose).await?;
    if let Some(prepares) = &options.prepares {
        // There already: a pooler's session after all, that was lent to another one of ours before.
        const THERE: &str = "42P05";
        match connection.execute(sqlx::raw_sql(AssertSqlSafe(prepares.to_string()))).await {
            Err(error) if code(&error).as_deref() != Some(THERE) => return Err(error),
            _ => {}
        }
    }
    if options.whose == Whose::Service {
        // For the driver it is within a transaction from now on, so that one which the service begins within the engine's
        // is a savepoint, and its commit not the engine's.
        std::mem::forget(connection.begin().await?);
        connection.execute("ROLLBACK").await?;
    }
    Ok(connection)
}

/// The address without what the driver does not know, which it would log. Refused, if a part of the password would be taken
/// for a port or a database, and told.
fn address(url: &str) -> Result<String> {
    const KNOWN: [&str; 18] = [
        "sslmode",
        "ssl-mode",
        "sslrootcert",
        "ssl-root-cert",
        "ssl-ca",
        "sslcert",
        "ssl-cert",
        "sslkey",
        "ssl-key",
        "statement-cache-capacity",
        "host",
        "hostaddr",
        "port",
        "dbname",
        "user",
        "password",
        "application_name",
        "options",
    ];
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let (_, rest) = address.split_once("://").unwrap_or(("", address));
    let authority = rest.split(['/', '#']).next().unwrap_or_default();
    let mut known = Vec::new();
    let mut unencoded = rest[authority.len()..].contains('@');
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let key = parameter.split('=').next().unwrap_or_default();
        let plain = key.replace("%5B", "[").replace("%5b", "[").replace("%5D", "]").replace("%5d", "]");
        if KNOWN.contains(&&*plain) || plain.starts_with("options[") {
            known.push(parameter);
        } else {
            unencoded |= key.contains('@');
            tracing::warn!(
                "the address has a parameter that is not known, and not used; known are {}",
                KNOWN.join(", ")
            );
        }
    }
    if unencoded {
        return Err(StorageError::schema(
            "the address has an `@` behind its first `/`, `?` or `#`; in a password these are `%2F`, `%3F` and `%23`",
        ));
    }
    Ok(if known.is_empty() { address.to_owned() } else { format!("{address}?{}", known.join("&")) })
}

fn is_local(options: &PgConnectOptions) -> bool {
    let host = options.get_host();
    options.get_socket().is_some()
        || host.starts_with('/')
        || host == "localhost"
        || host == "::1"
        || host.starts_with("127.")
}

/// An error at connecting, with what was given, except the password, and what the user may do about it.
fn explain(options: &PgConnectOptions, error: Error) -> StorageError {
    let host = options.get_host();
    let place = match options.get_socket() {
        Some(socket) => format!("{} (port {})", socket.display(), options.get_port()),
        None => format!("{host}:{}", options.get_port()),
    };
    let user = options.get_username();
    let database = options.get_database().unwrap_or(user);
    let code = code(&error);
    let hint = match (code.as_deref(), &error) {
        (Some("28P01" | "28000"), _) => {
            format!("are user {user:?} and the password right, and may it log in from here?")
        }
        (Some("3D000"), _) => format!("does database {database:?} exist? `CREATE DATABASE` makes it"),
        (Some("42501"), _) => format!("user {user:?} lacks a right on database {database:?}"),
        (Some("53300"), _) => "the server has no connection left: raise `max_connections`, or lower it here".to_owned(),
        (Some(_), _) => "the server refuses".to_owned(),
        (None, Error::Tls(_)) => "its certificate cannot be verified: give `?sslmode=verify-full&sslrootcert=…`, or \
            `?sslmode=require` for TLS with whomever answers, or `?sslmode=disable`"
            .to_owned(),
        (None, _) => "is that the address, and does a server listen there?".to_owned(),
    };
    let message = match reading(error) {
        StorageError::Unavailable(why) | StorageError::Unknown(why) | StorageError::Refused(why) => why.to_string(),
        other => other.to_string(),
    };
    StorageError::unavailable(format!("no connection to database {database:?} at {place}: {message}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_what_is_not_known() {
        for (url, used) in [
            ("postgres://u:p@h/d", "postgres://u:p@h/d"),
            ("postgres://u:p@h/d?sslmode=require", "postgres://u:p@h/d?sslmode=require"),
            (
                "postgres://u:p@h/d?pasword=x&options%5Bsearch_path%5D=y&",
                "postgres://u:p@h/d?options%5Bsearch_path%5D=y",
            ),
            ("postgres://h:1/d?user=ann@tenant", "postgres://h:1/d?user=ann@tenant"),
            ("postgres://u:p@h/d?nonsense", "postgres://u:p@h/d"),
        ] {
            assert_eq!(address(url).unwrap(), used);
        }
        for password in ["47/11", "47?11", "47#11", "47@a/11"] {
            let error = address(&format!("postgres://ann:{password}@host/db")).unwrap_err().to_string();
            assert!(error.contains("`%2F`, `%3F` and `%23`") && !error.contains("47"), "{error}");
        }
    }
}
