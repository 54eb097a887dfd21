use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, median};
use crate::processes::STEPS;

impl Bench {
    /// A process of ten thousand steps beside ten of a thousand, one after the other.
    pub(super) async fn long(&self) -> Result<Vec<Measured>, Error> {
        let steps = (10_000 / self.scale).max(100);
        let (mut long, mut short) = (Vec::new(), Vec::new());
        let bar = bar("long", self.rounds);
        for _ in 0..self.rounds {
            let site = self.place.site()?;
            let host = site.at.host().await?.start().await?;
            for (rates, processes) in [(&mut short, 10), (&mut long, 1)] {
                let each = u32::try_from(steps / processes)?;
                let started = Instant::now();
                for n in 0..processes {
                    host.spawn(STEPS, format!("{processes}-{n}"), &each).await?.output().await?;
                }
                rates.push(steps as f64 / started.elapsed().as_secs_f64());
            }
            host.shutdown(Duration::from_secs(5)).await;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!("1 process of {steps} steps; raw: 10 of {}, one after the other", steps / 10);
        let (value, raw) = (median(long), Some(median(short)));
        Ok(vec![Measured { value, unit: "steps/s", raw, note, each: Each::default() }])
    }
}
