use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Executor};
use std::time::{Duration, Instant};

use super::Bench;
use crate::figures::{Measured, median};
use crate::site::Place;
use crate::{Error, proxy};

const DELAY: Duration = Duration::from_millis(5);
/// And how much smaller: what goes step by step takes as long as it takes round trips. Not `parked`: its memory knows no
/// network.
const EACH: [(&str, usize); 5] = [("sequential", 5), ("many", 1), ("latency", 5), ("recovery", 1), ("transaction", 10)];

impl Bench {
    /// The other workloads with a network that is slower, in turns with what they do without.
    pub(super) async fn remote(&self) -> Result<Vec<Measured>, Error> {
        let Place::Postgres { url } = &self.place else {
            return Err(
                "`remote` is for a database that is reached over a network: give `--storage postgres://…`".into()
            );
        };
        let far = Place::Postgres { url: proxy::before(url, DELAY).await? };
        let (here, there) = (round_trip(&self.place).await?, round_trip(&far).await?);
        let mut all = Vec::new();
        for (workload, smaller) in EACH {
            let bench = |place: &Place| Bench { place: place.clone(), rounds: 1, scale: self.scale * smaller };
            let (near, far) = (bench(&self.place), bench(&far));
            let (mut nears, mut fars) = (Vec::new(), Vec::new());
            for _ in 0..self.rounds {
                // Boxed: a workload that measures workloads.
                nears.push(Box::pin(near.measure(workload)).await?);
                fars.push(Box::pin(far.measure(workload)).await?);
            }
            for (nth, figure) in fars[0].iter().enumerate() {
                let middle = |rounds: &[Vec<Measured>]| median(rounds.iter().map(|round| round[nth].value).collect());
                let raws: Vec<f64> = fars.iter().filter_map(|round| round[nth].raw).collect();
                let raw =
                    if raws.is_empty() { String::new() } else { format!(", the database's own {:.3}", median(raws)) };
                let note = format!(
                    "{workload}, a round trip of {there:.1} ms instead of {here:.1}{raw}; raw: without; {}",
                    figure.note
                );
                let (value, raw) = (middle(&fars), Some(middle(&nears)));
                all.push(Measured { value, unit: figure.unit, raw, note, each: figure.each });
            }
        }
        Ok(all)
    }
}

/// Milliseconds from a question to its answer.
async fn round_trip(place: &Place) -> Result<f64, Error> {
    let Place::Postgres { url } = place else { return Ok(0.0) };
    let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
    let mut times = Vec::new();
    for _ in 0..20 {
        let started = Instant::now();
        connection.execute("SELECT 1").await?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}
