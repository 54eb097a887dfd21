//! What each durable operation promises, on every storage.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{RecordKey, RecordState, Scope, Storage};
use durable_core::*;
use durable_tests::*;
use serde::{Deserialize, Serialize};
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);
const PAID: Event<u64> = Event::new("Paid");
const SHIPPED: Event<String> = Event::new("Shipped");

/// A host with one function.
async fn host_with<B, O, F, Fut>(backend: &B, definition: Definition<(), O>, function: F) -> Host
where
    B: Backend,
    O: Serialize + for<'d> Deserialize<'d> + Send + 'static,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<O, Failure>> + Send + 'static,
{
    quick(backend).await.register(definition, move |proc, ()| function(proc)).start().await.unwrap()
}

on_each_backend!(
    messages_wait_in_their_order,
    a_message_is_put_in_once,
    messages_to_nobody_and_to_the_dead,
    a_message_reaches_a_process_wherever_it_is,
    a_receive_that_timed_out_counts_and_one_that_was_dropped_does_not,
    timers_go_on_after_a_crash,
    a_timer_that_nobody_polls,
    values_and_variables,
    retries_survive_a_crash,
    an_error_comes_back_typed,
    any_error_comes_back_as_a_failure,
    a_step_times_out,
    keys_are_stable,
    a_renamed_step,
    a_race_has_one_winner,
    a_handle_of_an_earlier_run,
    what_no_instance_can_run_is_terminated,
    what_does_not_heed_a_cancellation_is_terminated,
    a_failed_process_goes_on_where_it_failed,
    what_was_compensated_is_not_resumed,
    retries_in_a_race_are_counted_over_parks_and_crashes,
    a_step_that_loses_is_signalled,
    a_dropped_step_is_attempted_again,
    an_operation_dropped_while_it_is_recorded,
    a_receive_dropped_while_it_is_recorded,
    a_race_beside_a_receive_after_one_that_was_dropped,
    a_timed_receive_that_was_dropped_leaves_no_deadline,
    two_that_ask_for_one_value,
    a_message_as_large_as_allowed,
    wakers_of_operations_that_are_gone,
    spawning_is_idempotent,
    restarting_makes_a_new_run,
    processes_talk_to_processes,
    a_waiting_process_is_a_row,
    what_holds_a_waker_stays_in_memory,
    namespaces_do_not_see_each_other,
    outputs_of_others,
);

async fn messages_wait_in_their_order<B: Backend>() {
    const SUM: Definition<(), Vec<String>> = Definition::new("sum");
    let backend = B::new().await;
    let host = host_with(&backend, SUM, async |proc: Process| {
        let mut log = Vec::new();
        for _ in 0..3 {
            log.push(proc.event(PAID).await?.to_string());
        }
        log.push(proc.event(SHIPPED).await?);
        Ok(log)
    })
    .await;
    let handle = host.spawn(SUM, "s", &()).await.unwrap();
    handle.raise(SHIPPED, &"by sea".to_owned()).await.unwrap();
    for cents in [1, 2, 3] {
        handle.raise(PAID, &cents).await.unwrap();
    }
    assert_eq!(handle.output().await.unwrap(), ["1", "2", "3", "by sea"]);
}

async fn a_message_is_put_in_once<B: Backend>() {
    const TWO: Definition<(), (u64, u64)> = Definition::new("two");
    let backend = B::new().await;
    let host =
        host_with(&backend, TWO, async |proc: Process| Ok((proc.event(PAID).await?, proc.event(PAID).await?))).await;
    let handle = host.spawn(TWO, "t", &()).await.unwrap();
    for _ in 0..3 {
        handle.raise(PAID, &1).id("first").await.unwrap();
    }
    handle.raise(PAID, &2).id("second").await.unwrap();
    assert_eq!(handle.output().await.unwrap(), (1, 2));
    // Accepted before the end: no error after it.
    handle.raise(PAID, &1).id("first").await.unwrap();
    let error = handle.raise(PAID, &1).id("third").await.unwrap_err();
    assert!(matches!(error, RaiseError::Finished { .. }), "{error}");
}

async fn messages_to_nobody_and_to_the_dead<B: Backend>() {
    const NOTHING: Definition<(), ()> = Definition::new("nothing");
    let backend = B::new().await;
    let host = host_with(&backend, NOTHING, async |_| Ok(())).await;
    let error = host.get("nobody").raise(PAID, &1).await.unwrap_err();
    assert_eq!(error, RaiseError::NotFound { id: "nobody".into() });
    let handle = host.spawn(NOTHING, "n", &()).await.unwrap();
    handle.output().await.unwrap();
    let error = handle.raise(PAID, &1).await.unwrap_err();
    assert_eq!(error.to_string(), "process \"n\" has ended");
    assert!(matches!(host.get("nobody").status().await, Err(HandleError::NotFound { .. })));
    assert!(matches!(host.get("nobody").output().await, Err(OutputError::NotFound(_))));
    assert!(matches!(host.get("nobody").cancel().await, Err(HandleError::NotFound { .. })));
}

async fn a_message_reaches_a_process_wherever_it_is<B: Backend>() {
    const FOUR: Definition<(), u64> = Definition::new("four");
    let backend = B::new().await;
    let function = async |proc: Process| {
        let mut sum = 0;
        for _ in 0..4 {
            sum += proc.event(PAID).await?;
        }
        Ok(sum)
    };
    // A host that cannot run it: it waits in the database.
    let other = quick(&backend).await.start().await.unwrap();
    let handle = other.spawn(FOUR, "f", &()).await.unwrap();
    handle.raise(PAID, &1).await.unwrap();
    assert_eq!(handle.status().await.unwrap().status, Status::Waiting);
    // In memory on another instance, from here; then parked there.
    let host = host_with(&backend, FOUR, function).await;
    until("it runs", async || handle.status().await.unwrap().execution > 0).await;
    handle.raise(PAID, &10).await.unwrap();
    until("it is parked", async || host.in_memory() == 0).await;
    assert!(handle.status().await.unwrap().waiting_for.unwrap().contains("event \"Paid\""));
    handle.raise(PAID, &100).await.unwrap();
    until("it is parked", async || host.in_memory() == 0).await;
    // While nobody lives who could run it.
    host.shutdown(Duration::from_secs(1)).await;
    handle.raise(PAID, &1000).await.unwrap();
    let _host = host_with(&backend, FOUR, function).await;
    assert_eq!(handle.output().await.unwrap(), 1111);
}

