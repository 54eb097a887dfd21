//! Seeds: none breaks an invariant, all kinds of faults hit everywhere, and each plays the same way again.
#![allow(missing_docs)]

use durable_simulation::{play, run};

fn long() -> bool {
    std::env::var_os("DURABLE_LONG").is_some()
}

#[test]
fn no_seed_breaks_an_invariant() {
    let seeds = if long() { 100_000 } else { 2_000 };
    let report = run(0, seeds, |failed| println!("{failed}"));
    println!("{}\n{report}", report.places());
    assert!(report.is_clean(), "{report}");
    let least = seeds / 100;
    let rare = report.tally.below(least);
    assert!(rare.is_empty(), "hit less than {least} times in {seeds} seeds: {rare:?}; {report}; {}", report.places());
}

#[test]
fn a_seed_plays_the_same_way_again() {
    for seed in 0..if long() { 500 } else { 50 } {
        let (first, second) = (play(seed, true), play(seed, true));
        let apart = first.trace.iter().zip(&second.trace).find(|(first, second)| first != second);
        assert_eq!(apart, None, "seed {seed}");
        assert_eq!(first.trace.len(), second.trace.len(), "seed {seed}");
        assert_eq!(first.tally, second.tally, "seed {seed}");
        assert_eq!(play(seed, false).tally, first.tally, "seed {seed}: a trace changes nothing");
    }
}
