//! Sessions, and the pool that lends them out.
//!
//! A session that a call was given is in doubt from then on. It is trusted again when its answer was read to the end and
//! its transaction is known to be over; one that comes back in doubt, whoever dropped it, is closed.

use durable_core::storage::{Result, StorageError};
use std::fmt;
use std::net::Shutdown;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tiberius::SqlBrowser;
use tiberius::error::{Error, IoErrorKind};
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

use crate::connect::Target;
use crate::errors::reading;

/// The driver's client, on the runtime's sockets.
pub type Client = tiberius::Client<Compat<TcpStream>>;

/// Whose statements a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Engine,
    Service,
}

/// The bounds of sessions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// How long an answer may keep the client waiting.
    pub(crate) statement: Duration,
    /// How long a statement may wait for a lock.
    pub(crate) lock: Duration,
    /// How long opening a connection may take.
    pub(crate) connect: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { statement: Duration::from_secs(30), lock: Duration::from_secs(2), connect: Duration::from_secs(5) }
    }
}

impl Bounds {
    pub(crate) fn lock_ms(&self) -> u128 {
        self.lock.as_millis().max(1)
    }
}

/// What is set in a session, whoever uses it: what the tables' filtered indexes ask of those that write, and that an
/// error ends the transaction.
pub(crate) const SETTINGS: &str = "SET XACT_ABORT ON; SET TRANSACTION ISOLATION LEVEL READ COMMITTED; \
    SET QUOTED_IDENTIFIER ON; SET ANSI_NULLS ON; SET ANSI_PADDING ON; SET ANSI_WARNINGS ON; SET ARITHABORT ON; \
    SET CONCAT_NULL_YIELDS_NULL ON; SET NUMERIC_ROUNDABORT OFF;";

/// How a session stands: what a service's statements may have changed. The last error counts: a session that has seen one
/// is not used again, so that the next one's can be told.
pub(crate) const STANDING: &str = "SELECT CONCAT(@@TRANCOUNT, N'/', DB_NAME(), N'/', SUSER_SNAME(), N'/', USER_NAME(), \
    N'/', @@OPTIONS, N'/', s.language, N'/', s.date_format, N'/', s.date_first, N'/', s.text_size, N'/', s.lock_timeout, \
    N'/', s.deadlock_priority, N'/', s.prev_error) FROM sys.dm_exec_sessions AS s WHERE s.session_id = @@SPID";

/// The socket of a session, which is shut when the session must end whoever holds it.
#[derive(Clone)]
pub(crate) struct Socket(Arc<std::net::TcpStream>);

impl Socket {
    /// The server rolls back what the session has begun.
    pub(crate) fn shut(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Waits until the server has closed it, of a session that nobody uses meanwhile.
    pub(crate) async fn ended(&self) {
        let watched = self.0.try_clone().and_then(TcpStream::from_std);
        let Ok(watched) = watched else { return std::future::pending().await };
        if matches!(watched.peek(&mut [0]).await, Ok(1..)) {
            // The server has something to say, which the next answer is read behind.
            std::future::pending().await
        }
    }
}

/// A session with the server.
pub(crate) struct Session {
    client: Client,
    socket: Socket,
    /// The manager's generation at its birth, and the manager's.
    born: u64,
    generation: Arc<AtomicU64>,
    /// Of a session for the service: how it stood when it was new.
    standing: String,
    doubted: bool,
}

impl Session {
    pub(crate) fn socket(&self) -> Socket {
        self.socket.clone()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.socket.shut();
    }
}

/// Opens sessions. The pool asks it which of them may be lent out again.
pub(crate) struct Manager {
    target: Target,
    whose: Whose,
    /// Counts the times that sessions were lost: others of the same age are not tried one after the other.
    generation: Arc<AtomicU64>,
}

impl Manager {
    pub(crate) fn new(target: Target, whose: Whose) -> Self {
        Self { target, whose, generation: Arc::default() }
    }

