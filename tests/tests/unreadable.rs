//! What stands in the tables is not taken on trust: cells of any form make no call panic, none write half of what it
//! should, and are told with table and row.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{
    Filter, InstanceId, Load, Op, Outcome, Poll, RecordKey, RunId, Scope, Storage, StorageError,
};
use durable_core::{Definition, Event, Failure, Process, Retry, Status};
use durable_simulation::seed::Seed;
use durable_tests::{MssqlSchema, PostgresSchema, Sql, SqliteFile, long, on_each_database, ops, quick, until};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection};
use std::future::IntoFuture;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

on_each_database!(cells_of_any_form, records_of_any_form);

/// A database whose cells can be set to anything that it takes.
trait Spoilt: Sql {
    /// What stands in front of the tables' names.
    const PREFIX: &'static str;
    /// A cell as text, in SQL.
    const SHOWN: &'static str;
    /// The same of an id.
    const SHOWN_ID: &'static str = Self::SHOWN;
    /// Puts texts together.
    const AND: &'static str;
    /// The type of a text of any length.
    const TEXT: &'static str;
    /// The one row that many rows behind the first, of those that stand before it.
    const NTH: &'static str;
    /// How many rounds there are in a short test.
    const ROUNDS: u64;
    /// Columns and their types, with a blank between them, of a table.
    fn columns(&self, table: &str) -> String;
    /// What to put into a column of this type, as SQL.
    fn values(kind: &str) -> &'static [&'static str];
    /// The same, drawn: out of a text, as SQL.
    fn cell(kind: &str, text: &str) -> String;
    /// A text in SQL.
    fn text(text: &str) -> String {
        format!("'{text}'")
    }
    /// A run in SQL.
    fn run(run: RunId) -> String {
        format!("'{run}'")
    }
    /// Runs a statement, if the database takes it.
    fn attempt(&self, sql: &str) -> impl Future<Output = ()> + Send;
}

/// A text of any characters that stands in a statement: of those that mean something somewhere, and of others.
fn drawn(seed: &mut Seed) -> String {
    const PARTS: [&str; 34] = [
        "0",
        "1",
        "9",
        "-",
        "+",
        ".",
        "e",
        "E",
        "T",
        "Z",
        ":",
        " ",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "\\",
        ",",
        "null",
        "true",
        "done",
        "pending",
        "running",
        "2026-11-24",
        "12:34:56.789",
        "é",
        "😀",
        "\u{202e}",
        "a",
        "F",
        "''",
        "\t",
        "%",
    ];
    (0..seed.below(24)).map(|_| *seed.one(&PARTS)).collect()
}

/// JSON that has nothing to do with what stands anywhere.
fn drawn_json(seed: &mut Seed, depth: u64) -> Value {
    match seed.below(if depth == 0 { 5 } else { 7 }) {
        0 => Value::Null,
        1 => seed.permille(500).into(),
        2 => (seed.below(1 << 40) as i64 - (1 << 39)).into(),
        3 => (seed.below(1 << 40) as f64 / 3.0).into(),
        4 => drawn(seed).replace("''", "").into(),
        5 => (0..seed.below(4)).map(|_| drawn_json(seed, depth - 1)).collect(),
        _ => {
            let names = ["due", "woke", "error", "run", "kind", "number", "Completed", "label", "odd"];
            (0..seed.below(4)).map(|_| ((*seed.one(&names)).to_owned(), drawn_json(seed, depth - 1))).collect()
        }
    }
}

/// How many panics there were, wherever.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(panic);
    }));
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
    const AND: &'static str = " || ";
    const TEXT: &'static str = "text";
    const NTH: &'static str = "LIMIT 1 OFFSET {}";
    const ROUNDS: u64 = 40;
    fn columns(&self, table: &str) -> String {
        format!("SELECT name || ' ' || type FROM pragma_table_info('durable_{table}')")
    }
    fn cell(_: &str, text: &str) -> String {
        text.to_owned()
    }
    fn values(_: &str) -> &'static [&'static str] {
        &[
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
        ]
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
    const AND: &'static str = " || ";
    const TEXT: &'static str = "text";
    const NTH: &'static str = "LIMIT 1 OFFSET {}";
    const ROUNDS: u64 = 40;
    fn columns(&self, table: &str) -> String {
        format!(
            "SELECT column_name || ' ' || data_type FROM information_schema.columns
             WHERE table_schema = '{}' AND table_name = '{table}'",
            self.name()
        )
    }
    fn cell(kind: &str, text: &str) -> String {
        let kind = if kind == "ARRAY" { "text[]" } else { kind };
        format!("CAST({text} AS {kind})")
    }
    fn values(kind: &str) -> &'static [&'static str] {
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
    }
    async fn attempt(&self, sql: &str) {
        let mut connection = self.connect().await;
        let _ = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await;
        connection.close().await.unwrap();
    }
}

