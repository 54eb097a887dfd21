//! What is SQLite's own: files that are not what they should be, schemas of other versions, locks that others hold, rows
//! that others wrote.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Storage, StorageError};
use durable_core::*;
use durable_sqlite::Transactions;
use durable_tests::crash::shared::Shared;
use durable_tests::*;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Executor, Row};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncBufReadExt;

const GO: Event<u32> = Event::new("Go");
const IT: Definition<u32, u32> = Definition::new("it");

async fn it(proc: Process, input: u32) -> Result<u32, Failure> {
    let first = proc.step("first", || async { Ok::<_, Failure>(input) }).await?;
    let second = proc.event(GO).await?;
    Ok(proc.step("last", || async { Ok::<_, Failure>(first + second) }).await?)
}

async fn connect(path: &str) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).busy_timeout(Duration::from_secs(10)).connect().await.unwrap()
}

async fn open_error(path: &str) -> StorageError {
    Sqlite::open(path).await.unwrap_err()
}

fn test(test: impl Future<Output = ()>) {
    durable_tests::run(test);
}

#[test]
fn places_where_there_is_no_database() {
    test(async {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let error = open_error(&path("no/such/folder/a.db")).await;
        assert!(matches!(error, StorageError::Unavailable(_)), "{error:?}");
        assert!(error.to_string().contains("does the folder exist"), "{error}");
        std::fs::write(path("text.db"), "this is not a database, though it is long enough to be one".repeat(100))
            .unwrap();
        let error = open_error(&path("text.db")).await;
        assert!(matches!(error, StorageError::Damaged(_)), "{error:?}");
        assert!(error.to_string().contains("text.db") && error.to_string().contains("not a"), "{error}");
        let error = open_error("postgres://user:secret@host/db").await.to_string();
        assert!(error.contains("\"postgres\" is not SQLite's") && !error.contains("secret"), "{error}");
        for memory in ["sqlite::memory:", ":memory:", "sqlite:x?mode=memory"] {
            let error = open_error(memory).await.to_string();
            assert!(error.contains("does not outlive the program"), "{memory}: {error}");
        }
        for address in [path("a.db"), format!("sqlite://{}", path("b.db")), format!("sqlite:{}", path("c.db"))] {
            Sqlite::open(&*address).await.unwrap();
        }
        assert!(["a.db", "b.db", "c.db"].iter().all(|name| Path::new(&path(name)).exists()));
    });
}

#[test]
fn schemas_of_other_versions() {
    test(async {
        let file = SqliteFile::new().await;
        let error = Sqlite::open(file.path()).verify_only().await.unwrap_err().to_string();
        assert!(!Path::new(&file.path()).exists(), "{error}");
        let storage = Sqlite::open(file.path()).await.unwrap();
        drop(storage);
        Sqlite::open(file.path()).verify_only().await.unwrap();
        let mut connection = connect(&file.path()).await;
        // An additive migration of a later version: this code may go on.
        let insert = "INSERT INTO durable_migrations VALUES (2, 'later', 'x', 1, 'now')";
        connection.execute(insert).await.unwrap();
        Sqlite::open(file.path()).await.unwrap();
        connection.execute("UPDATE durable_migrations SET oldest_code = 2 WHERE version = 2").await.unwrap();
        for error in [open_error(&file.path()).await, Sqlite::open(file.path()).verify_only().await.unwrap_err()] {
            assert!(error.to_string().contains("deploy a newer version of the service"), "{error}");
        }
        connection.execute("DELETE FROM durable_migrations WHERE version = 2").await.unwrap();
        connection.execute("UPDATE durable_migrations SET checksum = 'other'").await.unwrap();
        let error = open_error(&file.path()).await.to_string();
        assert!(error.contains("changed by other hands"), "{error}");
        // A database of the service's own, without our tables.
        let file = SqliteFile::new().await;
        let options = SqliteConnectOptions::new().filename(file.path()).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        connection.execute("CREATE TABLE orders (id INTEGER)").await.unwrap();
        let error = Sqlite::open(file.path()).verify_only().await.unwrap_err().to_string();
        assert!(error.contains("lacks migration 1") && error.contains("schema_sql"), "{error}");
        connection.execute(sqlx::AssertSqlSafe(durable_sqlite::schema_sql())).await.unwrap();
        Sqlite::open(file.path()).verify_only().await.unwrap();
    });
}