async fn a_receive_that_timed_out_counts_and_one_that_was_dropped_does_not<B: Backend>() {
    const MIXED: Definition<(), Vec<Option<u64>>> = Definition::new("mixed");
    let backend = B::new().await;
    let host = host_with(&backend, MIXED, async |proc: Process| {
        let mut log = vec![proc.event(PAID).timeout(5 * MS).await?];
        // Given up: it takes nothing, and counts for nothing.
        tokio::select! {
            biased;
            _ = std::future::IntoFuture::into_future(proc.event(SHIPPED)) => unreachable!(),
            _ = std::future::IntoFuture::into_future(proc.delay("soon", 5 * MS)) => {}
        }
        log.push(proc.event(PAID).timeout(Duration::from_secs(60)).await?);
        log.push(Some(proc.event(PAID).await?));
        proc.event(SHIPPED).await?;
        Ok(log)
    })
    .await;
    let handle = host.spawn(MIXED, "m", &()).await.unwrap();
    until("it timed out", async || handle.status().await.unwrap().waiting_for.is_some_and(|w| w.contains("Paid")))
        .await;
    tokio::time::sleep(20 * MS).await;
    for cents in [7, 8] {
        handle.raise(PAID, &cents).await.unwrap();
    }
    handle.raise(SHIPPED, "x").await.unwrap();
    assert_eq!(handle.output().await.unwrap(), [None, Some(7), Some(8)]);
}

async fn timers_go_on_after_a_crash<B: Backend>() {
    const WAIT: Definition<(), Delayed> = Definition::new("wait");
    let backend = B::new().await;
    let function = async |proc: Process| Ok(proc.delay("a while", 300 * MS).await?);
    let host = host_with(&backend, WAIT, function).await;
    let started = chrono::Utc::now();
    let handle = host.spawn(WAIT, "w", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().next_wake.is_some()).await;
    let due = handle.status().await.unwrap().next_wake.unwrap();
    drop(host);
    // Nobody lives when it comes due.
    tokio::time::sleep(400 * MS).await;
    let host = host_with(&backend, WAIT, function).await;
    let delayed = host.get("w").of(WAIT).output().await.unwrap();
    assert_eq!(delayed.due, due);
    let after = delayed.due - started;
    assert!((250..2000).contains(&after.num_milliseconds()), "{after}");
    assert!(delayed.woke >= delayed.due && delayed.on_time());
}

/// A timer that comes due while the function goes on in another branch wakes it once, and is there when it is asked.
async fn a_timer_that_nobody_polls<B: Backend>() {
    const BUSY: Definition<(), String> = Definition::new("busy");
    let backend = B::new().await;
    let polls = Arc::new(AtomicU32::new(0));
    let counted = polls.clone();
    let function = move |proc: Process| {
        let polls = counted.clone();
        async move {
            let mut timer = std::pin::pin!(proc.delay("remind", 50 * MS).into_future());
            let mut shipped = Vec::new();
            loop {
                tokio::select! {
                    biased;
                    event = proc.event(SHIPPED).into_future() => shipped.push(event?),
                    due = &mut timer => {
                        due?;
                        return Ok::<_, Failure>(shipped.join(" "));
                    }
                }
                let slow = || async {
                    let mut slow = std::pin::pin!(tokio::time::sleep(500 * MS));
                    std::future::poll_fn(|cx| {
                        polls.fetch_add(1, Ordering::Relaxed);
                        slow.as_mut().poll(cx)
                    })
                    .await;
                    Ok::<_, Failure>(())
                };
                proc.step(("slow", shipped.len()), slow).await?;
            }
        }
    };
    let host = host_with(&backend, BUSY, function).await;
    let handle = host.spawn(BUSY, "busy", &()).await.unwrap();
    handle.raise(SHIPPED, &"one".to_owned()).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), "one");
    let polls = polls.load(Ordering::Relaxed);
    assert!(polls < 20, "it was polled {polls} times while it waited");
}

async fn values_and_variables<B: Backend>() {
    const VALUES: Definition<(), Vec<u32>> = Definition::new("values");
    let backend = B::new().await;
    let runs = Arc::new(AtomicU32::new(0));
    let function = {
        let runs = runs.clone();
        move |proc: Process| {
            let runs = runs.clone();
            async move {
                let run = runs.fetch_add(1, Ordering::SeqCst);
                let mut log = Vec::new();
                // Made once; after the crash it is the last committed value, even one set further down.
                log.push(proc.get("value", || 1).await?);
                log.push(proc.get("fixed", || 10 + run).await?);
                // Unkeyed, it writes again on resume; keyed, it does not.
                proc.set("value", 2 + run).await?;
                proc.set(("keyed", "k"), 20 + run).await?;
                proc.event(PAID).await?;
                log.push(proc.get("value", || 99).await?);
                log.push(proc.get(("keyed", "k"), || 99).await?);
                log.push(proc.get("keyed", || 77).await?);
                Ok(log)
            }
        }
    };
    let host = host_with(&backend, VALUES, function.clone()).await;
    let handle = host.spawn(VALUES, "v", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    assert_eq!(handle.value::<u32>("value").await.unwrap(), Some(2));
    let error = handle.value::<String>("value").await.unwrap_err().to_string();
    assert!(error.contains("\"value\"") && error.contains("String") && error.contains("a number"), "{error}");
    drop(host);
    let host = host_with(&backend, VALUES, function).await;
    let handle = host.get("v").of(VALUES);
    handle.raise(PAID, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), [2, 10, 3, 20, 77]);
}

