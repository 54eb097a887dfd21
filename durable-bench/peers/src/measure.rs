//! The workloads: each system in turns with the database itself, each time in a fresh database.

use durable_bench::Error;
use durable_bench::counts::{Counts, Each};
use durable_bench::figures::{self, Figures, Measured, bar, median, percentile};
use durable_bench::site::Place;
use peer::{About, Answer, Ask};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

use crate::ground::Ground;
use crate::system::System;

pub(crate) const WORKLOADS: [&str; 5] = ["many", "sequential", "latency", "concurrency", "parked"];

const STEPS_EACH: usize = 5;
const CONCURRENCIES: [usize; 6] = [1, 4, 16, 64, 256, 1024];
const PARKED: [usize; 6] = [1000, 3000, 10_000, 30_000, 100_000, 1_000_000];

pub(crate) struct Bench {
    pub(crate) place: Place,
    pub(crate) systems: Vec<System>,
    pub(crate) rounds: usize,
    /// Divides the sizes.
    pub(crate) scale: usize,
    /// How long one system may start processes in one measurement.
    pub(crate) seconds: f64,
    /// How many processes wait at most.
    pub(crate) parked: usize,
    /// What the database says about itself.
    pub(crate) settings: String,
}

/// One measurement of one system.
struct Run {
    about: About,
    processes: usize,
    steps: usize,
    seconds: f64,
    times: Vec<f64>,
    each: Each,
}

impl Run {
    fn rate(&self) -> f64 {
        (self.processes * self.steps) as f64 / self.seconds
    }
}

fn times(runs: &[Run]) -> Vec<f64> {
    runs.iter().flat_map(|run| run.times.iter().copied()).collect()
}

impl Bench {
    /// This library beside the best peer, in words.
    pub(crate) async fn measure(&self, workload: &'static str, figures: &mut Figures) -> Result<Option<String>, Error> {
        match workload {
            "many" => self.many(figures).await,
            "sequential" => self.sequential(figures).await,
            "latency" => self.latency(figures).await,
            "concurrency" => self.concurrency(figures).await.map(|()| None),
            _ => self.parked(figures).await.map(|()| None),
        }
    }

    /// Many processes of five steps, beside the same rows in batches as large as this library's were.
    async fn many(&self, figures: &mut Figures) -> Result<Option<String>, Error> {
        let processes = (20_000 / self.scale).max(100);
        let (mut runs, mut raws, mut batch) = (self.none(), Vec::new(), 1000);
        for round in 1..=self.rounds {
            for (nth, system) in self.systems.iter().enumerate() {
                let run = self.run(system, round, processes, STEPS_EACH, None).await?;
                if nth == 0 {
                    let commits = run.each.commits.unwrap_or(1.0) * (run.processes * run.steps) as f64;
                    batch = ((run.processes * (run.steps + 2)) as f64 / commits.max(1.0)).round() as usize;
                    let ground = self.laid_out().await?;
                    let took = ground.at.raw().await?.batches(processes, STEPS_EACH, batch).await?;
                    raws.push((processes * STEPS_EACH) as f64 / took.as_secs_f64());
                    ground.end().await?;
                }
                runs[nth].push(run);
            }
        }
        for runs in &runs {
            let words = format!("processes of {STEPS_EACH} steps; raw: the same rows, {batch} a commit");
            self.add(figures, "many", runs, &raws, &words);
        }
        Ok(self.compared("many", &runs, |runs| median(runs.iter().map(Run::rate).collect())))
    }

    /// One process, step after step, beside one-row commits; and those of eight writers.
    async fn sequential(&self, figures: &mut Figures) -> Result<Option<String>, Error> {
        let steps = (1000 / self.scale).max(10);
        let (mut runs, mut raws, mut eights) = (self.none(), Vec::new(), Vec::new());
        for round in 1..=self.rounds {
            raws.push(self.writers(1, steps).await?);
            eights.push(self.writers(8, steps / 2).await?);
            for (nth, system) in self.systems.iter().enumerate() {
                runs[nth].push(self.run(system, round, 1, steps, Some(1)).await?);
            }
        }
        for runs in &runs {
            let words = format!("process of {steps} steps; raw: one-row commits");
            self.add(figures, "sequential", runs, &raws, &words);
        }
        let (one, eight) = (median(raws), median(eights));
        let note = "one-row commits of 8 writers; raw: of one".to_owned();
        let each = Each::default();
        let measured = Measured { value: eight, unit: "commits/s", raw: Some(one), note, each };
        let system = figures::System::new("raw".into(), self.place.name(), &self.settings);
        figures.add("sequential", system, measured);
        Ok(self.compared("sequential", &runs, |runs| median(runs.iter().map(Run::rate).collect())))
    }

