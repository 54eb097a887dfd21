//! Calls whose answer is lost, for each kind of operation: whether the commit happened, did not happen, or happens only
//! after the retry, the outcome is as if nothing had gone wrong. And operations that the database refuses for good.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{Op, OpKind, Order, RecordState, What};
use durable_core::*;
use durable_tests::faulty::{Fault, Faulty};
use durable_tests::*;
use std::time::Duration;

const GO: Event<u32> = Event::new("Go");
const IT: Definition<u32, String> = Definition::new("it");
const CHILD: Definition<u32, u32> = Definition::new("child");

/// Every kind of operation that is batched.
async fn it(effects: Effects, proc: Process, input: u32) -> Result<String, Failure> {
    let a = proc
        .step("a", |attempt: Attempt| {
            effects.add(format!("a{}", attempt.number()));
            async move { if attempt.number() < 2 { Err(Failure::new("again")) } else { Ok(input) } }
        })
        .retry(Retry::fixed(Duration::from_millis(1)))
        .await?;
    proc.set("v", a).await?;
    proc.delay("parks", Duration::from_millis(150)).await?;
    let n = proc.event(GO).await?;
    let child = proc.spawn(CHILD, format!("{}/child", proc.id()), &n).await?;
    proc.raise(child.id(), GO, &3).await?;
    let output = child.output(&proc).await?;
    let v = proc.get("v", || 0).await?;
    Ok(format!("{a} {n} {output} {v}"))
}

async fn child(proc: Process, input: u32) -> Result<u32, Failure> {
    Ok(proc.event(GO).await? + input)
}

/// Runs it with a fault at the first operation of a kind; everything comes out as without.
async fn with_fault<B: Backend>(fault: Fault, like: impl Fn(&Op) -> bool + Send + 'static) {
    let backend = B::new().await;
    let effects = Effects::default();
    let storage = Faulty::once(backend.storage().await, fault, like);
    let arrived = storage.arrived.clone();
    let counted = effects.clone();
    let host = Host::builder(storage)
        .heartbeat(Duration::from_millis(500), Duration::from_secs(4))
        .quiet_time(Duration::from_millis(20))
        .poll(Duration::from_millis(100))
        .register(IT, move |proc, input| it(counted.clone(), proc, input))
        .register(CHILD, child)
        .start()
        .await
        .unwrap();
    let handle = host.spawn(IT, "it", &5).await.unwrap();
    handle.raise(GO, &2).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), "5 2 5 5", "{fault:?}");
    assert_eq!(effects.all(), ["a1", "a2"], "{fault:?}: no recorded step ran again");
    // What is ordered from outside.
    let handle = host.spawn(IT, "cancelled", &1).await.unwrap();
    handle.cancel().await.unwrap();
    assert_eq!(handle.output().await.unwrap_err(), OutputError::WasCancelled);
    host.shutdown(Duration::from_secs(5)).await;
    if fault == Fault::Late {
        let arrived = arrived.lock().unwrap();
        assert_eq!(arrived.len(), 1);
        assert_eq!(arrived[0], Err("the instance has been fenced off".into()), "the original arrived and was let in");
    }
}

fn record(op: OpKind, state: RecordState) -> impl Fn(&Op) -> bool + Send + Clone {
    move |it| matches!(it, Op::Record(record) if record.op == op && record.state == state)
}

macro_rules! each_operation {
    ($($name:ident: $like:expr),* $(,)?) => {
        $(mod $name {
            use super::*;
            async fn all<B: Backend>() {
                for fault in [Fault::Before, Fault::Lost, Fault::Late, Fault::Schema] {
                    with_fault::<B>(fault, $like).await;
                }
            }
            #[test]
            fn memory() {
                run(all::<InMemory>());
            }
            #[test]
            fn sqlite() {
                run(all::<SqliteFile>());
            }
            #[test]
            fn postgres() {
                PostgresSchema::run(all::<PostgresSchema>());
            }
        })*
    };
}