async fn retries_survive_a_crash<B: Backend>() {
    const RETRY: Definition<(), u32> = Definition::new("retry");
    let backend = B::new().await;
    let attempts = Effects::default();
    let function = {
        let attempts = attempts.clone();
        move |proc: Process| {
            let attempts = attempts.clone();
            async move {
                Ok(proc
                    .step("flaky", |attempt: Attempt| {
                        attempts.add(attempt.number().to_string());
                        async move { if attempt.number() < 4 { Err(Failure::new("no")) } else { Ok(attempt.number()) } }
                    })
                    .retry(Retry::fixed(150 * MS).max_attempts(4))
                    .await?)
            }
        }
    };
    let host = host_with(&backend, RETRY, function.clone()).await;
    let handle = host.spawn(RETRY, "r", &()).await.unwrap();
    // The back-off is longer than the quiet time: it parks.
    until("two attempts", async || attempts.all().len() == 2).await;
    until("it is parked", async || host.in_memory() == 0).await;
    assert!(handle.status().await.unwrap().waiting_for.unwrap().contains("retry of step \"flaky\""));
    drop(host);
    let host = host_with(&backend, RETRY, function).await;
    assert_eq!(host.get("r").of(RETRY).output().await.unwrap(), 4);
    assert_eq!(attempts.all(), ["1", "2", "3", "4"]);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
enum Declined {
    #[error("{cents} cents short")]
    Short { cents: u64 },
    #[error("blocked")]
    Blocked,
}

async fn an_error_comes_back_typed<B: Backend>() {
    const TYPED: Definition<(), (u64, u32)> = Definition::new("typed");
    let backend = B::new().await;
    let runs = Arc::new(AtomicU32::new(0));
    let function = {
        let runs = runs.clone();
        move |proc: Process| {
            let runs = runs.clone();
            async move {
                let charge = proc
                    .step("charge", || async { Err::<(), _>(Declined::Short { cents: 5 }) })
                    .typed()
                    .retry(Retry::fixed(MS).max_attempts(3))
                    .retry_if(|error| *error == Declined::Blocked)
                    .await;
                if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                    proc.event(PAID).await?;
                }
                match charge.unwrap_err() {
                    StepError::Failed(Declined::Short { cents }) => Ok((cents, runs.load(Ordering::SeqCst))),
                    other => Err(other.into()),
                }
            }
        }
    };
    let host = host_with(&backend, TYPED, function.clone()).await;
    host.spawn(TYPED, "t", &()).await.unwrap();
    until("it waits", async || host.get("t").status().await.unwrap().waiting_for.is_some()).await;
    drop(host);
    let host = host_with(&backend, TYPED, function).await;
    // Whatever wakes it: it is a row.
    host.get("t").raise(PAID, &1).await.unwrap();
    assert_eq!(host.get("t").of(TYPED).output().await.unwrap(), (5, 2));
}

#[derive(Debug, thiserror::Error)]
#[error("outer")]
struct Outer(#[source] std::num::ParseIntError);

async fn any_error_comes_back_as_a_failure<B: Backend>() {
    const FAILS: Definition<(), ()> = Definition::new("fails");
    let backend = B::new().await;
    let host = host_with(&backend, FAILS, async |proc: Process| {
        let failing = || async { Err::<(), _>(Outer("x".parse::<u8>().unwrap_err())) };
        let error = proc.step("parse", failing).await.unwrap_err();
        assert!(error.failed().unwrap().type_name().ends_with("Outer"));
        Err(error.into())
    })
    .await;
    let handle = host.spawn(FAILS, "f", &()).await.unwrap();
    let OutputError::Failed(failure) = handle.output().await.unwrap_err() else { panic!() };
    assert_eq!(failure.message(), "outer");
    assert_eq!(failure.sources().collect::<Vec<_>>(), ["invalid digit found in string"]);
    let info = handle.status().await.unwrap();
    assert_eq!((info.status, info.reason.as_deref()), (Status::Failed, Some("outer")));
}

async fn a_step_times_out<B: Backend>() {
    const SLOW: Definition<(), u32> = Definition::new("slow");
    let backend = B::new().await;
    let host = host_with(&backend, SLOW, async |proc: Process| {
        let tokens = std::sync::Mutex::new(Vec::new());
        let result = proc
            .step("slow", |attempt: Attempt| {
                tokens.lock().unwrap().push(attempt.cancel());
                std::future::pending::<Result<(), Failure>>()
            })
            .timeout(5 * MS)
            .retry(Retry::fixed(MS).max_attempts(3))
            .await;
        assert_eq!(result, Err(StepError::TimedOut(5 * MS)));
        let tokens = tokens.into_inner().unwrap();
        assert!(tokens.iter().all(CancelToken::is_cancelled));
        Ok(tokens.len() as u32)
    })
    .await;
    assert_eq!(host.spawn(SLOW, "s", &()).await.unwrap().output().await.unwrap(), 3);
}

async fn keys_are_stable<B: Backend>() {
    const KEYS: Definition<(), Vec<String>> = Definition::new("keys");
    let backend = B::new().await;
    let seen = Effects::default();
    let function = {
        let seen = seen.clone();
        move |proc: Process| {
            let seen = seen.clone();
            async move {
                let key = |attempt: Attempt| async move { Ok::<_, Failure>(attempt.key().to_string()) };
                let mut keys = vec![
                    proc.step("a", key).await?,
                    proc.step(("a", "b"), key).await?,
                    proc.step("ab", key).await?,
                    proc.compensation().step("a", key).await?,
                ];
                keys.push(
                    proc.step("cut off", |attempt: Attempt| {
                        seen.add(attempt.key().to_string());
                        let first = seen.all().len() == 1;
                        async move {
                            if first {
                                std::future::pending::<()>().await;
                            }
                            Ok::<_, Failure>(attempt.key().to_string())
                        }
                    })
                    .await?,
                );
                Ok(keys)
            }
        }
    };
    let host = host_with(&backend, KEYS, function.clone()).await;
    host.spawn(KEYS, "k", &()).await.unwrap();
    until("the first attempt", async || seen.all().len() == 1).await;
    drop(host);
    let host = host_with(&backend, KEYS, function).await;
    let keys = host.get("k").of(KEYS).output().await.unwrap();
    let different: std::collections::HashSet<_> = keys.iter().collect();
    assert_eq!(different.len(), 5, "{keys:?}");
    assert_eq!(seen.all(), [keys[4].clone(), keys[4].clone()], "the attempt that was cut off had the same");
    let again = host.spawn(KEYS, "k", &()).restart_finished().await.unwrap().output().await.unwrap();
    assert!(again.iter().all(|key| !keys.contains(key)), "a restarted run has others");
}

async fn a_renamed_step<B: Backend>() {
    const RENAMED: Definition<(), u32> = Definition::new("renamed");
    let backend = B::new().await;
    let effects = Effects::default();
    let old = {
        let effects = effects.clone();
        move |proc: Process| {
            let effects = effects.clone();
            async move {
                proc.step("old", || async { Ok::<_, Failure>(effects.add("old")) }).await?;
                proc.event(PAID).await?;
                Ok(0)
            }
        }
    };
    let host = host_with(&backend, RENAMED, old).await;
    let handle = host.spawn(RENAMED, "r", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    host.shutdown(MS).await;
    let new = {
        let effects = effects.clone();
        move |proc: Process| {
            let effects = effects.clone();
            async move {
                proc.step("new", || async { Ok::<_, Failure>(effects.add("new")) }).was("old").await?;
                proc.event(PAID).await?;
                Ok(1)
            }
        }
    };
    let host = host_with(&backend, RENAMED, new).await;
    let handle = host.get("r").of(RENAMED);
    handle.raise(PAID, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(effects.all(), ["old"]);
}

const WAIT: Definition<u64, u64> = Definition::new("wait");

async fn wait(proc: Process, least: u64) -> Result<u64, Failure> {
    Ok(proc.event(PAID).await?.max(least))
}

/// It orders nothing of the run that came after its own.
async fn a_handle_of_an_earlier_run<B: Backend>() {
    let backend = B::new().await;
    let host = quick(&backend).await.register(WAIT, wait).start().await.unwrap();
    let first = host.spawn(WAIT, "w", &1).await.unwrap();
    first.raise(PAID, &1).await.unwrap();
    first.output().await.unwrap();
    let second = host.spawn(WAIT, "w", &2).restart_finished().await.unwrap();
    for refused in [first.cancel().await, first.terminate("by hand").await, first.resume().await] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, HandleError::Status { status: Status::Completed, .. }), "{refused:?}");
    }
    first.delete().await.unwrap();
    assert!(matches!(first.status().await, Err(HandleError::NotFound { .. })));
    assert!(matches!(first.cancel().await, Err(HandleError::NotFound { .. })));
    second.raise(PAID, &3).await.unwrap();
    assert_eq!(second.output().await.unwrap(), 3);
    second.delete().await.unwrap();
    assert!(host.get("w").status().await.is_err());
}

