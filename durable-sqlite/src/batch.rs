//! A batch as SQL: a constant number of statements for each kind of operation that is in it, whose rows travel as one
//! JSON array; and what their answers say.

use durable_core::storage::{
    Batch, Claimed, Effect, Finish, Forget, Op, Outcome, Park, Raise, Raised, RecordOp, Result, RunId, Spawn, Spawned,
    Status, StorageError,
};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use std::collections::{HashMap, HashSet};

use crate::cells::{Cell, Rows, cells};
use crate::rows::{boxed, get, run, status};
use crate::script::{Answer, Arg, NOW, Script};
use crate::time_text;

/// True while the batch's instance and generation may write. Evaluated inside the batch's own write transaction, which
/// excludes every other writer, so it cannot be stale.
const FENCED: &str =
    "EXISTS (SELECT 1 FROM durable_fences WHERE instance = ? AND generation = ? AND fenced_at IS NULL)";
/// Whether anybody awaits anything: evaluated once for a statement, so that where nobody does nobody is looked for.
const ANYBODY: &str = "EXISTS (SELECT 1 FROM durable_waiters)";
// `+owner` in the statements keeps SQLite from going through all that the instance owns: rows are found by their run.
const UNFINISHED: &str = "('running', 'waiting', 'stuck')";
/// Both lists are used positively: a status that this version does not know is neither.
const FINISHED: &str = "('completed', 'failed', 'cancelled')";

/// A batch on its way.
pub(crate) struct Plan<'b> {
    batch: &'b Batch,
    script: Script,
    instance: Arg,
    generation: Arg,
    namespace: Arg,
    /// Where each kind's answer is.
    fence: usize,
    parts: Vec<Part>,
}

/// What an answer is for: the places of the operations, in the order of their rows.
enum Part {
    Spawns { at: Vec<usize>, existing: usize },
    Raises { at: Vec<usize>, answers: usize },
    Records { at: Vec<usize>, written: usize, rows: Arg },
    Awaits { at: Vec<usize>, answers: usize },
    Owned { at: Vec<(usize, RunId)>, answers: usize },
    Finishes { at: Vec<usize>, finished: usize, wakes: usize },
    Parks { at: Vec<usize>, parked: usize },
    Asked { at: usize, before: usize, wakes: Vec<usize> },
    Claimed { at: usize, answers: usize },
}

/// Commits a batch. An error says that nothing was written, or, as [`StorageError::Unknown`], that it may have been.
pub(crate) async fn commit(connection: &mut SqliteConnection, batch: &Batch) -> Result<Vec<Outcome>> {
    if let Some(outcomes) = commit_records(connection, batch).await? {
        return Ok(outcomes);
    }
    let plan = Plan::new(batch);
    let Plan { script, fence, parts, .. } = plan;
    let mut answers = script.run(connection).await?;
    if answers.get(fence).is_none_or(|answer| answer.rows.is_empty()) {
        return Err(StorageError::Fenced);
    }
    // From here on it is committed; whatever goes wrong with the answers does not undo it.
    read(connection, batch, parts, &mut answers).await.map_err(|error| StorageError::unknown(error.to_string()))
}

/// A batch of nothing but records is one statement, which is a transaction of its own. None if it is not such a batch,
/// or if not every row was written: the long way finds out why, and writes the same again.
async fn commit_records(connection: &mut SqliteConnection, batch: &Batch) -> Result<Option<Vec<Outcome>>> {
    let plain = |op: &Op| matches!(op, Op::Record(RecordOp { effect: None, takes: None, awaited: None, .. }));
    if batch.ops.is_empty() || !batch.ops.iter().all(plain) {
        return Ok(None);
    }
    let mut plan = Plan::empty(batch);
    plan.records();
    let written = plan.script.run(connection).await?.iter().map(|answer| answer.changes).sum::<u64>();
    Ok((written == batch.ops.len() as u64).then(|| vec![Outcome::Recorded; batch.ops.len()]))
}

impl<'b> Plan<'b> {
    fn empty(batch: &'b Batch) -> Self {
        Self {
            batch,
            script: Script::default(),
            instance: batch.fence.instance.to_string().into(),
            generation: batch.fence.generation.into(),
            namespace: (&*batch.namespace).into(),
            fence: 0,
            parts: Vec::new(),
        }
    }

    fn new(batch: &'b Batch) -> Self {
        let mut plan = Self::empty(batch);
        plan.script.add("BEGIN IMMEDIATE", []);
        let fence = plan.fence_args();
        plan.fence = plan.script.add(&format!("SELECT 1 WHERE {FENCED}"), fence);
        plan.spawns();
        plan.raises();
        plan.records();
        plan.awaits();
        plan.owned();
        plan.finishes();
        plan.parks();
        plan.orders();
        plan.script.add("COMMIT", []);
        plan
    }

    fn fence_args(&self) -> [Arg; 2] {
        [self.instance.clone(), self.generation.clone()]
    }