    /// From start to output with one step, nothing else running, beside three commits in sequence: a start, a step, an end.
    async fn latency(&self, figures: &mut Figures) -> Result<Option<String>, Error> {
        let count = (1000 / self.scale).max(50);
        let (mut runs, mut raws) = (self.none(), Vec::new());
        for round in 1..=self.rounds {
            let ground = self.laid_out().await?;
            let mut raw = ground.at.raw().await?;
            for _ in 0..count {
                raws.push(raw.single(3).await?.iter().sum::<Duration>().as_secs_f64() * 1e3);
            }
            drop(raw);
            ground.end().await?;
            for (nth, system) in self.systems.iter().enumerate() {
                runs[nth].push(self.run(system, round, count, 1, Some(1)).await?);
            }
        }
        for runs in &runs {
            let Some(Run { about, each, .. }) = runs.last() else { continue };
            for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
                let mut times = times(runs);
                let note = format!("{name} of {}, {}; raw: three commits in sequence", times.len(), about.settings);
                let (value, raw) = (percentile(&mut times, share), Some(percentile(&mut raws, share)));
                let measured = Measured { value, unit: "ms", raw, note, each: *each };
                figures.add("latency", self.named(about), measured);
            }
        }
        // So that more is better here too.
        let often = |runs: &[Run]| 1.0 / percentile(&mut times(runs), 0.5);
        Ok(self.compared("latency, p50", &runs, often))
    }

    /// As `many`, for a while, over how many run at once.
    async fn concurrency(&self, figures: &mut Figures) -> Result<(), Error> {
        let processes = (100_000 / self.scale).max(100);
        // What takes so long to end what it has begun is not asked for more at once.
        let patience = Duration::from_secs_f64(self.seconds * 10.0);
        let mut tired = vec![false; self.systems.len()];
        for concurrent in CONCURRENCIES {
            let mut runs = self.none();
            for round in 1..=self.rounds {
                for (nth, system) in self.systems.iter().enumerate() {
                    if tired[nth] {
                        continue;
                    }
                    let began = Instant::now();
                    runs[nth].push(self.run(system, round, processes, STEPS_EACH, Some(concurrent)).await?);
                    tired[nth] |= began.elapsed() > patience;
                }
            }
            for runs in &runs {
                let Some(Run { about, each, .. }) = runs.last() else { continue };
                let value = median(runs.iter().map(Run::rate).collect());
                let note = format!("processes of {STEPS_EACH} steps, {concurrent} at once; {}", about.settings);
                let measured = Measured { value, unit: "steps/s", raw: None, note, each: *each };
                figures.add_at(Some(concurrent), "concurrency", self.named(about), measured);
            }
        }
        Ok(())
    }

    /// Memory of a program over the processes that wait in it, once nothing is done any more.
    async fn parked(&self, figures: &mut Figures) -> Result<(), Error> {
        for system in &self.systems {
            let ground = Ground::new(&self.place).await?;
            let mut running = system.start(&ground).await?;
            let bar = bar(&format!("parked: {}", system.name), 0);
            for size in PARKED.into_iter().filter(|size| *size <= self.parked) {
                bar.set_length(size as u64);
                // What has already taken long is not continued.
                let (seconds, concurrent) = (self.seconds * 10.0, running.about.concurrent);
                let ask = Ask::Wait { processes: size, concurrent, seconds };
                let answer = system.ask(&mut running, &ask, |done| bar.set_position(done as u64)).await?;
                let Answer::Waiting { processes, resident } = answer else {
                    return Err(format!("{} answers {answer:?}", system.name).into());
                };
                let note = format!("{processes} processes wait for a year; {}", running.about.settings);
                let (value, each) = (resident / f64::from(1 << 20), Each::default());
                let measured = Measured { value, unit: "MiB", raw: None, note, each };
                figures.add_at(Some(processes), "parked", self.named(&running.about), measured);
                if processes < size {
                    break;
                }
            }
            bar.finish_and_clear();
            running.end().await?;
            ground.end().await?;
        }
        Ok(())
    }

    /// This library beside the best of those that are as durable.
    fn compared(&self, what: &str, runs: &[Vec<Run>], value: impl Fn(&[Run]) -> f64) -> Option<String> {
        let mut peers: Vec<_> = self.systems.iter().zip(runs).filter(|(system, _)| system.full).collect();
        let (_, ours) = peers.remove(0);
        let values = peers.into_iter().filter_map(|(_, runs)| Some((value(runs), &runs.last()?.about.system)));
        let (best, name) = values.max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(format!("{what}: {:.1} times the best peer as durable, {name}", value(ours) / best))
    }

    fn none(&self) -> Vec<Vec<Run>> {
        self.systems.iter().map(|_| Vec::new()).collect()
    }

    /// With the database that it has, which on SQLite is linked with it.
    fn named(&self, about: &About) -> figures::System {
        let settings = if about.database.is_empty() { &self.settings } else { &about.database };
        figures::System::new(about.system.clone(), self.place.name(), settings)
    }

    fn add(&self, figures: &mut Figures, workload: &'static str, runs: &[Run], raws: &[f64], words: &str) {
        let Some(Run { about, each, processes, .. }) = runs.last() else { return };
        let value = median(runs.iter().map(Run::rate).collect());
        let note = format!("{processes} {words}; {}, {} at once", about.settings, about.concurrent.min(*processes));
        let measured = Measured { value, unit: "steps/s", raw: Some(median(raws.to_vec())), note, each: *each };
        figures.add(workload, self.named(about), measured);
    }

    /// Fresh, with this library's tables.
    async fn laid_out(&self) -> Result<Ground, Error> {
        let ground = Ground::new(&self.place).await?;
        ground.at.lay_out().await?;
        Ok(ground)
    }

    /// One-row commits of so many writers, commits a second altogether.
    async fn writers(&self, writers: usize, commits: usize) -> Result<f64, Error> {
        let ground = self.laid_out().await?;
        let mut all = JoinSet::new();
        let mut raws = Vec::new();
        for nth in 0..writers {
            let mut raw = ground.at.raw().await?;
            raw.writer(nth);
            raws.push(raw);
        }
        let started = Instant::now();
        for mut raw in raws {
            all.spawn(async move { raw.single(commits).await.map(|_| ()) });
        }
        while let Some(one) = all.join_next().await {
            one??;
        }
        let rate = (writers * commits) as f64 / started.elapsed().as_secs_f64();
        ground.end().await?;
        Ok(rate)
    }

    /// So many processes of so many steps, so many at once or as many as the system does best with.
    async fn run(
        &self,
        system: &System,
        round: usize,
        processes: usize,
        steps: usize,
        concurrent: Option<usize>,
    ) -> Result<Run, Error> {
        let ground = Ground::new(&self.place).await?;
        let mut running = system.start(&ground).await?;
        let about = running.about.clone();
        let concurrent = concurrent.unwrap_or(about.concurrent);
        let counts = Counts::begin(&ground.all()).await?;
        let bar = bar(&format!("{} {round}/{}", system.name, self.rounds), processes);
        let ask = Ask::Run { processes, steps: u32::try_from(steps)?, concurrent, seconds: self.seconds };
        let answer = system.ask(&mut running, &ask, |done| bar.set_position(done as u64)).await?;
        bar.finish_and_clear();
        let Answer::Ran { processes, seconds, processor, times } = answer else {
            return Err(format!("{} answers {answer:?}", system.name).into());
        };
        running.end().await?;
        let mut each = counts.each(processes * steps).await?;
        each.processor = Some(processor * 1e6 / (processes * steps) as f64);
        ground.end().await?;
        Ok(Run { about, processes, steps, seconds, times, each })
    }
}
