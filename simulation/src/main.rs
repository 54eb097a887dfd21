//! `scripts/simulate --seeds N [--from S]`; with `--trace --from S`, the whole trace of one seed.

use std::process::ExitCode;

/// Of so many seeds it is demanded that everything is hit.
const ENOUGH: u64 = 2_000;

fn main() -> ExitCode {
    let mut seeds = 1_000;
    let mut from = 0;
    let mut whole = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--trace" {
            whole = true;
            continue;
        }
        let number = arguments.next().and_then(|number| number.parse().ok());
        match (&*argument, number) {
            ("--seeds", Some(number)) => seeds = number,
            ("--from", Some(number)) => from = number,
            _ => {
                eprintln!("usage: simulate --seeds N [--from S] | --trace --from S, all numbers; given was {argument}");
                return ExitCode::from(2);
            }
        }
    }
    if whole {
        let played = durable_simulation::play(from, true);
        played.trace.iter().for_each(|line| println!("{line}"));
        return ExitCode::SUCCESS;
    }
    let report = durable_simulation::run(from, seeds, |failed| println!("{failed}"));
    println!("{}", report.places());
    println!("{report}");
    // Fewer seeds need not meet everything.
    let missing = if seeds >= ENOUGH { report.missing() } else { Vec::new() };
    missing.iter().for_each(|missing| println!("not hit as often as it must be: {missing}"));
    if report.is_clean() && missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
