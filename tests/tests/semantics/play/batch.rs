//! What is drawn, as the batch that it means, by what is there.

use chrono::TimeDelta;
use durable_core::Status;
use durable_core::storage::{
    self, Batch, Fence, Finish, Forget, Op, Order, Park, ProcessRow, Raise, RecordKey, RecordOp, RecordState, RunId,
    Scope, Spawn, What,
};
use std::collections::HashSet;
use uuid::Uuid;

use super::{ALL, Play};
use crate::call::{Ask, Asked, DUE, Draft, Effect, IDS, KEYS, KINDS, Key, Message, NAMES, RUNS, Start, Which};

impl Play {
    fn row(&self, run: RunId) -> Option<&ProcessRow> {
        self.rows.iter().find(|row| row.run == run)
    }

    fn run(&self, by: usize, which: Which) -> RunId {
        let owner = Some(self.names.instances[by]);
        let (Which::Mine(nth) | Which::Any(nth)) = which;
        let mine: Vec<RunId> = self.rows.iter().filter(|row| row.owner == owner).map(|row| row.run).collect();
        match which {
            Which::Mine(_) if !mine.is_empty() => mine[nth % mine.len()],
            _ => self.names.runs[nth],
        }
    }

    fn claim(&self, run: RunId) -> i64 {
        self.row(run).map_or(1, |row| row.claim)
    }

    fn signals(&self, run: RunId) -> i64 {
        self.row(run).map_or(0, |row| row.signals)
    }

    fn spawn(&self, start: Start) -> Spawn {
        let Start { run, take, restart } = start;
        Spawn {
            run: self.names.runs[run],
            id: IDS[run % IDS.len()].into(),
            kind: KINDS[usize::from(run == RUNS - 1)].into(),
            input: format!("{{\"run\": {run}}}").into(),
            digest: format!("d{}", run % 2).into(),
            take,
            restart_finished: restart,
        }
    }

    fn raise(&self, message: Message) -> Raise {
        let Message { id, event } = message;
        Raise {
            id: IDS[id].into(),
            name: NAMES[event % NAMES.len()].into(),
            event_id: format!("e{event}").into(),
            payload: format!("[ {event} ]").into(),
        }
    }

