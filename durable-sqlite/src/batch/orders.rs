use durable_core::storage::{Forget, Op, Order, What};

use super::answers::Part;
use super::{FENCED, FINISHED, Plan, UNFINISHED, wake};
use crate::cells::{Rows, cells};
use crate::script::{Arg, NOW};

/// The row `p` is the current run of the id, and the one that is given.
const CURRENT: &str = "p.namespace = ? AND p.id = ? AND p.current = 1 AND (? IS NULL OR p.run = ?)";

impl Plan<'_> {
    /// What people order of a process, and claims. Orders are rare, so one by one.
    pub(super) fn orders(&mut self) {
        // Their number makes the text, so it is not worth keeping.
        self.script.once = self.batch.ops.iter().any(|op| matches!(op, Op::Order(_)));
        for (at, op) in self.ops() {
            match op {
                Op::Order(order) => {
                    let before = self.before(order);
                    let wakes = match &order.what {
                        What::Cancel => self.cancel(order),
                        What::Terminate { reason } => self.terminate(order, reason),
                        What::Resume { forget } => self.resume(order, forget),
                        What::Delete => vec![self.delete(order)],
                        // Told as an order to nobody.
                        _ => Vec::new(),
                    };
                    self.parts.push(Part::Asked { at, before, wakes });
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

    /// What [`CURRENT`] is about.
    fn meant(&self, order: &Order) -> [Arg; 4] {
        let run: Arg = order.run.map(|run| run.to_string()).into();
        [self.namespace.clone(), (&*order.id).into(), run.clone(), run]
    }

    /// Of an earlier run, too, if that is given.
    fn before(&mut self, order: &Order) -> usize {
        let [namespace, id, run, _] = self.meant(order);
        let meant = if order.run.is_some() { "run = ?" } else { "current = 1 AND ? IS NULL" };
        self.script.add(
            &format!("SELECT run, status FROM durable_processes WHERE namespace = ? AND id = ? AND {meant}"),
            [namespace, id, run],
        )
    }

    /// Changes the current run; with `wakes` it answers like [`wake_waiters`](Self::wake_waiters).
    fn change(&mut self, order: &Order, (set, given): (&str, Vec<Arg>), only: &str, wakes: bool) -> usize {
        let [instance, generation] = self.fence_args();
        let mut args = given;
        args.extend([instance.clone(), generation]);
        args.extend(self.meant(order));
        let mut sql = format!("UPDATE durable_processes AS p SET {set} WHERE {FENCED} AND {CURRENT} AND {only}");
        if wakes {
            sql.push_str(" RETURNING run, owner IS NOT NULL AND owner = ?");
            args.push(instance);
        }
        self.script.add(&sql, args)
    }

    fn cancel(&mut self, order: &Order) -> Vec<usize> {
        let [instance, _] = self.fence_args();
        let told =
            format!("signals = signals + 1, {}, cancel_requested_at = coalesce(cancel_requested_at, {NOW})", wake());
        let only = format!("status IN {UNFINISHED} AND NOT (claim = 0 AND owner IS NULL)");
        let told = self.change(order, (&told, vec![instance]), &only, true);
        // One that never ran has nothing to compensate.
        let never_ran = format!(
            "status = 'cancelled', wake_at = NULL, status_at = {NOW}, finished_at = {NOW}, cancel_requested_at = {NOW}"
        );
        self.change(order, (&never_ran, Vec::new()), "status = 'waiting' AND claim = 0", false);
        vec![told, self.wake_those_of_the_cancelled(order)]
    }

    fn wake_those_of_the_cancelled(&mut self, order: &Order) -> usize {
        let cancelled = format!("SELECT p.run FROM durable_processes p WHERE {CURRENT} AND p.status = 'cancelled'");
        self.wake_waiters(&cancelled, self.meant(order).into())
    }

    fn terminate(&mut self, order: &Order, reason: &str) -> Vec<usize> {
        let set = format!(
            "status = 'cancelled', owner = NULL, calm_claim = claim, wake_at = NULL, waiting_for = NULL, signalled = 0,
             output = NULL, reason = ?, status_at = {NOW}, finished_at = {NOW},
             cancel_requested_at = coalesce(cancel_requested_at, {NOW})"
        );
        self.change(order, (&set, vec![reason.into()]), &format!("status IN {UNFINISHED}"), false);
        let [instance, generation] = self.fence_args();
        let mut args = vec![instance, generation];
        args.extend(self.meant(order));
        self.script.add(
            &format!(
                "DELETE FROM durable_waiters WHERE {FENCED} AND waiter IN (
                     SELECT p.run FROM durable_processes p WHERE {CURRENT} AND p.status = 'cancelled')"
            ),
            args,
        );
        vec![self.wake_those_of_the_cancelled(order)]
    }

    fn resume(&mut self, order: &Order, forget: &[Forget]) -> Vec<usize> {
        self.forget(order, forget);
        let resumed = format!(
            "status = 'waiting', wake_at = {NOW}, calm_claim = claim, output = NULL, reason = NULL, status_at = {NOW},
             finished_at = NULL"
        );
        self.change(order, (&resumed, Vec::new()), "status IN ('stuck', 'failed')", false);
        Vec::new()
    }

    fn forget(&mut self, order: &Order, forget: &[Forget]) {
        if forget.is_empty() {
            return;
        }
        let [instance, generation] = self.fence_args();
        let mut rows = Rows::default();
        for Forget { key, audit } in forget {
            rows.push(cells![*audit, key.scope as i64, &key.name, &key.key]);
        }
        let rows = rows.arg();
        let mut args = vec![rows.clone()];
        args.extend(self.meant(order));
        args.extend([instance.clone(), generation.clone()]);
        self.script.add(
            &format!(
                "INSERT INTO durable_audit (audit, run, forgotten_at, scope, name, key, op, state, payload, attempts, seq,
                     claim, recorded_at)
                 SELECT j.value->>0, s.run, {NOW}, s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.seq,
                     s.claim, s.recorded_at
                 FROM jsonb_each(?) j CROSS JOIN durable_processes p ON {CURRENT} AND p.status IN ('stuck', 'failed')
                     CROSS JOIN durable_steps s ON s.run = p.run
                     AND s.scope = j.value->>1 AND s.name = j.value->>2 AND s.key = j.value->>3
                 WHERE {FENCED} ON CONFLICT DO NOTHING"
            ),
            args,
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

    fn delete(&mut self, order: &Order) -> usize {
        let [instance, generation] = self.fence_args();
        // All runs of the id, if the current one is meant and may go; or an earlier one alone.
        let of_id = |current| {
            format!("SELECT run, current FROM durable_processes WHERE namespace = ? AND id = ? AND current = {current}")
        };
        let runs = format!(
            "SELECT r.run FROM ({} UNION ALL {}) r WHERE EXISTS (SELECT 1 FROM durable_processes p
                 WHERE {CURRENT} AND (p.status IN {FINISHED} OR p.status = 'stuck')) OR (r.run = ? AND r.current = 0)",
            of_id(0),
            of_id(1)
        );
        let [namespace, id, run, again] = self.meant(order);
        let (n, i) = (&namespace, &id);
        let of: Vec<Arg> = [n, i, n, i, n, i, &run, &again, &run].into_iter().cloned().collect();
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