impl Spoilt for MssqlSchema {
    const PREFIX: &'static str = "";
    const SHOWN: &'static str = "COALESCE(CONVERT(NVARCHAR(MAX), \"{}\"), N'∅')";
    const SHOWN_ID: &'static str = "COALESCE(CONVERT(NVARCHAR(36), CONVERT(UNIQUEIDENTIFIER, \"{}\")), N'∅')";
    const AND: &'static str = " + ";
    const TEXT: &'static str = "NVARCHAR(MAX)";
    const NTH: &'static str = "OFFSET {} ROWS FETCH NEXT 1 ROWS ONLY";
    // What stands in for it takes its time for each session.
    const ROUNDS: u64 = 8;
    fn columns(&self, table: &str) -> String {
        format!(
            "SELECT COLUMN_NAME + N' ' + DATA_TYPE FROM INFORMATION_SCHEMA.COLUMNS
             WHERE TABLE_SCHEMA = N'{}' AND TABLE_NAME = N'{table}'",
            self.name()
        )
    }
    fn cell(kind: &str, text: &str) -> String {
        match kind {
            "binary" => format!("CONVERT(BINARY(16), HASHBYTES('MD5', N{text}))"),
            kind => format!("CONVERT({kind}, N{text})"),
        }
    }
    fn values(kind: &str) -> &'static [&'static str] {
        match kind {
            "binary" => &["NULL", "CONVERT(BINARY(16), NEWID())", "0x00000000000000000000000000000000"],
            "bigint" => &["NULL", "-1", "7", "9223372036854775807", "-9223372036854775808"],
            "int" => &["NULL", "-1", "7", "2147483647", "-2147483648"],
            "smallint" => &["NULL", "-1", "7", "32767"],
            "bit" => &["NULL", "1", "0"],
            "datetime2" => &["NULL", "'0001-01-01'", "'9999-12-31 23:59:59.9999999'", "'2026-02-28'"],
            _ => &["NULL", "N''", "N'odd'", "NCHAR(10)", "REPLICATE(N'x', 3000)", "N'completed'", "N'waiting'", "N'{'"],
        }
    }
    fn text(text: &str) -> String {
        format!("N'{text}'")
    }
    fn run(run: RunId) -> String {
        format!("0x{}", run.0.simple())
    }
    async fn attempt(&self, sql: &str) {
        let mut client = self.connect().await;
        if let Ok(answers) = client.simple_query(sql).await {
            let _ = answers.into_results().await;
        }
    }
}

/// All rows, as text.
async fn everything<B: Spoilt>(backend: &B, columns: &[Vec<(String, String)>]) -> Vec<String> {
    let rows = TABLES.iter().zip(columns).map(|((table, _), columns)| {
        let cells = columns.iter().map(|(column, kind)| {
            let shown = if kind == "binary" { B::SHOWN_ID } else { B::SHOWN };
            shown.replace("{}", column)
        });
        let cells = cells.collect::<Vec<_>>().join(&format!("{0}' '{0}", B::AND));
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
    let rounds = if long() { B::ROUNDS * 10 } else { B::ROUNDS };
    count_panics();
    let mut backend = B::new().await;
    let mut storage = backend.storage().await;
    let mut columns = Vec::new();
    for (table, _) in TABLES {
        let columns_of = backend.texts(&backend.columns(table)).await;
        let split = |column: String| column.split_once(' ').map(|(name, kind)| (name.to_owned(), kind.to_owned()));
        columns.push(columns_of.into_iter().filter_map(split).collect::<Vec<(String, String)>>());
        assert!(columns.last().is_some_and(|columns| columns.len() > 1), "{table} has no columns");
    }
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
            let (column, kind) = seed.one(&columns[nth]).clone();
            let value = match seed.below(3) {
                0 => B::cell(&kind, &format!("'{}'", drawn(&mut seed))),
                _ => (*seed.one(B::values(&kind))).to_owned(),
            };
            let (table, row) = (format!("{}{table}", B::PREFIX), B::NTH.replace("{}", &seed.below(6).to_string()));
            let one = format!("(SELECT {key} FROM {table} ORDER BY {key} DESC {row})");
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
            vec![ops::record(owned, "r"), Op::AcceptCancel { run: owned, claim: 1, seq: 1 }],
            vec![Op::cancel(id("waiter").into())],
            vec![ops::park(owned, 1), Op::Claim { kind: ops::KIND.into(), limit: 3 }],
            vec![Op::resume(id("ended").into(), Vec::new())],
            vec![ops::finish(owned), ops::park(waiter, 0)],
            vec![Op::delete(id("ended").into())],
        ];
        for batch in batches {
            let before = everything(&backend, &columns).await;
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
                    assert_eq!(everything(&backend, &columns).await, before, "{batch:?} failed, by half: {error}");
                }
            }
        }
        look::<B>(&storage, me, &runs, &id("owned")).await;
    }
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "something panicked");
}

