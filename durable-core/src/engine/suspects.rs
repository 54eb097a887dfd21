//! Processes that were running when their program died, several times in a row. One of those that ran together may have killed
//! it. So with each death an instance runs fewer of them together, until the culprit is alone and is stuck without the others.

use std::sync::{Arc, Mutex};

use super::lock;

/// The suspects that are in memory: for each, how often its program died.
#[derive(Default)]
pub(crate) struct Suspects(Mutex<Vec<i64>>);

/// A suspect, while it is in memory.
pub(crate) struct Suspect {
    all: Arc<Suspects>,
    deaths: i64,
}

/// Whether a process may run now.
pub(crate) enum Admitted {
    Yes(Option<Suspect>),
    /// Too many suspects are in memory.
    No,
}

impl Suspects {
    /// Whether a process may run whose program died `deaths` times in a row. At `most` deaths it would be stuck.
    pub(crate) fn admit(self: &Arc<Self>, deaths: i64, most: i64) -> Admitted {
        // A deploy that goes wrong kills programs, too.
        const COINCIDENCE: i64 = 3;
        if deaths < COINCIDENCE && deaths + 1 < most || deaths == 0 {
            return Admitted::Yes(None);
        }
        let mut inside = lock(&self.0);
        let worst = inside.iter().copied().max().unwrap_or(0).max(deaths);
        if inside.len() >= together(worst, most) {
            return Admitted::No;
        }
        inside.push(deaths);
        Admitted::Yes(Some(Suspect { all: self.clone(), deaths }))
    }
}

impl Drop for Suspect {
    fn drop(&mut self) {
        let mut inside = lock(&self.all.0);
        if let Some(at) = inside.iter().position(|deaths| *deaths == self.deaths) {
            inside.swap_remove(at);
        }
    }
}

/// How many suspects run together, by the deaths of the worst of them: from 256 down to one, which is reached two deaths
/// before `most`.
fn together(deaths: i64, most: i64) -> usize {
    let halvings = if most > 4 { 9 * (deaths - 2) / (most - 4) } else { 9 };
    512_usize.checked_shr(u32::try_from(halvings).unwrap_or(0)).unwrap_or(0).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_and_fewer() {
        let all: Vec<usize> = (3..10).map(|deaths| together(deaths, 10)).collect();
        assert_eq!(all, [256, 64, 32, 8, 4, 1, 1]);
        assert_eq!([3, 4, 5].map(|most| together(most - 1, most)), [1, 1, 1]);
        assert_eq!(together(90, 100), 1 << 1);
        assert_eq!(together(1000, 10), 1);
    }

    #[test]
    fn the_worst_of_them_counts() {
        let suspects = Arc::new(Suspects::default());
        let admitted = |deaths| suspects.admit(deaths, 10);
        assert!(matches!(admitted(2), Admitted::Yes(None)));
        let held: Vec<_> = (0..9).map(|_| admitted(4)).collect();
        assert!(held.iter().all(|admitted| matches!(admitted, Admitted::Yes(Some(_)))));
        assert!(matches!(admitted(6), Admitted::No));
        drop(held);
        let _alone = admitted(9);
        assert!(matches!(admitted(3), Admitted::No));
        assert!(matches!(admitted(0), Admitted::Yes(None)));
    }
}
