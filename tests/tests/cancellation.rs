//! Cancellation: seen by the process, recorded by its owner before anything acts on it, the same after a crash, out of
//! reach of the compensation. For a process that has not started, waits in memory, is parked, is stuck, is in a step.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Op, RecordKey, Scope, Storage};
use durable_core::*;
use durable_tests::faulty::{Fault, Faulty};
use durable_tests::*;
use serde::{Deserialize, Serialize};
use std::future::{IntoFuture, poll_fn};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const GO: Event<u32> = Event::new("Go");

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
enum OrderError {
    #[error("out of stock")]
    OutOfStock,
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error(transparent)]
    Step(#[from] StepError<Failure>),
}

const ORDER: Definition<(), u32, OrderError> = Definition::new("order");

/// Reserves, waits, ships; whatever comes in between, it releases what it reserved.
async fn order(effects: Effects, proc: Process) -> Result<u32, OrderError> {
    proc.step("reserve", || async { Ok::<_, Failure>(effects.add("reserve")) }).await?;
    let rest = async {
        let n = proc.event(GO).await?;
        if n == 0 {
            return Err(OrderError::OutOfStock);
        }
        proc.step("ship", || async {
            effects.add("ship");
            if n == 13 {
                std::future::pending::<()>().await;
            }
            Ok::<_, Failure>(())
        })
        .retry(Retry::fixed(Duration::from_millis(1)))
        .await?;
        Ok(n)
    };
    match rest.await {
        Ok(n) => Ok(n),
        Err(error) => {
            let undo = proc.compensation();
            // A name that is used outside, too; a wait; a step that a cancellation does not reach.
            undo.step("reserve", || async { Ok::<_, Failure>(effects.add("release")) }).await?;
            undo.delay("breathe", Duration::from_millis(5)).await?;
            undo.step("tell", || async { Ok::<_, Failure>(effects.add("tell")) }).await?;
            Err(error)
        }
    }
}

async fn start<B: Backend>(backend: &B, effects: &Effects) -> Host {
    let effects = effects.clone();
    quick(backend).await.register(ORDER, move |proc, ()| order(effects.clone(), proc)).start().await.unwrap()
}

on_each_backend!(
    before_it_started,
    while_it_waits_in_memory,
    while_it_is_parked,
    while_nobody_runs_it,
    inside_a_step,
    while_it_is_stuck,
    an_ordinary_failure_compensates_too,
    after_a_crash_it_is_still_cancelled,
    success_before_the_cancellation_counts,
    one_that_ignores_it_completes,
    a_race_a_timer_and_a_spawn_are_cancelled,
    a_timer_that_comes_due_while_it_is_being_recorded,
);

async fn ends_cancelled(handle: &Handle<u32, OrderError>) {
    assert_eq!(handle.output().await.unwrap_err(), OutputError::WasCancelled);
    let info = handle.status().await.unwrap();
    assert_eq!(info.status, Status::Cancelled);
    assert!(info.cancel_requested_at.is_some());
}

async fn before_it_started<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let other = quick(&backend).await.start().await.unwrap();
    let handle = other.spawn(ORDER, "o", &()).await.unwrap();
    handle.cancel().await.unwrap();
    ends_cancelled(&handle).await;
    let _host = start(&backend, &effects).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(effects.all().is_empty(), "it never ran");
}

async fn while_it_waits_in_memory<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    let handle = host.spawn(ORDER, "o", &()).await.unwrap();
    // Recorded, not just begun: a step that is cancelled before has not returned.
    let (storage, run) = (backend.storage().await, handle.run().unwrap());
    let key = RecordKey { scope: Scope::Process, name: "reserve".into(), key: "".into() };
    until("it has reserved", async || storage.record(run, &key).await.unwrap().is_some()).await;
    handle.cancel().await.unwrap();
    handle.cancel().await.unwrap();
    ends_cancelled(&handle).await;
    assert_eq!(effects.all(), ["reserve", "release", "tell"]);
    assert!(handle.cancel().await.is_err(), "it has ended");
}

async fn while_it_is_parked<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    let handle = host.spawn(ORDER, "o", &()).await.unwrap();
    until("it is parked", async || host.in_memory() == 0).await;
    // From another instance.
    let other = quick(&backend).await.start().await.unwrap();
    other.get("o").cancel().await.unwrap();
    ends_cancelled(&handle).await;
    assert_eq!(effects.all(), ["reserve", "release", "tell"]);
}

