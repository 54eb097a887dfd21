//! What a batch meets holds up nothing else: what cannot be written waits alone, in its order, and can be seen.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Op, Status};
use durable_core::*;
use durable_mssql::Mssql;
use durable_postgres::{Outbox, Postgres};
use durable_tests::faulty::{Fault, Faulty};
use durable_tests::*;
use sqlx::Executor;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

const SUM: Definition<u32, u32> = Definition::new("sum");
const ADD: Event<u32> = Event::new("Add");
const MANY: u32 = 5;

on_each_backend!(
    what_somebody_holds_waits_alone,
    what_may_not_be_written_waits_alone,
    what_is_never_answered_waits_alone,
    starts_that_wait,
    many_that_wait_go_on_together,
);

fn summing(builder: HostBuilder) -> HostBuilder {
    builder.register(SUM, async |proc: Process, rounds: u32| {
        let mut all = Vec::new();
        for _ in 0..rounds {
            all.push(proc.event(ADD).await?);
        }
        // In the order in which they were sent.
        assert!(all.is_sorted(), "{all:?}");
        proc.step("add", async || Ok::<_, Failure>(all.iter().sum())).await.map_err(Failure::from)
    })
}

/// A host whose batches meet a fault while they touch `a`, and while the flag is set.
async fn faulty<B: Backend>(backend: &B, fault: Fault) -> (Host, Arc<AtomicBool>) {
    let held = Arc::new(AtomicBool::new(true));
    let set = held.clone();
    let touches = |op: &Op| match op {
        Op::Raise(raise) => &*raise.id == "a",
        Op::Spawn(spawn) => &*spawn.id == "late",
        _ => false,
    };
    let storage = Faulty::new(backend.storage().await, move |batch| {
        (set.load(Ordering::SeqCst) && batch.ops.iter().any(touches)).then_some(fault)
    });
    (summing(Host::builder(storage)).start().await.unwrap(), held)
}

/// Messages to `a` wait in their order; `b` goes on; once the flag is cleared so does `a`.
async fn others_go_on<B: Backend>(fault: Fault) {
    let backend = B::new().await;
    let (host, held) = faulty(&backend, fault).await;
    let a = host.spawn(SUM, "a", &MANY).await.unwrap();
    let mut sent = Vec::new();
    for n in 1..=MANY {
        let to = a.clone();
        sent.push(tokio::spawn(async move { to.raise(ADD, &n).await }));
        until("it waits", async || host.health().held_up >= n as usize).await;
        let other = host.spawn(SUM, format!("b-{n}"), &1).await.unwrap();
        other.raise(ADD, &7).await.unwrap();
        assert_eq!(other.output().await.unwrap(), 7);
    }
    assert!(sent.iter().all(|sent| !sent.is_finished()));
    held.store(false, Ordering::SeqCst);
    assert_eq!(a.output().await.unwrap(), (1..=MANY).sum::<u32>());
    for sent in sent {
        sent.await.unwrap().unwrap();
    }
    assert_eq!(host.health().held_up, 0);
}

async fn what_somebody_holds_waits_alone<B: Backend>() {
    others_go_on::<B>(Fault::Blocked).await;
    until("it is told", async || logged(&["a message to a waits alone", "somebody holds the row"])).await;
}

async fn what_may_not_be_written_waits_alone<B: Backend>() {
    others_go_on::<B>(Fault::Schema).await;
}

/// It happens, and is never told: no message is put in twice.
async fn what_is_never_answered_waits_alone<B: Backend>() {
    others_go_on::<B>(Fault::Lost).await;
}

/// A start that is late is taken up like any other.
async fn starts_that_wait<B: Backend>() {
    for fault in [Fault::Blocked, Fault::Lost] {
        let backend = B::new().await;
        let (host, held) = faulty(&backend, fault).await;
        let starter = host.clone();
        let late = tokio::spawn(async move { starter.spawn(SUM, "late", &1).await.unwrap() });
        until("it waits", async || host.health().held_up == 1).await;
        held.store(false, Ordering::SeqCst);
        let late = late.await.unwrap();
        late.raise(ADD, &3).await.unwrap();
        assert_eq!(late.output().await.unwrap(), 3);
    }
}