/// Of a kind whose code is gone.
async fn what_no_instance_can_run_is_terminated<B: Backend>() {
    const PARENT: Definition<(), bool> = Definition::new("parent");
    let backend = B::new().await;
    let old = quick(&backend).await.register(WAIT, wait).start().await.unwrap();
    let handle = old.spawn(WAIT, "w", &1).await.unwrap();
    until_status(&handle, Status::Waiting).await;
    old.shutdown(Duration::from_secs(5)).await;
    let parent = async |proc: Process, ()| {
        let output = proc.output(WAIT, "w").await;
        Ok::<_, Failure>(matches!(output, Err(OutputError::WasCancelled)))
    };
    let host = quick(&backend).await.register(PARENT, parent).start().await.unwrap();
    let parent = host.spawn(PARENT, "parent", &()).await.unwrap();
    until_status(&parent, Status::Waiting).await;
    let handle = host.get("w").of(WAIT);
    handle.cancel().await.unwrap();
    assert!(matches!(handle.delete().await, Err(HandleError::Status { .. })));
    handle.terminate("the import is gone").await.unwrap();
    let info = handle.status().await.unwrap();
    assert_eq!((info.status, info.reason.as_deref()), (Status::Cancelled, Some("the import is gone")));
    assert!(matches!(handle.output().await, Err(OutputError::WasCancelled)));
    assert!(parent.output().await.unwrap());
    assert!(matches!(handle.terminate("again").await, Err(HandleError::Status { status: Status::Cancelled, .. })));
    handle.delete().await.unwrap();
    assert!(handle.status().await.is_err());
}

/// Its code hangs outside of durable operations; it is dropped.
async fn what_does_not_heed_a_cancellation_is_terminated<B: Backend>() {
    let backend = B::new().await;
    let hangs = async |proc: Process, least: u64| {
        proc.step("begin", async || Ok::<_, Failure>(())).await?;
        std::future::pending::<()>().await;
        Ok::<_, Failure>(least)
    };
    let host = quick(&backend).await.register(WAIT, hangs).quiet_time(Duration::from_secs(3600)).start().await.unwrap();
    let other = quick(&backend).await.start().await.unwrap();
    for (id, by) in [("own", &host), ("others", &other)] {
        host.spawn(WAIT, id, &1).await.unwrap();
        until("it hangs", async || host.in_memory() == 1).await;
        let handle = by.get(id).of(WAIT);
        handle.cancel().await.unwrap();
        handle.terminate("it hangs").await.unwrap();
        assert!(matches!(handle.output().await, Err(OutputError::WasCancelled)));
        if std::ptr::eq(by, &host) {
            until("it is dropped", async || host.in_memory() == 0).await;
        }
    }
}

/// A step that fails while the flag is set.
async fn flaky(effects: &Effects, down: &AtomicBool, proc: &Process, name: &'static str) -> Result<(), Failure> {
    let call = || async {
        effects.add(name);
        if down.load(Ordering::SeqCst) { Err(Failure::new(format!("{name} is down"))) } else { Ok(()) }
    };
    Ok(proc.step(name, call).await?)
}

/// The failure that ended it happens again, and those beside it; what the code has dealt with does not.
async fn a_failed_process_goes_on_where_it_failed<B: Backend>() {
    const ORDER: Definition<(), u32> = Definition::new("order");
    let backend = B::new().await;
    let effects = Effects::default();
    let (down, old) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(true)));
    let function = {
        let (effects, down) = (effects.clone(), down.clone());
        move |proc: Process, ()| {
            let (effects, down, old) = (effects.clone(), down.clone(), old.clone());
            async move {
                if flaky(&effects, &old, &proc, "old carrier").await.is_err() {
                    proc.step("new carrier", async || Ok::<_, Failure>(effects.add("new carrier"))).await?;
                }
                let (ship, bill) =
                    tokio::join!(flaky(&effects, &down, &proc, "ship"), flaky(&effects, &down, &proc, "bill"));
                ship.and(bill)?;
                Ok::<_, Failure>(1)
            }
        }
    };
    let host = quick(&backend).await.register(ORDER, function).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..3 {
        handles.push(host.spawn(ORDER, format!("o-{n}"), &()).await.unwrap());
        handles[n].output().await.unwrap_err();
    }
    // Still down: it fails again.
    handles[0].resume().await.unwrap();
    assert_eq!(handles[0].output().await.unwrap_err().to_string(), "ship is down");
    assert_eq!(effects.count("ship"), 4);
    down.store(false, Ordering::SeqCst);
    handles[0].resume().await.unwrap();
    assert_eq!(handles[0].output().await.unwrap(), 1);
    assert_eq!((effects.count("ship"), effects.count("bill")), (5, 5));
    assert_eq!(host.processes().kind(ORDER).resume_failed().await.unwrap(), 2);
    for handle in &handles {
        assert_eq!(handle.output().await.unwrap(), 1);
    }
    assert_eq!((effects.count("old carrier"), effects.count("new carrier")), (3, 3));
    assert_eq!((effects.count("ship"), effects.count("bill")), (7, 7));
}

