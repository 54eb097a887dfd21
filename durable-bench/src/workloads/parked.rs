use super::Bench;
use crate::Error;
use crate::counts::Each;
use crate::figures::{Measured, bar};
use crate::programs::{Program, Role};

impl Bench {
    /// A program of its own with a million processes that wait for a message: the most memory that it ever had, and how
    /// long a message to one of them takes until its next step has run.
    pub(super) async fn parked(&self) -> Result<Vec<Measured>, Error> {
        let count = (1_000_000 / self.scale).max(1000);
        let site = self.place.site()?;
        let mut program = Program::start(Role::Park, &site.at, count)?;
        let (bar, mut all) = (bar("parked", count), Vec::new());
        loop {
            let line = program.says()?;
            let words: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
            match words[..] {
                [parked] => bar.set_position(parked as u64),
                [peak, half, most] => {
                    let mut add = |value, unit, note| {
                        all.push(Measured { value, unit, raw: None, note, each: Each::default() });
                    };
                    add(
                        peak / 1024.0 / 1024.0,
                        "MiB",
                        format!("the program's peak, {count} that wait, default settings"),
                    );
                    let note = "message to one of them, parked, to its output, one step";
                    add(half, "ms", format!("p50, {note}"));
                    add(most, "ms", format!("p99, {note}"));
                    break;
                }
                _ => return Err(format!("a program says {line:?}").into()),
            }
        }
        bar.finish_and_clear();
        Ok(all)
    }
}
