use durable_core::storage::chores::{UNAWAITED, WOKEN};
use durable_core::storage::{Finish, Op, Park};

use super::answers::Part;
use super::sets::Sets;
use super::{ANYBODY, FENCED, FINISHED, Plan, UNFINISHED, wake};
use crate::cells::{Rows, cells};
use crate::script::{Arg, NOW};
use crate::time_text;

impl Plan<'_> {
    pub(super) fn awaits(&mut self) {
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
    pub(super) fn owned(&mut self) {
        let [instance, generation] = self.fence_args();
        let mut accept = (Vec::new(), Rows::default());
        let mut seen = (Vec::new(), Rows::default());
        for (index, op) in self.ops() {
            match op {
                Op::AcceptCancel { run, claim, seq } => {
                    accept.0.push((index, *run));
                    accept.1.push(cells![run.0, *claim, i64::from(*seq)]);
                }
                Op::Seen { run, claim, signals } => {
                    seen.0.push((index, *run));
                    seen.1.push(cells![run.0, *claim, *signals]);
                }
                _ => {}
            }
        }
        if !accept.0.is_empty() {
            let rows = accept.1.arg();
            let answers = self.script.add(
                &format!(
                    "UPDATE durable_processes SET cancelled_at = coalesce(cancelled_at, {NOW}), cancelled_seq =
                             coalesce(cancelled_seq, (SELECT value->>2 FROM jsonb_each(?) WHERE value->>0 = run))
                     WHERE {FENCED} AND +owner IS ? AND (run, claim) IN (SELECT value->>0, value->>1 FROM jsonb_each(?))
                     RETURNING run"
                ),
                [rows.clone(), instance.clone(), generation.clone(), instance.clone(), rows],
            );
            self.parts.push(Part::Owned { at: accept.0, answers });
        }
        if !seen.0.is_empty() {
            let rows = seen.1.arg();
            let answers = self.script.add(
                &format!(
                    "UPDATE durable_processes SET signalled = CASE WHEN (run, signals) IN
                             (SELECT value->>0, value->>2 FROM jsonb_each(?)) THEN 0 ELSE signalled END
                     WHERE {FENCED} AND +owner IS ? AND (run, claim) IN (SELECT value->>0, value->>1 FROM jsonb_each(?))
                     RETURNING run"
                ),
                [rows.clone(), instance.clone(), generation, instance, rows],
            );
            self.parts.push(Part::Owned { at: seen.0, answers });
        }
    }

    pub(super) fn finishes(&mut self) {
        const HEAD: [&str; 3] = ["status", "reason", "claim"];
        let mut rows = Sets::new(2, HEAD);
        for (index, op) in self.ops() {
            if let Op::Finish(Finish { run, claim, status, output, reason }) = op {
                let head = cells![status.as_str(), reason.as_ref(), *claim];
                rows.push(index, cells![run.0, output.as_ref()], head);
            }
        }
        for set in rows.sets() {
            let [instance, generation] = self.fence_args();
            let [status, reason, claim] = HEAD.map(|name| set.bound(name));
            // Those that have ended so, now or by an earlier attempt.
            let ended = format!(
                "SELECT p.run FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0
                 WHERE p.status IN {FINISHED} AND p.status = {} AND p.claim = {} AND +p.owner IS NULL",
                status.0, claim.0
            );
            let by: Vec<Arg> =
                [Some(set.rows.clone()), status.1.clone(), claim.1.clone()].into_iter().flatten().collect();
            let own = [Some(instance.clone()), Some(instance.clone()), Some(generation.clone())];
            let args = [status.1, reason.1, Some(set.rows.clone()), claim.1].into_iter().chain(own);
            let (values, claim) = (format!("{}, j.value->>1, {}", status.0, reason.0), claim.0);
            let finished = self.script.add(
                &format!(
                    "{} WHERE p.claim = {claim} AND +p.owner IS ? AND {FENCED}
                     ON CONFLICT (run) DO UPDATE SET status = excluded.status, output = excluded.output,
                         reason = excluded.reason, owner = NULL, wake_at = NULL, waiting_for = NULL, signalled = 0, status_at = {NOW},
                         finished_at = iif(excluded.status IN {FINISHED}, {NOW}, NULL)",
                    change("status, output, reason, calm_claim", &format!("{values}, 0"))
                ),
                args.flatten(),
            );
            self.unwait(&ended, by.clone());
            let wakes = self.wake_waiters(&ended, by);
            self.parts.push(Part::Finishes { at: set.at, finished, wakes });
        }
    }

    /// Deletes waiter rows of the selected runs, which have ended, and so await nothing any more.
    pub(super) fn unwait(&mut self, ended: &str, ended_args: Vec<Arg>) {
        let [instance, generation] = self.fence_args();
        self.script.add(
            &format!(
                "DELETE FROM durable_waiters WHERE {FENCED} AND {ANYBODY} AND (target, waiter) IN (
                     SELECT w.target, w.waiter FROM durable_waiters w WHERE w.waiter IN ({ended}) LIMIT {UNAWAITED})"
            ),
            [instance, generation].into_iter().chain(ended_args),
        );
    }

    /// Signals everybody who awaits one of the selected runs, or leaves that as chores; answers with those of them that the
    /// instance owns.
    pub(super) fn wake_waiters(&mut self, targets: &str, target_args: Vec<Arg>) -> usize {
        let [instance, generation] = self.fence_args();
        let many = format!(
            "CASE WHEN {FENCED} AND {ANYBODY} THEN (SELECT count(*) FROM (
                 SELECT 1 FROM durable_waiters w WHERE w.target IN ({targets}) LIMIT {WOKEN} + 1)) > {WOKEN} END"
        );
        let mut args = vec![instance.clone(), generation.clone()];
        args.extend(target_args.iter().chain(&target_args).cloned());
        self.script.add(
            &format!(
                "INSERT INTO durable_chores (run, what, due_at) SELECT t.run, 'wake', {NOW}
                 FROM (SELECT 1 WHERE {many}) g CROSS JOIN ({targets}) t
                 WHERE EXISTS (SELECT 1 FROM durable_waiters w WHERE w.target = t.run) ON CONFLICT DO NOTHING"
            ),
            args,
        );
        let mut args = vec![instance.clone(), instance.clone(), generation];
        args.extend(target_args.iter().chain(&target_args).cloned());
        args.push(instance);
        self.script.add(
            &format!(
                "UPDATE durable_processes SET signals = signals + 1, {} WHERE NOT ({many}) AND status IN {UNFINISHED}
                     AND run IN (SELECT w.waiter FROM durable_waiters w WHERE w.target IN ({targets}))
                 RETURNING run, owner IS NOT NULL AND owner = ?",
                wake()
            ),
            args,
        )
    }

    pub(super) fn parks(&mut self) {
        let mut at = Vec::new();
        let mut rows = Rows::default();
        for (index, op) in self.ops() {
            if let Op::Park(Park { run, claim, wake_at, seen, waiting_for, deaths }) = op {
                at.push(index);
                rows.push(cells![run.0, *claim, wake_at.map(time_text), *seen, waiting_for.as_ref(), *deaths]);
            }
        }
        if rows.is_empty() {
            return;
        }
        let [instance, generation] = self.fence_args();
        let parked = self.script.add(
            &format!(
                "{} WHERE p.claim = j.value->>1 AND +p.owner IS ? AND (j.value->>3 IS NULL OR j.value->>3 = p.signals)
                     AND {FENCED}
                 ON CONFLICT (run) DO UPDATE SET status = excluded.status, owner = NULL, calm_claim = claim - excluded.calm_claim,
                     signalled = 0, wake_at = excluded.wake_at, waiting_for = excluded.waiting_for, status_at = {NOW}",
                change(
                    "status, wake_at, waiting_for, calm_claim",
                    &format!(
                        "'waiting', CASE WHEN j.value->>3 IS NULL THEN min(j.value->>2, {NOW}) ELSE j.value->>2 END,
                             j.value->>4, j.value->>5"
                    )
                )
            ),
            [rows.arg(), instance.clone(), instance, generation],
        );
        self.parts.push(Part::Parks { at, parked });
    }
}

/// The beginning of a change of processes' rows by those of a batch, which are gone through first, whatever SQLite believes
/// to know of its tables: of an `UPDATE … FROM` it might go through all processes instead, if there was only one of them
/// at the service's last `ANALYZE`. As they all conflict with the rows that are there, none is put in.
fn change(columns: &str, values: &str) -> String {
    format!(
        "INSERT INTO durable_processes (run, namespace, id, current, kind, claim, signals, signalled, input,
             input_digest, created_at, status_at, {columns})
         SELECT p.run, '', '', 0, '', 0, 0, 0, '', '', '', '', {values}
         FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0"
    )
}
