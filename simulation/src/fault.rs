//! What can go wrong, where, and what must have been seen.

/// A list of things with a name for people. All of them are to be hit.
macro_rules! listed {
    ($(#[$of:meta])* $name:ident { $($(#[$doc:meta])* $member:ident = $text:literal,)* }) => {
        $(#[$of])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$doc])* $member,)*
        }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$member,)*];

            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$member => $text,)*
                }
            }
        }
    };
}

listed! {
    /// What goes wrong.
    Fault {
        /// The call fails before it happens.
        Before = "error before",
        /// It happens, and the answer is lost.
        Lost = "answer lost",
        /// It does not happen, and nobody is told.
        Vanished = "lost with its answer",
        /// The answer is lost, and it happens later.
        Late = "arrived late",
        Delayed = "delayed",
        Killed = "host killed",
        Paused = "host paused",
        /// One host does not reach the storage.
        Cut = "host cut off",
        /// No host does.
        Away = "storage away",
        /// For more than two minutes.
        AwayLong = "storage away for minutes",
        /// Another session locks rows of processes for a while.
        HeldUp = "rows held",
        /// A client does not wait for its answer.
        ClientGone = "client gone",
        /// A process drops an operation and does it again.
        OperationDropped = "operation dropped",
        /// A host drops a call to the storage after it was sent.
        CallDropped = "call dropped",
        /// A host's clock is apart from the storage's.
        Apart = "clock apart",
        /// A host's clock jumps while it runs.
        OwnJump = "host's clock jumps",
        /// The storage's clock jumps.
        Forwards = "storage's clock jumps forwards",
        Backwards = "storage's clock jumps backwards",
        /// An orderly end.
        Shutdown = "shutdown",
        /// A host runs code in which a step is called otherwise.
        Renamed = "bad deployment",
    }
}

listed! {
    /// Where it goes wrong.
    Place {
        BeforeEffect = "before an effect",
        AfterEffect = "between effect and record",
        BeforeRecord = "before a record",
        AfterRecord = "after a record",
        Starting = "starting",
        Raising = "raising",
        Awaiting = "awaiting an end",
        Noting = "noting signals",
        Parking = "parking",
        Completing = "completing",
        Cancelling = "cancelling",
        Claiming = "claiming",
        Loading = "between claim and load",
        Delivering = "reading signals",
        Polling = "looking for work",
        Comparing = "comparing what is owned",
        Peering = "looking at the others",
        Reinstating = "looking for unknown owners",
        Finding = "finding a process",
        Reading = "reading a record",
        Beating = "at a heartbeat",
        Enlisting = "enlisting",
        Refencing = "fencing off a batch",
        TakingOver = "taking over",
        Retiring = "retiring",
        BeforeCommit = "before a transaction's commit",
        AfterCommit = "after a transaction's commit",
    }
}

listed! {
    /// What has been seen to come of it.
    Sight {
        Quiet = "looked at while nothing went wrong",
        Zombie = "a zombie's batch refused",
        Stray = "a stray adopted",
        NotParked = "a park refused for signals",
        Apart = "written apart from what is held up",
        OwnStart = "own start recognised",
        OwnMessage = "own message recognised",
        OwnRecord = "own record recognised",
        OwnPark = "own park recognised",
        OwnEnd = "own end recognised",
        Accepted = "a cancellation accepted",
        Diverged = "stuck for code and records that diverge",
        Replayed = "live after a replay",
        Unwound = "cancelled in a replay",
        Unrun = "cancelled before it ran",
        Completed = "completed",
        Cancelled = "cancelled",
        Failed = "failed",
        Compensated = "compensated",
        Step = "step",
        Dropped = "dropped and done again",
        Transaction = "transaction",
        Variable = "variable",
        Delay = "delay",
        Receive = "receive",
        GaveUp = "receive that gave up",
        Raise = "raise",
        Child = "child",
        Race = "race",
        All = "all",
        Join = "join",
        Unordered = "unordered",
        Loop = "loop",
        Forward = "point of no return",
    }
}

impl Fault {
    /// Whether it befalls a call, or a host in the middle of its code, somewhere.
    pub fn has_place(self) -> bool {
        self <= Self::Away
    }

    /// Whether it can befall somebody there, and is drawn.
    pub fn meets(self, place: Place) -> bool {
        use Place::{
            AfterCommit, AfterEffect, AfterRecord, BeforeCommit, BeforeEffect, BeforeRecord, Comparing, Delivering,
            Finding, Loading, Peering, Polling, Reading,
        };
        let unheard = matches!(self, Self::Lost | Self::Vanished | Self::Late);
        match place {
            // No calls.
            BeforeEffect | AfterEffect => matches!(self, Self::Killed | Self::Paused),
            // What is read has not happened if the answer is lost.
            Loading | Delivering | Polling | Comparing | Peering | Finding | Reading => !unheard,
            // Where it happened before it went wrong is counted as after it.
            BeforeRecord | BeforeCommit => !matches!(self, Self::Lost | Self::Late),
            AfterRecord => matches!(self, Self::Lost | Self::Late | Self::Killed | Self::Paused),
            // A look at what has become of it is a read.
            AfterCommit => self != Self::Vanished,
            _ => true,
        }
    }
}
