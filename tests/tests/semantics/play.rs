//! The same calls on two storages, whose answers must be the same.

mod batch;

use durable_core::Status;
use durable_core::storage::{
    self, Batch, Filter, Load, NewInstance, Op, Order, Outcome, Peer, Poll, ProcessRow, Raised, RunId, What,
};
use std::fmt;
use uuid::Uuid;

use batch::key;

use crate::call::{Call, IDS, INSTANCES, KINDS, RUNS, Wanted, Which};
use crate::names::Names;
use crate::side::{Side, in_order};
use crate::tally::Tally;

/// More than there can be.
const ALL: usize = 99;

/// The first call that was answered differently: what was asked and answered until then.
pub(crate) struct Difference {
    asked: Vec<String>,
    answers: [String; 2],
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for asked in &self.asked {
            writeln!(f, "{asked}")?;
        }
        // What differs, in its surroundings.
        let [model, other] = self.answers.each_ref().map(|answer| answer.split(", ").collect::<Vec<_>>());
        let same = model.iter().zip(&other).take_while(|(model, other)| model == other).count();
        let behind = model.iter().rev().zip(other.iter().rev()).take_while(|(model, other)| model == other).count();
        for (name, parts) in [("the model", model), ("the other", other)] {
            let to = parts.len().saturating_sub(behind).max(same);
            let (from, to) = (same.saturating_sub(12), (to + 3).min(parts.len()));
            writeln!(f, "{name}: … {} …", parts[from..to].join(", "))?;
        }
        Ok(())
    }
}

struct Play {
    names: Names,
    sides: [Side; 2],
    generations: [i64; INSTANCES],
    /// What is there before a call, by the model.
    rows: Vec<ProcessRow>,
    /// What is to be committed.
    batches: Vec<Batch>,
    /// Whose processes are handed back: one that may not write any more, if there is one.
    released: usize,
    /// By how much claims are bound, so that which are claimed is not left to the storage.
    claims: usize,
}

/// Makes the calls, and then looks at everything.
pub(crate) async fn play(calls: &[Call], sides: [Side; 2], tally: &mut Tally) -> Result<(), Difference> {
    let (names, rows) = (Names::new(), Vec::new());
    let mut play =
        Play { names, sides, generations: [0; INSTANCES], rows, batches: Vec::new(), released: 0, claims: ALL };
    let everything = Wanted { kind: None, status: None, since: None, after: None, limit: ALL };
    let looks = [
        Call::List(everything.clone()),
        Call::Count(everything),
        Call::Load { runs: (0..RUNS).collect(), records: true },
        Call::Peers(0),
        Call::Peers(1),
    ];
    let mut asked = Vec::new();
    for call in calls.iter().chain(&looks) {
        for side in play.sides.iter_mut().filter(|_| call.writes()) {
            side.begin().await;
        }
        play.prepare(call).await;
        let mut answers = Vec::new();
        let mut told = None;
        for side in 0..2 {
            let (concrete, answer, of) = play.make(side, call).await;
            if side == 0 {
                asked.push(format!("@{} {}", play.sides[0].calls(), play.names.name(&concrete)));
                told = Some(of);
            }
            answers.push(answer);
        }
        let [model, other] = [answers.remove(0), answers.remove(0)];
        if model != other {
            return Err(Difference { asked, answers: [model, other] });
        }
        if let Some(told) = told {
            play.note(call, &told, tally);
        }
    }
    Ok(())
}

/// What a call came to.
enum Told {
    Worked(bool),
    Committed(Vec<Op>, Vec<Outcome>),
    /// Nobody is there whom it could be about.
    Nothing,
}

impl Play {
    async fn rows_of(&self, side: usize) -> Vec<ProcessRow> {
        let all = Filter { limit: ALL, ..Filter::default() };
        self.sides[side].storage.list(&self.names.namespace, &all).await.unwrap()
    }

    fn filter(&self, side: usize, wanted: &Wanted) -> Filter {
        Filter {
            kind: wanted.kind.map(|kind| KINDS[kind].into()),
            status: wanted.status,
            unchanged_since: wanted.since.map(|calls| self.sides[side].ago(calls)),
            after: wanted.after.map(|run| self.names.runs[run]),
            limit: wanted.limit,
        }
    }

