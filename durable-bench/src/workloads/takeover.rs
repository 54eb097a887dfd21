use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, median};
use crate::programs::{Program, Role};

impl Bench {
    /// One of three programs is killed; how long until the others have run all that it ran.
    pub(super) async fn takeover(&self) -> Result<Vec<Measured>, Error> {
        let count = (1000 / self.scale).max(100);
        let mut times = Vec::new();
        let bar = bar("takeover", self.rounds);
        for _ in 0..self.rounds {
            let site = self.place.site()?;
            let mut programs = (0..3)
                .map(|_| Program::start(Role::Flight, &site.at, count))
                .collect::<Result<Vec<Program>, Error>>()?;
            for program in &mut programs {
                program.says()?;
            }
            let mut watch = site.at.raw().await?;
            let (_, owned) = watch.ended_and_owned(&programs[0].label()).await?;
            programs[0].kill()?;
            let started = Instant::now();
            // What is run for the second time ends at once; nothing else does.
            while watch.ended_and_owned("").await?.0 < owned {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            times.push(started.elapsed().as_secs_f64());
            bar.inc(1);
        }
        bar.finish_and_clear();
        let longest = times.iter().copied().fold(0.0, f64::max);
        let note = format!(
            "3 programs with {count} in flight each, default settings, from the SIGKILL of one to the end of its last \
             process; at most {longest:.2} s"
        );
        Ok(vec![Measured { value: median(times), unit: "s", raw: None, note, each: Each::default() }])
    }
}