    fn ops(&self) -> impl Iterator<Item = (usize, &'b Op)> + use<'b> {
        self.batch.ops.iter().enumerate()
    }

    /// Starts, those of durable operations among them.
    fn spawns(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        let mut restarts = false;
        for (index, op) in self.ops() {
            let (spawn, from) = match op {
                Op::Spawn(spawn) => (spawn, None),
                Op::Record(RecordOp { effect: Some(Effect::Spawn(spawn)), run, claim, .. }) => {
                    (spawn, Some((run.0, *claim)))
                }
                _ => continue,
            };
            at.push(index);
            restarts |= spawn.restart_finished;
            let Spawn { run, id, kind, input, digest, take, restart_finished } = spawn;
            let (from, claim) = from.unzip();
            rows.push(cells![
                run.0,
                id,
                kind,
                input,
                digest,
                i64::from(*take),
                i64::from(*restart_finished),
                from,
                claim
            ]);
        }
        if rows.is_empty() {
            return;
        }
        let rows = rows.arg();
        let owner = |row: &str| {
            format!(
                "({row}.value->>7 IS NULL OR EXISTS (SELECT 1 FROM durable_processes o \
                 WHERE o.run = {row}.value->>7 AND +o.owner = ? AND o.claim = {row}.value->>8))"
            )
        };
        let [instance, generation] = self.fence_args();
        if restarts {
            self.script.add(
                &format!(
                    "UPDATE durable_processes SET current = 0 WHERE {FENCED} AND run IN (
                         SELECT p.run FROM jsonb_each(?) j CROSS JOIN durable_processes p
                             ON p.namespace = ? AND p.id = j.value->>1 AND p.current = 1
                         WHERE j.value->>6 = 1 AND p.status IN {FINISHED} AND p.kind = j.value->>2
                             AND NOT EXISTS (SELECT 1 FROM durable_processes q WHERE q.run = j.value->>0) AND {})",
                    owner("j")
                ),
                [instance.clone(), generation.clone(), rows.clone(), self.namespace.clone(), instance.clone()],
            );
        }
        self.script.add(
            &format!(
                "INSERT INTO durable_processes (run, namespace, id, current, kind, status, owner, claim, calm_claim,
                     wake_at, signals, signalled, input, input_digest, created_at, status_at)
                 SELECT j.value->>0, ?, j.value->>1, 1, j.value->>2, iif(j.value->>5, 'running', 'waiting'),
                     iif(j.value->>5, ?, NULL), j.value->>5, 0, iif(j.value->>5, NULL, {NOW}), 0, 0,
                     j.value->>3, j.value->>4, {NOW}, {NOW}
                 FROM jsonb_each(?) j WHERE {FENCED} AND {} ON CONFLICT DO NOTHING",
                owner("j")
            ),
            [self.namespace.clone(), instance.clone(), rows.clone(), instance.clone(), generation, instance.clone()],
        );
        // Those that are another run than asked for.
        let existing = self.script.add(
            "SELECT j.key, p.run, p.kind, p.input_digest FROM jsonb_each(?) j CROSS JOIN durable_processes p
                 ON p.namespace = ? AND p.id = j.value->>1 AND p.current = 1
             WHERE p.run <> j.value->>0
                 AND NOT EXISTS (SELECT 1 FROM durable_processes q WHERE q.run = j.value->>0)",
            [rows.clone(), self.namespace.clone()],
        );
        self.parts.push(Part::Spawns { at, existing });
        self.spawn_records();
    }

    /// The records of durable starts: what the id has now.
    fn spawn_records(&mut self) {
        let mut rows = Rows::default();
        let mut at = Vec::new();
        for (index, op) in self.ops() {
            if let Op::Record(record @ RecordOp { effect: Some(Effect::Spawn(spawn)), .. }) = op {
                at.push(index);
                rows.push(record_row(record, cells![&spawn.id, spawn.run.0]));
            }
        }
        self.write_records(
            at,
            rows,
            "json_object('run', c.run, 'existed', json(iif(c.run = j.value->>11, 'false', 'true')),
                 'kind', c.kind, 'digest', c.input_digest)",
            "CROSS JOIN durable_processes c ON c.run = coalesce(
                 (SELECT q.run FROM durable_processes q WHERE q.run = j.value->>11),
                 (SELECT q.run FROM durable_processes q WHERE q.namespace = ? AND q.id = j.value->>10 AND q.current = 1))",
        );
    }

    /// Messages, those of durable operations among them.
    fn raises(&mut self) {
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
                 FROM jsonb_each(?) j CROSS JOIN durable_processes p
                     ON p.namespace = ? AND p.id = j.value->>0 AND p.current = 1
                 WHERE {FENCED} AND p.status IN {UNFINISHED}
                     AND NOT EXISTS (SELECT 1 FROM durable_events e WHERE e.run = p.run AND e.event_id = j.value->>2)
                     AND (j.value->>4 IS NULL OR EXISTS (SELECT 1 FROM durable_processes o
                         WHERE o.run = j.value->>4 AND +o.owner = ? AND o.claim = j.value->>5))"
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
        let mut rows = Rows::default();
        let mut at = Vec::new();
        for (index, op) in self.ops() {
            if let Op::Record(record @ RecordOp { effect: Some(Effect::Raise(raise)), .. }) = op {
                at.push(index);
                rows.push(record_row(record, cells![&raise.id, &raise.event_id]));
            }
        }
        let delivered = Raised::Delivered { run: RunId(uuid::Uuid::nil()), number: 0, mine: false }.as_json();
        self.write_records(
            at,
            rows,
            &format!(
                "CASE WHEN c.run IS NULL THEN '{}' WHEN EXISTS (SELECT 1 FROM durable_events e
                     WHERE e.run = c.run AND e.event_id = j.value->>11) THEN '{delivered}' ELSE '{}' END",
                Raised::NotFound.as_json(),
                Raised::Finished.as_json()
            ),
            "LEFT JOIN durable_processes c ON c.namespace = ? AND c.id = j.value->>10 AND c.current = 1",
        );
    }

    fn records(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        let mut takes = Rows::default();
        let mut awaited = Rows::default();
        for (index, op) in self.ops() {
            let Op::Record(record) = op else { continue };
            let (run, claim) = (record.run.0, record.claim);
            if let Some(number) = record.takes {
                takes.push(cells![run, number, claim]);
            }
            if let Some(target) = record.awaited {
                awaited.push(cells![target.0, run]);
            }
            if record.effect.is_none() {
                at.push(index);
                rows.push(record_row(record, []));
            }
        }
        self.write_records(at, rows, "j.value->>6", "");
        let [instance, generation] = self.fence_args();
        if !takes.is_empty() {
            self.script.add(
                &format!(
                    "UPDATE durable_events SET taken_at = {NOW} WHERE {FENCED} AND taken_at IS NULL AND (run, number) IN (
                         SELECT j.value->>0, j.value->>1 FROM jsonb_each(?) j CROSS JOIN durable_processes p
                             ON p.run = j.value->>0 AND +p.owner = ? AND p.claim = j.value->>2)"
                ),
                [instance.clone(), generation.clone(), takes.arg(), instance.clone()],
            );
        }
        if !awaited.is_empty() {
            self.script.add(
                &format!(
                    "DELETE FROM durable_waiters WHERE {FENCED}
                         AND (target, waiter) IN (SELECT value->>0, value->>1 FROM jsonb_each(?))"
                ),
                [instance, generation, awaited.arg()],
            );
        }
    }

    /// Writes records of runs that the instance owns. One that stands there already stays, unless it is pending, a
    /// value, or this very write's earlier attempt.
    fn write_records(&mut self, at: Vec<usize>, rows: Rows, payload: &str, join: &str) {
        if rows.is_empty() {
            return;
        }
        let rows = rows.arg();
        let [instance, generation] = self.fence_args();
        let mut args = vec![rows.clone(), instance.clone()];
        if join.contains('?') {
            args.push(self.namespace.clone());
        }
        args.extend([instance, generation]);
        let written = self.script.add(
            &format!(
                "INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, claim, recorded_at)
                 SELECT j.value->>0, j.value->>1, j.value->>2, j.value->>3, j.value->>4, j.value->>5, {payload},
                     j.value->>7, j.value->>8, {NOW}
                 FROM jsonb_each(?) j CROSS JOIN durable_processes p
                     ON p.run = j.value->>0 AND +p.owner = ? AND p.claim = j.value->>8 {join}
                 WHERE {FENCED}
                 ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
                     payload = excluded.payload, attempts = excluded.attempts, claim = excluded.claim,
                     recorded_at = excluded.recorded_at
                 WHERE durable_steps.state = 'pending' OR durable_steps.op = 'value'
                     OR durable_steps.claim = excluded.claim"
            ),
            args,
        );
        self.parts.push(Part::Records { at, written, rows });
    }

    fn awaits(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        for (index, op) in self.ops() {
            if let Op::Await { run, id, target } = op {
                at.push(index);
                rows.push(cells![run.0, id, target.map(|target| target.0)]);
            }
        }
        if rows.is_empty() {
            return;
        }
        let rows = rows.arg();
        let [instance, generation] = self.fence_args();
        let from = "FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = coalesce(j.value->>2,
            (SELECT q.run FROM durable_processes q WHERE q.namespace = ? AND q.id = j.value->>1 AND q.current = 1))";
        self.script.add(
            &format!(
                "INSERT INTO durable_waiters (target, waiter) SELECT p.run, j.value->>0 {from}
                 WHERE p.status IN {UNFINISHED} AND {FENCED} ON CONFLICT DO NOTHING"
            ),
            [rows.clone(), self.namespace.clone(), instance, generation],
        );
        let answers =
            self.script.add(&format!("SELECT j.key, p.run, p.status, p.output {from}"), [rows, self.namespace.clone()]);
        self.parts.push(Part::Awaits { at, answers });
    }

    /// Small changes of owned rows.
    fn owned(&mut self) {
        let [instance, generation] = self.fence_args();
        let mut accept = (Vec::new(), Rows::default());
        let mut seen = (Vec::new(), Rows::default());
        for (index, op) in self.ops() {
            match op {
                Op::AcceptCancel { run, claim } => {
                    accept.0.push((index, *run));
                    accept.1.push(cells![run.0, *claim]);
                }
                Op::Seen { run, claim, signals } => {
                    seen.0.push((index, *run));
                    seen.1.push(cells![run.0, *claim, *signals]);
                }
                _ => {}
            }
        }
        if !accept.0.is_empty() {
            let answers = self.script.add(
                &format!(
                    "UPDATE durable_processes SET cancelled_at = coalesce(cancelled_at, {NOW}) WHERE {FENCED}
                         AND +owner = ? AND (run, claim) IN (SELECT value->>0, value->>1 FROM jsonb_each(?))
                     RETURNING run"
                ),
                [instance.clone(), generation.clone(), instance.clone(), accept.1.arg()],
            );
            self.parts.push(Part::Owned { at: accept.0, answers });
        }
        if !seen.0.is_empty() {
            let rows = seen.1.arg();
            let answers = self.script.add(
                &format!(
                    "UPDATE durable_processes SET signalled = CASE WHEN (run, signals) IN
                             (SELECT value->>0, value->>2 FROM jsonb_each(?)) THEN 0 ELSE signalled END
                     WHERE {FENCED} AND +owner = ? AND (run, claim) IN (SELECT value->>0, value->>1 FROM jsonb_each(?))
                     RETURNING run"
                ),
                [rows.clone(), instance.clone(), generation, instance, rows],
            );
            self.parts.push(Part::Owned { at: seen.0, answers });
        }
    }

    fn finishes(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        for (index, op) in self.ops() {
            if let Op::Finish(Finish { run, claim, status, output, reason, unasked }) = op {
                at.push(index);
                let finished = i64::from(status.is_finished());
                rows.push(cells![
                    run.0,
                    *claim,
                    status.as_str(),
                    output.as_ref(),
                    reason.as_ref(),
                    unasked.as_ref(),
                    finished
                ]);
            }
        }
        if rows.is_empty() {
            return;
        }
        let rows = rows.arg();
        let [instance, generation] = self.fence_args();
        let finished = self.script.add(
            &format!(
                "UPDATE durable_processes SET status = j.value->>2, output = j.value->>3, reason = j.value->>4,
                     unasked = j.value->>5, owner = NULL, wake_at = NULL, waiting_for = NULL, signalled = 0,
                     status_at = {NOW}, finished_at = iif(j.value->>6, {NOW}, NULL)
                 FROM jsonb_each(?) j
                 WHERE durable_processes.run = j.value->>0 AND durable_processes.claim = j.value->>1
                     AND +durable_processes.owner = ? AND {FENCED}"
            ),
            [rows.clone(), instance.clone(), instance.clone(), generation.clone()],
        );
        self.script.add(
            &format!(
                "DELETE FROM durable_waiters WHERE {FENCED} AND {ANYBODY} AND waiter IN (
                     SELECT p.run FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0
                     WHERE p.status IN {FINISHED})"
            ),
            [instance.clone(), generation.clone(), rows.clone()],
        );
        let targets = format!(
            "SELECT p.run FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0
             WHERE p.status IN {FINISHED}"
        );
        let wakes = self.wake_waiters(&targets, vec![rows]);
        self.parts.push(Part::Finishes { at, finished, wakes });
    }

    /// Signals everybody who awaits one of the selected runs; answers with those that the instance owns.
    fn wake_waiters(&mut self, targets: &str, target_args: Vec<Arg>) -> usize {
        let [instance, generation] = self.fence_args();
        let mut args = vec![instance.clone(), instance.clone(), generation];
        args.extend(target_args);
        args.push(instance);
        self.script.add(
            &format!(
                "UPDATE durable_processes SET signals = signals + 1, {} WHERE {FENCED} AND {ANYBODY} AND status IN {UNFINISHED}
                     AND run IN (SELECT w.waiter FROM durable_waiters w WHERE w.target IN ({targets}))
                 RETURNING run, owner IS NOT NULL AND owner = ?",
                wake()
            ),
            args,
        )
    }

    fn parks(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        for (index, op) in self.ops() {
            if let Op::Park(Park { run, claim, wake_at, seen, waiting_for }) = op {
                at.push(index);
                rows.push(cells![run.0, *claim, wake_at.map(time_text), *seen, waiting_for.as_ref()]);
            }
        }
        if rows.is_empty() {
            return;
        }
        let [instance, generation] = self.fence_args();
        let parked = self.script.add(
            &format!(
                "UPDATE durable_processes SET status = 'waiting', owner = NULL, calm_claim = claim, signalled = 0,
                     wake_at = j.value->>2, waiting_for = j.value->>4, status_at = {NOW}
                 FROM jsonb_each(?) j
                 WHERE durable_processes.run = j.value->>0 AND durable_processes.claim = j.value->>1
                     AND +durable_processes.owner = ?
                     AND (j.value->>3 IS NULL OR j.value->>3 = durable_processes.signals) AND {FENCED}"
            ),
            [rows.arg(), instance.clone(), instance, generation],
        );
        self.parts.push(Part::Parks { at, parked });
    }

    /// What people order. Rare, so one by one.
    fn orders(&mut self) {
        let orders = |op: &Op| matches!(op, Op::Cancel { .. } | Op::Resume { .. } | Op::Delete { .. });
        // Their number makes the text, so it is not worth keeping.
        self.script.once = self.batch.ops.iter().any(orders);
        for (at, op) in self.ops() {
            match op {
                Op::Cancel { id } => {
                    let before = self.before(id);
                    let mut wakes = vec![self.update_current(
                        id,
                        &format!(
                            "signals = signals + 1, {}, cancel_requested_at = coalesce(cancel_requested_at, {NOW})",
                            wake()
                        ),
                        &format!("status IN {UNFINISHED} AND NOT (claim = 0 AND owner IS NULL)"),
                        true,
                    )];
                    // One that never ran has nothing to compensate.
                    let never_ran = format!(
                        "status = 'cancelled', wake_at = NULL, status_at = {NOW}, finished_at = {NOW},
                         cancel_requested_at = {NOW}"
                    );
                    self.update_current(id, &never_ran, "status = 'waiting' AND claim = 0", false);
                    let ended = "SELECT p.run FROM durable_processes p WHERE p.namespace = ? AND p.id = ?
                        AND p.current = 1 AND p.status = 'cancelled'";
                    wakes.push(self.wake_waiters(ended, vec![self.namespace.clone(), (&**id).into()]));
                    self.parts.push(Part::Asked { at, before, wakes });
                }
                Op::Resume { id, forget } => {
                    let before = self.before(id);
                    self.forget(id, forget);
                    let resumed = format!(
                        "status = 'waiting', wake_at = {NOW}, calm_claim = claim, output = NULL, reason = NULL,
                         status_at = {NOW}, finished_at = NULL"
                    );
                    self.update_current(id, &resumed, "status IN ('stuck', 'failed')", false);
                    self.parts.push(Part::Asked { at, before, wakes: Vec::new() });
                }
                Op::Delete { id } => {
                    let before = self.before(id);
                    let wakes = self.delete(id);
                    self.parts.push(Part::Asked { at, before, wakes: vec![wakes] });
                }
                Op::Claim { kind, limit } => {
                    let [instance, generation] = self.fence_args();
                    let limit = i64::try_from(*limit).unwrap_or(i64::MAX);
                    let answers = self.script.add(
                        &format!(
                            "UPDATE durable_processes SET owner = ?, claim = claim + 1, status = 'running',
                                 wake_at = NULL, waiting_for = NULL, status_at = {NOW}
                             WHERE {FENCED} AND run IN (
                                 SELECT run FROM durable_processes WHERE namespace = ? AND kind = ?
                                     AND status = 'waiting' AND wake_at IS NOT NULL AND wake_at <= {NOW}
                                 ORDER BY wake_at LIMIT ?)
                             RETURNING run, claim"
                        ),
                        [
                            instance.clone(),
                            instance,
                            generation,
                            self.namespace.clone(),
                            (&**kind).into(),
                            limit.into(),
                        ],
                    );
                    self.parts.push(Part::Claimed { at, answers });
                }
                _ => {}
            }
        }
    }

    fn before(&mut self, id: &str) -> usize {
        self.script.add(
            "SELECT run, status FROM durable_processes WHERE namespace = ? AND id = ? AND current = 1",
            [self.namespace.clone(), id.into()],
        )
    }

    /// Changes the current run of an id; with `wakes` it answers like [`wake_waiters`](Self::wake_waiters).
    fn update_current(&mut self, id: &str, set: &str, only: &str, wakes: bool) -> usize {
        let [instance, generation] = self.fence_args();
        let mut args = Vec::new();
        if wakes {
            args.push(instance.clone());
        }
        args.extend([instance.clone(), generation, self.namespace.clone(), id.into()]);
        let mut sql = format!(
            "UPDATE durable_processes SET {set} WHERE {FENCED} AND namespace = ? AND id = ? AND current = 1 AND {only}"
        );
        if wakes {
            sql.push_str(" RETURNING run, owner IS NOT NULL AND owner = ?");
            args.push(instance);
        }
        self.script.add(&sql, args)
    }

    fn forget(&mut self, id: &str, forget: &[Forget]) {
        if forget.is_empty() {
            return;
        }
        let [instance, generation] = self.fence_args();
        let mut rows = Rows::default();
        for Forget { key, audit } in forget {
            rows.push(cells![*audit, key.scope as i64, &key.name, &key.key]);
        }
        let rows = rows.arg();
        let of =
            "durable_processes p ON p.namespace = ? AND p.id = ? AND p.current = 1 AND p.status IN ('stuck', 'failed')";
        self.script.add(
            &format!(
                "INSERT INTO durable_audit (audit, run, forgotten_at, scope, name, key, op, state, payload, attempts,
                     claim, recorded_at)
                 SELECT j.value->>0, s.run, {NOW}, s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts,
                     s.claim, s.recorded_at
                 FROM jsonb_each(?) j CROSS JOIN {of} CROSS JOIN durable_steps s ON s.run = p.run
                     AND s.scope = j.value->>1 AND s.name = j.value->>2 AND s.key = j.value->>3
                 WHERE {FENCED} ON CONFLICT DO NOTHING"
            ),
            [rows.clone(), self.namespace.clone(), id.into(), instance.clone(), generation.clone()],
        );
        self.script.add(
            &format!(
                // Only what this order has put into the audit: a record that was made since an earlier attempt stays.
                "DELETE FROM durable_steps WHERE {FENCED} AND (run, scope, name, key, claim, recorded_at) IN (
                     SELECT a.run, a.scope, a.name, a.key, a.claim, a.recorded_at
                     FROM jsonb_each(?) j CROSS JOIN durable_audit a ON a.audit = j.value->>0)"
            ),
            [instance, generation, rows],
        );
    }

    fn delete(&mut self, id: &str) -> usize {
        let [instance, generation] = self.fence_args();
        // All runs of the id, if the current one may go.
        let of_id = |current| {
            format!("SELECT run FROM durable_processes WHERE namespace = ? AND id = ? AND current = {current}")
        };
        let runs = format!(
            "SELECT r.run FROM ({} UNION ALL {}) r WHERE EXISTS (SELECT 1 FROM durable_processes q
                 WHERE q.namespace = ? AND q.id = ? AND q.current = 1
                     AND (q.status IN {FINISHED} OR q.status = 'stuck'))",
            of_id(0),
            of_id(1)
        );
        let of: Vec<Arg> = [&self.namespace, &id.into()].into_iter().cycle().take(6).cloned().collect();
        let wakes = self.wake_waiters(&runs, of.clone());
        let mut statements: Vec<String> = ["durable_steps", "durable_events", "durable_audit"]
            .iter()
            .map(|table| format!("DELETE FROM {table} WHERE {FENCED} AND run IN ({runs})"))
            .collect();
        statements.push(format!("DELETE FROM durable_waiters WHERE {FENCED} AND waiter IN ({runs})"));
        // The rows themselves last: the others are found through them.
        statements.push(format!("DELETE FROM durable_processes WHERE {FENCED} AND run IN ({runs})"));
        for sql in statements {
            let mut args = vec![instance.clone(), generation.clone()];
            args.extend(of.iter().cloned());
            self.script.add(&sql, args);
        }
        wakes
    }
}

