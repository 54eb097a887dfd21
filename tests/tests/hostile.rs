//! Hostile and wrong input, row by row as in `docs/hostile-input.md`: it works, or is refused with a clear error, and
//! nothing of it is written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use chrono::{DateTime, Utc};
use durable_core::storage::Storage;
use durable_core::*;
use durable_tests::*;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fmt::Display;
use std::future::IntoFuture;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const TEXT: Event<String> = Event::new("Text");

/// What no id and no name may be, and why.
fn refused() -> [(String, &'static str); 11] {
    [
        ("", "is empty"),
        (&*"x".repeat(10_000), "has 10000 UTF-16 units"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\tb", "control character"),
        ("a\u{7f}", "control character"),
        ("a\u{85}b", "control character"),
        (" a", "white space"),
        ("a ", "white space"),
        ("a\u{a0}", "white space"),
        ("\u{3000}a", "white space"),
    ]
    .map(|(text, why)| (text.to_owned(), why))
}

/// What an id and a name may well be; no two are the same, to whatever collation.
const ALLOWED: [&str; 24] = [
    "'; DROP TABLE durable_steps; --",
    "\"quoted\" 'twice' [x] `y`",
    "back\\slash \\' \\u0041",
    "$1 ? @P1 {s} {schema} %s :name",
    "a%_b*",
    "{\"a\":[1,null]}",
    "😀 👩‍👩‍👧",
    "\u{202e}desrever\u{202c}",
    "\u{200f}עברית\u{200f}",
    "\u{feff}mark",
    "\u{10ffff}",
    "Order-1",
    "order-1",
    "ORDER-1",
    "order-\u{200b}1",
    "order -1",
    "órder-1",
    "o\u{301}rder-1",
    "ｏrder-1",
    "straße",
    "strasse",
    "i",
    "ı",
    "İ",
];

/// For what takes constants only.
fn constant(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

async fn count(host: &Host) -> usize {
    host.processes().list(1000).await.unwrap().len()
}

/// The process becomes stuck for this reason.
async fn stuck<I: Serialize>(host: &Host, definition: Definition<I, String>, id: impl Display, input: &I, why: &str) {
    let handle = host.spawn(definition, id.to_string(), input).await.unwrap();
    let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains(why), "{why:?} is not in {reason:?}");
}

on_each_backend!(
    texts_that_are_refused,
    texts_that_are_allowed,
    labels_and_namespaces,
    texts_of_errors,
    payloads_up_to_the_limit,
    json_that_is_deep,
    numbers_come_back,
    delays_of_all_lengths,
    a_flood_of_messages,
    lists_of_all_lengths,
);

// --- Ids and names -------------------------------------------------------------------------------------------------

async fn texts_that_are_refused<B: Backend>() {
    /// Uses a text as one of the things that a process gives.
    const USE: Definition<(u8, String), String> = Definition::new("use");
    let backend = B::new().await;
    let uses = async |proc: Process, (what, text): (u8, String)| {
        proc.step("before", || async { Ok::<_, Failure>(()) }).await?;
        match what {
            0 => drop(proc.step(text, || async { Ok::<_, Failure>(()) }).await?),
            1 => drop(proc.get((text, 1), || 1).await?),
            2 => drop(proc.set(("key", text), 1).await?),
            3 => drop(proc.event(Event::<()>::new(constant(&text))).await?),
            4 => drop(proc.race(text).on(proc.delay("timer", Duration::ZERO), |_| ()).await?),
            5 => return Ok(proc.spawn(USE, text, &(9, String::new())).await.map(drop).unwrap_err().to_string()),
            6 => return Ok(proc.raise(text, TEXT, &String::new()).await.unwrap_err().to_string()),
            7 => return Ok(proc.output(USE, text).await.unwrap_err().to_string()),
            8 => {
                let awaited = proc.race("race").on(proc.output(USE, text), |output| output.unwrap_err().to_string());
                return Ok(awaited.await?);
            }
            10 => drop(proc.delay(text, Duration::ZERO).await?),
            11 => drop(proc.delay(("timer", text), Duration::ZERO).await?),
            12 => drop(proc.raise("there", TEXT, &String::new()).key(text).await),
            13 => {
                let event = Event::<String>::new(constant(&text));
                return Ok(proc.raise("there", event, &String::new()).await.unwrap_err().to_string());
            }
            14 => {
                let kind = Definition::<(u8, String), String>::new(constant(&text));
                return Ok(proc.spawn(kind, "other", &(9, String::new())).await.map(drop).unwrap_err().to_string());
            }
            15 => {
                // An old name that no step can have had is nobody's: it runs under the new one.
                return Ok(proc.step("new", || async { Ok::<_, Failure>("ran".to_owned()) }).was(text).await?);
            }
            _ => {}
        }
        Ok::<_, Failure>(String::new())
    };
    let host = quick(&backend).await.register(USE, uses).start().await.unwrap();
    let there = host.spawn(USE, "there", &(9, String::new())).await.unwrap();
    there.output().await.unwrap();
    for (text, why) in refused() {
        let input = (9, String::new());
        let (kind, event) =
            (Definition::<(u8, String), String>::new(constant(&text)), Event::<i32>::new(constant(&text)));
        let told = [
            host.spawn(USE, &*text, &input).await.map(drop).unwrap_err().to_string(),
            host.spawn(kind, "other", &input).await.map(drop).unwrap_err().to_string(),
            host.get(&*text).raise(TEXT, &text).await.unwrap_err().to_string(),
            there.raise(TEXT, &text).id(&text).await.unwrap_err().to_string(),
            there.raise(event, &1).await.unwrap_err().to_string(),
            there.value::<u8>(text.clone()).await.unwrap_err().to_string(),
            there.resume().forget(text.clone()).await.unwrap_err().to_string(),
        ];
        // No key at all is what an empty one is.
        let keyed = [
            there.value::<u8>(("key", &text)).await.map_err(|error| error.to_string()),
            there.resume().forget(("key", &text)).await.map(|()| None).map_err(|error| error.to_string()),
        ];
        let keyed = keyed.into_iter().filter(|_| !text.is_empty()).map(Result::unwrap_err);
        for error in told.into_iter().chain(keyed) {
            assert!(error.contains(why), "{why:?} is not in {error:?}");
        }
        // Asked for, it is no process's.
        let handle = host.get(&*text);
        assert!(matches!(handle.status().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(handle.cancel().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(handle.resume().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(handle.delete().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(handle.output().await, Err(OutputError::NotFound(_))));
    }
    assert_eq!(count(&host).await, 1, "nothing was written");
    let mut started = 1;
    for (n, (text, why)) in refused().into_iter().enumerate() {
        for what in (0..5).chain(10..13) {
            // No key at all is what an empty one is.
            if !([2, 11, 12].contains(&what) && text.is_empty()) {
                stuck(&host, USE, format!("{what}-{n}"), &(what, text.clone()), why).await;
                started += 1;
            }
        }
        for what in [5, 6, 13, 14] {
            let told = host.spawn(USE, format!("{what}-{n}"), &(what, text.clone())).await.unwrap().output().await;
            assert!(told.as_ref().unwrap().contains(why), "{why:?} is not in {told:?}");
            started += 1;
        }
        for what in 7..9 {
            let told = host.spawn(USE, format!("{what}-{n}"), &(what, text.clone())).await.unwrap().output().await;
            assert!(told.as_ref().unwrap().starts_with("there is no process"), "{told:?}");
            started += 1;
        }
        let ran = host.spawn(USE, format!("15-{n}"), &(15, text)).await.unwrap();
        assert_eq!(ran.output().await.unwrap(), "ran");
        started += 1;
    }
    assert_eq!(count(&host).await, started);
}

async fn texts_that_are_allowed<B: Backend>() {
    const PARENT: Definition<String, Vec<String>> = Definition::new("'parent'; --");
    const CHILD: Definition<String, String> = Definition::new("child 😀");
    let backend = B::new().await;
    let parent = async |proc: Process, text: String| {
        let mut all = Vec::new();
        // Each is a step, and a key, of its own.
        for name in ALLOWED {
            all.push(proc.step(name, || async { Ok::<_, Failure>(name.to_owned()) }).await?);
            all.push(proc.get(("key", name), || name.to_owned()).await?);
        }
        all.push(proc.event(TEXT).await?);
        all.push(proc.event(Event::<String>::new(constant(&text))).await?);
        proc.spawn(CHILD, format!("child of {text}"), &text).await?;
        proc.raise(format!("child of {text}"), TEXT, &text).key(&text).await?;
        all.push(proc.output(CHILD, format!("child of {text}")).await?);
        Ok::<_, Failure>(all)
    };
    let child = async |proc: Process, text: String| {
        assert_eq!(proc.event(TEXT).await?, text);
        Ok::<_, Failure>(text)
    };
    let builder = async || quick(&backend).await.register(PARENT, parent).register(CHILD, child);
    let host = builder().await.start().await.unwrap();
    let start = async |text: &'static str| host.spawn(PARENT, text, &text.to_owned()).await.unwrap();
    let handles = join_all(ALLOWED.map(start)).await;
    until("all wait", async || host.in_memory() == 0).await;
    host.shutdown(Duration::from_secs(5)).await;
    // Read from the database, they are still apart.
    let host = builder().await.start().await.unwrap();
    for (text, handle) in ALLOWED.into_iter().zip(&handles) {
        let handle = host.get(handle.id()).of(PARENT);
        assert_eq!(&*handle.status().await.unwrap().id, text);
        assert_eq!(handle.value::<String>(("key", text)).await.unwrap().as_deref(), Some(text));
        handle.raise(TEXT, &text.to_owned()).id(text).await.unwrap();
        handle.raise(TEXT, &"twice".to_owned()).id(text).await.unwrap();
        handle.raise(Event::<String>::new(constant(text)), text).await.unwrap();
        let mut expected: Vec<String> = ALLOWED.iter().flat_map(|name| [*name, name].map(str::to_owned)).collect();
        expected.extend([text; 3].map(str::to_owned));
        assert_eq!(handle.output().await.unwrap(), expected, "{text}");
    }
    assert_eq!(count(&host).await, 2 * ALLOWED.len());
    for text in ALLOWED {
        host.get(text).delete().await.unwrap();
    }
    assert_eq!(count(&host).await, ALLOWED.len());
}

async fn labels_and_namespaces<B: Backend>() {
    const IT: Definition<(), ()> = Definition::new("it");
    let backend = B::new().await;
    let it = async |_, ()| Ok::<_, Failure>(());
    for (text, why) in refused() {
        let error = quick(&backend).await.namespace(&*text).start().await.unwrap_err().to_string();
        assert!(error.contains(why), "{why:?} is not in {error:?}");
        let error = quick(&backend).await.label(&*text).start().await.unwrap_err().to_string();
        assert!(error.contains(why), "{why:?} is not in {error:?}");
        let kind = Definition::<(), ()>::new(constant(&text));
        let error = quick(&backend).await.register(kind, it).start().await.unwrap_err().to_string();
        assert!(error.contains(why), "{why:?} is not in {error:?}");
    }
    for text in ["Order-1", "order-1", "'; --", "😀\u{202e}", &"é".repeat(64)] {
        let host = quick(&backend).await.namespace(text).label(text).register(IT, it).start().await.unwrap();
        assert_eq!(count(&host).await, 0, "{text} sees what is another's");
        host.spawn(IT, "it", &()).await.unwrap().output().await.unwrap();
        host.shutdown(Duration::from_secs(5)).await;
    }
}

/// What errors and panics say is the program's own, and becomes a column's text.
async fn texts_of_errors<B: Backend>() {
    const FAIL: Definition<(bool, String), ()> = Definition::new("fail");
    let backend = B::new().await;
    let fail = async |_, (panics, text): (bool, String)| {
        assert!(!panics, "{text}");
        Err::<(), _>(Failure::new(text))
    };
    let host = quick(&backend).await.register(FAIL, fail).start().await.unwrap();
    for (n, (text, _)) in refused().into_iter().chain([("x".repeat(100_000), ""), ("😀".repeat(5000), "")]).enumerate()
    {
        let failed = host.spawn(FAIL, format!("failed-{n}"), &(false, text.clone())).await.unwrap();
        assert_eq!(failed.output().await.unwrap_err(), OutputError::Failed(Failure::new(&text)));
        let shown: String = text.chars().filter(|c| *c != '\0').take(4000).collect();
        assert_eq!(failed.status().await.unwrap().reason.unwrap().trim(), shown.trim());
        let panicked = host.spawn(FAIL, format!("panicked-{n}"), &(true, text)).await.unwrap();
        let reason = until_status(&panicked, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains(&shown[..shown.len().min(1000)]), "{reason}");
    }
}

// --- In transactions -----------------------------------------------------------------------------------------------

/// What each database has for transactions. What is put into the service's own is committed, whether it was refused or not.
trait Transacts: Sql {
    fn transaction(proc: &Process, name: impl Into<Name> + Send) -> impl Future<Output = Result<(), Failure>> + Send;
    fn spawn_in<I: Serialize + Sync>(
        &self,
        host: &Host,
        kind: Definition<I, String>,
        id: &str,
        input: &I,
    ) -> impl Future<Output = Result<(), String>> + Send;
    fn raise_in<T: Serialize + Sync>(
        &self,
        host: &Host,
        id: &str,
        event: Event<T>,
        message: &str,
        payload: &T,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

macro_rules! by_sqlx {
    ($backend:ty, $storage:ident) => {
        impl Transacts for $backend {
            async fn transaction(proc: &Process, name: impl Into<Name> + Send) -> Result<(), Failure> {
                use $storage::Transactions;
                Ok(proc.transaction(name, async |_| Ok::<_, Failure>(())).await?)
            }
            async fn spawn_in<I: Serialize + Sync>(
                &self,
                host: &Host,
                kind: Definition<I, String>,
                id: &str,
                input: &I,
            ) -> Result<(), String> {
                use $storage::Outbox;
                let mut connection = Sql::connection(self).await;
                let mut tx = sqlx::Connection::begin(&mut connection).await.unwrap();
                let spawned = host.spawn_in(&mut *tx, kind, id, input).await;
                tx.commit().await.unwrap();
                spawned.map(drop).map_err(|error| error.to_string())
            }
            async fn raise_in<T: Serialize + Sync>(
                &self,
                host: &Host,
                id: &str,
                event: Event<T>,
                message: &str,
                payload: &T,
            ) -> Result<(), String> {
                use $storage::Outbox;
                let mut connection = Sql::connection(self).await;
                let mut tx = sqlx::Connection::begin(&mut connection).await.unwrap();
                let raised = host.raise_in(&mut *tx, id, event, payload).id(message).await;
                tx.commit().await.unwrap();
                raised.map_err(|error| error.to_string())
            }
        }
    };
}
by_sqlx!(SqliteFile, durable_sqlite);
by_sqlx!(PostgresSchema, durable_postgres);

impl Transacts for MssqlSchema {
    async fn transaction(proc: &Process, name: impl Into<Name> + Send) -> Result<(), Failure> {
        use durable_mssql::Transactions;
        Ok(proc.transaction(name, async |_| Ok::<_, Failure>(())).await?)
    }
    async fn spawn_in<I: Serialize + Sync>(
        &self,
        host: &Host,
        kind: Definition<I, String>,
        id: &str,
        input: &I,
    ) -> Result<(), String> {
        use durable_mssql::Outbox;
        let mut client = self.connect().await;
        client.simple_query("BEGIN TRANSACTION").await.unwrap().into_results().await.unwrap();
        let spawned = host.spawn_in(&mut client, kind, id, input).await;
        client.simple_query("COMMIT").await.unwrap().into_results().await.unwrap();
        spawned.map(drop).map_err(|error| error.to_string())
    }
    async fn raise_in<T: Serialize + Sync>(
        &self,
        host: &Host,
        id: &str,
        event: Event<T>,
        message: &str,
        payload: &T,
    ) -> Result<(), String> {
        use durable_mssql::Outbox;
        let mut client = self.connect().await;
        client.simple_query("BEGIN TRANSACTION").await.unwrap().into_results().await.unwrap();
        let raised = host.raise_in(&mut client, id, event, payload).id(message).await;
        client.simple_query("COMMIT").await.unwrap().into_results().await.unwrap();
        raised.map_err(|error| error.to_string())
    }
}

on_each_database!(texts_refused_in_transactions, payloads_in_transactions);

async fn texts_refused_in_transactions<B: Transacts>() {
    const USE: Definition<(u8, String), String> = Definition::new("use");
    let backend = B::new().await;
    let uses = async |proc: Process, (what, text): (u8, String)| {
        match what {
            0 => B::transaction(&proc, text).await?,
            1 => B::transaction(&proc, ("key", text)).await?,
            _ => {}
        }
        Ok::<_, Failure>(String::new())
    };
    let host = quick(&backend).await.register(USE, uses).start().await.unwrap();
    let input = (9, String::new());
    host.spawn(USE, "there", &input).await.unwrap().output().await.unwrap();
    for (text, why) in refused() {
        let kind = Definition::<(u8, String), String>::new(constant(&text));
        let event = Event::<String>::new(constant(&text));
        for told in [
            backend.spawn_in(&host, USE, &text, &input).await,
            backend.spawn_in(&host, kind, "other", &input).await,
            backend.raise_in(&host, &text, TEXT, "message", &text).await,
            backend.raise_in(&host, "there", event, "message", &text).await,
            backend.raise_in(&host, "there", TEXT, &text, &text).await,
        ] {
            let error = told.unwrap_err();
            assert!(error.contains(why), "{why:?} is not in {error:?}");
        }
    }
    assert_eq!(count(&host).await, 1, "something was written");
    for (n, (text, why)) in refused().into_iter().enumerate() {
        stuck(&host, USE, format!("0-{n}"), &(0, text.clone()), why).await;
        // No key at all is what an empty one is.
        if !text.is_empty() {
            stuck(&host, USE, format!("1-{n}"), &(1, text), why).await;
        }
    }
}

async fn payloads_in_transactions<B: Transacts>() {
    type Deep = Box<RawValue>;
    const ECHO: Definition<Deep, String> = Definition::new("echo");
    const RAW: Event<Deep> = Event::new("Raw");
    const MOST: usize = limits::DEFAULT_PAYLOAD;
    const DEEPEST: usize = 127;
    fn text(bytes: usize) -> Deep {
        RawValue::from_string(format!("\"{}\"", "x".repeat(bytes - 2))).unwrap()
    }
    fn deep(depth: usize) -> Deep {
        RawValue::from_string(format!("{}7{}", "[".repeat(depth), "]".repeat(depth))).unwrap()
    }
    let backend = B::new().await;
    let echo = async |proc: Process, input: Deep| {
        let message = proc.event(RAW).await?;
        assert_eq!(input.get(), message.get());
        Ok::<_, Failure>(message.get().len().to_string())
    };
    let host = quick(&backend).await.register(ECHO, echo).start().await.unwrap();
    for (n, (works, not, why)) in [
        (text(MOST), text(MOST + 1), "1048577 bytes of JSON; at most 1048576 are allowed"),
        (deep(DEEPEST), deep(DEEPEST + 1), "its JSON is 128 levels deep; at most 127 are allowed"),
    ]
    .into_iter()
    .enumerate()
    {
        let (id, none) = (format!("it-{n}"), format!("none-{n}"));
        backend.spawn_in(&host, ECHO, &id, &works).await.unwrap();
        for told in
            [backend.spawn_in(&host, ECHO, &none, &not).await, backend.raise_in(&host, &id, RAW, "message", &not).await]
        {
            let error = told.unwrap_err();
            assert!(error.contains(why), "{why:?} is not in {error:?}");
        }
        assert!(matches!(host.get(none).status().await, Err(HandleError::NotFound { .. })));
        backend.raise_in(&host, &id, RAW, "message", &works).await.unwrap();
        assert_eq!(host.get(id).of(ECHO).output().await.unwrap(), works.get().len().to_string());
    }
}

// --- Payloads ------------------------------------------------------------------------------------------------------

async fn payloads_up_to_the_limit<B: Backend>() {
    const ECHO: Definition<(u8, String), String> = Definition::new("echo");
    const WAIT: Definition<String, String> = Definition::new("wait");
    const MOST: usize = limits::DEFAULT_PAYLOAD;
    let backend = B::new().await;
    // A text is two bytes shorter than its JSON.
    let text = |bytes: usize| "x".repeat(bytes - 2);
    let echo = async move |proc: Process, (what, mut text): (u8, String)| {
        if what != 3 {
            text.push_str(&"x".repeat(MOST - 2 - text.len()));
        }
        if what >= 4 {
            text.push('x');
        }
        match what {
            0 | 4 => proc.step("step", || async { Ok::<_, Failure>(text.clone()) }).await.map(drop)?,
            1 | 5 => drop(proc.get("get", || text.clone()).await?),
            2 | 6 => proc.set("set", text.clone()).await?,
            7 => {
                let error = proc.step("fails", || async { Err::<(), _>(text.clone()) }).await.unwrap_err();
                assert!(matches!(error, StepError::Failed(_)));
            }
            8 => return Ok(proc.spawn(WAIT, "large", &text).await.map(drop).unwrap_err().to_string()),
            9 => return Ok(proc.raise("wait", TEXT, &text).await.unwrap_err().to_string()),
            _ => {}
        }
        Ok::<_, Failure>(text)
    };
    let wait = async |proc: Process, text: String| {
        let message = proc.event(TEXT).await?;
        assert_eq!(text, message);
        Ok::<_, Failure>(message)
    };
    let host = quick(&backend).await.register(ECHO, echo).register(WAIT, wait).start().await.unwrap();
    for what in 0..3 {
        let output = host.spawn(ECHO, what.to_string(), &(what, String::new())).await.unwrap().output().await.unwrap();
        assert_eq!(output.len(), MOST - 2);
    }
    // Nothing at all: what it is made of is.
    assert_eq!(host.spawn(ECHO, "3", &(3, String::new())).await.unwrap().output().await.unwrap(), "");
    for what in [4, 5, 6, 7, 10] {
        stuck(&host, ECHO, what, &(what, String::new()), "bytes of JSON; at most 1048576 are allowed").await;
    }
    let waits = host.spawn(WAIT, "wait", &text(MOST)).await.unwrap();
    for what in 8..10 {
        let told = host.spawn(ECHO, what.to_string(), &(what, String::new())).await.unwrap().output().await.unwrap();
        assert!(told.contains("1048577 bytes of JSON; at most 1048576 are allowed"), "{told}");
    }
    for error in [
        host.spawn(WAIT, "large", &text(MOST + 1)).await.map(drop).unwrap_err().to_string(),
        waits.raise(TEXT, &text(MOST + 1)).await.unwrap_err().to_string(),
    ] {
        assert!(error.contains("1048577 bytes of JSON; at most 1048576 are allowed"), "{error}");
    }
    assert!(matches!(host.get("large").status().await, Err(HandleError::NotFound { .. })));
    waits.raise(TEXT, &text(MOST)).await.unwrap();
    assert_eq!(waits.output().await.unwrap(), text(MOST));
}

async fn json_that_is_deep<B: Backend>() {
    type Deep = Box<RawValue>;
    const DEEP: Definition<(u8, usize), String> = Definition::new("deep");
    const ECHO: Definition<Deep, Deep> = Definition::new("echo");
    const MESSAGE: Event<serde_json::Value> = Event::new("Message");
    const RAW: Event<Deep> = Event::new("Message");
    const DEEPEST: usize = 127;
    fn deep(depth: usize) -> Deep {
        RawValue::from_string(format!("{}7{}", "[".repeat(depth), "]".repeat(depth))).unwrap()
    }
    let backend = B::new().await;
    let function = async |proc: Process, (what, depth): (u8, usize)| {
        let value = deep(depth);
        let value = match what {
            0 => proc.step("step", || async { Ok::<_, Failure>(value.clone()) }).await?,
            1 => proc.get("get", || value.clone()).await?,
            2 => {
                proc.set("set", value.clone()).await?;
                value
            }
            3 => {
                // Read back to a value, out of the record that the race wraps around it.
                let value = (0..depth).fold(serde_json::json!(7), |value, _| serde_json::json!([value]));
                let step = proc.step("step", || async { Ok::<_, Failure>(value.clone()) });
                let value = proc.race("race").on(step, |value| value).await??;
                RawValue::from_string(value.to_string()).unwrap()
            }
            _ => return Ok(proc.raise("echo", RAW, &value).await.unwrap_err().to_string()),
        };
        Ok::<_, Failure>(value.get().len().to_string())
    };
    let echo = async |proc: Process, value: Deep| {
        // All the way to a value, and through what the engine wraps around it.
        let one = proc.event(MESSAGE).await?;
        let two = proc.race("race").on(proc.event(MESSAGE), |message| message).await?;
        assert_eq!((one.to_string(), two.to_string()), (value.get().to_owned(), value.get().to_owned()));
        Ok::<_, Failure>(value)
    };
    let host = quick(&backend).await.register(DEEP, function).register(ECHO, echo).start().await.unwrap();
    let handle = host.spawn(ECHO, "echo", &deep(DEEPEST)).await.unwrap();
    for what in 0..4 {
        let output = host.spawn(DEEP, format!("{what}"), &(what, DEEPEST)).await.unwrap().output().await;
        assert_eq!(output.unwrap(), (2 * DEEPEST + 1).to_string());
        // Nobody can let go of a value of 100,000 levels.
        for depth in [DEEPEST + 1, 100_000].into_iter().take(if what == 3 { 1 } else { 2 }) {
            let why = format!("its JSON is {depth} levels deep; at most 127 are allowed");
            stuck(&host, DEEP, format!("{what}-{depth}"), &(what, depth), &why).await;
        }
    }
    for error in [
        host.spawn(ECHO, "deeper", &deep(DEEPEST + 1)).await.map(drop).unwrap_err().to_string(),
        handle.raise(RAW, &deep(DEEPEST + 1)).await.unwrap_err().to_string(),
        host.spawn(DEEP, "raise", &(9, DEEPEST + 1)).await.unwrap().output().await.unwrap(),
    ] {
        assert!(error.contains("cannot be recorded: its JSON is 128 levels deep"), "{error}");
    }
    assert!(matches!(host.get("deeper").status().await, Err(HandleError::NotFound { .. })));
    for _ in 0..2 {
        handle.raise(RAW, &deep(DEEPEST)).await.unwrap();
    }
    assert_eq!(handle.output().await.unwrap().get(), deep(DEEPEST).get());
}

async fn numbers_come_back<B: Backend>() {
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Numbers {
        signed: Vec<i64>,
        unsigned: Vec<u64>,
        wide: (i128, u128),
        floats: Vec<f64>,
        short: Vec<f32>,
    }
    const NUMBERS: Definition<Numbers, Numbers> = Definition::new("numbers");
    const MESSAGE: Event<Numbers> = Event::new("Numbers");
    let numbers = Numbers {
        signed: vec![i64::MIN, i64::MAX, (1 << 53) + 1, -(1 << 53) - 1, 0],
        unsigned: vec![u64::MAX, u64::MAX - 1, (1 << 53) + 1],
        wide: (i128::MIN, u128::MAX),
        floats: vec![f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, -0.0, 0.1 + 0.2, 9_007_199_254_740_993.0, 1e300],
        short: vec![f32::MAX, f32::MIN_POSITIVE, 1e-45, 16_777_217.0, 0.1],
    };
    let backend = B::new().await;
    let function = async |proc: Process, numbers: Numbers| {
        let step = proc.step("step", || async { Ok::<_, Failure>(numbers.clone()) }).await?;
        let get = proc.get("get", || numbers.clone()).await?;
        proc.set("set", numbers.clone()).await?;
        let message = proc.event(MESSAGE).await?;
        assert!([&step, &get, &message].iter().all(|other| **other == numbers));
        Ok::<_, Failure>(numbers)
    };
    let host = quick(&backend).await.register(NUMBERS, function).start().await.unwrap();
    let handle = host.spawn(NUMBERS, "n", &numbers).await.unwrap();
    until("it is parked", async || host.in_memory() == 0 && handle.status().await.unwrap().execution == 1).await;
    assert_eq!(handle.value::<Numbers>("set").await.unwrap().unwrap(), numbers);
    handle.raise(MESSAGE, &numbers).await.unwrap();
    let back = handle.output().await.unwrap();
    assert_eq!(back, numbers);
    assert!(back.floats[4].is_sign_negative(), "-0.0 is 0.0 to a comparison");
}

// --- Times ---------------------------------------------------------------------------------------------------------

const TEN_THOUSAND_YEARS: Duration = Duration::from_secs(10_000 * 365 * 24 * 3600);

async fn delays_of_all_lengths<B: Backend>() {
    const LONG: Definition<u8, ()> = Definition::new("long");
    let backend = B::new().await;
    let dues: Arc<Mutex<Vec<(DateTime<Utc>, DateTime<Utc>)>>> = Arc::default();
    let function = {
        let dues = dues.clone();
        move |proc: Process, which: u8| {
            let dues = dues.clone();
            async move {
                // Zero, and what is past already: there is no other way to a delay that is negative.
                let past = [DateTime::<Utc>::MIN_UTC, DateTime::UNIX_EPOCH - chrono::TimeDelta::days(1), Utc::now()];
                for (n, due) in past.into_iter().enumerate() {
                    let delayed = proc.delay_until(("past", n), due).await?;
                    dues.lock().unwrap().push((delayed.due, delayed.woke));
                }
                proc.delay("zero", Duration::ZERO).await?;
                assert_eq!(proc.event(TEXT).timeout(Duration::ZERO).await?, None);
                let soon = proc.step("soon", std::future::pending::<Result<(), Failure>>).timeout(Duration::ZERO).await;
                assert!(matches!(soon, Err(StepError::TimedOut(_))));
                let mut fails = true;
                let step = || {
                    let failed = std::mem::replace(&mut fails, false);
                    async move { if failed { Err(Failure::new("once")) } else { Ok(()) } }
                };
                proc.step("at once", step).retry(Retry::fixed(Duration::ZERO)).timeout(Duration::MAX).await?;
                match which {
                    0 => drop(proc.delay("long", TEN_THOUSAND_YEARS).await?),
                    1 => drop(proc.delay("long", Duration::MAX).await?),
                    2 => drop(proc.delay_until("long", DateTime::<Utc>::MAX_UTC).await?),
                    3 => drop(proc.event(TEXT).timeout(TEN_THOUSAND_YEARS).await?),
                    4 => drop(proc.event(TEXT).timeout(Duration::MAX).await?),
                    5 => {
                        let never = || async { Err::<(), _>(Failure::new("again")) };
                        proc.step("long", never).retry(Retry::fixed(TEN_THOUSAND_YEARS)).await?;
                    }
                    _ => {
                        let never = || async { Err::<(), _>(Failure::new("again")) };
                        let retry = Retry::exponential(Duration::MAX).max_delay(Duration::MAX).factor(f64::INFINITY);
                        proc.step("long", never).retry(retry.jitter(false)).await?;
                    }
                }
                Ok::<_, Failure>(())
            }
        }
    };
    let host = quick(&backend).await.register(LONG, function).start().await.unwrap();
    let mut handles = Vec::new();
    for which in 0..7_u8 {
        handles.push(host.spawn(LONG, which.to_string(), &which).await.unwrap());
    }
    let last_moment = DateTime::parse_from_rfc3339("9999-12-31T23:59:59Z").unwrap();
    for handle in &handles {
        // The last moment that each database can hold: whoever comes by then is due.
        until("it waits for ever", async || {
            handle.status().await.unwrap().next_wake.is_some_and(|at| at == last_moment)
        })
        .await;
    }
    until("all are parked", async || host.in_memory() == 0).await;
    for (due, woke) in dues.lock().unwrap().iter() {
        assert!(*due >= DateTime::UNIX_EPOCH && due <= woke, "{due} {woke}");
    }
    for handle in &handles {
        handle.cancel().await.unwrap();
        until_status(handle, Status::Cancelled).await;
    }
}

// --- Many ----------------------------------------------------------------------------------------------------------

/// As many messages to one process as a mistaken loop sends; a hundred thousand in the long form.
async fn a_flood_of_messages<B: Backend>() {
    const COUNT: Definition<u32, u32> = Definition::new("count");
    const GO: Event<u32> = Event::new("Go");
    let backend = B::new().await;
    const END: Event<()> = Event::new("End");
    let (sent, received) = if long() { (100_000, 20_000) } else { (5_000, 500) };
    let count_them = async move |proc: Process, most: u32| {
        for n in 0..most {
            assert_eq!(proc.event(GO).await?, n);
        }
        if most > 0 {
            proc.event(END).await?;
        }
        Ok::<_, Failure>(most)
    };
    let host = quick(&backend).await.register(COUNT, count_them).start().await.unwrap();
    let flooded = host.spawn(COUNT, "flooded", &received).await.unwrap();
    let first = async {
        // The first is there before the others, whose order is theirs.
        for n in 0..received {
            flooded.raise(GO, &n).id(n).await.unwrap();
        }
    };
    first.await;
    let rest: Vec<u32> = (received..sent).collect();
    for some in rest.chunks(2_000) {
        for raised in join_all(some.iter().map(|n| flooded.raise(GO, n).id(n).into_future())).await {
            raised.unwrap();
        }
    }
    let has_its_own = |info: Info| info.waiting_for.is_some_and(|what| what.contains("End"));
    while !has_its_own(flooded.status().await.unwrap()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // All of them were put in: what it has not received waits.
    let run = flooded.status().await.unwrap().run;
    let loaded = backend.storage().await.load(&storage::Load::signals(&[run])).await.unwrap().unwrap().remove(0);
    assert_eq!(loaded.state.unwrap().unwrap().events.len(), (sent - received) as usize);
    let neighbour = host.spawn(COUNT, "neighbour", &0).await.unwrap();
    assert_eq!(neighbour.output().await.unwrap(), 0);
    flooded.raise(END, &()).await.unwrap();
    assert_eq!(flooded.output().await.unwrap(), received);
    flooded.delete().await.unwrap();
    assert_eq!(count(&host).await, 1);
}

async fn lists_of_all_lengths<B: Backend>() {
    const IT: Definition<(), ()> = Definition::new("it");
    let backend = B::new().await;
    let host = quick(&backend).await.register(IT, async |_, ()| Ok::<_, Failure>(())).start().await.unwrap();
    for n in 0..3 {
        host.spawn(IT, n.to_string(), &()).await.unwrap().output().await.unwrap();
    }
    let all = host.processes();
    for (most, found) in [(0, 0), (1, 1), (usize::MAX, 3)] {
        assert_eq!(all.list(most).await.unwrap().len(), found);
    }
    assert_eq!(all.clone().unchanged_for(Duration::MAX).list(10).await.unwrap(), []);
    assert_eq!(all.clone().after(RunId(uuid::Uuid::max())).list(10).await.unwrap(), []);
    assert_eq!(all.after(RunId(uuid::Uuid::nil())).list(10).await.unwrap().len(), 3);
    // A kind of which there cannot be any.
    for (text, _) in refused() {
        let none = host.processes().kind(Definition::<(), ()>::new(constant(&text)));
        assert!(none.list(10).await.is_ok_and(|found| found.is_empty()), "{text:?}");
        assert!(none.count().await.is_ok_and(|found| found.is_empty()), "{text:?}");
        assert_eq!(none.resume_stuck().await, Ok(0), "{text:?}");
    }
}