    /// What must be the same for both, and is made out by what is there.
    async fn prepare(&mut self, call: &Call) {
        self.rows = self.rows_of(0).await;
        match call {
            Call::Commit { by, generation, ops } => {
                self.claims = self.bound(ops).await;
                let generation = self.generations[*by] + generation.0;
                self.batches = Vec::new();
                for side in 0..2 {
                    self.batches.push(self.batch(side, *by, generation, ops).await);
                }
            }
            Call::Release(of, _) => {
                let fenced = self.peers().await.into_iter().find(|peer| peer.fenced).map(|peer| peer.instance);
                let fenced = self.names.instances.iter().position(|id| Some(*id) == fenced);
                self.released = fenced.unwrap_or(*of);
            }
            // An instance that is gone does not come back.
            Call::Enlist(of) if self.sides[0].hearts.contains_key(of) && !self.is_there(*of).await => {
                self.names.begins(*of);
                self.generations[*of] = 0;
                for side in &mut self.sides {
                    side.last.remove(of);
                    side.seen.remove(of);
                }
            }
            _ => {}
        }
    }

    /// What is asked, what is answered, and what that is.
    async fn make(&mut self, side: usize, call: &Call) -> (String, String, Told) {
        let asked = format!("{call:?}");
        let namespace = self.names.namespace.clone();
        macro_rules! answer {
            ($result:expr, $worked:expr) => {{
                let result = $result;
                let worked = result.as_ref().is_ok_and($worked);
                (asked, self.sides[side].answer(&self.names, result), Told::Worked(worked))
            }};
        }
        match call {
            Call::Enlist(of) => {
                let kinds = KINDS[..=of % 2].iter().map(|kind| (*kind).into()).collect();
                let id = self.names.instances[*of];
                let new = NewInstance {
                    id,
                    namespace: namespace.into(),
                    label: "one".into(),
                    kinds,
                    expiry: std::time::Duration::from_secs(10),
                };
                let mine = &mut self.sides[side];
                // One instance has one heart.
                mine.hearts.remove(of);
                let result = mine.storage.enlist(&new).await;
                let result = result.map(|(heart, now)| {
                    mine.hearts.insert(*of, heart);
                    now
                });
                answer!(result, |_| true)
            }
            Call::Beat(of) => match self.sides[side].hearts.get_mut(of) {
                Some(heart) => {
                    let result = heart.beat().await;
                    answer!(result, |_| true)
                }
                None => (asked, String::new(), Told::Nothing),
            },
            Call::Refence(of, by) => {
                let generation = self.generations[*of] + by.0;
                let result = self.sides[side].storage.refence(self.names.instances[*of], generation).await;
                if result.is_ok() && side == 1 {
                    self.generations[*of] = generation.max(self.generations[*of]);
                }
                answer!(result, |_| true)
            }
            Call::Commit { by, .. } => self.commit(side, *by, self.batches[side].clone()).await,
            Call::Again(by) => {
                let Some(mut batch) = self.sides[side].last.get(by).cloned() else {
                    return (asked, String::new(), Told::Nothing);
                };
                batch.fence.generation = self.generations[*by];
                self.commit(side, *by, batch).await
            }
            Call::Load { runs, records } => {
                let left: Vec<RunId> = runs.iter().map(|run| self.names.runs[*run]).collect();
                let mut all = Vec::new();
                let load = if *records { Load::whole(&left) } else { Load::signals(&left) };
                for mut loaded in self.sides[side].storage.load(&load).await.unwrap().unwrap() {
                    if let Ok(Some(state)) = &mut loaded.state {
                        state.records.sort_by(|(one, _), (other, _)| one.cmp(other));
                        state.targets.sort_by_key(|target| target.run);
                    }
                    all.push(loaded);
                }
                all.sort_by_key(|loaded| loaded.run);
                answer!(Ok(all), |all| all.iter().any(|loaded| matches!(loaded.state, Ok(Some(_)))))
            }
            Call::Owned { by, after, limit } => {
                let after = after.map(|run| self.names.runs[run]);
                let owned = self.sides[side].storage.owned(self.names.instances[*by], after, *limit).await;
                answer!(owned, |owned| !owned.is_empty())
            }
            Call::Poll { by, kinds, watched } => {
                let poll = Poll {
                    instance: self.names.instances[*by],
                    namespace: namespace.into(),
                    kinds: kinds.iter().map(|kind| KINDS[*kind].into()).collect(),
                    watched: watched.iter().map(|run| self.names.runs[*run]).collect(),
                };
                let polled = self.sides[side].storage.poll(&poll).await.map(|mut polled| {
                    polled.due.sort();
                    polled.signalled.sort();
                    polled.ended.sort();
                    polled.more = false;
                    polled
                });
                answer!(polled, |polled| !polled.due.is_empty() || !polled.signalled.is_empty())
            }
            Call::Peers(me) => {
                let peers = self.sides[side].storage.peers(&namespace, self.names.instances[*me]).await;
                let mut peers = peers.unwrap();
                peers.peers.sort_by_key(|peer| peer.instance);
                for peer in &peers.peers {
                    if let Some(of) = self.names.instances.iter().position(|id| *id == peer.instance) {
                        self.sides[side].seen.insert(of, peer.clone());
                    }
                }
                let told = peers.peers.iter().map(|peer| (peer.instance, peer.heartbeat_at, peer.fenced));
                let told = (peers.now, told.collect::<Vec<_>>());
                answer!(Ok(told), |(_, told)| !told.is_empty())
            }
            Call::Fence { by, of, now } => {
                let peer = if *now { self.peer(side, *by, *of).await } else { self.sides[side].seen.get(of).cloned() };
                let Some(peer) = peer else { return (asked, "nobody".to_owned(), Told::Nothing) };
                let fenced = self.sides[side].storage.fence(&peer).await;
                answer!(fenced, |fenced| *fenced)
            }
            Call::Release(_, limit) => {
                let released = self.sides[side].storage.release(self.names.instances[self.released], *limit).await;
                answer!(released, |released| *released > 0)
            }
            Call::Retire(of) => {
                let retired = self.sides[side].storage.retire(self.names.instances[*of]).await;
                answer!(retired, |()| true)
            }
            Call::Find(id, run) => {
                let run = run.map(|run| self.names.runs[run]);
                let found = self.sides[side].storage.find(&namespace, IDS[*id], run).await;
                answer!(found, |found| found.is_some())
            }
            Call::Record(which, at) => {
                let (Which::Mine(nth) | Which::Any(nth)) = which;
                let there = || Some(self.rows.get(nth % self.rows.len().max(1))?.run);
                let run = Some(*which).filter(|which| matches!(which, Which::Mine(_))).and_then(|_| there());
                let record = self.sides[side].storage.record(run.unwrap_or(self.names.runs[*nth]), &key(*at)).await;
                answer!(record, |record| record.is_some())
            }
            Call::List(wanted) => {
                let listed = self.sides[side].storage.list(&namespace, &self.filter(side, wanted)).await;
                answer!(listed, |listed| !listed.is_empty())
            }
            Call::Count(wanted) => {
                let counted = self.sides[side].storage.count(&namespace, &self.filter(side, wanted)).await;
                let counted = counted.map(|mut counted| {
                    counted.sort_by(|one, other| (&one.kind, one.status).cmp(&(&other.kind, other.status)));
                    counted
                });
                answer!(counted, |counted| !counted.is_empty())
            }
        }
    }

