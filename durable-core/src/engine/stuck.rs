//! Marks a run as stuck, with a reason that every database can hold.

use tokio::sync::oneshot;

use super::Core;
use super::queue::{From, Job};
use crate::storage::{Finish, Op, RunId, Status};

/// So many characters of a reason are kept.
const MOST: usize = 4000;

impl Core {
    /// Marks a run of this claim as stuck, for `from`. A reason whose characters the database's encoding does not have is
    /// written in such that every one has: a run that could not be marked would run again and again.
    pub(super) async fn mark_stuck(&self, run: RunId, claim: i64, from: impl Fn() -> From, reason: &str) {
        let plain = || reason.chars().filter(|c| *c != '\0').take(MOST).collect::<String>();
        let ascii = || reason.chars().filter(|c| *c != '\0').flat_map(escaped).take(MOST).collect::<String>();
        let none = || "the database does not take the reason; the log has it".to_owned();
        for reason in [&plain as &(dyn Fn() -> String + Sync), &ascii, &none] {
            let reason = Some(reason().into());
            let finish = Finish { run, claim, status: Status::Stuck, output: None, reason };
            let (reply, answer) = oneshot::channel();
            self.queue.push(Job::new(Op::Finish(finish), from(), Some(reply)));
            if !matches!(answer.await, Ok(Err(_))) {
                return;
            }
        }
        tracing::error!(run = %run, "the database refuses to mark it as stuck");
    }
}

/// A character as every encoding has it.
fn escaped(char: char) -> impl Iterator<Item = char> {
    let plain = char.is_ascii().then_some(char);
    plain.into_iter().chain(plain.is_none().then(|| char.escape_unicode()).into_iter().flatten())
}
