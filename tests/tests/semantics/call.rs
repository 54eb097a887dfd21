//! What is asked of all storages, drawn from a seed. Ids are few, so that calls meet. What they mean is made out when they
//! are made: so a call can be left out, and the others still mean something.

use durable_core::storage::{OpKind, RecordState, Status};
use durable_simulation::seed::Seed;

pub(crate) const INSTANCES: usize = 3;
pub(crate) const RUNS: usize = 12;
pub(crate) const IDS: [&str; 4] = ["a", "b", "B", "ä"];
pub(crate) const KINDS: [&str; 2] = ["k", "l"];
pub(crate) const NAMES: [&str; 2] = ["n", "N"];
pub(crate) const KEYS: [&str; 2] = ["", "k"];
/// Minutes from the storage's own time.
pub(crate) const DUE: [i64; 4] = [-20, -10, 60, 400 * 24 * 60];

/// A run: one of those that the caller owns, if it owns any; else any.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which {
    Mine(usize),
    Any(usize),
}

/// A number beside the one that stands in the database.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Off(pub i64);

#[derive(Clone, Debug)]
pub(crate) enum Call {
    Enlist(usize),
    Beat(usize),
    Refence(usize, Off),
    Commit {
        by: usize,
        generation: Off,
        ops: Vec<Draft>,
    },
    /// Its last batch again, under its generation.
    Again(usize),
    Load {
        runs: Vec<usize>,
        records: bool,
    },
    Owned {
        by: usize,
        after: Option<usize>,
        limit: usize,
    },
    Poll {
        by: usize,
        kinds: Vec<usize>,
        watched: Vec<usize>,
    },
    Peers(usize),
    /// Of one as it is now, or as `Peers` has seen it.
    Fence {
        by: usize,
        of: usize,
        now: bool,
    },
    Release(usize, usize),
    Retire(usize),
    Find(usize, Option<usize>),
    Record(Which, Key),
    List(Wanted),
    Count(Wanted),
}

impl Call {
    /// Whether a time that it tells may be one that it has written.
    pub(crate) fn writes(&self) -> bool {
        use Call::*;
        !matches!(
            self,
            Load { .. } | Owned { .. } | Poll { .. } | Peers(_) | Find(..) | Record(..) | List(_) | Count(_)
        )
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub(crate) compensation: bool,
    pub(crate) name: usize,
    pub(crate) key: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) kind: Option<usize>,
    pub(crate) status: Option<Status>,
    /// Unchanged since a call that many before this one.
    pub(crate) since: Option<usize>,
    pub(crate) after: Option<usize>,
    pub(crate) limit: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) run: usize,
    pub(crate) take: bool,
    pub(crate) restart: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub(crate) id: usize,
    pub(crate) event: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Effect {
    Start(Start),
    Message(Message),
}

