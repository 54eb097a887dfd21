//! What stands in the tables is not taken on trust: cells of any form make no call panic, none write half of what it
//! should, and are told with table and row.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Filter, InstanceId, Op, Outcome, Poll, RecordKey, RunId, Scope, Storage, StorageError};
use durable_core::{Definition, Event, Failure, Process, Retry, Status};
use durable_simulation::seed::Seed;
use durable_tests::{PostgresSchema, Sql, SqliteFile, long, ops, quick, until};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection};
use std::future::IntoFuture;
use std::time::Duration;

macro_rules! on_both {
    ($($case:ident),* $(,)?) => {
        $(mod $case {
            #[test]
            fn sqlite() {
                durable_tests::run(super::$case::<durable_tests::SqliteFile>());
            }
            #[test]
            fn postgres() {
                durable_tests::PostgresSchema::run(super::$case::<durable_tests::PostgresSchema>());
            }
        })*
    };
}

on_both!(cells_of_any_form, records_of_any_form);

/// A database whose cells can be set to anything that it takes.
trait Spoilt: Sql {
    /// What stands in front of the tables' names.
    const PREFIX: &'static str;
    /// A cell as text, in SQL.
    const SHOWN: &'static str;
    /// Columns, and what to put into each, as SQL.
    fn values(&self, table: &str) -> impl Future<Output = Vec<(String, &'static [&'static str])>> + Send;
    /// Runs a statement, if the database takes it.
    fn attempt(&self, sql: &str) -> impl Future<Output = ()> + Send;
}

const TABLES: [(&str, &str); 6] = [
    ("processes", "run"),
    ("steps", "run"),
    ("events", "run"),
    ("waiters", "target"),
    ("instances", "instance"),
    ("fences", "instance"),
];

impl Spoilt for SqliteFile {
    const PREFIX: &'static str = "durable_";
    const SHOWN: &'static str = "quote(\"{}\")";
    async fn values(&self, table: &str) -> Vec<(String, &'static [&'static str])> {
        const ANY: &[&str] = &[
            "NULL",
            "-1",
            "7",
            "9223372036854775807",
            "-9223372036854775808",
            "1e300",
            "-0.5",
            "''",
            "'odd'",
            "'{'",
            "x'00ff'",
            "'9999-12-31T23:59:59.999Z'",
            "'-0001-01-01T00:00:00Z'",
            "'2026-02-30T25:61:61Z'",
            "'[1e999]'",
            "char(0)",
            "hex(zeroblob(2000))",
            "'01a20e52-f4a7-7247-881e-643aa1a05766'",
            "'completed'",
            "'waiting'",
        ];
        let columns = self.texts(&format!("SELECT name FROM pragma_table_info('durable_{table}')")).await;
        columns.into_iter().map(|column| (column, ANY)).collect()
    }
    async fn attempt(&self, sql: &str) {
        let mut connection = self.connection().await;
        let _ = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await;
        connection.close().await.unwrap();
    }
}

impl Spoilt for PostgresSchema {
    const PREFIX: &'static str = "";
    const SHOWN: &'static str = "coalesce(CAST(\"{}\" AS text), '∅')";
    async fn values(&self, table: &str) -> Vec<(String, &'static [&'static str])> {
        let columns = format!(
            "SELECT column_name || ' ' || data_type FROM information_schema.columns
             WHERE table_schema = '{}' AND table_name = '{table}'",
            self.name()
        );
        let values = |kind: &str| -> &'static [&'static str] {
            match kind {
                "uuid" => &["NULL", "gen_random_uuid()", "'00000000-0000-0000-0000-000000000000'"],
                "bigint" => &["NULL", "-1", "7", "9223372036854775807", "-9223372036854775808"],
                "integer" => &["NULL", "-1", "7", "2147483647", "-2147483648"],
                "smallint" => &["NULL", "-1", "7", "32767"],
                "boolean" => &["NULL", "true", "false"],
                "json" => &["NULL", "'[1e999]'", "'\"\\u0000\"'", "'123456789012345678901234567890'", "' {} '"],
                "timestamp with time zone" => {
                    &["NULL", "'infinity'", "'-infinity'", "'4713-01-01 BC'", "'294276-12-31'", "'9999-12-31 23:59:59'"]
                }
                "ARRAY" => &["NULL", "'{}'", "'{NULL}'", "'{{a},{b}}'"],
                _ => &["NULL", "''", "'odd'", "E'\\n'", "repeat('x', 5000)", "'completed'", "'waiting'"],
            }
        };
        let columns = self.texts(&columns).await;
        let split =
            |column: String| column.split_once(' ').map(|(name, kind)| (name.to_owned(), values(kind))).unwrap();
        columns.into_iter().map(split).collect()
    }
    async fn attempt(&self, sql: &str) {
        let mut connection = self.connect().await;
        let _ = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await;
        connection.close().await.unwrap();
    }
}

