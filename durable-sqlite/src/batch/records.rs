use durable_core::storage::{Op, RecordOp};

use super::answers::Part;
use super::sets::Sets;
use super::{FENCED, Plan};
use crate::cells::{Cell, Rows, cells};
use crate::script::NOW;

impl Plan<'_> {
    pub(super) fn records(&mut self) {
        let mut rows = record_sets(1);
        let mut takes = Rows::default();
        let mut awaited = Rows::default();
        for (index, op) in self.ops() {
            let Op::Record(record) = op else { continue };
            let (run, claim) = (record.run.0, record.claim);
            if let Some(number) = record.takes {
                takes.push(cells![run, number, claim]);
            }
            if let Some(target) = record.awaited {
                awaited.push(cells![run, target.0, claim]);
            }
            if record.effect.is_none() {
                push_record(&mut rows, index, record, cells![&record.payload]);
            }
        }
        self.write_records(rows, "j.value->>4", "");
        let [instance, generation] = self.fence_args();
        if !takes.is_empty() {
            self.script.add(
                &format!(
                    "UPDATE durable_events SET taken_at = {NOW} WHERE {FENCED} AND taken_at IS NULL
                         AND (run, number) IN ({OWNED})"
                ),
                [instance.clone(), generation.clone(), takes.arg(), instance.clone()],
            );
        }
        if !awaited.is_empty() {
            self.script.add(
                &format!("DELETE FROM durable_waiters WHERE {FENCED} AND (waiter, target) IN ({OWNED})"),
                [instance.clone(), generation, awaited.arg(), instance],
            );
        }
    }

    /// Writes records of runs that the instance owns. One that stands there already stays, unless it is pending, a
    /// value, or this very write's earlier attempt.
    pub(super) fn write_records(&mut self, rows: Sets<5>, payload: &str, join: &str) {
        for set in rows.sets() {
            let (from, mut args) = set.from();
            args.push(self.instance.clone());
            if join.contains('?') {
                args.push(self.namespace.clone());
            }
            args.extend(self.fence_args());
            let [scope, op, state, attempts, claim] = HEAD.map(|name| set.cell(name));
            let written = self.script.add(
                &format!(
                    "INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, seq, claim,
                         recorded_at)
                     SELECT p.run, {scope}, j.value->>1, j.value->>2, {op}, {state}, {payload}, {attempts},
                         j.value->>3, {claim}, {NOW}
                     FROM {from} CROSS JOIN durable_processes p
                         ON p.run = j.value->>0 AND +p.owner IS ? AND p.claim = {claim} {join}
                     WHERE {FENCED}
                     ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
                         payload = excluded.payload, attempts = excluded.attempts, seq = excluded.seq,
                         claim = excluded.claim, recorded_at = excluded.recorded_at
                     WHERE durable_steps.state = 'pending' OR durable_steps.op = 'value'
                         OR (durable_steps.claim = excluded.claim AND durable_steps.seq = excluded.seq)"
                ),
                args,
            );
            self.parts.push(Part::Records { at: set.at, written });
        }
    }
}

/// Those of the rows run, something of it, claim that are the instance's.
const OWNED: &str = "SELECT j.value->>0, j.value->>1 FROM jsonb_each(?) j CROSS JOIN durable_processes p
    ON p.run = j.value->>0 AND +p.owner IS ? AND p.claim = j.value->>2";

const HEAD: [&str; 5] = ["scope", "op", "state", "attempts", "claim"];

/// Rows of records: run, name, key, place in the order, and so many cells for the payload or for what the payload is made of.
pub(super) fn record_sets(payload: usize) -> Sets<5> {
    Sets::new(4 + payload, HEAD)
}

pub(super) fn push_record<'r, const N: usize>(
    rows: &mut Sets<5>,
    at: usize,
    record: &'r RecordOp,
    payload: [Cell<'r>; N],
) {
    let RecordOp { run, claim, key, op, state, attempts, seq, .. } = record;
    let head = cells![key.scope as i64, op.as_str(), state.as_str(), i64::from(*attempts), *claim];
    rows.push(at, cells![run.0, &key.name, &key.key, i64::from(*seq)].into_iter().chain(payload), head);
}
