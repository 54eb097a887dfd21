//! Schedules from a seed, and an oracle that knows what may come of them. See `ARCHITECTURE.md`.
#![allow(missing_docs)]

pub mod clients;
pub mod draw;
pub mod effects;
pub mod fault;
pub mod interpret;
pub mod judge;
pub mod lateness;
pub mod ledger;
pub mod link;
pub mod mailbox;
pub mod play;
pub mod program;
pub mod report;
pub mod seed;
pub mod tally;
pub mod transaction;
pub mod values;
pub mod world;

pub use play::{Played, play};
pub use report::{Report, run, story};
pub use tally::Tally;
