//! A pooler between the engine and PostgreSQL that lends sessions by the transaction: no other client meets what the engine
//! sets in one. Without a pooler on the machine a test says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_postgres::Postgres;
use durable_tests::*;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{Connection, Executor};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;

const ADD: Definition<u32, u32> = Definition::new("add");

/// PgBouncer before a server; ends when it is dropped.
struct Bouncer {
    program: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Bouncer {
    /// In this mode, with this many `sessions` for each role.
    async fn before(server: &Server, mode: &str, sessions: usize) -> Self {
        let to = PgConnectOptions::from_str(server.url()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = folder.path().join("pgbouncer.ini");
        let users = folder.path().join("users.txt");
        std::fs::write(&users, "\"durable\" \"durable\"\n\"engine\" \"engine\"\n").unwrap();
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {free}\n\
             unix_socket_dir =\nauth_type = plain\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = {sessions}\n\
             max_client_conn = 1000\nignore_startup_parameters = extra_float_digits\n{}",
            to.get_port(),
            users.display(),
            if prepares() { "max_prepared_statements = 1000\n" } else { "" }
        );
        std::fs::write(&config, settings).unwrap();
        let mut command = Command::new("pgbouncer");
        command.arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // It does not run as root.
        if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
            std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
            command.uid(65534).gid(65534);
        }
        let bouncer = Self { program: command.spawn().unwrap(), port: free, _folder: folder };
        until("it answers", async || PgConnection::connect(&bouncer.url(server, "durable")).await.is_ok()).await;
        bouncer
    }

    fn url(&self, server: &Server, role: &str) -> String {
        let to = PgConnectOptions::from_str(server.url()).unwrap();
        format!("postgres://{role}:{role}@127.0.0.1:{}/{}", self.port, to.get_database().unwrap())
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// The version of PgBouncer that is here, if one is.
fn version() -> Option<(u32, u32)> {
    let said = Command::new("pgbouncer").arg("--version").output().ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    let mut numbers = said.split_whitespace().nth(1)?.split('.').map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Whether it handles prepared statements.
fn prepares() -> bool {
    version().is_some_and(|version| version >= (1, 21))
}

fn with_both<T: Future<Output = ()>>(test: impl FnOnce(Server) -> T) {
    match version() {
        Some(_) => Server::run(test),
        None => println!("not run: there is no pgbouncer"),
    }
}

async fn add(proc: Process, input: u32) -> Result<u32, Failure> {
    proc.step("add", async || Ok::<_, Failure>(input + 1)).await.map_err(Failure::from)
}

async fn setting(url: &str, name: &str) -> String {
    let mut session = PgConnection::connect(url).await.unwrap();
    let shown = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("SHOW {name}")));
    sqlx::Row::get(&session.fetch_one(shown).await.unwrap(), 0)
}

/// One that lends a session for as long as a client is there is as good as none.
#[test]
fn sessions_lent_for_good() {
    with_both(async |server| {
        let bouncer = Bouncer::before(&server, "session", 50).await;
        let storage = Postgres::connect(bouncer.url(&server, "durable")).await.unwrap();
        let host = Host::builder(storage).register(ADD, add).start().await.unwrap();
        assert_eq!(host.spawn(ADD, "a", &1).await.unwrap().output().await.unwrap(), 2);
        assert!(!logged(&["a pooler lends sessions"]));
    });
}

/// The engine sets nothing there, whether there is one session for all of them or more, and says what it needs.
#[test]
fn sessions_lent_by_the_transaction() {
    with_both(async |server| {
        for sessions in [1, 2, 3, 20] {
            let bouncer = Bouncer::before(&server, "transaction", sessions).await;
            let why = Postgres::connect(bouncer.url(&server, "durable")).await.unwrap_err().to_string();
            for says in
                ["ALTER ROLE durable SET lock_timeout = '2000'", "ALTER ROLE durable SET enable_seqscan = 'off'"]
            {
                assert!(why.contains(says), "{sessions} sessions: {why}");
            }
            for _ in 0..sessions {
                assert_eq!(setting(&bouncer.url(&server, "durable"), "lock_timeout").await, "0");
            }
        }
        let mut session = PgConnection::connect(server.url()).await.unwrap();
        session
            .execute(sqlx::raw_sql(
                "CREATE ROLE engine LOGIN PASSWORD 'engine'; GRANT CREATE ON DATABASE durable TO engine",
            ))
            .await
            .unwrap();
        let bouncer = Bouncer::before(&server, "transaction", 3).await;
        let url = bouncer.url(&server, "engine");
        // What it says is what it needs.
        let why = Postgres::connect(&url).await.unwrap_err().to_string();
        let (_, alter) = why.split_once("settings: ").unwrap();
        session.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(alter.to_owned()))).await.unwrap();
        drop(bouncer);
        let bouncer = Bouncer::before(&server, "transaction", 3).await;
        let url = bouncer.url(&server, "engine");
        if !prepares() {
            let why = Postgres::connect(&url).await.unwrap_err().to_string();
            assert!(why.contains("have it handle prepared statements (PgBouncer 1.21 and later"), "{why}");
            return;
        }
        let storage = Postgres::connect(&url).await.unwrap();
        let host = Host::builder(storage).register(ADD, add).start().await.unwrap();
        let handles: Vec<_> = (0..100).map(|n| (n, host.clone())).collect();
        for (n, host) in handles {
            let handle = host.spawn(ADD, format!("p-{n}"), &n).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), n + 1);
        }
        assert!(logged(&["a pooler lends sessions by the transaction here"]));
        host.shutdown(std::time::Duration::from_secs(5)).await;
    });
}