/// What a signal does besides counting: tells an owner that is another instance, makes a waiting process due. One `?`:
/// the writing instance.
fn wake() -> String {
    format!(
        "signalled = CASE WHEN owner IS NOT NULL AND owner <> ? THEN 1 ELSE signalled END,
         wake_at = CASE WHEN status = 'waiting' THEN min(coalesce(wake_at, {NOW}), {NOW}) ELSE wake_at END"
    )
}

/// The columns of a record, and behind them those that an effect adds.
fn record_row<'r, const N: usize>(record: &'r RecordOp, more: [Cell<'r>; N]) -> impl Iterator<Item = Cell<'r>> {
    let RecordOp { run, claim, key, op, state, payload, attempts, .. } = record;
    let scope = key.scope as i64;
    let attempts = i64::from(*attempts);
    let row =
        cells![run.0, scope, &key.name, &key.key, op.as_str(), state.as_str(), payload, attempts, *claim, None::<i64>];
    row.into_iter().chain(more)
}

/// The answers to outcomes, in the order of the batch. It is committed by now: a row of another process that cannot be
/// understood is told to whoever asked about that process, and to nobody else.
async fn read(
    connection: &mut SqliteConnection,
    batch: &Batch,
    parts: Vec<Part>,
    answers: &mut [Answer],
) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; batch.ops.len()];
    let mut lost: HashSet<usize> = HashSet::new();
    let mut rows = |at: usize| answers.get_mut(at).map(std::mem::take).unwrap_or_default();
    for part in parts {
        match part {
            Part::Spawns { at, existing } => {
                let others = by_key(&rows(existing).rows, |row| {
                    let (run, kind, digest) = (run(row, 1)?, boxed(get(row, 2)?), boxed(get(row, 3)?));
                    Ok(Outcome::Spawned(Spawned { run, existed: true, kind, digest }))
                })?;
                answer(&mut outcomes, at, others, |at| match &batch.ops[at] {
                    Op::Spawn(spawn) | Op::Record(RecordOp { effect: Some(Effect::Spawn(spawn)), .. }) => {
                        let (run, kind, digest) = (spawn.run, spawn.kind.clone(), spawn.digest.clone());
                        Outcome::Spawned(Spawned { run, existed: false, kind, digest })
                    }
                    _ => Outcome::Lost,
                });
            }
            Part::Raises { at, answers: statement } => {
                let delivered = by_key(&rows(statement).rows, |row| {
                    Ok(Outcome::Raised(match get::<Option<i64>>(row, 2)? {
                        Some(number) => Raised::Delivered { run: run(row, 1)?, number, mine: get(row, 3)? },
                        None => Raised::Finished,
                    }))
                })?;
                answer(&mut outcomes, at, delivered, |_| Outcome::Raised(Raised::NotFound));
            }
            Part::Records { at, written, rows: sent } => {
                if rows(written).changes != at.len() as u64 {
                    lost.extend(lost_records(connection, &at, sent).await?);
                }
                for at in at {
                    outcomes[at].get_or_insert(Outcome::Recorded);
                }
            }
            Part::Awaits { at, answers: statement } => {
                let targets = by_key(&rows(statement).rows, |row| {
                    let status = status(get(row, 2)?)?;
                    let output = get::<Option<&str>>(row, 3)?.map(boxed);
                    Ok(Outcome::Awaits(Some((run(row, 1)?, status.is_finished().then_some((status, output))))))
                })?;
                answer(&mut outcomes, at, targets, |_| Outcome::Awaits(None));
            }
            Part::Owned { at, answers: statement } => {
                let owned: HashSet<RunId> = rows(statement).rows.iter().filter_map(|row| run(row, 0).ok()).collect();
                for (at, run) in at {
                    outcomes[at] = Some(if owned.contains(&run) { Outcome::Recorded } else { Outcome::Lost });
                }
            }
            Part::Finishes { at, finished, wakes } => {
                let complete = rows(finished).changes == at.len() as u64;
                let mut wakes = mine(&rows(wakes).rows);
                // Where not all were finished now, some may have been by an earlier attempt of this batch.
                let states = if complete { HashMap::new() } else { states(connection, batch).await? };
                for at in at {
                    let Op::Finish(finish) = &batch.ops[at] else { continue };
                    let before = states.get(&finish.run).is_some_and(|state| {
                        state.claim == finish.claim && state.status == finish.status.as_str() && !state.owned
                    });
                    let wakes = std::mem::take(&mut wakes);
                    outcomes[at] = Some(if complete || before { Outcome::Finished { wakes } } else { Outcome::Lost });
                }
            }
            Part::Parks { at, parked } => {
                let complete = rows(parked).changes == at.len() as u64;
                let states = if complete { HashMap::new() } else { states(connection, batch).await? };
                for at in at {
                    let Op::Park(park) = &batch.ops[at] else { continue };
                    outcomes[at] = Some(match states.get(&park.run) {
                        _ if complete => Outcome::Recorded,
                        Some(state) if state.mine && state.claim == park.claim => Outcome::Signalled(state.signals),
                        Some(state) if state.calm >= park.claim => Outcome::Recorded,
                        _ => Outcome::Lost,
                    });
                }
            }
            Part::Asked { at, before, wakes } => {
                let before: Result<Option<(RunId, Status)>> =
                    rows(before).rows.first().map(|row| Ok((run(row, 0)?, status(get(row, 1)?)?))).transpose();
                let wakes = wakes.into_iter().flat_map(|statement| mine(&rows(statement).rows)).collect();
                outcomes[at] = Some(match before {
                    Ok(before) => Outcome::Asked { before, wakes, again: false },
                    Err(why) => Outcome::Unreadable(why.to_string()),
                });
            }
            Part::Claimed { at, answers: statement } => {
                let claimed = |row: &SqliteRow| match (run(row, 0), get(row, 1)) {
                    (Ok(run), Ok(claim)) => Some(Claimed { run, claim }),
                    (Err(why), _) | (_, Err(why)) => {
                        tracing::error!("a process that was claimed cannot be run: {why}");
                        None
                    }
                };
                outcomes[at] = Some(Outcome::Claimed(rows(statement).rows.iter().filter_map(claimed).collect()));
            }
        }
    }
    for at in lost {
        outcomes[at] = Some(Outcome::Lost);
    }
    let missing = || StorageError::schema("a batch has an operation that this version does not know");
    outcomes.into_iter().map(|outcome| outcome.ok_or_else(missing)).collect()
}

