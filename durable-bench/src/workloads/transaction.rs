use futures_util::future::try_join_all;
use std::time::{Duration, Instant};

use super::Bench;
use crate::Error;
use crate::counts::{Counts, Each};
use crate::figures::{Measured, bar, median};
use crate::processes::TRANSACTIONS;
use crate::site::Place;

impl Bench {
    /// Transactional steps, of one process and of eight, beside transactions of the same statements.
    pub(super) async fn transaction(&self) -> Result<Vec<Measured>, Error> {
        let mut all = Vec::new();
        for processes in [1, 8] {
            all.push(self.transactions(processes).await?);
        }
        Ok(all)
    }

    async fn transactions(&self, processes: usize) -> Result<Measured, Error> {
        let steps = (1000 / self.scale).max(10);
        // SQLite has one writer, whoever asks.
        let connections = if matches!(self.place, Place::Sqlite { .. }) { 1 } else { processes };
        let (mut ours, mut raws, mut counted) = (Vec::new(), Vec::new(), Each::default());
        let bar = bar("transaction", self.rounds);
        for _ in 0..self.rounds {
            let (mut raw, beside) = self.place.raw().await?;
            raw.accounts(processes).await?;
            let mut connected = vec![raw];
            for nth in 1..connections {
                let mut raw = beside.at.raw().await?;
                raw.writer(nth);
                connected.push(raw);
            }
            let started = Instant::now();
            let run = connected.iter_mut().enumerate().map(|(account, raw)| raw.transactions(account, steps));
            try_join_all(run).await?;
            raws.push((connections * steps) as f64 / started.elapsed().as_secs_f64());
            drop((connected, beside));

            let (mut raw, site) = self.place.raw().await?;
            raw.accounts(processes).await?;
            drop(raw);
            let counts = Counts::begin(&site.at).await?;
            let host = site.at.host().await?.start().await?;
            let started = Instant::now();
            let run = (0..processes).map(|account| {
                let (host, table) = (host.clone(), site.at.table("accounts"));
                async move {
                    let input = (table, i64::try_from(account)?, u32::try_from(steps)?);
                    host.spawn(TRANSACTIONS, format!("t-{account}"), &input).await?.output().await?;
                    Ok::<_, Error>(())
                }
            });
            try_join_all(run).await?;
            ours.push((processes * steps) as f64 / started.elapsed().as_secs_f64());
            host.shutdown(Duration::from_secs(5)).await;
            drop(host);
            counted = counts.each(processes * steps).await?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let note = format!(
            "{processes} processes of {steps} transactional steps; raw: transactions of the same statements, connections: \
             {connections}"
        );
        Ok(Measured { value: median(ours), unit: "steps/s", raw: Some(median(raws)), note, each: counted })
    }
}