async fn while_nobody_runs_it<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    host.spawn(ORDER, "o", &()).await.unwrap();
    until("it has reserved", async || effects.all().len() == 1).await;
    host.shutdown(Duration::from_secs(1)).await;
    let other = quick(&backend).await.start().await.unwrap();
    other.get("o").cancel().await.unwrap();
    // It has run, so it has to compensate: cancelling waits for somebody who can.
    assert_eq!(other.get("o").status().await.unwrap().status, Status::Waiting);
    let _host = start(&backend, &effects).await;
    ends_cancelled(&other.get("o").of(ORDER)).await;
    assert_eq!(effects.all(), ["reserve", "release", "tell"]);
}

async fn inside_a_step<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    let handle = host.spawn(ORDER, "o", &()).await.unwrap();
    handle.raise(GO, &13).await.unwrap();
    until("it ships", async || effects.count("ship") == 1).await;
    // From another instance, which can only leave a note.
    let other = quick(&backend).await.start().await.unwrap();
    other.get("o").cancel().await.unwrap();
    ends_cancelled(&handle).await;
    assert_eq!(effects.all(), ["reserve", "ship", "release", "tell"], "dropped, and never retried");
}

async fn while_it_is_stuck<B: Backend>() {
    const FAULTY: Definition<(), u32, OrderError> = ORDER;
    let (backend, effects) = (B::new().await, Effects::default());
    let faulty = async |proc: Process, ()| -> Result<u32, OrderError> {
        proc.step("reserve", async || {}).await?;
        panic!("a fault");
    };
    let host = quick(&backend).await.register(FAULTY, faulty).start().await.unwrap();
    let handle = host.spawn(FAULTY, "o", &()).await.unwrap();
    until_status(&handle, Status::Stuck).await;
    handle.cancel().await.unwrap();
    assert_eq!(handle.status().await.unwrap().status, Status::Stuck, "its code cannot compensate");
    host.shutdown(Duration::from_secs(1)).await;
    let host = start(&backend, &effects).await;
    let handle = host.get("o").of(ORDER);
    handle.resume().await.unwrap();
    ends_cancelled(&handle).await;
    assert_eq!(effects.all(), ["release", "tell"]);
}

async fn an_ordinary_failure_compensates_too<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    let handle = host.spawn(ORDER, "o", &()).await.unwrap();
    handle.raise(GO, &0).await.unwrap();
    assert_eq!(handle.output().await.unwrap_err(), OutputError::Failed(OrderError::OutOfStock));
    assert_eq!(effects.all(), ["reserve", "release", "tell"]);
    assert_eq!(handle.status().await.unwrap().status, Status::Failed);
}

async fn after_a_crash_it_is_still_cancelled<B: Backend>() {
    const SLOW: Definition<(), u32, OrderError> = Definition::new("slow");
    let (backend, effects) = (B::new().await, Effects::default());
    let slow = |effects: Effects| {
        move |proc: Process, ()| {
            let effects = effects.clone();
            async move {
                let waited = proc.event(GO).await;
                let undo = proc.compensation();
                undo.step("hang", || async {
                    effects.add("hang");
                    if effects.count("hang") == 1 {
                        std::future::pending::<()>().await;
                    }
                    Ok::<_, Failure>(())
                })
                .await?;
                // An ordinary operation, new after the crash: it fails as it would have before.
                let late = proc.step("late", || async { Ok::<_, Failure>(effects.add("late")) }).await;
                assert_eq!(late.unwrap_err(), StepError::Cancelled(waited.unwrap_err()));
                // A value is none that could be cancelled.
                assert_eq!(proc.get("late value", || 1).await?, 1);
                proc.event(GO).await.map_err(OrderError::from)
            }
        }
    };
    let host = quick(&backend).await.register(SLOW, slow(effects.clone())).start().await.unwrap();
    let handle = host.spawn(SLOW, "s", &()).await.unwrap();
    handle.cancel().await.unwrap();
    until("it compensates", async || effects.count("hang") == 1).await;
    // There now, and too late.
    handle.raise(GO, &1).await.unwrap();
    drop(host);
    let host = quick(&backend).await.register(SLOW, slow(effects.clone())).start().await.unwrap();
    ends_cancelled(&host.get("s").of(SLOW)).await;
    assert_eq!(effects.all(), ["hang", "hang"]);
}

