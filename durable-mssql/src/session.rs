//! Sessions, and the pool that lends them out.
//!
//! A session that a call was given is in doubt from then on. It is trusted again when its answer was read to the end and
//! its transaction is known to be over; one that comes back in doubt, whoever dropped it, is closed.

use durable_core::storage::{Result, StorageError};
use std::fmt;
use std::future::Future;
use std::net::Shutdown;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tiberius::SqlBrowser;
use tiberius::error::{Error, IoErrorKind};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

use crate::connect::Target;
use crate::errors::reading;
use crate::sql::{Commits, Parts, Sql};

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
        Err(too_old())
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.doubted
    }
}

/// Sessions, lent to one call at a time.
#[derive(Clone)]
pub(crate) struct Sessions {
    pool: bb8::Pool<Manager>,
    errors: Errors,
}

/// Why opening a session failed last. The pool itself lets those who wait for one wait until their patience is at an end,
/// and does not tell them.
#[derive(Clone, Debug)]
struct Errors(watch::Sender<Option<Error>>);

impl Errors {
    /// The next one from now on.
    fn next(&self) -> impl Future<Output = Error> + use<> {
        let mut errors = self.0.subscribe();
        async move {
            loop {
                if errors.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                if let Some(error) = errors.borrow_and_update().clone() {
                    return error;
                }
            }
        }
    }
}

impl bb8::ErrorSink<Error> for Errors {
    fn sink(&self, error: Error) {
        // One that is only too old is replaced.
        if error != too_old() {
            self.0.send_replace(Some(error));
        }
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<Error>> {
        Box::new(self.clone())
    }
}

fn too_old() -> Error {
    Error::Io { kind: IoErrorKind::ConnectionAborted, message: "others of its age were lost".into() }
}

impl Sessions {
    pub(crate) fn new(target: Target, whose: Whose, most: usize) -> Self {
        const PATIENCE: Duration = Duration::from_secs(10);
        let errors = Errors(watch::Sender::new(None));
        let pool = bb8::Pool::builder()
            .error_sink(Box::new(errors.clone()))
            .max_size(u32::try_from(most.max(1)).unwrap_or(u32::MAX))
            .connection_timeout(PATIENCE)
            .retry_connection(false)
            .test_on_check_out(true)
            .build_unchecked(Manager::new(target, whose));
        Self { pool, errors }
    }

    /// Runs a script: one that reads, or that may as well run twice, so that a lost answer is no worse than none.
    pub(crate) async fn run(&self, sql: Sql) -> Result<Parts> {
        let mut lent = self.lend().await?;
        let result = sql.run(&mut lent, Commits::No).await;
        lent.done(result)
    }

