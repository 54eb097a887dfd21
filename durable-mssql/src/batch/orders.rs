//! What people order of processes. Their rows are locked already.

use durable_core::storage::chores::DELETED;
use durable_core::storage::{Order, Sorted, What};

use super::{FINISHED, Of, UNFINISHED, WAKE, answers, owned};
use crate::json::{Cell, Column, Table};
use crate::sql::Sql;

/// The row `p` is the current run of an id `j`, and the one that is given.
const MEANT: &str = "p.namespace = @namespace AND p.id = j.id AND p.[current] = 1 AND (j.run IS NULL OR p.run = j.run)";

const ORDERED: &[(&str, Column)] =
    &[("ord", Column::Number), ("id", Column::Key(256)), ("run", Column::Id), ("reason", Column::Text)];

pub(super) fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.orders.is_empty() {
        return;
    }
    let such = |sql: &mut Sql, is_such: fn(&What) -> bool| {
        let mut table = Table::new(ORDERED);
        let mut some = false;
        for (at, Order { id, run, what }) in sorted.orders.iter().copied().filter(|(_, order)| is_such(&order.what)) {
            let reason = if let What::Terminate { reason } = what { Some(&**reason) } else { None };
            table.row([at.into(), (&**id).into(), (*run).into(), reason.into()]);
            some = true;
        }
        some.then(|| table.named(sql, "j"))
    };
    let before = answers::BEFORE;
    if let Some(j) = such(sql, |_| true) {
        // Of an earlier run, too, if that is given; and whether there are too many to go at once.
        let more = more(of);
        sql.push(format!(
            "INSERT INTO @out (part, ord, run, a, text)
             SELECT {before}, j.ord, p.run, CASE WHEN p.[current] = 1 AND {more} THEN 1 ELSE 0 END, p.status
             FROM {j} JOIN {of}.processes AS p ON p.namespace = @namespace AND p.id = j.id
             WHERE (j.run IS NULL AND p.[current] = 1) OR p.run = j.run"
        ));
    }
    if let Some(j) = such(sql, |what| matches!(what, What::Cancel)) {
        cancel(sql, of, &j);
    }
    if let Some(j) = such(sql, |what| matches!(what, What::Terminate { .. })) {
        terminate(sql, of, &j);
    }
    if let Some(j) = such(sql, |what| matches!(what, What::Resume { .. })) {
        forget(sql, of, sorted);
        // Those that have been told that it failed may await it again.
        let failed = format!("SELECT p.run FROM {j} JOIN {of}.processes AS p ON {MEANT} WHERE p.status = N'failed'");
        sql.push(format!("DELETE c FROM {of}.chores AS c WHERE c.what = N'wake' AND c.run IN ({failed})"));
        sql.push(format!("UPDATE w SET told = 0 FROM {of}.waiters AS w WHERE w.told = 1 AND w.target IN ({failed})"));
        sql.push(format!(
            "UPDATE p SET status = N'waiting', wake_at = @now, calm_claim = p.claim, [output] = NULL, reason = NULL,
                 status_at = @now, finished_at = NULL
             FROM {of}.processes AS p JOIN {j} ON {MEANT} WHERE p.status IN (N'stuck', N'failed')"
        ));
    }
    if let Some(j) = such(sql, |what| matches!(what, What::Delete)) {
        delete(sql, of, &j);
    }
}

fn cancel(sql: &mut Sql, of: &Of<'_>, j: &str) {
    let woken = answers::ROUSED;
    sql.push(format!(
        "UPDATE p SET signals = p.signals + 1, {WAKE}, cancel_requested_at = COALESCE(p.cancel_requested_at, @now)
         OUTPUT {woken}, inserted.run, inserted.owner INTO @out (part, run, owner)
         FROM {of}.processes AS p, {j}
         WHERE {MEANT} AND p.status IN {UNFINISHED} AND NOT (p.claim = 0 AND p.owner IS NULL)"
    ));
    // One that never ran has nothing to compensate.
    sql.push(format!(
        "UPDATE p SET status = N'cancelled', wake_at = NULL, status_at = @now, finished_at = @now,
             cancel_requested_at = @now
         FROM {of}.processes AS p JOIN {j} ON {MEANT} WHERE p.status = N'waiting' AND p.claim = 0"
    ));
    wake_those_of_the_cancelled(sql, of, j);
}

fn wake_those_of_the_cancelled(sql: &mut Sql, of: &Of<'_>, j: &str) {
    let ended = format!("SELECT p.run FROM {j} JOIN {of}.processes AS p ON {MEANT} WHERE p.status = N'cancelled'");
    owned::wake(sql, of, &ended, answers::ROUSED);
}

