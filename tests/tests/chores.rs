//! What is too much for one transaction is done a part at a time, while other processes go on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{InstanceId, Op, RunId, Storage};
use durable_core::*;
use durable_postgres::Postgres;
use durable_tests::ops::{batch, commit, enlist, finish, in_background, record, spawn, start};
use durable_tests::*;
use sqlx::Executor;
use std::time::Duration;

const WAIT: Definition<(), u32> = Definition::new("wait");
const WORK: Definition<u32, u32> = Definition::new("work");
const ASK: Definition<String, u32> = Definition::new("ask");
const GO: Event<u32> = Event::new("Go");
/// Far more than an end wakes itself.
const MANY: usize = 20_000;

on_each_database!(the_end_of_what_very_many_await, the_deletion_of_what_has_very_many_rows);

async fn host(storage: impl Storage) -> Host {
    // Those that the tests enlist do not beat.
    const HOUR: Duration = Duration::from_secs(3600);
    let builder = Host::builder(storage).quiet_time(Duration::from_millis(20)).heartbeat(HOUR, HOUR * 3);
    let builder = builder.register(WAIT, async |proc: Process, ()| proc.event(GO).await.map_err(Failure::from));
    let builder = builder.register(WORK, async |proc: Process, rounds: u32| {
        for n in 0..rounds {
            proc.step(("work", n), async || Ok::<_, Failure>(n)).await?;
        }
        Failure::ok(rounds)
    });
    let asking = async |proc: Process, of: String| proc.output(WAIT, of).await.map_err(Failure::from);
    builder.register(ASK, asking).start().await.unwrap()
}

async fn neighbour(host: &Host, id: &str) {
    assert_eq!(host.spawn(WORK, id, &3).await.unwrap().output().await.unwrap(), 3);
}

/// Processes of a kind that no instance runs, all of which await the run.
async fn crowd(storage: &impl Storage, me: InstanceId, target: RunId) {
    for part in 0..MANY / 500 {
        let starts = (0..500).map(|n| spawn(&format!("crowd-{part}-{n}"), false));
        let (starts, runs): (Vec<Op>, Vec<RunId>) = starts.unzip();
        commit(storage, me, starts).await;
        let awaits = |run| Op::Await { run, id: "target".into(), target: Some(target) };
        commit(storage, me, runs.into_iter().map(awaits).collect()).await;
    }
}

async fn told<B: Sql>(backend: &B) -> i64 {
    let told = format!("SELECT count(*) FROM {} WHERE id LIKE 'crowd-%' AND signals = 1", B::PROCESSES);
    backend.number(&told).await
}

async fn the_end_of_what_very_many_await<B: Sql>() {
    let backend = B::new().await;
    let storage = backend.storage().await;
    let (me, _heart) = enlist(&storage).await;
    let host = host(backend.storage().await).await;
    let target = host.spawn(WAIT, "target", &()).await.unwrap();
    crowd(&storage, me, target.run().unwrap()).await;
    let asks = host.spawn(ASK, "asks", &"target".to_owned()).await.unwrap();
    until_status(&asks, Status::Waiting).await;
    target.raise(GO, &7).await.unwrap();
    neighbour(&host, "neighbour").await;
    assert_eq!(asks.output().await.unwrap(), 7);
    until("all are woken", async || told(&backend).await == MANY as i64).await;
    until("nothing is left to do", async || left(&backend, "chores").await == 0).await;
}

/// How many rows a table has.
async fn left<B: Sql>(backend: &B, table: &str) -> i64 {
    backend.number(&format!("SELECT count(*) FROM {}", B::STEPS.replace("steps", table))).await
}

/// A process that has ended, with as many records as messages.
async fn big(storage: &impl Storage, me: InstanceId) -> RunId {
    let run = start(storage, me, "big").await;
    for part in 0..MANY / 1000 {
        let names = (0..1000).map(|n| format!("{part}-{n}"));
        commit(storage, me, names.clone().map(|name| record(run, &name)).collect()).await;
        commit(storage, me, names.map(|name| ops::raise("big", &name)).collect()).await;
    }
    commit(storage, me, vec![finish(run)]).await;
    run
}

async fn the_deletion_of_what_has_very_many_rows<B: Sql>() {
    let backend = B::new().await;
    let storage = backend.storage().await;
    let (me, _heart) = enlist(&storage).await;
    big(&storage, me).await;
    let host = host(backend.storage().await).await;
    host.get("big").delete().await.unwrap();
    assert!(matches!(host.get("big").status().await, Err(HandleError::NotFound { .. })));
    neighbour(&host, "neighbour").await;
    // Another process may have the id at once.
    neighbour(&host, "big").await;
    until("its messages are gone", async || left(&backend, "events").await == 0).await;
    until("its records are gone", async || left(&backend, "steps").await == 6).await;
    until("nothing is left to do", async || left(&backend, "chores").await == 0).await;
}

/// With a real server, whose bounds are short, and sessions that hold what is to be changed.
mod postgres {
    use super::*;

