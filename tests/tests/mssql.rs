//! What only SQL Server's storage has: its places and rights, two sessions that meet, sessions that end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Claimed, InstanceId, LockState, Op, Outcome, Raised, RunId, Spawn, Storage, StorageError};
use durable_core::*;
use durable_mssql::Client;
use durable_tests::ops::*;
use durable_tests::proxy::Proxied;
use durable_tests::rights::documented;
use durable_tests::*;
use std::collections::HashSet;
use std::time::Duration;

const GO: Event<u32> = Event::new("Go");
const IT: Definition<u32, u32> = Definition::new(KIND);

async fn it(proc: Process, input: u32) -> Result<u32, Failure> {
    let step = proc.step("step", || async { Ok::<_, Failure>(input) }).await?;
    Ok(step + proc.event(GO).await?)
}

fn test(test: impl Future<Output = ()>) {
    MssqlSchema::run(test);
}

// --- Places and rights ---------------------------------------------------------------------------------------------

#[test]
fn places_where_there_is_no_database() {
    test(async {
        let schema = MssqlSchema::new().await;
        let error = async |address: &str| Mssql::connect(address).schema(schema.name()).await.unwrap_err().to_string();
        let with = |key: &str, value: &str| {
            let pairs = schema.address().split(';').filter(|pair| !pair.to_lowercase().starts_with(key));
            format!("{};{key}={value}", pairs.collect::<Vec<_>>().join(";"))
        };
        let cases = [
            (error(&with("server", "tcp:127.0.0.1,1")).await, vec!["127.0.0.1:1", "does a server listen there"]),
            (error(&with("password", "secret")).await, vec!["18456", "are the user and the password right"]),
            (error(&with("database", "nowhere")).await, vec!["nowhere", "exist"]),
            (error(&with("trustservercertificate", "false")).await, vec!["certificate", ".trust_ca(file)"]),
            (error("postgres://user:secret@host/db").await, vec!["not one", "server=tcp:host,1433"]),
        ];
        for (error, parts) in cases {
            for part in parts {
                assert!(error.contains(part), "{part}: {error}");
            }
            assert!(!error.contains("secret"), "{error}");
        }
    });
}

#[test]
fn schemas_by_name() {
    test(async {
        let schema = MssqlSchema::new().await;
        for name in ["", "a-b", "a]; DROP SCHEMA dbo", "1a", "sys"] {
            let error = Mssql::connect(schema.address()).schema(name).await.unwrap_err();
            assert!(matches!(error, StorageError::Schema(_)), "{error:?}");
            assert!(error.to_string().contains("cannot be the schema's name"), "{error}");
        }
        // Two schemas are two storages.
        let other = MssqlSchema::new().await;
        let (one, two) = (schema.storage().await, other.storage().await);
        let (mine, _heart) = enlist(&one).await;
        commit(&one, mine, vec![spawn("p", false).0]).await;
        assert!(one.find("default", "p", None).await.unwrap().is_some());
        assert!(two.find("default", "p", None).await.unwrap().is_none());
    });
}

#[test]
fn schemas_of_other_versions() {
    test(async {
        let schema = MssqlSchema::new().await;
        let connect = || Mssql::connect(schema.address()).schema(schema.name());
        let error = connect().verify_only().await.unwrap_err().to_string();
        assert!(error.contains("lacks migration 1") && error.contains("schema_sql"), "{error}");
        drop(connect().await.unwrap());
        connect().verify_only().await.unwrap();
        // An additive migration of a later version: this code may go on.
        schema.execute("INSERT INTO migrations VALUES (2, N'later', N'x', 1, SYSUTCDATETIME())").await;
        connect().await.unwrap();
        schema.execute("UPDATE migrations SET oldest_code = 2 WHERE version = 2").await;
        for error in [connect().await.unwrap_err(), connect().verify_only().await.unwrap_err()] {
            assert!(error.to_string().contains("deploy a newer version of the service"), "{error}");
        }
        schema.execute("DELETE FROM migrations WHERE version = 2").await;
        schema.execute("UPDATE migrations SET checksum = N'other'").await;
        let error = connect().await.unwrap_err().to_string();
        assert!(error.contains("changed by other hands"), "{error}");
        // What is printed is what is applied.
        let printed = MssqlSchema::new().await;
        printed.execute(&durable_mssql::schema_sql(printed.name()).unwrap()).await;
        Mssql::connect(printed.address()).schema(printed.name()).verify_only().await.unwrap();
    });
}

