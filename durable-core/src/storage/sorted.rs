use super::batch::{Effect, Finish, Op, Order, Park, Raise, RecordOp, Spawn};
use super::rows::RunId;

/// A run, and the claim under which it writes.
type From = (RunId, i64);

/// A start, and the run whose record it belongs to if a process makes it.
pub type Start<'b> = (&'b Spawn, Option<From>);

/// A message, likewise.
pub type Letter<'b> = (&'b Raise, Option<From>);

/// The operations of a batch by kind, each with its place in the batch.
///
/// For storages that write a kind at a time. Starts are in the order of their ids, so that no two batches wait for each
/// other's.
#[derive(Debug, Default)]
pub struct Sorted<'b> {
    /// Starts, of people and of processes.
    pub spawns: Vec<(usize, Start<'b>)>,
    /// Messages, likewise.
    pub raises: Vec<(usize, Letter<'b>)>,
    /// Records without an effect.
    pub records: Vec<(usize, &'b RecordOp)>,
    /// Records that start something.
    pub start_records: Vec<(usize, &'b RecordOp)>,
    /// Records that send something.
    pub raise_records: Vec<(usize, &'b RecordOp)>,
    /// Who waits, and for what: an id, or a run of it.
    pub awaits: Vec<(usize, (RunId, &'b str, Option<RunId>))>,
    /// Cancellations that owners record.
    pub accepts: Vec<(usize, (From, i32))>,
    /// Signals that owners have read: up to this number.
    pub seen: Vec<(usize, (From, i64))>,
    /// Ends.
    pub finishes: Vec<(usize, &'b Finish)>,
    /// Parks.
    pub parks: Vec<(usize, &'b Park)>,
    /// What people order.
    pub orders: Vec<(usize, &'b Order)>,
    /// Claims: a kind, and at most how many.
    pub claims: Vec<(usize, (&'b str, usize))>,
}

impl<'b> Sorted<'b> {
    /// Sorts them. One that this version does not know is left out.
    pub fn new(ops: &'b [Op]) -> Self {
        let mut sorted = Self::default();
        for (at, op) in ops.iter().enumerate() {
            match op {
                Op::Spawn(spawn) => sorted.spawns.push((at, (spawn, None))),
                Op::Raise(raise) => sorted.raises.push((at, (raise, None))),
                Op::Record(record) => {
                    let from = Some((record.run, record.claim));
                    match &record.effect {
                        Some(Effect::Spawn(spawn)) => {
                            sorted.spawns.push((at, (spawn, from)));
                            sorted.start_records.push((at, record));
                        }
                        Some(Effect::Raise(raise)) => {
                            sorted.raises.push((at, (raise, from)));
                            sorted.raise_records.push((at, record));
                        }
                        None => sorted.records.push((at, record)),
                    }
                }
                Op::Await { run, id, target } => sorted.awaits.push((at, (*run, id, *target))),
                Op::AcceptCancel { run, claim, seq } => sorted.accepts.push((at, ((*run, *claim), *seq))),
                Op::Seen { run, claim, signals } => sorted.seen.push((at, ((*run, *claim), *signals))),
                Op::Finish(finish) => sorted.finishes.push((at, finish)),
                Op::Park(park) => sorted.parks.push((at, park)),
                Op::Order(order) => sorted.orders.push((at, order)),
                Op::Claim { kind, limit } => sorted.claims.push((at, (kind, *limit))),
            }
        }
        sorted.spawns.sort_by_key(|(_, (spawn, _))| &spawn.id);
        sorted
    }

    /// All records.
    pub fn all_records(&self) -> impl Iterator<Item = &(usize, &'b RecordOp)> {
        self.records.iter().chain(&self.start_records).chain(&self.raise_records)
    }

    /// The runs whose rows the instance changes as their owner.
    pub fn owned(&self) -> Vec<RunId> {
        let runs = self.accepts.iter().map(|(_, ((run, _), _))| *run);
        let runs = runs.chain(self.seen.iter().map(|(_, ((run, _), _))| *run));
        let runs = runs.chain(self.finishes.iter().map(|(_, finish)| finish.run));
        runs.chain(self.parks.iter().map(|(_, park)| park.run)).collect()
    }

    /// The runs that end for good: others may await them.
    pub fn ending(&self) -> Vec<RunId> {
        let ends = self.finishes.iter().filter(|(_, finish)| finish.status.is_finished());
        ends.map(|(_, finish)| finish.run).collect()
    }

    /// The ids of other processes whose rows the batch may change, and the runs that it awaits.
    pub fn others(&self) -> (Vec<&'b str>, Vec<RunId>) {
        let mut ids: Vec<&'b str> = self.raises.iter().map(|(_, (raise, _))| &*raise.id).collect();
        ids.extend(self.spawns.iter().filter(|(_, (s, _))| s.restart_finished).map(|(_, (s, _))| &*s.id));
        let mut runs = Vec::new();
        for (_, (_, id, target)) in &self.awaits {
            match target {
                Some(target) => runs.push(*target),
                None => ids.push(id),
            }
        }
        ids.extend(self.orders.iter().map(|(_, order)| &*order.id));
        (ids, runs)
    }

    /// All ids by which it names processes.
    pub fn ids(&self) -> Vec<&'b str> {
        let mut ids = self.others().0;
        ids.extend(self.spawns.iter().map(|(_, (spawn, _))| &*spawn.id));
        ids.extend(self.awaits.iter().map(|(_, (_, id, _))| *id));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Whether it is about a process by its id: one that is about to be put there must be there first.
    pub fn names_an_id(&self) -> bool {
        !self.spawns.is_empty() || !self.raises.is_empty() || !self.awaits.is_empty() || !self.orders.is_empty()
    }
}
