use durable_core::storage::{Forget, Op};

use super::answers::Part;
use super::{FENCED, FINISHED, Plan, UNFINISHED, wake};
use crate::cells::{Rows, cells};
use crate::script::{Arg, NOW};

impl Plan<'_> {
    /// What people order. Rare, so one by one.
    pub(super) fn orders(&mut self) {
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
                "INSERT INTO durable_audit (audit, run, forgotten_at, scope, name, key, op, state, payload, attempts, seq,
                     claim, recorded_at)
                 SELECT j.value->>0, s.run, {NOW}, s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.seq,
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
