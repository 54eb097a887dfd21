//! What people order: cancel, resume, delete. The processes' rows are locked already.

use durable_core::storage::{Op, Sorted};

use super::{FINISHED, Of, UNFINISHED, WAKE, answers, owned};
use crate::json::{self, Column, Table};
use crate::sql::Sql;

pub(super) fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.orders.is_empty() {
        return;
    }
    let mut all = Table::new(&[("ord", Column::Number), ("id", Column::Key(256))]);
    let (mut cancels, mut resumes, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
    for (at, order) in &sorted.orders {
        let id = match order {
            Op::Cancel { id } => {
                cancels.push(&**id);
                id
            }
            Op::Resume { id, .. } => {
                resumes.push(&**id);
                id
            }
            Op::Delete { id } => {
                deletes.push(&**id);
                id
            }
            _ => continue,
        };
        all.row([(*at).into(), (&**id).into()]);
    }
    let (j, before) = (all.named(sql, "j"), answers::BEFORE);
    sql.push(format!(
        "INSERT INTO @out (part, ord, run, text) SELECT {before}, j.ord, p.run, p.status
         FROM {j} JOIN {of}.processes AS p ON p.namespace = @namespace AND p.id = j.id AND p.[current] = 1"
    ));
    if !cancels.is_empty() {
        cancel(sql, of, cancels);
    }
    if !resumes.is_empty() {
        forget(sql, of, sorted);
        let j = json::ids(sql, resumes);
        sql.push(format!(
            "UPDATE p SET status = N'waiting', wake_at = @now, calm_claim = p.claim, [output] = NULL, reason = NULL,
                 status_at = @now, finished_at = NULL
             FROM {of}.processes AS p JOIN {j} ON p.namespace = @namespace AND p.id = j.id
             WHERE p.[current] = 1 AND p.status IN (N'stuck', N'failed')"
        ));
    }
    if !deletes.is_empty() {
        delete(sql, of, deletes);
    }
}

fn cancel(sql: &mut Sql, of: &Of<'_>, ids: Vec<&str>) {
    let (j, woken) = (json::ids(sql, ids), answers::ROUSED);
    sql.push(format!(
        "UPDATE p SET signals = p.signals + 1, {WAKE}, cancel_requested_at = COALESCE(p.cancel_requested_at, @now)
         OUTPUT {woken}, inserted.run, inserted.owner INTO @out (part, run, owner)
         FROM {of}.processes AS p, {j}
         WHERE p.namespace = @namespace AND p.id = j.id AND p.[current] = 1 AND p.status IN {UNFINISHED} AND NOT (p.claim = 0 AND p.owner IS NULL)"
    ));
    // One that never ran has nothing to compensate.
    sql.push(format!(
        "UPDATE p SET status = N'cancelled', wake_at = NULL, status_at = @now, finished_at = @now,
             cancel_requested_at = @now
         FROM {of}.processes AS p JOIN {j} ON p.namespace = @namespace AND p.id = j.id
         WHERE p.[current] = 1 AND p.status = N'waiting' AND p.claim = 0"
    ));
    let ended = format!(
        "SELECT t.run FROM {j} JOIN {of}.processes AS t ON t.namespace = @namespace AND t.id = j.id
         WHERE t.[current] = 1 AND t.status = N'cancelled'"
    );
    owned::wake(sql, of, &ended, answers::ROUSED);
}

const FORGOTTEN: &[(&str, Column)] = &[
    ("audit", Column::Id),
    ("id", Column::Key(256)),
    ("scope", Column::Number),
    ("name", Column::Key(128)),
    ("key", Column::Key(260)),
];

/// Moves records that are to be forgotten into the audit.
fn forget(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let mut table = Table::new(FORGOTTEN);
    let mut some = false;
    for (_, order) in &sorted.orders {
        let Op::Resume { id, forget } = order else { continue };
        for forget in forget {
            some = true;
            let (scope, name, key) = (forget.key.scope as i64, &*forget.key.name, &*forget.key.key);
            table.row([crate::json::Cell::Id(forget.audit), (&**id).into(), scope.into(), name.into(), key.into()]);
        }
    }
    if !some {
        return;
    }
    let j = table.named(sql, "j");
    sql.push(format!(
        "INSERT INTO {of}.audit (audit, run, forgotten_at, scope, name, [key], op, state, payload, attempts, seq, claim,
             recorded_at)
         SELECT j.audit, s.run, @now, s.scope, s.name, s.[key], s.op, s.state, s.payload, s.attempts, s.seq, s.claim, s.recorded_at
         FROM {j} JOIN {of}.processes AS p ON p.namespace = @namespace AND p.id = j.id
             JOIN {of}.steps AS s ON s.run = p.run AND s.scope = j.scope AND s.name = j.name AND s.[key] = j.[key]
         WHERE p.[current] = 1 AND p.status IN (N'stuck', N'failed')
             AND NOT EXISTS (SELECT 1 FROM {of}.audit AS a WHERE a.audit = j.audit)"
    ));
    // Only what this order has put into the audit: a record that was made since an earlier attempt stays.
    sql.push(format!(
        "DELETE s FROM {of}.steps AS s JOIN {of}.audit AS a ON s.run = a.run AND s.scope = a.scope AND s.name = a.name
             AND s.[key] = a.[key] AND s.claim = a.claim AND s.recorded_at = a.recorded_at
         WHERE a.audit IN (SELECT j.audit FROM {j})"
    ));
}

/// All runs of the ids, if the current one may go. The rows themselves last.
fn delete(sql: &mut Sql, of: &Of<'_>, ids: Vec<&str>) {
    let j = json::ids(sql, ids);
    sql.declare("@gone TABLE (run BINARY(16) NOT NULL PRIMARY KEY)");
    sql.push(format!(
        "INSERT INTO @gone (run) SELECT r.run FROM {j} JOIN {of}.processes AS r ON r.namespace = @namespace AND r.id = j.id
         WHERE (r.[current] = 1 OR r.[current] = 0) AND EXISTS (SELECT 1 FROM {of}.processes AS q
             WHERE q.namespace = @namespace AND q.id = j.id AND q.[current] = 1
                 AND (q.status IN {FINISHED} OR q.status = N'stuck'))"
    ));
    owned::wake(sql, of, "SELECT g.run FROM @gone AS g", answers::ROUSED);
    // What of the inbox the database would not take.
    sql.push(format!(
        "DELETE i FROM {of}.inbox AS i JOIN {of}.processes AS p ON p.namespace = i.namespace AND p.id = i.id
         JOIN @gone AS g ON g.run = p.run WHERE i.refused IS NOT NULL"
    ));
    for (table, column) in
        [("steps", "run"), ("events", "run"), ("audit", "run"), ("waiters", "waiter"), ("processes", "run")]
    {
        sql.push(format!("DELETE d FROM {of}.{table} AS d JOIN @gone AS g ON g.run = d.{column}"));
    }
}