    async fn peer(&self, side: usize, by: usize, of: usize) -> Option<Peer> {
        let peers = self.sides[side].storage.peers(&self.names.namespace, self.names.instances[by]).await.unwrap();
        peers.peers.into_iter().find(|peer| peer.instance == self.names.instances[of])
    }

    /// All instances, by the model.
    async fn peers(&self) -> Vec<Peer> {
        let nobody = storage::InstanceId(Uuid::nil());
        self.sides[0].storage.peers(&self.names.namespace, nobody).await.unwrap().peers
    }

    async fn is_there(&self, of: usize) -> bool {
        self.peers().await.iter().any(|peer| peer.instance == self.names.instances[of])
    }

    /// What looks do by the way is done.
    async fn idle(&self, side: usize) {
        let instance = storage::InstanceId(Uuid::nil());
        let poll = Poll { instance, namespace: self.names.namespace.as_str().into(), kinds: vec![], watched: vec![] };
        while self.sides[side].storage.poll(&poll).await.unwrap().more {}
    }

    async fn commit(&mut self, side: usize, by: usize, batch: Batch) -> (String, String, Told) {
        let asked = format!("i{by} under {}: {:?}", batch.fence.generation, batch.ops);
        let asked = self.sides[side].answer(&self.names, Ok(asked)).replace('\\', "");
        let result = self.sides[side].storage.commit(&batch).await;
        if batch.ops.iter().any(|op| matches!(op, Op::Order(_))) {
            self.idle(side).await;
        }
        let told = match &result {
            Ok(outcomes) => Told::Committed(batch.ops.clone(), outcomes.clone()),
            Err(_) => Told::Worked(false),
        };
        let answer = self.sides[side].answer(&self.names, result.map(in_order));
        self.sides[side].last.insert(by, batch);
        (asked, answer, told)
    }