/// The outcomes that rows stand for, by their places in the JSON array.
fn by_key(rows: &[SqliteRow], outcome: impl Fn(&SqliteRow) -> Result<Outcome>) -> Result<HashMap<usize, Outcome>> {
    let one =
        |row: &SqliteRow| Ok((key(row)?, outcome(row).unwrap_or_else(|why| Outcome::Unreadable(why.to_string()))));
    rows.iter().map(one).collect()
}

/// Notes the outcomes of the operations at these places; `absent` is that of one that no row stands for.
fn answer(
    outcomes: &mut [Option<Outcome>],
    at: Vec<usize>,
    mut rows: HashMap<usize, Outcome>,
    absent: impl Fn(usize) -> Outcome,
) {
    for (nth, at) in at.into_iter().enumerate() {
        outcomes[at] = Some(rows.remove(&nth).unwrap_or_else(|| absent(at)));
    }
}

/// The place in the JSON array that a row answers.
fn key(row: &SqliteRow) -> Result<usize> {
    usize::try_from(get::<i64>(row, 0)?).map_err(StorageError::schema)
}

/// The runs of rows that say that they are the instance's.
fn mine(rows: &[SqliteRow]) -> Vec<RunId> {
    let mine = |row: &SqliteRow| get::<bool>(row, 1).ok().filter(|mine| *mine).and_then(|_| run(row, 0).ok());
    rows.iter().filter_map(mine).collect()
}

