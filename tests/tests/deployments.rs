//! Older and newer code of one service run side by side.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::*;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Old {
    amount: u32,
}
#[derive(Serialize, Deserialize)]
struct New {
    amount: u32,
    currency: String,
}

const OLD: Definition<Old, String> = Definition::new("order");
const NEW: Definition<New, String> = Definition::new("order");
const PAY: Event<()> = Event::new("Pay");

on_each_backend!(
    what_only_newer_code_can_read,
    what_no_instance_can_read,
    what_newer_code_has_recorded,
    what_cannot_be_read_beside_a_step,
);

async fn old<B: Backend>(backend: &B, patience: Duration) -> Host {
    let order = async |proc: Process, order: Old| {
        let paid = proc.step("pay", async || Ok::<_, Failure>(order.amount)).await?;
        proc.event(PAY).await?;
        Ok::<_, Failure>(format!("{paid} by old code"))
    };
    let builder = quick(backend).await.register(OLD, order).unreadable_patience(patience);
    builder.start().await.unwrap()
}

async fn new<B: Backend>(backend: &B) -> Host {
    let order = async |proc: Process, order: New| {
        let paid = proc.step("pay", async || Ok::<_, Failure>(order.amount)).await?;
        proc.step("audit", async || Ok::<_, Failure>(())).await?;
        proc.event(PAY).await?;
        Ok::<_, Failure>(format!("{paid} {}", order.currency))
    };
    quick(backend).await.register(NEW, order).start().await.unwrap()
}

/// It can read the input, and does not know of a step.
async fn older<B: Backend>(backend: &B) -> Host {
    let order = async |proc: Process, order: New| {
        let paid = proc.step("pay", async || Ok::<_, Failure>(order.amount)).await?;
        proc.event(PAY).await?;
        Ok::<_, Failure>(format!("{paid} by older code"))
    };
    quick(backend).await.register(NEW, order).start().await.unwrap()
}

/// It would run orders, and has no room.
async fn full<B: Backend>(backend: &B) -> Host {
    let order = async |_, _: New| Ok::<_, Failure>(String::new());
    quick(backend).await.register(NEW, order).max_processes(0).start().await.unwrap()
}

fn order(amount: u32) -> New {
    New { amount, currency: "EUR".into() }
}

/// Whichever instance claims it first.
async fn what_only_newer_code_can_read<B: Backend>() {
    let backend = B::new().await;
    let client = quick(&backend).await.start().await.unwrap();
    let _new = new(&backend).await;
    let _old = old(&backend, Duration::from_secs(300)).await;
    let mut handles = Vec::new();
    for n in 0..20 {
        handles.push((n, client.spawn(NEW, format!("p-{n}"), &order(n)).await.unwrap()));
    }
    for (n, handle) in handles {
        handle.raise(PAY, &()).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), format!("{n} EUR"));
    }
}

/// Alone, or for longer than it is to be left to others, it is stuck.
async fn what_no_instance_can_read<B: Backend>() {
    const TEXT: Definition<String, String> = Definition::new("order");
    for company in [false, true] {
        let backend = B::new().await;
        let client = quick(&backend).await.start().await.unwrap();
        client.spawn(TEXT, "broken", &"no order".to_owned()).await.unwrap();
        let other = if company { Some(full(&backend).await) } else { None };
        let old = old(&backend, Duration::from_secs(1)).await;
        let broken = old.get("broken");
        let info = until_status(&broken, Status::Stuck).await;
        let reason = info.reason.unwrap();
        assert!(reason.contains("the input of process \"broken\" does not decode"), "{reason}");
        assert!(!company || info.execution > 1, "it was left to others first");
        drop((client, other));
    }
}

/// A step that older code does not know stands in the records: nothing happens there a second time.
async fn what_newer_code_has_recorded<B: Backend>() {
    let backend = B::new().await;
    let first = new(&backend).await;
    let handle = first.spawn(NEW, "p", &order(7)).await.unwrap();
    until_status(&handle, Status::Waiting).await;
    first.shutdown(Duration::from_secs(5)).await;
    let client = quick(&backend).await.start().await.unwrap();
    let _full = full(&backend).await;
    let _older = older(&backend).await;
    let handle = client.get("p").of(NEW);
    handle.raise(PAY, &()).await.unwrap();
    until("older code has left it", async || {
        handle.status().await.unwrap().waiting_for.is_some_and(|what| what.starts_with("an instance that can read it"))
    })
    .await;
    let _new = new(&backend).await;
    assert_eq!(handle.output().await.unwrap(), "7 EUR");
}

/// A step is under way when a message comes that this code cannot read: the step is not begun again and again.
async fn what_cannot_be_read_beside_a_step<B: Backend>() {
    const BOTH: Definition<(), u32> = Definition::new("both");
    const NUMBER: Event<u32> = Event::new("Number");
    const TEXT: Event<String> = Event::new("Number");
    let backend = B::new().await;
    let begun = Arc::new(AtomicU32::new(0));
    let count = begun.clone();
    let both = move |proc: Process, ()| {
        let count = count.clone();
        async move {
            let step = proc.step("never ends", || async {
                count.fetch_add(1, Ordering::SeqCst);
                std::future::pending::<Result<u32, Failure>>().await
            });
            let number = proc.event(NUMBER).into_future();
            let (step, number) = tokio::join!(biased; step.into_future(), number);
            Ok::<_, Failure>(number? + step?)
        }
    };
    let other = async |_: Process, ()| Ok::<_, Failure>(0);
    let _full = quick(&backend).await.register(BOTH, other).max_processes(0).start().await.unwrap();
    let host = quick(&backend).await.register(BOTH, both).start().await.unwrap();
    let handle = host.spawn(BOTH, "b", &()).await.unwrap();
    until("the step has begun", async || begun.load(Ordering::SeqCst) == 1).await;
    handle.raise(TEXT, &"no number".to_owned()).await.unwrap();
    let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains("does not decode"), "{reason}");
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}