    /// The operation; none if the engine would not send it.
    async fn op(&self, side: usize, by: usize, draft: &Draft) -> Option<Op> {
        let op = match draft {
            Draft::Start(start) => Op::Spawn(self.spawn(*start)),
            Draft::Message(message) => Op::Raise(self.raise(*message)),
            Draft::Record { run, claim, key: at, op, state, seq, takes, effect, awaited } => {
                let run = self.run(by, *run);
                let waiting = match takes {
                    Some(_) => {
                        let load = storage::Load::signals(&[run]);
                        self.sides[0].storage.load(&load).await.unwrap().unwrap().remove(0).state.unwrap()
                    }
                    None => None,
                };
                let number = |nth: usize| waiting.and_then(|state| Some(state.events.get(nth)?.number)).unwrap_or(77);
                let claim = self.claim(run) + claim.0;
                let there = self.sides[0].storage.record(run, &key(*at)).await.unwrap();
                let stands = there.as_ref().is_some_and(|there| there.state != RecordState::Pending);
                if stands && (takes.is_some() || effect.is_some() || awaited.is_some()) {
                    return None;
                }
                Op::Record(RecordOp {
                    run,
                    claim,
                    key: key(*at),
                    op: *op,
                    state: *state,
                    // What stands there is judged the same, whether the engine knew of it or not.
                    replaces: there.is_some() && *state == RecordState::Done,
                    payload: format!("{{\"by\" : {by}}}").into(),
                    shielded: false,
                    attempts: i32::from(*state == RecordState::Pending),
                    seq: *seq,
                    takes: takes.map(number),
                    effect: effect.map(|effect| match effect {
                        Effect::Start(start) => storage::Effect::Spawn(self.spawn(start)),
                        Effect::Message(message) => storage::Effect::Raise(self.raise(message)),
                    }),
                    awaited: awaited.map(|run| self.names.runs[run]),
                })
            }
            Draft::Await { run, id, target } => {
                // An id, and a run of it.
                let id = target.map_or(*id, |target| target % IDS.len());
                let target = target.map(|target| self.names.runs[target]);
                let run = self.run(by, *run);
                // Whose run it is knows the engine.
                self.row(run).filter(|row| row.owner == Some(self.names.instances[by]))?;
                Op::Await { run, id: IDS[id].into(), target }
            }
            Draft::AcceptCancel(run, claim) => {
                let run = self.run(by, *run);
                Op::AcceptCancel { run, claim: self.claim(run) + claim.0, seq: i32::try_from(by).unwrap_or(0) }
            }
            Draft::Seen(run, claim, signals) => {
                let run = self.run(by, *run);
                Op::Seen { run, claim: self.claim(run) + claim.0, signals: self.signals(run) + signals.0 }
            }
            Draft::Finish(run, claim, status) => {
                let run = self.run(by, *run);
                Op::Finish(Finish {
                    run,
                    claim: self.claim(run) + claim.0,
                    status: *status,
                    output: matches!(status, Status::Completed | Status::Failed).then(|| "[ 7]".into()),
                    reason: (*status != Status::Completed).then(|| "because".into()),
                })
            }
            Draft::Park { run, claim, due, seen } => {
                let run = self.run(by, *run);
                let began = self.sides[side].began();
                Op::Park(Park {
                    run,
                    claim: self.claim(run) + claim.0,
                    wake_at: due.map(|due| began + TimeDelta::minutes(DUE[due])),
                    seen: seen.map(|off| self.signals(run) + off.0),
                    waiting_for: due.map(|due| format!("due {due}").into()),
                    deaths: due.map_or(0, |due| due as i64 % 3),
                })
            }
            Draft::Order(asked, ask) => {
                let (id, run) = match asked {
                    Asked::Id(id) => (*id, None),
                    Asked::Run(run) => (run % IDS.len(), Some(self.names.runs[*run])),
                };
                let forget = |at: &Key| Forget { key: key(*at), audit: Uuid::now_v7() };
                let what = match ask {
                    Ask::Cancel => What::Cancel,
                    Ask::Terminate => What::Terminate { reason: "by hand".into() },
                    Ask::Resume(forgotten) => What::Resume { forget: forgotten.iter().map(forget).collect() },
                    Ask::Delete => What::Delete,
                };
                Op::Order(Order { id: IDS[id].into(), run, what })
            }
            Draft::Claim(kind, limit) => Op::Claim { kind: KINDS[*kind].into(), limit: (*limit).max(self.claims) },
        };
        Some(op)
    }

    /// The batch, without operations that the engine would not put into it.
    pub(super) async fn batch(&self, side: usize, by: usize, generation: i64, drafts: &[Draft]) -> Batch {
        let mut rows = HashSet::new();
        let mut ops = Vec::new();
        for draft in drafts {
            let op = self.op(side, by, draft).await;
            ops.extend(op.filter(|op| !self.meets_order(op, &ops) && admits(&mut rows, op)));
        }
        let fence = Fence { instance: self.names.instances[by], generation };
        Batch::new(fence, self.names.namespace.clone(), ops)
    }

    /// Whether an order and the end or park of the process that it is about would be in one batch. What came of those may be
    /// read when the order has been carried out.
    fn meets_order(&self, op: &Op, ops: &[Op]) -> bool {
        let id = |run: &RunId| self.names.runs.iter().position(|known| known == run).map(|run| IDS[run % IDS.len()]);
        let owned = |op: &Op| match op {
            Op::Finish(Finish { run, .. }) | Op::Park(Park { run, .. }) => id(run),
            _ => None,
        };
        let ordered = |op: &Op, of: &str| matches!(op, Op::Order(order) if *order.id == *of);
        let meet = |one: &Op, other: &Op| owned(one).is_some_and(|id| ordered(other, id));
        ops.iter().any(|there| meet(op, there) || meet(there, op))
    }

