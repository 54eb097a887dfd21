use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, median};
use crate::programs::{Program, Role};

impl Bench {
    /// A program with many processes in flight is killed; how long until another one has run them all again.
    pub(super) async fn recovery(&self) -> Result<Vec<Measured>, Error> {
        let count = (10_000 / self.scale).max(100);
        let mut times = Vec::new();
        let bar = bar("recovery", self.rounds);
        for _ in 0..self.rounds {
            let site = self.place.site()?;
            let mut program = Program::start(Role::Flight, &site.at, count)?;
            program.says()?;
            let mut watch = site.at.raw().await?;
            program.kill()?;
            let started = Instant::now();
            let host = site.at.host().await?.start().await?;
            while watch.ended_and_owned("").await?.0 < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            times.push(started.elapsed().as_secs_f64());
            host.shutdown(Duration::from_secs(5)).await;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!("{count} in flight, SIGKILL, from the new program's start to the end of the last one");
        Ok(vec![Measured { value: median(times), unit: "s", raw: None, note, each: Each::default() }])
    }
}
