//! The parts that a batch is made of, each one statement: alone within a transaction, or together with others as
//! `WITH` queries of one statement. Each is given the condition on which it writes, its gate.

use durable_core::storage::chores::{UNAWAITED, WOKEN};
use durable_core::storage::{Finish, Park, RecordOp, RunId, Start};

use super::{Gate, Of, UNFINISHED};
use crate::rows::time_text;
use crate::sql::Sql;

// Plans are kept, also those that were made while a table was empty or an instance owned nothing, and then looked as
// good as any. So the statements leave little to choose: a row is found by its run, and a run by a query that gives one
// value, where a join could be turned around; and it is `IS NOT DISTINCT FROM` the instance where it could be `=`, for
// which an index on the owner would do.

/// The instance's fence, locked: a row of its own, which a take-over or a later generation changes. Who has waited for
/// them gets the row as it is now, looks at it again, and finds nothing.
pub(super) fn fence(sql: &mut Sql, of: &Of<'_>) -> String {
    if of.gate == Gate::Open {
        return "SELECT 1".to_owned();
    }
    let (instance, generation) = (sql.bind(of.instance), sql.bind(of.generation));
    let inbox = match of.gate {
        Gate::Inbox => {
            let namespace = sql.bind(of.namespace);
            format!("AND NOT EXISTS (SELECT 1 FROM {of}.inbox WHERE namespace = {namespace} AND refused IS NULL)")
        }
        _ => String::new(),
    };
    format!(
        "SELECT 1 FROM {of}.fences WHERE instance = {instance} AND generation = {generation} AND fenced_at IS NULL {inbox}
             FOR SHARE"
    )
}

/// Starts. An id that is there stays as it is, and so does a start's own earlier success.
pub(super) fn spawned(sql: &mut Sql, of: &Of<'_>, spawns: &[(usize, Start<'_>)], gate: &str) -> String {
    let (namespace, me) = (sql.bind(of.namespace), sql.bind(of.instance));
    let j = starts(sql, spawns);
    let owner = starter_owns(of, &me);
    format!(
        "INSERT INTO {of}.processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, wake_at, signals,
             signalled, awaited, input, input_digest, created_at, status_at)
         SELECT j.run, {namespace}, j.id, true, j.kind, CASE WHEN j.take THEN 'running' ELSE 'waiting' END,
             CASE WHEN j.take THEN {me} END, j.take::integer, 0, CASE WHEN NOT j.take THEN now() END, 0, false, false,
             j.input::json, j.digest, now(), now()
         FROM {j} WHERE {gate} AND {owner} ON CONFLICT DO NOTHING RETURNING 1"
    )
}

/// The rows of [`spawned`].
pub(super) fn starts(sql: &mut Sql, spawns: &[(usize, Start<'_>)]) -> String {
    let each = || spawns.iter().map(|(_, (spawn, _))| *spawn);
    sql.rows()
        .column("run", each().map(|spawn| spawn.run.0))
        .column("id", each().map(|spawn| &*spawn.id))
        .column("kind", each().map(|spawn| &*spawn.kind))
        .column("input", each().map(|spawn| &*spawn.input))
        .column("digest", each().map(|spawn| &*spawn.digest))
        .column("take", each().map(|spawn| spawn.take))
        .column("restart", each().map(|spawn| spawn.restart_finished))
        .column("from_run", spawns.iter().map(|(_, (_, from))| from.map(|(run, _)| run.0)))
        .column("from_claim", spawns.iter().map(|(_, (_, from))| from.map(|(_, claim)| claim)))
        .named("j")
}

/// Whether a row `j` is nobody's operation, or that of a run which the instance owns.
pub(super) fn starter_owns(of: &Of<'_>, me: &str) -> String {
    format!(
        "(j.from_run IS NULL OR (SELECT o.owner IS NOT DISTINCT FROM {me} AND o.claim = j.from_claim
             FROM {of}.processes o WHERE o.run = j.from_run))"
    )
}

