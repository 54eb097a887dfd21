use durable_core::storage::Sorted;

use super::{FINISHED, Of, answers, current, starter_owns};
use crate::json::{Column, Table};
use crate::sql::Sql;

const COLUMNS: &[(&str, Column)] = &[
    ("ord", Column::Number),
    ("run", Column::Id),
    ("id", Column::Key(256)),
    ("kind", Column::Key(128)),
    ("input", Column::Text),
    ("digest", Column::Key(64)),
    ("take", Column::Bit),
    ("restart", Column::Bit),
    ("from_run", Column::Id),
    ("from_claim", Column::Number),
];

/// Starts. An id that is there stays as it is, and so does a start's own earlier success.
pub(super) fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.spawns.is_empty() {
        return;
    }
    let mut table = Table::new(COLUMNS);
    for (at, (spawn, from)) in &sorted.spawns {
        table.row([
            (*at).into(),
            spawn.run.into(),
            (&*spawn.id).into(),
            (&*spawn.kind).into(),
            (&*spawn.input).into(),
            (&*spawn.digest).into(),
            spawn.take.into(),
            spawn.restart_finished.into(),
            from.map(|(run, _)| run).into(),
            from.map(|(_, claim)| claim).into(),
        ]);
    }
    let j = table.named(sql, "j");
    let (owner, current) = (starter_owns(of), current(of, "j.id"));
    let own = format!("EXISTS (SELECT 1 FROM {of}.processes AS q WHERE q.run = j.run)");
    if sorted.spawns.iter().any(|(_, (spawn, _))| spawn.restart_finished) {
        // The finished runs that a start replaces make way.
        sql.push(format!(
            "UPDATE p SET [current] = 0 FROM {of}.processes AS p JOIN {j}
                 ON p.namespace = @namespace AND p.id = j.id AND p.kind = j.kind
             WHERE p.[current] = 1 AND j.restart = 1 AND p.status IN {FINISHED} AND NOT {own} AND {owner}"
        ));
    }
    sql.push(format!(
        "INSERT INTO {of}.processes (run, namespace, id, [current], kind, status, owner, claim, calm_claim, wake_at,
             signals, signalled, awaited, input, input_digest, created_at, status_at)
         SELECT j.run, @namespace, j.id, 1, j.kind, CASE WHEN j.[take] = 1 THEN N'running' ELSE N'waiting' END,
             CASE WHEN j.[take] = 1 THEN @me END, CASE WHEN j.[take] = 1 THEN 1 ELSE 0 END, 0,
             CASE WHEN j.[take] = 0 THEN @now END, 0, 0, 0, j.input, j.digest, @now, @now
         FROM {j} WHERE NOT {own} AND {current} IS NULL AND {owner}"
    ));
    // Bound, so that the text does not change with it.
    let (count, existing) = (sql.count(sorted.spawns.len()), answers::EXISTING);
    sql.push(format!(
        "IF @@ROWCOUNT < {count}
         INSERT INTO @out (part, ord, run, a, text, more)
         SELECT {existing}, j.ord, p.run, CASE WHEN p.run = j.run THEN 0 ELSE 1 END, p.kind, p.input_digest
         FROM {j} JOIN {of}.processes AS p
             ON p.run = COALESCE((SELECT q.run FROM {of}.processes AS q WHERE q.run = j.run), {current})"
    ));
}
