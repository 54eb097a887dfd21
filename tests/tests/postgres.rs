//! What is PostgreSQL's own: addresses and rights that are not what they should be, schemas of other versions; the
//! interleavings staged with a second session; sessions that the server ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{
    Claimed, InstanceId, Load, LockState, Op, Outcome, Park, Raised, Spawn, Storage, StorageError,
};
use durable_core::*;
use durable_postgres::Connect;
use durable_tests::crash::scene::Random;
use durable_tests::ops::*;
use durable_tests::proxy::Proxy;
use durable_tests::rights::Role;
use durable_tests::*;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};
use std::collections::{HashMap, HashSet};
use std::task::Poll;
use std::time::{Duration, Instant};

const GO: Event<u32> = Event::new("Go");
const IT: Definition<u32, u32> = Definition::new("it");

async fn it(proc: Process, input: u32) -> Result<u32, Failure> {
    let first = proc.step("first", || async { Ok::<_, Failure>(input) }).await?;
    let second = proc.event(GO).await?;
    Ok(proc.step("last", || async { Ok::<_, Failure>(first + second) }).await?)
}

fn test(test: impl Future<Output = ()>) {
    PostgresSchema::run(test);
}

// --- Places and rights ---------------------------------------------------------------------------------------------

#[test]
fn places_where_there_is_no_database() {
    test(async {
        let schema = PostgresSchema::new().await;
        let error = async |url: &str| Postgres::connect(url).schema(schema.name()).await.unwrap_err();
        let options: PgConnectOptions = schema.url().parse().unwrap();
        let (host, port, user) = (options.get_host(), options.get_port(), options.get_username());
        let missing = error(&format!("postgres://{user}:secret@{host}:1/there")).await;
        assert!(matches!(missing, StorageError::Unavailable(_)), "{missing:?}");
        let cases = [
            (missing.to_string(), vec!["\"there\"", ":1", "does a server listen there"]),
            (
                error(&format!("postgres://{user}:secret@{host}:{port}/postgres")).await.to_string(),
                vec!["password authentication failed", "28P01", user, "right"],
            ),
            (
                error(&schema.url().replace("/durable?", "/nowhere?")).await.to_string(),
                vec!["\"nowhere\" does not exist", "3D000", "CREATE DATABASE"],
            ),
            (error("mysql://user:secret@host/db").await.to_string(), vec!["\"mysql\" is not PostgreSQL's"]),
            (error("secret").await.to_string(), vec!["not a URL", "postgres://user:password@host"]),
            (error("postgres://user:secret@host:port/db").await.to_string(), vec!["not PostgreSQL's", "invalid port"]),
        ];
        for (error, parts) in cases {
            for part in parts {
                assert!(error.contains(part), "{part}: {error}");
            }
            assert!(!error.contains("secret"), "{error}");
        }
        let connect = Postgres::connect("postgres://user:secret@host/db");
        assert!(!format!("{connect:?}").contains("secret"));
    });
}

#[test]
fn schemas_by_name() {
    test(async {
        let schema = PostgresSchema::new().await;
        for name in ["", "a-b", "a\"; DROP SCHEMA public", "1a", "pg_own"] {
            let error = Postgres::connect(schema.url()).schema(name).await.unwrap_err();
            assert!(matches!(error, StorageError::Schema(_)), "{error:?}");
            assert!(error.to_string().contains("cannot be the schema's name"), "{error}");
        }
        // Two schemas are two storages; capitals count.
        let upper = schema.name().to_uppercase();
        let one = schema.storage().await;
        let other = Postgres::connect(schema.url()).schema(&*upper).await.unwrap();
        let (mine, _heart) = enlist(&one).await;
        commit(&one, mine, vec![spawn("p", false).0]).await;
        assert!(one.find("default", "p", None).await.unwrap().is_some());
        assert!(other.find("default", "p", None).await.unwrap().is_none());
        let sql = format!("DROP SCHEMA \"{upper}\" CASCADE");
        schema.connect().await.execute(AssertSqlSafe(sql)).await.unwrap();
        // A service's own search_path turns nothing aside.
        let url = format!("{}&options[search_path]=nowhere", schema.url());
        let storage = Postgres::connect(url).schema(schema.name()).await.unwrap();
        assert!(storage.find("default", "p", None).await.unwrap().is_some());
    });
}