    fn note(&self, call: &Call, told: &Told, tally: &mut Tally) {
        let name = match call {
            Call::Again(_) => "Again".to_owned(),
            _ => format!("{call:?}").split([' ', '(']).next().unwrap_or_default().to_owned(),
        };
        match told {
            Told::Nothing => {}
            Told::Worked(worked) => tally.add(&name, *worked),
            Told::Committed(ops, outcomes) => {
                tally.add(&name, true);
                for (op, outcome) in ops.iter().zip(outcomes) {
                    let (kind, worked) = self.judge(op, outcome);
                    tally.add(kind, worked);
                    match op {
                        Op::Park(_) if worked => tally.add("park (signals)", !matches!(outcome, Outcome::Signalled(_))),
                        Op::Record(record) if record.replaces => tally.add("record (replaces)", worked),
                        _ => {}
                    }
                }
            }
        }
    }

    /// What kind of operation it is, and whether it has done what was asked; a park, whether its run was the caller's.
    fn judge(&self, op: &Op, outcome: &Outcome) -> (&'static str, bool) {
        let worked = match outcome {
            Outcome::Recorded | Outcome::Finished { .. } | Outcome::Signalled(_) => true,
            Outcome::Spawned(spawned) => !spawned.existed,
            Outcome::Raised(raised) => matches!(raised, Raised::Delivered { .. }),
            Outcome::Awaits(target) => target.is_some(),
            Outcome::Claimed(claimed) => !claimed.is_empty(),
            Outcome::Asked { before, .. } => before.is_some_and(|(_, status)| match op {
                Op::Order(Order { what: What::Cancel | What::Terminate { .. }, .. }) => !status.is_finished(),
                Op::Order(Order { what: What::Resume { .. }, .. }) => {
                    matches!(status, Status::Stuck | Status::Failed)
                }
                _ => status.is_finished() || status == Status::Stuck,
            }),
            _ => false,
        };
        let kind = match op {
            Op::Spawn(spawn) if spawn.restart_finished => "start (restart)",
            Op::Spawn(spawn) if spawn.take => "start (take)",
            Op::Spawn(_) => "start",
            Op::Raise(_) => "raise",
            Op::Record(record) => match &record.effect {
                None if record.takes.is_some() => "record (takes)",
                None if record.awaited.is_some() => "record (awaited)",
                None => "record",
                Some(storage::Effect::Spawn(_)) => "record (start)",
                Some(storage::Effect::Raise(_)) => "record (raise)",
            },
            Op::Await { .. } => "await",
            Op::AcceptCancel { .. } => "accept cancel",
            Op::Seen { .. } => "seen",
            Op::Finish(_) => "end",
            Op::Park(_) => "park",
            Op::Order(order) => match &order.what {
                What::Cancel => "cancel",
                What::Terminate { .. } => "terminate",
                What::Resume { forget } if !forget.is_empty() => "resume (forget)",
                What::Resume { .. } => "resume",
                What::Delete => "delete",
                _ => "?",
            },
            Op::Claim { .. } => "claim",
            _ => "?",
        };
        (kind, worked)
    }
}