    /// Hands over a session, in doubt.
    pub(crate) async fn lend(&self) -> Result<Lent> {
        let failed = self.errors.next();
        let lent = tokio::select! {
            lent = self.pool.get_owned() => lent,
            error = failed => Err(bb8::RunError::User(error)),
        };
        match lent {
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
        self.pool.dedicated_connection().await.map_err(reading)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Answer, Login, Server};
    use crate::sql::{Commits, Sql};
    use std::sync::Mutex;
    use std::time::Instant;

    async fn ask(sessions: &Sessions, commits: Commits) -> Result<()> {
        let mut lent = sessions.lend().await?;
        let mut sql = Sql::default();
        sql.push("SELECT 1");
        let result = sql.run(&mut lent, commits).await.map(drop);
        lent.done(result)
    }

    #[tokio::test]
    async fn a_trusted_session_is_lent_again_and_one_in_doubt_is_not() {
        let server = Server::new(Login::Welcome).await;
        let sessions = server.sessions();
        for _ in 0..3 {
            ask(&sessions, Commits::Yes).await.unwrap();
        }
        assert_eq!(server.logins(), 1);
        // Dropped by whoever had it, it is not known how far it is.
        drop(sessions.lend().await.unwrap());
        ask(&sessions, Commits::Yes).await.unwrap();
        assert_eq!(server.logins(), 2);
        // What the server refuses leaves a session that could be used on; it is not taken on trust.
        server.answers([Answer::Error(547)]);
        assert!(matches!(ask(&sessions, Commits::Yes).await, Err(StorageError::Refused(_))));
        ask(&sessions, Commits::Yes).await.unwrap();
        assert_eq!(server.logins(), 3);
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_anywhere_is_an_unknown_outcome() {
        let server = Server::new(Login::Welcome).await;
        for commits in [Commits::Yes, Commits::No] {
            // The header has 8 bytes, and what it is about 13.
            for length in 0..21 {
                let sessions = server.sessions();
                // Setting the session, then the request.
                server.answers([Answer::Done, Answer::Cut(length)]);
                match (commits, ask(&sessions, commits).await) {
                    (Commits::Yes, Err(StorageError::Unknown(_)))
                    | (Commits::No, Err(StorageError::Unavailable(_))) => {}
                    (_, other) => panic!("{length}: {other:?}"),
                }
                ask(&sessions, commits).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_not_waited_for() {
        let (server, deaf) = (Server::new(Login::Welcome).await, Server::new(Login::Silence).await);
        let since = Instant::now();
        let error = deaf.sessions().own().await.map(drop).unwrap_err();
        assert!(matches!(error, StorageError::Unavailable(_)), "{error:?}");
        server.answers([Answer::Done, Answer::Silence]);
        let error = ask(&server.sessions(), Commits::Yes).await.unwrap_err();
        assert!(matches!(error, StorageError::Unknown(_)), "{error:?}");
        assert!(since.elapsed() < Duration::from_secs(9), "before the pool's patience is at an end");
    }

    #[tokio::test]
    async fn sessions_of_one_age_are_lost_together() {
        let server = Server::new(Login::Welcome).await;
        let sessions = server.sessions();
        let (one, two) = (sessions.lend().await.unwrap(), sessions.lend().await.unwrap());
        one.done(Ok(())).unwrap();
        two.done::<()>(Err(StorageError::unavailable("lost"))).unwrap_err();
        ask(&sessions, Commits::Yes).await.unwrap();
        assert_eq!(server.logins(), 3, "the idle one is as old as the lost one");
        ask(&sessions, Commits::Yes).await.unwrap();
        assert_eq!(server.logins(), 3);
    }

    /// Hears what is logged.
    #[derive(Clone, Default)]
    struct Ear(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Ear {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn neither_rows_nor_passwords_are_logged() {
        let ear = Ear::default();
        let heard = ear.0.clone();
        let listening =
            tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || ear.clone());
        let _guard = tracing::subscriber::set_default(listening.finish());
        let server = Server::new(Login::Welcome).await;
        server.answers([Answer::Done, Answer::Numbers(77_123_456, 88_123_456)]);
        let mut lent = server.sessions().lend().await.unwrap();
        let mut sql = Sql::default();
        sql.push("SELECT 1");
        let rows = sql.run(&mut lent, Commits::No).await.unwrap().rows();
        assert_eq!(rows[0].get::<i32, _>(0), Some(77_123_456));
        let refused = Server::new(Login::Refused).await;
        let error = refused.sessions().own().await.map(drop).unwrap_err();
        assert!(error.to_string().contains("18456"), "{error}");
        assert!(!format!("{error:?}").contains("the password"), "{error:?}");
        let heard = String::from_utf8(heard.lock().unwrap().clone()).unwrap();
        assert!(heard.contains("sending login"), "is anybody listening? {heard}");
        for secret in ["77123456", "88123456", "the password"] {
            assert!(!heard.contains(secret), "{secret}: {heard}");
        }
    }

    #[tokio::test]
    async fn a_redirection_is_followed_but_not_for_ever() {
        let (gateway, server) = (Server::new(Login::Welcome).await, Server::new(Login::Welcome).await);
        gateway.sends_on_to(server.port());
        ask(&gateway.sessions(), Commits::Yes).await.unwrap();
        assert_eq!((gateway.logins(), server.logins()), (1, 1));
        gateway.sends_on_to(gateway.port());
        let error = ask(&gateway.sessions(), Commits::Yes).await.unwrap_err();
        assert!(matches!(error, StorageError::Unavailable(_)), "{error:?}");
        assert_eq!(gateway.logins(), 1 + 4);
    }

    #[tokio::test]
    async fn a_session_ends_with_whoever_holds_its_socket() {
        let server = Server::new(Login::Welcome).await;
        let sessions = server.sessions();
        let mut lent = sessions.lend().await.unwrap();
        lent.socket().shut();
        tokio::time::timeout(Duration::from_secs(5), lent.socket().ended()).await.unwrap();
        let mut sql = Sql::default();
        sql.push("SELECT 1");
        assert!(sql.run(&mut lent, Commits::No).await.is_err());
    }
}