#[test]
fn several_that_migrate_at_the_same_time() {
    test(async {
        for _ in 0..5 {
            let file = SqliteFile::new().await;
            let opens = (0..6).map(|_| tokio::spawn(std::future::IntoFuture::into_future(Sqlite::open(file.path()))));
            for open in opens.collect::<Vec<_>>() {
                open.await.unwrap().unwrap();
            }
        }
    });
}

#[test]
fn it_is_set_to_lose_nothing() {
    test(async {
        let file = SqliteFile::new().await;
        let _storage = Sqlite::open(file.path()).await.unwrap();
        let mut connection = connect(&file.path()).await;
        let mode: String = connection.fetch_one("PRAGMA journal_mode").await.unwrap().get(0);
        assert_eq!(mode, "wal");
        let plan = connection
            .fetch_all("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'durable_%' AND name NOT LIKE 'sqlite_%'");
        assert!(plan.await.unwrap().is_empty(), "every table is named so that it stays out of the service's way");
    });
}

/// A row that somebody changed by hand makes its own process stuck, and nobody else's.
#[test]
fn rows_that_were_changed_by_hand() {
    test(async {
        let backend = SqliteFile::new().await;
        let host = quick(&backend).await.register(IT, it).start().await.unwrap();
        let changes = [
            (
                "state",
                "UPDATE durable_steps SET state = 'odd' WHERE run = ?",
                "state holds \"odd\", which this version does not know",
            ),
            ("op", "UPDATE durable_steps SET op = 'odd' WHERE run = ?", "op holds \"odd\""),
            ("scope", "UPDATE durable_steps SET scope = 7 WHERE run = ?", "scope holds \"7\""),
            ("payload", "UPDATE durable_steps SET payload = '{' WHERE run = ?", "1 bytes that are not JSON"),
            ("type", "UPDATE durable_steps SET claim = 'x' WHERE run = ?", "mismatched types"),
            ("blob", "UPDATE durable_steps SET payload = x'ff' WHERE run = ?", "mismatched types"),
            ("input", "UPDATE durable_processes SET input = '[]' WHERE run = ?", "expected u32, found an array of 0"),
        ];
        let mut handles = Vec::new();
        for (name, ..) in changes {
            handles.push(host.spawn(IT, name, &1).await.unwrap());
        }
        let sound = host.spawn(IT, "sound", &1).await.unwrap();
        until("all are parked", async || host.in_memory() == 0).await;
        let mut connection = connect(&backend.path()).await;
        for ((_, sql, _), handle) in changes.iter().zip(&handles) {
            let run = handle.run().unwrap().to_string();
            sqlx::query(*sql).bind(run).execute(&mut connection).await.unwrap();
        }
        for handle in handles.iter().chain([&sound]) {
            handle.raise(GO, &2).await.unwrap();
        }
        for ((name, _, expected), handle) in changes.iter().zip(&handles) {
            let reason = until_status(handle, Status::Stuck).await.reason.unwrap();
            assert!(reason.contains(expected), "{name}: {reason}");
        }
        assert_eq!(sound.output().await.unwrap(), 3);
        // A status that nobody knows: told when it is asked for, and no panic.
        sqlx::query("UPDATE durable_processes SET status = 'odd' WHERE id = 'sound'")
            .execute(&mut connection)
            .await
            .unwrap();
        let error = sound.status().await.unwrap_err().to_string();
        assert!(error.contains("status holds \"odd\""), "{error}");
    });
}

/// Orders about a process that cannot be read, and a time in another form: told to whoever asks, and nobody else is hurt.
#[test]
fn a_row_that_cannot_be_read_hurts_nobody_else() {
    test(async {
        const WAITS: Definition<String, ()> = Definition::new("waits");
        let backend = SqliteFile::new().await;
        let waits = async |proc: Process, id: String| {
            let _ = proc.output(IT, id).await;
            Ok::<_, Failure>(())
        };
        let host = quick(&backend).await.register(IT, it).register(WAITS, waits).start().await.unwrap();
        let odd = host.spawn(IT, "odd", &1).await.unwrap();
        let waiter = host.spawn(WAITS, "waiter", &"odd".to_owned()).await.unwrap();
        until("all are parked", async || host.in_memory() == 0).await;
        let mut connection = connect(&backend.path()).await;
        connection.execute("UPDATE durable_processes SET status = 'odd' WHERE id = 'odd'").await.unwrap();
        for told in [odd.cancel().await, odd.resume().await, odd.delete().await] {
            let error = told.unwrap_err().to_string();
            assert!(error.contains("status holds \"odd\""), "{error}");
        }
        let late = host.spawn(WAITS, "late", &"odd".to_owned()).await.unwrap();
        let reason = until_status(&late, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains("status holds \"odd\""), "{reason}");
        // Who waited before goes on waiting, and the host with it.
        assert_eq!(waiter.status().await.unwrap().status, Status::Waiting);
        let handle = host.spawn(IT, "sound", &1).await.unwrap();
        until("it is parked", async || host.in_memory() == 0).await;
        let by_hand = "UPDATE durable_processes SET wake_at = datetime('now') WHERE id = 'sound'";
        connection.execute(by_hand).await.unwrap();
        until("it is claimed", async || handle.status().await.is_ok_and(|info| info.execution == 2)).await;
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
        assert!(host.processes().list(10).await.unwrap().iter().all(|info| &*info.id != "odd"));
    });
}