/// The current run of an id, as a value.
pub(super) fn current(of: &Of<'_>, namespace: &str, id: &str) -> String {
    format!("(SELECT q.run FROM {of}.processes q WHERE q.namespace = {namespace} AND q.id = {id} AND q.current)")
}

/// The run `run`, as a value; null if it is not there.
pub(super) fn existing(of: &Of<'_>, run: &str) -> String {
    format!("(SELECT q.run FROM {of}.processes q WHERE q.run = {run})")
}

/// The number of the message with the id `event_id` in a run's mailbox, as a value; null if it is not there.
pub(super) fn number(of: &Of<'_>, run: &str, event_id: &str) -> String {
    format!("(SELECT e.number FROM {of}.events e WHERE e.run = {run} AND e.event_id = {event_id})")
}

/// What differs between records: those of an effect say what came of it.
pub(super) struct Payload<'p> {
    pub(super) expression: &'p str,
    pub(super) join: &'p str,
}

impl Payload<'_> {
    pub(super) const GIVEN: Self = Self { expression: "j.payload::json", join: "" };
}

/// What becomes of a record where one stands already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is an error, and nothing is written: the engine knows of none. Not to look for one saves the server a third of
    /// its work.
    Refused,
    /// It stays, unless it is pending, a value, or this very write's earlier attempt.
    Judged,
}

/// Records of runs that the instance owns.
///
/// The process's row is read, not locked. It can be another's only after a take-over, which waits for the fence that
/// this batch holds; so whatever the snapshot says of the owner still holds when the record is written.
pub(super) fn recorded(
    sql: &mut Sql,
    of: &Of<'_>,
    records: &[(usize, &RecordOp)],
    payload: &Payload<'_>,
    standing: Standing,
    gate: &str,
) -> String {
    let me = sql.bind(of.instance);
    let j = record_rows(sql, records);
    let Payload { expression, join } = payload;
    let judged = match standing {
        Standing::Refused => "",
        Standing::Judged => {
            "ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
                 payload = excluded.payload, attempts = excluded.attempts, seq = excluded.seq, claim = excluded.claim,
                 recorded_at = excluded.recorded_at
             WHERE s.state = 'pending' OR s.op = 'value' OR (s.claim = excluded.claim AND s.seq = excluded.seq)"
        }
    };
    format!(
        "INSERT INTO {of}.steps AS s (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
         SELECT j.run, j.scope, j.name, j.key, j.op, j.state, {expression}, j.attempts, j.seq, j.claim, now()
         FROM {j} JOIN {of}.processes p ON p.run = j.run AND p.owner IS NOT DISTINCT FROM {me} AND p.claim = j.claim {join}
         WHERE {gate} {judged}"
    )
}

/// One record of a run that the instance owns, where none stands: as [`recorded`] says.
pub(super) fn recorded_alone(sql: &mut Sql, of: &Of<'_>, record: &RecordOp, gate: &str) -> String {
    let (run, claim, me) = (sql.bind(record.run.0), sql.bind(record.claim), sql.bind(of.instance));
    let (scope, name, key) =
        (sql.bind(record.key.scope as i16), sql.bind(&*record.key.name), sql.bind(&*record.key.key));
    let (op, state, attempts) =
        (sql.bind(record.op.as_str()), sql.bind(record.state.as_str()), sql.bind(record.attempts));
    let (payload, seq) = (sql.bind(&*record.payload), sql.bind(record.seq));
    format!(
        "INSERT INTO {of}.steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
         SELECT p.run, {scope}, {name}, {key}, {op}, {state}, {payload}::json, {attempts}, {seq}, p.claim, now()
         FROM {of}.processes p WHERE p.run = {run} AND p.owner IS NOT DISTINCT FROM {me} AND p.claim = {claim} AND {gate}"
    )
}