/// All rows, as text.
async fn everything<B: Spoilt>(backend: &B, columns: &[Vec<String>]) -> Vec<String> {
    let rows = TABLES.iter().zip(columns).map(|((table, _), columns)| {
        let cells = columns.iter().map(|column| B::SHOWN.replace("{}", column));
        let cells = cells.collect::<Vec<_>>().join(" || ' ' || ");
        format!("SELECT {cells} FROM {}{table}", B::PREFIX)
    });
    backend.texts(&format!("{} ORDER BY 1", rows.collect::<Vec<_>>().join(" UNION ALL "))).await
}

/// What cannot be read is told with its table.
fn named<B: Spoilt>(what: &str, why: &str) {
    let table = |(table, _): &(&str, &str)| why.contains(&format!("{}{table}, ", B::PREFIX));
    // A row whose own key is something else has no other name.
    assert!(TABLES.iter().any(table) || why.starts_with("run holds"), "{what}: {why}");
}

fn read<B: Spoilt, T>(what: &str, result: durable_core::storage::Result<T>) -> Option<T> {
    match result {
        Ok(read) => Some(read),
        Err(StorageError::Schema(why)) => {
            named::<B>(what, &why);
            None
        }
        Err(other) => panic!("{what}: {other:?}"),
    }
}

async fn cells_of_any_form<B: Spoilt>() {
    let rounds: u64 = if long() { 300 } else { 30 };
    let mut backend = B::new().await;
    let mut storage = backend.storage().await;
    let mut columns = Vec::new();
    for (table, _) in TABLES {
        columns.push(backend.values(table).await);
    }
    let named_columns = |columns: &Vec<(String, _)>| columns.iter().map(|(name, _)| name.clone()).collect();
    let names: Vec<Vec<String>> = columns.iter().map(named_columns).collect();
    for round in 0..rounds {
        if round % 20 == 19 {
            backend = B::new().await;
            storage = backend.storage().await;
        }
        let mut seed = Seed::new(round);
        let (me, _heart) = ops::enlist(&storage).await;
        let id = |name: &str| format!("{name} {round}");
        let mut runs = Vec::new();
        for name in ["owned", "parked", "ended", "waiter"] {
            runs.push(ops::start(&storage, me, &id(name)).await);
        }
        let [owned, parked, ended, waiter] = runs[..] else { panic!() };
        let wait = Op::Await { run: waiter, id: id("owned").into(), target: None };
        ops::commit(&storage, me, vec![ops::raise(&id("owned"), "m"), ops::record(owned, "r"), wait]).await;
        ops::commit(&storage, me, vec![ops::record(ended, "r"), ops::park(parked, 0), ops::finish(ended)]).await;

        for _ in 0..seed.between(1, 3) {
            let nth = seed.below(TABLES.len() as u64) as usize;
            let (table, key) = TABLES[nth];
            let (column, values) = seed.one(&columns[nth]).clone();
            let (table, value, row) = (format!("{}{table}", B::PREFIX), *seed.one(values), seed.below(6));
            let one = format!("(SELECT {key} FROM {table} ORDER BY {key} DESC LIMIT 1 OFFSET {row})");
            let sql = format!("UPDATE {table} SET \"{column}\" = {value} WHERE {key} = {one}");
            println!("round {round}: {sql}");
            backend.attempt(&sql).await;
        }
        if round % 5 == 0 {
            // The next message's number is taken: the database refuses it in the middle of its batch.
            backend.attempt(&format!("UPDATE {}processes SET signals = 0", B::PREFIX)).await;
        }

        look::<B>(&storage, me, &runs, &id("owned")).await;
        let child = ops::spawn_op(&id("child"), false);
        let batches = [
            vec![ops::spawn(&id("new"), true).0, ops::raise(&id("owned"), "n")],
            vec![ops::spawn(&id("owned"), true).0, ops::raise(&id("parked"), "n")],
            vec![ops::raise(&id("ended"), "n"), ops::record(owned, "s")],
            vec![Op::Await { run: owned, id: id("ended").into(), target: None }, ops::started(owned, "child", child)],
            vec![ops::record(owned, "r"), Op::AcceptCancel { run: owned, claim: 1 }],
            vec![Op::Cancel { id: id("waiter").into() }],
            vec![ops::park(owned, 1), Op::Claim { kind: ops::KIND.into(), limit: 3 }],
            vec![Op::Resume { id: id("ended").into(), forget: Vec::new() }],
            vec![ops::finish(owned), ops::park(waiter, 0)],
            vec![Op::Delete { id: id("ended").into() }],
        ];
        for batch in batches {
            let before = everything(&backend, &names).await;
            match storage.commit(&ops::batch(me, 0, batch.clone())).await {
                Ok(outcomes) => {
                    for outcome in &outcomes {
                        if let Outcome::Unreadable(why) = outcome {
                            named::<B>("an outcome", why);
                        }
                    }
                }
                // It is told after the commit.
                Err(StorageError::Unknown(_)) => {}
                Err(error) => {
                    assert_eq!(everything(&backend, &names).await, before, "{batch:?} failed, by half: {error}");
                }
            }
        }
        look::<B>(&storage, me, &runs, &id("owned")).await;
    }
}

