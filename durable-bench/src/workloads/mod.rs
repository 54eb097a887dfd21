//! What is measured: one file for each workload.

mod grown;
mod idle;
mod instances;
mod latency;
mod long;
mod many;
mod parked;
mod recovery;
mod remote;
mod sequential;
mod takeover;
mod transaction;
mod waiting;

use crate::Error;
use crate::figures::Measured;
use crate::site::Place;

/// How many calls are under way at once where a workload is about throughput.
pub(crate) const CONCURRENT: usize = 4000;

/// Their names.
pub const WORKLOADS: [&str; 13] = [
    "sequential",
    "many",
    "latency",
    "waiting",
    "parked",
    "recovery",
    "transaction",
    "instances",
    "grown",
    "long",
    "idle",
    "takeover",
    "remote",
];

/// A run of the benchmark.
#[derive(Clone)]
pub struct Bench {
    /// Where.
    pub place: Place,
    /// How often the database and the engine take turns.
    pub rounds: usize,
    /// How much smaller than usual.
    pub scale: usize,
}

impl Bench {
    /// The workloads with these names.
    pub fn named(&self, names: &[String]) -> Result<Vec<&'static str>, Error> {
        let known = |name: &String| {
            let known = WORKLOADS.into_iter().find(|known| known == name);
            known.ok_or_else(|| format!("no workload {name:?}; there are: all, {}", WORKLOADS.join(", ")).into())
        };
        names.iter().map(known).collect()
    }

    /// One workload.
    pub async fn measure(&self, workload: &str) -> Result<Vec<Measured>, Error> {
        match workload {
            "sequential" => self.sequential().await,
            "many" => self.many().await,
            "parked" => self.parked().await,
            "latency" => self.latency().await,
            "recovery" => self.recovery().await,
            "transaction" => self.transaction().await,
            "instances" => self.instances().await,
            "grown" => self.grown().await,
            "long" => self.long().await,
            "idle" => self.idle().await,
            "waiting" => self.waiting().await,
            "takeover" => self.takeover().await,
            _ => self.remote().await,
        }
    }
}
