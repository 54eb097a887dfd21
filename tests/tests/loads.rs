//! What is loaded is bounded in bytes; and a process that programs die of is found without marking others.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::StorageError;
use durable_core::*;
use durable_tests::crash::shared::Shared;
use durable_tests::faulty::Faulty;
use durable_tests::heavy::{CULPRIT, GO, INNOCENT, LARGE, large};
use durable_tests::*;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const RESUMER: &str = env!("CARGO_BIN_EXE_resumer");

on_each_backend!(one_that_is_too_large);
on_each_database!(many_that_are_large, one_that_kills_programs, one_that_another_has_claimed_since);

async fn host<B: Backend>(backend: &B) -> HostBuilder {
    Host::builder(backend.storage().await).quiet_time(Duration::from_millis(20))
}

/// The program's end, and what it says.
async fn resumer<B: Shared>(backend: &B, what: &str) -> (bool, String) {
    let mut program = tokio::process::Command::new(RESUMER);
    program.args([backend.worker_address().as_str(), what]).stdin(Stdio::null()).kill_on_drop(true);
    let output = program.stderr(Stdio::inherit()).output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    println!("{said}");
    (output.status.success(), said.lines().last().unwrap_or_default().to_owned())
}

/// Alone it is stuck, with the reason; its neighbours go on, and so does it once it may be as large.
async fn one_that_is_too_large<B: Backend>() {
    let backend = B::new().await;
    let first = large(host(&backend).await).start().await.unwrap();
    for (id, parts) in [("small", 1), ("larger", 3), ("largest", 5)] {
        let process = first.spawn(LARGE, id, &parts).await.unwrap();
        until_status(&process, Status::Waiting).await;
    }
    first.shutdown(Duration::from_secs(5)).await;
    let second = large(host(&backend).await).max_loaded(4 << 20).start().await.unwrap();
    for id in ["largest", "small", "larger"] {
        second.get(id).raise(GO, &()).await.unwrap();
    }
    for (id, bytes) in [("small", 1), ("larger", 3)] {
        assert_eq!(second.get(id).of(LARGE).output().await.unwrap() / 1_000_000, bytes);
    }
    let largest = second.get("largest").of(LARGE);
    let reason = until_status(&largest, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains("4194304 of one process at most; see HostBuilder::max_loaded"), "{reason}");
    second.shutdown(Duration::from_secs(5)).await;
    let third = large(host(&backend).await).start().await.unwrap();
    let largest = third.get("largest").of(LARGE);
    largest.resume().await.unwrap();
    assert_eq!(largest.output().await.unwrap() / 1_000_000, 5);
}

/// What is read by then are the records of an execution that goes on elsewhere.
async fn one_that_another_has_claimed_since<B: Shared>() {
    const IT: Definition<(), ()> = Definition::new("it");
    let backend = B::new().await;
    let (ran, reads) = (Effects::default(), Arc::new(AtomicUsize::new(0)));
    let function = |name: &'static str| {
        let ran = ran.clone();
        move |proc: Process, ()| {
            let ran = ran.clone();
            async move {
                ran.add(name);
                proc.step("step", async || Ok::<_, Failure>(())).await?;
                Ok::<_, Failure>(())
            }
        }
    };
    let client = host(&backend).await.start().await.unwrap();
    let handle = client.spawn(IT, "it", &()).await.unwrap();
    let held = Arc::new(AtomicBool::new(true));
    let (set, counted) = (held.clone(), reads.clone());
    let storage = Faulty::reading(backend.storage().await, move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        set.load(Ordering::SeqCst).then(|| StorageError::unavailable("a slow network"))
    });
    let slow = Host::builder(storage).reconcile_every(Duration::from_secs(3600));
    // It has no room to claim it anew.
    let slow = slow.max_processes(1).register(IT, function("slow")).start().await.unwrap();
    until("it is claimed", async || reads.load(Ordering::SeqCst) > 0).await;
    let take_away = format!(
        "UPDATE {} SET owner = NULL, status = 'waiting', calm_claim = claim, wake_at = {} WHERE status = 'running'",
        B::PROCESSES,
        B::NOW
    );
    backend.execute(&take_away).await;
    let _other = host(&backend).await.register(IT, function("other")).start().await.unwrap();
    handle.output().await.unwrap();
    held.store(false, Ordering::SeqCst);
    until("it is read", async || slow.in_memory() == 0).await;
    assert_eq!(ran.all(), ["other"]);
}

