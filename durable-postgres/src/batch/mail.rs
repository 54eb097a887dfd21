//! Messages and awaits: what one process does to another.

use durable_core::storage::{Effect, Letter, Outcome, Raised, RecordOp, Result, Sorted, StorageError};
use sqlx::postgres::PgConnection;
use std::collections::HashMap;

use super::parts::{current, number, starter_owns, wake};
use super::read::{by_place, place};
use super::{Of, UNFINISHED};
use crate::rows::{get, maybe_json, run, standing};
use crate::sql::{Commits, Sql};

/// The id of the process that a record's effect is about.
pub(super) fn effect_id(record: &RecordOp) -> Option<&str> {
    record.effect.as_ref().map(|effect| match effect {
        Effect::Spawn(spawn) => &*spawn.id,
        Effect::Raise(raise) => &*raise.id,
    })
}

/// The message's id, or the run to start.
pub(super) fn effect_token(record: &RecordOp) -> Option<String> {
    record.effect.as_ref().map(|effect| match effect {
        Effect::Spawn(spawn) => spawn.run.to_string(),
        Effect::Raise(raise) => raise.event_id.to_string(),
    })
}

fn letters(sql: &mut Sql, raises: &[(usize, Letter<'_>)]) -> String {
    let each = || raises.iter().map(|(_, (raise, _))| *raise);
    sql.rows()
        .column("id", each().map(|raise| &*raise.id))
        .column("name", each().map(|raise| &*raise.name))
        .column("event_id", each().map(|raise| &*raise.event_id))
        .column("payload", each().map(|raise| &*raise.payload))
        .column("from_run", raises.iter().map(|(_, (_, from))| from.map(|(run, _)| run.0)))
        .column("from_claim", raises.iter().map(|(_, (_, from))| from.map(|(_, claim)| claim)))
        .named("j")
}

/// Queries that put messages into mailboxes, and their names. Each process's messages are numbered on from its last
/// signal, in the order of the batch, under the lock of its row. One that another instance has put in between the
/// statement's snapshot and that lock leaves a gap in the numbers, which does no harm.
pub(super) fn put(
    sql: &mut Sql,
    of: &Of<'_>,
    raises: &[(usize, Letter<'_>)],
    gate: &str,
) -> [(&'static str, String); 4] {
    let (me, namespace) = (sql.bind(of.instance), sql.bind(of.namespace));
    let j = letters(sql, raises);
    let (owner, wake) = (starter_owns(of, &me), wake(&me));
    let (current, there) = (current(of, &namespace, "j.id"), number(of, "t.run", "t.event_id"));
    let target = format!(
        "SELECT j.ord, j.name, j.event_id, j.payload, p.run, p.signals, p.owner IS NOT DISTINCT FROM {me} AS mine
         FROM {j} JOIN {of}.processes p ON p.run = {current}
         WHERE p.current AND p.status IN {UNFINISHED} AND {owner} AND {gate} ORDER BY p.run FOR NO KEY UPDATE OF p"
    );
    let fresh = format!(
        "SELECT t.ord, t.run, t.name, t.event_id, t.payload, t.mine,
             t.signals + row_number() OVER (PARTITION BY t.run ORDER BY t.ord) AS number
         FROM target t WHERE {there} IS NULL"
    );
    let put = format!(
        "INSERT INTO {of}.events (run, number, name, event_id, payload, raised_at)
         SELECT run, number, name, event_id, payload::json, now() FROM fresh ORDER BY run, event_id
         ON CONFLICT (run, event_id) DO NOTHING RETURNING 1"
    );
    let counted = format!(
        "UPDATE {of}.processes p SET signals = f.last, {wake}
         FROM (SELECT run, max(number) AS last FROM fresh GROUP BY run) f WHERE p.run = f.run RETURNING 1"
    );
    [("target AS MATERIALIZED", target), ("fresh AS MATERIALIZED", fresh), ("put AS", put), ("counted AS", counted)]
}

/// They as one statement.
pub(super) fn put_text(sql: &mut Sql, of: &Of<'_>, raises: &[(usize, Letter<'_>)], gate: &str) -> String {
    let queries = put(sql, of, raises, gate).map(|(name, query)| format!("{name} ({query})"));
    format!("WITH {} SELECT 1", queries.join(",\n"))
}

/// What became of messages.
pub(super) fn delivered(sql: &mut Sql, of: &Of<'_>, raises: &[(usize, Letter<'_>)]) -> String {
    let (me, namespace) = (sql.bind(of.instance), sql.bind(of.namespace));
    let j = letters(sql, raises);
    let (current, number) = (current(of, &namespace, "j.id"), number(of, "p.run", "j.event_id"));
    format!(
        "SELECT j.ord, p.run, {number}, p.owner IS NOT DISTINCT FROM {me}, p.status IN {UNFINISHED}
         FROM {j} JOIN {of}.processes p ON p.run = {current}"
    )
}

/// The outcomes of messages, from the rows of [`delivered`].
pub(super) fn outcomes(
    raises: &[(usize, Letter<'_>)],
    rows: &[sqlx::postgres::PgRow],
) -> Result<Vec<(usize, Outcome)>> {
    let mut found: HashMap<usize, Outcome> = HashMap::new();
    for row in rows {
        let nth = place(row)?;
        let from = raises.get(nth).is_some_and(|(_, (_, from))| from.is_some());
        let raised = match (get::<Option<i64>>(row, 2)?, get::<bool>(row, 4)?) {
            (Some(number), _) => Raised::Delivered { run: run(row, 1)?, number, mine: get(row, 3)? },
            // Its run took the place of another while this batch waited for that one's row. Again, from the start.
            (None, true) if !from => return Err(StorageError::unavailable("a process was restarted meanwhile")),
            (None, _) => Raised::Finished,
        };
        found.insert(nth, Outcome::Raised(raised));
    }
    let absent = Outcome::Raised(Raised::NotFound);
    Ok(raises.iter().enumerate().map(|(nth, (at, _))| (*at, found.remove(&nth).unwrap_or(absent.clone()))).collect())
}

/// Enters those that wait, and answers with what they wait for. The awaited row is locked, and marked: whoever ends it
/// either has done so before this lock, or sees the mark and the waiter.
pub(super) async fn awaits(
    connection: &mut PgConnection,
    of: &Of<'_>,
    sorted: &Sorted<'_>,
) -> Result<Vec<(usize, Outcome)>> {
    let mut sql = Sql::default();
    sql.text = awaits_text(&mut sql, of, sorted);
    let rows = sql.run(connection, Commits::No).await?;
    let mut found = by_place(&rows, |row| {
        let (run, status) = standing(row, 1, 2)?;
        let ended = if status.is_finished() { Some((status, maybe_json(row, 3)?)) } else { None };
        Ok(Outcome::Awaits(Some((run, ended))))
    })?;
    let places = sorted.awaits.iter().enumerate();
    Ok(places.map(|(nth, (at, _))| (*at, found.remove(&nth).unwrap_or(Outcome::Awaits(None)))).collect())
}

pub(super) fn awaits_text(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) -> String {
    let namespace = sql.bind(of.namespace);
    let each = || sorted.awaits.iter().map(|(_, wait)| *wait);
    let j = sql
        .rows()
        .column("waiter", each().map(|(waiter, ..)| waiter.0))
        .column("id", each().map(|(_, id, _)| id))
        .column("target", each().map(|(.., target)| target.map(|target| target.0)))
        .named("j");
    let current = current(of, &namespace, "j.id");
    format!(
        "WITH target AS MATERIALIZED (SELECT j.ord, j.waiter, p.run, p.status, p.output
             FROM {j} JOIN {of}.processes p ON p.run = coalesce(j.target, {current})
             ORDER BY p.run FOR NO KEY UPDATE OF p),
         marked AS (UPDATE {of}.processes p SET awaited = true FROM target t
             WHERE p.run = t.run AND NOT p.awaited AND t.status IN {UNFINISHED}),
         waiting AS (INSERT INTO {of}.waiters (target, waiter)
             SELECT t.run, t.waiter FROM target t WHERE t.status IN {UNFINISHED} ORDER BY 1, 2 ON CONFLICT DO NOTHING)
         SELECT ord, run, status, output FROM target"
    )
}