#[test]
fn schemas_of_other_versions() {
    test(async {
        let schema = PostgresSchema::new().await;
        let connect = || Postgres::connect(schema.url()).schema(schema.name());
        let mut connection = schema.connect().await;
        let error = connect().verify_only().await.unwrap_err().to_string();
        assert!(error.contains("lacks migration 1") && error.contains("schema_sql"), "{error}");
        let sql = "SELECT 1 FROM pg_namespace WHERE nspname = '{s}'";
        assert!(connection.fetch_optional(schema.sql(sql)).await.unwrap().is_none(), "nothing was made");
        drop(connect().await.unwrap());
        connect().verify_only().await.unwrap();
        // An additive migration of a later version: this code may go on.
        connection.execute(schema.sql("INSERT INTO {s}.migrations VALUES (2, 'later', 'x', 1, now())")).await.unwrap();
        connect().await.unwrap();
        let sql = schema.sql("UPDATE {s}.migrations SET oldest_code = 2 WHERE version = 2");
        connection.execute(sql).await.unwrap();
        for error in [connect().await.unwrap_err(), connect().verify_only().await.unwrap_err()] {
            assert!(error.to_string().contains("deploy a newer version of the service"), "{error}");
        }
        connection.execute(schema.sql("DELETE FROM {s}.migrations WHERE version = 2")).await.unwrap();
        connection.execute(schema.sql("UPDATE {s}.migrations SET checksum = 'other'")).await.unwrap();
        let error = connect().await.unwrap_err().to_string();
        assert!(error.contains("changed by other hands"), "{error}");
        // What is printed is what is applied.
        let printed = PostgresSchema::new().await;
        let sql = durable_postgres::schema_sql(printed.name()).unwrap();
        connection.execute(AssertSqlSafe(sql)).await.unwrap();
        Postgres::connect(printed.url()).schema(printed.name()).verify_only().await.unwrap();
    });
}

#[test]
fn several_that_migrate_at_the_same_time() {
    test(async {
        for _ in 0..5 {
            let schema = PostgresSchema::new().await;
            let connects = (0..6).map(|_| {
                let connect = Postgres::connect(schema.url()).schema(schema.name());
                tokio::spawn(std::future::IntoFuture::into_future(connect))
            });
            for connect in connects.collect::<Vec<_>>() {
                connect.await.unwrap().unwrap();
            }
        }
    });
}