/// Never shipped and given back at once.
async fn what_was_compensated_is_not_resumed<B: Backend>() {
    const ORDER: Definition<(), u32> = Definition::new("order");
    let backend = B::new().await;
    let effects = Effects::default();
    let down = Arc::new(AtomicBool::new(true));
    let function = {
        let (effects, down) = (effects.clone(), down.clone());
        move |proc: Process, ()| {
            let (effects, down) = (effects.clone(), down.clone());
            async move {
                proc.step("hold", async || Ok::<_, Failure>(effects.add("hold"))).await?;
                if let Err(error) = flaky(&effects, &down, &proc, "ship").await {
                    let release = async || Ok::<_, Failure>(effects.add("release"));
                    proc.compensation().step("release", release).await?;
                    return Err(error);
                }
                Ok::<_, Failure>(1)
            }
        }
    };
    let host = quick(&backend).await.register(ORDER, function).start().await.unwrap();
    let handle = host.spawn(ORDER, "o", &()).await.unwrap();
    handle.output().await.unwrap_err();
    down.store(false, Ordering::SeqCst);
    for refused in [handle.resume().await, handle.resume().forget("ship").await] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, HandleError::Compensated { .. }), "{refused:?}");
        assert!(refused.to_string().contains("restart_finished"), "{refused}");
    }
    assert_eq!(host.processes().resume_failed().await.unwrap(), 0);
    assert_eq!(effects.all(), ["hold", "ship", "release"]);
    let again = host.spawn(ORDER, "o", &()).restart_finished().await.unwrap();
    assert_eq!(again.output().await.unwrap(), 1);
    assert_eq!(effects.all(), ["hold", "ship", "release", "hold", "ship"]);
}

/// As many attempts as were asked for, each with its number, whatever comes between them.
async fn retries_in_a_race_are_counted_over_parks_and_crashes<B: Backend>() {
    const CALL: Definition<(), bool> = Definition::new("call");
    const PAUSE: Duration = Duration::from_millis(300);
    let backend = B::new().await;
    let numbers = Effects::default();
    let counted = numbers.clone();
    let function = move |proc: Process, ()| {
        let numbers = counted.clone();
        async move {
            let call = |name: &'static str| {
                let numbers = numbers.clone();
                proc.step(name, move |attempt: Attempt| {
                    numbers.add(format!("{name} {}", attempt.number()));
                    async { Err::<(), _>(Failure::new("down")) }
                })
                .retry(Retry::fixed(PAUSE).max_attempts(3))
            };
            let race = proc.race("call or late").on(call("call"), |r| r.is_err());
            let race = race.on(call("other"), |r| r.is_err());
            Ok::<_, Failure>(race.on(proc.delay("late", Duration::from_secs(3600)), |_| false).await?)
        }
    };
    let start = async || quick(&backend).await.quiet_time(PAUSE / 30).register(CALL, function.clone()).start().await;
    let host = start().await.unwrap();
    let handle = host.spawn(CALL, "c", &()).await.unwrap();
    until("it has failed once, and has parked", async || {
        numbers.all().len() == 2 && handle.status().await.unwrap().status == Status::Waiting
    })
    .await;
    drop(host);
    let host = start().await.unwrap();
    assert!(host.get("c").of(CALL).output().await.unwrap(), "the call that failed wins");
    let mut numbers = numbers.all();
    numbers.sort();
    // The loser may have been called for the last time, too.
    assert_eq!(numbers[..5], ["call 1", "call 2", "call 3", "other 1", "other 2"]);
    assert!(numbers.len() == 5 || numbers[5..] == ["other 3"], "{numbers:?}");
}

async fn a_race_has_one_winner<B: Backend>() {
    const RACE: Definition<(), Vec<String>> = Definition::new("race");
    let backend = B::new().await;
    let function = async |proc: Process| {
        let mut log = Vec::new();
        for round in 0..2 {
            log.push(
                proc.race(("round", round))
                    .on(proc.event(PAID), |cents| format!("paid {cents}"))
                    .on(proc.event(SHIPPED), |how| format!("shipped {how}"))
                    .on(proc.delay(("late", round), Duration::from_secs(3600)), |_| "late".into())
                    .await?,
            );
        }
        // The first race's loser consumed nothing.
        log.push(proc.event(PAID).await?.to_string());
        proc.event(SHIPPED).timeout(Duration::from_secs(3600)).await?;
        Ok(log)
    };
    let host = host_with(&backend, RACE, function).await;
    let handle = host.spawn(RACE, "r", &()).await.unwrap();
    until("it is parked", async || host.in_memory() == 0 && handle.status().await.unwrap().next_wake.is_some()).await;
    handle.raise(SHIPPED, &"by air".to_owned()).await.unwrap();
    until("the second round", async || {
        host.in_memory() == 0 && handle.status().await.unwrap().waiting_for.is_some_and(|w| w.contains("key \"1\""))
    })
    .await;
    for cents in [1, 2] {
        handle.raise(PAID, &cents).await.unwrap();
    }
    until("the last receive", async || {
        handle.status().await.unwrap().waiting_for.is_some_and(|w| w == "event \"Shipped\"".into())
    })
    .await;
    drop(host);
    // The same branches after a crash.
    let host = host_with(&backend, RACE, function).await;
    let handle = host.get("r").of(RACE);
    handle.raise(SHIPPED, &"x".to_owned()).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), ["shipped by air", "paid 1", "2"]);
}

async fn a_step_that_loses_is_signalled<B: Backend>() {
    const LOSER: Definition<(), bool> = Definition::new("loser");
    let backend = B::new().await;
    let host = host_with(&backend, LOSER, async |proc: Process| {
        let token = std::sync::Mutex::new(None);
        let won = proc
            .race("race")
            .on(
                proc.step("slow", |attempt: Attempt| {
                    *token.lock().unwrap() = Some(attempt.cancel());
                    std::future::pending::<Result<(), Failure>>()
                }),
                |_| false,
            )
            .on(proc.delay("soon", 10 * MS), |_| true)
            .await?;
        let cancelled = token.lock().unwrap().as_ref().is_some_and(CancelToken::is_cancelled);
        // Not recorded: its name is free.
        proc.step("slow", || async { Ok::<_, Failure>(()) }).await?;
        Ok(won && cancelled)
    })
    .await;
    assert!(host.spawn(LOSER, "l", &()).await.unwrap().output().await.unwrap());
}

async fn a_dropped_step_is_attempted_again<B: Backend>() {
    const DROPPED: Definition<(), (u32, bool)> = Definition::new("dropped");
    let backend = B::new().await;
    let host = host_with(&backend, DROPPED, async |proc: Process| {
        let mut keys = Vec::new();
        {
            let step = proc.step("step", |attempt: Attempt| {
                keys.push(attempt.key());
                std::future::pending::<Result<u32, Failure>>()
            });
            let _ = tokio::time::timeout(10 * MS, std::future::IntoFuture::into_future(step)).await;
        }
        let value = proc
            .step("step", |attempt: Attempt| {
                keys.push(attempt.key());
                async move { Ok::<_, Failure>(attempt.number()) }
            })
            .await?;
        Ok((value, keys[0] == keys[1]))
    })
    .await;
    assert_eq!(host.spawn(DROPPED, "d", &()).await.unwrap().output().await.unwrap(), (1, true));
}

