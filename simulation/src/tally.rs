//! What was really hit.

use std::collections::BTreeMap;
use std::fmt;

pub use crate::fault::{Fault, Place, Sight};

/// How often.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    faults: BTreeMap<Fault, u64>,
    places: BTreeMap<Place, u64>,
    pairs: BTreeMap<(Fault, Place), u64>,
    sights: BTreeMap<Sight, u64>,
}

fn add<K: Ord + Copy>(counts: &mut BTreeMap<K, u64>, others: &BTreeMap<K, u64>) {
    for (key, count) in others {
        *counts.entry(*key).or_default() += count;
    }
}

fn count<K: Ord>(counts: &BTreeMap<K, u64>, key: &K) -> u64 {
    counts.get(key).copied().unwrap_or(0)
}

impl Tally {
    /// Something went wrong, here.
    pub fn hit(&mut self, fault: Fault, places: &[Place]) {
        *self.faults.entry(fault).or_default() += 1;
        for place in places {
            *self.places.entry(*place).or_default() += 1;
        }
        self.met(fault, places);
    }

    /// Somebody here met with what went wrong elsewhere.
    pub fn met(&mut self, fault: Fault, places: &[Place]) {
        for place in places {
            *self.pairs.entry((fault, *place)).or_default() += 1;
        }
    }

    /// This has come of it.
    pub fn saw(&mut self, sight: Sight) {
        *self.sights.entry(sight).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        add(&mut self.faults, &other.faults);
        add(&mut self.places, &other.places);
        add(&mut self.pairs, &other.pairs);
        add(&mut self.sights, &other.sights);
    }

    /// What was hit less often than it must be in so many seeds, if anything.
    pub fn missing(&self, seeds: u64) -> Vec<String> {
        // A pair may be hit by chance only, but it is.
        let (often, now_and_then, seldom) = (seeds / 100, seeds / 200, seeds / 2_000);
        let mut missing = Vec::new();
        let mut demand = |what: String, count: u64, least: u64| {
            if count < least {
                missing.push(format!("{what}: {count} times, not {least}"));
            }
        };
        for fault in Fault::ALL {
            demand(fault.text().into(), count(&self.faults, fault), often);
        }
        for place in Place::ALL {
            demand(place.text().into(), count(&self.places, place), often);
        }
        for sight in Sight::ALL {
            demand(sight.text().into(), count(&self.sights, sight), now_and_then);
        }
        for fault in Fault::ALL.iter().filter(|fault| fault.has_place()) {
            for place in Place::ALL.iter().filter(|place| fault.meets(**place)) {
                demand(format!("{} {}", fault.text(), place.text()), count(&self.pairs, &(*fault, *place)), seldom);
            }
        }
        missing
    }

    /// What was counted that nobody thinks can be.
    pub fn impossible(&self) -> Vec<String> {
        let impossible = |(fault, place): &&(Fault, Place)| fault.has_place() && !fault.meets(*place);
        self.pairs
            .keys()
            .filter(impossible)
            .map(|(fault, place)| format!("{} {}", fault.text(), place.text()))
            .collect()
    }

    /// Where things went wrong, and what came of it, in two lines.
    pub fn places(&self) -> String {
        let place = |place: &Place| format!("{} {}", count(&self.places, place), place.text());
        let sight = |sight: &Sight| format!("{} {}", count(&self.sights, sight), sight.text());
        let places: Vec<String> = Place::ALL.iter().map(place).collect();
        let sights: Vec<String> = Sight::ALL.iter().map(sight).collect();
        format!("{}\n{}", places.join(", "), sights.join(", "))
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |fault: &Fault| format!("{} {}", count(&self.faults, fault), fault.text());
        f.write_str(&Fault::ALL.iter().map(text).collect::<Vec<_>>().join(", "))
    }
}
