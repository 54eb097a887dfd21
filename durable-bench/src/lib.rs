//! The parts of the benchmark: what is measured, where, and how it is shown.

mod claims;
pub mod counts;
pub mod figures;
mod machine;
pub mod processes;
pub mod programs;
mod proxy;
pub mod raw;
pub mod site;
pub mod workloads;

/// Whatever went wrong: the benchmark ends with it.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