/// What a role that may create nothing is told; what it can do is in `rights`.
#[test]
fn a_role_without_rights_to_create() {
    test(async {
        let schema = PostgresSchema::new().await;
        let role = Role::new(&schema).await;
        let url = role.url();
        let connect = || Postgres::connect(&*url).schema(schema.name());
        let error = connect().await.unwrap_err().to_string();
        for part in ["permission denied", "CREATE", "schema_sql", "GRANT SELECT, INSERT, UPDATE, DELETE"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        drop(schema.storage().await);
        let error = connect().await.unwrap_err().to_string();
        assert!(error.contains("permission denied") && error.contains("GRANT USAGE ON SCHEMA"), "{error}");
        role.grant().await;
        connect().verify_only().await.unwrap();
        role.drop().await;
    });
}

/// What the server quotes of values does not get into errors.
#[test]
fn payloads_are_not_in_errors() {
    test(async {
        let schema = PostgresSchema::new().await;
        let storage = schema.storage().await;
        let (me, _heart) = enlist(&storage).await;
        let bad = Spawn { input: "{\"password\": secret}".into(), ..spawn_op("p", false) };
        let error = storage.commit(&batch(me, 0, vec![Op::Spawn(bad)])).await.unwrap_err();
        assert!(matches!(error, StorageError::Refused(_)), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        // And the connection is none the worse.
        commit(&storage, me, vec![spawn("p", false).0]).await;
    });
}

// --- Two sessions --------------------------------------------------------------------------------------------------

/// Waits until so many of the storage's sessions wait for a lock.
async fn waiting(schema: &PostgresSchema, sessions: i64) {
    let mut connection = schema.connect().await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'";
    until("it waits for a lock", async || {
        let row = sqlx::query(sql).bind(schema.name()).fetch_one(&mut connection).await.unwrap();
        row.get::<i64, _>(0) >= sessions
    })
    .await;
}

/// Interleaving 1. A batch that has queued behind a take-over has its snapshot from before it: it writes nothing all the
/// same. If the take-over is undone, it is written.
#[test]
fn a_batch_that_queues_behind_a_take_over() {
    test(async {
        let schema = PostgresSchema::new().await;
        // Enough for all of them to write.
        let storage = Postgres::connect(schema.url()).schema(schema.name()).max_connections(40).await.unwrap();
        for commits in [true, false] {
            let (zombie, _heart) = enlist(&storage).await;
            let name = |what: &str| format!("{what}-{commits}");
            let mut runs = Vec::new();
            for what in ["record", "finish", "park", "raise", "await"] {
                runs.push(start(&storage, zombie, &name(what)).await);
            }
            commit(&storage, zombie, vec![spawn(&name("due"), false).0]).await;
            let batches = vec![
                vec![spawn(&name("new"), true).0],
                vec![record(runs[0], "a")],
                vec![finish(runs[1])],
                vec![park(runs[2], 0)],
                vec![Op::Claim { kind: IT.kind().into(), limit: 9 }],
                vec![Op::AcceptCancel { run: runs[0], claim: 1, seq: 1 }],
                vec![raise(&name("raise"), "m")],
                vec![Op::Await { run: runs[0], id: name("await").into(), target: None }],
                vec![Op::cancel(name("await").into())],
            ];
            let before = schema.everything().await;
            let mut session = schema.connect().await;
            let mut transaction = session.begin().await.unwrap();
            let fence = schema.sql("UPDATE {s}.fences SET fenced_at = now() WHERE instance = $1");
            sqlx::query(fence).bind(zombie.0).execute(&mut *transaction).await.unwrap();
            let count = batches.len();
            let queued: Vec<_> =
                batches.into_iter().map(|ops| in_background(&storage, batch(zombie, 0, ops))).collect();
            waiting(&schema, count as i64).await;
            if commits {
                transaction.commit().await.unwrap()
            } else {
                transaction.rollback().await.unwrap()
            }
            for queued in queued {
                let result = queued.await.unwrap();
                if commits {
                    assert!(matches!(result, Err(StorageError::Fenced)), "{result:?}");
                } else {
                    assert_ne!(result.unwrap()[0], Outcome::Lost);
                }
            }
            if commits {
                assert_eq!(before, schema.everything().await);
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
        let schema = PostgresSchema::new().await;
        let storage = schema.storage().await;
        for own in [true, false] {
            let (me, _heart) = enlist(&storage).await;
            let id = format!("p-{own}");
            let run = start(&storage, me, &id).await;
            let mut session = schema.connect().await;
            let mut transaction = session.begin().await.unwrap();
            let lock = schema.sql("SELECT 1 FROM {s}.processes WHERE run = $1 FOR UPDATE");
            sqlx::query(lock).bind(run.0).execute(&mut *transaction).await.unwrap();
            let under_way = in_background(&storage, batch(me, 0, vec![record(run, "a"), finish(run)]));
            waiting(&schema, 1).await;
            let peers = storage.peers("default", InstanceId::new()).await.unwrap().peers;
            let peer = peers.into_iter().find(|peer| peer.instance == me).unwrap();
            let fencing = {
                let storage = storage.clone();
                tokio::spawn(async move {
                    if own { storage.refence(me, 1).await.map(|()| true) } else { storage.fence(&peer).await }
                })
            };
            waiting(&schema, 2).await;
            assert!(!fencing.is_finished());
            transaction.rollback().await.unwrap();
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
        let schema = PostgresSchema::new().await;
        let (storage, other) = (schema.storage().await, schema.storage().await);
        let ((me, _heart), (sender, _its)) = (enlist(&storage).await, enlist(&other).await);
        // A message that is not committed yet when the process parks.
        let run = start(&storage, me, "a").await;
        let mut session = schema.connect().await;
        let mut transaction = session.begin().await.unwrap();
        let signal = schema.sql("UPDATE {s}.processes SET signals = signals + 1 WHERE run = $1");
        sqlx::query(signal).bind(run.0).execute(&mut *transaction).await.unwrap();
        let parking = in_background(&storage, batch(me, 0, vec![park(run, 0)]));
        waiting(&schema, 1).await;
        transaction.commit().await.unwrap();
        assert_eq!(parking.await.unwrap().unwrap(), [Outcome::Signalled(1)]);
        // A park that is not committed yet when the message comes.
        let run = start(&storage, me, "b").await;
        let mut transaction = session.begin().await.unwrap();
        let parked =
            schema.sql("UPDATE {s}.processes SET status = 'waiting', owner = NULL, calm_claim = 1 WHERE run = $1");
        sqlx::query(parked).bind(run.0).execute(&mut *transaction).await.unwrap();
        let raising = in_background(&other, batch(sender, 0, vec![raise("b", "m")]));
        waiting(&schema, 1).await;
        transaction.commit().await.unwrap();
        let delivered = Raised::Delivered { run, number: 1, mine: false };
        assert_eq!(raising.await.unwrap().unwrap(), [Outcome::Raised(delivered)]);
        let claimed = commit(&storage, me, vec![Op::Claim { kind: IT.kind().into(), limit: 9 }]).await;
        assert_eq!(claimed, [Outcome::Claimed(vec![Claimed { run, claim: 2 }])], "it is due");
    });
}

/// Who comes to await a process at the moment of its end: it is told, or it is woken.
#[test]
fn await_against_finish() {
    test(async {
        let schema = PostgresSchema::new().await;
        let (storage, other) = (schema.storage().await, schema.storage().await);
        let ((me, _heart), (waiter, _its)) = (enlist(&storage).await, enlist(&other).await);
        let wait = |run, id: &str| Op::Await { run, id: id.into(), target: None };
        let mut session = schema.connect().await;
        // The end queues behind the await.
        let (target, parent) = (start(&storage, me, "a").await, start(&other, waiter, "parent-a").await);
        let mut transaction = session.begin().await.unwrap();
        let mark = schema.sql("UPDATE {s}.processes SET awaited = true WHERE run = $1");
        sqlx::query(mark).bind(target.0).execute(&mut *transaction).await.unwrap();
        let insert = schema.sql("INSERT INTO {s}.waiters (target, waiter) VALUES ($1, $2)");
        sqlx::query(insert).bind(target.0).bind(parent.0).execute(&mut *transaction).await.unwrap();
        let ending = in_background(&storage, batch(me, 0, vec![record(target, "a"), finish(target)]));
        waiting(&schema, 1).await;
        transaction.commit().await.unwrap();
        assert_eq!(ending.await.unwrap().unwrap()[1], Outcome::Finished { wakes: vec![] });
        assert_eq!(storage.find("default", "parent-a", None).await.unwrap().unwrap().signals, 1, "it was woken");
        assert_eq!(
            storage.load(&Load::whole(&[target])).await.unwrap().unwrap()[0]
                .state
                .clone()
                .unwrap()
                .unwrap()
                .records
                .len(),
            1
        );
        // The await queues behind the end.
        let (target, parent) = (start(&storage, me, "b").await, start(&other, waiter, "parent-b").await);
        let mut transaction = session.begin().await.unwrap();
        let end =
            schema.sql("UPDATE {s}.processes SET status = 'completed', output = '7', owner = NULL WHERE run = $1");
        sqlx::query(end).bind(target.0).execute(&mut *transaction).await.unwrap();
        let awaiting = in_background(&other, batch(waiter, 0, vec![wait(parent, "b")]));
        waiting(&schema, 1).await;
        transaction.commit().await.unwrap();
        let ended = Some((Status::Completed, Some("7".into())));
        assert_eq!(awaiting.await.unwrap().unwrap(), [Outcome::Awaits(Some((target, ended)))]);
        // A parent that parks in the same batch in which its child ends is not left behind.
        let (child, parent) = (start(&storage, me, "c").await, start(&storage, me, "parent-c").await);
        commit(&storage, me, vec![wait(parent, "c")]).await;
        let outcomes = commit(&storage, me, vec![park(parent, 0), finish(child)]).await;
        assert_eq!(outcomes, [Outcome::Signalled(1), Outcome::Finished { wakes: vec![parent] }]);
    });
}

/// Three instances race for each id of a process, a message and a durable start, for what is new and for what is due: a
/// thousand times each one winner, one number each, and no deadlock.
#[test]
fn races_for_ids() {
    test(async {
        const ROUNDS: usize = 125;
        const EACH: usize = 8;
        let schema = PostgresSchema::new().await;
        let storages = [schema.storage().await, schema.storage().await, schema.storage().await];
        let (mut instances, mut parents) = (Vec::new(), Vec::new());
        for (n, storage) in storages.iter().enumerate() {
            let (me, heart) = enlist(storage).await;
            parents.push(start(storage, me, &format!("parent-{n}")).await);
            instances.push((me, heart));
        }
        let targets: Vec<String> = (0..EACH).map(|n| format!("target-{n}")).collect();
        for target in &targets {
            start(&storages[0], instances[0].0, target).await;
        }
        // What each of them does at the same time as the others.
        let race = async |ops: [Vec<Op>; 3]| {
            let racing = storages.iter().zip(&instances).zip(ops);
            let racing = racing.map(|((storage, (me, _)), ops)| in_background(storage, batch(*me, 0, ops)));
            let mut outcomes = Vec::new();
            for racing in racing.collect::<Vec<_>>() {
                // A deadlock would be an error: the storage does not try again, the engine does.
                outcomes.push(racing.await.unwrap().unwrap());
            }
            outcomes
        };
        let claim = || vec![Op::Claim { kind: KIND.into(), limit: EACH }];
        for round in 0..ROUNDS {
            let ops = [0, 1, 2].map(|n: usize| {
                // Each in another order.
                let turn = |m: usize| (m * (2 * n + 1) + n) % EACH;
                let mut ops: Vec<Op> = (0..EACH).map(|m| spawn(&format!("p-{round}-{}", turn(m)), false).0).collect();
                ops.extend((0..EACH).map(|m| raise(&targets[turn(m)], &format!("{round}"))));
                ops.extend((0..EACH).map(|m| raise(&targets[turn(m)], &format!("{round}-{n}"))));
                ops.extend((0..EACH).map(|m| {
                    let child =
                        Spawn { kind: "child".into(), ..spawn_op(&format!("child-{round}-{}", turn(m)), false) };
                    started(parents[n], &format!("{round}-{m}"), child)
                }));
                ops
            });
            let mut winners = HashMap::new();
            for outcome in race(ops).await.concat() {
                match outcome {
                    Outcome::Spawned(spawned) => {
                        *winners.entry(spawned.kind).or_insert(0) += usize::from(!spawned.existed)
                    }
                    Outcome::Raised(Raised::Delivered { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!((winners[KIND], winners["child"]), (EACH, EACH), "one winner each");
            // First those that are new are due, then those whose timer is.
            for turn in 1..=2 {
                let mut claimed = HashMap::new();
                // Rows that another one was looking at were passed over.
                while claimed.len() < EACH {
                    for (n, outcomes) in race([claim(), claim(), claim()]).await.into_iter().enumerate() {
                        let [Outcome::Claimed(mine)] = &outcomes[..] else { panic!("{outcomes:?}") };
                        for Claimed { run, claim } in mine {
                            assert_eq!(*claim, turn);
                            assert!(claimed.insert(*run, n).is_none(), "claimed twice");
                        }
                    }
                }
                let wake_at = (turn == 1).then(chrono::DateTime::default);
                let parks = [0, 1, 2].map(|n| {
                    let mine = claimed.iter().filter(|(_, owner)| **owner == n);
                    mine.map(|(run, _)| {
                        Op::Park(Park { run: *run, claim: turn, wake_at, seen: Some(0), waiting_for: None, deaths: 0 })
                    })
                    .collect()
                });
                assert!(race(parks).await.concat().iter().all(|outcome| *outcome == Outcome::Recorded));
            }
        }
        for target in &targets {
            let run = storages[0].find("default", target, None).await.unwrap().unwrap().run;
            let state =
                storages[0].load(&Load::signals(&[run])).await.unwrap().unwrap().remove(0).state.unwrap().unwrap();
            assert_eq!(state.events.len(), ROUNDS * 4, "each message once");
            let numbers: HashSet<i64> = state.events.iter().map(|event| event.number).collect();
            assert_eq!(numbers.len(), state.events.len());
            assert_eq!(numbers.into_iter().max().unwrap(), state.process.signals);
        }
    });
}

// --- Sessions that end ---------------------------------------------------------------------------------------------

/// Polls a call so many times, and drops it if it has not ended by then. Says whether it was dropped.
async fn dropped_after(polls: u64, call: impl Future) -> bool {
    let (mut call, mut left) = (std::pin::pin!(call), polls);
    std::future::poll_fn(|cx| {
        left -= 1;
        match call.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(false),
            Poll::Pending if left == 0 => Poll::Ready(true),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Calls that are dropped at any of their awaits leave no transaction open, and the storage goes on.
async fn dropped_calls(transactions: bool) {
    const AT_A_TIME: u64 = 4;
    let each = if long() { 5_000 } else { 1_000 } / AT_A_TIME;
    // How often it waits, about, on a connection that is open; and while one is opened.
    let (few, many) = (if transactions { 10 } else { 2 }, 150);
    let schema = PostgresSchema::new().await;
    let storage = schema.storage().await;
    let (me, _heart) = enlist(&storage).await;
    start(&storage, me, "target").await;
    let call = async move |storage: &Postgres, n: u64, id: &str| {
        let (child, run) = spawn(&format!("p-{id}"), true);
        if transactions {
            let ops = vec![child, raise("target", id), Op::cancel("target".into())];
            drop(storage.commit(&batch(me, 0, ops)).await);
        } else if n.is_multiple_of(8) {
            drop(storage.load(&Load::whole(&[run])).await);
        } else {
            drop(storage.commit(&batch(me, 0, vec![child])).await);
        }
    };
    let some = |first: u64| {
        let storage = storage.clone();
        tokio::spawn(async move {
            let (mut random, mut dropped) = (Random(first), 0);
            for n in (first..).step_by(AT_A_TIME as usize) {
                if dropped == each {
                    break;
                }
                let open = random.below(2) == 0;
                if open {
                    call(&storage, n, &format!("{n}-before")).await;
                }
                let polls = 1 + random.below(if open { few } else { many });
                dropped += u64::from(dropped_after(polls, call(&storage, n, &n.to_string())).await);
            }
        })
    };
    for some in (0..AT_A_TIME).map(some).collect::<Vec<_>>() {
        some.await.unwrap();
    }
    let open = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}' AND state LIKE 'idle in transaction%'",
        schema.name()
    );
    until("no transaction is open", async || schema.number(&open).await == 0).await;
    if transactions {
        // Each batch is there as a whole or not at all.
        let halves = "SELECT count(*) FROM {s}.processes p FULL JOIN {s}.events e ON p.id = 'p-' || e.event_id
            WHERE p.run IS NULL OR p.id LIKE 'p-%' AND e.run IS NULL";
        assert_eq!(schema.number(halves).await, 0);
    }
    storage.refence(me, 1).await.unwrap();
    assert!(storage.find("default", "target", None).await.unwrap().is_some());
}

#[test]
fn dropped_statements_leave_nothing_open() {
    test(dropped_calls(false));
}

#[test]
fn dropped_transactions_leave_nothing_open() {
    test(dropped_calls(true));
}

async fn lock_pid(connection: &mut PgConnection, schema: &PostgresSchema, instance: InstanceId) -> Option<i32> {
    let sql = "SELECT l.pid FROM {s}.instances i JOIN pg_locks l ON l.locktype = 'advisory' AND l.granted
            AND l.objid = (i.lock_key & 4294967295)::oid AND l.classid = ((i.lock_key >> 32) & 4294967295)::oid
        WHERE i.instance = $1";
    let row = sqlx::query(schema.sql(sql)).bind(instance.0).fetch_optional(connection).await.unwrap();
    row.map(|row| row.get(0))
}

/// Interleaving 9. The server ends the session that holds an instance's lock, and the program lives: it takes the lock
/// again before anybody has looked twice.
#[test]
fn a_session_that_ends_is_no_death() {
    test(async {
        for latency in [Duration::ZERO, Duration::from_millis(60)] {
            let (kills, pause) = if latency.is_zero() { (20, 170) } else { (10, 600) };
            sessions_that_end(latency, kills, Duration::from_millis(pause)).await;
        }
    });
}

/// Sessions whose locks prove life are ended again and again, one of them on a network that takes so long each way.
async fn sessions_that_end(latency: Duration, kills: u32, pause: Duration) {
    let schema = PostgresSchema::new().await;
    let proxy = Proxy::before(schema.url()).await;
    proxy.network(|network| network.latency = latency);
    let storage = Postgres::connect(&proxy.url).schema(schema.name()).await.unwrap();
    let other = schema.storage().await;
    {
        // The defaults: two seconds between heartbeats.
        let host = Host::builder(storage.clone()).register(IT, it).start().await.unwrap();
        let _observer = Host::builder(other.clone())
            .register(IT, it)
            .heartbeat(Duration::from_millis(200), Duration::from_secs(10));
        let _observer = _observer.start().await.unwrap();
        let handle = host.spawn(IT, "it", &1).await.unwrap();
        let mut connection = schema.connect().await;
        let peers = async || other.peers("default", InstanceId::new()).await.unwrap().peers;
        let before: HashSet<InstanceId> = peers().await.iter().map(|peer| peer.instance).collect();
        assert_eq!(before.len(), 2);
        for _ in 0..kills {
            for instance in &before {
                if let Some(pid) = lock_pid(&mut connection, &schema, *instance).await {
                    sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(&mut connection).await.unwrap();
                }
            }
            tokio::time::sleep(pause).await;
        }
        let after: HashSet<InstanceId> = peers().await.iter().map(|peer| peer.instance).collect();
        assert_eq!(after, before, "somebody was taken for dead");
        until("all hold their locks again", async || peers().await.iter().all(|peer| peer.lock == LockState::Held))
            .await;
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
    }
}

/// A lock that is free although the last heartbeat says that it is held proves death only within one run of the server.
#[test]
fn a_lock_of_another_run_of_the_server_proves_nothing() {
    test(async {
        let schema = PostgresSchema::new().await;
        let storage = schema.storage().await;
        let (me, mut heart) = enlist(&storage).await;
        let look = async || storage.peers("default", InstanceId::new()).await.unwrap().peers[0].lock;
        assert_eq!(look().await, LockState::Held);
        let mut connection = schema.connect().await;
        connection.execute(schema.sql("UPDATE {s}.instances SET locked_in = 'earlier'")).await.unwrap();
        assert_eq!(look().await, LockState::Unknown);
        heart.beat().await.unwrap();
        assert_eq!(look().await, LockState::Held, "the next heartbeat says it again");
        assert!(lock_pid(&mut connection, &schema, me).await.is_some());
        drop(heart);
        until("it is free", async || look().await == LockState::Free).await;
        connection.execute(schema.sql("UPDATE {s}.instances SET locked_in = 'earlier'")).await.unwrap();
        assert_eq!(look().await, LockState::Unknown);
    });
}

/// Processes that are under way while `disturb` does its worst: they see nothing of it, and no recorded step runs twice.
async fn disturbed(connect: Connect, disturb: impl AsyncFnOnce()) {
    const MANY: u32 = 60;
    let effects = Effects::default();
    let counted = effects.clone();
    let steps = move |proc: Process, input: u32| {
        let effects = counted.clone();
        async move {
            for n in 0..5 {
                proc.step(("step", n), || async {
                    effects.add(format!("{} {n}", proc.id()));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    Ok::<_, Failure>(())
                })
                .await?;
                proc.delay(("pause", n), Duration::from_millis(20)).await?;
            }
            Ok::<_, Failure>(proc.event(GO).await? + input)
        }
    };
    let host = Host::builder(connect.await.unwrap())
        .heartbeat(Duration::from_millis(500), Duration::from_secs(10))
        .quiet_time(Duration::from_millis(50))
        .poll(Duration::from_millis(200))
        .register(IT, steps)
        .start()
        .await
        .unwrap();
    let mut handles = Vec::new();
    for n in 0..MANY {
        handles.push(host.spawn(IT, format!("it-{n}"), &n).await.unwrap());
    }
    let raise = |handle: &Handle<u32, Failure>| {
        let handle = handle.clone();
        tokio::spawn(async move { handle.raise(GO, &1).id("m").await })
    };
    let raising: Vec<_> = handles.iter().map(raise).collect();
    disturb().await;
    for raised in raising {
        raised.await.unwrap().unwrap();
    }
    for (n, handle) in (0..).zip(&handles) {
        assert_eq!(handle.output().await.unwrap(), n + 1);
        assert_eq!(handle.status().await.unwrap().status, Status::Completed);
    }
    let all = effects.all();
    let different: HashSet<_> = all.iter().collect();
    assert_eq!((all.len(), different.len()), (MANY as usize * 5, MANY as usize * 5), "each step once");
}

#[test]
fn sessions_that_end_at_any_moment() {
    test(async {
        let schema = PostgresSchema::new().await;
        let mut connection = schema.connect().await;
        disturbed(Postgres::connect(schema.url()).schema(schema.name()), async || {
            for _ in 0..20 {
                let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
                sqlx::query(sql).bind(schema.name()).execute(&mut connection).await.unwrap();
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
        })
        .await;
    });
}

/// What is sent arrives and is carried out, and the answers are lost with their connections.
#[test]
fn answers_that_are_lost() {
    test(async {
        let schema = PostgresSchema::new().await;
        let proxy = Proxy::before(schema.url()).await;
        disturbed(Postgres::connect(&proxy.url).schema(schema.name()), async || {
            for _ in 0..20 {
                let before = proxy.lost();
                proxy.network(|network| network.swallows = true);
                // Of whatever is under way: there is a heartbeat at least.
                until("an answer is lost", async || proxy.lost() > before).await;
                proxy.network(|network| network.swallows = false);
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
        })
        .await;
    });
}

/// The server takes no connection, takes no login, is read only: nothing is recorded meanwhile, and all goes on after.
#[test]
fn a_server_that_refuses() {
    test(async {
        for (refuse, allow) in [
            ("CONNECTION LIMIT 0", "CONNECTION LIMIT -1"),
            ("NOLOGIN", "LOGIN"),
            ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
        ] {
            let schema = PostgresSchema::new().await;
            drop(schema.storage().await);
            let role = Role::new(&schema).await;
            role.grant().await;
            let steps = async || schema.number("SELECT count(*) FROM {s}.steps").await;
            let sessions = format!("FROM pg_stat_activity WHERE usename = '{}'", role.name());
            let end = format!("SELECT count(pg_terminate_backend(pid)) {sessions}");
            disturbed(Postgres::connect(role.url()).schema(schema.name()), async || {
                until("something is recorded", async || steps().await > 0).await;
                role.execute(&format!("ALTER ROLE {{r}} {refuse}")).await;
                let since = schema.texts("SELECT clock_timestamp()::text").await.remove(0);
                role.execute(&end).await;
                let old = format!("SELECT count(*) {sessions} AND backend_start < '{since}'");
                until("the old sessions have ended", async || schema.number(&old).await == 0).await;
                let before = steps().await;
                tokio::time::sleep(Duration::from_millis(600)).await;
                assert_eq!(steps().await, before, "{refuse}");
                role.execute(&format!("ALTER ROLE {{r}} {allow}")).await;
                role.execute(&end).await;
                until("it goes on", async || steps().await > before).await;
            })
            .await;
            role.drop().await;
        }
    });
}

/// Statements that take too long, and locks that take too long, are given up and tried again.
#[test]
fn statements_that_take_too_long() {
    test(async {
        for (statement, lock) in [(100, 60_000), (60_000, 100)] {
            let schema = PostgresSchema::new().await;
            let mut session = schema.connect().await;
            let connect = Postgres::connect(schema.url()).schema(schema.name());
            let connect = connect.timeouts(Duration::from_millis(statement), Duration::from_millis(lock));
            disturbed(connect, async || {
                for table in ["processes", "steps", "fences", "instances", "events"] {
                    let mut transaction = session.begin().await.unwrap();
                    let lock = format!("LOCK TABLE {{s}}.{table} IN ACCESS EXCLUSIVE MODE");
                    transaction.execute(schema.sql(&lock)).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(350)).await;
                    transaction.rollback().await.unwrap();
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            })
            .await;
        }
    });
}

/// What a process leaves, so much that deleting it takes longer than a statement may, goes all the same, a part at a time.
#[test]
fn a_deletion_that_takes_long() {
    test(async {
        let schema = PostgresSchema::new().await;
        let bound = Duration::from_millis(100);
        let storage = Postgres::connect(schema.url()).schema(schema.name()).timeouts(bound, bound).await.unwrap();
        let (me, _heart) = enlist(&storage).await;
        let run = start(&storage, me, "p").await;
        commit(&storage, me, (0..30).map(|n| record(run, &format!("step-{n}"))).collect()).await;
        commit(&storage, me, vec![finish(run)]).await;
        schema
            .execute(
                "CREATE FUNCTION {s}.is_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     PERFORM pg_sleep(0.05);
                     RETURN OLD;
                 END $$;
                 CREATE TRIGGER is_slow BEFORE DELETE ON {s}.steps FOR EACH ROW EXECUTE FUNCTION {s}.is_slow()",
            )
            .await;
        commit(&storage, me, vec![Op::delete("p".into())]).await;
        let poll =
            durable_core::storage::Poll { instance: me, namespace: "default".into(), kinds: vec![], watched: vec![] };
        while storage.poll(&poll).await.unwrap().more {}
        assert!(schema.everything().await.is_empty());
        // What else goes with it is bounded as before.
        let slow = "CREATE OR REPLACE FUNCTION {s}.is_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                        PERFORM pg_sleep(0.3);
                        RETURN NEW;
                    END $$;
                    CREATE TRIGGER is_slow BEFORE UPDATE ON {s}.processes FOR EACH ROW EXECUTE FUNCTION {s}.is_slow()";
        start(&storage, me, "q").await;
        schema.execute(slow).await;
        let ops = vec![Op::delete("p".into()), Op::cancel("q".into())];
        let refused = storage.commit(&batch(me, 0, ops)).await.unwrap_err();
        assert!(matches!(refused, StorageError::Blocked(_)), "{refused:?}");
    });
}

/// Interleaving 8. A program that is stopped in the middle of a transaction keeps its locks no longer than it may; when
/// it goes on it has written nothing.
#[test]
fn a_program_that_stops_inside_a_transaction() {
    test(async {
        let schema = PostgresSchema::new().await;
        let connect = Postgres::connect(schema.url()).schema(schema.name());
        // Longer than any pause of this test's between two statements.
        let storage = connect.idle_in_transaction_timeout(Duration::from_secs(2)).await.unwrap();
        let other = schema.storage().await;
        let (me, _heart) = enlist(&storage).await;
        start(&storage, me, "target").await;
        let mut connection = schema.connect().await;
        let before = schema.everything().await;
        // Long enough that it can be stopped behind its first changes.
        let mut ops = vec![spawn("new", true).0, raise("target", "m"), Op::cancel("target".into())];
        ops.extend((0..20).map(|n| Op::cancel(format!("nobody-{n}").into())));
        let batch = batch(me, 0, ops);
        let mut call = storage.commit(&batch);
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'idle in transaction'
            AND query LIKE '%cancel_requested_at%'";
        loop {
            assert!(futures_util::poll!(&mut call).is_pending());
            tokio::time::sleep(Duration::from_millis(3)).await;
            let row = sqlx::query(sql).bind(schema.name()).fetch_one(&mut connection).await.unwrap();
            if row.get::<i64, _>(0) == 1 {
                break;
            }
        }
        let peer = other.peers("default", InstanceId::new()).await.unwrap().peers.remove(0);
        until("it is fenced", async || other.fence(&peer).await.is_ok_and(|fenced| fenced)).await;
        let error = call.await.unwrap_err();
        assert!(matches!(error, StorageError::Unavailable(_)), "{error:?}");
        assert_eq!(before, schema.everything().await);
        assert!(matches!(storage.commit(&batch).await, Err(StorageError::Fenced)));
    });
}

// --- Hints ---------------------------------------------------------------------------------------------------------

/// Work from another program is noticed at once by listening, and soon without.
#[test]
fn other_programs_are_noticed() {
    test(async {
        for listen in [true, false] {
            let schema = PostgresSchema::new().await;
            let connect = || Postgres::connect(schema.url()).schema(schema.name()).listen(listen);
            let poll = if listen { Duration::from_secs(20) } else { Duration::from_millis(500) };
            let worker = Host::builder(connect().await.unwrap()).poll(poll).register(IT, it).start().await.unwrap();
            let client = Host::builder(connect().await.unwrap()).poll(poll).start().await.unwrap();
            // Long enough for the looks to become rare.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let since = Instant::now();
            let handle = client.spawn(IT, "it", &1).await.unwrap();
            until("it runs", async || handle.status().await.unwrap().execution == 1).await;
            handle.raise(GO, &1).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), 2);
            assert!(since.elapsed() < Duration::from_secs(3), "{listen}: {:?}", since.elapsed());
            worker.shutdown(Duration::from_secs(5)).await;
        }
    });
}

// --- Rows that others wrote ----------------------------------------------------------------------------------------

/// A row that somebody changed by hand makes its own process stuck, and nobody else's.
#[test]
fn rows_that_were_changed_by_hand() {
    test(async {
        let backend = PostgresSchema::new().await;
        let host = quick(&backend).await.register(IT, it).start().await.unwrap();
        let changes = [
            (
                "state",
                "UPDATE {s}.steps SET state = 'odd' WHERE run = $1",
                "state holds \"odd\", which this version does not know",
            ),
            ("op", "UPDATE {s}.steps SET op = 'odd' WHERE run = $1", "op holds \"odd\""),
            ("scope", "UPDATE {s}.steps SET scope = 7 WHERE run = $1", "scope holds \"7\""),
            ("payload", "UPDATE {s}.steps SET payload = '[1, 2]' WHERE run = $1", "expected u32, found an array of 2"),
            ("input", "UPDATE {s}.processes SET input = '[]' WHERE run = $1", "expected u32, found an array of 0"),
        ];
        let mut handles = Vec::new();
        for (name, ..) in changes {
            handles.push(host.spawn(IT, name, &1).await.unwrap());
        }
        let sound = host.spawn(IT, "sound", &1).await.unwrap();
        until("all are parked", async || host.in_memory() == 0).await;
        let mut connection = backend.connect().await;
        for ((_, sql, _), handle) in changes.iter().zip(&handles) {
            let run = handle.run().unwrap().0;
            sqlx::query(backend.sql(sql)).bind(run).execute(&mut connection).await.unwrap();
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
        connection.execute(backend.sql("UPDATE {s}.processes SET status = 'odd' WHERE id = 'sound'")).await.unwrap();
        for told in [sound.status().await.map(|_| ()), sound.cancel().await, sound.resume().await, sound.delete().await]
        {
            let error = told.unwrap_err().to_string();
            assert!(error.contains("status holds \"odd\""), "{error}");
        }
        // A time that is none: it is due, and the claim clears it away.
        let handle = host.spawn(IT, "infinite", &1).await.unwrap();
        until("it is parked", async || host.in_memory() == 0).await;
        let by_hand = "UPDATE {s}.processes SET wake_at = '-infinity' WHERE id = 'infinite'";
        connection.execute(backend.sql(by_hand)).await.unwrap();
        until("it is claimed", async || handle.status().await.is_ok_and(|info| info.execution == 2)).await;
        assert!(host.processes().list(20).await.unwrap().iter().all(|info| &*info.id != "sound"));
    });
}