async fn an_operation_dropped_while_it_is_recorded<B: Backend>() {
    const DROPPED: Definition<(), u32> = Definition::new("dropped");
    let backend = B::new().await;
    let effects = Effects::default();
    let counted = effects.clone();
    let host =
        host_with(&backend, DROPPED, move |proc: Process| {
            let effects = counted.clone();
            async move {
                let mut dropped = 0;
                for n in 0..40 {
                    let step = |proc: &Process| {
                        let effects = effects.clone();
                        let proc = proc.clone();
                        async move {
                            proc.step(("step", n), || async { Ok::<_, Failure>(effects.add(n.to_string())) }).await
                        }
                    };
                    // Polled until the effect has happened: then its record is on its way, and it is dropped.
                    let mut returned = false;
                    {
                        let mut first = std::pin::pin!(step(&proc));
                        while effects.count(&n.to_string()) == 0 {
                            returned |= futures_util::poll!(first.as_mut()).is_ready();
                            tokio::task::yield_now().await;
                        }
                    }
                    // The writer may have been faster than the poll that sent the record.
                    if !returned {
                        dropped += 1;
                        // The next use returns that record, and does not hang.
                        step(&proc).await?;
                    }
                }
                Ok(dropped)
            }
        })
        .await;
    assert!(host.spawn(DROPPED, "d", &()).await.unwrap().output().await.unwrap() > 0);
    assert_eq!(effects.all().len(), 40, "each once");
}

async fn a_receive_dropped_while_it_is_recorded<B: Backend>() {
    dropped_while_they_are_recorded::<B>(false).await;
}

async fn a_race_beside_a_receive_after_one_that_was_dropped<B: Backend>() {
    dropped_while_they_are_recorded::<B>(true).await;
}

/// Each dropped receive is followed by a race and another receive, at the same time or one after the other.
async fn dropped_while_they_are_recorded<B: Backend>(together: bool) {
    const DROPPED: Definition<(), (usize, Vec<u64>)> = Definition::new("dropped");
    const ROUNDS: u64 = 30;
    let backend = B::new().await;
    let function = move |proc: Process| async move {
        let (mut dropped, mut log) = (0, Vec::new());
        proc.event(SHIPPED).await?;
        for n in 0..ROUNDS {
            // A function that drops a receive does not do the same again after a crash, so it notes what it did.
            let mut returned = false;
            if proc.execution() == 1 {
                let mut first = std::pin::pin!(std::future::IntoFuture::into_future(proc.event(PAID)));
                if let std::task::Poll::Ready(paid) = futures_util::poll!(first.as_mut()) {
                    returned = true;
                    log.push(paid?);
                }
            }
            if proc.get(("returned", n), || returned).await? {
                if proc.execution() > 1 {
                    log.push(proc.event(PAID).await?);
                }
            } else {
                dropped += 1;
                let race = proc.race(("first", n)).on(proc.event(PAID), |paid| paid);
                if together {
                    // Without a deadline to be recorded, it has its message at its first poll.
                    let (first, second) = tokio::join!(biased; race.into_future(), proc.event(PAID).into_future());
                    log.extend([first?, second?]);
                    continue;
                }
                log.push(race.on(proc.delay(("late", n), Duration::from_secs(3600)), |_| u64::MAX).await?);
            }
            log.push(proc.event(PAID).await?);
        }
        proc.event(SHIPPED).await?;
        Ok((dropped, log))
    };
    let host = host_with(&backend, DROPPED, function).await;
    let handle = host.spawn(DROPPED, "d", &()).await.unwrap();
    for n in 0..2 * ROUNDS {
        handle.raise(PAID, &n).await.unwrap();
    }
    handle.raise(SHIPPED, "go").await.unwrap();
    until("it is through", async || {
        handle.value::<bool>(("returned", ROUNDS - 1)).await.unwrap().is_some()
            && handle.status().await.unwrap().waiting_for.is_some_and(|what| what.contains("Shipped"))
    })
    .await;
    drop(host);
    let host = host_with(&backend, DROPPED, function).await;
    let handle = host.get("d").of(DROPPED);
    handle.raise(SHIPPED, "end").await.unwrap();
    let (dropped, log) = handle.output().await.unwrap();
    assert!(dropped > 0);
    assert_eq!(log, (0..2 * ROUNDS).collect::<Vec<_>>(), "each once, in order, in both executions");
}

async fn a_timed_receive_that_was_dropped_leaves_no_deadline<B: Backend>() {
    const DROPPED: Definition<(), (u64, u64)> = Definition::new("dropped");
    let backend = B::new().await;
    // What decides a `select!` is not recorded, so it stays in memory here.
    let host = quick(&backend).await.quiet_time(Duration::from_secs(3600));
    let function = |proc: Process, ()| async move {
        let drop_one = async |n: u32| {
            tokio::select! {
                biased;
                _ = std::future::IntoFuture::into_future(proc.delay(("soon", n), 20 * MS)) => {}
                _ = std::future::IntoFuture::into_future(proc.event(PAID).timeout(100 * MS)) => unreachable!(),
            }
        };
        drop_one(0).await;
        proc.delay("later", 200 * MS).await?;
        let first = proc.event(PAID).timeout(Duration::from_secs(3600)).await?;
        drop_one(1).await;
        proc.delay("much later", 200 * MS).await?;
        Ok::<_, Failure>((first.unwrap_or(0), proc.event(PAID).await?))
    };
    let host = host.register(DROPPED, function).start().await.unwrap();
    let handle = host.spawn(DROPPED, "d", &()).await.unwrap();
    let storage = backend.storage().await;
    let run = handle.status().await.unwrap().run;
    let passed = async |name: &str| {
        let key = RecordKey { scope: Scope::Process, name: name.into(), key: "".into() };
        storage.record(run, &key).await.unwrap().is_some_and(|record| record.state == RecordState::Done)
    };
    until("the first deadline has passed", async || passed("later").await).await;
    handle.raise(PAID, &1).await.unwrap();
    until("the second one, too", async || passed("much later").await).await;
    handle.raise(PAID, &2).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), (1, 2));
}

