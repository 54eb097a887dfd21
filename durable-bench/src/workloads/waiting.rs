use durable_core::{Host, Process};
use futures_util::{StreamExt, stream};
use std::time::{Duration, Instant};

use super::{Bench, CONCURRENT};
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, all};
use crate::machine::resident;
use crate::processes::{YEAR, year};

fn size_of_future<A, F: Future>(_: impl Fn(Process, A) -> F) -> usize {
    size_of::<F>()
}

impl Bench {
    /// Processes that wait for a year: memory for each while in memory, and once parked.
    pub(super) async fn waiting(&self) -> Result<Vec<Measured>, Error> {
        let count = (100_000 / self.scale).max(1000);
        let site = self.place.site()?;
        // Long enough that all wait in memory at the same time.
        let quiet = Duration::from_secs(if self.scale == 1 { 30 } else { 5 });
        let host = site.at.host().await?.max_processes(count * 2).quiet_time(quiet).start().await?;
        // The first ones pay for what is there once, and for as many calls at once as there will be.
        let first = count / 10;
        self.wait_for_a_year(&host, 0..first).await?;
        let before = resident()?;
        let started = Instant::now();
        self.wait_for_a_year(&host, first..count).await?;
        let own = size_of_future(year);
        let waiting = (resident()? - before) / (count - first) as f64 - own as f64;
        let fits = started.elapsed() < quiet && host.in_memory() == count;
        let note = format!(
            "{count} processes, each beyond its own future of {own} B{}",
            if fits { "" } else { "; some had parked already" }
        );
        let waiting = Measured { value: waiting, unit: "B/waiting", raw: None, note, each: Each::default() };
        host.shutdown(Duration::from_secs(5)).await;
        // What parks takes its leave at once, and few are in memory at a time: what is left over is what a parked one
        // costs, and not what the allocator keeps of those that waited.
        let site = self.place.site()?;
        let quiet = Duration::from_millis(50);
        let host = site.at.host().await?.max_processes(CONCURRENT).quiet_time(quiet).start().await?;
        let parked = async |range: std::ops::Range<usize>| {
            self.wait_for_a_year(&host, range).await?;
            // Those that had no place come in as soon as there is one, so it stays empty only once all have parked.
            let mut empty = 0;
            while empty < 10 {
                empty = if host.in_memory() == 0 { empty + 1 } else { 0 };
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            resident()
        };
        let before = parked(0..count / 2).await?;
        let added = (parked(count / 2..count + count / 2).await? - before).max(0.0) / count as f64;
        host.shutdown(Duration::from_secs(5)).await;
        let note = format!("{count} more that waited and parked");
        Ok(vec![waiting, Measured { value: added, unit: "B/parked", raw: None, note, each: Each::default() }])
    }

    async fn wait_for_a_year(&self, host: &Host, range: std::ops::Range<usize>) -> Result<(), Error> {
        let count = range.len();
        let calls = stream::iter(range)
            .map(|n| {
                let host = host.clone();
                async move {
                    host.spawn(YEAR, format!("year-{n}"), &()).await?;
                    Ok(())
                }
            })
            .buffer_unordered(CONCURRENT);
        all("waiting", count, calls).await
    }
}