/// Each was found to be held up; once one is written all are tried together.
async fn many_that_wait_go_on_together<B: Backend>() {
    let backend = B::new().await;
    let (host, held) = faulty(&backend, Fault::Blocked).await;
    let rounds = 300;
    let a = host.spawn(SUM, "a", &rounds).await.unwrap();
    let send = |n: u32| {
        let a = a.clone();
        async move { a.raise(ADD, &n).await.unwrap() }
    };
    let sent = tokio::spawn(futures_util::future::join_all((0..rounds).map(send)));
    until("they wait", async || host.health().held_up == rounds as usize).await;
    let other = host.spawn(SUM, "b", &0).await.unwrap();
    assert_eq!(other.output().await.unwrap(), 0);
    held.store(false, Ordering::SeqCst);
    assert_eq!(a.output().await.unwrap(), (0..rounds).sum::<u32>());
    sent.await.unwrap();
}

/// With real servers.
mod servers {
    use super::*;

    async fn waiting(host: &Host) -> Handle<u32, Failure> {
        let a = host.spawn(SUM, "a", &1).await.unwrap();
        until_status(&a, Status::Waiting).await;
        a
    }

    /// A message to `a` waits, and nothing else does.
    async fn alone(host: &Host, a: &Handle<u32, Failure>, why: &str) -> JoinHandle<()> {
        let to = a.clone();
        let sent = tokio::spawn(async move {
            to.raise(ADD, &3).await.unwrap();
            assert_eq!(to.output().await.unwrap(), 3);
        });
        until("it waits", async || host.health().held_up == 1).await;
        neighbour(host).await;
        until("it is told", async || logged(&["a message to a waits alone", why])).await;
        sent
    }

    async fn host(schema: &PostgresSchema) -> Host {
        let bound = Duration::from_millis(300);
        let storage = Postgres::connect(schema.url()).schema(schema.name()).timeouts(bound, bound);
        summing(Host::builder(storage.await.unwrap())).start().await.unwrap()
    }

    async fn neighbour(host: &Host) {
        let other = host.spawn(SUM, "b", &1).await.unwrap();
        other.raise(ADD, &7).await.unwrap();
        assert_eq!(other.output().await.unwrap(), 7);
    }