#[test]
fn several_that_migrate_at_the_same_time() {
    test(async {
        let schema = MssqlSchema::new().await;
        let connects = (0..4).map(|_| {
            let connect = Mssql::connect(schema.address()).schema(schema.name());
            tokio::spawn(std::future::IntoFuture::into_future(connect))
        });
        for connect in connects.collect::<Vec<_>>() {
            connect.await.unwrap().unwrap();
        }
    });
}

/// What a user who may create nothing is told; what they can do is in `rights`.
#[test]
fn a_user_without_rights_to_create() {
    test(async {
        let (schema, user) = (MssqlSchema::new().await, MssqlSchema::new().await);
        let connect = || Mssql::connect(user.address()).schema(schema.name());
        let error = connect().await.unwrap_err().to_string();
        for part in ["schema_sql", "GRANT SELECT, INSERT, UPDATE, DELETE ON SCHEMA::"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        drop(schema.storage().await);
        for grant in documented(include_str!("../../durable-mssql/src/lib.rs"), schema.name(), user.name()) {
            schema.execute(&grant).await;
        }
        connect().verify_only().await.unwrap();
    });
}

/// What the server quotes of values does not get into errors, and what is refused is found.
#[test]
fn values_are_not_in_errors() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = schema.storage().await;
        let (me, _heart) = enlist(&storage).await;
        let bad = Spawn { kind: "secret ".repeat(40).into(), ..spawn_op("p", false) };
        let error = storage.commit(&batch(me, 0, vec![Op::Spawn(bad)])).await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        storage.refence(me, 1).await.unwrap();
        storage.commit(&batch(me, 1, vec![spawn("p", false).0])).await.unwrap();
    });
}

// --- Two sessions --------------------------------------------------------------------------------------------------

/// The storage, which waits for locks for as long as the test needs.
async fn patient(schema: &MssqlSchema) -> Mssql {
    let connect = Mssql::connect(schema.address()).schema(schema.name()).max_connections(3);
    connect.timeouts(Duration::from_secs(60), Duration::from_secs(30)).await.unwrap()
}

/// A session of the test's own, in a transaction.
struct Session(Client);

impl Session {
    async fn begin(schema: &MssqlSchema) -> Self {
        let mut session = Self(schema.connect().await);
        session.run("BEGIN TRANSACTION").await;
        session
    }
    async fn run(&mut self, sql: &str) {
        self.0.simple_query(sql).await.unwrap().into_results().await.unwrap();
    }
    /// Holds a lock of applications alone.
    async fn lock(&mut self, name: &str) {
        self.run(&format!("EXECUTE sp_getapplock N'{name}', N'Exclusive', N'Transaction', 0")).await;
    }
}

fn fence_of(schema: &MssqlSchema, instance: InstanceId) -> String {
    format!("durable/{}/fence/{}", schema.name(), instance.0.simple())
}

/// Everything that a batch may touch.
async fn everything(schema: &MssqlSchema) -> Vec<String> {
    let mut all = Vec::new();
    for sql in [
        "SELECT CONCAT(id, '/', status, '/', claim, '/', signals, '/', signalled, '/', awaited, '/', cancelled_at) FROM processes",
        "SELECT CONCAT(name, '/', claim) FROM steps",
        "SELECT CONCAT(event_id, '/', number, '/', taken_at) FROM events",
        "SELECT 'waiter' FROM waiters",
    ] {
        let mut texts = schema.texts(sql).await;
        texts.sort();
        all.extend(texts);
    }
    all
}

