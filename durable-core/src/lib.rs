//! Durable processes for Rust services, on the SQL database that they already have.
//!
//! A long-running business process (a saga, a process manager, a schedule) is **one `async fn`**. The result of each
//! of its steps is recorded in the database; after a crash, a deploy or a year of waiting it goes on exactly where it
//! left off, on whichever instance of the service is alive.
//!
//! This crate is the API, the engine and the [`Storage`](storage::Storage) trait. Services depend on one of the
//! backends, which re-exports it: `durable-sqlite`, `durable-postgres`, `durable-mssql`.
//!
//! Start with [`Process`] (what a function is handed), [`Host`] (what runs it) and [`Handle`] (what others hold).

mod definition;
mod engine;
pub mod error;
mod host;
pub mod limits;
pub mod memory;
#[cfg(durable_mutations)]
#[doc(hidden)]
pub mod mutation;
mod name;
mod payload;
mod process;
mod retry;
pub mod storage;
#[cfg(feature = "testing")]
pub mod testing;

#[cfg(feature = "conformance")]
pub mod conformance;

#[doc(hidden)]
pub use engine::surroundings::Surroundings;

pub use definition::{Definition, Event};
pub use error::{
    Cancelled, Caught, Failure, HandleError, IntoFailure, OutputError, ProcessError, RaiseError, SpawnError,
    StartError, StepError, Unavailable,
};
pub use host::{
    Handle, Health, Host, HostBuilder, Info, Json, OutboxError, Processes, RaiseIn, Resume, Send as SendMessage,
    SpawnIn, SpawnProcess, with,
};
pub use limits::LimitError;
pub use name::Name;
pub use payload::EncodeError;
pub use process::{
    All, AsFailure, Attempt, Attempts, AwaitOutput, CancelToken, Child, Delay, Delayed, Get, Process, Race, RaceMember,
    RaiseFrom, Receive, Set, SpawnChild, Statements, Step, StepOutput, Transaction, Typed,
};
pub use retry::Retry;
pub use storage::{Counted, InstanceId, RunId, Status};

// What stands in public signatures.
pub use {chrono, uuid};
