//! Rows of the database to the engine's types. The database is shared with other programs: nothing that stands in it
//! is taken on trust.

use chrono::{DateTime, NaiveDateTime, Utc};
use durable_core::storage::{
    EventRow, Fate, InstanceId, OpKind, ProcessRow, Record, RecordKey, RecordState, Result, RunId, Scope, Status,
    StorageError, Target,
};
use tiberius::{FromSql, Row};
use uuid::Uuid;

pub(crate) fn maybe<'r, T: FromSql<'r>>(row: &'r Row, column: usize) -> Result<Option<T>> {
    row.try_get(column).map_err(StorageError::schema)
}

pub(crate) fn get<'r, T: FromSql<'r>>(row: &'r Row, column: usize) -> Result<T> {
    maybe(row, column)?.ok_or_else(|| StorageError::schema(format!("column {column} is null")))
}

/// Says of which row it is, by its run and what else makes out its key, if it cannot be read.
fn of<T>(table: &str, row: &Row, rest: String, read: Result<T>) -> Result<T> {
    read.map_err(|why| match run(row, 0) {
        Ok(run) => why.at(table, format!("run {run}{rest}")),
        Err(_) => why.at(table, "a run that is no UUID"),
    })
}

/// A time as it is sent, to be converted where it arrives.
pub(crate) fn time_text(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%dT%H:%M:%S%.6f").to_string()
}

pub(crate) fn maybe_time(row: &Row, column: usize) -> Result<Option<DateTime<Utc>>> {
    Ok(maybe::<NaiveDateTime>(row, column)?.map(|time| time.and_utc()))
}

pub(crate) fn time(row: &Row, column: usize) -> Result<DateTime<Utc>> {
    maybe_time(row, column)?.ok_or_else(|| StorageError::schema("a time is missing"))
}

pub(crate) fn boxed(text: &str) -> Box<str> {
    text.into()
}

pub(crate) fn text(row: &Row, column: usize) -> Result<Box<str>> {
    get(row, column).map(boxed)
}

pub(crate) fn maybe_text(row: &Row, column: usize) -> Result<Option<Box<str>>> {
    Ok(maybe::<&str>(row, column)?.map(boxed))
}

pub(crate) fn status(row: &Row, column: usize) -> Result<Status> {
    let text: &str = get(row, column)?;
    Status::read("status", text)
}

pub(crate) fn maybe_id(row: &Row, column: usize) -> Result<Option<Uuid>> {
    maybe::<&[u8]>(row, column)?.map(|bytes| Uuid::from_slice(bytes).map_err(StorageError::schema)).transpose()
}

pub(crate) fn run(row: &Row, column: usize) -> Result<RunId> {
    maybe_id(row, column)?.map(RunId).ok_or_else(|| StorageError::schema("a run is missing"))
}

/// Which run it is, and how it stands.
pub(crate) fn standing(row: &Row, run_at: usize, status_at: usize) -> Result<(RunId, Status)> {
    let run = run(row, run_at)?;
    let status = status(row, status_at);
    Ok((run, status.map_err(|why| why.at("processes", format!("run {run}")))?))
}

/// The columns of [`process`], of a table that is called `p`.
pub(crate) const PROCESS: &str = "p.run, p.id, p.kind, p.status, p.input, p.[output], p.reason, p.owner, p.claim, \
    p.calm_claim, p.wake_at, p.waiting_for, p.signals, p.cancel_requested_at, p.cancelled_at, p.created_at, \
    p.status_at, p.finished_at, p.cancelled_seq";

/// The same without the input, and without the output: both may be large.
pub(crate) fn found() -> String {
    PROCESS.replace("p.input", "N'null'")
}
pub(crate) fn listed() -> String {
    found().replace("p.[output]", "CONVERT(NVARCHAR(MAX), NULL)")
}

pub(crate) fn process(row: &Row) -> Result<ProcessRow> {
    of("processes", row, String::new(), read_process(row))
}

fn read_process(row: &Row) -> Result<ProcessRow> {
    Ok(ProcessRow {
        run: run(row, 0)?,
        id: text(row, 1)?,
        kind: text(row, 2)?,
        status: status(row, 3)?,
        input: text(row, 4)?,
        output: maybe_text(row, 5)?,
        reason: maybe_text(row, 6)?,
        owner: maybe_id(row, 7)?.map(InstanceId),
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
        cancelled_seq: maybe(row, 18)?,
    })
}

/// The columns of [`record`], of a table that is called `s`.
pub(crate) const RECORD: &str =
    "s.run, CONVERT(INT, s.scope) AS scope, s.name, s.[key], s.op, s.state, s.payload, s.attempts, s.claim, s.seq";

pub(crate) fn record(row: &Row) -> Result<(RecordKey, Record)> {
    let named = || format!(" name {:?} key {:?}", text(row, 2).unwrap_or_default(), text(row, 3).unwrap_or_default());
    read_record(row).or_else(|why| of("steps", row, named(), Err(why)))
}

fn read_record(row: &Row) -> Result<(RecordKey, Record)> {
    let scope = i64::from(get::<i32>(row, 1)?);
    let scope = Scope::read(scope)?;
    let (op, state): (&str, &str) = (get(row, 4)?, get(row, 5)?);
    let key = RecordKey { scope, name: text(row, 2)?.into(), key: text(row, 3)?.into() };
    let record = Record {
        op: OpKind::read("op", op)?,
        state: RecordState::read("state", state)?,
        payload: text(row, 6)?,
        attempts: get(row, 7)?,
        claim: get(row, 8)?,
        seq: get(row, 9)?,
    };
    Ok((key, record))
}

/// The columns of [`event`], of a table that is called `e`.
pub(crate) const EVENT: &str = "e.run, e.number, e.name, e.payload, e.raised_at";

pub(crate) fn event(row: &Row) -> Result<EventRow> {
    let read = || {
        let (name, payload, raised_at) = (text(row, 2)?, text(row, 3)?, time(row, 4)?);
        Ok(EventRow { number: get(row, 1)?, name, payload, raised_at })
    };
    read().or_else(|why| of("events", row, format!(" number {}", get::<i64>(row, 1).unwrap_or(0)), Err(why)))
}

/// The columns of [`target`], of waiters `w` and the processes `t` that they await.
pub(crate) const TARGET: &str =
    "w.waiter, w.target, t.status, t.[output], t.id, COALESCE(t.finished_at, t.status_at) AS ended_at";

pub(crate) fn target(row: &Row) -> Result<Target> {
    if maybe::<&str>(row, 2)?.is_none() {
        return Ok(Target { run: run(row, 1)?, id: "".into(), fate: Fate::Gone });
    }
    let (run, status) = standing(row, 1, 2)?;
    let fate = match status.is_finished() {
        true => Fate::Ended((status, maybe_text(row, 3)?), time(row, 5)?),
        false => Fate::Open,
    };
    Ok(Target { run, id: text(row, 4)?, fate })
}

/// How many bytes of JSON a row of the nth result of a load holds.
pub(crate) fn weight(result: usize, row: &Row) -> usize {
    let bytes = |column| maybe::<&str>(row, column).ok().flatten().map_or(0, str::len);
    match result {
        0 => bytes(4) + bytes(5),
        1 | 2 => bytes(3),
        _ => bytes(6),
    }
}

/// A row that cannot be understood is left out, and told: it must not hide the others.
pub(crate) fn readable<T>(row: Result<T>) -> Option<T> {
    row.inspect_err(|why| tracing::error!("a row is left out: {why}")).ok()
}