/// Interleaving 1. A batch that has queued behind a take-over writes nothing. If the take-over is undone, it is written.
#[test]
fn a_batch_that_queues_behind_a_take_over() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = patient(&schema).await;
        for commits in [true, false] {
            let (zombie, _heart) = enlist(&storage).await;
            let name = |what: &str| format!("{what}-{commits}");
            let mut runs = Vec::new();
            for what in ["record", "finish", "park", "raise", "await"] {
                runs.push(start(&storage, zombie, &name(what)).await);
            }
            commit(&storage, zombie, vec![spawn(&name("due"), false).0]).await;
            let batches = [
                vec![spawn(&name("new"), true).0],
                vec![record(runs[0], "a")],
                vec![finish(runs[1])],
                vec![park(runs[2], 0)],
                vec![Op::Claim { kind: KIND.into(), limit: 9 }],
                vec![Op::AcceptCancel { run: runs[0], claim: 1, seq: 1 }],
                vec![raise(&name("raise"), "m")],
                vec![Op::Await { run: runs[0], id: name("await").into(), target: None }],
                vec![Op::cancel(name("await").into())],
            ];
            let before = everything(&schema).await;
            // As many as there are connections.
            for some in batches.chunks(3) {
                let mut session = Session::begin(&schema).await;
                session.lock(&fence_of(&schema, zombie)).await;
                let fence =
                    format!("UPDATE fences SET fenced_at = SYSUTCDATETIME() WHERE instance = 0x{}", zombie.0.simple());
                session.run(&fence).await;
                let queued: Vec<_> =
                    some.iter().map(|ops| in_background(&storage, batch(zombie, 0, ops.clone()))).collect();
                schema.waiting(3).await;
                session.run(if commits { "COMMIT" } else { "ROLLBACK" }).await;
                for queued in queued {
                    let result = queued.await.unwrap();
                    if commits {
                        assert!(matches!(result, Err(StorageError::Fenced)), "{result:?}");
                    } else {
                        assert_ne!(result.unwrap()[0], Outcome::Lost);
                    }
                }
            }
            if commits {
                assert_eq!(before, everything(&schema).await);
            }
            storage.retire(zombie).await.unwrap();
        }
    });
}

/// Interleaving 2. Whoever fences a batch off, the instance itself after a lost answer or another one, waits for one that
/// is under way.
#[test]
fn a_fence_waits_for_the_batch_that_is_under_way() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = patient(&schema).await;
        for own in [true, false] {
            let (me, _heart) = enlist(&storage).await;
            let run = start(&storage, me, &format!("p-{own}")).await;
            let mut session = Session::begin(&schema).await;
            session
                .run(&format!("UPDATE processes SET signals = signals WHERE run = {}", MssqlSchema::literal(run)))
                .await;
            let under_way = in_background(&storage, batch(me, 0, vec![record(run, "a"), finish(run)]));
            schema.waiting(1).await;
            let peers = storage.peers("default", InstanceId::new()).await.unwrap().peers;
            let peer = peers.into_iter().find(|peer| peer.instance == me).unwrap();
            let fencing = {
                let storage = storage.clone();
                tokio::spawn(async move {
                    if own { storage.refence(me, 1).await.map(|()| true) } else { storage.fence(&peer).await }
                })
            };
            schema.waiting(2).await;
            assert!(!fencing.is_finished());
            session.run("ROLLBACK").await;
            assert_eq!(under_way.await.unwrap().unwrap()[1], Outcome::Finished { wakes: vec![] });
            assert!(fencing.await.unwrap().unwrap());
            let late = storage.commit(&batch(me, 0, vec![spawn("late", false).0])).await;
            assert!(matches!(late, Err(StorageError::Fenced)), "{late:?}");
            storage.retire(me).await.unwrap();
        }
    });
}

/// Interleaving 4, both ways.
#[test]
fn park_against_raise() {
    test(async {
        let schema = MssqlSchema::new().await;
        let (storage, other) = (patient(&schema).await, patient(&schema).await);
        let ((me, _heart), (sender, _its)) = (enlist(&storage).await, enlist(&other).await);
        // A message that is not committed yet when the process parks.
        let run = start(&storage, me, "a").await;
        let mut session = Session::begin(&schema).await;
        session
            .run(&format!("UPDATE processes SET signals = signals + 1 WHERE run = {}", MssqlSchema::literal(run)))
            .await;
        let parking = in_background(&storage, batch(me, 0, vec![park(run, 0)]));
        schema.waiting(1).await;
        session.run("COMMIT").await;
        assert_eq!(parking.await.unwrap().unwrap(), [Outcome::Signalled(1)]);
        // A park that is not committed yet when the message comes.
        let run = start(&storage, me, "b").await;
        let mut session = Session::begin(&schema).await;
        let parked = format!(
            "UPDATE processes SET status = N'waiting', owner = NULL, calm_claim = 1 WHERE run = {}",
            MssqlSchema::literal(run)
        );
        session.run(&parked).await;
        let raising = in_background(&other, batch(sender, 0, vec![raise("b", "m")]));
        schema.waiting(1).await;
        session.run("COMMIT").await;
        let delivered = Raised::Delivered { run, number: 1, mine: false };
        assert_eq!(raising.await.unwrap().unwrap(), [Outcome::Raised(delivered)]);
        let claimed = commit(&storage, me, vec![Op::Claim { kind: KIND.into(), limit: 9 }]).await;
        assert_eq!(claimed, [Outcome::Claimed(vec![Claimed { run, claim: 2 }])], "it is due");
    });
}

