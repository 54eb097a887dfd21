//! What can go wrong on PostgreSQL alone: sessions that end, deadlocks, locks that others hold.

use durable_core::storage::{Committed, OpKind, Open, RecordKey, RolledBack, Scope, Storage, Transactional};
use durable_core::{Definition, Event, Failure, Host, Process, Retry, RunId, StepError};
use durable_postgres::{Outbox, Postgres, Transactions, Tx};
use durable_tests::proxy::Proxy;
use durable_tests::{Backend, Effects, PostgresSchema, Sql, ops, quick, until};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

const DEBIT: Definition<(), i64> = Definition::new("debit");

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{self:?}")]
enum DebitError {
    Sql(String),
}

impl From<sqlx::Error> for DebitError {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error.to_string())
    }
}

async fn bank() -> PostgresSchema {
    let backend = PostgresSchema::new().await;
    backend.storage().await;
    backend.execute("CREATE TABLE accounts (id bigint PRIMARY KEY, cents bigint NOT NULL CHECK (cents >= 0))").await;
    backend.execute("INSERT INTO accounts VALUES (1, 1000)").await;
    backend
}

async fn cents(backend: &PostgresSchema) -> i64 {
    backend.number("SELECT cents FROM accounts WHERE id = 1").await
}

async fn debit(tx: &mut Tx, cents: i64) -> Result<i64, sqlx::Error> {
    let debit = sqlx::query_scalar("UPDATE accounts SET cents = cents - $1 WHERE id = 1 RETURNING cents");
    debit.bind(cents).fetch_one(&mut **tx).await
}

async fn host_with<F, Fut>(backend: &PostgresSchema, function: F) -> Host
where
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<i64, Failure>> + Send + 'static,
{
    quick(backend).await.register(DEBIT, move |proc, ()| function(proc)).start().await.unwrap()
}