async fn two_that_ask_for_one_value<B: Backend>() {
    const TWO: Definition<(), (u32, u32, Vec<u32>)> = Definition::new("two");
    let backend = B::new().await;
    let host = host_with(&backend, TWO, async |proc: Process| {
        let get = |n| std::future::IntoFuture::into_future(proc.get("v", move || n));
        let (a, b) = tokio::join!(get(1), get(2));
        let (a, b) = (a?, b?);
        let get = |n| std::future::IntoFuture::into_future(proc.get("w", move || n));
        let mut all: futures_util::stream::FuturesUnordered<_> = (10..14).map(get).collect();
        let mut rest = Vec::new();
        while let Some(value) = futures_util::StreamExt::next(&mut all).await {
            rest.push(value?);
        }
        Ok((a, b, rest))
    })
    .await;
    let (a, b, rest) = host.spawn(TWO, "t", &()).await.unwrap().output().await.unwrap();
    assert_eq!(a, b);
    assert_eq!(rest, vec![rest[0]; 4]);
}

async fn a_message_as_large_as_allowed<B: Backend>() {
    const LARGE: Definition<(), usize> = Definition::new("large");
    const TEXT: Event<String> = Event::new("Text");
    const MOST: usize = 1000;
    let backend = B::new().await;
    let large = async |proc: Process, ()| {
        let text = proc.event(TEXT).await?;
        let raced = proc.race("race").on(proc.event(TEXT), |text| text).await?;
        Ok::<_, Failure>(text.len() + raced.len())
    };
    let host = quick(&backend).await.max_payload(MOST).register(LARGE, large).start().await.unwrap();
    let handle = host.spawn(LARGE, "l", &()).await.unwrap();
    for _ in 0..2 {
        handle.raise(TEXT, &"x".repeat(MOST - 2)).await.unwrap();
    }
    assert_eq!(handle.output().await.unwrap(), 2 * (MOST - 2));
}

async fn wakers_of_operations_that_are_gone<B: Backend>() {
    const GONE: Definition<(), u64> = Definition::new("gone");
    let backend = B::new().await;
    let host = host_with(&backend, GONE, async |proc: Process| {
        {
            let step = |n| {
                let step = proc.step(("step", n), move || async move {
                    tokio::time::sleep(MS).await;
                    Ok::<_, Failure>(n)
                });
                std::future::IntoFuture::into_future(step)
            };
            let mut all: futures_util::stream::FuturesUnordered<_> = (0..5).map(step).collect();
            while let Some(result) = futures_util::StreamExt::next(&mut all).await {
                result?;
            }
        }
        Ok(proc.event(PAID).await?)
    })
    .await;
    let handle = host.spawn(GONE, "g", &()).await.unwrap();
    until("it is parked", async || host.in_memory() == 0).await;
    handle.raise(PAID, &3).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 3);
}

async fn spawning_is_idempotent<B: Backend>() {
    const ONE: Definition<Vec<u32>, usize> = Definition::new("one");
    const OTHER: Definition<Vec<u32>, usize> = Definition::new("other");
    let backend = B::new().await;
    let effects = Effects::default();
    let counted = effects.clone();
    let one = move |proc: Process, input: Vec<u32>| {
        let counted = counted.clone();
        async move {
            proc.step("count", || async { Ok::<_, Failure>(counted.add("one")) }).await?;
            Ok::<_, Failure>(input.len())
        }
    };
    let host = quick(&backend).await.register(ONE, one).start().await.unwrap();
    let mut spawns = Vec::new();
    for _ in 0..20 {
        let host = host.clone();
        spawns.push(tokio::spawn(
            async move { host.spawn(ONE, "o", &vec![1, 2]).await.unwrap().output().await.unwrap() },
        ));
    }
    for spawn in spawns {
        assert_eq!(spawn.await.unwrap(), 2);
    }
    assert_eq!(effects.all(), ["one"]);
    let error = host.spawn(ONE, "o", &vec![3]).await.unwrap_err();
    assert_eq!(error, SpawnError::OtherInput { id: "o".into() });
    assert!(error.to_string().contains(".existing_ok()"));
    assert_eq!(host.spawn(ONE, "o", &vec![3]).existing_ok().await.unwrap().output().await.unwrap(), 2);
    let error = host.spawn(OTHER, "o", &vec![1, 2]).await.unwrap_err();
    assert!(matches!(error, SpawnError::OtherKind { .. }), "{error}");
    let error = host.get("o").of(OTHER).output().await.unwrap_err().to_string();
    assert!(error.contains("of kind \"one\", not \"other\""), "{error}");
}

async fn restarting_makes_a_new_run<B: Backend>() {
    const COUNT: Definition<u32, u32> = Definition::new("count");
    let backend = B::new().await;
    let count = async |proc: Process, input: u32| {
        let first = proc.get("first", || input).await?;
        proc.event(PAID).await?;
        Ok::<_, Failure>(first)
    };
    let host = quick(&backend).await.register(COUNT, count).start().await.unwrap();
    let first = host.spawn(COUNT, "c", &1).await.unwrap();
    // One that has not ended is not restarted.
    let same = host.spawn(COUNT, "c", &1).restart_finished().await.unwrap();
    assert_eq!(first.run(), same.run());
    first.raise(PAID, &1).id("x").await.unwrap();
    assert_eq!(first.output().await.unwrap(), 1);
    let second = host.spawn(COUNT, "c", &2).restart_finished().await.unwrap();
    assert_ne!(first.run(), second.run());
    // A late message belongs to the current run, which has not seen its id.
    first.raise(PAID, &1).id("x").await.unwrap();
    assert_eq!(second.output().await.unwrap(), 2, "no record of the run before");
    assert_eq!(first.output().await.unwrap(), 1, "the former run is still there");
    host.get("c").delete().await.unwrap();
    assert!(matches!(first.status().await, Err(HandleError::NotFound { .. })));
    assert!(matches!(second.status().await, Err(HandleError::NotFound { .. })));
    assert_eq!(host.spawn(COUNT, "c", &3).await.unwrap().status().await.unwrap().status, Status::Running);
}