/// Every look at it.
async fn look<B: Spoilt>(storage: &B::Storage, me: InstanceId, runs: &[RunId], id: &str) {
    let poll =
        Poll { instance: me, namespace: "default".into(), kinds: vec![ops::KIND.into()], watched: runs.to_vec() };
    let _ = storage.poll(&poll).await;
    let _ = storage.owned(me, None, 100).await;
    let _ = storage.peers("default", me).await;
    let all = Filter { limit: 100, ..Filter::default() };
    let _ = storage.list("default", &all).await;
    let _ = storage.count("default", &all).await;
    read::<B, _>("find", storage.find("default", id, None).await);
    for run in runs {
        let key = RecordKey { scope: Scope::Process, name: "r".into(), key: "".into() };
        read::<B, _>("record", storage.record(*run, &key).await);
        for loaded in read::<B, _>("load", storage.load(&[*run], true).await).into_iter().flatten() {
            if let Err(why) = loaded.state {
                named::<B>("load", &why);
            }
        }
    }
}

const MANY: Definition<(), u32> = Definition::new("many");
const CHILD: Definition<(), u32> = Definition::new("child");
const GO: Event<u32> = Event::new("Go");
const NEVER: Event<u32> = Event::new("Never");
const HOUR: Duration = Duration::from_secs(3600);

/// Leaves a record of each form, and then waits, with those that are pending.
async fn leaves_many(proc: Process, (): ()) -> Result<u32, Failure> {
    let child = format!("child of {}", proc.id());
    proc.step("step", || async { Ok::<_, Failure>(1_u32) }).await?;
    let _ = proc.step("failed step", || async { Err::<u32, _>(Failure::new("no")) }).await;
    proc.get("value", || 2_u32).await?;
    proc.delay("delay", Duration::ZERO).await?;
    let _ = proc.event(NEVER).timeout(Duration::ZERO).await;
    proc.race("race").on(proc.delay("soon", Duration::ZERO), |_| 1).on(proc.event(NEVER), |n| n).await?;
    proc.spawn(CHILD, child.clone(), &()).await?;
    proc.raise(child.clone(), NEVER, &7).await?;
    let fails = || async { Err::<u32, _>(Failure::new("later")) };
    let _ = tokio::join!(
        proc.step("retried", fails).retry(Retry::fixed(HOUR)).into_future(),
        proc.delay("long", HOUR).into_future(),
        proc.event(GO).timeout(HOUR).into_future(),
        proc.race("open").on(proc.delay("later", HOUR), |_| 1).on(proc.event(NEVER), |n| n).into_future(),
        proc.output(CHILD, child).into_future(),
    );
    Ok(0)
}

