//! Passwords, tokens and payloads: whole runs are listened to at every level, and errors are read to their last source.
//! Whatever is secret here has `hidden` in it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Storage, StorageError};
use durable_core::*;
use durable_mssql::tiberius::{AuthMethod, Config};
use durable_tests::*;
use std::error::Error;
use std::fmt::Debug;
use std::future::IntoFuture;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;
use tracing::field::Field;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

// Ids and names have `m4rked` in them: they may be told, but stand in no statement.
const ALL: Definition<String, String> = Definition::new("m4rked all");
const CHILD: Definition<String, String> = Definition::new("m4rked child");
const FAILS: Definition<String, String> = Definition::new("m4rked fails");
const STRICT: Definition<u32, ()> = Definition::new("m4rked strict");
const LAX: Definition<String, ()> = Definition::new("m4rked strict");
const GO: Event<String> = Event::new("m4rked Go");
const NUMBER: Event<u32> = Event::new("m4rked Go");

// --- Listening -----------------------------------------------------------------------------------------------------

static HEARD: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Ear;

impl std::io::Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        HEARD.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The SQL that the drivers of PostgreSQL and SQLite run.
static STATEMENTS: Mutex<String> = Mutex::new(String::new());

struct Statements;

impl<S: tracing::Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "sqlx::query" {
            event.record(&mut |_: &Field, value: &dyn Debug| {
                STATEMENTS.lock().unwrap().push_str(&format!("{value:?}\n"));
            });
        }
    }
}

/// Everything that is logged in this program from now on, by way of `tracing` or of `log`.
fn listen() {
    static LISTENING: OnceLock<()> = OnceLock::new();
    LISTENING.get_or_init(|| {
        let everything = tracing_subscriber::filter::LevelFilter::TRACE;
        let log = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(|| Ear);
        tracing_subscriber::registry().with(everything).with(log).with(Statements).init();
        tracing::trace!("listening");
    });
}

/// What was logged so far, which must hold this and nothing secret.
fn heard(parts: &[&str]) {
    let heard = String::from_utf8_lossy(&HEARD.lock().unwrap()).into_owned();
    for part in parts.iter().chain(&["listening"]) {
        assert!(heard.contains(part), "{part:?} was never logged: is anybody listening?");
    }
    for line in heard.lines() {
        assert!(!line.contains("hidden"), "logged: {line}");
    }
}

/// All that an error says.
fn told(error: &(impl Error + ?Sized)) -> String {
    let mut told = format!("{error} {error:#} {error:?} {error:#?}");
    let mut next = error.source();
    while let Some(source) = next {
        told += &format!(" {source} {source:?}");
        next = source.source();
    }
    assert!(!told.contains("hidden"), "{told}");
    told
}

fn shown(value: &impl Debug) {
    let shown = format!("{value:?} {value:#?}");
    assert!(!shown.contains("hidden"), "{shown}");
}

// --- Payloads ------------------------------------------------------------------------------------------------------

/// What each database has for transactions.
trait Secretive: Backend {
    fn transact(proc: &Process) -> impl Future<Output = Result<String, Failure>> + Send;
    fn start_in(&self, host: &Host, id: &str) -> impl Future<Output = ()> + Send;
}

impl Secretive for InMemory {
    async fn transact(proc: &Process) -> Result<String, Failure> {
        Ok(proc.get("m4rked transaction", || "hidden in no transaction".to_owned()).await?)
    }
    async fn start_in(&self, host: &Host, id: &str) {
        host.spawn(CHILD, id, &"hidden start".to_owned()).await.unwrap();
    }
}

macro_rules! by_sqlx {
    ($backend:ty, $storage:ident) => {
        impl Secretive for $backend {
            async fn transact(proc: &Process) -> Result<String, Failure> {
                use $storage::Transactions;
                let transaction = proc.transaction("m4rked transaction", async |mut tx| {
                    let query = sqlx::query_scalar("SELECT 'result: ' || $1").bind("hidden in a transaction");
                    query.fetch_one(&mut *tx).await
                });
                Ok(transaction.await?)
            }
            async fn start_in(&self, host: &Host, id: &str) {
                use $storage::Outbox;
                let mut connection = Sql::connection(self).await;
                let mut tx = sqlx::Connection::begin(&mut connection).await.unwrap();
                host.spawn_in(&mut *tx, CHILD, id, &"hidden start".to_owned()).await.unwrap();
                host.raise_in(&mut *tx, id, GO, &"hidden message".to_owned()).await.unwrap();
                tx.commit().await.unwrap();
            }
        }
    };
}
by_sqlx!(SqliteFile, durable_sqlite);
by_sqlx!(PostgresSchema, durable_postgres);

