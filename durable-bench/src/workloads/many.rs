use durable_core::Host;
use futures_util::{StreamExt, stream};
use std::time::{Duration, Instant};

use super::{Bench, CONCURRENT};
use crate::Error;
use crate::counts::{Counts, Each};
use crate::figures::{Measured, all, median};
use crate::processes::STEPS;

pub(super) const STEPS_EACH: usize = 5;

/// Starts so many processes of five steps and awaits them all; steps a second.
pub(super) async fn run(host: &Host, name: &str, count: usize) -> Result<f64, Error> {
    let started = Instant::now();
    let calls = stream::iter(0..count)
        .map(|n| async move {
            let process = host.spawn(STEPS, format!("{name}-{n}"), &(STEPS_EACH as u32)).await?;
            process.output().await?;
            Ok::<_, Error>(())
        })
        .buffer_unordered(CONCURRENT);
    all(name, count, calls).await?;
    Ok((count * STEPS_EACH) as f64 / started.elapsed().as_secs_f64())
}

impl Bench {
    /// Many processes of five steps, beside the same rows in batches.
    pub(super) async fn many(&self) -> Result<Vec<Measured>, Error> {
        let count = (20_000 / self.scale).max(100);
        let (mut ours, mut raws, mut counted) = (Vec::new(), Vec::new(), Each::default());
        for round in 1..=self.rounds {
            let (mut raw, beside) = self.place.raw().await?;
            let steps = count * STEPS_EACH;
            raws.push(steps as f64 / raw.batches(count, STEPS_EACH, 1000).await?.as_secs_f64());
            drop((raw, beside));
            let site = self.place.site()?;
            let counts = Counts::begin(&site.at).await?;
            let host = site.at.host().await?.start().await?;
            ours.push(run(&host, &format!("many {round}/{}", self.rounds), count).await?);
            host.shutdown(Duration::from_secs(5)).await;
            drop(host);
            counted = counts.each(steps).await?;
        }
        let note = format!("{count} processes of {STEPS_EACH} steps; raw: the same rows, 1,000 a commit");
        Ok(vec![Measured { value: median(ours), unit: "steps/s", raw: Some(median(raws)), note, each: counted }])
    }
}
