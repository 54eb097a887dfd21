//! Messages and awaits: what one process does to another.

use durable_core::storage::Sorted;

use super::{Of, UNFINISHED, WAKE, answers, current, starter_owns};
use crate::json::{Column, Table};
use crate::sql::Sql;

const LETTERS: &[(&str, Column)] = &[
    ("ord", Column::Number),
    ("id", Column::Key(256)),
    ("name", Column::Key(128)),
    ("event_id", Column::Key(256)),
    ("payload", Column::Text),
    ("from_run", Column::Id),
    ("from_claim", Column::Number),
];

/// Puts messages into mailboxes. The process's row is changed first, which keeps others from it; then each process's
/// messages are numbered on from its last signal before that, in the order of the batch. One that another instance has
/// put in meanwhile leaves a gap in the numbers, which does no harm.
pub(super) fn deliver(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.raises.is_empty() {
        return;
    }
    let mut table = Table::new(LETTERS);
    for (at, (raise, from)) in &sorted.raises {
        table.row([
            (*at).into(),
            (&*raise.id).into(),
            (&*raise.name).into(),
            (&*raise.event_id).into(),
            (&*raise.payload).into(),
            from.map(|(run, _)| run).into(),
            from.map(|(_, claim)| claim).into(),
        ]);
    }
    let j = table.named(sql, "j");
    let (current, owner, delivered) = (current(of, "j.id"), starter_owns(of), answers::DELIVERED);
    let known = format!("EXISTS (SELECT 1 FROM {of}.events AS e WHERE e.run = l.run AND e.event_id = l.event_id)");
    sql.declare(
        "@letters TABLE (ord BIGINT NOT NULL PRIMARY KEY, run BINARY(16) NULL, name NVARCHAR(128) NOT NULL,
             event_id NVARCHAR(256) COLLATE Latin1_General_BIN2 NOT NULL, payload NVARCHAR(MAX) NOT NULL,
             nth BIGINT NOT NULL, allowed INT NOT NULL)",
    );
    sql.declare("@boxes TABLE (run BINARY(16) NOT NULL PRIMARY KEY, letters BIGINT NOT NULL, signals BIGINT NULL)");
    sql.declare("@counted TABLE (run BINARY(16) NOT NULL PRIMARY KEY, signals BIGINT NOT NULL)");
    sql.push(format!(
        "INSERT INTO @letters (ord, run, name, event_id, payload, nth, allowed)
         SELECT l.ord, l.run, l.name, l.event_id, l.payload,
             ROW_NUMBER() OVER (PARTITION BY l.run, l.event_id ORDER BY l.ord), l.allowed
         FROM (SELECT j.ord, {current} AS run, j.name, j.event_id, j.payload, CASE WHEN {owner} THEN 1 ELSE 0 END AS allowed
             FROM {j}) AS l"
    ));
    // Of two with one id in the batch the first goes in.
    let fresh = format!("l.run IS NOT NULL AND l.nth = 1 AND l.allowed = 1 AND NOT {known}");
    sql.push(format!(
        "INSERT INTO @boxes (run, letters) SELECT l.run, COUNT_BIG(*) FROM @letters AS l WHERE {fresh} GROUP BY l.run"
    ));
    sql.push(format!(
        "UPDATE p SET signals = p.signals + b.letters, {WAKE}
         OUTPUT inserted.run, inserted.signals INTO @counted (run, signals)
         FROM {of}.processes AS p, @boxes AS b WHERE b.run = p.run AND p.[current] = 1 AND p.status IN {UNFINISHED}"
    ));
    sql.push(format!(
        "INSERT INTO {of}.events (run, number, name, event_id, payload, raised_at)
         SELECT l.run, c.signals - b.letters + ROW_NUMBER() OVER (PARTITION BY l.run ORDER BY l.ord), l.name, l.event_id,
             l.payload, @now
         FROM @letters AS l JOIN @counted AS c ON c.run = l.run JOIN @boxes AS b ON b.run = l.run WHERE {fresh}"
    ));
    sql.push(format!(
        "INSERT INTO @out (part, ord, run, a, b, owner)
         SELECT {delivered}, l.ord, p.run, e.number, CASE WHEN p.status IN {UNFINISHED} THEN 1 ELSE 0 END,
             p.owner
         FROM @letters AS l JOIN {of}.processes AS p ON p.run = l.run
             LEFT JOIN {of}.events AS e ON e.run = l.run AND e.event_id = l.event_id"
    ));
}

const AWAITS: &[(&str, Column)] =
    &[("ord", Column::Number), ("waiter", Column::Id), ("id", Column::Key(256)), ("target", Column::Id)];

/// Enters those that wait, and answers with what they wait for. The awaited row is changed first: whoever ends it either
/// has done so before, or finds the waiter after.
pub(super) fn wait(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.awaits.is_empty() {
        return;
    }
    let mut table = Table::new(AWAITS);
    for (at, (waiter, id, target)) in &sorted.awaits {
        table.row([(*at).into(), (*waiter).into(), (*id).into(), (*target).into()]);
    }
    let j = table.named(sql, "j");
    let (current, awaited) = (current(of, "j.id"), answers::AWAITED);
    sql.declare("@awaits TABLE (ord BIGINT NOT NULL PRIMARY KEY, waiter BINARY(16) NOT NULL, run BINARY(16) NULL)");
    sql.push(format!(
        "INSERT INTO @awaits (ord, waiter, run) SELECT j.ord, j.waiter, COALESCE(j.target, {current}) FROM {j}"
    ));
    sql.push(format!(
        "UPDATE p SET awaited = 1 FROM {of}.processes AS p WHERE p.run IN (SELECT a.run FROM @awaits AS a)"
    ));
    sql.push(format!(
        "INSERT INTO {of}.waiters (target, waiter) SELECT DISTINCT a.run, a.waiter
         FROM @awaits AS a JOIN {of}.processes AS p ON p.run = a.run
         WHERE p.status IN {UNFINISHED}
             AND NOT EXISTS (SELECT 1 FROM {of}.waiters AS w WHERE w.target = a.run AND w.waiter = a.waiter)"
    ));
    sql.push(format!(
        "INSERT INTO @out (part, ord, run, text, more) SELECT {awaited}, a.ord, p.run, p.status, p.[output]
         FROM @awaits AS a JOIN {of}.processes AS p ON p.run = a.run"
    ));
}
