//! One semantics on every storage: the same calls, drawn from seeds, on the storage in memory, which is the model, and on a
//! database. What they answer is compared call by call, and in the end everything that can be read.
//!
//! Compared are answers as they are, with names for ids; errors by their kind. Every time is compared as the call in which
//! it was written, by each storage's own clock. Not compared: the order in which claimed processes are told, since none is
//! promised; which of a batch's ends wakes whom; proof of life, which comes and goes by itself; the words of errors.
//!
//! `DURABLE_SEEDS=17..18` plays only these.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod call;
mod names;
mod play;
mod side;
mod tally;

use durable_core::memory::Memory;
use durable_core::storage::Storage;
use durable_simulation::seed::Seed;
use durable_tests::{Backend, MssqlSchema, PostgresSchema, SqliteFile, long};
use std::ops::Range;

use call::Call;
use play::{Difference, play};
use side::Side;
use tally::Tally;

#[test]
fn sqlite() {
    durable_tests::run(as_the_model::<SqliteFile>(SEEDS));
}

#[test]
fn postgres() {
    PostgresSchema::run(as_the_model::<PostgresSchema>(SEEDS));
}

#[test]
fn mssql() {
    // What stands in for it may take seconds for each.
    MssqlSchema::run(as_the_model::<MssqlSchema>(SEEDS / 5));
}

const SEEDS: u64 = 30;
/// The calls of a seed.
const CALLS: usize = 100;

async fn as_the_model<B: Backend>(seeds: u64) {
    let backend = B::new().await;
    let storage = backend.storage().await;
    let mut tally = Tally::new();
    let seeds = if long() { seeds * 10 } else { seeds };
    let least = (seeds / 15).max(1) as usize;
    let chosen = chosen();
    // On and on, until each kind has come to both.
    let most = chosen.clone().unwrap_or(0..seeds * 10);
    for number in most {
        if chosen.is_none() && number >= seeds && tally.rare(least).is_empty() {
            break;
        }
        let calls = call::draw(&mut Seed::new(number), CALLS);
        if compare(&storage, &calls, &mut tally).await.is_err() {
            panic!("seed {number}:\n{}", shortest(&storage, calls).await);
        }
    }
    println!("{tally}");
    if chosen.is_none() {
        let rare = tally.rare(least);
        assert!(rare.is_empty(), "not tried {least} times either way: {rare:?}\n{tally}");
    }
}

fn chosen() -> Option<Range<u64>> {
    let range = std::env::var("DURABLE_SEEDS").ok()?;
    let (from, to) = range.split_once("..").expect("from..to");
    Some(from.parse().unwrap()..to.parse().unwrap())
}

async fn compare(storage: &(impl Storage + Clone), calls: &[Call], tally: &mut Tally) -> Result<(), Difference> {
    let sides = [Side::new(Box::new(Memory::new())), Side::new(Box::new(storage.clone()))];
    play(calls, sides, tally).await
}

/// Leaves out what makes no difference to there being one: calls, and operations of a batch.
async fn shortest(storage: &(impl Storage + Clone), mut calls: Vec<Call>) -> String {
    let mut shown = "it does not differ when it is played again".to_owned();
    'shorter: loop {
        for without in without_one(&calls) {
            if let Err(difference) = compare(storage, &without, &mut Tally::new()).await {
                (shown, calls) = (difference.to_string(), without);
                continue 'shorter;
            }
        }
        return shown;
    }
}

/// The calls without one of them, or without one operation: the last ones first.
fn without_one(calls: &[Call]) -> Vec<Vec<Call>> {
    let mut all = Vec::new();
    for (at, call) in calls.iter().enumerate().rev() {
        let mut fewer = calls.to_vec();
        fewer.remove(at);
        all.push(fewer);
        let Call::Commit { ops, .. } = call else { continue };
        for nth in 0..ops.len() {
            let mut fewer = calls.to_vec();
            if let Call::Commit { ops, .. } = &mut fewer[at] {
                ops.remove(nth);
            }
            all.push(fewer);
        }
    }
    all
}
