use durable_core::storage::{Effect, Raised, RecordOp, RunId, Sorted};

use super::{Of, answers, current};
use crate::json::{Column, Table};
use crate::sql::{Sql, hex, hyphenated};

const COLUMNS: &[(&str, Column)] = &[
    ("ord", Column::Number),
    ("run", Column::Id),
    ("scope", Column::Number),
    ("name", Column::Key(128)),
    ("key", Column::Key(260)),
    ("op", Column::Key(16)),
    ("state", Column::Key(16)),
    ("payload", Column::Text),
    ("attempts", Column::Number),
    ("seq", Column::Number),
    ("claim", Column::Number),
    ("effect_id", Column::Key(256)),
    ("effect_token", Column::Key(256)),
];

/// What differs between records: those of an effect say what came of it.
struct Payload {
    expression: String,
    join: String,
}

/// Records of runs that the instance owns, what they consume, and what they no longer await.
pub(super) fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let started = Payload {
        expression: format!(
            "CONCAT(N'{{\"run\":\"', {}, N'\",\"existed\":', CASE WHEN c.run = CONVERT(BINARY(16), j.effect_token, 2)
                 THEN N'false' ELSE N'true' END, N',\"kind\":\"', STRING_ESCAPE(c.kind, N'json'), N'\",\"other_input\":',
                 CASE WHEN j.payload <> N'' AND c.input_digest <> j.payload THEN N'true' ELSE N'false' END, N'}}')",
            hyphenated("c.run")
        ),
        join: format!(
            "JOIN {of}.processes AS c ON c.run = COALESCE((SELECT q.run FROM {of}.processes AS q
                 WHERE q.run = CONVERT(BINARY(16), j.effect_token, 2)), {})",
            current(of, "j.effect_id")
        ),
    };
    let delivered = Raised::Delivered { run: RunId(uuid::Uuid::nil()), number: 0, mine: false };
    let raised = Payload {
        expression: format!(
            "CASE WHEN c.run IS NULL THEN N'{}' WHEN e.number IS NOT NULL THEN N'{}' ELSE N'{}' END",
            Raised::NotFound.as_json(),
            delivered.as_json(),
            Raised::Finished.as_json()
        ),
        join: format!(
            "LEFT JOIN {of}.processes AS c ON c.run = {} LEFT JOIN {of}.events AS e
                 ON e.run = c.run AND e.event_id = j.effect_token",
            current(of, "j.effect_id")
        ),
    };
    let given = Payload { expression: "j.payload".to_owned(), join: String::new() };
    put(sql, of, &sorted.start_records, &started);
    put(sql, of, &sorted.raise_records, &raised);
    put(sql, of, &sorted.records, &given);
    taken(sql, of, sorted);
    awaited(sql, of, sorted);
}

/// One that stands there already stays, unless it is pending, a value, or this very write's earlier attempt.
///
/// The process's row is read, not locked. It can be another's only after a take-over, which waits for the lock that this
/// batch holds; so whatever is read of the owner still holds when the record is written.
fn put(sql: &mut Sql, of: &Of<'_>, records: &[(usize, &RecordOp)], payload: &Payload) {
    if records.is_empty() {
        return;
    }
    let mut table = Table::new(COLUMNS);
    for (at, record) in records {
        let (id, token) = match &record.effect {
            Some(Effect::Spawn(spawn)) => (Some(&*spawn.id), Some(hex(spawn.run.0))),
            Some(Effect::Raise(raise)) => (Some(&*raise.id), Some(raise.event_id.to_string())),
            None => (None, None),
        };
        table.row([
            (*at).into(),
            record.run.into(),
            (record.key.scope as i64).into(),
            (&*record.key.name).into(),
            (&*record.key.key).into(),
            record.op.as_str().into(),
            record.state.as_str().into(),
            (&*record.payload).into(),
            i64::from(record.attempts).into(),
            i64::from(record.seq).into(),
            record.claim.into(),
            id.into(),
            token.as_deref().into(),
        ]);
    }
    let j = table.named(sql, "j");
    let Payload { expression, join } = payload;
    let place = "s.run = j.run AND s.scope = j.scope AND s.name = j.name AND s.[key] = j.[key]";
    let owned = owned(of);
    sql.push(format!(
        "INSERT INTO {of}.steps (run, scope, name, [key], op, state, payload, attempts, seq, claim, recorded_at)
         SELECT j.run, j.scope, j.name, j.[key], j.op, j.state, {expression}, j.attempts, j.seq, j.claim, @now
         FROM {j} {join} WHERE {owned} AND NOT EXISTS (SELECT 1 FROM {of}.steps AS s WHERE {place})"
    ));
    let (count, lost) = (sql.count(records.len()), answers::LOST);
    sql.push(format!(
        "IF @@ROWCOUNT < {count}
         BEGIN
             UPDATE s SET op = j.op, state = j.state, payload = {expression}, attempts = j.attempts, seq = j.seq,
                     claim = j.claim, recorded_at = @now
                 FROM {of}.steps AS s JOIN {j} ON {place} {join}
                 WHERE {owned} AND (s.state = N'pending' OR s.op = N'value' OR (s.claim = j.claim AND s.seq = j.seq));
             INSERT INTO @out (part, ord) SELECT {lost}, j.ord FROM {j} WHERE NOT EXISTS (SELECT 1 FROM {of}.steps AS s
                 WHERE {place} AND s.claim = j.claim AND s.seq = j.seq AND s.state = j.state);
         END"
    ));
}

/// Whether the instance owns the run of a row `j` under its claim.
fn owned(of: &Of<'_>) -> String {
    format!("EXISTS (SELECT 1 FROM {of}.processes AS p WHERE p.run = j.run AND p.owner = @me AND p.claim = j.claim)")
}

/// Messages that records consume.
fn taken(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let each = || sorted.all_records().filter_map(|(_, record)| Some((record.run, record.takes?, record.claim)));
    if each().next().is_none() {
        return;
    }
    let mut table = Table::new(&[("run", Column::Id), ("number", Column::Number), ("claim", Column::Number)]);
    each().for_each(|(run, number, claim)| table.row([run.into(), number.into(), claim.into()]));
    let (j, owned) = (table.named(sql, "j"), owned(of));
    sql.push(format!(
        "UPDATE e SET taken_at = COALESCE(e.taken_at, @now) FROM {of}.events AS e JOIN {j}
             ON e.run = j.run AND e.number = j.number
         WHERE {owned}"
    ));
}

/// Waiters whose record is there.
fn awaited(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    let each = || sorted.all_records().filter_map(|(_, record)| Some((record.awaited?, record.run, record.claim)));
    if each().next().is_none() {
        return;
    }
    let mut table = Table::new(&[("target", Column::Id), ("run", Column::Id), ("claim", Column::Number)]);
    each().for_each(|(target, run, claim)| table.row([target.into(), run.into(), claim.into()]));
    let (j, owned) = (table.named(sql, "j"), owned(of));
    sql.push(format!(
        "DELETE w FROM {of}.waiters AS w JOIN {j} ON w.target = j.target AND w.waiter = j.run WHERE {owned}"
    ));
}
