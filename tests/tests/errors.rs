//! Errors of any kind, as steps, transactions and processes return them: recorded without a word, and a cancellation is
//! found in whatever it is wrapped in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use anyhow::Context;
use durable_core::memory::Memory;
use durable_core::*;
use durable_sqlite::Transactions;
use durable_tests::*;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::future::Future;
use std::time::Duration;

type Boxed = Box<dyn Error + Send + Sync>;

const GO: Event<()> = Event::new("Go");
const FAILS: Definition<(), Vec<Failure>> = Definition::new("fails");

on_each_backend!(errors_of_any_kind);

#[derive(Debug, thiserror::Error)]
#[error("the gateway is away")]
struct Away(#[source] std::num::ParseIntError);

fn away() -> Away {
    Away("x".parse::<u8>().unwrap_err())
}

/// A step for each kind; nothing is chained to any.
async fn fails(proc: Process, (): ()) -> Result<Vec<Failure>, Failure> {
    let own = |error: StepError<Failure>| error.failed().unwrap().clone();
    let any: anyhow::Result<()> = Err(away()).context("charging");
    let mut any = Some(any);
    let failures = vec![
        own(proc.step("own", async || Err::<(), _>(away())).await.unwrap_err()),
        own(proc.step("anyhow", || std::future::ready(any.take().unwrap())).await.unwrap_err()),
        own(proc.step("boxed", async || Err::<(), Boxed>(away().into())).await.unwrap_err()),
        own(proc.step("sqlx", async || Err::<(), _>(sqlx::Error::RowNotFound)).await.unwrap_err()),
        own(proc.step("text", async || Err::<(), _>("no".to_owned())).await.unwrap_err()),
        own(proc.step("failure", async || Err::<(), _>(Failure::new("no").with_code("declined"))).await.unwrap_err()),
    ];
    // Nothing at all is a success.
    proc.step("nothing", async || {}).await?;
    assert_eq!(proc.step("value", async || Failure::ok(5)).await?, 5);
    proc.event(GO).await?;
    Ok(failures)
}

/// They come back as they were, after a crash too.
async fn errors_of_any_kind<B: Backend>() {
    let backend = B::new().await;
    let again = async |proc: Process, ()| {
        let none = async || -> Result<(), Failure> { panic!("it is recorded") };
        let mut failures = Vec::new();
        for name in ["own", "anyhow", "boxed", "sqlx", "text", "failure"] {
            failures.push(proc.step(name, none).await.unwrap_err().failed().unwrap().clone());
        }
        proc.step("nothing", none).await?;
        proc.step("value", async || -> Result<u32, Failure> { panic!("it is recorded") }).await?;
        proc.event(GO).await?;
        Failure::ok(failures)
    };
    let first = quick(&backend).await.register(FAILS, fails).start().await.unwrap();
    let handle = first.spawn(FAILS, "it", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    drop(first);
    let second = quick(&backend).await.register(FAILS, again).start().await.unwrap();
    let handle = second.get("it").of(FAILS);
    handle.raise(GO, &()).await.unwrap();
    let failures = handle.output().await.unwrap();
    let shown: Vec<_> = failures.iter().map(|failure| format!("{failure:#}")).collect();
    const AWAY: &str = "the gateway is away: invalid digit found in string";
    let charging = format!("charging: {AWAY}");
    let row = sqlx::Error::RowNotFound.to_string();
    assert_eq!(shown, [AWAY, &charging, AWAY, &row, "no", "no"]);
    assert!(failures[0].type_name().ends_with("errors::Away"), "{}", failures[0].type_name());
    assert_eq!(
        failures.iter().map(Failure::code).collect::<Vec<_>>(),
        [None, None, None, None, None, Some("declined")]
    );
    assert_eq!(failures[4].type_name(), "");
}

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
enum Typed {
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("a step")]
    Step(#[from] StepError<Failure>),
    #[error(transparent)]
    Within(Box<Typed>),
}

/// Starts a process that waits, cancels it, and says how it ended.
async fn cancelled<E, R, F, Fut>(definition: Definition<(), (), E>, function: F) -> Status
where
    E: ProcessError,
    R: Into<E> + 'static,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), R>> + Send + 'static,
{
    let host = Host::builder(Memory::new()).register(definition, move |proc, ()| function(proc)).start().await.unwrap();
    let handle = host.spawn(definition, "it", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    handle.cancel().await.unwrap();
    until("it ends", async || handle.status().await.unwrap().status.is_finished()).await;
    handle.status().await.unwrap().status
}

async fn waits(proc: &Process) -> Result<(), StepError<Failure>> {
    Ok(proc.event(GO).await?)
}

/// However deep.
#[test]
fn a_cancellation_is_found() {
    run(async {
        const TYPED: Definition<(), (), Typed> = Definition::new("typed");
        const STEP: Definition<(), (), StepError<Failure>> = Definition::new("step");
        const IT: Definition<(), ()> = Definition::new("it");
        let typed = async |proc: Process| -> Result<(), Typed> { Ok(proc.event(GO).await?) };
        assert_eq!(cancelled(TYPED, typed).await, Status::Cancelled);
        let step = async |proc: Process| -> Result<(), Typed> { Ok(waits(&proc).await?) };
        assert_eq!(cancelled(TYPED, step).await, Status::Cancelled);
        let within = async |proc: Process| {
            let error = Typed::from(proc.event(GO).await.unwrap_err());
            Err::<(), _>(Typed::Within(Typed::Within(error.into()).into()))
        };
        assert_eq!(cancelled(TYPED, within).await, Status::Cancelled);
        assert_eq!(cancelled(STEP, async |proc: Process| waits(&proc).await).await, Status::Cancelled);
        let anyhow = async |proc: Process| -> anyhow::Result<()> {
            proc.event(GO).await.context("waiting").context("at work")?;
            Ok(())
        };
        assert_eq!(cancelled(IT, anyhow).await, Status::Cancelled);
        let deeper = async |proc: Process| -> anyhow::Result<()> {
            Err(Typed::from(waits(&proc).await.unwrap_err())).context("at work")
        };
        assert_eq!(cancelled(IT, deeper).await, Status::Cancelled);
        let boxed = async |proc: Process| -> Result<(), Boxed> { Ok(waits(&proc).await?) };
        assert_eq!(cancelled(IT, boxed).await, Status::Cancelled);
        // One that went another way is a failure.
        let other = async |proc: Process| -> anyhow::Result<()> {
            let _ = proc.event(GO).await;
            anyhow::bail!("another way")
        };
        assert_eq!(cancelled(IT, other).await, Status::Failed);
    });
}

/// In a process that returns `anyhow::Result`; a code is found through what it was wrapped in.
#[test]
fn a_process_of_anyhows() {
    run(async {
        const IT: Definition<u32, u32> = Definition::new("it");
        async fn it(proc: Process, input: u32) -> anyhow::Result<u32> {
            let declines = async || match input {
                0 => Ok(1),
                _ => Err(Failure::new("no").with_code("declined")),
            };
            let charged = proc.step("charge", declines).await.with_context(|| format!("charging {input}"))?;
            Ok(charged + 1)
        }
        let host = Host::builder(Memory::new()).register(IT, it).start().await.unwrap();
        assert_eq!(host.spawn(IT, "good", &0).await.unwrap().output().await.unwrap(), 2);
        let bad = host.spawn(IT, "bad", &7).await.unwrap();
        let OutputError::Failed(failure) = bad.output().await.unwrap_err() else { panic!() };
        assert_eq!((failure.code(), format!("{failure:#}").as_str()), (Some("declined"), "charging 7: no"));
    });
}

/// The driver's error in `anyhow`'s: the database's wish for another try is seen.
#[test]
fn a_transaction_of_anyhows() {
    run(async {
        const IT: Definition<(), u32> = Definition::new("it");
        let backend = SqliteFile::new().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let function = move |proc: Process, ()| {
            let calls = counted.clone();
            async move {
                let transaction = proc.transaction("it", async |_| {
                    calls.add("call");
                    let busy = sqlx::Error::Io(std::io::Error::other("the disk is slow"));
                    if calls.all().len() == 1 {
                        Err(busy).context("reading")?
                    }
                    anyhow::Ok(5)
                });
                Failure::ok(transaction.await?)
            }
        };
        let host = quick(&backend).await.register(IT, function).start().await.unwrap();
        assert_eq!(host.spawn(IT, "it", &()).await.unwrap().output().await.unwrap(), 5);
        assert_eq!(calls.all().len(), 2);
    });
}

/// The log tells of a host's start and end, and of each attempt that fails.
#[test]
fn what_a_service_sees_in_its_log() {
    run(async {
        const IT: Definition<(), ()> = Definition::new("it");
        let it = async |proc: Process, ()| -> Result<(), Failure> {
            let fails = |attempt: Attempt| async move {
                if attempt.number() < 3 {
                    anyhow::bail!("the gateway is away")
                }
                anyhow::Ok(())
            };
            Ok(proc.step("charge", fails).retry(Retry::fixed(Duration::from_millis(1)).max_attempts(3)).await?)
        };
        let host = Host::builder(Memory::new()).label("payments 7").register(IT, it).start().await.unwrap();
        host.spawn(IT, "p-1", &()).await.unwrap().output().await.unwrap();
        host.shutdown(Duration::from_secs(1)).await;
        assert!(logged(&["INFO", "the host has started", "payments 7", "memory", r#"kinds=["it"]"#]));
        for attempt in [1, 2] {
            let attempt = format!("attempt={attempt}");
            assert!(logged(&[
                "WARN",
                "an attempt of \"charge\" failed",
                "the gateway is away",
                "id=p-1",
                &attempt,
                "due at"
            ]));
        }
        assert!(!logged(&["attempt=3"]));
        assert!(logged(&["INFO", "the host is stopping"]) && logged(&["INFO", "the host has stopped"]));
    });
}
