//! A crash test's stage.

use durable_core::storage::Storage;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinHandle;

use super::check::check;
use super::deadly::Boundary;
use super::journal::{self, Line, What};
use super::shared::{Shared, read};
use super::worker::{Orders, Worker, run};
use super::workload::STEPS;
use crate::orphans::orphans;

/// Longer than anything may take.
pub const LONG: Duration = Duration::from_secs(200);

/// Workers on one database, their journal, and the check of both.
pub struct Scene<B> {
    worker: &'static str,
    /// The database.
    pub backend: B,
    folder: tempfile::TempDir,
    processes: u32,
    pace: Duration,
    /// See [`Deadly::forgets`](super::deadly::Deadly::forgets).
    pub forgets: Option<u32>,
    /// See [`Orders::defaults`].
    pub defaults: bool,
}

impl<B: Shared> Scene<B> {
    /// With this worker program, so many processes, and so much time for each step.
    pub async fn new(worker: &'static str, processes: u32, pace: Duration) -> Self {
        Self::on(B::new().await, worker, processes, pace)
    }

    /// On this database.
    pub fn on(backend: B, worker: &'static str, processes: u32, pace: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { worker, backend, folder, processes, pace, forgets: None, defaults: false }
    }

    /// The same on another database, which goes on from what the workers have written so far.
    pub fn copied_to<C: Shared>(&self, backend: C) -> Scene<C> {
        let copy = Scene::on(backend, self.worker, self.processes, self.pace);
        std::fs::copy(self.journal(), copy.journal()).unwrap();
        copy
    }

    fn journal(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    fn orders(&self, die: Option<Boundary>) -> Orders {
        Orders {
            storage: self.backend.worker_address(),
            journal: self.journal(),
            processes: self.processes,
            die,
            pace: self.pace,
            forgets: self.forgets,
            defaults: self.defaults,
        }
    }

    /// Starts a worker.
    pub fn start(&self, die: Option<Boundary>) -> Worker {
        self.orders(die).start(Path::new(self.worker), &[])
    }

    /// Starts a worker with these variables in its environment.
    pub fn start_with(&self, environment: &[(&str, &str)]) -> Worker {
        self.orders(None).start(Path::new(self.worker), environment)
    }

    /// Is a worker, the one with this number, in the test's own program.
    pub fn start_here(&self, storage: impl Storage, number: u32) -> JoinHandle<()> {
        tokio::spawn(run(storage, self.orders(None), number))
    }

    /// What the workers have written so far.
    pub fn lines(&self) -> Vec<Line> {
        journal::read(&self.journal())
    }

    /// What is wrong with what the workers left.
    pub async fn wrong(&self) -> Vec<String> {
        let (records, processes) = read(&self.backend).await;
        let mut wrong = check(&self.lines(), &records, &processes, &STEPS);
        if processes.len() != self.processes as usize {
            wrong.push(format!("{} processes instead of {}", processes.len(), self.processes));
        }
        wrong.extend(orphans(&self.backend).await);
        wrong
    }

    /// Fails if anything is wrong.
    pub async fn check(&self) {
        let wrong = self.wrong().await;
        assert!(wrong.is_empty(), "{} things are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }

    /// How many attempts have begun.
    pub fn begun(&self) -> usize {
        self.lines().iter().filter(|line| matches!(line.what, What::Begin { .. })).count()
    }

    /// Waits until so many attempts have begun.
    pub async fn until_begun(&self, attempts: usize) {
        crate::until("attempts", async || self.begun() >= attempts).await;
    }

    /// From now on, whoever is fenced while it owns processes is counted.
    pub async fn count_takeovers(&self) {
        self.backend.execute(B::COUNT_TAKEOVERS).await;
    }
}

/// A small generator: the tests are the same at each run.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