async fn success_before_the_cancellation_counts<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let host = start(&backend, &effects).await;
    // Whichever comes first: the order is shipped and completed, or released and cancelled; never both, never neither.
    for n in 0..40 {
        let handle = host.spawn(ORDER, format!("o-{n}"), &()).await.unwrap();
        let (raised, cancelled) =
            tokio::join!(std::future::IntoFuture::into_future(handle.raise(GO, &1)), handle.cancel());
        drop((raised, cancelled));
        let before = effects.all();
        let output = handle.output().await;
        let status = handle.status().await.unwrap().status;
        match output {
            Ok(1) => assert_eq!(status, Status::Completed),
            Err(OutputError::WasCancelled) => assert_eq!(status, Status::Cancelled),
            other => panic!("{other:?} after {before:?}"),
        }
    }
    assert_eq!(effects.count("release"), effects.count("tell"));
}

async fn one_that_ignores_it_completes<B: Backend>() {
    const STUBBORN: Definition<(), u32> = Definition::new("stubborn");
    let backend = B::new().await;
    let stubborn = async |proc: Process, ()| Ok::<_, Failure>(if proc.event(GO).await.is_err() { 7 } else { 0 });
    let host = quick(&backend).await.register(STUBBORN, stubborn).start().await.unwrap();
    let handle = host.spawn(STUBBORN, "s", &()).await.unwrap();
    handle.cancel().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 7);
    assert_eq!(handle.status().await.unwrap().status, Status::Completed);
}

async fn a_race_a_timer_and_a_spawn_are_cancelled<B: Backend>() {
    const MANY: Definition<(), Vec<String>> = Definition::new("many");
    let backend = B::new().await;
    let many = async |proc: Process, ()| {
        let hour = Duration::from_secs(3600);
        let mut log = vec![];
        let race = proc.race("race").on(proc.event(GO), |_| ()).on(proc.delay("late", hour), |_| ()).await;
        log.push(race.unwrap_err().to_string());
        log.push(proc.delay("timer", hour).await.unwrap_err().to_string());
        log.push(proc.spawn(ORDER, "child", &()).await.unwrap_err().to_string());
        log.push(proc.raise("child", GO, &1).await.unwrap_err().to_string());
        log.push(proc.output(ORDER, "child").await.unwrap_err().to_string());
        // What it notes in answer to the cancellation is noted.
        proc.set("x", 1).await?;
        Ok::<_, Failure>(log)
    };
    let host = quick(&backend).await.register(MANY, many).start().await.unwrap();
    let handle = host.spawn(MANY, "m", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    handle.cancel().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), ["the process was cancelled"; 5]);
    assert_eq!(handle.value("x").await.unwrap(), Some(1));
    assert!(host.get("child").status().await.is_err());
}

/// While the cancellation cannot be recorded, a timer that has come due neither fires nor has the process looked at again
/// and again.
async fn a_timer_that_comes_due_while_it_is_being_recorded<B: Backend>() {
    const TIMER: Definition<(), ()> = Definition::new("timer");
    const SOON: Duration = Duration::from_secs(1);
    const PAUSE: Duration = Duration::from_millis(500);
    let backend = B::new().await;
    // Until it has long been due, by this program's clock.
    let begun = Arc::new(OnceLock::<Instant>::new());
    let since = begun.clone();
    let storage = Faulty::new(backend.storage().await, move |batch| {
        let records = batch.ops.iter().any(|op| matches!(op, Op::AcceptCancel { .. }));
        (records && since.get().is_none_or(|since| since.elapsed() < SOON + PAUSE)).then_some(Fault::Before)
    });
    let polls = Arc::new(AtomicU32::new(0));
    let counted = polls.clone();
    let timer = move |proc: Process, ()| {
        let (polls, begun) = (counted.clone(), begun.clone());
        async move {
            let mut delay = proc.delay("soon", SOON).into_future();
            begun.get_or_init(Instant::now);
            poll_fn(|cx| {
                polls.fetch_add(1, Ordering::Relaxed);
                delay.as_mut().poll(cx)
            })
            .await?;
            Ok::<_, Failure>(())
        }
    };
    let host = Host::builder(storage).register(TIMER, timer).start().await.unwrap();
    let handle = host.spawn(TIMER, "t", &()).await.unwrap();
    until("it waits", async || polls.load(Ordering::Relaxed) > 1).await;
    handle.cancel().await.unwrap();
    assert_eq!(handle.output().await.unwrap_err(), OutputError::WasCancelled);
    let polls = polls.load(Ordering::Relaxed);
    assert!(polls < 100, "polled {polls} times");
}
