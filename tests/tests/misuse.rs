//! Mistakes: each makes its process stuck with a reason that says what to do, keeps its records, hurts no neighbour, and
//! is over once the code is fixed and the process told to resume. And what is refused before anything is written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::*;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const IT: Definition<(), u32> = Definition::new("it");
const GO: Event<u32> = Event::new("Go");

/// Runs a function that makes a mistake, checks the reason, then resumes with one that does not, and that has no use for
/// these records.
async fn stuck<B, F, Fut>(function: F, expected: &[&str], forget: &[&'static str])
where
    B: Backend,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<u32, Failure>> + Send + 'static,
{
    let backend = B::new().await;
    let host = quick(&backend).await.register(IT, move |proc, ()| function(proc)).start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    let info = until_status(&handle, Status::Stuck).await;
    let reason = info.reason.unwrap();
    for part in expected {
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
    assert_eq!(info.owner, None);
    until("it has left memory", async || host.in_memory() == 0).await;
    let pending = tokio::time::timeout(Duration::from_millis(50), handle.output()).await;
    assert!(pending.is_err(), "whoever awaits a stuck process goes on waiting");
    host.shutdown(Duration::from_secs(1)).await;
    // What was recorded before the mistake is kept.
    let fixed =
        async |proc: Process, ()| Ok::<_, Failure>(proc.step("before", || async { Ok::<_, Failure>(99) }).await?);
    let host = quick(&backend).await.register(IT, fixed).start().await.unwrap();
    let handle = host.get("it").of(IT);
    forget.iter().fold(handle.resume(), |resume, name| resume.forget(*name)).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
}

async fn before(proc: &Process) -> Result<u32, Failure> {
    Ok(proc.step("before", || async { Ok::<_, Failure>(1) }).await?)
}

on_each_backend!(
    a_name_used_twice,
    a_name_in_a_loop_without_a_key,
    an_operation_inside_a_step,
    an_operation_in_another_task,
    two_receives_at_once,
    a_record_of_another_operation,
    a_record_of_another_type,
    a_panic,
    a_panic_in_a_step,
    a_result_that_json_cannot_hold,
    a_result_that_is_too_large,
    a_name_that_is_too_long,
    a_swallowed_mistake_stays_one,
    an_input_of_another_type,
    a_panic_hurts_no_neighbour,
    an_unknown_kind_waits_and_is_counted,
    stuck_ones_are_resumed_in_bulk,
    a_program_that_dies_again_and_again,
    a_record_can_be_forgotten,
    limits_are_checked_first,
    orders_that_make_no_sense,
    settings_that_make_no_sense,
);

async fn a_name_used_twice<B: Backend>() {
    let twice = async |proc: Process| {
        before(&proc).await?;
        proc.step("same", || async { Ok::<_, Failure>(()) }).await?;
        proc.delay("same", Duration::ZERO).await?;
        Ok(0)
    };
    // Both places are named.
    stuck::<B, _, _>(twice, &["\"same\" is used twice in one run", "misuse.rs", "and by the delay at"], &["same"])
        .await;
}

async fn a_name_in_a_loop_without_a_key<B: Backend>() {
    let repeated = async |proc: Process| {
        before(&proc).await?;
        for _ in 0..2 {
            proc.step("charge", || async { Ok::<_, Failure>(()) }).await?;
        }
        Ok(0)
    };
    stuck::<B, _, _>(
        repeated,
        &["\"charge\" is used twice", "in a loop give it a key: `(\"charge\", key)`"],
        &["charge"],
    )
    .await;
}

async fn an_operation_inside_a_step<B: Backend>() {
    let nested = async |proc: Process| {
        before(&proc).await?;
        let inner = proc.clone();
        let result = proc
            .step("outer", || async {
                inner.get("inner", || 1).await?;
                Ok::<_, Failure>(())
            })
            .await;
        // A rollback that must never run.
        assert!(result.is_ok(), "the mistake came back as an error");
        Ok(0)
    };
    stuck::<B, _, _>(nested, &["the value \"inner\"", "is inside the closure of a step"], &[]).await;
}

async fn an_operation_in_another_task<B: Backend>() {
    let escaped = async |proc: Process| {
        before(&proc).await?;
        let moved = proc.clone();
        tokio::spawn(async move { moved.get("elsewhere", || 1).await }).await??;
        Ok(0)
    };
    stuck::<B, _, _>(escaped, &["the value \"elsewhere\"", "polled outside its process's run"], &[]).await;
}

async fn two_receives_at_once<B: Backend>() {
    let two = async |proc: Process| {
        before(&proc).await?;
        let (a, b) = tokio::join!(proc.event(GO).into_future(), proc.event(GO).into_future());
        Ok(a? + b?)
    };
    stuck::<B, _, _>(two, &["the event \"Go\" is received twice at the same time"], &[]).await;
}

/// What was recorded by one version of the code, then asked for by another one.
async fn changed<B, Old, OldFut, New, NewFut>(old: Old, new: New, expected: &[&str])
where
    B: Backend,
    Old: Fn(Process) -> OldFut + Send + Sync + 'static,
    OldFut: Future<Output = Result<(), Failure>> + Send + 'static,
    New: Fn(Process) -> NewFut + Send + Sync + 'static,
    NewFut: Future<Output = Result<(), Failure>> + Send + 'static,
{
    const CHANGED: Definition<(), ()> = Definition::new("changed");
    let backend = B::new().await;
    let old = Arc::new(old);
    let host = quick(&backend)
        .await
        .register(CHANGED, move |proc: Process, ()| {
            let old = old.clone();
            async move {
                old(proc.clone()).await?;
                proc.event(GO).await?;
                Ok::<_, Failure>(())
            }
        })
        .start()
        .await
        .unwrap();
    let handle = host.spawn(CHANGED, "c", &()).await.unwrap();
    until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    host.shutdown(Duration::from_secs(1)).await;
    let host = quick(&backend).await.register(CHANGED, move |proc, ()| new(proc)).start().await.unwrap();
    host.get("c").raise(GO, &1).await.unwrap();
    let reason = until_status(&host.get("c"), Status::Stuck).await.reason.unwrap();
    for part in expected {
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
}

async fn a_record_of_another_operation<B: Backend>() {
    changed::<B, _, _, _, _>(
        async |proc| {
            proc.get("x", || 1).await?;
            Ok(())
        },
        async |proc| {
            proc.step("x", || async { Ok::<_, Failure>(()) }).await?;
            Ok(())
        },
        &["\"x\" is used at", "by a step, but its record was written by a value; rename one of them"],
    )
    .await;
}

async fn a_record_of_another_type<B: Backend>() {
    changed::<B, _, _, _, _>(
        async |proc| {
            proc.step(("x", 7), || async { Ok::<_, Failure>("secret".to_owned()) }).await?;
            Ok(())
        },
        async |proc| {
            proc.step(("x", 7), || async { Ok::<_, Failure>(5_u32) }).await?;
            Ok(())
        },
        &["the record of step \"x\" key \"7\" does not decode", "expected u32, found a string"],
    )
    .await;
}

async fn a_panic<B: Backend>() {
    let panics = async |proc: Process| {
        before(&proc).await?;
        panic!("out of cheese");
    };
    stuck::<B, _, _>(panics, &["its code panicked: out of cheese"], &[]).await;
}

async fn a_panic_in_a_step<B: Backend>() {
    let panics = async |proc: Process| {
        before(&proc).await?;
        proc.step("panics", || async {
            panic!("something");
            #[expect(unreachable_code)]
            Ok::<_, Failure>(())
        })
        .await?;
        Ok(0)
    };
    stuck::<B, _, _>(panics, &["its code panicked: something"], &[]).await;
}

async fn a_result_that_json_cannot_hold<B: Backend>() {
    let nan = async |proc: Process| {
        before(&proc).await?;
        proc.step("mean", || async { Ok::<_, Failure>(Some(f64::NAN)) }).await?;
        Ok(0)
    };
    stuck::<B, _, _>(nan, &["the step \"mean\" at", "cannot be recorded: JSON has no text for the number NaN"], &[])
        .await;
}

async fn a_result_that_is_too_large<B: Backend>() {
    let large = async |proc: Process| {
        before(&proc).await?;
        proc.step("large", || async { Ok::<_, Failure>("x".repeat(2 * 1024 * 1024)) }).await?;
        Ok(0)
    };
    stuck::<B, _, _>(large, &["the step \"large\"", "2097154 bytes of JSON; at most 1048576", "max_payload"], &[])
        .await;
}

async fn a_name_that_is_too_long<B: Backend>() {
    let long = async |proc: Process| {
        before(&proc).await?;
        proc.step("x".repeat(129), || async { Ok::<_, Failure>(()) }).await?;
        Ok(0)
    };
    stuck::<B, _, _>(long, &["129 UTF-16 units; at most 128"], &[]).await;
}

async fn a_swallowed_mistake_stays_one<B: Backend>() {
    // Whatever the function makes of it in the same poll, the mistake counts.
    let swallowed = async |proc: Process| {
        before(&proc).await?;
        let _ = proc.step("a", || async { Ok::<_, Failure>(()) }).await;
        tokio::select! {
            biased;
            _ = proc.step("a", || async { Ok::<_, Failure>(()) }).into_future() => Ok(0),
            () = std::future::ready(()) => Ok(7),
        }
    };
    stuck::<B, _, _>(swallowed, &["\"a\" is used twice"], &["a"]).await;
}

async fn an_input_of_another_type<B: Backend>() {
    const OLD: Definition<String, ()> = Definition::new("kind");
    const NEW: Definition<u32, ()> = Definition::new("kind");
    let backend = B::new().await;
    let host = quick(&backend).await.start().await.unwrap();
    host.spawn(OLD, "k", &"text".to_owned()).await.unwrap();
    let host = quick(&backend).await.register(NEW, async |_, _| Failure::ok(())).start().await.unwrap();
    let reason = until_status(&host.get("k"), Status::Stuck).await.reason.unwrap();
    assert_eq!(
        reason.split(": invalid").next().unwrap(),
        "the input of process \"k\" does not decode: expected u32, found a string"
    );
}

async fn a_panic_hurts_no_neighbour<B: Backend>() {
    const SOME: Definition<u32, u32> = Definition::new("some");
    let backend = B::new().await;
    let some = async |proc: Process, input: u32| {
        proc.step("a", || async { Ok::<_, Failure>(()) }).await?;
        assert!(!input.is_multiple_of(5), "a multiple of five");
        proc.step("b", || async { Ok::<_, Failure>(()) }).await?;
        Ok::<_, Failure>(input)
    };
    let host = quick(&backend).await.register(SOME, some).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..50 {
        handles.push(host.spawn(SOME, format!("s-{n}"), &n).await.unwrap());
    }
    for (n, handle) in (0..).zip(&handles) {
        if n % 5 == 0 {
            until_status(handle, Status::Stuck).await;
        } else {
            assert_eq!(handle.output().await.unwrap(), n);
        }
    }
}

async fn an_unknown_kind_waits_and_is_counted<B: Backend>() {
    let backend = B::new().await;
    let host = quick(&backend).await.start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    let counts = host.processes().count().await.unwrap();
    assert_eq!(counts.len(), 1);
    assert_eq!(
        (&*counts[0].kind, counts[0].status, counts[0].count, counts[0].served),
        ("it", Status::Waiting, 1, false)
    );
    let serving = quick(&backend).await.register(IT, async |proc, ()| before(&proc).await).start().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    let counts = host.processes().kind(IT).status(Status::Completed).count().await.unwrap();
    assert_eq!((counts[0].count, counts[0].served), (1, true));
    drop(serving);
}

async fn stuck_ones_are_resumed_in_bulk<B: Backend>() {
    let backend = B::new().await;
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = broken.clone();
    let function = move |proc: Process, ()| {
        let broken = is_broken.load(Ordering::SeqCst);
        async move {
            assert!(!broken, "broken");
            before(&proc).await
        }
    };
    let host = quick(&backend).await.register(IT, function).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..25 {
        handles.push(host.spawn(IT, format!("it-{n}"), &()).await.unwrap());
    }
    for handle in &handles {
        until_status(handle, Status::Stuck).await;
    }
    let mut page = host.processes().status(Status::Stuck);
    let mut pages = Vec::new();
    loop {
        let found = page.list(10).await.unwrap();
        let Some(last) = found.last() else { break };
        page = page.after(last.run);
        pages.push(found.len());
    }
    assert_eq!(pages, [10, 10, 5]);
    assert_eq!(host.processes().unchanged_for(Duration::from_secs(3600)).resume_stuck().await.unwrap(), 0);
    broken.store(false, Ordering::SeqCst);
    assert_eq!(host.processes().kind(IT).resume_stuck().await.unwrap(), 25);
    for handle in &handles {
        assert_eq!(handle.output().await.unwrap(), 1);
    }
}

async fn a_program_that_dies_again_and_again<B: Backend>() {
    let backend = B::new().await;
    let executions = Effects::default();
    let function = {
        let executions = executions.clone();
        move |proc: Process, ()| {
            let executions = executions.clone();
            async move {
                executions.add("run");
                let n = before(&proc).await?;
                // A record resets the count.
                if proc.execution() >= 3 {
                    proc.step("progress", || async { Ok::<_, Failure>(()) }).await?;
                }
                proc.step("deadly", std::future::pending::<Result<(), Failure>>).await?;
                Ok::<_, Failure>(n)
            }
        }
    };
    for life in 1.. {
        let builder = quick(&backend).await.max_crashes(4).register(IT, function.clone());
        let host = builder.start().await.unwrap();
        let handle = host.spawn(IT, "it", &()).await.unwrap();
        let mut stuck = None;
        until("it runs or is stuck", async || {
            let info = handle.status().await.unwrap();
            if info.status == Status::Stuck {
                stuck = info.reason;
            }
            stuck.is_some()
                || executions.all().len() == life
                    && handle.value::<u32>("x").await.is_ok()
                    && info.execution == life as i64
        })
        .await;
        if let Some(reason) = stuck {
            // The third execution left a record; the fourth to the seventh did not.
            assert_eq!(life, 8, "{reason}");
            assert!(reason.contains("died 4 times in a row"), "{reason}");
            // Told to resume it runs again, and the count begins anew.
            handle.resume().await.unwrap();
            until("it runs", async || executions.all().len() == 8).await;
            break;
        }
        // The record must be there before the crash.
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(host);
    }
}

async fn a_record_can_be_forgotten<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let function = {
        let effects = effects.clone();
        move |proc: Process, ()| {
            let effects = effects.clone();
            async move {
                let n = before(&proc).await?;
                let charged = proc.step("charge", || async {
                    effects.add("charge");
                    Ok::<_, Failure>(effects.all().len())
                });
                if charged.await? < 2 {
                    return Err(Failure::new("charged wrongly"));
                }
                Ok::<_, Failure>(n)
            }
        }
    };
    let host = quick(&backend).await.register(IT, function).start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    until_status(&handle, Status::Failed).await;
    // No step has failed: resumed, it fails again without another effect.
    handle.resume().await.unwrap();
    until("it has failed again", async || {
        let info = handle.status().await.unwrap();
        info.status == Status::Failed && info.execution == 2
    })
    .await;
    assert_eq!(effects.all().len(), 1);
    handle.resume().forget("charge").await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(effects.all().len(), 2);
}

async fn limits_are_checked_first<B: Backend>() {
    let backend = B::new().await;
    let host = quick(&backend).await.max_payload(100).start().await.unwrap();
    const TEXT: Definition<String, ()> = Definition::new("text");
    const NUMBER: Definition<f64, ()> = Definition::new("number");
    const LONG: Definition<(), ()> = Definition::new(
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    );
    let text = |text: &str| text.to_owned();
    for (id, expected) in [
        ("", "the process id is empty"),
        (&*"x".repeat(257), "257 UTF-16 units; at most 256"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        (" a", "white space"),
        ("a\u{a0}", "white space"),
    ] {
        let error = host.spawn(TEXT, id, &text("x")).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let error = host.get(id).raise(GO, &1).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(matches!(host.get(id).status().await, Err(HandleError::NotFound { .. })));
        assert!(matches!(host.get(id).cancel().await, Err(HandleError::NotFound { .. })));
    }
    for id in ["O'Brien \"x\" \\", "😀\u{202e}é", &"é".repeat(256), "a,b;--", "Order-1", "order-1"] {
        host.spawn(TEXT, id, &text("x")).await.unwrap();
        assert_eq!(&*host.get(id).status().await.unwrap().id, id);
    }
    let error = host.spawn(TEXT, "p", &"x".repeat(99)).await.unwrap_err().to_string();
    assert!(error.contains("the input is 101 bytes of JSON; at most 100"), "{error}");
    host.spawn(TEXT, "p", &"x".repeat(98)).await.unwrap();
    let error = host.spawn(NUMBER, "n", &f64::NAN).await.unwrap_err().to_string();
    assert!(error.contains("the input cannot be recorded: JSON has no text for the number NaN"), "{error}");
    let error = host.spawn(LONG, "l", &()).await.unwrap_err().to_string();
    assert!(error.contains("the kind") && error.contains("at most 128"), "{error}");
    let error = host.get("p").raise(GO, &1).id("").await.unwrap_err().to_string();
    assert!(error.contains("the message id is empty"), "{error}");
}

async fn orders_that_make_no_sense<B: Backend>() {
    let backend = B::new().await;
    let function = async |proc: Process, ()| {
        proc.event(GO).await?;
        before(&proc).await
    };
    let host = quick(&backend).await.register(IT, function).start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    let error = handle.resume().await.unwrap_err().to_string();
    assert!(error.contains("only a stuck or failed process can be resumed"), "{error}");
    let error = handle.delete().await.unwrap_err().to_string();
    assert!(error.contains("cancel or terminate it first"), "{error}");
    handle.raise(GO, &1).await.unwrap();
    handle.output().await.unwrap();
    let error = handle.cancel().await.unwrap_err().to_string();
    assert_eq!(error, "process \"it\" is completed; only a process that has not ended can be cancelled");
    handle.delete().await.unwrap();
    assert!(matches!(handle.delete().await, Err(HandleError::NotFound { .. })));
    host.shutdown(Duration::from_secs(1)).await;
    let error = host.spawn(IT, "it", &()).await.unwrap_err();
    assert_eq!(error, SpawnError::Unavailable(Unavailable::Stopped));
}

async fn settings_that_make_no_sense<B: Backend>() {
    let backend = B::new().await;
    let it = async |proc: Process, ()| before(&proc).await;
    let error = quick(&backend).await.register(IT, it).register(IT, it).start().await.unwrap_err().to_string();
    assert_eq!(error, "the kind \"it\" is registered twice");
    let second = Duration::from_secs(1);
    let error = quick(&backend).await.heartbeat(second, second * 2).start().await.unwrap_err().to_string();
    assert!(error.contains("at least three heartbeats"), "{error}");
    let error = quick(&backend).await.heartbeat(Duration::ZERO, second).start().await.unwrap_err().to_string();
    assert!(error.contains("a heartbeat every 0ns is too often"), "{error}");
    let error = quick(&backend).await.label("a\0b").start().await.unwrap_err().to_string();
    assert!(error.contains("the label") && error.contains("control character"), "{error}");
    for time in [Duration::ZERO, Duration::MAX] {
        let builder = quick(&backend).await.register(IT, it).quiet_time(time).poll(time).reconcile_every(time);
        let (longest, builder) = (Duration::MAX, builder.call_timeout(Duration::MAX));
        let builder = if time.is_zero() { builder.batch(0, 0) } else { builder.heartbeat(longest / 3, longest) };
        let host = builder.start().await.unwrap();
        let handle = host.spawn(IT, format!("{time:?}"), &()).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 1);
        host.shutdown(Duration::from_secs(5)).await;
    }
    let error = quick(&backend).await.namespace("").start().await.unwrap_err().to_string();
    assert!(error.contains("the namespace is empty"), "{error}");
}