/// The rows of [`recorded`]; with the id and the token of an effect behind them.
pub(super) fn record_rows(sql: &mut Sql, records: &[(usize, &RecordOp)]) -> String {
    let each = || records.iter().map(|(_, record)| *record);
    let rows = sql
        .rows()
        .column("run", each().map(|record| record.run.0))
        .column("scope", each().map(|record| record.key.scope as i16))
        .column("name", each().map(|record| &*record.key.name))
        .column("key", each().map(|record| &*record.key.key))
        .column("op", each().map(|record| record.op.as_str()))
        .column("state", each().map(|record| record.state.as_str()))
        .column("payload", each().map(|record| &*record.payload))
        .column("attempts", each().map(|record| record.attempts))
        .column("seq", each().map(|record| record.seq))
        .column("claim", each().map(|record| record.claim));
    if each().all(|record| record.effect.is_none()) {
        return rows.named("j");
    }
    rows.column("effect_id", each().map(super::mail::effect_id))
        .column("effect_token", each().map(super::mail::effect_token))
        .named("j")
}

/// Whether the instance owns the run of a row `j` under its claim.
fn owned(of: &Of<'_>, me: &str) -> String {
    format!(
        "(SELECT p.owner IS NOT DISTINCT FROM {me} AND p.claim = j.claim FROM {of}.processes p WHERE p.run = j.run)"
    )
}

/// Messages that records consume.
pub(super) fn taken(sql: &mut Sql, of: &Of<'_>, records: &[(usize, &RecordOp)], gate: &str) -> Option<String> {
    let each = || records.iter().filter_map(|(_, record)| Some((record.run.0, record.takes?, record.claim)));
    each().next()?;
    let me = sql.bind(of.instance);
    let j = sql
        .rows()
        .column("run", each().map(|(run, ..)| run))
        .column("number", each().map(|(_, number, _)| number))
        .column("claim", each().map(|(.., claim)| claim))
        .named("j");
    let owned = owned(of, &me);
    Some(format!(
        "UPDATE {of}.events e SET taken_at = coalesce(e.taken_at, now()) FROM {j}
         WHERE e.run = j.run AND e.number = j.number AND {gate} AND {owned} RETURNING 1"
    ))
}

/// Waiters whose record is there.
pub(super) fn awaited(sql: &mut Sql, of: &Of<'_>, records: &[(usize, &RecordOp)], gate: &str) -> Option<String> {
    let each = || records.iter().filter_map(|(_, record)| Some((record.awaited?.0, record.run.0, record.claim)));
    each().next()?;
    let me = sql.bind(of.instance);
    let j = sql
        .rows()
        .column("target", each().map(|(target, ..)| target))
        .column("run", each().map(|(_, run, _)| run))
        .column("claim", each().map(|(.., claim)| claim))
        .named("j");
    let owned = owned(of, &me);
    Some(format!(
        "DELETE FROM {of}.waiters w USING {j} WHERE w.target = j.target AND w.waiter = j.run AND {gate} AND {owned}
         RETURNING 1"
    ))
}

/// Cancellations that owners record.
pub(super) fn accepted(sql: &mut Sql, of: &Of<'_>, accepts: &[(usize, ((RunId, i64), i32))], gate: &str) -> String {
    let me = sql.bind(of.instance);
    let each = || accepts.iter().map(|(_, accept)| *accept);
    let j = sql
        .rows()
        .column("run", each().map(|((run, _), _)| run.0))
        .column("claim", each().map(|((_, claim), _)| claim))
        .column("seq", each().map(|(_, seq)| seq))
        .named("j");
    format!(
        "UPDATE {of}.processes p SET cancelled_at = coalesce(p.cancelled_at, now()),
             cancelled_seq = coalesce(p.cancelled_seq, j.seq)
         FROM {j} WHERE p.run = j.run AND p.claim = j.claim AND p.owner IS NOT DISTINCT FROM {me} AND {gate} RETURNING p.run"
    )
}