    pub(crate) async fn open(&self) -> tiberius::Result<Session> {
        let born = self.generation.load(Ordering::Relaxed);
        let bounds = self.target.bounds;
        let opened = tokio::time::timeout(bounds.connect, open(&self.target)).await;
        let (mut client, socket) = opened.unwrap_or_else(|_| {
            let message = format!("no connection within {:?}", bounds.connect);
            Err(Error::Io { kind: IoErrorKind::TimedOut, message })
        })?;
        let own = match self.whose {
            Whose::Engine => format!("SET NOCOUNT ON; SET LOCK_TIMEOUT {};", bounds.lock_ms()),
            // The table is for the transaction's end to know whether its beginning was kept.
            Whose::Service => format!(
                "CREATE TABLE #durable_kept (kept INT NOT NULL); INSERT INTO #durable_kept (kept) VALUES (0); {STANDING};"
            ),
        };
        let rows = client.simple_query(format!("{SETTINGS} {own}")).await?.into_first_result().await?;
        let standing = rows.first().and_then(|row| row.get::<&str, _>(0)).unwrap_or_default().to_owned();
        Ok(Session { client, socket, born, generation: self.generation.clone(), standing, doubted: false })
    }
}

/// Follows the server to where it sends those who log in (Azure's gateway does).
async fn open(target: &Target) -> tiberius::Result<(Client, Socket)> {
    const REDIRECTIONS: usize = 3;
    let mut config = target.config().await?;
    let mut followed = 0;
    loop {
        let stream = TcpStream::connect_named(&config).await?;
        stream.set_nodelay(true)?;
        let stream = stream.into_std()?;
        let socket = Socket(Arc::new(stream.try_clone()?));
        let stream = TcpStream::from_std(stream)?;
        match Box::pin(Client::connect(config.clone(), stream.compat_write())).await {
            Err(Error::Routing { host, port }) if followed < REDIRECTIONS => {
                followed += 1;
                config.host(host);
                config.port(port);
            }
            connected => return connected.map(|client| (client, socket)),
        }
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Session;
    type Error = Error;

    async fn connect(&self) -> tiberius::Result<Session> {
        self.open().await
    }

    /// Without a round trip: whether it was opened since sessions were last lost.
    async fn is_valid(&self, session: &mut Session) -> tiberius::Result<()> {
        if session.born >= self.generation.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::Io { kind: IoErrorKind::ConnectionAborted, message: "others of its age were lost".into() })
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.doubted
    }
}

/// Sessions, lent to one call at a time.
#[derive(Clone)]
pub(crate) struct Sessions(bb8::Pool<Manager>);

impl Sessions {
    pub(crate) fn new(target: Target, whose: Whose, most: u32) -> Self {
        const PATIENCE: Duration = Duration::from_secs(10);
        let pool = bb8::Pool::builder()
            .max_size(most.max(1))
            .connection_timeout(PATIENCE)
            .retry_connection(false)
            .test_on_check_out(true)
            .build_unchecked(Manager::new(target, whose));
        Self(pool)
    }

    /// Hands over a session, in doubt.
    pub(crate) async fn lend(&self) -> Result<Lent> {
        match self.0.get_owned().await {
            Ok(mut session) => {
                session.doubted = true;
                Ok(Lent(session))
            }
            Err(bb8::RunError::User(error)) => Err(reading(error)),
            Err(bb8::RunError::TimedOut) => {
                Err(StorageError::unavailable("no connection came free, or could be opened, within 10 s"))
            }
        }
    }

    /// A session that is never pooled.
    pub(crate) async fn own(&self) -> Result<Session> {
        self.0.dedicated_connection().await.map_err(reading)
    }
}

/// A session while it is used: the driver's [`Client`], to which it dereferences.
pub struct Lent(bb8::PooledConnection<'static, Manager>);

impl Lent {
    /// Its answers were read to the end, and nothing of it is open.
    pub(crate) fn trust(&mut self) {
        self.0.doubted = false;
    }

    pub(crate) fn socket(&self) -> Socket {
        self.0.socket()
    }

    /// Ends its transaction, and says whether it stands as when it was new.
    pub(crate) async fn is_as_new(&mut self, ending: &str) -> tiberius::Result<bool> {
        let rows = self.simple_query(format!("{ending} {STANDING}")).await?.into_first_result().await?;
        Ok(rows.first().and_then(|row| row.get::<&str, _>(0)).is_some_and(|standing| standing == self.0.standing))
    }

    /// Gives it back, trusted if all went well.
    pub(crate) fn done<T>(mut self, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) | Err(StorageError::Fenced) => self.trust(),
            Err(StorageError::Unavailable(_) | StorageError::Unknown(_)) => {
                self.0.generation.fetch_max(self.0.born + 1, Ordering::Relaxed);
            }
            Err(_) => {}
        }
        result
    }
}

impl Deref for Lent {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.0.client
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.0.client
    }
}

impl Deref for Session {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lent")
    }
}
