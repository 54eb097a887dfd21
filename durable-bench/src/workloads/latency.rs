use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, percentile};
use crate::processes::{GO, MESSAGE, STEPS};

impl Bench {
    /// From spawn to output with one step, nothing else running; and from a message to a parked process to its end.
    pub(super) async fn latency(&self) -> Result<Vec<Measured>, Error> {
        let count = (1000 / self.scale).max(50);
        let ((mut raw, _beside), site) = (self.place.raw().await?, self.place.site()?);
        let mut all = Vec::new();
        let host = site.at.host().await?.quiet_time(Duration::from_millis(100)).start().await?;
        let (mut ours, mut raws) = (Vec::new(), Vec::new());
        let bar = bar("latency", count);
        for n in 0..count {
            raws.extend(raw.single(1).await?.iter().map(Duration::as_secs_f64));
            let started = Instant::now();
            host.spawn(STEPS, format!("l-{n}"), &1).await?.output().await?;
            ours.push(started.elapsed().as_secs_f64());
            bar.inc(1);
        }
        bar.finish_and_clear();
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let note = format!("{name}, spawn to output, one step; raw: one commit");
            let (value, raw) = (percentile(&mut ours, share) * 1e3, percentile(&mut raws, share) * 1e3);
            all.push(Measured { value, unit: "ms", raw: Some(raw), note, each: Each::default() });
        }
        let count = (200 / self.scale).max(20);
        let mut woken = Vec::new();
        let mut handles = Vec::new();
        for n in 0..count {
            handles.push(host.spawn(MESSAGE, format!("m-{n}"), &()).await?);
        }
        while host.in_memory() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for handle in &handles {
            let started = Instant::now();
            handle.raise(GO, &()).await?;
            handle.output().await?;
            woken.push(started.elapsed().as_secs_f64());
        }
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let note = format!("{name}, message to a parked process to its output, one step");
            all.push(Measured {
                value: percentile(&mut woken, share) * 1e3,
                unit: "ms",
                raw: None,
                note,
                each: Each::default(),
            });
        }
        host.shutdown(Duration::from_secs(5)).await;
        Ok(all)
    }
}