/// Runs a transaction whose closure meets this SQL at its first calls: how it ended, and how often it was called.
async fn meets(
    backend: &PostgresSchema,
    sql: &'static str,
    at_first: usize,
    typed: bool,
) -> (Result<i64, String>, usize) {
    let calls = Effects::default();
    let counted = calls.clone();
    let (sender, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let host = host_with(backend, move |proc: Process| {
        let (calls, sender) = (counted.clone(), sender.clone());
        async move {
            let statements = async |mut tx: Tx| {
                calls.add("call");
                let left = debit(&mut tx, 100).await?;
                if calls.all().len() <= at_first {
                    tx.execute(sqlx::raw_sql(sql)).await?;
                }
                Ok::<_, sqlx::Error>(left)
            };
            let ended = if typed {
                let statements = async |tx: Tx| Ok::<_, DebitError>(statements(tx).await?);
                proc.transaction("debit", statements).await.map_err(|error| format!("{error:?}"))
            } else {
                proc.transaction("debit", statements).await.map_err(|error| format!("{error:?}"))
            };
            let _ = sender.send(ended);
            Ok(0)
        }
    })
    .await;
    host.spawn(DEBIT, RunId::new().to_string(), &()).await.unwrap().output().await.unwrap();
    (ended.recv().await.unwrap(), calls.all().len())
}

macro_rules! tests {
    ($($case:ident),* $(,)?) => { $(#[test] fn $case() { PostgresSchema::run(cases::$case()); })* };
}

tests!(
    a_round_trip_to_begin_and_one_to_end,
    what_is_recorded_whatever_a_text_means,
    a_closure_that_throws_statements_away,
    what_is_none_of_the_processs_business,
    what_the_database_refuses_is_its_error,
    a_statement_that_failed_unnoticed,
    a_session_that_ends_at_the_commit,
    a_take_over_that_is_open,
    a_commit_that_is_on_its_way_is_waited_for,
    a_commit_that_arrives_late_is_the_only_one,
    a_record_that_stands_is_no_failure,
    a_transaction_that_stays_open_holds_up_nobody,
    what_comes_too_late_is_dropped,
    two_that_put_in_the_same,
    a_flood_of_starts_holds_up_nobody,
);

mod cases {
    use super::*;

    pub(super) async fn a_round_trip_to_begin_and_one_to_end() {
        let backend = bank().await;
        let proxy = Proxy::before(backend.url()).await;
        let storage = Postgres::connect(&proxy.url).schema(backend.name()).listen(false).await.unwrap();
        let (instance, _heart) = ops::enlist(&storage).await;
        let run = ops::start(&storage, instance, "p").await;
        let mut round_trips = Vec::new();
        for (name, keeps) in
            [("opens a connection", true), ("keeps", true), ("rolls back", false), ("keeps again", true)]
        {
            let before = proxy.round_trips();
            let Open { mut tx, ending } = storage.begin(Duration::from_secs(4)).await.unwrap();
            tx.execute(sqlx::raw_sql("UPDATE accounts SET cents = cents - 1 WHERE id = 1")).await.unwrap();
            drop(tx);
            if keeps {
                let record = ops::record_op(run, name, OpKind::Transaction, None);
                assert_eq!(ending.commit(instance, &record).await.unwrap(), Committed::Recorded);
            } else {
                assert_eq!(ending.rollback().await.unwrap(), RolledBack::Open);
            }
            round_trips.push(proxy.round_trips() - before);
        }
        // With the one of the closure's own.
        assert_eq!(round_trips[1..], [3, 3, 3]);
        assert_eq!(cents(&backend).await, 997);
    }

    pub(super) async fn what_is_recorded_whatever_a_text_means() {
        const TEXT: Definition<(), String> = Definition::new("text");
        const HOSTILE: &str = r#"'; DROP TABLE accounts; -- \' \\ "ä" 漢字 😀 \u0000 $$ {}"#;
        let backend = bank().await;
        let function = |proc: Process, ()| async move {
            let text = proc.transaction((HOSTILE, HOSTILE), async |mut tx| {
                for sql in [
                    "SET standard_conforming_strings = off",
                    "SET backslash_quote = on",
                    "SET client_encoding = 'SJIS'",
                ] {
                    tx.execute(sqlx::raw_sql(sql)).await?;
                }
                Ok::<_, sqlx::Error>(HOSTILE.to_owned())
            });
            Ok::<_, Failure>(text.await.unwrap())
        };
        let host = quick(&backend).await.register(TEXT, function).start().await.unwrap();
        assert_eq!(host.spawn(TEXT, "t", &()).await.unwrap().output().await.unwrap(), HOSTILE);
        let recorded = backend.texts("SELECT name || key || payload::text FROM steps").await;
        assert_eq!(recorded, [format!("{HOSTILE}{HOSTILE}{}", serde_json::to_string(HOSTILE).unwrap())]);
        assert_eq!(cents(&backend).await, 1000);
    }

    pub(super) async fn a_closure_that_throws_statements_away() {
        let backend = bank().await;
        let searches = "CREATE TEMP TABLE steps (dummy text); SET search_path = pg_temp, public";
        for (sql, left) in [("DEALLOCATE ALL", 900), ("DISCARD PLANS", 800), (searches, 700), ("DEALLOCATE ALL", 600)] {
            assert_eq!(meets(&backend, sql, 1, true).await, (Ok(left), 1));
            assert_eq!(cents(&backend).await, left);
        }
        assert_eq!(backend.number("SELECT count(*) FROM steps WHERE name = 'debit'").await, 4);
    }

    pub(super) async fn what_is_none_of_the_processs_business() {
        let backend = bank().await;
        for sql in [
            "SELECT pg_terminate_backend(pg_backend_pid())",
            "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$",
            "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$",
        ] {
            for typed in [true, false] {
                let before = cents(&backend).await;
                assert_eq!(meets(&backend, sql, 2, typed).await, (Ok(before - 100), 3), "{sql}");
                assert_eq!(cents(&backend).await, before - 100, "{sql}");
            }
        }
    }

    pub(super) async fn what_the_database_refuses_is_its_error() {
        const VIOLATES: &str = "INSERT INTO accounts VALUES (1, 1)";
        let backend = bank().await;
        // Its error says what it is.
        let (ended, calls) = meets(&backend, VIOLATES, 100, false).await;
        assert!(ended.as_ref().unwrap_err().contains("duplicate key"), "{ended:?}");
        assert_eq!(calls, 1);
        // Its error does not say: it might have been a deadlock.
        let (ended, calls) = meets(&backend, VIOLATES, 100, true).await;
        assert!(ended.as_ref().unwrap_err().contains("duplicate key"), "{ended:?}");
        assert_eq!(calls, 4);
        assert_eq!(cents(&backend).await, 1000);
    }

    pub(super) async fn a_statement_that_failed_unnoticed() {
        let backend = bank().await;
        let (sender, mut ended) = tokio::sync::mpsc::unbounded_channel();
        let host = host_with(&backend, move |proc: Process| {
            let sender = sender.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    let left = debit(&mut tx, 100).await?;
                    let _ = tx.execute(sqlx::raw_sql("INSERT INTO accounts VALUES (1, 1)")).await;
                    Ok::<_, sqlx::Error>(left)
                });
                let _ = sender.send(debit.await);
                Ok(0)
            }
        })
        .await;
        host.spawn(DEBIT, "d", &()).await.unwrap().output().await.unwrap();
        match ended.recv().await.unwrap() {
            Err(StepError::Refused(why)) => assert!(why.contains("savepoint"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(cents(&backend).await, 1000);
    }

    pub(super) async fn a_session_that_ends_at_the_commit() {
        let backend = bank().await;
        backend
            .execute(
                "CREATE SEQUENCE commits;
                 CREATE FUNCTION ends() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     IF nextval('{s}.commits') < 3 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
                     RETURN NULL;
                 END $$;
                 CREATE CONSTRAINT TRIGGER ends AFTER UPDATE ON accounts DEFERRABLE INITIALLY DEFERRED
                     FOR EACH ROW EXECUTE FUNCTION ends()",
            )
            .await;
        assert_eq!(meets(&backend, "SELECT 1", 0, true).await, (Ok(900), 3));
        assert_eq!(cents(&backend).await, 900);
    }

    /// Whether somebody waits for a lock in a statement like this.
    async fn is_waiting(backend: &PostgresSchema, statement: &str) -> bool {
        let waiting = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = '{}'
                 AND query LIKE '%{statement}%'",
            backend.name()
        );
        backend.number(&waiting).await > 0
    }

    pub(super) async fn a_take_over_that_is_open() {
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let (go, gone) = tokio::sync::watch::channel(false);
        let host = host_with(&backend, move |proc: Process| {
            let (calls, gone) = (counted.clone(), gone.clone());
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    let left = debit(&mut tx, 100).await?;
                    calls.add("call");
                    let _ = gone.clone().wait_for(|gone| *gone).await;
                    Ok::<_, sqlx::Error>(left)
                });
                Ok(debit.await.unwrap())
            }
        })
        .await;
        host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it is inside", async || !calls.all().is_empty()).await;
        let mut other = backend.connect().await;
        other.execute("BEGIN").await.unwrap();
        other.execute(backend.sql("UPDATE {s}.fences SET fenced_at = now()")).await.unwrap();
        go.send_replace(true);
        until("the commit waits for the fence", async || is_waiting(&backend, "SAVEPOINT durable_record").await).await;
        other.execute("COMMIT").await.unwrap();
        // It goes on under a new epoch, once the old one's processes are handed back.
        let handle = host.get("d").of(DEBIT);
        assert_eq!(handle.output().await.unwrap(), 900);
        assert_eq!((cents(&backend).await, calls.all().len()), (900, 2));
    }

    pub(super) async fn a_commit_that_is_on_its_way_is_waited_for() {
        let backend = bank().await;
        let storage = backend.storage().await;
        let host = host_with(&backend, async |proc: Process| {
            proc.event(Event::<()>::new("Go")).await?;
            Ok(0)
        })
        .await;
        host.spawn(DEBIT, "d", &()).await.unwrap();
        let run = storage.find("default", "d", None).await.unwrap().unwrap().run;
        let key = RecordKey { scope: Scope::Process, name: "debit".into(), key: "".into() };
        let mut other = backend.connect().await;
        other.execute("BEGIN").await.unwrap();
        other.execute(backend.sql("SELECT 1 FROM {s}.processes FOR SHARE")).await.unwrap();
        let record = format!(
            "INSERT INTO {{s}}.steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
             VALUES ('{run}', 0, 'debit', '', 'transaction', 'done', '7', 0, 99, 1, now())"
        );
        other.execute(backend.sql(&record)).await.unwrap();
        let settled = tokio::spawn({
            let (storage, key) = (storage.clone(), key.clone());
            async move { storage.settled(run, &key).await }
        });
        until("it waits", async || is_waiting(&backend, "FOR NO KEY UPDATE").await).await;
        assert!(!settled.is_finished());
        other.execute("COMMIT").await.unwrap();
        assert_eq!(&*settled.await.unwrap().unwrap().unwrap().payload, "7");
    }

    async fn until_debited(url: String, schema: String) {
        let mut other = sqlx::PgConnection::connect(&url).await.unwrap();
        let look = || AssertSqlSafe(format!("SELECT cents FROM {schema}.accounts"));
        while sqlx::query_scalar::<_, i64>(look()).fetch_one(&mut other).await.unwrap() != 900 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn commits_late(url: String, schema: String, run: RunId) {
        let mut other = sqlx::PgConnection::connect(&url).await.unwrap();
        let late = format!(
            "BEGIN;
             UPDATE {schema}.accounts SET cents = cents - 100;
             INSERT INTO {schema}.steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
             VALUES ('{run}', 0, 'debit', '', 'transaction', 'done', '900', 0, 0, 1, now());
             COMMIT"
        );
        other.execute(sqlx::raw_sql(AssertSqlSafe(late))).await.unwrap();
    }

    /// The bytes that commit wait in some buffer while the answer is given up and the record looked for in vain. They arrive
    /// while the closure runs again, which sees what they have done.
    pub(super) async fn a_commit_that_arrives_late_is_the_only_one() {
        for retry in [Retry::fixed(Duration::from_millis(10)).max_attempts(1), Retry::fixed(Duration::from_millis(10))]
        {
            let backend = bank().await;
            let proxy = Arc::new(Proxy::before(backend.url()).await);
            let ms = Duration::from_millis;
            let storage = Postgres::connect(&proxy.url).schema(backend.name()).timeouts(ms(500), ms(500)).await;
            let calls = Effects::default();
            let debit = {
                let (calls, proxy) = (calls.clone(), proxy.clone());
                let schema = backend.name().to_owned();
                let url = backend.url().to_owned();
                move |proc: Process, ()| {
                    let (calls, net, schema, url) = (calls.clone(), proxy.clone(), schema.clone(), url.clone());
                    let retry = retry.clone();
                    async move {
                        let debit = proc.transaction("debit", async |mut tx| {
                            calls.add("call");
                            if calls.all().len() == 1 {
                                net.hold_back("COMMIT");
                                return Ok(debit(&mut tx, 100).await?);
                            }
                            net.let_go().await;
                            tokio::spawn(until_debited(url.clone(), schema.clone())).await.unwrap();
                            Err(DebitError::Sql("insufficient funds".into()))
                        });
                        Failure::ok(debit.retry(retry).await.unwrap())
                    }
                }
            };
            let host = Host::builder(storage.unwrap()).register(DEBIT, debit).start().await.unwrap();
            let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), 900);
            assert_eq!((cents(&backend).await, calls.all().len()), (900, 2));
        }
    }

    /// The same, whichever way it came to stand.
    pub(super) async fn a_record_that_stands_is_no_failure() {
        for retry in [Retry::fixed(Duration::from_millis(10)).max_attempts(1), Retry::fixed(Duration::from_millis(10))]
        {
            let backend = bank().await;
            let calls = Effects::default();
            let (counted, schema, url) = (calls.clone(), backend.name().to_owned(), backend.url().to_owned());
            let host = host_with(&backend, move |proc: Process| {
                let (calls, schema, url) = (counted.clone(), schema.clone(), url.clone());
                let retry = retry.clone();
                async move {
                    let run = proc.run();
                    let debit = proc.transaction("debit", async |_: Tx| {
                        calls.add("call");
                        tokio::spawn(commits_late(url.clone(), schema.clone(), run)).await.unwrap();
                        Err::<i64, _>(DebitError::Sql("insufficient funds".into()))
                    });
                    Ok(debit.retry(retry).await.unwrap())
                }
            })
            .await;
            let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), 900);
            assert_eq!((cents(&backend).await, calls.all().len()), (900, 1));
        }
    }

    const ADD: Definition<i64, i64> = Definition::new("add");
    const NUMBER: Event<i64> = Event::new("Number");

    async fn add(proc: Process, input: i64) -> Result<i64, Failure> {
        let step = proc.step("step", || async { Ok::<_, Failure>(input) }).await?;
        Ok(step + proc.event(NUMBER).await?)
    }

    async fn adding(backend: &PostgresSchema) -> Host {
        quick(backend).await.register(ADD, add).start().await.unwrap()
    }

    pub(super) async fn a_transaction_that_stays_open_holds_up_nobody() {
        let backend = bank().await;
        let host = adding(&backend).await;
        let waiting = host.spawn(ADD, "waiting", &1).await.unwrap();
        let mut open = backend.connect().await;
        open.execute("BEGIN").await.unwrap();
        host.spawn_in(&mut open, ADD, "later", &1).await.unwrap();
        host.raise_in(&mut open, "waiting", NUMBER, &100).await.unwrap();
        host.raise_in(&mut open, "later", NUMBER, &1).await.unwrap();
        // Others, the one it has written to, and one of the very id that it starts.
        let mut handles = Vec::new();
        for n in 0..50 {
            handles.push(host.spawn(ADD, format!("other {n}"), &n).await.unwrap());
            handles[n as usize].raise(NUMBER, &1).await.unwrap();
        }
        for (n, handle) in handles.iter().enumerate() {
            assert_eq!(handle.output().await.unwrap(), n as i64 + 1);
        }
        waiting.raise(NUMBER, &1).await.unwrap();
        assert_eq!(waiting.output().await.unwrap(), 2);
        assert!(host.get("later").status().await.is_err());
        let same = host.spawn(ADD, "later", &1).await.unwrap();
        until("it waits", async || same.status().await.unwrap().waiting_for.is_some()).await;
        open.execute("COMMIT").await.unwrap();
        // The start found the same process there; the message is one to it.
        assert_eq!(same.output().await.unwrap(), 2);
    }

    pub(super) async fn what_comes_too_late_is_dropped() {
        const OTHER: Definition<i64, i64> = Definition::new("other");
        let backend = bank().await;
        let host = adding(&backend).await;
        let ended = host.spawn(ADD, "ended", &1).await.unwrap();
        let mut open = backend.connect().await;
        open.execute("BEGIN").await.unwrap();
        host.spawn_in(&mut open, OTHER, "taken", &1).await.unwrap();
        host.raise_in(&mut open, "ended", NUMBER, &7).await.unwrap();
        host.spawn_in(&mut open, ADD, "fine", &1).await.unwrap();
        host.raise_in(&mut open, "fine", NUMBER, &2).await.unwrap();
        host.spawn(ADD, "taken", &1).await.unwrap();
        ended.raise(NUMBER, &1).await.unwrap();
        ended.output().await.unwrap();
        open.execute("COMMIT").await.unwrap();
        assert_eq!(host.get("fine").of(ADD).output().await.unwrap(), 3);
        until("nothing is left", async || backend.number("SELECT count(*) FROM inbox").await == 0).await;
        assert_eq!(backend.number("SELECT count(*) FROM events").await, 2);
        assert_eq!(&*host.get("taken").status().await.unwrap().kind, "add");
    }

    pub(super) async fn two_that_put_in_the_same() {
        let backend = bank().await;
        let host = adding(&backend).await;
        let (mut one, mut two) = (backend.connect().await, backend.connect().await);
        for connection in [&mut one, &mut two] {
            connection.execute("BEGIN").await.unwrap();
            host.spawn_in(&mut *connection, ADD, "same", &1).await.unwrap();
            host.raise_in(&mut *connection, "same", NUMBER, &5).id("once").await.unwrap();
        }
        one.execute("COMMIT").await.unwrap();
        two.execute("COMMIT").await.unwrap();
        assert_eq!(host.get("same").of(ADD).output().await.unwrap(), 6);
        until("both are moved on", async || backend.number("SELECT count(*) FROM inbox").await == 0).await;
        assert_eq!(backend.number("SELECT count(*) FROM processes").await, 1);
        assert_eq!(backend.number("SELECT count(*) FROM events").await, 1);
    }

    pub(super) async fn a_flood_of_starts_holds_up_nobody() {
        let backend = std::sync::Arc::new(bank().await);
        let host = adding(&backend).await;
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let floods: Vec<_> = (0..4)
            .map(|flood| {
                let (backend, host, over) = (backend.clone(), host.clone(), over.clone());
                tokio::spawn(async move {
                    let mut open = backend.connect().await;
                    let mut starts = 0;
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        let id = format!("flood {flood} {starts}");
                        open.execute("BEGIN").await.unwrap();
                        host.spawn_in(&mut open, ADD, id, &1).await.unwrap();
                        open.execute("COMMIT").await.unwrap();
                        starts += 1;
                    }
                    starts
                })
            })
            .collect();
        for n in 0..30 {
            let handle = host.spawn(ADD, format!("other {n}"), &n).await.unwrap();
            handle.raise(NUMBER, &1).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), n + 1);
            assert!(host.get(format!("nobody {n}")).status().await.is_err());
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        for flood in floods {
            assert!(flood.await.unwrap() > 0);
        }
    }
}
