use std::time::Duration;

use super::Bench;
use super::many::run;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar, median};

impl Bench {
    /// `many` beside a million processes that have ended, by itself in empty tables.
    pub(super) async fn grown(&self) -> Result<Vec<Measured>, Error> {
        let (count, old) = ((20_000 / self.scale).max(100), (1_000_000 / self.scale).max(1000));
        let filling = bar("grown: filling", 1);
        let (mut raw, grown) = self.place.raw().await?;
        raw.grow(old).await?;
        drop(raw);
        filling.finish_and_clear();
        let (mut ours, mut empties) = (Vec::new(), Vec::new());
        for round in 1..=self.rounds {
            let empty = self.place.site()?;
            for (site, rates, which) in [(&empty, &mut empties, "empty"), (&grown, &mut ours, "grown")] {
                let host = site.at.host().await?.start().await?;
                rates.push(run(&host, &format!("{which} {round}/{}", self.rounds), count).await?);
                host.shutdown(Duration::from_secs(5)).await;
            }
        }
        let note = format!("{count} processes of 5 steps beside {old} that have ended; raw: in empty tables");
        Ok(vec![Measured {
            value: median(ours),
            unit: "steps/s",
            raw: Some(median(empties)),
            note,
            each: Each::default(),
        }])
    }
}
