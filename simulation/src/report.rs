//! Many seeds, on all processors.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::play::{Played, play};
use crate::tally::Tally;

/// Of the trace of a seed that failed, so many lines are shown.
const SHOWN: usize = 60;
/// After so many that failed, no further seed is begun.
const ENOUGH: usize = 10;

/// What came of many seeds.
#[derive(Debug, Default)]
pub struct Report {
    pub seeds: u64,
    /// Those with violations.
    pub failed: Vec<u64>,
    pub tally: Tally,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty()
    }

    /// What was not hit as often as it must be.
    pub fn missing(&self) -> Vec<String> {
        self.tally.missing(self.seeds).into_iter().chain(self.tally.impossible()).collect()
    }

    /// Where faults hit, and what came of it.
    pub fn places(&self) -> String {
        self.tally.places()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} seeds, {} with violations; faults: {}", self.seeds, self.failed.len(), self.tally)
    }
}

/// Plays seeds, and hands on the story of each that failed.
pub fn run(from: u64, seeds: u64, tell: impl Fn(&str) + Sync) -> Report {
    let next = AtomicU64::new(from);
    let report = Mutex::new(Report::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let full = report.lock().unwrap_or_else(PoisonError::into_inner).failed.len() >= ENOUGH;
                    if seed >= from + seeds || full {
                        return;
                    }
                    let Played { wrong, tally, .. } = play(seed, false);
                    {
                        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
                        report.seeds += 1;
                        report.tally.add(&tally);
                        if wrong.is_empty() {
                            continue;
                        }
                        report.failed.push(seed);
                    }
                    tell(&story(seed));
                }
            });
        }
    });
    report.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What happened in a seed, up to its first violation, as far as that process and the hosts are concerned.
pub fn story(seed: u64) -> String {
    let Played { wrong, trace, .. } = play(seed, true);
    let Some(first) = wrong.first() else { return format!("seed {seed}: nothing is wrong") };
    let end = trace.iter().position(|line| line.contains("WRONG")).map_or(trace.len(), |at| at + 1);
    let process = first.split(|c: char| !c.is_alphanumeric()).find(|word| is_process(word));
    let concerns = |line: &&String| {
        let mut words = line.split(|c: char| !c.is_alphanumeric());
        line.contains("WRONG") || words.clone().any(|word| Some(word) == process) || !words.any(is_process)
    };
    let lines: Vec<&String> = trace[..end].iter().filter(concerns).collect();
    let shown = lines.len().saturating_sub(SHOWN);
    let lines: Vec<&str> = lines[shown..].iter().map(|line| line.as_str()).collect();
    format!(
        "{}\nseed {seed}: {} violations, the first: {first}\nagain: scripts/simulate --seeds 1 --from {seed}\n",
        lines.join("\n"),
        wrong.len()
    )
}

fn is_process(word: &str) -> bool {
    word.strip_prefix('p').is_some_and(|number| number.parse::<u64>().is_ok())
}
