//! Services that take all connections there are, of the storage's or of the server's to them: processes wait, none of them sees
//! anything of it, and all go on when there are some again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_postgres::{Connect, Transactions, *};
use durable_tests::crash::scene::{LONG, Scene};
use durable_tests::crash::worker::EXPIRY;
use durable_tests::*;
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};
use std::time::Duration;
use tokio::task::JoinHandle;

const WORKER: &str = env!("CARGO_BIN_EXE_worker");
const SLOW: Definition<u32, u32> = Definition::new("slow");
const QUICK: Definition<u32, u32> = Definition::new("quick");

async fn add(proc: Process, input: u32) -> Result<u32, Failure> {
    Ok(proc.step("add", || async { Ok::<_, Failure>(input + 1) }).await?)
}

/// More transactional steps than may be open, each of which takes its time: they come one after the other, each once, and
/// nobody else waits for them.
#[test]
fn closures_that_take_all_transactions() {
    PostgresSchema::run(async {
        let (many, seconds) = if long() { (100, 0.5) } else { (30, 0.2) };
        let schema = PostgresSchema::new().await;
        let connect: Connect = Postgres::connect(schema.url()).schema(schema.name()).max_transactions(2);
        let sleep = format!("SELECT pg_sleep({seconds})");
        let slow = move |proc: Process, input: u32| {
            let sleep = sleep.clone();
            async move {
                let count = proc.transaction("count", async |mut tx| {
                    tx.execute("INSERT INTO counted VALUES (1)").await?;
                    tx.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(sleep.clone()))).await?;
                    Ok::<_, Failure>(input)
                });
                Ok::<_, Failure>(count.await?)
            }
        };
        let builder = Host::builder(connect.await.unwrap()).register(SLOW, slow).register(QUICK, add);
        let host = builder.start().await.unwrap();
        schema.execute("CREATE TABLE {s}.counted (n bigint)").await;
        let mut handles = Vec::new();
        for n in 0..many {
            handles.push(host.spawn(SLOW, format!("slow-{n}"), &n).await.unwrap());
        }
        for n in 0..100 {
            let handle = host.spawn(QUICK, format!("quick-{n}"), &n).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), n + 1);
        }
        let counted = schema.number("SELECT count(*) FROM {s}.counted").await;
        assert!(counted < i64::from(many), "all transactions were over before anything else had to wait");
        for (n, handle) in (0..).zip(&handles) {
            assert_eq!(handle.output().await.unwrap(), n);
        }
        assert_eq!(schema.number("SELECT count(*) FROM {s}.counted").await, i64::from(many));
    });
}

/// The service takes every connection that its role may have, and those of two hosts are lost, for more than two expiries:
/// from half an expiry on, no attempt begins, and when there are connections again all goes on.
#[test]
fn a_service_that_takes_all_connections() {
    Server::run(async |server| {
        let mut session = PgConnection::connect(server.url()).await.unwrap();
        let role = "CREATE ROLE service LOGIN PASSWORD 'service' CONNECTION LIMIT 30;
            GRANT CREATE ON DATABASE durable TO service";
        session.execute(sqlx::raw_sql(role)).await.unwrap();
        let url = server.url().replace("durable:durable@", "service:service@");
        let (pace, rounds) = if long() { (5000, 3) } else { (400, 1) };
        let scene = Scene::on(PostgresSchema::on(&url), WORKER, 150, Duration::from_millis(pace));
        let mut tasks = Vec::new();
        for number in 1..=2 {
            tasks.push(scene.start_here(scene.backend.storage().await, number));
        }
        for round in 1..=rounds {
            scene.until_begun(round * 150).await;
            let theirs = format!("FROM pg_stat_activity WHERE application_name = '{}'", scene.backend.name());
            let count = format!("SELECT count(*) {theirs}");
            let end = format!("SELECT count(pg_terminate_backend(pid)) {theirs}");
            let mut all = Vec::new();
            // Whatever they let go of is taken at once.
            loop {
                while let Ok(connection) = PgConnection::connect(&url).await {
                    all.push(connection);
                }
                let left = sqlx::query_scalar::<_, i64>(scene.backend.sql(&count)).fetch_one(&mut session);
                if left.await.unwrap() == 0 {
                    break;
                }
                session.execute(scene.backend.sql(&end)).await.unwrap();
            }
            // Until the last acknowledged heartbeat is too old, and what its look has let pass has begun.
            tokio::time::sleep(EXPIRY * 3 / 4).await;
            let begun = scene.begun();
            tokio::time::sleep(EXPIRY * 3 / 2).await;
            assert_eq!(scene.begun(), begun, "attempts begin without a heartbeat; {} connections are taken", all.len());
            assert!(!tasks.iter().any(JoinHandle::is_finished), "they ended before");
            drop(all);
            if round < rounds {
                scene.until_begun(begun + 1).await;
            }
        }
        for task in tasks {
            tokio::time::timeout(LONG, task).await.expect("an instance does not end").unwrap();
        }
        scene.check().await;
    });
}
