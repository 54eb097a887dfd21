//! The rights that the documentation grants are enough for the whole life of processes and of instances.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::Storage;
use durable_core::*;
use durable_tests::rights::{Role, documented};
use durable_tests::*;
use std::future::IntoFuture;
use std::time::Duration;

const GO: Event<u32> = Event::new("Go");
const PARENT: Definition<u32, u32> = Definition::new("parent");
const CHILD: Definition<u32, u32> = Definition::new("child");
const BROKEN: Definition<u32, u32> = Definition::new("broken");

/// What is each database's own: transactions of the service's.
trait Rightful: Sql {
    fn transact(proc: &Process) -> impl Future<Output = Result<u32, Failure>> + Send;
    fn start_in(connection: &mut Self::Connection, host: &Host, id: &str) -> impl Future<Output = ()> + Send;
}

impl Rightful for PostgresSchema {
    async fn transact(proc: &Process) -> Result<u32, Failure> {
        use durable_postgres::Transactions;
        let select = async |mut tx: durable_postgres::Tx| sqlx::query_scalar("SELECT 7").fetch_one(&mut *tx).await;
        let seven: i32 = proc.transaction("transaction", select).await?;
        Ok(seven as u32)
    }
    async fn start_in(connection: &mut Self::Connection, host: &Host, id: &str) {
        use durable_postgres::Outbox;
        let mut tx = sqlx::Connection::begin(connection).await.unwrap();
        host.spawn_in(&mut *tx, CHILD, id, &1).await.unwrap();
        host.raise_in(&mut *tx, id, GO, &1).await.unwrap();
        tx.commit().await.unwrap();
    }
}

impl Rightful for MssqlSchema {
    async fn transact(proc: &Process) -> Result<u32, Failure> {
        use durable_mssql::Transactions;
        Ok(proc.transaction("transaction", async |_| Ok::<_, Failure>(7)).await?)
    }
    async fn start_in(connection: &mut Self::Connection, host: &Host, id: &str) {
        use durable_mssql::Outbox;
        connection.simple_query("BEGIN TRANSACTION").await.unwrap().into_results().await.unwrap();
        host.spawn_in(connection, CHILD, id, &1).await.unwrap();
        host.raise_in(connection, id, GO, &1).await.unwrap();
        connection.simple_query("COMMIT").await.unwrap().into_results().await.unwrap();
    }
}

async fn parent<B: Rightful>(proc: Process, input: u32) -> Result<u32, Failure> {
    let mut failed = false;
    let step = || {
        let first = !std::mem::replace(&mut failed, true);
        async move { if first { Err(Failure::new("once")) } else { Ok(input) } }
    };
    let mut sum = proc.step("step", step).retry(Retry::fixed(Duration::ZERO)).await?;
    sum += proc.get("get", || 1).await?;
    proc.set("set", sum).await?;
    proc.delay("delay", Duration::from_millis(100)).await?;
    sum += B::transact(&proc).await?;
    proc.spawn(CHILD, "child", &1).await?;
    proc.raise("child", GO, &1).await?;
    sum += proc.output(CHILD, "child").await?;
    let first = proc.race("race").on(proc.event(GO), |n| n).on(proc.delay("late", Duration::MAX), |_| 0).await?;
    Ok(sum + first + proc.event(GO).await?)
}

async fn child(proc: Process, input: u32) -> Result<u32, Failure> {
    Ok(input + proc.event(GO).await?)
}

async fn broken(proc: Process, input: u32) -> Result<u32, Failure> {
    let first = proc.step("first", || async { Ok::<_, Failure>(proc.execution() as u32) }).await?;
    assert!(first > 1 || input > 1, "broken");
    Ok(first)
}

async fn start<B: Rightful>(storage: impl Storage) -> Host {
    let builder = Host::builder(storage).heartbeat(Duration::from_millis(500), Duration::from_secs(4));
    let builder = builder.quiet_time(Duration::from_millis(50)).poll(Duration::from_millis(200));
    builder.register(PARENT, parent::<B>).register(CHILD, child).register(BROKEN, broken).start().await.unwrap()
}

/// Everything that a service does, over storages of a role that may do no more.
async fn whole_life<B: Rightful>(storages: [B::Storage; 2], connection: &mut B::Connection) {
    let [one, other] = storages;
    let dies = start::<B>(one).await;
    let handle = dies.spawn(PARENT, "parent", &1).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some_and(|what| what.contains("Go")))
        .await;
    // A death, and a take-over.
    let host = start::<B>(other).await;
    drop(dies);
    let handle = host.get("parent").of(PARENT);
    for _ in 0..2 {
        handle.raise(GO, &1).await.unwrap();
    }
    assert_eq!(handle.output().await.unwrap(), 1 + 1 + 7 + 2 + 2);
    assert_eq!(handle.value::<u32>("set").await.unwrap(), Some(2));
    // A cancellation; a start in a transaction, with its message.
    host.spawn(CHILD, "cancelled", &1).await.unwrap().cancel().await.unwrap();
    until_status(&host.get("cancelled"), Status::Cancelled).await;
    B::start_in(connection, &host, "started").await;
    assert_eq!(host.get("started").of(CHILD).output().await.unwrap(), 2);
    host.spawn(CHILD, "started", &3).restart_finished().await.unwrap();
    // Stuck, resumed without a record; which leaves a row of its own.
    let stuck = host.spawn(BROKEN, "broken", &1).await.unwrap();
    until_status(&stuck, Status::Stuck).await;
    stuck.resume().forget("first").await.unwrap();
    assert_eq!(stuck.output().await.unwrap(), 2);
    let found = host.processes().list(100).await.unwrap();
    let counted: u64 = host.processes().count().await.unwrap().iter().map(|counted| counted.count).sum();
    // One of them has two runs.
    assert_eq!((found.len(), counted), (6, 6));
    host.get("started").cancel().await.unwrap();
    until_status(&host.get("started"), Status::Cancelled).await;
    for id in ["parent", "child", "cancelled", "started", "broken"] {
        host.get(id).delete().await.unwrap();
    }
    assert_eq!(host.processes().list(100).await.unwrap(), []);
    host.shutdown(Duration::from_secs(10)).await;
}

#[test]
fn of_postgres() {
    PostgresSchema::run(async {
        let schema = PostgresSchema::new().await;
        drop(schema.storage().await);
        let role = Role::new(&schema).await;
        role.grant().await;
        let connect = || Postgres::connect(role.url()).schema(schema.name()).verify_only().into_future();
        let storages = [connect().await.unwrap(), connect().await.unwrap()];
        let options: sqlx::postgres::PgConnectOptions = role.url().parse().unwrap();
        let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
        whole_life::<PostgresSchema>(storages, &mut connection).await;
        role.drop().await;
    });
}

#[test]
fn of_mssql() {
    MssqlSchema::run(async {
        let (schema, user) = (MssqlSchema::new().await, MssqlSchema::new().await);
        drop(schema.storage().await);
        for grant in documented(include_str!("../../durable-mssql/src/lib.rs"), schema.name(), user.name()) {
            schema.execute(&grant).await;
        }
        let connect = || Mssql::connect(user.address()).schema(schema.name()).verify_only().into_future();
        let storages = [connect().await.unwrap(), connect().await.unwrap()];
        whole_life::<MssqlSchema>(storages, &mut user.connect().await).await;
    });
}