    async fn bounded(schema: &PostgresSchema) -> Postgres {
        let bound = Duration::from_millis(300);
        Postgres::connect(schema.url()).schema(schema.name()).timeouts(bound, bound).await.unwrap()
    }

    #[test]
    fn waiters_that_are_held() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let storage = schema.storage().await;
            let (me, _heart) = enlist(&storage).await;
            let host = host(bounded(&schema).await).await;
            let target = host.spawn(WAIT, "target", &()).await.unwrap();
            crowd(&storage, me, target.run().unwrap()).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.processes WHERE id = 'crowd-0-0' FOR UPDATE")).await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.waiters WHERE waiter = (SELECT run FROM {s}.processes WHERE id = 'crowd-1-1') FOR UPDATE")).await.unwrap();
            target.raise(GO, &7).await.unwrap();
            neighbour(&host, "neighbour").await;
            assert_eq!(target.output().await.unwrap(), 7);
            until("the others are woken", async || told(&schema).await == MANY as i64 - 2).await;
            assert_eq!(left(&schema, "chores").await, 1);
            psql.execute("ROLLBACK").await.unwrap();
            until("all are woken", async || told(&schema).await == MANY as i64).await;
            until("nothing is left to do", async || left(&schema, "chores").await == 0).await;
        });
    }

    /// The process goes at once; of its rows those that are free, the others later.
    #[test]
    fn rows_that_are_held() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let storage = schema.storage().await;
            let (me, _heart) = enlist(&storage).await;
            big(&storage, me).await;
            let host = host(bounded(&schema).await).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.steps WHERE name = '3-3' FOR UPDATE")).await.unwrap();
            host.get("big").delete().await.unwrap();
            neighbour(&host, "neighbour").await;
            until("its messages are gone", async || left(&schema, "events").await == 0).await;
            until("its records are gone", async || left(&schema, "steps").await == 4).await;
            assert_eq!(left(&schema, "chores").await, 1);
            psql.execute("ROLLBACK").await.unwrap();
            until("nothing is left to do", async || left(&schema, "chores").await == 0).await;
            assert_eq!(left(&schema, "steps").await, 3);
        });
    }

    /// A part of the chore is under way when the failed process is resumed: those that it has woken count as not woken.
    #[test]
    fn resumed_while_a_part_is_done() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let storage = schema.storage().await;
            let (me, _heart) = enlist(&storage).await;
            let target = start(&storage, me, "target").await;
            crowd(&storage, me, target).await;
            let Op::Finish(end) = finish(target) else { panic!() };
            commit(&storage, me, vec![Op::Finish(storage::Finish { status: Status::Failed, ..end })]).await;
            let mut psql = schema.connect().await;
            psql.execute("BEGIN").await.unwrap();
            psql.execute(schema.sql("SELECT 1 FROM {s}.chores FOR UPDATE")).await.unwrap();
            psql.execute(schema.sql("UPDATE {s}.waiters SET told = true")).await.unwrap();
            let resumed = in_background(&storage, batch(me, 0, vec![Op::resume("target".into(), vec![])]));
            let waits =
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{s}%chores%'";
            until("it waits", async || schema.number(&waits.replace("{s}", schema.name())).await == 1).await;
            psql.execute("COMMIT").await.unwrap();
            resumed.await.unwrap().unwrap();
            assert_eq!(schema.number("SELECT count(*) FROM {s}.waiters WHERE told").await, 0);
            assert_eq!(left(&schema, "chores").await, 0);
        });
    }

    /// A chore that cannot be done is logged and put off; others are done meanwhile.
    #[test]
    fn a_chore_that_fails() {
        PostgresSchema::run(async {
            let schema = PostgresSchema::new().await;
            let storage = schema.storage().await;
            let (me, _heart) = enlist(&storage).await;
            for id in ["bad", "good"] {
                let run = start(&storage, me, id).await;
                commit(&storage, me, vec![record(run, id)]).await;
                commit(&storage, me, vec![finish(run)]).await;
            }
            let fails = "CREATE FUNCTION {s}.fails() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'it may not go'; END $$;
                CREATE TRIGGER fails BEFORE DELETE ON {s}.steps FOR EACH ROW WHEN (OLD.name = 'bad')
                EXECUTE FUNCTION {s}.fails()";
            schema.execute(fails).await;
            let host = host(bounded(&schema).await).await;
            for id in ["bad", "good"] {
                host.get(id).delete().await.unwrap();
            }
            until("the other is done", async || left(&schema, "steps").await == 1).await;
            until("an error is logged", async || logged(&["a chore is put off for a minute", "it may not go"])).await;
            neighbour(&host, "neighbour").await;
            schema.execute("DROP TRIGGER fails ON {s}.steps; UPDATE {s}.chores SET due_at = now()").await;
            until("nothing is left to do", async || left(&schema, "chores").await == 0).await;
            assert_eq!(left(&schema, "steps").await, 3);
        });
    }
}