fn terminate(sql: &mut Sql, of: &Of<'_>, j: &str) {
    sql.push(format!(
        "UPDATE p SET status = N'cancelled', owner = NULL, calm_claim = p.claim, wake_at = NULL, waiting_for = NULL,
             signalled = 0, [output] = NULL, reason = j.reason, status_at = @now, finished_at = @now,
             cancel_requested_at = COALESCE(p.cancel_requested_at, @now)
         FROM {of}.processes AS p JOIN {j} ON {MEANT} WHERE p.status IN {UNFINISHED}"
    ));
    let cancelled = format!("SELECT p.run FROM {j} JOIN {of}.processes AS p ON {MEANT} WHERE p.status = N'cancelled'");
    owned::unwait(sql, of, &cancelled);
    wake_those_of_the_cancelled(sql, of, j);
}

const FORGOTTEN: &[(&str, Column)] = &[
    ("audit", Column::Id),
    ("id", Column::Key(256)),
    ("run", Column::Id),
    ("scope", Column::Number),
    ("name", Column::Key(128)),
    ("key", Column::Key(260)),
];

/// Moves records that are to be forgotten into the audit.
fn forget(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let mut table = Table::new(FORGOTTEN);
    let mut some = false;
    for (_, Order { id, run, what }) in &sorted.orders {
        let What::Resume { forget } = what else { continue };
        for forget in forget {
            some = true;
            let (scope, name, key) = (forget.key.scope as i64, &*forget.key.name, &*forget.key.key);
            table.row([Cell::Id(forget.audit), (&**id).into(), (*run).into(), scope.into(), name.into(), key.into()]);
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
         FROM {j} JOIN {of}.processes AS p ON {MEANT}
             JOIN {of}.steps AS s ON s.run = p.run AND s.scope = j.scope AND s.name = j.name AND s.[key] = j.[key]
         WHERE p.status IN (N'stuck', N'failed')
             AND NOT EXISTS (SELECT 1 FROM {of}.audit AS a WHERE a.audit = j.audit)"
    ));
    // Only what this order has put into the audit: a record that was made since an earlier attempt stays.
    sql.push(format!(
        "DELETE s FROM {of}.steps AS s JOIN {of}.audit AS a ON s.run = a.run AND s.scope = a.scope AND s.name = a.name
             AND s.[key] = a.[key] AND s.claim = a.claim AND s.recorded_at = a.recorded_at
         WHERE a.audit IN (SELECT j.audit FROM {j})"
    ));
}

/// All runs of the ids, the current one last, if that is meant and may go; or an earlier one alone. What they leave in the
/// other tables is cleared away later.
fn delete(sql: &mut Sql, of: &Of<'_>, j: &str) {
    sql.declare("@gone TABLE (run BINARY(16) NOT NULL PRIMARY KEY)");
    let may_go = format!("(p.status IN {FINISHED} OR p.status = N'stuck')");
    let more = more(of);
    sql.push(format!(
        "INSERT INTO @gone (run)
         SELECT f.run FROM {j} CROSS APPLY (SELECT TOP ({DELETED}) r.run FROM {of}.processes AS r
             WHERE r.namespace = @namespace AND r.id = j.id AND r.[current] = 0 ORDER BY r.run) AS f
             WHERE EXISTS (SELECT 1 FROM {of}.processes AS p WHERE {MEANT} AND {may_go})
         UNION SELECT p.run FROM {j} JOIN {of}.processes AS p ON {MEANT} WHERE {may_go} AND NOT {more}
         UNION SELECT r.run FROM {j} JOIN {of}.processes AS r ON r.namespace = @namespace AND r.id = j.id AND r.run = j.run
             WHERE r.[current] = 0"
    ));
    owned::wake(sql, of, "SELECT g.run FROM @gone AS g", answers::ROUSED);
    // What of the inbox the database would not take.
    sql.push(format!(
        "DELETE i FROM {of}.inbox AS i JOIN {of}.processes AS p ON p.namespace = i.namespace AND p.id = i.id
         JOIN @gone AS g ON g.run = p.run WHERE i.refused IS NOT NULL"
    ));
    sql.push(format!("UPDATE c SET what = N'delete' FROM {of}.chores AS c JOIN @gone AS g ON g.run = c.run"));
    sql.push(format!(
        "INSERT INTO {of}.chores (run, what, due_at) SELECT g.run, N'delete', @now FROM @gone AS g
         WHERE NOT EXISTS (SELECT 1 FROM {of}.chores AS c WHERE c.run = g.run)"
    ));
    sql.push(format!("DELETE p FROM {of}.processes AS p JOIN @gone AS g ON g.run = p.run"));
}

/// There are as many former runs of an id `j` as go at once.
fn more(of: &Of<'_>) -> String {
    format!(
        "((SELECT COUNT(*) FROM (SELECT TOP ({DELETED}) r.run FROM {of}.processes AS r WHERE r.namespace = @namespace
             AND r.id = j.id AND r.[current] = 0) AS m) >= {DELETED})"
    )
}