/// Calls that are dropped at any moment leave no transaction open and no write lock behind.
#[test]
fn dropped_calls_leave_nothing_open() {
    test(async {
        use durable_core::storage::{Batch, Fence, NewInstance, Op, Spawn};
        let backend = SqliteFile::new().await;
        let storage = backend.storage().await;
        let id = InstanceId::new();
        let new = NewInstance {
            id,
            namespace: "default".into(),
            label: "test".into(),
            kinds: vec![],
            expiry: std::time::Duration::from_secs(10),
        };
        let (_heart, _) = storage.enlist(&new).await.unwrap();
        let mut other = connect(&backend.path()).await;
        for n in 0..60_u64 {
            // Somebody else holds the lock in every other round: the call is dropped while it waits.
            if n % 2 == 0 {
                other.execute("BEGIN IMMEDIATE").await.unwrap();
            }
            let spawn = |m: u64| {
                Op::Spawn(Spawn {
                    run: RunId::new(),
                    id: format!("p-{n}-{m}").into(),
                    kind: "it".into(),
                    input: "1".into(),
                    digest: "d".into(),
                    take: false,
                    restart_finished: false,
                })
            };
            let batch = Batch::new(Fence { instance: id, generation: 0 }, "default", (0..50).map(spawn).collect());
            let call = {
                let storage = storage.clone();
                tokio::spawn(async move { storage.commit(&batch).await })
            };
            tokio::time::sleep(Duration::from_micros(n * 23 % 1500)).await;
            call.abort();
            let _ = call.await;
            if n % 2 == 0 {
                other.execute("ROLLBACK").await.unwrap();
            }
            // Another connection gets the lock; each batch is there as a whole or not at all.
            other.execute("BEGIN IMMEDIATE").await.unwrap();
            let sql = "SELECT count(*) FROM durable_processes WHERE id LIKE 'p-' || ? || '-%'";
            let row = sqlx::query(sql).bind(n as i64).fetch_one(&mut other).await.unwrap();
            assert!([0, 50].contains(&row.get::<i64, _>(0)));
            other.execute("COMMIT").await.unwrap();
        }
        // And the storage itself goes on.
        assert!(storage.find("default", "nobody", None).await.unwrap().is_none());
        storage.refence(id, 1).await.unwrap();
    });
}

/// A program that holds the write lock from when somebody asks for it.
struct Holder {
    program: tokio::process::Child,
    said: tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>,
}

impl Holder {
    fn start(path: &str) -> Self {
        let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_holder"));
        program.arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut program = program.spawn().unwrap();
        let said = tokio::io::BufReader::new(program.stdout.take().unwrap()).lines();
        Self { program, said }
    }

    async fn says(&mut self, what: &str) {
        assert_eq!(self.said.next_line().await.unwrap().as_deref(), Some(what));
    }

    async fn lets_go(mut self) {
        drop(self.program.stdin.take());
        assert!(self.program.wait().await.unwrap().success());
    }
}