/// Those of the records that are not in the database as they were sent. Only this instance writes records of its runs,
/// so a look after the commit is as good as one within.
async fn lost_records(connection: &mut SqliteConnection, at: &[usize], rows: Arg) -> Result<Vec<usize>> {
    let mut script = Script::default();
    script.add(
        "SELECT j.key FROM jsonb_each(?) j WHERE NOT EXISTS (SELECT 1 FROM durable_steps s
             WHERE s.run = j.value->>0 AND s.scope = j.value->>1 AND s.name = j.value->>2 AND s.key = j.value->>3
                 AND s.claim = j.value->>8 AND s.state = j.value->>5)",
        [rows],
    );
    let mut lost = Vec::new();
    for row in script.run(connection).await?.iter().flat_map(|answer| &answer.rows) {
        lost.extend(at.get(key(row)?));
    }
    Ok(lost)
}

/// How a run stands that was not changed as it should have been.
struct State {
    status: String,
    claim: i64,
    calm: i64,
    signals: i64,
    owned: bool,
    /// Owned by the batch's instance.
    mine: bool,
}

/// How the runs of a batch's ends and parks stand.
async fn states(connection: &mut SqliteConnection, batch: &Batch) -> Result<HashMap<RunId, State>> {
    let mut runs = Rows::default();
    for op in &batch.ops {
        if let Op::Finish(Finish { run, .. }) | Op::Park(Park { run, .. }) = op {
            runs.push(cells![run.0]);
        }
    }
    let mut script = Script::default();
    script.add(
        "SELECT p.run, p.status, p.claim, p.calm_claim, p.signals, p.owner IS NOT NULL, p.owner IS NOT NULL AND p.owner = ?
         FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0",
        [batch.fence.instance.to_string().into(), runs.arg()],
    );
    let state = |row: &SqliteRow| {
        let status = get(row, 1)?;
        let (claim, calm, signals) = (get(row, 2)?, get(row, 3)?, get(row, 4)?);
        Ok((run(row, 0)?, State { status, claim, calm, signals, owned: get(row, 5)?, mine: get(row, 6)? }))
    };
    script.run(connection).await?.iter().flat_map(|answer| &answer.rows).map(state).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use durable_core::storage::{Fence, InstanceId, OpKind, RecordKey, RecordState, Scope, Status};
    use sqlx::Connection;

    /// A batch with everything in it.
    fn everything() -> Batch {
        let run = RunId::new();
        let id: Box<str> = "p-1".into();
        let spawn = |restart_finished| Spawn {
            run: RunId::new(),
            id: id.clone(),
            kind: "kind".into(),
            input: "1".into(),
            digest: "d".into(),
            take: true,
            restart_finished,
        };
        let raise = || Raise { id: id.clone(), name: "e".into(), event_id: "x".into(), payload: "1".into() };
        let record = |effect| {
            Op::Record(RecordOp {
                run,
                claim: 1,
                key: RecordKey { scope: Scope::Process, name: "n".into(), key: "k".into() },
                op: OpKind::Step,
                state: RecordState::Done,
                payload: "1".into(),
                attempts: 0,
                takes: Some(1),
                effect,
                awaited: Some(RunId::new()),
            })
        };
        let forget = Forget {
            key: RecordKey { scope: Scope::Process, name: "n".into(), key: "".into() },
            audit: uuid::Uuid::now_v7(),
        };
        let finish = Finish { run, claim: 1, status: Status::Completed, output: None, reason: None, unasked: None };
        let ops = vec![
            Op::Spawn(spawn(true)),
            Op::Raise(raise()),
            record(None),
            record(Some(Effect::Spawn(spawn(false)))),
            record(Some(Effect::Raise(raise()))),
            Op::Await { run, id: id.clone(), target: None },
            Op::AcceptCancel { run, claim: 1 },
            Op::Seen { run, claim: 1, signals: 1 },
            Op::Finish(finish),
            Op::Park(Park { run, claim: 1, wake_at: None, seen: Some(1), waiting_for: None }),
            Op::Cancel { id: id.clone() },
            Op::Resume { id: id.clone(), forget: vec![forget] },
            Op::Delete { id: id.clone() },
            Op::Claim { kind: "kind".into(), limit: 10 },
        ];
        Batch { fence: Fence { instance: InstanceId::new(), generation: 0 }, namespace: "n".into(), ops }
    }

    #[tokio::test]
    async fn no_statement_of_a_batch_goes_through_a_table() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        crate::migrate::migrate(&mut connection).await.unwrap();
        let mut scans = Vec::new();
        for (sql, plan) in Plan::new(&everything()).script.plans(&mut connection).await {
            // A virtual table over the batch's own rows, and subqueries of it, may be scanned.
            let of_table = |line: &&String| {
                line.starts_with("SCAN ")
                    && !["SCAN j ", "SCAN jsonb_each", "SCAN (", "SCAN CONSTANT"]
                        .iter()
                        .any(|own| line.starts_with(own))
            };
            // Whether there is any row at all.
            let of_table =
                |line: &&String| of_table(line) && !line.contains("SCAN durable_waiters USING COVERING INDEX");
            let all_owned = |line: &&String| line.contains("durable_processes_owner");
            let own: Vec<_> = plan.iter().filter(|line| of_table(line) || all_owned(line)).collect();
            if !own.is_empty() {
                scans.push(format!("{sql}\n{plan:#?}"));
            }
        }
        assert!(scans.is_empty(), "{}", scans.join("\n\n"));
    }
}
