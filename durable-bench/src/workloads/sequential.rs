use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::{Counts, Each};
use crate::figures::{Measured, bar, median};
use crate::processes::STEPS;

impl Bench {
    /// One process, step after step, beside one-row commits.
    pub(super) async fn sequential(&self) -> Result<Vec<Measured>, Error> {
        let steps = (1000 / self.scale).max(10);
        let (mut ours, mut raws, mut counted) = (Vec::new(), Vec::new(), Each::default());
        let bar = bar("sequential", self.rounds);
        for round in 0..self.rounds {
            let (mut raw, beside) = self.place.raw().await?;
            let times = raw.single(steps).await?;
            raws.push(steps as f64 / times.iter().sum::<Duration>().as_secs_f64());
            drop((raw, beside));
            let site = self.place.site()?;
            let counts = Counts::begin(&site.at).await?;
            let host = site.at.host().await?.start().await?;
            let started = Instant::now();
            host.spawn(STEPS, format!("s-{round}"), &u32::try_from(steps)?).await?.output().await?;
            ours.push(steps as f64 / started.elapsed().as_secs_f64());
            host.shutdown(Duration::from_secs(5)).await;
            drop(host);
            counted = counts.each(steps).await?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!("1 process of {steps} steps; raw: one-row commits");
        Ok(vec![Measured { value: median(ours), unit: "steps/s", raw: Some(median(raws)), note, each: counted }])
    }
}