/// Who comes to await a process at the moment of its end: it is told, or it is woken.
#[test]
fn await_against_finish() {
    test(async {
        let schema = MssqlSchema::new().await;
        let (storage, other) = (patient(&schema).await, patient(&schema).await);
        let ((me, _heart), (waiter, _its)) = (enlist(&storage).await, enlist(&other).await);
        let wait = |run, id: &str| Op::Await { run, id: id.into(), target: None };
        let sql = MssqlSchema::literal;
        // The end queues behind the await.
        let (target, parent) = (start(&storage, me, "a").await, start(&other, waiter, "parent-a").await);
        let mut session = Session::begin(&schema).await;
        session.run(&format!("UPDATE processes SET awaited = 1 WHERE run = {}", sql(target))).await;
        session.run(&format!("INSERT INTO waiters (target, waiter) VALUES ({}, {})", sql(target), sql(parent))).await;
        let ending = in_background(&storage, batch(me, 0, vec![record(target, "a"), finish(target)]));
        schema.waiting(1).await;
        session.run("COMMIT").await;
        assert_eq!(ending.await.unwrap().unwrap()[1], Outcome::Finished { wakes: vec![] });
        assert_eq!(storage.find("default", "parent-a", None).await.unwrap().unwrap().signals, 1, "it was woken");
        // The await queues behind the end.
        let (target, parent) = (start(&storage, me, "b").await, start(&other, waiter, "parent-b").await);
        let mut session = Session::begin(&schema).await;
        let end = format!(
            "UPDATE processes SET status = N'completed', [output] = N'7', owner = NULL WHERE run = {}",
            sql(target)
        );
        session.run(&end).await;
        let awaiting = in_background(&other, batch(waiter, 0, vec![wait(parent, "b")]));
        schema.waiting(1).await;
        session.run("COMMIT").await;
        let ended = Some((Status::Completed, Some("7".into())));
        assert_eq!(awaiting.await.unwrap().unwrap(), [Outcome::Awaits(Some((target, ended)))]);
        // A parent that parks in the same batch in which its child ends is not left behind.
        let (child, parent) = (start(&storage, me, "c").await, start(&storage, me, "parent-c").await);
        commit(&storage, me, vec![wait(parent, "c")]).await;
        let outcomes = commit(&storage, me, vec![park(parent, 0), finish(child)]).await;
        assert_eq!(outcomes, [Outcome::Signalled(1), Outcome::Finished { wakes: vec![parent] }]);
    });
}

/// Two that insert one id at the same moment: the second one's insert meets the first one's key, and its batch is run
/// again.
#[test]
fn a_start_that_queues_behind_the_same_start() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = patient(&schema).await;
        let (me, _heart) = enlist(&storage).await;
        let first = RunId::new();
        let mut session = Session::begin(&schema).await;
        let insert = format!(
            "INSERT INTO processes (run, namespace, id, [current], kind, status, claim, calm_claim, signals, signalled,
                 awaited, input, input_digest, created_at, status_at)
             VALUES ({}, N'default', N'p', 1, N'{KIND}', N'waiting', 0, 0, 0, 0, 0, N'1', N'd', SYSUTCDATETIME(),
                 SYSUTCDATETIME())",
            MssqlSchema::literal(first)
        );
        session.run(&insert).await;
        let second = in_background(&storage, batch(me, 0, vec![spawn("p", true).0]));
        schema.waiting(1).await;
        session.run("COMMIT").await;
        match &second.await.unwrap().unwrap()[..] {
            [Outcome::Spawned(spawned)] => assert_eq!((spawned.run, spawned.existed), (first, true)),
            other => panic!("{other:?}"),
        }
    });
}