/// Every look at it.
async fn look<B: Spoilt>(storage: &B::Storage, me: InstanceId, runs: &[RunId], id: &str) {
    let poll =
        Poll { instance: me, namespace: "default".into(), kinds: vec![ops::KIND.into()], watched: runs.to_vec() };
    // One row never hides the others.
    storage.poll(&poll).await.unwrap();
    storage.owned(me, None, 100).await.unwrap();
    storage.peers("default", me).await.unwrap();
    let all = Filter { limit: 100, ..Filter::default() };
    storage.list("default", &all).await.unwrap();
    storage.count("default", &all).await.unwrap();
    storage.reinstate().await.unwrap();
    read::<B, _>("find", storage.find("default", id, None).await);
    for run in runs {
        let key = RecordKey { scope: Scope::Process, name: "r".into(), key: "".into() };
        read::<B, _>("record", storage.record(*run, &key).await);
        for loaded in read::<B, _>("load", storage.load(&Load::whole(&[*run])).await).into_iter().flatten().flatten() {
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
fn instead(payload: &str, seed: &mut Seed) -> Vec<String> {
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
    for _ in 0..if long() { 50 } else { 5 } {
        all.push(drawn_json(seed, 3));
    }
    all.iter().map(Value::to_string).collect()
}

/// A process whose record is of another form goes on or becomes stuck, with the reason; its neighbours go on.
async fn records_of_any_form<B: Spoilt>() {
    count_panics();
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
    let run = B::run(first.run().unwrap());
    let cells = ["name", "\"key\"", "CAST(payload AS {text})"].join(&format!("{0}'|'{0}", B::AND));
    let cells = cells.replace("{text}", B::TEXT);
    let records = format!("SELECT {cells} FROM {steps} WHERE run = {run} ORDER BY 1");
    let records = backend.texts(&records).await;
    assert!(records.len() >= 12, "{records:?}");
    let mut seed = Seed::new(records.len() as u64);
    let mut changes = vec![("retried".to_owned(), "attempts = 2147483647".to_owned())];
    changes.push(("retried".to_owned(), "attempts = -2147483648".to_owned()));
    for record in &records {
        let [name, _, payload] = record.splitn(3, '|').collect::<Vec<_>>()[..] else { panic!("{record}") };
        let instead = instead(payload, &mut seed).into_iter();
        changes.extend(instead.map(|payload| (name.to_owned(), format!("payload = {}", B::text(&payload)))));
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
            let run = B::run(handle.run().unwrap());
            format!("UPDATE {steps} SET {set} WHERE run = {run} AND name = '{name}'")
        })
        .collect();
    backend.execute(&sql.join("; ")).await;
    for handle in spoilt.iter().chain([&first]) {
        handle.raise(GO, &1).await.unwrap();
    }
    let mut stuck = 0;
    for ((name, set), handle) in changes.iter().zip(&spoilt) {
        until("it has been looked at", async || {
            let info = handle.status().await.unwrap();
            info.status != Status::Running && info.execution > 1
        })
        .await;
        let info = handle.status().await.unwrap();
        let reason = info.reason.unwrap_or_default();
        assert!(!reason.contains("panicked"), "{name} with {set}: {reason}");
        stuck += usize::from(info.status == Status::Stuck);
        assert!(info.status != Status::Stuck || reason.contains(name.as_str()), "{name} with {set}: {reason}");
    }
    until("it is parked again", async || parked(&first).await).await;
    println!("{stuck} of {} are stuck", changes.len());
    assert!(stuck > changes.len() / 2, "{stuck} of {} are stuck", changes.len());
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "something panicked");
}
