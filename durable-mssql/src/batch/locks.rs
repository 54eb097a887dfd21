use durable_core::storage::Sorted;
use durable_core::storage::chores::WOKEN;

use super::{Of, current};
use crate::json;
use crate::sql::Sql;

/// Locks every row of a process that the batch will touch, as far as they can be told beforehand, in their order: so that
/// batches wait for each other in that order, and not in a circle. Those that get into one nevertheless are told by the
/// server, and run again.
pub(super) fn take(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let (ids, targets) = sorted.others();
    let mut runs = sorted.owned();
    runs.extend(targets);
    if runs.is_empty() && ids.is_empty() {
        return;
    }
    let mut wanted = Vec::new();
    if !runs.is_empty() {
        wanted.push(format!("SELECT j.run FROM {}", json::runs(sql, runs)));
    }
    if !ids.is_empty() {
        let source = json::ids(sql, ids);
        wanted.push(format!("SELECT {} FROM {source}", current(of, "j.id")));
    }
    let ending = sorted.ending();
    if !ending.is_empty() {
        let source = json::runs(sql, ending);
        let waiters = format!("FROM {source} JOIN {of}.waiters AS w ON w.target = j.run");
        wanted.push(format!(
            "SELECT w.waiter {waiters} WHERE {WOKEN} >= (SELECT COUNT(*) FROM (SELECT TOP ({WOKEN} + 1) w.waiter {waiters}) AS m)"
        ));
    }
    let wanted = wanted.join(" UNION ");
    sql.declare("@held TABLE (run BINARY(16) NOT NULL PRIMARY KEY)");
    sql.push(format!(
        "INSERT INTO @held (run) SELECT DISTINCT u.run FROM ({wanted}) AS u (run) WHERE u.run IS NOT NULL"
    ));
    sql.push(format!(
        "SELECT @count = COUNT(*) FROM @held AS h JOIN {of}.processes AS p WITH (UPDLOCK, ROWLOCK) ON p.run = h.run"
    ));
}