/// Signals that owners have read.
pub(super) fn seen(sql: &mut Sql, of: &Of<'_>, seen: &[(usize, ((RunId, i64), i64))], gate: &str) -> String {
    let me = sql.bind(of.instance);
    let each = || seen.iter().map(|(_, seen)| *seen);
    let j = sql
        .rows()
        .column("run", each().map(|((run, _), _)| run.0))
        .column("claim", each().map(|((_, claim), _)| claim))
        .column("signals", each().map(|(_, signals)| signals))
        .named("j");
    format!(
        "UPDATE {of}.processes p SET signalled = p.signalled AND p.signals <> j.signals
         FROM {j} WHERE p.run = j.run AND p.claim = j.claim AND p.owner IS NOT DISTINCT FROM {me} AND {gate} RETURNING p.run"
    )
}

/// Ends.
pub(super) fn finished(sql: &mut Sql, of: &Of<'_>, finishes: &[(usize, &Finish)], gate: &str) -> String {
    let me = sql.bind(of.instance);
    let each = || finishes.iter().map(|(_, finish)| *finish);
    let j = sql
        .rows()
        .column("run", each().map(|finish| finish.run.0))
        .column("claim", each().map(|finish| finish.claim))
        .column("status", each().map(|finish| finish.status.as_str()))
        .column("output", each().map(|finish| finish.output.as_deref()))
        .column("reason", each().map(|finish| finish.reason.as_deref()))
        .column("ended", each().map(|finish| finish.status.is_finished()))
        .named("j");
    format!(
        "UPDATE {of}.processes p SET status = j.status, output = j.output::json, reason = j.reason, owner = NULL, wake_at = NULL,
             waiting_for = NULL, signalled = false, status_at = now(),
             finished_at = CASE WHEN j.ended THEN now() END
         FROM {j} WHERE p.run = j.run AND p.claim = j.claim AND p.owner IS NOT DISTINCT FROM {me} AND {gate} RETURNING p.run"
    )
}

/// Deletes waiter rows of the runs that end, which await nothing any more.
pub(super) fn unwaiting(of: &Of<'_>, ended: &str, gate: &str) -> String {
    format!(
        "DELETE FROM {of}.waiters WHERE ctid = ANY (ARRAY (SELECT w.ctid FROM {of}.waiters w WHERE w.waiter IN ({ended})
             LIMIT {UNAWAITED})) AND {gate} RETURNING 1"
    )
}

/// Parks: whether every signal was seen is decided on the row, by its newest version if somebody else is changing it.
pub(super) fn parked(sql: &mut Sql, of: &Of<'_>, parks: &[(usize, &Park)], gate: &str) -> String {
    let me = sql.bind(of.instance);
    let each = || parks.iter().map(|(_, park)| *park);
    let j = sql
        .rows()
        .column("run", each().map(|park| park.run.0))
        .column("claim", each().map(|park| park.claim))
        .column("wake_at", each().map(|park| park.wake_at.map(time_text)))
        .column("seen", each().map(|park| park.seen))
        .column("waiting_for", each().map(|park| park.waiting_for.as_deref()))
        .column("deaths", each().map(|park| park.deaths))
        .named("j");
    format!(
        "UPDATE {of}.processes p SET status = 'waiting', owner = NULL, calm_claim = p.claim - j.deaths, signalled = false,
             wake_at = CASE WHEN j.seen IS NULL AND j.wake_at IS NOT NULL THEN least(j.wake_at::timestamptz, now())
                 ELSE j.wake_at::timestamptz END,
             waiting_for = j.waiting_for, status_at = now()
         FROM {j} WHERE p.run = j.run AND p.claim = j.claim AND p.owner IS NOT DISTINCT FROM {me}
             AND (j.seen IS NULL OR j.seen = p.signals) AND {gate} RETURNING p.run"
    )
}