async fn child(proc: Process, (): ()) -> Result<u32, Failure> {
    Ok(proc.event(GO).await?)
}

/// What a record could hold instead: something else altogether, and each of its parts something else.
fn instead(payload: &str) -> Vec<String> {
    let other = [
        "null",
        "{}",
        "[]",
        "true",
        "-1",
        "1e308",
        "18446744073709551615",
        "\"odd\"",
        "\"9999-12-31T23:59:59.999Z\"",
        "\"+262142-12-31T23:59:59Z\"",
        "\"-262143-01-01T00:00:00Z\"",
    ];
    let other = other.map(|text| serde_json::from_str::<Value>(text).unwrap());
    let mut all: Vec<Value> = other.to_vec();
    if let Ok(Value::Object(object)) = serde_json::from_str(payload) {
        for name in object.keys() {
            let with = |value: &Value| {
                let mut object = object.clone();
                object.insert(name.clone(), value.clone());
                Value::Object(object)
            };
            all.extend(other.iter().map(with));
        }
    }
    all.iter().map(Value::to_string).collect()
}

/// A process whose record is of another form goes on or becomes stuck, with the reason; its neighbours go on.
async fn records_of_any_form<B: Spoilt>() {
    let backend = B::new().await;
    let hosts = async || {
        let host = quick(&backend).await.register(MANY, leaves_many).register(CHILD, child);
        host.start().await.unwrap()
    };
    let host = hosts().await;
    let first = host.spawn(MANY, "first", &()).await.unwrap();
    let parked =
        async |handle: &durable_core::Handle<u32, Failure>| handle.status().await.unwrap().status == Status::Waiting;
    until("it is parked", async || parked(&first).await).await;
    let steps = B::STEPS;
    let run = first.run().unwrap().to_string();
    let records = format!(
        "SELECT name || '|' || key || '|' || payload FROM {steps} WHERE CAST(run AS text) = '{run}' ORDER BY 1"
    );
    let records = backend.texts(&records).await;
    assert!(records.len() >= 12, "{records:?}");
    let mut changes = vec![("retried".to_owned(), "attempts = 2147483647".to_owned())];
    changes.push(("retried".to_owned(), "attempts = -2147483648".to_owned()));
    for record in &records {
        let [name, _, payload] = record.splitn(3, '|').collect::<Vec<_>>()[..] else { panic!("{record}") };
        changes.extend(instead(payload).into_iter().map(|payload| (name.to_owned(), format!("payload = '{payload}'"))));
    }
    let mut spoilt = Vec::new();
    for nth in 0..changes.len() {
        spoilt.push(host.spawn(MANY, format!("p {nth}"), &()).await.unwrap());
    }
    for handle in &spoilt {
        until("it is parked", async || parked(handle).await).await;
    }
    let sql: Vec<String> = changes
        .iter()
        .zip(&spoilt)
        .map(|((name, set), handle)| {
            let run = handle.run().unwrap();
            format!("UPDATE {steps} SET {set} WHERE CAST(run AS text) = '{run}' AND name = '{name}'")
        })
        .collect();
    backend.execute(&sql.join("; ")).await;
    for handle in spoilt.iter().chain([&first]) {
        handle.raise(GO, &1).await.unwrap();
    }
    for ((name, set), handle) in changes.iter().zip(&spoilt) {
        until("it has been looked at", async || {
            let info = handle.status().await.unwrap();
            info.status != Status::Running && info.execution > 1
        })
        .await;
        let info = handle.status().await.unwrap();
        let reason = info.reason.unwrap_or_default();
        assert!(!reason.contains("panicked"), "{name} with {set}: {reason}");
        assert!(info.status != Status::Stuck || reason.contains(name.as_str()), "{name} with {set}: {reason}");
    }
    until("it is parked again", async || parked(&first).await).await;
}
