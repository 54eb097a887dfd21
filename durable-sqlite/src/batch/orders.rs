use durable_core::storage::chores::DELETED;
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

    /// Of an earlier run, too, if that is given; and whether a deletion leaves some of its former runs, and so itself.
    fn before(&mut self, order: &Order) -> usize {
        let [namespace, id, run, _] = self.meant(order);
        let meant = if order.run.is_some() { "run = ?" } else { "current = 1 AND ? IS NULL" };
        let (more, mut args) = match order.what {
            What::Delete => (format!("current = 1 AND {}", more()), vec![namespace.clone(), id.clone()]),
            _ => ("0".to_owned(), Vec::new()),
        };
        args.extend([namespace, id, run]);
        self.script.add(
            &format!("SELECT run, status, {more} FROM durable_processes WHERE namespace = ? AND id = ? AND {meant}"),
            args,
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
        let cancelled = format!("SELECT p.run FROM durable_processes p WHERE {CURRENT} AND p.status = 'cancelled'");
        self.unwait(&cancelled, self.meant(order).into());
        vec![self.wake_those_of_the_cancelled(order)]
    }

    fn resume(&mut self, order: &Order, forget: &[Forget]) -> Vec<usize> {
        self.forget(order, forget);
        // Those that have been told that it failed may await it again.
        let failed = format!("SELECT p.run FROM durable_processes p WHERE {CURRENT} AND p.status = 'failed'");
        for sql in [
            format!("DELETE FROM durable_chores WHERE {FENCED} AND what = 'wake' AND run IN ({failed})"),
            format!("UPDATE durable_waiters SET told = 0 WHERE {FENCED} AND told = 1 AND target IN ({failed})"),
        ] {
            let args = self.fence_args().into_iter().chain(self.meant(order));
            self.script.add(&sql, args);
        }
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
        // All runs of the id, the current one last, if that is meant and may go; or an earlier one alone.
        let current = format!(
            "SELECT p.run FROM durable_processes p WHERE {CURRENT} AND (p.status IN {FINISHED} OR p.status = 'stuck')"
        );
        let more = more();
        let runs = format!(
            "SELECT f.run FROM (SELECT run FROM durable_processes WHERE namespace = ? AND id = ? AND current = 0
                 ORDER BY run LIMIT {DELETED}) f WHERE EXISTS ({current})
             UNION ALL {current} AND NOT {more}
             UNION ALL SELECT run FROM durable_processes WHERE namespace = ? AND id = ? AND run = ? AND current = 0"
        );
        let meant = self.meant(order);
        let [namespace, id, run, _] = &meant;
        let pair = [namespace, id];
        let parts = [&pair[..], &meant.each_ref(), &meant.each_ref(), &pair, &pair, &[run]];
        let of: Vec<Arg> = parts.into_iter().flatten().copied().cloned().collect();
        let wakes = self.wake_waiters(&runs, of.clone());
        // What they leave in the other tables is cleared away later.
        for sql in [
            format!(
                "INSERT INTO durable_chores (run, what, due_at) SELECT g.run, 'delete', {NOW} FROM ({runs}) g WHERE {FENCED}
                 ON CONFLICT (run) DO UPDATE SET what = 'delete'"
            ),
            format!("DELETE FROM durable_processes WHERE run IN ({runs}) AND {FENCED}"),
        ] {
            self.script.add(&sql, of.iter().cloned().chain([instance.clone(), generation.clone()]));
        }
        wakes
    }
}

/// There are as many former runs of an id as go at once.
fn more() -> String {
    format!(
        "((SELECT count(*) FROM (SELECT 1 FROM durable_processes WHERE namespace = ? AND id = ? AND current = 0
             LIMIT {DELETED})) >= {DELETED})"
    )
}
