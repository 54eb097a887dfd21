use durable_core::storage::{Result, StorageError, shares};
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tiberius::error::Error;
use tiberius::{AuthMethod, Config};

use crate::errors::reading;
use crate::names::Schema;
use crate::session::{Bounds, Session, Sessions, Whose};
use crate::store::Shared;
use crate::{Mssql, heart, migrate, rows};

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Token =
    Arc<dyn Fn() -> Boxed<std::result::Result<String, Box<dyn std::error::Error + Send + Sync>>> + Send + Sync>;

/// Where a database is: an ADO.NET connection string, or the driver's [`Config`], which is its typed builder.
#[derive(Clone)]
pub struct Address(std::result::Result<Config, String>);

impl From<&str> for Address {
    fn from(text: &str) -> Self {
        // The driver's own words may hold a part of the text, and so of the password.
        Self(Config::from_ado_string(text).map_err(|_| {
            "the connection string is not one; give `server=tcp:host,1433;database=…;user=…;password=…`, with values that \
             hold `;` or quotes within quotes"
                .to_owned()
        }))
    }
}

impl From<String> for Address {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<&String> for Address {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl From<Config> for Address {
    fn from(config: Config) -> Self {
        Self(Ok(config))
    }
}

/// Where sessions are opened, and how.
#[derive(Clone)]
pub(crate) struct Target {
    config: Config,
    token: Option<Token>,
    pub(crate) bounds: Bounds,
}

impl Target {
    #[cfg(test)]
    pub(crate) fn plain(config: Config, bounds: Bounds) -> Self {
        Self { config, token: None, bounds }
    }

    /// For one login.
    pub(crate) async fn config(&self) -> tiberius::Result<Config> {
        let mut config = self.config.clone();
        config.handshake_timeout(Some(self.bounds.connect));
        config.command_timeout(Some(self.bounds.statement));
        if let Some(token) = &self.token {
            let token = token().await.map_err(|error| Error::Io {
                kind: tiberius::error::IoErrorKind::PermissionDenied,
                message: format!("no token to log in with: {error}"),
            })?;
            config.authentication(AuthMethod::aad_token(token));
        }
        Ok(config)
    }
}

/// How a SQL Server database is connected to, to be awaited. See [`Mssql::connect`].
#[derive(Clone)]
#[must_use = "nothing is connected before it is awaited"]
pub struct Connect {
    address: Address,
    token: Option<Token>,
    certificates: Vec<String>,
    trust_any: bool,
    schema: String,
    verify_only: bool,
    max_connections: usize,
    max_transactions: usize,
    bounds: Bounds,
}

impl Connect {
    pub(crate) fn new(address: Address) -> Self {
        Self {
            address,
            token: None,
            certificates: Vec::new(),
            trust_any: false,
            schema: "durable".to_owned(),
            verify_only: false,
            max_connections: 10,
            max_transactions: 8,
            bounds: Bounds::default(),
        }
    }

    /// Logs in with a Microsoft Entra (Azure AD) token instead of a user and a password. It is asked for with each
    /// connection that is opened, as tokens expire.
    pub fn token<F, Fut, E>(mut self, token: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = std::result::Result<String, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.token = Some(Arc::new(move || {
            let token = token();
            Box::pin(async move { token.await.map_err(Into::into) })
        }));
        self
    }

    /// Trusts the certificate authorities in this file (PEM or DER), besides those of the operating system.
    pub fn trust_ca(mut self, file: impl Into<String>) -> Self {
        self.certificates.push(file.into());
        self
    }

    /// Trusts whatever certificate the server shows: whoever is between can read and change everything. For a server on
    /// this machine with a certificate of its own making.
    pub fn trust_server_certificate(mut self) -> Self {
        self.trust_any = true;
        self
    }

    /// The schema that holds the tables; `durable` by default. Letters, digits and underscores.
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into();
        self
    }

    /// Checks the tables and refuses them if they do not fit, instead of bringing them up to date. For a login that may
    /// not create anything; [`schema_sql`](crate::schema_sql) prints what another one has to run.
    pub fn verify_only(mut self) -> Self {
        self.verify_only = true;
        self
    }

    /// How many connections the engine uses at most, besides one for each host's heartbeat; 10 by default, and at least 3. Of
    /// 10, 3 write, 4 look for work, and 3 read for callers of `Host` and `Handle`: however many calls
    /// there are, and however slow, they delay only each other.
    pub fn max_connections(mut self, most: usize) -> Self {
        self.max_connections = most;
        self
    }

    /// How many transactional steps run at once at most, each on a connection of its own; 8 by default.
    pub fn max_transactions(mut self, most: usize) -> Self {
        self.max_transactions = most;
        self
    }

    /// How long a statement of the engine may keep it waiting for an answer, and for a lock; 30 s and 2 s by default.
    /// The second should be below half of the hosts' expiry.
    pub fn timeouts(mut self, statement: Duration, lock: Duration) -> Self {
        (self.bounds.statement, self.bounds.lock) = (statement, lock);
        self
    }

    /// How long opening a connection may take; 5 s by default.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.bounds.connect = timeout;
        self
    }