/// Another program that holds the write lock while processes are in the middle of steps and of transactional ones: everybody
/// waits, nobody is taken for dead, nothing fails, and nothing happens twice. All settings are the hosts' own.
#[test]
fn somebody_else_holds_the_write_lock() {
    #[derive(PartialEq, PartialOrd, Clone, Copy)]
    enum Lock {
        Free,
        Asked,
        Held,
    }
    const MANY: u32 = 24;
    const HALF_THE_EXPIRY: Duration = Duration::from_secs(5);
    test(async {
        let backend = SqliteFile::new().await;
        let effects = Effects::default();
        let (now, lock) = tokio::sync::watch::channel(Lock::Free);
        let it = {
            let effects = effects.clone();
            move |proc: Process, n: u32| {
                let (effects, mut lock) = (effects.clone(), lock.clone());
                async move {
                    let does = |what: &str| effects.add(format!("{what} {n}"));
                    let lock_of_step = lock.clone();
                    let step = proc.step("step", || {
                        let mut lock = lock_of_step.clone();
                        does("step");
                        async move {
                            // These are in the middle of it.
                            if n % 4 == 1 {
                                lock.wait_for(|lock| *lock == Lock::Held).await.unwrap();
                            }
                            Ok::<_, Failure>(())
                        }
                    });
                    step.await?;
                    if n % 4 > 1 {
                        lock.wait_for(|lock| *lock == Lock::Held).await.unwrap();
                    }
                    if n % 4 == 2 {
                        // No attempt begins without a heartbeat.
                        tokio::time::sleep(HALF_THE_EXPIRY + Duration::from_millis(500)).await;
                        proc.step("late", || async { Ok::<_, Failure>(does("late")) }).await?;
                    }
                    let lock_of_transaction = lock.clone();
                    let put = proc.transaction("put", async |mut tx| {
                        does("put");
                        let put = sqlx::query("INSERT INTO put VALUES (?)").bind(n);
                        put.execute(&mut *tx).await?;
                        // This one is in the middle of it when the other program asks.
                        if n == 0 {
                            lock_of_transaction.clone().wait_for(|lock| *lock >= Lock::Asked).await.unwrap();
                        }
                        Ok::<_, sqlx::Error>(())
                    });
                    put.await?;
                    let went = proc.event(GO).await?;
                    Ok::<_, Failure>(n + went)
                }
            }
        };
        let builder = async || Host::builder(backend.storage().await).register(IT, it.clone());
        let hosts = [builder().await.start().await.unwrap(), builder().await.start().await.unwrap()];
        backend.execute("CREATE TABLE put (n INTEGER)").await;
        backend.execute(SqliteFile::COUNT_TAKEOVERS).await;
        let mut handles = Vec::new();
        // The first one last: it keeps everybody from writing.
        for n in (0..MANY).rev() {
            if n == 0 {
                until("all are on their way", async || (1..MANY).all(|n| effects.count(&format!("step {n}")) == 1))
                    .await;
            }
            handles.push(hosts[n as usize % 2].spawn(IT, format!("it-{n}"), &n).await.unwrap());
        }
        handles.reverse();
        until("one is within a transaction", async || effects.count("put 0") == 1).await;
        let mut holder = Holder::start(&backend.path());
        holder.says("asks").await;
        now.send(Lock::Asked).unwrap();
        holder.says("holds").await;
        now.send(Lock::Held).unwrap();
        let raising: Vec<_> = handles
            .iter()
            .map(|handle| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.raise(GO, &1).id("go").await })
            })
            .collect();
        let begun = async || effects.all().iter().filter(|effect| !effect.starts_with("step")).count();
        let before = begun().await;
        tokio::time::sleep(Duration::from_secs(if long() { 60 } else { 6 })).await;
        assert_eq!(begun().await, before, "something began: {:?}", effects.all());
        holder.lets_go().await;
        for (raised, handle) in raising.into_iter().zip(&handles) {
            // Whoever was told that it takes too long, asks again.
            if raised.await.unwrap().is_err() {
                handle.raise(GO, &1).id("go").await.unwrap();
            }
        }
        for (n, handle) in (0..).zip(&handles) {
            assert_eq!(handle.output().await.unwrap(), n + 1);
            let times = ["step", "put", "late"].map(|what| effects.count(&format!("{what} {n}")));
            assert_eq!(times, [1, 1, usize::from(n % 4 == 2)], "{n}");
        }
        assert_eq!(backend.number("SELECT count(*) FROM put").await, i64::from(MANY));
        assert_eq!(backend.taken_over().await, 0, "somebody was taken for dead");
    });
}

/// Work from another program is noticed within a second, and an idle host is idle.
#[test]
fn other_programs_are_noticed() {
    test(async {
        let backend = SqliteFile::new().await;
        let _host = Host::builder(backend.storage().await).register(IT, it).start().await.unwrap();
        let other = Host::builder(backend.storage().await).start().await.unwrap();
        // Long enough for the looks to become rare.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let handle = other.spawn(IT, "it", &1).await.unwrap();
        let spawned = Instant::now();
        until("it runs", async || handle.status().await.unwrap().execution == 1).await;
        assert!(spawned.elapsed() < Duration::from_secs(10), "{:?}", spawned.elapsed());
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
    });
}
