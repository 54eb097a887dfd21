//! What every storage must do, one named case each. A backend, and any third party's, runs all of them:
//!
//! ```
//! use durable_core::conformance::Subject;
//! use durable_core::memory::Memory;
//!
//! struct InMemory(Memory);
//! impl Subject for InMemory {
//!     type Storage = Memory;
//!     async fn new() -> Self {
//!         Self(Memory::new())
//!     }
//!     async fn open(&self) -> Memory {
//!         self.0.clone()
//!     }
//! }
//! // One `#[test]` for each case:
//! durable_core::conformance!(InMemory);
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)] // These are tests.

pub mod chores;
pub mod claims;
pub mod instances;
pub mod mailbox;
pub mod processes;
pub mod records;
pub mod scene;

use std::future::Future;

use crate::storage::Storage;

/// A storage under test.
pub trait Subject: Sized + Send + Sync + 'static {
    /// Its type.
    type Storage: Storage;
    /// A new, empty database.
    fn new() -> impl Future<Output = Self> + Send;
    /// Another connection to it.
    fn open(&self) -> impl Future<Output = Self::Storage> + Send;
    /// Why there is no such database here, if there is none: the cases say so and pass.
    fn missing() -> Option<String> {
        None
    }
}

/// Runs one case.
pub fn run<S: Subject>(case: impl AsyncFnOnce(&S)) {
    if let Some(why) = S::missing() {
        println!("not run: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let subject = S::new().await;
        case(&subject).await;
    });
}

/// One `#[test]` for each case, for a [`Subject`].
#[macro_export]
macro_rules! conformance {
    ($subject:ty) => {
        $crate::conformance!(@cases $subject,
            records: [a_record_is_there_once_committed, a_pending_record_is_overwritten, a_final_record_is_not,
            a_final_record_stays_as_it_is,
                a_value_is_overwritten, the_same_batch_again_changes_nothing, only_the_owner_records,
                only_under_the_current_claim, names_and_keys_are_not_joined, payloads_come_back_byte_for_byte,
                texts_up_to_their_limits, a_batch_is_all_or_nothing, a_large_batch, a_load_may_be_bounded],
            mailbox: [messages_are_numbered_in_their_order, a_message_id_is_taken_once, a_message_wakes,
                a_taken_message_is_not_loaded_again, nobody_and_the_dead, a_durable_message_and_its_record,
                a_park_that_missed_a_message, a_signal_of_another_instance_is_seen],
            claims: [only_what_is_due_is_claimed, the_earliest_first, each_process_once, only_the_kind_and_namespace,
                a_park_gives_back, a_released_one_is_due, what_is_owned],
            chores: [very_many_that_await_one, a_deletion_of_very_many_rows, an_id_of_very_many_runs],
            processes: [what_is_given_back_is_due, a_start_is_there_once, a_start_that_is_taken, a_restart_keeps_the_former_run,
                an_end_wakes_those_that_await_it, an_end_that_is_lost_changes_nothing, a_durable_start_and_its_record, cancelling, resuming_and_forgetting,
                orders_of_a_run, terminating, deleting, finding_listing_counting, due_times_to_the_end_of_time],
            instances: [enlisting_again, owners_that_are_known, a_fence_stops_batches, a_higher_generation_stops_lower_ones, a_heartbeat_saves_from_the_fence,
                a_fenced_heart_stops, what_the_fenced_owned_is_released, proof_of_life, retiring, polling]
        );
    };
    (@cases $subject:ty, $($group:ident: [$($case:ident),* $(,)?]),*) => {
        $(mod $group {
            use super::*;
            $(#[test]
            fn $case() {
                $crate::conformance::run::<$subject>(async |subject| {
                    $crate::conformance::$group::$case(subject).await;
                });
            })*
        })*
    };
}
