//! A process that awaits many others: what that costs grows with their number, not with its square.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::Op;
use durable_core::*;
use durable_tests::faulty::Faulty;
use durable_tests::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const CHILD: Definition<u32, u32> = Definition::new("child");
const PARENT: Definition<u32, u32> = Definition::new("parent");
const GO: Event<()> = Event::new("Go");

on_each_backend!(
    what_is_awaited_is_said_once,
    one_that_was_restarted_is_awaited_anew,
    one_that_was_restarted_is_awaited_anew_in_a_compensation,
);

async fn child(proc: Process, n: u32) -> Result<u32, Failure> {
    proc.event(GO).await?;
    Ok(n)
}

/// The parent leaves memory each time that one of them has ended.
async fn what_is_awaited_is_said_once<B: Backend>() {
    const MANY: u32 = 12;
    let backend = B::new().await;
    let awaits = Arc::new(AtomicUsize::new(0));
    let counted = awaits.clone();
    let storage = Faulty::new(backend.storage().await, move |batch| {
        let said = batch.ops.iter().filter(|op| matches!(op, Op::Await { .. })).count();
        counted.fetch_add(said, Ordering::SeqCst);
        None
    });
    let parent = async |proc: Process, many: u32| {
        let mut children = Vec::new();
        for n in 0..many {
            children.push(proc.spawn(CHILD, format!("child-{n}"), &n).await.map_err(Failure::from)?);
        }
        let ends = children.iter().map(|child| async { child.output(&proc).await.map_err(Failure::from) });
        proc.all(ends).await.into_iter().sum::<Result<u32, Failure>>()
    };
    let builder = Host::builder(storage).quiet_time(Duration::from_millis(5));
    let host = builder.register(CHILD, child).register(PARENT, parent).start().await.unwrap();
    let handle = host.spawn(PARENT, "parent", &MANY).await.unwrap();
    for n in 0..MANY {
        let parked = until_status(&handle, Status::Waiting).await.execution;
        host.get(format!("child-{n}")).raise(GO, &()).await.unwrap();
        if n + 1 < MANY {
            until("it has parked again", async || {
                let info = handle.status().await.unwrap();
                info.execution > parked && info.status == Status::Waiting
            })
            .await;
        }
    }
    assert_eq!(handle.output().await.unwrap(), (0..MANY).sum::<u32>());
    assert_eq!(awaits.load(Ordering::SeqCst), MANY as usize);
}

/// What a race has awaited in vain has ended since, and another run has its id: that one is awaited.
async fn one_that_was_restarted_is_awaited_anew<B: Backend>() {
    const RACER: Definition<(), u32> = Definition::new("racer");
    let backend = B::new().await;
    let racer = async |proc: Process, ()| {
        let late = proc.race("first").on(proc.output(CHILD, "child"), |_| true).on(proc.event(GO), |_| false);
        assert!(!late.await?);
        proc.event(GO).await?;
        proc.output(CHILD, "child").await.map_err(Failure::from)
    };
    let builder = Host::builder(backend.storage().await).quiet_time(Duration::from_millis(5));
    let host = builder.register(CHILD, child).register(RACER, racer).start().await.unwrap();
    let first = host.spawn(CHILD, "child", &1).await.unwrap();
    let handle = host.spawn(RACER, "racer", &()).await.unwrap();
    until_status(&handle, Status::Waiting).await;
    handle.raise(GO, &()).await.unwrap();
    until("the race is over", async || {
        handle.status().await.unwrap().waiting_for.is_some_and(|what| &*what == "event \"Go\"")
    })
    .await;
    first.raise(GO, &()).await.unwrap();
    assert_eq!(first.output().await.unwrap(), 1);
    let second = host.spawn(CHILD, "child", &2).restart_finished().await.unwrap();
    handle.raise(GO, &()).await.unwrap();
    second.raise(GO, &()).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 2);
}

/// The process awaited the first run when it left memory, and again, in its compensation, when that has ended.
async fn one_that_was_restarted_is_awaited_anew_in_a_compensation<B: Backend>() {
    const TWICE: Definition<(), u32> = Definition::new("twice");
    const AGAIN: Event<()> = Event::new("Again");
    let backend = B::new().await;
    let twice = async |proc: Process, ()| {
        let first = proc.output(CHILD, "child").await.map_err(Failure::from)?;
        proc.event(AGAIN).await?;
        let second = proc.compensation().output(CHILD, "child").await.map_err(Failure::from)?;
        Ok::<_, Failure>(first * 10 + second)
    };
    // It leaves memory once, while it awaits the first run, and not later.
    let builder = Host::builder(backend.storage().await).quiet_time(Duration::from_millis(5));
    let first = builder.register(TWICE, twice).start().await.unwrap();
    let elsewhere = Host::builder(backend.storage().await).register(CHILD, child).start().await.unwrap();
    let one = elsewhere.spawn(CHILD, "child", &1).await.unwrap();
    let handle = first.spawn(TWICE, "t", &()).await.unwrap();
    until_status(&handle, Status::Waiting).await;
    first.shutdown(Duration::from_secs(1)).await;
    let builder = Host::builder(backend.storage().await).register(TWICE, twice);
    let second = builder.quiet_time(Duration::from_secs(3600)).start().await.unwrap();
    // It awaits no such event, and is resumed all the same.
    second.get("t").raise(GO, &()).await.unwrap();
    until("it awaits in memory", async || second.get("t").status().await.unwrap().status == Status::Running).await;
    one.raise(GO, &()).await.unwrap();
    assert_eq!(one.output().await.unwrap(), 1);
    let two = elsewhere.spawn(CHILD, "child", &2).restart_finished().await.unwrap();
    two.raise(GO, &()).await.unwrap();
    second.get("t").raise(AGAIN, &()).await.unwrap();
    assert_eq!(second.get("t").of(TWICE).output().await.unwrap(), 12);
}
