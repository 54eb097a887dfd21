//! Programs that die: the worker that is killed, where it can be made to die, and the check of what it left.

pub mod check;
pub mod deadly;
pub mod journal;
pub mod scene;
pub mod shared;
pub mod worker;
pub mod workload;