/// They take far more than the program may have.
async fn many_that_are_large<B: Shared>() {
    const PARTS: u32 = 8;
    const MOST: usize = 256 << 10;
    let many = if long() { 500 } else { 48 };
    let backend = B::new().await;
    let writer = large(host(&backend).await).start().await.unwrap();
    for n in 0..many {
        writer.spawn(LARGE, format!("p-{n}"), &PARTS).await.unwrap();
        while n >= 8 && writer.get(format!("p-{}", n - 8)).status().await.unwrap().status != Status::Waiting {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    for n in 0..many {
        until_status(&writer.get(format!("p-{n}")).of(LARGE), Status::Waiting).await;
    }
    writer.shutdown(Duration::from_secs(5)).await;
    let client = host(&backend).await.start().await.unwrap();
    for n in 0..many {
        client.get(format!("p-{n}")).raise(GO, &()).await.unwrap();
    }
    let (well, kilobytes) = resumer(&backend, "large").await;
    assert!(well);
    let all = client.processes().status(Status::Completed).count().await.unwrap();
    assert_eq!(all.iter().map(|counted| counted.count).sum::<u64>(), many);
    println!("{many} processes of {PARTS} MiB took {kilobytes} kB at most");
    assert!(kilobytes.trim().parse::<usize>().unwrap() < MOST, "{kilobytes} kB");
}

/// Programs die until it is stuck, which happens after as many deaths as it is allowed; none of the others is.
async fn one_that_kills_programs<B: Shared>() {
    const OTHERS: u64 = 24;
    let backend = B::new().await;
    let client = host(&backend).await.start().await.unwrap();
    for n in 0..OTHERS {
        client.spawn(INNOCENT, format!("p-{n}"), &()).await.unwrap();
    }
    client.spawn(CULPRIT, "culprit", &()).await.unwrap();
    let mut deaths = 0;
    while !resumer(&backend, "deadly").await.0 {
        deaths += 1;
    }
    assert_eq!(deaths, 7);
    let stuck = client.processes().status(Status::Stuck).list(10).await.unwrap();
    assert_eq!(stuck.iter().map(|info| &*info.id).collect::<Vec<_>>(), ["culprit"]);
    let all = client.processes().status(Status::Completed).count().await.unwrap();
    assert_eq!(all.iter().map(|counted| counted.count).sum::<u64>(), OTHERS);
}

/// A process comes due while loads wait for room: the instance claims it once they have it, and not at its next look by time.
#[tokio::test(start_paused = true)]
async fn claims_that_wait_for_room() {
    const BIG: Definition<(), usize> = Definition::new("big");
    const SMALL: Definition<(), ()> = Definition::new("small");
    const MINUTE: Duration = Duration::from_secs(60);
    let begun = Arc::new(Mutex::new(Instant::now()));
    let builder = |memory: &Memory, held: Duration| {
        let begun = begun.clone();
        let big = move |proc: Process, ()| {
            *begun.lock().unwrap() = Instant::now();
            async move {
                // It is not durable: meanwhile the process keeps its records in memory, and writes nothing.
                tokio::time::sleep(held).await;
                let text = async || Ok::<_, Failure>("x".repeat(8_000_000));
                let bytes = proc.step("text", text).await?.len();
                proc.event(GO).await?;
                Ok::<_, Failure>(bytes)
            }
        };
        let small = async |proc: Process, ()| Ok::<_, Failure>(_ = proc.delay("minute", MINUTE).await?);
        let builder = Host::builder(memory.clone()).max_payload(16 << 20).quiet_time(Duration::from_millis(10));
        builder.register(BIG, big).register(SMALL, small)
    };
    let memory = Memory::new();
    let first = builder(&memory, Duration::ZERO).start().await.unwrap();
    let due = Instant::now() + MINUTE;
    let small = first.spawn(SMALL, "small", &()).await.unwrap();
    for n in 0..12 {
        let big = first.spawn(BIG, format!("big-{n}"), &()).await.unwrap();
        until_status(&big, Status::Waiting).await;
    }
    until_status(&small, Status::Waiting).await;
    first.shutdown(Duration::from_secs(1)).await;
    let client = Host::builder(memory.clone()).start().await.unwrap();
    for n in 0..12 {
        client.get(format!("big-{n}")).raise(GO, &()).await.unwrap();
    }
    tokio::time::sleep_until(due - Duration::from_secs(2)).await;
    let second = builder(&memory, MINUTE * 60).start().await.unwrap();
    second.get("small").of(SMALL).output().await.unwrap();
    let (done, last) = (Instant::now(), *begun.lock().unwrap());
    // Five seconds, for its own load waits as well.
    assert!(last > due && done - last < Duration::from_secs(6), "{:?} {:?}", last - due, done - due);
}
