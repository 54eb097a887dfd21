//! The order in which a function is handed its results: that in which their records were sent to be written. A replay
//! keeps to it as well, so that whatever chooses among several operations chooses the same again.

/// The records of one execution that are on their way, or whose results the function has not taken yet.
#[derive(Default)]
pub(crate) struct Sent {
    /// Nearly always the only one.
    first: Option<Sending>,
    more: Vec<Sending>,
}

struct Sending {
    seq: i32,
    answered: bool,
    /// The function has been polled since.
    offered: bool,
}

impl Sent {
    pub(crate) fn push(&mut self, seq: i32) {
        let sending = Sending { seq, answered: false, offered: false };
        match &self.first {
            None => self.first = Some(sending),
            Some(_) => self.more.push(sending),
        }
    }

    /// What became of it can be taken from now on: not before, or it would be passed over.
    pub(crate) fn answered(&mut self, seq: i32) {
        if let Some(sending) = self.first.iter_mut().chain(&mut self.more).find(|sending| sending.seq == seq) {
            sending.answered = true;
        }
    }

    /// Whether its result may be handed over.
    pub(crate) fn is_next(&self, seq: i32) -> bool {
        self.first.as_ref().is_none_or(|first| first.seq == seq) || !self.more.iter().any(|s| s.seq == seq)
    }

    /// Its result is taken, or nobody awaits it any more. Says whether another one's may be taken now.
    pub(crate) fn remove(&mut self, seq: i32) -> bool {
        if self.first.as_ref().is_some_and(|first| first.seq == seq) {
            return self.advance();
        }
        self.more.retain(|sending| sending.seq != seq);
        false
    }

    fn advance(&mut self) -> bool {
        self.first = if self.more.is_empty() { None } else { Some(self.more.remove(0)) };
        self.first.as_ref().is_some_and(|first| first.answered)
    }

    /// The function was polled. One that holds a future and polls others does not take its result: it is passed over. Says
    /// whether the function should be polled again.
    pub(crate) fn polled(&mut self) -> bool {
        let Some(first) = self.first.as_mut().filter(|first| first.answered && !self.more.is_empty()) else {
            return false;
        };
        match std::mem::replace(&mut first.offered, true) {
            true => self.advance(),
            false => self.more.iter().any(|sending| sending.answered),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_handed_over_in_the_order_in_which_they_were_sent() {
        let mut sent = Sent::default();
        for seq in 1..=3 {
            sent.push(seq);
        }
        sent.answered(3);
        assert!(sent.is_next(1) && !sent.is_next(2) && !sent.is_next(3));
        assert!(!sent.polled(), "the first is not answered");
        sent.answered(1);
        assert!(!sent.remove(1), "the second is not answered");
        assert!(sent.remove(2), "dropped: the third may go");
        assert!(sent.is_next(3));
        assert!(!sent.remove(3));
    }

    #[test]
    fn what_nobody_polls_is_passed_over() {
        let mut sent = Sent::default();
        sent.push(1);
        sent.push(2);
        sent.answered(1);
        assert!(!sent.polled(), "nobody waits for it");
        sent.answered(2);
        assert!(sent.polled(), "it was offered, and is not taken");
        assert!(sent.is_next(2));
        assert!(sent.is_next(1), "whenever it is polled");
        assert!(!sent.remove(1) && !sent.remove(2));
    }
}
