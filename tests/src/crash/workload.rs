//! The process that the crash tests run: steps one after the other and side by side, a retry, a timer, a message, a
//! variable, a race.

use durable_core::*;
use std::future::IntoFuture;
use std::time::Duration;

use super::deadly::{Fuse, Of};
use super::journal::{Journal, What};

/// The process's kind.
pub const WORK: Definition<u32, u32> = Definition::new("work");
/// The message that it waits for.
pub const GO: Event<u32> = Event::new("Go");
/// The names of its steps, all of which every process records exactly once.
pub const STEPS: [&str; 7] = ["first", "left", "right", "flaky", "after timer", "after message", "last"];

/// What the process's steps write to, and where they die.
#[derive(Clone)]
pub struct Bench {
    /// What happened.
    pub journal: Journal,
    /// Where to die.
    pub fuse: Fuse,
    /// How long each step takes.
    pub pace: Duration,
}

/// Runs it.
pub async fn work(bench: Bench, proc: Process, input: u32) -> Result<u32, Failure> {
    let mut sum = step(&bench, &proc, "first", input).await?;
    let (left, right) = tokio::join!(step(&bench, &proc, "left", input), step(&bench, &proc, "right", input));
    sum += left? + right?;
    sum += proc
        .step("flaky", |attempt: Attempt| {
            let (bench, proc) = (bench.clone(), proc.clone());
            async move {
                let value = effect(&bench, &proc, "flaky", &attempt, input).await;
                if attempt.number() < 3 { Err(Failure::new("not yet")) } else { Ok(value) }
            }
        })
        .retry(Retry::fixed(Duration::from_millis(5)).max_attempts(5))
        .await?;
    returned(&bench, &proc, "flaky");
    proc.set("progress", sum).await?;
    proc.delay("timer", Duration::from_millis(100)).await?;
    sum += step(&bench, &proc, "after timer", input).await?;
    sum += proc
        .race("message or never")
        .on(proc.event(GO), |n| n)
        .on(proc.delay("never", Duration::from_secs(3600)), |_| 1_000_000)
        .await?;
    sum += step(&bench, &proc, "after message", input).await?;
    let progress = proc.get("progress", || 0).await?;
    sum += step(&bench, &proc, "last", progress).await?;
    bench.journal.write(&proc, What::End);
    Ok(sum)
}

/// What the process returns.
pub fn expected(input: u32) -> u32 {
    let progress = 4 * input;
    progress + input + 1 + input + progress
}

/// A step that takes its time, and writes down what it does.
pub async fn step(bench: &Bench, proc: &Process, name: &'static str, value: u32) -> Result<u32, Failure> {
    let value = proc
        .step(name, |attempt: Attempt| {
            let (bench, proc) = (bench.clone(), proc.clone());
            async move { Ok::<_, Failure>(effect(&bench, &proc, name, &attempt, value).await) }
        })
        .into_future()
        .await?;
    returned(bench, proc, name);
    Ok(value)
}

async fn effect(bench: &Bench, proc: &Process, name: &str, attempt: &Attempt, value: u32) -> u32 {
    let step = format!("{name}#{}", attempt.number());
    bench.journal.write(proc, What::Begin { step: step.clone(), key: attempt.key().to_string() });
    bench.fuse.pass(Of::Effect, false);
    if !bench.pace.is_zero() {
        tokio::time::sleep(bench.pace).await;
    }
    bench.journal.write(proc, What::Effect { step });
    bench.fuse.pass(Of::Effect, true);
    value
}

fn returned(bench: &Bench, proc: &Process, name: &str) {
    bench.journal.write(proc, What::Returned { step: name.to_owned() });
}
