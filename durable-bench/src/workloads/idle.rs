use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::{Counts, Each};
use crate::figures::{Measured, median};
use crate::machine::processor;
use crate::processes::STEPS;
use crate::site::Site;

/// All that a host asks of the database, from its start to its end so many seconds later; and its processor time between,
/// in seconds.
async fn rest(site: &Site, seconds: usize) -> Result<(Each, f64), Error> {
    let counts = Counts::begin(&site.at).await?;
    let host = site.at.host().await?.start().await?;
    let before = processor()?;
    tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
    let busy = processor()? - before;
    host.shutdown(Duration::from_secs(5)).await;
    drop(host);
    Ok((counts.each(1).await?, busy))
}

impl Bench {
    /// A host that has nothing to do: what it asks of the database and of the processor; and how soon it notices work
    /// that another one leaves for it.
    pub(super) async fn idle(&self) -> Result<Vec<Measured>, Error> {
        let seconds = (20 / self.scale).max(5);
        let site = self.place.site()?;
        // The tables are there before it is counted.
        site.at.host().await?.start().await?.shutdown(Duration::from_secs(5)).await;
        let (around, _) = rest(&site, 0).await?;
        let (each, busy) = rest(&site, seconds).await?;
        let mut all = Vec::new();
        let mut add = |value, unit, note| all.push(Measured { value, unit, raw: None, note, each: Each::default() });
        let note = |what| format!("{what} of a host with nothing to do, without its start and its end");
        let a_second = |all: Option<f64>, around: Option<f64>| Some((all? - around?).max(0.0) / seconds as f64);
        if let Some(statements) = a_second(each.statements, around.statements) {
            add(statements, "1/s", note("statements"));
        }
        if let Some(commits) = a_second(each.commits, around.commits) {
            add(commits, "1/s", note("commits"));
        }
        add(busy / seconds as f64 * 100.0, "%", format!("of one processor, for {seconds} s"));
        let (host, other) = (site.at.host().await?.start().await?, site.at.watcher().await?);
        let mut noticed = Vec::new();
        for n in 0..10 {
            let started = Instant::now();
            other.spawn(STEPS, format!("i-{n}"), &1).await?.output().await?;
            noticed.push(started.elapsed().as_secs_f64() * 1e3);
            // Idle again.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let longest = noticed.iter().copied().fold(0.0, f64::max);
        let note = format!("from a start by a host that cannot run it to its output there; at most {longest:.0}");
        add(median(noticed), "ms", note);
        other.shutdown(Duration::from_secs(5)).await;
        host.shutdown(Duration::from_secs(5)).await;
        Ok(all)
    }
}