/// Interleaving 5. What a transaction of the service's has put into the inbox holds up nobody while it is open.
#[test]
fn an_open_transaction_with_a_start_holds_up_nobody() {
    test(async {
        use durable_mssql::Outbox;
        let schema = MssqlSchema::new().await;
        let host = quick(&schema).await.register(IT, it).start().await.unwrap();
        let mut session = Session::begin(&schema).await;
        host.spawn_in(&mut session.0, IT, "mine", &1).await.unwrap();
        let other = host.spawn(IT, "other", &1).await.unwrap();
        other.raise(GO, &1).await.unwrap();
        assert_eq!(other.output().await.unwrap(), 2);
        assert!(host.get("mine").status().await.is_err(), "not before the commit");
        session.run("COMMIT").await;
        let mine = host.get("mine").of(IT);
        mine.raise(GO, &2).await.unwrap();
        assert_eq!(mine.output().await.unwrap(), 3);
    });
}

// --- Sessions ------------------------------------------------------------------------------------------------------

/// Interleaving 9. The session that holds an instance's lock ends, and the program lives: it takes the lock again before
/// anybody has looked twice.
#[test]
fn a_session_that_ends_is_no_death() {
    test(async {
        let schema = MssqlSchema::new().await;
        let proxy = schema.proxy().await;
        let (storage, other) = (schema.through(&proxy).await, schema.storage().await);
        let host = Host::builder(storage).register(IT, it).start().await.unwrap();
        let handle = host.spawn(IT, "it", &1).await.unwrap();
        let peers = async || other.peers("default", InstanceId::new()).await.unwrap().peers;
        let before: HashSet<InstanceId> = peers().await.iter().map(|peer| peer.instance).collect();
        assert_eq!(before.len(), 1);
        for _ in 0..3 {
            proxy.cut();
            until("it holds its lock again", async || peers().await.iter().all(|p| p.lock == LockState::Held)).await;
        }
        let after: HashSet<InstanceId> = peers().await.iter().map(|peer| peer.instance).collect();
        assert_eq!(after, before);
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
    });
}

/// A lock that is free although the last heartbeat says that it is held proves death only within one run of the server.
#[test]
fn a_lock_of_another_run_of_the_server_proves_nothing() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = schema.storage().await;
        let (_, mut heart) = enlist(&storage).await;
        let look = async || storage.peers("default", InstanceId::new()).await.unwrap().peers[0].lock;
        assert_eq!(look().await, LockState::Held);
        schema.execute("UPDATE instances SET locked_in = N'earlier'").await;
        assert_eq!(look().await, LockState::Unknown);
        heart.beat().await.unwrap();
        assert_eq!(look().await, LockState::Held, "the next heartbeat says it again");
        drop(heart);
        until("it is free", async || look().await == LockState::Free).await;
        schema.execute("UPDATE instances SET locked_in = N'earlier'").await;
        assert_eq!(look().await, LockState::Unknown);
    });
}

/// Calls that are dropped at any of their awaits leave no transaction open, and the storage goes on.
#[test]
fn dropped_calls_leave_nothing_open() {
    test(async {
        let schema = MssqlSchema::new().await;
        let storage = schema.storage().await;
        let (me, _heart) = enlist(&storage).await;
        start(&storage, me, "target").await;
        for n in 0..if long() { 2_000 } else { 40 } {
            let ops = vec![spawn(&format!("p-{n}"), true).0, raise("target", &n.to_string())];
            let batch = batch(me, 0, ops);
            let (mut call, mut left) = (std::pin::pin!(storage.commit(&batch)), 1 + n % 20);
            std::future::poll_fn(|cx| {
                left -= 1;
                if call.as_mut().poll(cx).is_ready() || left == 0 {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
        }
        // Alone it waits for whatever still holds the fence.
        storage.refence(me, 1).await.unwrap();
        let halves = "SELECT COUNT(*) FROM processes AS p FULL JOIN events AS e ON p.id = CONCAT(N'p-', e.event_id)
            WHERE p.run IS NULL OR p.id LIKE N'p-%' AND e.run IS NULL";
        assert_eq!(schema.number(halves).await, 0);
        assert!(storage.find("default", "target", None).await.unwrap().is_some());
    });
}
