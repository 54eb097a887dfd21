use futures_util::{StreamExt, stream};
use std::time::{Duration, Instant};

use super::many::STEPS_EACH;
use super::{Bench, CONCURRENT};
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, median};
use crate::processes::STEPS;
use crate::programs::{Program, Role};

impl Bench {
    /// More and more programs share what waits in one database.
    pub(super) async fn instances(&self) -> Result<Vec<Measured>, Error> {
        let sizes = [1, 2, 4, 8];
        let (mut rates, mut lost) = (sizes.map(|_| Vec::new()), sizes.map(|_| (0, 0)));
        for round in 1..=self.rounds {
            for (nth, programs) in sizes.into_iter().enumerate() {
                let (rate, claims, empty) = self.shared(programs, &format!("instances {round}: {programs}")).await?;
                rates[nth].push(rate);
                lost[nth] = (lost[nth].0 + claims, lost[nth].1 + empty);
            }
        }
        let [one, ..] = rates.each_ref().map(|rates| median(rates.clone()));
        let figure = |(nth, programs): (usize, usize)| {
            let (claims, empty) = lost[nth];
            let note = format!(
                "{programs} programs, all together; raw: one program; {empty} of {claims} claims lost to another one"
            );
            Measured { value: median(rates[nth].clone()), unit: "steps/s", raw: Some(one), note, each: Each::default() }
        };
        Ok(sizes.into_iter().enumerate().map(figure).collect())
    }

    /// So many programs run what was started before them: steps a second, claims, and claims without success.
    async fn shared(&self, programs: usize, name: &str) -> Result<(f64, usize, usize), Error> {
        let count = (20_000 / self.scale).max(100);
        let site = self.place.site()?;
        let watcher = site.at.watcher().await?;
        let mut starts = stream::iter(0..count)
            .map(|n| {
                let watcher = &watcher;
                async move { watcher.spawn(STEPS, format!("i-{n}"), &(STEPS_EACH as u32)).await }
            })
            .buffer_unordered(CONCURRENT);
        while let Some(start) = starts.next().await {
            start?;
        }
        let start = |_| Program::start(Role::Share, &site.at, 0);
        let mut programs = (0..programs).map(start).collect::<Result<Vec<Program>, Error>>()?;
        for program in &mut programs {
            program.says()?;
        }
        let mut watch = site.at.raw().await?;
        let bar = bar(name, count);
        let started = Instant::now();
        for program in &mut programs {
            program.begin()?;
        }
        loop {
            let (ended, _) = watch.ended_and_owned("").await?;
            bar.set_position(ended as u64);
            if ended == count {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let rate = (count * STEPS_EACH) as f64 / started.elapsed().as_secs_f64();
        bar.finish_and_clear();
        let (mut claims, mut empty) = (0, 0);
        for program in programs {
            let words = program.end()?;
            let (all, without) = words.split_once(' ').ok_or("a program does not tell its claims")?;
            claims += all.parse::<usize>()?;
            empty += without.parse::<usize>()?;
        }
        watcher.shutdown(Duration::from_secs(5)).await;
        Ok((rate, claims, empty))
    }
}