each_operation! {
    a_start: |op| matches!(op, Op::Spawn(_)),
    a_message: |op| matches!(op, Op::Raise(_)),
    an_attempt: record(OpKind::Step, RecordState::Pending),
    a_step: record(OpKind::Step, RecordState::Done),
    a_value: record(OpKind::Value, RecordState::Done),
    a_timer: record(OpKind::Delay, RecordState::Pending),
    a_receive: record(OpKind::Event, RecordState::Done),
    a_durable_start: record(OpKind::Spawn, RecordState::Done),
    a_durable_message: record(OpKind::Raise, RecordState::Done),
    an_await: |op| matches!(op, Op::Await { .. }),
    an_output: record(OpKind::Output, RecordState::Done),
    a_park: |op| matches!(op, Op::Park(_)),
    a_claim: |op| matches!(op, Op::Claim { .. }),
    an_end: |op| matches!(op, Op::Finish(_)),
    a_cancellation: |op| matches!(op, Op::Order(Order { what: What::Cancel, .. })),
    an_accepted_cancellation: |op| matches!(op, Op::AcceptCancel { .. }),
}

on_each_backend!(
    what_the_database_refuses_is_found,
    a_storage_that_stays_away,
    a_storage_that_lets_nothing_be_written,
    orders_that_are_sent_again,
    a_start_that_another_instance_took,
    batches_that_were_made_ready_before_the_fence_moved,
);

/// Full batches follow each other, so that the next one is always ready, and every few of them go wrong.
async fn batches_that_were_made_ready_before_the_fence_moved<B: Backend>() {
    const STEPS: Definition<u32, u32> = Definition::new("steps");
    const PROCESSES: u32 = 100;
    let backend = B::new().await;
    let effects = Effects::default();
    let mut batches = 0;
    let storage = Faulty::new(backend.storage().await, move |_| {
        batches += 1;
        match batches % 21 {
            7 => Some(Fault::Before),
            14 => Some(Fault::Lost),
            0 => Some(Fault::Late),
            _ => None,
        }
    });
    let counted = effects.clone();
    let steps = move |proc: Process, input: u32| {
        let effects = counted.clone();
        async move {
            for n in 0..5 {
                let effect = || async { Ok::<_, Failure>(effects.add(format!("{} {n}", proc.id()))) };
                proc.step(("step", n), effect).await?;
            }
            Ok::<_, Failure>(input)
        }
    };
    let host = Host::builder(storage).batch(8, 1 << 20).register(STEPS, steps).start().await.unwrap();
    let starts = (0..PROCESSES).map(|n| {
        let host = host.clone();
        async move {
            let process = host.spawn(STEPS, format!("p{n}"), &n).await.unwrap();
            assert_eq!(process.output().await.unwrap(), n);
        }
    });
    futures_util::future::join_all(starts).await;
    let mut all = effects.all();
    all.sort();
    all.dedup();
    assert_eq!((all.len(), effects.all().len()), (PROCESSES as usize * 5, PROCESSES as usize * 5), "each once");
}

/// An order whose answer is lost is carried out once, and its caller is told so.
async fn orders_that_are_sent_again<B: Backend>() {
    const FAILS: Definition<u32, u32> = Definition::new("fails");
    let order = |op: &Op| matches!(op, Op::Order(_));
    let backend = B::new().await;
    for fault in [Fault::Lost, Fault::LostAndFenced] {
        let mut sent = std::collections::HashSet::new();
        let storage = Faulty::new(backend.storage().await, move |batch| {
            let text = format!("{:?}", batch.ops.iter().filter(|op| order(op)).collect::<Vec<_>>());
            (batch.ops.iter().any(order) && sent.insert(text)).then_some(fault)
        });
        let fails = async |proc: Process, n: u32| {
            proc.step("once", || async { Err::<(), _>(Failure::new("no")) }).await?;
            Ok::<_, Failure>(n)
        };
        let host = Host::builder(storage).register(FAILS, fails).start().await.unwrap();
        let failed = host.spawn(FAILS, format!("failed {fault:?}"), &1).await.unwrap();
        failed.output().await.unwrap_err();
        failed.resume().await.unwrap();
        until("it has failed again", async || failed.status().await.unwrap().execution == 2).await;
        until_status(&failed, Status::Failed).await;
        failed.delete().await.unwrap();
        assert!(failed.status().await.is_err());
        // Of a kind that nobody runs here: cancelled at once.
        let new = host.spawn(IT, format!("new {fault:?}"), &1).await.unwrap();
        new.cancel().await.unwrap();
        assert_eq!(new.status().await.unwrap().status, Status::Cancelled);
        assert!(new.cancel().await.is_err(), "it has ended");
        host.shutdown(Duration::from_secs(5)).await;
    }
}