#[derive(Clone, Debug)]
pub(crate) enum Draft {
    Start(Start),
    Message(Message),
    Record {
        run: Which,
        claim: Off,
        key: Key,
        op: OpKind,
        state: RecordState,
        seq: i32,
        /// The message of this place among those that wait; beyond them a number that is none.
        takes: Option<usize>,
        effect: Option<Effect>,
        awaited: Option<usize>,
    },
    Await {
        run: Which,
        id: usize,
        target: Option<usize>,
    },
    AcceptCancel(Which, Off),
    Seen(Which, Off, Off),
    Finish(Which, Off, Status),
    Park {
        run: Which,
        claim: Off,
        due: Option<usize>,
        seen: Option<Off>,
    },
    /// Of an id, or of a run.
    Order(Asked, Ask),
    Claim(usize, usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Asked {
    Id(usize),
    Run(usize),
}

#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Cancel,
    Terminate,
    Resume(Option<Key>),
    Delete,
}

pub(crate) fn draw(seed: &mut Seed, calls: usize) -> Vec<Call> {
    // Who is not there yet can do nothing.
    let mut drawn: Vec<Call> = (0..INSTANCES).map(Call::Enlist).collect();
    drawn.extend((0..calls).map(|_| call(seed)));
    drawn
}

fn up_to(seed: &mut Seed, end: usize) -> usize {
    seed.below(end as u64) as usize
}

fn maybe<T>(seed: &mut Seed, permille: u64, draw: impl FnOnce(&mut Seed) -> T) -> Option<T> {
    seed.permille(permille).then(|| draw(seed))
}

/// Mostly right.
fn off(seed: &mut Seed) -> Off {
    Off(if seed.permille(900) { 0 } else { *seed.one(&[-1, 1]) })
}

fn which(seed: &mut Seed) -> Which {
    let run = up_to(seed, RUNS);
    if seed.permille(800) { Which::Mine(run) } else { Which::Any(run) }
}

/// Half of them one and the same, so that records meet.
fn key(seed: &mut Seed) -> Key {
    if seed.permille(500) {
        return Key { compensation: false, name: 0, key: 0 };
    }
    Key { compensation: seed.permille(100), name: up_to(seed, NAMES.len()), key: up_to(seed, KEYS.len()) }
}

fn start(seed: &mut Seed) -> Start {
    Start { run: up_to(seed, RUNS), take: seed.permille(700), restart: seed.permille(500) }
}

fn message(seed: &mut Seed) -> Message {
    Message { id: up_to(seed, IDS.len()), event: up_to(seed, 6) }
}

fn wanted(seed: &mut Seed) -> Wanted {
    Wanted {
        kind: maybe(seed, 300, |seed| up_to(seed, KINDS.len())),
        status: maybe(seed, 500, |seed| *seed.one(Status::ALL)),
        since: maybe(seed, 200, |seed| up_to(seed, 20)),
        after: maybe(seed, 200, |seed| up_to(seed, RUNS)),
        limit: seed.between(1, 12) as usize,
    }
}

fn call(seed: &mut Seed) -> Call {
    let by = up_to(seed, INSTANCES);
    match seed.below(100) {
        0..64 => {
            let ops = if seed.permille(500) { seed.between(0, 1) } else { seed.between(2, 5) };
            Call::Commit { by, generation: off(seed), ops: (0..ops).map(|_| draft(seed)).collect() }
        }
        64..69 => Call::Again(by),
        69..72 => Call::Load { runs: (0..RUNS).filter(|_| seed.permille(400)).collect(), records: seed.permille(700) },
        72..74 => {
            Call::Owned { by, after: maybe(seed, 300, |seed| up_to(seed, RUNS)), limit: seed.between(1, 4) as usize }
        }
        74..77 => Call::Poll {
            by,
            kinds: (0..KINDS.len()).filter(|_| seed.permille(700)).collect(),
            watched: (0..RUNS).filter(|_| seed.permille(300)).collect(),
        },
        77..79 => Call::Peers(by),
        79..81 => Call::Fence { by, of: up_to(seed, INSTANCES), now: seed.permille(500) },
        81..84 => Call::Release(up_to(seed, INSTANCES), seed.between(1, 3) as usize),
        84..86 => Call::Beat(by),
        86..88 => Call::Refence(by, Off(*seed.one(&[-1, 0, 1, 2]))),
        88..91 => Call::Enlist(by),
        91..93 => Call::Find(up_to(seed, IDS.len()), maybe(seed, 500, |seed| up_to(seed, RUNS))),
        93..95 => Call::Record(which(seed), key(seed)),
        95..97 => Call::List(wanted(seed)),
        97 => Call::Retire(by),
        _ => Call::Count(Wanted { after: None, ..wanted(seed) }),
    }
}

fn draft(seed: &mut Seed) -> Draft {
    match seed.below(100) {
        0..20 => Draft::Start(start(seed)),
        20..32 => Draft::Message(message(seed)),
        32..52 => {
            let effect = match seed.below(4) {
                0 => Some(Effect::Start(start(seed))),
                1 => Some(Effect::Message(message(seed))),
                _ => None,
            };
            let op = match effect {
                Some(Effect::Start(_)) => OpKind::Spawn,
                Some(Effect::Message(_)) => OpKind::Raise,
                None => *seed.one(&[OpKind::Step, OpKind::Value, OpKind::Event, OpKind::Output]),
            };
            let state = match effect {
                Some(_) => RecordState::Done,
                None => *seed.one(RecordState::ALL),
            };
            Draft::Record {
                run: which(seed),
                claim: off(seed),
                key: key(seed),
                op,
                state,
                seq: *seed.one(&[1, 1, 1, 2]),
                takes: maybe(seed, 300, |seed| up_to(seed, 3)),
                effect,
                awaited: maybe(seed, 200, |seed| up_to(seed, RUNS)),
            }
        }
        52..58 => Draft::Await {
            run: which(seed),
            id: up_to(seed, IDS.len()),
            target: maybe(seed, 400, |seed| up_to(seed, RUNS)),
        },
        58..61 => Draft::AcceptCancel(which(seed), off(seed)),
        61..64 => Draft::Seen(which(seed), off(seed), off(seed)),
        64..72 => {
            let statuses = [Status::Completed, Status::Failed, Status::Cancelled, Status::Stuck];
            Draft::Finish(which(seed), off(seed), *seed.one(&statuses))
        }
        72..80 => Draft::Park {
            run: which(seed),
            claim: off(seed),
            due: maybe(seed, 800, |seed| up_to(seed, DUE.len())),
            seen: maybe(seed, 600, |seed| Off(*seed.one(&[0, 0, -1]))),
        },
        80..91 => {
            let asked =
                if seed.permille(150) { Asked::Run(up_to(seed, RUNS)) } else { Asked::Id(up_to(seed, IDS.len())) };
            let ask = match seed.below(11) {
                0..3 => Ask::Cancel,
                3 => Ask::Terminate,
                4..8 => Ask::Resume(maybe(seed, 500, key)),
                _ => Ask::Delete,
            };
            Draft::Order(asked, ask)
        }
        _ => Draft::Claim(usize::from(seed.permille(200)), seed.between(1, 4) as usize),
    }
}
