use durable_core::storage::{Effect, Op, RecordOp, Spawn};

use super::answers::Part;
use super::records::{push_record, record_sets};
use super::sets::{Headed, Sets};
use super::{FENCED, FINISHED, Plan};
use crate::cells::cells;
use crate::script::{Arg, NOW};

const HEAD: [&str; 5] = ["kind", "take", "restart", "from_run", "from_claim"];

impl Plan<'_> {
    /// Starts, those of durable operations among them.
    pub(super) fn spawns(&mut self) {
        let mut rows = Sets::new(4, HEAD);
        for (index, op) in self.ops() {
            let (spawn, from) = match op {
                Op::Spawn(spawn) => (spawn, None),
                Op::Record(RecordOp { effect: Some(Effect::Spawn(spawn)), run, claim, .. }) => {
                    (spawn, Some((run.0, *claim)))
                }
                _ => continue,
            };
            let Spawn { run, id, kind, input, digest, take, restart_finished } = spawn;
            let (from, claim) = from.unzip();
            let head = cells![kind, i64::from(*take), i64::from(*restart_finished), from, claim];
            rows.push(index, cells![run.0, id, input, digest], head);
        }
        for set in rows.sets() {
            self.start(set);
        }
        self.spawn_records();
    }

    fn start(&mut self, set: Headed) {
        let [instance, generation] = self.fence_args();
        let [kind, take, restart, from_run, from_claim] = HEAD.map(|name| set.cell(name));
        let (from, rows) = set.from();
        let args = |more: &[&Arg]| -> Vec<Arg> { rows.iter().chain(more.iter().copied()).cloned().collect() };
        // A durable start happens only if the run that asks for it may record.
        let owner = format!(
            "({from_run} IS NULL OR EXISTS (SELECT 1 FROM durable_processes o
                 WHERE o.run = {from_run} AND +o.owner IS ? AND o.claim = {from_claim}))"
        );
        let restarts = |at: &usize| match &self.batch.ops[*at] {
            Op::Spawn(spawn) | Op::Record(RecordOp { effect: Some(Effect::Spawn(spawn)), .. }) => {
                spawn.restart_finished
            }
            _ => false,
        };
        if set.at.iter().any(restarts) {
            let mut args = args(&[&self.namespace, &instance]);
            args.splice(0..0, [instance.clone(), generation.clone()]);
            self.script.add(
                &format!(
                    "UPDATE durable_processes SET current = 0 WHERE {FENCED} AND run IN (
                         SELECT p.run FROM {from} CROSS JOIN durable_processes p
                             ON p.namespace = ? AND p.id = j.value->>1 AND p.current = 1
                         WHERE {restart} = 1 AND p.status IN {FINISHED} AND p.kind = {kind}
                             AND NOT EXISTS (SELECT 1 FROM durable_processes q WHERE q.run = j.value->>0) AND {owner})"
                ),
                args,
            );
        }
        let mut args = args(&[&instance, &generation, &instance]);
        args.splice(0..0, [self.namespace.clone(), instance.clone()]);
        self.script.add(
            &format!(
                "INSERT INTO durable_processes (run, namespace, id, current, kind, status, owner, claim, calm_claim,
                     wake_at, signals, signalled, input, input_digest, created_at, status_at)
                 SELECT j.value->>0, ?, j.value->>1, 1, {kind}, iif({take}, 'running', 'waiting'),
                     iif({take}, ?, NULL), {take}, 0, iif({take}, NULL, {NOW}), 0, 0,
                     j.value->>2, j.value->>3, {NOW}, {NOW}
                 FROM {from} WHERE {FENCED} AND {owner} ON CONFLICT DO NOTHING"
            ),
            args,
        );
        // Those that are another run than asked for; none has to be looked for if all have been inserted.
        let all = i64::try_from(set.at.len()).unwrap_or(i64::MAX);
        let existing = self.script.add(
            "SELECT j.key, p.run, p.kind, p.input_digest FROM jsonb_each(iif(changes() = ?, '[]', ?)) j
                 CROSS JOIN durable_processes p ON p.namespace = ? AND p.id = j.value->>1 AND p.current = 1
             WHERE p.run <> j.value->>0
                 AND NOT EXISTS (SELECT 1 FROM durable_processes q WHERE q.run = j.value->>0)",
            [all.into(), set.rows, self.namespace.clone()],
        );
        self.parts.push(Part::Spawns { at: set.at, existing });
    }

    /// The records of durable starts: what the id has now.
    fn spawn_records(&mut self) {
        let mut rows = record_sets(3);
        for (index, op) in self.ops() {
            if let Op::Record(record @ RecordOp { effect: Some(Effect::Spawn(spawn)), .. }) = op {
                push_record(&mut rows, index, record, cells![&spawn.id, spawn.run.0, &record.payload]);
            }
        }
        self.write_records(
            rows,
            "json_object('run', c.run, 'existed', json(iif(c.run = j.value->>5, 'false', 'true')),
                 'kind', c.kind, 'other_input',
                 json(iif(j.value->>6 <> '' AND c.input_digest <> j.value->>6, 'true', 'false')))",
            "CROSS JOIN durable_processes c ON c.run = coalesce(
                 (SELECT q.run FROM durable_processes q WHERE q.run = j.value->>5),
                 (SELECT q.run FROM durable_processes q WHERE q.namespace = ? AND q.id = j.value->>4 AND q.current = 1))",
        );
    }
}
