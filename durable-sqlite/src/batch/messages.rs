use durable_core::storage::{Effect, Op, Raise, Raised, RecordOp, RunId};

use super::answers::Part;
use super::records::{push_record, record_sets};
use super::{FENCED, Plan, UNFINISHED, wake};
use crate::cells::{Rows, cells};
use crate::script::NOW;

impl Plan<'_> {
    /// Messages, those of durable operations among them.
    pub(super) fn raises(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        for (index, op) in self.ops() {
            let (raise, from) = match op {
                Op::Raise(raise) => (raise, None),
                Op::Record(RecordOp { effect: Some(Effect::Raise(raise)), run, claim, .. }) => {
                    (raise, Some((run.0, *claim)))
                }
                _ => continue,
            };
            at.push(index);
            let Raise { id, name, event_id, payload } = raise;
            let (from, claim) = from.unzip();
            rows.push(cells![id, name, event_id, payload, from, claim]);
        }
        if rows.is_empty() {
            return;
        }
        const LAST: &str = "(SELECT max(e.number) FROM durable_events e WHERE e.run = durable_processes.run)";
        let rows = rows.arg();
        let [instance, generation] = self.fence_args();
        let namespace = self.namespace.clone();
        // Each process's messages are numbered on from its last signal, in the order of the batch.
        self.script.add(
            &format!(
                "INSERT INTO durable_events (run, number, name, event_id, payload, raised_at)
                 SELECT p.run, p.signals + row_number() OVER (PARTITION BY p.run ORDER BY j.key),
                     j.value->>1, j.value->>2, j.value->>3, {NOW}
                 FROM jsonb_each(?) j CROSS JOIN durable_processes p INDEXED BY durable_processes_current
                     ON p.namespace = ? AND p.id = j.value->>0 AND p.current = 1
                 WHERE {FENCED} AND p.status IN {UNFINISHED}
                     AND NOT EXISTS (SELECT 1 FROM durable_events e WHERE e.run = p.run AND e.event_id = j.value->>2)
                     AND (j.value->>4 IS NULL OR EXISTS (SELECT 1 FROM durable_processes o
                         WHERE o.run = j.value->>4 AND +o.owner IS ? AND o.claim = j.value->>5))"
            ),
            [rows.clone(), namespace.clone(), instance.clone(), generation.clone(), instance.clone()],
        );
        self.script.add(
            &format!(
                "UPDATE durable_processes SET signals = {LAST}, {}
                 WHERE {FENCED} AND {LAST} > signals AND run IN (
                     SELECT p.run FROM jsonb_each(?) j CROSS JOIN durable_processes p
                         ON p.namespace = ? AND p.id = j.value->>0 AND p.current = 1)",
                wake()
            ),
            [instance.clone(), instance.clone(), generation, rows.clone(), namespace.clone()],
        );
        let answers = self.script.add(
            "SELECT j.key, p.run, e.number, p.owner IS NOT NULL AND p.owner = ? FROM jsonb_each(?) j
                 CROSS JOIN durable_processes p ON p.namespace = ? AND p.id = j.value->>0 AND p.current = 1
                 LEFT JOIN durable_events e ON e.run = p.run AND e.event_id = j.value->>2",
            [instance, rows, namespace],
        );
        self.parts.push(Part::Raises { at, answers });
        self.raise_records();
    }

    /// The records of durable messages: what became of them.
    fn raise_records(&mut self) {
        let mut rows = record_sets(2);
        for (index, op) in self.ops() {
            if let Op::Record(record @ RecordOp { effect: Some(Effect::Raise(raise)), .. }) = op {
                push_record(&mut rows, index, record, cells![&raise.id, &raise.event_id]);
            }
        }
        let delivered = Raised::Delivered { run: RunId(uuid::Uuid::nil()), number: 0, mine: false }.as_json();
        self.write_records(
            rows,
            &format!(
                "CASE WHEN c.run IS NULL THEN '{}' WHEN EXISTS (SELECT 1 FROM durable_events e
                     WHERE e.run = c.run AND e.event_id = j.value->>5) THEN '{delivered}' ELSE '{}' END",
                Raised::NotFound.as_json(),
                Raised::Finished.as_json()
            ),
            "LEFT JOIN durable_processes c ON c.namespace = ? AND c.id = j.value->>4 AND c.current = 1",
        );
    }
}
