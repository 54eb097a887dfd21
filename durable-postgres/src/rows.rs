//! Rows of the database to the engine's types. The database is shared with other programs: nothing that stands in it
//! is taken on trust.

use chrono::{DateTime, TimeDelta, Utc};
use durable_core::storage::{
    EventRow, Fate, InstanceId, OpKind, ProcessRow, Record, RecordKey, RecordState, Result, RunId, Scope, Status,
    StorageError, Target,
};
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgRow, PgTypeInfo, PgValueRef, Postgres};
use sqlx::{Decode, Row, Type};
use uuid::Uuid;

pub(crate) fn get<'r, T: Decode<'r, Postgres> + Type<Postgres>>(row: &'r PgRow, column: usize) -> Result<T> {
    row.try_get(column).map_err(StorageError::schema)
}

/// Runs as they are bound.
pub(crate) fn uuids(runs: Vec<RunId>) -> Vec<Uuid> {
    runs.into_iter().map(|run| run.0).collect()
}

/// Says of which row it is, by its run and what else makes out its key, if it cannot be read.
fn of<T>(table: &str, row: &PgRow, rest: String, read: Result<T>) -> Result<T> {
    read.map_err(|why| match run(row, 0) {
        Ok(run) => why.at(table, format!("run {run}{rest}")),
        Err(_) => why.at(table, "a run that is no UUID"),
    })
}

/// A `timestamptz`. The driver's own types for it come with features that would change a service's `query!`.
pub(crate) struct Time(pub(crate) DateTime<Utc>);

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        const TIMESTAMPTZ: Oid = Oid(1184);
        PgTypeInfo::with_oid(TIMESTAMPTZ)
    }
    fn compatible(ty: &PgTypeInfo) -> bool {
        ty.oid() == Self::type_info().oid()
    }
}

impl<'r> Decode<'r, Postgres> for Time {
    fn decode(value: PgValueRef<'r>) -> std::result::Result<Self, BoxDynError> {
        /// Between 1970 and 2000, from where PostgreSQL counts.
        const EPOCH: i64 = 946_684_800_000_000;
        let micros = i64::from_be_bytes(value.as_bytes()?.try_into()?);
        let since = micros.checked_add(EPOCH).map(TimeDelta::microseconds);
        let time = since.and_then(|since| DateTime::UNIX_EPOCH.checked_add_signed(since));
        time.map(Self).ok_or_else(|| "a time outside of what this version knows".into())
    }
}

/// A time as it is sent, to be cast where it arrives.
pub(crate) fn time_text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
}

pub(crate) fn time(row: &PgRow, column: usize) -> Result<DateTime<Utc>> {
    get::<Time>(row, column).map(|time| time.0)
}

pub(crate) fn maybe_time(row: &PgRow, column: usize) -> Result<Option<DateTime<Utc>>> {
    get::<Option<Time>>(row, column).map(|time| time.map(|time| time.0))
}

pub(crate) fn boxed(text: &str) -> Box<str> {
    text.into()
}

fn text(row: &PgRow, column: usize) -> Result<Box<str>> {
    get(row, column).map(boxed)
}

fn maybe_text(row: &PgRow, column: usize) -> Result<Option<Box<str>>> {
    get::<Option<&str>>(row, column).map(|text| text.map(boxed))
}

/// A column of JSON, which arrives as text: byte for byte what was sent.
pub(crate) fn maybe_json(row: &PgRow, column: usize) -> Result<Option<Box<str>>> {
    let text: Option<&str> = row.try_get_unchecked(column).map_err(StorageError::schema)?;
    Ok(text.map(boxed))
}

fn json(row: &PgRow, column: usize) -> Result<Box<str>> {
    maybe_json(row, column)?.ok_or_else(|| StorageError::schema("a payload is missing"))
}

pub(crate) fn status(row: &PgRow, column: usize) -> Result<Status> {
    let text: &str = get(row, column)?;
    Status::read("status", text)
}

pub(crate) fn run(row: &PgRow, column: usize) -> Result<RunId> {
    get::<Uuid>(row, column).map(RunId)
}

/// Which run it is, and how it stands.
pub(crate) fn standing(row: &PgRow, run_at: usize, status_at: usize) -> Result<(RunId, Status)> {
    let run = run(row, run_at)?;
    let status = status(row, status_at);
    Ok((run, status.map_err(|why| why.at("processes", format!("run {run}")))?))
}

/// The columns of [`process`], of a table that is called `p`. The columns of the others have the same types in the same
/// places, so that one statement can read all of them from one snapshot.
pub(crate) const PROCESS: &str = "p.run, p.id, p.kind, p.status, p.input, p.output, p.reason, p.owner, p.claim, \
    p.calm_claim, p.wake_at, p.waiting_for, p.signals, p.cancel_requested_at, p.cancelled_at, p.created_at, \
    p.status_at, p.finished_at, p.cancelled_seq";

/// The same without the input, and without the output: both may be large.
pub(crate) fn found() -> String {
    PROCESS.replace("p.input", "'null'::json")
}
pub(crate) fn listed() -> String {
    found().replace("p.output", "NULL::json")
}