impl Secretive for MssqlSchema {
    async fn transact(proc: &Process) -> Result<String, Failure> {
        use durable_mssql::Transactions;
        // What the closure's own statements answer with is the driver's to log.
        let transaction =
            proc.transaction("m4rked transaction", async |_| Ok::<_, Failure>("hidden result".to_owned()));
        Ok(transaction.await?)
    }
    async fn start_in(&self, host: &Host, id: &str) {
        use durable_mssql::Outbox;
        let mut client = self.connect().await;
        client.simple_query("BEGIN TRANSACTION").await.unwrap().into_results().await.unwrap();
        host.spawn_in(&mut client, CHILD, id, &"hidden start".to_owned()).await.unwrap();
        client.simple_query("COMMIT").await.unwrap().into_results().await.unwrap();
    }
}

async fn all<B: Secretive>(proc: Process, input: String) -> Result<String, Failure> {
    shown(&proc);
    let mut tries = 0;
    proc.step("m4rked tried twice", || {
        tries += 1;
        let first = tries == 1;
        async move { if first { Err(Failure::new("m4rked failure")) } else { Ok("hidden result".to_owned()) } }
    })
    .retry(Retry::fixed(Duration::from_millis(1)).max_attempts(2))
    .await?;
    let given_up = proc.step("m4rked given up", || async { Err::<(), _>(Failure::new("m4rked failure")) }).await;
    assert!(given_up.is_err());
    proc.get("m4rked got", || "hidden value".to_owned()).await?;
    proc.set("m4rked set", "hidden value".to_owned()).await?;
    B::transact(&proc).await?;
    let child = proc.spawn(CHILD, "m4rked child", &"hidden input".to_owned()).await?;
    shown(&child);
    proc.raise("m4rked child", GO, &"hidden message".to_owned()).await?;
    let output = proc.output(CHILD, "m4rked child").await?;
    let message = proc.event(GO).await?;
    let raced = proc
        .race("m4rked race")
        .on(proc.event(GO), Ok)
        .on(proc.delay("m4rked never", Duration::MAX), |_| Err("m4rked never"))
        .await?
        .unwrap();
    Ok(format!("hidden {input} {output} {message} {raced}"))
}

async fn child(proc: Process, input: String) -> Result<String, Failure> {
    Ok(format!("{input} {}", proc.event(GO).await?))
}

async fn fails(_: Process, input: String) -> Result<String, Failure> {
    Err(Failure::new(input))
}

async fn strict(proc: Process, _: u32) -> Result<(), Failure> {
    proc.event(NUMBER).await?;
    Ok(())
}

async fn start<B: Secretive>(backend: &B) -> Host {
    let builder = quick(backend)
        .await
        .namespace("m4rked")
        .label("m4rked")
        .register(ALL, all::<B>)
        .register(CHILD, child)
        .register(FAILS, fails);
    let builder = builder.register(STRICT, strict);
    shown(&builder);
    builder.start().await.unwrap()
}

/// As `on_each_backend!`, but listening from the beginning: there is one log in a program, and the first to ask has it.
mod no_payload_is_logged {
    use super::*;
    #[test]
    fn memory() {
        listen();
        run(super::no_payload_is_logged::<InMemory>());
    }
    #[test]
    fn sqlite() {
        listen();
        run(super::no_payload_is_logged::<SqliteFile>());
    }
    #[test]
    fn postgres() {
        listen();
        PostgresSchema::run(super::no_payload_is_logged::<PostgresSchema>());
    }
    #[test]
    fn mssql() {
        listen();
        MssqlSchema::run(super::no_payload_is_logged::<MssqlSchema>());
    }
}

/// Every operation, through a restart; what fails, and what cannot be read.
async fn no_payload_is_logged<B: Secretive>() {
    let backend = B::new().await;
    let host = start(&backend).await;
    let message = "hidden message".to_owned();
    let handle = host.spawn(ALL, "m4rked all", &"hidden input".to_owned()).await.unwrap();
    until("it waits for a message", async || {
        let info = handle.status().await.unwrap();
        shown(&info);
        info.waiting_for.is_some_and(|what| what.contains("Go"))
    })
    .await;
    let failed = host.spawn(FAILS, "m4rked fails", &"hidden failure".to_owned()).await.unwrap();
    assert!(failed.output().await.unwrap_err().to_string().contains("hidden"));
    backend.start_in(&host, "m4rked started").await;
    host.shutdown(Duration::from_secs(5)).await;
    let host = start(&backend).await;
    shown(&host);
    let handle = host.get("m4rked all").of(ALL);
    shown(&handle);
    for _ in 0..2 {
        handle.raise(GO, &message).await.unwrap();
    }
    assert!(handle.output().await.unwrap().contains("hidden"));
    shown(&host.processes());
    // An input and a message of other types: the process is stuck, and what it was given is not told.
    let input = host.spawn(LAX, "m4rked input", &"hidden input".to_owned()).await.unwrap();
    let other = host.spawn(STRICT, "m4rked other", &1).await.unwrap();
    other.raise(GO, &message).await.unwrap();
    for stuck in [until_status(&input, Status::Stuck).await, until_status(&other, Status::Stuck).await] {
        let reason = stuck.reason.unwrap();
        assert!(reason.contains("expected u32, found a string") && !reason.contains("hidden"), "{reason}");
    }
    let wrong = host.get("m4rked all").of(Definition::<String, u32>::new("m4rked all"));
    assert!(told(&wrong.output().await.unwrap_err()).contains("expected u32"));
    assert!(told(&handle.value::<u32>("m4rked got").await.unwrap_err()).contains("expected u32"));
    // What is refused.
    let large = format!("hidden {}", "x".repeat(2 << 20));
    assert!(told(&host.spawn(ALL, "m4rked large", &large).await.unwrap_err()).contains("at most"));
    assert!(told(&handle.raise(GO, &message).await.unwrap_err()).contains("has ended"));
    assert!(told(&host.spawn(ALL, "m4rked all", &message).await.unwrap_err()).contains("another input"));
    assert!(told(&host.spawn(CHILD, "m4rked all", &message).await.unwrap_err()).contains("is of kind"));
    host.shutdown(Duration::from_secs(5)).await;
    heard(&["stuck: the input", "enlisted"]);
    let statements = STATEMENTS.lock().unwrap().clone();
    let wrong = statements.lines().find(|line| line.contains("m4rked"));
    assert_eq!(wrong, None, "what a service gives stands in SQL");
    let storage = backend.storage().await.name();
    assert!(
        !matches!(storage, "sqlite" | "postgres")
            || statements.contains("durable_steps")
            || statements.contains(".steps")
    );
}

