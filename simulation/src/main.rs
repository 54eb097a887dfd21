//! `scripts/simulate --seeds N [--from S]`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut seeds = 1_000;
    let mut from = 0;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let number = arguments.next().and_then(|number| number.parse().ok());
        match (&*argument, number) {
            ("--seeds", Some(number)) => seeds = number,
            ("--from", Some(number)) => from = number,
            _ => {
                eprintln!("usage: simulate --seeds N [--from S], both numbers; given was {argument}");
                return ExitCode::from(2);
            }
        }
    }
    let report = durable_simulation::run(from, seeds, |failed| println!("{failed}"));
    println!("{}", report.places());
    println!("{report}");
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
