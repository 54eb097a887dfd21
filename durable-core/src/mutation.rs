//! Rules that `scripts/mutations` breaks one at a time, in a build of its own, to see whether the simulation notices.

use std::cell::Cell;

/// A rule that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A batch is fenced.
    Fence,
    /// The fence is read under the lock that the batch is written under.
    FenceUnderLock,
    /// A process that has missed a signal does not park.
    ParkChecksSignals,
    /// Only a process that nobody owns is claimed.
    ClaimChecksOwner,
    /// What is sent again is recognised by what it did before: a start,
    OwnStart,
    /// a message,
    OwnMessage,
    /// a record,
    OwnRecord,
    /// a park,
    OwnPark,
    /// an end;
    OwnEnd,
    /// what was claimed is found among what the instance owns.
    OwnClaim,
    /// A variable that is set anew is written anew.
    SetWrites,
    /// What is got of a variable is what was recorded last.
    GetsLast,
    /// A variable's record is overwritten.
    SetOverwrites,
    /// What has an unknown outcome is fenced off before it is sent again.
    Refences,
    /// What must not overtake operations that are held up waits behind them.
    StaysBehind,
    /// No attempt of a step starts while the heartbeat is old.
    Gate,
    /// No cancellation is seen before everything that was recorded has been asked for.
    ReplaySeesNoCancel,
    /// Nothing begins before everything that was recorded has been asked for.
    ReplayBeginsNothing,
    /// Records that the code does not ask for make the process stuck.
    JudgesUnvisited,
    /// No success is recorded once the cancellation is on its way.
    CancelStands,
    /// Who waits for something is woken once it is committed.
    WakeAfterCommit,
    /// An operation returns once its record is committed.
    RecordAwaited,
}

thread_local! {
    static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
}

/// From now on this rule is broken on this thread.
pub fn breaking(rule: Option<Rule>) {
    BROKEN.set(rule);
}

/// Whether this rule is.
pub fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}