    /// `psql`, a report, a script that mends something.
    #[test]
    fn a_row_that_is_locked_by_hand() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let host = host(&schema).await;
            let a = waiting(&host).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.processes WHERE id = 'a' FOR UPDATE")).await.unwrap();
            let sent = alone(&host, &a, "lock timeout").await;
            psql.execute("ROLLBACK").await.unwrap();
            sent.await.unwrap();
        });
    }

    #[test]
    fn a_row_that_is_locked_by_hand_in_sql_server() {
        MssqlSchema::run(async {
            let schema = MssqlSchema::new().await;
            let mssql = Mssql::connect(schema.address()).schema(schema.name());
            let mssql = mssql.timeouts(Duration::from_secs(2), Duration::from_millis(300));
            let host = summing(Host::builder(mssql.await.unwrap())).start().await.unwrap();
            let a = waiting(&host).await;
            let mut sqlcmd = schema.connect().await;
            for sql in ["BEGIN TRANSACTION", "UPDATE processes SET kind = kind WHERE id = 'a'"] {
                sqlcmd.simple_query(sql).await.unwrap().into_results().await.unwrap();
            }
            let sent = alone(&host, &a, "").await;
            sqlcmd.simple_query("ROLLBACK").await.unwrap().into_results().await.unwrap();
            sent.await.unwrap();
        });
    }

    /// A trigger, say, that waits for somebody.
    #[test]
    fn a_statement_that_takes_too_long() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let host = host(&schema).await;
            let a = host.spawn(SUM, "a", &1).await.unwrap();
            until_status(&a, Status::Waiting).await;
            let slow = "CREATE FUNCTION {s}.slow() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
                CREATE TRIGGER slow BEFORE UPDATE ON {s}.processes FOR EACH ROW WHEN (OLD.id = 'a')
                EXECUTE FUNCTION {s}.slow()";
            schema.execute(slow).await;
            let to = a.clone();
            let sent = tokio::spawn(async move { to.raise(ADD, &3).await });
            until("it waits", async || host.health().held_up == 1).await;
            neighbour(&host).await;
            until("it may be dropped", async || {
                let drop = "SET lock_timeout = 10; DROP TRIGGER slow ON {s}.processes";
                sqlx::raw_sql(schema.sql(drop)).execute(&mut schema.connect().await).await.is_ok()
            })
            .await;
            sent.await.unwrap().unwrap();
            assert_eq!(a.output().await.unwrap(), 3);
        });
    }

    /// What nobody writes holds up no end: what was not written is told to whoever asked.
    #[test]
    fn an_end_while_something_waits() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let bound = Duration::from_millis(300);
            let storage = Postgres::connect(schema.url()).schema(schema.name()).timeouts(bound, bound);
            let builder = Host::builder(storage.await.unwrap()).call_timeout(Duration::from_secs(2));
            let host = summing(builder).start().await.unwrap();
            let a = host.spawn(SUM, "a", &1).await.unwrap();
            until_status(&a, Status::Waiting).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.processes WHERE id = 'a' FOR UPDATE")).await.unwrap();
            let sent = tokio::spawn(async move { a.raise(ADD, &3).await });
            until("it waits", async || host.health().held_up == 1).await;
            host.shutdown(Duration::from_secs(1)).await;
            sent.await.unwrap().unwrap_err();
        });
    }

    /// What the service's transactions have sent to it waits; what they have sent to others does not.
    #[test]
    fn the_inbox_of_one_that_is_held() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let host = host(&schema).await;
            let a = host.spawn(SUM, "a", &2).await.unwrap();
            until_status(&a, Status::Waiting).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.processes WHERE id = 'a' FOR UPDATE")).await.unwrap();
            let mut service = schema.connect().await;
            service.execute("BEGIN").await.unwrap();
            host.raise_in(&mut service, "a", ADD, &3).await.unwrap();
            let c = host.spawn_in(&mut service, SUM, "c", &1).await.unwrap();
            host.raise_in(&mut service, "c", ADD, &4).await.unwrap();
            service.execute("COMMIT").await.unwrap();
            neighbour(&host).await;
            assert_eq!(c.output().await.unwrap(), 4);
            // A later message to it comes behind the one that waits.
            let to = a.clone();
            let sent = tokio::spawn(async move { to.raise(ADD, &9).await });
            until("it waits", async || host.health().held_up == 1).await;
            psql.execute("ROLLBACK").await.unwrap();
            sent.await.unwrap().unwrap();
            assert_eq!(a.output().await.unwrap(), 12);
        });
    }

    /// However many callers ask, and however long they wait for their answers.
    #[test]
    fn callers_that_wait_for_their_answers() {
        PostgresSchema::run(async {
            const LONG: Duration = Duration::from_secs(3600);
            let schema = PostgresSchema::new().await;
            let storage = Postgres::connect(schema.url()).schema(schema.name()).timeouts(LONG, LONG);
            let builder = Host::builder(storage.await.unwrap()).heartbeat(LONG, LONG * 3);
            let host = summing(builder).start().await.unwrap();
            let handle = host.spawn(SUM, "a", &1).await.unwrap();
            // Who counts looks at the instances.
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("LOCK TABLE {s}.instances")).await.unwrap();
            let count = |host: Host| async move { host.processes().count().await };
            let counts: Vec<_> = (0..20).map(|_| tokio::spawn(count(host.clone()))).collect();
            let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{s}.instances'::regclass";
            until("they wait", async || schema.number(&waiting.replace("{s}", schema.name())).await > 0).await;
            handle.raise(ADD, &5).await.unwrap();
            until_recorded(&schema, "a").await;
            psql.execute("ROLLBACK").await.unwrap();
            for count in counts {
                assert_eq!(count.await.unwrap().unwrap().len(), 1);
            }
            assert_eq!(handle.output().await.unwrap(), 5);
        });
    }

    async fn until_recorded(schema: &PostgresSchema, id: &str) {
        let ended =
            format!("SELECT count(*) FROM {}.processes WHERE id = '{id}' AND status = 'completed'", schema.name());
        until("it has ended", async || schema.number(&ended).await == 1).await;
    }
}