pub(crate) fn process(row: &PgRow) -> Result<ProcessRow> {
    of("processes", row, String::new(), read_process(row))
}

fn read_process(row: &PgRow) -> Result<ProcessRow> {
    Ok(ProcessRow {
        run: run(row, 0)?,
        id: text(row, 1)?,
        kind: text(row, 2)?,
        status: status(row, 3)?,
        input: json(row, 4)?,
        output: maybe_json(row, 5)?,
        reason: maybe_text(row, 6)?,
        owner: get::<Option<Uuid>>(row, 7)?.map(InstanceId),
        claim: get(row, 8)?,
        calm_claim: get(row, 9)?,
        wake_at: maybe_time(row, 10)?,
        waiting_for: maybe_text(row, 11)?,
        signals: get(row, 12)?,
        cancel_requested_at: maybe_time(row, 13)?,
        cancelled_at: maybe_time(row, 14)?,
        created_at: time(row, 15)?,
        status_at: time(row, 16)?,
        finished_at: maybe_time(row, 17)?,
        cancelled_seq: get(row, 18)?,
    })
}

/// What stands in the places 13 to 18 of a row that is not a process's.
const REST: &str = "NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, \
    NULL::integer";
/// And before that, in the places 11 and 12.
const NOTHING: &str = "NULL::text, NULL::bigint";

/// The columns of [`record`], of a table that is called `s`.
pub(crate) fn record_columns() -> String {
    format!(
        "s.run, s.name, s.key, s.op, s.payload, NULL::json, s.state, NULL::uuid, s.claim, \
         s.attempts::bigint, NULL::timestamptz, s.scope::text, s.seq::bigint, {REST}"
    )
}

pub(crate) fn record(row: &PgRow) -> Result<(RecordKey, Record)> {
    let named = || format!(" name {:?} key {:?}", text(row, 1).unwrap_or_default(), text(row, 2).unwrap_or_default());
    read_record(row).or_else(|why| of("steps", row, named(), Err(why)))
}

fn read_record(row: &PgRow) -> Result<(RecordKey, Record)> {
    let (op, state): (&str, &str) = (get(row, 3)?, get(row, 6)?);
    let (attempts, scope, seq): (i64, &str, i64) = (get(row, 9)?, get(row, 11)?, get(row, 12)?);
    let scope = Scope::read(scope.parse().map_err(StorageError::schema)?)?;
    let key = RecordKey { scope, name: text(row, 1)?.into(), key: text(row, 2)?.into() };
    let record = Record {
        op: OpKind::read("op", op)?,
        state: RecordState::read("state", state)?,
        payload: json(row, 4)?,
        attempts: i32::try_from(attempts).map_err(StorageError::schema)?,
        claim: get(row, 8)?,
        seq: i32::try_from(seq).map_err(StorageError::schema)?,
    };
    Ok((key, record))
}

/// The columns of [`event`], of a table that is called `e`.
pub(crate) fn event_columns() -> String {
    format!(
        "e.run, e.name, NULL::text, NULL::text, e.payload, NULL::json, NULL::text, NULL::uuid, e.number, \
         NULL::bigint, e.raised_at, {NOTHING}, {REST}"
    )
}

pub(crate) fn event(row: &PgRow) -> Result<EventRow> {
    let read = || {
        Ok(EventRow { number: get(row, 8)?, name: text(row, 1)?, payload: json(row, 4)?, raised_at: time(row, 10)? })
    };
    read().or_else(|why| of("events", row, format!(" number {}", get::<i64>(row, 8).unwrap_or(0)), Err(why)))
}

/// The columns of [`target`], of waiters `w` and the processes `t` that they await.
pub(crate) fn target_columns() -> String {
    format!(
        "w.waiter, t.id, NULL::text, t.status, NULL::json, t.output, NULL::text, w.target, \
         NULL::bigint, NULL::bigint, coalesce(t.finished_at, t.status_at), {NOTHING}, {REST}"
    )
}

pub(crate) fn target(row: &PgRow) -> Result<Target> {
    if get::<Option<&str>>(row, 3)?.is_none() {
        return Ok(Target { run: run(row, 7)?, id: "".into(), fate: Fate::Gone });
    }
    let (run, status) = standing(row, 7, 3)?;
    let fate = match status.is_finished() {
        true => Fate::Ended((status, maybe_json(row, 5)?), time(row, 10)?),
        false => Fate::Open,
    };
    Ok(Target { run, id: text(row, 1)?, fate })
}

/// How many bytes of JSON a row of any kind holds.
pub(crate) fn weight(row: &PgRow) -> usize {
    let bytes = |column| row.try_get_raw(column).ok().and_then(|value| Some(value.as_bytes().ok()?.len())).unwrap_or(0);
    bytes(4) + bytes(5)
}

/// A row that cannot be understood is left out, and told: it must not hide the others.
pub(crate) fn readable<T>(row: Result<T>) -> Option<T> {
    row.inspect_err(|why| tracing::error!("a row is left out: {why}")).ok()
}
