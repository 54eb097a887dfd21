//! The check of the check: each rule, broken, is noticed within a bounded number of seeds. Run by `scripts/mutations`.
#![cfg(durable_mutations)]
#![allow(missing_docs)]

use durable_core::mutation::{Rule, breaking};
use durable_simulation::play;

/// What is said about the first seed, among so many, at which the broken rule is noticed.
fn noticed(rule: Rule, within: u64) {
    breaking(Some(rule));
    let noticed = (0..within).find_map(|seed| Some((seed, play(seed, false).wrong.into_iter().next()?)));
    let (seed, wrong) = noticed.unwrap_or_else(|| panic!("{rule:?} was broken, and nobody noticed in {within} seeds"));
    println!("{rule:?}: seed {seed}: {wrong}");
}

#[test]
fn no_fence_in_the_batch() {
    noticed(Rule::Fence, 500);
}

#[test]
fn a_fence_that_is_read_before_the_lock() {
    noticed(Rule::FenceUnderLock, 500);
}

#[test]
fn a_park_without_the_signal_check() {
    noticed(Rule::ParkChecksSignals, 500);
}

#[test]
fn a_claim_without_the_owner_check() {
    noticed(Rule::ClaimChecksOwner, 500);
}

#[test]
fn a_start_that_is_not_recognised() {
    noticed(Rule::OwnStart, 500);
}

#[test]
fn a_message_that_is_not_recognised() {
    noticed(Rule::OwnMessage, 500);
}

#[test]
fn a_record_that_is_not_recognised() {
    noticed(Rule::OwnRecord, 500);
}

#[test]
fn a_park_that_is_not_recognised() {
    noticed(Rule::OwnPark, 500);
}

#[test]
fn an_end_that_is_not_recognised() {
    noticed(Rule::OwnEnd, 500);
}

#[test]
fn a_claim_that_is_not_found_among_what_is_owned() {
    noticed(Rule::OwnClaim, 5_000);
}

#[test]
fn what_is_held_up_is_overtaken() {
    noticed(Rule::StaysBehind, 5_000);
}

#[test]
fn an_acknowledged_set_is_lost() {
    noticed(Rule::SetWrites, 500);
}

#[test]
fn get_returns_the_first_value_that_was_recorded() {
    noticed(Rule::GetsLast, 500);
}

#[test]
fn a_set_that_does_not_overwrite() {
    noticed(Rule::SetOverwrites, 500);
}

#[test]
fn a_batch_that_is_not_fenced_off() {
    noticed(Rule::Refences, 5_000);
}

#[test]
fn an_attempt_with_an_old_heartbeat() {
    noticed(Rule::Gate, 500);
}

#[test]
fn a_cancellation_in_the_replay() {
    noticed(Rule::ReplaySeesNoCancel, 5_000);
}

#[test]
fn an_effect_in_the_replay() {
    noticed(Rule::ReplayBeginsNothing, 500);
}

#[test]
fn records_that_are_asked_for_by_nobody() {
    noticed(Rule::JudgesUnvisited, 500);
}

#[test]
fn a_success_after_the_cancellation() {
    noticed(Rule::CancelStands, 500);
}

#[test]
fn a_wake_before_the_commit() {
    noticed(Rule::WakeAfterCommit, 500);
}

#[test]
fn a_record_that_is_not_awaited() {
    noticed(Rule::RecordAwaited, 500);
}

#[test]
fn nothing_is_noticed_where_nothing_is_broken() {
    breaking(None);
    for seed in 0..100 {
        assert_eq!(play(seed, false).wrong, Vec::<String>::new(), "seed {seed}");
    }
}