/// Claims: what is due, the earliest first, without waiting for what another instance is about to claim. The chosen rows
/// are a query of their own, which is run once: within the update it could be run again, and claim more.
pub(super) fn claimed(sql: &mut Sql, of: &Of<'_>, kind: &str, limit: usize, gate: &str) -> [String; 2] {
    let (me, namespace, kind) = (sql.bind(of.instance), sql.bind(of.namespace), sql.bind(kind));
    let limit = sql.bind(i64::try_from(limit).unwrap_or(i64::MAX));
    let due = format!(
        "SELECT run FROM {of}.processes WHERE namespace = {namespace} AND kind = {kind} AND status = 'waiting'
             AND wake_at IS NOT NULL AND wake_at <= now() AND {gate}
         ORDER BY wake_at LIMIT {limit} FOR NO KEY UPDATE SKIP LOCKED"
    );
    let claimed = format!(
        "UPDATE {of}.processes p SET owner = {me}, claim = p.claim + 1, status = 'running', wake_at = NULL,
             waiting_for = NULL, status_at = now()
         FROM due WHERE p.run = due.run RETURNING p.run, p.claim"
    );
    [due, claimed]
}

/// What a signal does besides counting: tells an owner that is another instance, makes a waiting process due.
pub(super) fn wake(me: &str) -> String {
    format!(
        "signalled = p.signalled OR (p.owner IS NOT NULL AND p.owner <> {me}),
         wake_at = CASE WHEN p.status = 'waiting' THEN least(p.wake_at, now()) ELSE p.wake_at END"
    )
}

/// Signals everybody who awaits one of the runs that `targets` selects, or leaves that as chores; answers with those that are
/// signalled, and whether the instance owns them.
pub(super) fn woken(sql: &mut Sql, of: &Of<'_>, targets: &str) -> String {
    let me = sql.bind(of.instance);
    let wake = wake(&me);
    format!(
        "WITH few AS MATERIALIZED (SELECT w.waiter FROM {of}.waiters w WHERE w.target IN ({targets}) LIMIT {WOKEN} + 1),
         many AS MATERIALIZED (SELECT 1 FROM few HAVING count(*) > {WOKEN}),
         later AS (INSERT INTO {of}.chores (run, what, due_at) SELECT t.run, 'wake', now() FROM ({targets}) t (run)
             WHERE EXISTS (SELECT 1 FROM many) AND EXISTS (SELECT 1 FROM {of}.waiters w WHERE w.target = t.run)
             ON CONFLICT DO NOTHING),
         awake AS MATERIALIZED (SELECT p.run FROM {of}.processes p
             WHERE p.run = ANY (ARRAY (SELECT waiter FROM few)) AND NOT EXISTS (SELECT 1 FROM many) AND p.status IN {UNFINISHED}
             ORDER BY p.run FOR NO KEY UPDATE)
         UPDATE {of}.processes p SET signals = p.signals + 1, {wake} FROM awake WHERE p.run = awake.run
         RETURNING p.run, p.owner IS NOT NULL AND p.owner = {me}"
    )
}

/// The runs that these ends have ended, now or by an earlier attempt.
pub(super) fn ended(sql: &mut Sql, of: &Of<'_>, finishes: &[(usize, &Finish)]) -> String {
    let each = || finishes.iter().map(|(_, finish)| *finish).filter(|finish| finish.status.is_finished());
    let j = sql
        .rows()
        .column("run", each().map(|finish| finish.run.0))
        .column("claim", each().map(|finish| finish.claim))
        .column("status", each().map(|finish| finish.status.as_str()))
        .named("j");
    format!(
        "SELECT j.run FROM {j} WHERE (SELECT t.claim = j.claim AND t.status = j.status AND t.owner IS NULL
             FROM {of}.processes t WHERE t.run = j.run)"
    )
}