    fn target(&self) -> Result<Target> {
        let mut config = self.address.0.clone().map_err(StorageError::schema)?;
        if self.trust_any && !self.certificates.is_empty() {
            return Err(StorageError::schema(
                "`trust_ca` and `trust_server_certificate` exclude each other: leave out the latter",
            ));
        }
        self.certificates.iter().for_each(|file| config.trust_cert_ca(file));
        if self.trust_any {
            config.trust_cert();
        }
        Ok(Target { config, token: self.token.clone(), bounds: self.bounds })
    }

    async fn connect(self) -> Result<Mssql> {
        let schema = Schema::new(&self.schema)?;
        let target = self.target()?;
        let place = target.config.get_addr();
        let [writing, sessions, asking] =
            shares(self.max_connections).map(|most| Sessions::new(target.clone(), Whose::Engine, most));
        let mut session = sessions.own().await.map_err(|error| explain(&place, error))?;
        let name = database(&mut session).await?;
        let schema = schema.within(&name);
        if self.verify_only {
            migrate::verify(&mut session, &schema).await?;
        } else {
            migrate::migrate(&mut session, &schema).await?;
        }
        let mut second = sessions.own().await?;
        let locks = heart::locks_are_real(&mut session, &mut second, &schema).await?;
        if !locks {
            tracing::warn!(
                "session locks do not exclude each other here: a dead instance is noticed by its heartbeat alone"
            );
        }
        let transactions = Sessions::new(target, Whose::Service, self.max_transactions);
        Ok(Mssql(Arc::new(Shared { schema, writing, sessions, asking, transactions, locks, bounds: self.bounds })))
    }
}

#[cfg(test)]
impl Mssql {
    /// One that was never connected, for the text of its statements.
    pub(crate) fn offline() -> Self {
        let bounds = Bounds::default();
        let target = Target::plain(Config::new(), bounds);
        let sessions = |whose| Sessions::new(target.clone(), whose, 1);
        let [writing, asking, transactions] = [Whose::Engine, Whose::Engine, Whose::Service].map(sessions);
        let sessions = sessions(Whose::Engine);
        #[allow(clippy::unwrap_used)]
        let schema = Schema::new("durable").unwrap().within("service");
        Self(Arc::new(Shared { schema, writing, sessions, asking, transactions, locks: true, bounds }))
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the address: it holds the password.
        f.debug_struct("Connect").field("schema", &self.schema).field("verify_only", &self.verify_only).finish()
    }
}

impl IntoFuture for Connect {
    type Output = Result<Mssql>;
    type IntoFuture = Boxed<Result<Mssql>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.connect())
    }
}

/// The database's name, if server and database can do what is asked of them.
async fn database(session: &mut Session) -> Result<String> {
    const SQL_SERVER_2019: i32 = 15;
    // Azure SQL says 12, whatever it can do.
    const AZURE: i32 = 12;
    let about =
        "SELECT DB_NAME(), CONVERT(INT, SERVERPROPERTY('ProductMajorVersion')), CONVERT(NVARCHAR(300), @@VERSION)";
    let row = session.simple_query(about).await.map_err(reading)?.into_row().await.map_err(reading)?;
    let row = row.ok_or_else(|| StorageError::schema("the server did not say which database this is"))?;
    let (name, major): (&str, Option<i32>) = (rows::get(&row, 0)?, rows::maybe(&row, 1)?);
    if major.is_some_and(|major| major < SQL_SERVER_2019 && major != AZURE) {
        let words: &str = rows::maybe(&row, 2)?.unwrap_or("of an unknown version");
        return Err(StorageError::schema(format!("the server is {words}; SQL Server 2019 or later is needed")));
    }
    // A database that was made by an old server may be kept from what a newer one can do.
    let json = async { session.simple_query("SELECT j.[key] FROM OPENJSON(N'[1]') AS j").await?.into_results().await };
    if let Err(why) = json.await {
        return Err(StorageError::schema(format!(
            "database {name:?} has no OPENJSON ({}); it needs compatibility level 130 or later: `ALTER DATABASE {name} SET \
             COMPATIBILITY_LEVEL = 150`",
            reading(why)
        )));
    }
    Ok(name.to_owned())
}

/// An error at connecting, with what was given, except the password, and what the user may do about it.
fn explain(place: &str, error: StorageError) -> StorageError {
    let (StorageError::Unavailable(why) | StorageError::Unknown(why)) = error else { return error };
    let why = why.to_string();
    let hint = if why.contains("TLS") || why.to_lowercase().contains("certificate") {
        "its certificate cannot be verified: give `.trust_ca(file)`, or, for a server on this machine, \
         `.trust_server_certificate()` (`TrustServerCertificate=true`)"
    } else if why.contains("(error 18456)") {
        "are the user and the password right, and may it log in to that database?"
    } else if why.contains("(error 4060)") {
        "does that database exist, and may the user open it? `CREATE DATABASE` makes it"
    } else {
        "is that the address, and does a server listen there?"
    };
    StorageError::unavailable(format!("no connection to {place}: {why}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_checked_and_nothing_of_it_told() {
        let target = |connect: Connect| connect.target().map(drop).unwrap_err().to_string();
        let error = target(Mssql::connect("postgres://user:hidden@host/db"));
        assert!(error.contains("server=tcp:host,1433") && !error.contains("hidden"), "{error}");
        let good = || Mssql::connect("server=tcp:localhost,1433;user=sa;password=hidden");
        let error = target(good().trust_ca("ca.pem").trust_server_certificate());
        assert!(error.contains("exclude each other"), "{error}");
        assert!(!format!("{:?}", good()).contains("hidden"));
    }
}