async fn processes_talk_to_processes<B: Backend>() {
    const PARENT: Definition<(), Vec<String>> = Definition::new("parent");
    const CHILD: Definition<u64, u64> = Definition::new("child");
    let backend = B::new().await;
    let parent = async |proc: Process, ()| {
        let mut log = Vec::new();
        let child = proc.spawn(CHILD, "child", &5).await?;
        log.push(child.existed().to_string());
        proc.raise("child", PAID, &37).await?;
        log.push(proc.raise("nobody", PAID, &1).await.unwrap_err().to_string());
        log.push(child.output(&proc).await?.to_string());
        log.push(proc.raise("child", PAID, &1).key("late").await.unwrap_err().to_string());
        log.push(match proc.spawn(CHILD, "child", &5).restart_finished().await {
            Err(error) => error.to_string(),
            Ok(_) => unreachable!("the name is taken"),
        });
        Ok::<_, Failure>(log)
    };
    let child = async |proc: Process, input: u64| {
        let paid = proc.event(PAID).await?;
        Ok::<_, Failure>(paid + input)
    };
    let host = quick(&backend).await.register(PARENT, parent).register(CHILD, child).start().await.unwrap();
    let handle = host.spawn(PARENT, "parent", &()).await.unwrap();
    let info = until_status(&handle, Status::Stuck).await;
    assert!(info.reason.unwrap().contains("\"child\" key \"+child\" is used twice"));
    drop(host);
    // Without the mistake, and after a crash: nothing is sent or started a second time.
    let fixed = async |proc: Process, ()| {
        let mut log = Vec::new();
        let child = proc.spawn(CHILD, "child", &5).await?;
        log.push(child.existed().to_string());
        proc.raise("child", PAID, &37).await?;
        log.push(proc.raise("nobody", PAID, &1).await.unwrap_err().to_string());
        log.push(child.output(&proc).await?.to_string());
        log.push(proc.raise("child", PAID, &1).key("late").await.unwrap_err().to_string());
        Ok::<_, Failure>(log)
    };
    let host = quick(&backend).await.register(PARENT, fixed).register(CHILD, child).start().await.unwrap();
    let handle = host.get("parent").of(PARENT);
    handle.resume().await.unwrap();
    let expected = ["false", "there is no process \"nobody\"", "42", "process \"child\" has ended"];
    assert_eq!(handle.output().await.unwrap(), expected);
}

async fn a_waiting_process_is_a_row<B: Backend>() {
    const PARKS: Definition<(), u64> = Definition::new("parks");
    let backend = B::new().await;
    let host = host_with(&backend, PARKS, async |proc: Process| {
        let (paid, ..) = tokio::join!(
            std::future::IntoFuture::into_future(proc.event(PAID)),
            proc.all((0..50).map(|n| proc.delay(("wait", n), 100 * MS))),
        );
        Ok(paid?)
    })
    .await;
    let handles: Vec<_> = futures_util::future::join_all((0..30).map(|n| {
        let host = host.clone();
        async move { host.spawn(PARKS, format!("p-{n}"), &()).await.unwrap() }
    }))
    .await;
    until("all are parked", async || host.in_memory() == 0).await;
    for handle in &handles {
        handle.raise(PAID, &7).await.unwrap();
    }
    for handle in &handles {
        assert_eq!(handle.output().await.unwrap(), 7);
    }
}

async fn what_holds_a_waker_stays_in_memory<B: Backend>() {
    const HELD: Definition<(), bool> = Definition::new("held");
    let backend = B::new().await;
    let host = host_with(&backend, HELD, async |proc: Process| {
        let receive = std::future::IntoFuture::into_future(proc.event(PAID));
        Ok(tokio::time::timeout(400 * MS, receive).await.is_err())
    })
    .await;
    let handle = host.spawn(HELD, "h", &()).await.unwrap();
    tokio::time::sleep(200 * MS).await;
    assert_eq!(host.in_memory(), 1, "far longer than the quiet time");
    assert!(handle.output().await.unwrap());
    assert_eq!(handle.status().await.unwrap().execution, 1);
}

async fn namespaces_do_not_see_each_other<B: Backend>() {
    const SAME: Definition<u32, u32> = Definition::new("same");
    let backend = B::new().await;
    let mut hosts = Vec::new();
    for namespace in ["one", "two"] {
        let same = async |proc: Process, input: u32| {
            proc.event(PAID).await?;
            Ok::<_, Failure>(input)
        };
        let host = quick(&backend).await.namespace(namespace).register(SAME, same).start().await.unwrap();
        hosts.push(host);
    }
    let one = hosts[0].spawn(SAME, "s", &1).await.unwrap();
    assert!(matches!(hosts[1].get("s").status().await, Err(HandleError::NotFound { .. })));
    let two = hosts[1].spawn(SAME, "s", &2).await.unwrap();
    two.raise(PAID, &1).await.unwrap();
    assert_eq!(two.output().await.unwrap(), 2);
    // It may have parked by now.
    assert!(matches!(one.status().await.unwrap().status, Status::Running | Status::Waiting));
    assert_eq!(hosts[0].processes().count().await.unwrap().len(), 1);
    assert_eq!(hosts[0].processes().list(10).await.unwrap()[0].run, one.run().unwrap());
}

async fn outputs_of_others<B: Backend>() {
    const WAITS: Definition<(), Vec<String>> = Definition::new("waits");
    const ENDS: Definition<String, String> = Definition::new("ends");
    let backend = B::new().await;
    let waits = async |proc: Process, ()| {
        let mut log = Vec::new();
        for id in ["ok", "fails", "cancelled", "deleted", "nobody"] {
            log.push(match proc.output(ENDS, id).await {
                Ok(output) => output,
                Err(error) => format!("{id}: {error}"),
            });
        }
        Ok::<_, Failure>(log)
    };
    let ends = async |proc: Process, input: String| {
        proc.event(PAID).await?;
        if input == "fails" { Err(Failure::new("no luck")) } else { Ok(input) }
    };
    // On two hosts: whoever waits is told across instances.
    let host = quick(&backend).await.register(ENDS, ends).start().await.unwrap();
    for id in ["ok", "fails", "cancelled", "deleted"] {
        host.spawn(ENDS, id, &id.to_owned()).await.unwrap();
    }
    let other = quick(&backend).await.register(WAITS, waits).start().await.unwrap();
    let handle = other.spawn(WAITS, "w", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    until("it is parked", async || other.in_memory() == 0).await;
    for id in ["ok", "fails"] {
        host.get(id).raise(PAID, &1).await.unwrap();
    }
    host.get("cancelled").cancel().await.unwrap();
    until("it waits for the last one", async || {
        handle.status().await.unwrap().waiting_for.is_some_and(|w| w.contains("deleted"))
    })
    .await;
    host.get("deleted").cancel().await.unwrap();
    host.get("deleted").output().await.unwrap_err();
    let _ = host.get("deleted").delete().await;
    let log = handle.output().await.unwrap();
    assert_eq!(log[0], "ok");
    assert_eq!(log[1], "fails: no luck");
    assert_eq!(log[2], "cancelled: the awaited process was cancelled");
    assert!(log[3].contains("was cancelled") || log[3].contains("no process"), "{}", log[3]);
    assert_eq!(log[4], "nobody: there is no process \"nobody\"");
}