/// The answer to a start is lost, and the instance with it: another one has run the process by the time that the start
/// is sent again. Whoever sends it again does not run it, too.
async fn a_start_that_another_instance_took<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let step = |effects: Effects| {
        move |proc: Process, input: u32| {
            let effects = effects.clone();
            async move {
                proc.step("a", || async { Ok::<_, Failure>(effects.add("a")) }).await?;
                proc.event(GO).await?;
                Ok::<_, Failure>(input.to_string())
            }
        }
    };
    let other = quick(&backend).await.register(IT, step(effects.clone())).start().await.unwrap();
    let storage = Faulty::once(backend.storage().await, Fault::LostAndFenced, |op| matches!(op, Op::Spawn(_)));
    let host = Host::builder(storage).register(IT, step(effects.clone())).start().await.unwrap();
    let handle = host.spawn(IT, "it", &1).await.unwrap();
    until("it has run", async || !effects.all().is_empty()).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), "1");
    assert_eq!(effects.all(), ["a"]);
    drop(other);
}

/// One operation that the database refuses for good does not fail its neighbours.
async fn what_the_database_refuses_is_found<B: Backend>() {
    let backend = B::new().await;
    let poisoned = |op: &Op| match op {
        Op::Record(record) => record.payload.contains("poison"),
        Op::Spawn(spawn) => spawn.input.contains("poison"),
        _ => false,
    };
    let storage =
        Faulty::new(backend.storage().await, move |batch| batch.ops.iter().any(poisoned).then_some(Fault::Refused));
    const TEXT: Definition<u32, String> = Definition::new("text");
    const INPUT: Definition<String, String> = Definition::new("input");
    let text = async |proc: Process, n: u32| {
        let text = if n == 7 { "poison" } else { "fine" };
        Ok::<_, Failure>(proc.step("text", || async { Ok::<_, Failure>(text.to_owned()) }).await?)
    };
    let host = Host::builder(storage).register(TEXT, text).start().await.unwrap();
    let spawn = |n: u32| {
        let host = host.clone();
        async move { host.spawn(TEXT, format!("t-{n}"), &n).await.unwrap() }
    };
    let handles = futures_util::future::join_all((0..20).map(spawn)).await;
    for (n, handle) in handles.iter().enumerate() {
        if n == 7 {
            let reason = until_status(handle, Status::Stuck).await.reason.unwrap();
            assert!(reason.contains("the database refuses the record of step \"text\""), "{reason}");
        } else {
            assert_eq!(handle.output().await.unwrap(), "fine");
        }
    }
    let error = host.spawn(INPUT, "p", &"poison".to_owned()).await.unwrap_err().to_string();
    assert!(error.contains("the storage refuses this"), "{error}");
}

/// While the storage is away nothing fails; calls from outside are told after their time-out.
async fn a_storage_that_stays_away<B: Backend>() {
    while_nothing_can_be_written::<B>(Fault::Before, "no connection").await;
}

/// Nor while it lets nothing be written, because a right was taken away, say; and no step begins again for that.
async fn a_storage_that_lets_nothing_be_written<B: Backend>() {
    while_nothing_can_be_written::<B>(Fault::Schema, "permission denied").await;
}

async fn while_nothing_can_be_written<B: Backend>(fault: Fault, why: &str) {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    let backend = B::new().await;
    let away = Arc::new(AtomicBool::new(false));
    let is_away = away.clone();
    let storage = Faulty::new(backend.storage().await, move |_| is_away.load(Ordering::SeqCst).then_some(fault));
    let effects = Effects::default();
    let counted = effects.clone();
    let host = Host::builder(storage)
        .call_timeout(Duration::from_millis(200))
        .register(IT, move |proc, input| it(counted.clone(), proc, input))
        .register(CHILD, child)
        .start()
        .await
        .unwrap();
    let handle = host.spawn(IT, "it", &5).await.unwrap();
    away.store(true, Ordering::SeqCst);
    let error = handle.raise(GO, &2).id("m").await.unwrap_err();
    assert!(matches!(error, RaiseError::Unavailable(Unavailable::Storage { .. })), "{error}");
    assert!(error.to_string().contains("may have happened") && error.to_string().contains(why), "{error}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    away.store(false, Ordering::SeqCst);
    until("it is back", async || handle.raise(GO, &2).id("m").await.is_ok()).await;
    assert_eq!(handle.output().await.unwrap(), "5 2 5 5");
    assert_eq!(effects.all(), ["a1", "a2"]);
}