    /// So many that no two which have been due for equally long are told apart; all, if the batch makes others due.
    pub(super) async fn bound(&self, drafts: &[Draft]) -> usize {
        let [Draft::Claim(kind, limit)] = drafts else { return ALL };
        let mut bound = *limit;
        loop {
            let before = bound;
            for side in 0..2 {
                let now = self.sides[side].began();
                let mut due = self.rows_of(side).await;
                due.retain(|row| row.status == Status::Waiting && *row.kind == *KINDS[*kind]);
                let mut due: Vec<_> = due.into_iter().filter_map(|row| row.wake_at).filter(|at| *at <= now).collect();
                due.sort();
                while bound < due.len() && due[bound - 1] == due[bound] {
                    bound += 1;
                }
            }
            if bound == before {
                return bound;
            }
        }
    }
}

pub(super) fn key(at: Key) -> RecordKey {
    let scope = if at.compensation { Scope::Compensation } else { Scope::Process };
    RecordKey { scope, name: NAMES[at.name].into(), key: KEYS[at.key].into() }
}

const CLAIM: &str = "a claim";
const MAKES_DUE: &str = "what may make something due";

/// As the engine decides: one operation for each row, and no record behind its run's end or park.
fn admits(rows: &mut HashSet<String>, op: &Op) -> bool {
    // A claim may leave to a later one what its own batch makes due.
    match op {
        Op::Claim { .. } if rows.contains(MAKES_DUE) => return false,
        Op::Claim { .. } | Op::AcceptCancel { .. } | Op::Seen { .. } | Op::Record(RecordOp { effect: None, .. }) => {}
        _ if rows.contains(CLAIM) => return false,
        _ => drop(rows.insert(MAKES_DUE.to_owned())),
    }
    // Nobody knows a run before its start is committed.
    let (starts, knows) = match op {
        Op::Spawn(spawn) => (Some(spawn.run), vec![]),
        Op::Record(RecordOp { run, effect, awaited, .. }) => match effect {
            Some(storage::Effect::Spawn(spawn)) => (Some(spawn.run), vec![Some(*run), *awaited]),
            _ => (None, vec![Some(*run), *awaited]),
        },
        Op::Await { run, target, .. } => (None, vec![Some(*run), *target]),
        Op::AcceptCancel { run, .. } | Op::Seen { run, .. } => (None, vec![Some(*run)]),
        Op::Finish(finish) => (None, vec![Some(finish.run)]),
        Op::Park(park) => (None, vec![Some(park.run)]),
        Op::Order(order) => (None, vec![order.run]),
        _ => (None, vec![]),
    };
    let (start, known) = (|run: RunId| format!("start of {run}"), |run: RunId| format!("known {run}"));
    let mut knows = knows.into_iter().flatten();
    if starts.is_some_and(|run| rows.contains(&known(run)) || knows.clone().any(|other| other == run))
        || knows.clone().any(|run| rows.contains(&start(run)))
    {
        return false;
    }
    rows.extend(starts.map(start));
    rows.extend(knows.by_ref().map(known));
    let process = |run: &RunId| format!("process {run}");
    let spawn = |spawn: &Spawn| format!("id {}", spawn.id);
    let raise = |raise: &Raise| format!("event {} of {}", raise.event_id, raise.id);
    match op {
        Op::Spawn(s) => rows.insert(spawn(s)),
        Op::Raise(r) => rows.insert(raise(r)),
        Op::Record(record) => {
            if rows.contains(&process(&record.run)) || !rows.insert(format!("record {} {:?}", record.run, record.key)) {
                return false;
            }
            match &record.effect {
                Some(storage::Effect::Spawn(s)) => rows.insert(spawn(s)),
                Some(storage::Effect::Raise(r)) => rows.insert(raise(r)),
                None => true,
            }
        }
        Op::Await { run, .. } => !rows.contains(&process(run)),
        Op::AcceptCancel { run, .. } | Op::Seen { run, .. } => rows.insert(process(run)),
        Op::Finish(finish) => rows.insert(process(&finish.run)),
        Op::Park(park) => rows.insert(process(&park.run)),
        Op::Order(order) => rows.insert(format!("id {}", order.id)),
        Op::Claim { .. } => rows.insert(CLAIM.to_owned()),
        _ => false,
    }
}