// --- Passwords -----------------------------------------------------------------------------------------------------

async fn refused<T>(connect: impl IntoFuture<Output = Result<T, StorageError>> + Debug, expected: &str) {
    shown(&connect);
    let Err(error) = connect.await else { panic!("connected, in vain: {expected}") };
    let told = told(&error);
    assert!(told.contains(expected), "{expected}: {told}");
}

/// A port where nobody listens.
fn nobody() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Addresses that are none, or of something else.
#[test]
fn addresses_are_not_told() {
    listen();
    run(async {
        for (url, expected) in [
            ("hidden", "not a URL"),
            ("mysql://user:hidden@host/db", "\"mysql\" is not PostgreSQL's"),
            ("postgres://user:hidden@host:port/db", "invalid port"),
            ("postgres://user:hid/hidden@host/db", "%2F"),
            ("postgres://user:1/hidden@host/db", "%2F"),
            ("postgres://user:1?hidden@host/db", "%2F"),
            ("postgres://user:1#hidden@host/db", "%2F"),
            ("postgres://user:hidden@host/db?statement-cache-capacity=many", "invalid digit"),
            ("postgres://user:hidden@127.0.0.1:1/db?pasword=hidden", "does a server listen there"),
        ] {
            refused(Postgres::connect(url), expected).await;
        }
        let url = format!("postgres://user:hidden@127.0.0.1:{}/db", nobody());
        refused(Postgres::connect(&*url), "does a server listen there").await;
        refused(Postgres::connect(&*url).schema("a\"; DROP"), "cannot be the schema's name").await;
        refused(Sqlite::open(&*url), "\"postgres\" is not SQLite's").await;
        let address = format!("server=tcp:127.0.0.1,{};user=sa;password=hidden", nobody());
        for address in
            ["hidden", "postgres://user:hidden@host/db", "server=tcp:host,x;password=hidden", "password='hidden"]
        {
            shown(&Mssql::connect(address));
            told(&Mssql::connect(address).await.unwrap_err());
        }
        refused(Mssql::connect(&*address), "does a server listen there").await;
        refused(Mssql::connect(&*address).schema("a]; DROP"), "cannot be the schema's name").await;
        let mut config = Config::new();
        config.host("127.0.0.1");
        config.port(nobody());
        config.authentication(AuthMethod::aad_token("hidden"));
        refused(Mssql::connect(config.clone()), "does a server listen there").await;
        let token = || async { Ok::<_, std::io::Error>("hidden".to_owned()) };
        refused(Mssql::connect(config).token(token), "does a server listen there").await;
        heard(&["the address has a parameter that is not known"]);
    });
}

/// Log-ins that a server refuses.
#[test]
fn passwords_that_are_refused_are_not_told() {
    listen();
    PostgresSchema::run(async {
        let schema = PostgresSchema::new().await;
        let (before, place) = schema.url().rsplit_once('@').unwrap();
        let user = before.trim_start_matches("postgres://").split(':').next().unwrap();
        let by = |user: &str| format!("postgres://{user}:hidden@{place}");
        refused(Postgres::connect(by("nobody")), "28P01").await;
        refused(Postgres::connect(by(user)), "28P01").await;
        refused(Postgres::connect(by(user) + "&sslmode=require"), "TLS").await;
        heard(&[]);
    });
    MssqlSchema::run(async {
        let schema = MssqlSchema::new().await;
        let place = schema.address().split(";user=").next().unwrap();
        refused(Mssql::connect(format!("{place};user=nobody;password=hidden")), "18456").await;
        heard(&[]);
    });
}
