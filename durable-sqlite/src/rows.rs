//! Rows of the database to the engine's types. The database is shared with other programs: nothing that stands in it
//! is taken on trust.

use chrono::{DateTime, Utc};
use durable_core::storage::{
    EventRow, InstanceId, OpKind, ProcessRow, Record, RecordKey, RecordState, Result, RunId, Scope, Status,
    StorageError,
};
use sqlx::sqlite::SqliteRow;
use sqlx::{Column, Decode, Error, Row, Sqlite, Type, TypeInfo, ValueRef};
use std::str::FromStr;

pub(crate) fn get<'r, T: Decode<'r, Sqlite> + Type<Sqlite>>(row: &'r SqliteRow, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| {
        let name = row.columns().get(column).map(Column::name).unwrap_or_default();
        let why = match error {
            Error::ColumnDecode { source, .. } => source.to_string(),
            other => other.to_string(),
        };
        StorageError::schema(format!("{name} holds {}: {why}", shown(row, column)))
    })
}

/// What stands in a column, for people.
fn shown(row: &SqliteRow, column: usize) -> String {
    let Ok(value) = row.try_get_raw(column) else { return "nothing".to_owned() };
    let kind = value.type_info().name().to_owned();
    match kind.as_str() {
        "TEXT" => row.try_get::<&str, _>(column).map_or(kind, |text| format!("{:?}", cut(text))),
        "INTEGER" => row.try_get::<i64, _>(column).map_or(kind, |number| number.to_string()),
        _ => kind,
    }
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Says of which row it is, by the columns that make out its key, if it cannot be read.
pub(crate) fn of<T>(table: &str, row: &SqliteRow, key: &[usize], read: Result<T>) -> Result<T> {
    let named = |column: &usize| {
        let name = row.columns().get(*column).map(Column::name).unwrap_or_default();
        format!("{name} {}", shown(row, *column))
    };
    read.map_err(|why| why.at(table, key.iter().map(named).collect::<Vec<_>>().join(" ")))
}

pub(crate) fn id<T: FromStr>(column: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| StorageError::unknown_value(column, text, "UUIDs"))
}

pub(crate) fn time(column: &str, text: &str) -> Result<DateTime<Utc>> {
    let time = DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Utc));
    time.map_err(|_| StorageError::unknown_value(column, text, "times like 2026-01-31T12:00:00.000Z"))
}

fn maybe<T>(column: &str, text: Option<&str>, parse: impl FnOnce(&str, &str) -> Result<T>) -> Result<Option<T>> {
    text.map(|text| parse(column, text)).transpose()
}

pub(crate) fn boxed(text: &str) -> Box<str> {
    text.into()
}

/// Which run it is, and how it stands.
pub(crate) fn standing(row: &SqliteRow, run_at: usize, status_at: usize) -> Result<(RunId, Status)> {
    let run = run(row, run_at)?;
    let status = get(row, status_at).and_then(status);
    Ok((run, status.map_err(|why| why.at("durable_processes", format!("run {run}")))?))
}

/// The columns of [`process`], of a table that is called `p`.
pub(crate) const PROCESS: &str = "p.run, p.id, p.kind, p.status, p.input, p.output, p.reason, p.owner, p.claim, \
    p.calm_claim, p.wake_at, p.waiting_for, p.signals, p.cancel_requested_at, p.cancelled_at, p.created_at, \
    p.status_at, p.finished_at, p.cancelled_seq";

/// The same without the input, and without the output: both may be large.
pub(crate) fn found() -> String {
    PROCESS.replace("p.input", "'null'")
}
pub(crate) fn listed() -> String {
    found().replace("p.output", "NULL")
}

pub(crate) fn status(text: &str) -> Result<Status> {
    Status::read("status", text)
}

pub(crate) fn run(row: &SqliteRow, column: usize) -> Result<RunId> {
    id("run", get::<&str>(row, column)?)
}

pub(crate) fn process(row: &SqliteRow) -> Result<ProcessRow> {
    of("durable_processes", row, &[0], read_process(row))
}

fn read_process(row: &SqliteRow) -> Result<ProcessRow> {
    let text = |column: usize| get::<Option<&str>>(row, column);
    Ok(ProcessRow {
        run: run(row, 0)?,
        id: boxed(get(row, 1)?),
        kind: boxed(get(row, 2)?),
        status: status(get(row, 3)?)?,
        input: boxed(get(row, 4)?),
        output: text(5)?.map(boxed),
        reason: text(6)?.map(boxed),
        owner: maybe("owner", text(7)?, id::<InstanceId>)?,
        claim: get(row, 8)?,
        calm_claim: get(row, 9)?,
        wake_at: maybe("wake_at", text(10)?, time)?,
        waiting_for: text(11)?.map(boxed),
        signals: get(row, 12)?,
        cancel_requested_at: maybe("cancel_requested_at", text(13)?, time)?,
        cancelled_at: maybe("cancelled_at", text(14)?, time)?,
        created_at: time("created_at", get(row, 15)?)?,
        status_at: time("status_at", get(row, 16)?)?,
        finished_at: maybe("finished_at", text(17)?, time)?,
        cancelled_seq: get(row, 18)?,
    })
}

/// The columns of [`record`].
pub(crate) const RECORD: &str = "s.run, s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.claim, s.seq";

pub(crate) fn record(row: &SqliteRow) -> Result<(RecordKey, Record)> {
    of("durable_steps", row, &[0, 1, 2, 3], read_record(row))
}

fn read_record(row: &SqliteRow) -> Result<(RecordKey, Record)> {
    let scope: i64 = get(row, 1)?;
    let (op, state) = (get::<&str>(row, 4)?, get::<&str>(row, 5)?);
    let key =
        RecordKey { scope: Scope::read(scope)?, name: get::<&str>(row, 2)?.into(), key: get::<&str>(row, 3)?.into() };
    let record = Record {
        op: OpKind::read("op", op)?,
        state: RecordState::read("state", state)?,
        payload: boxed(get(row, 6)?),
        attempts: get(row, 7)?,
        claim: get(row, 8)?,
        seq: get(row, 9)?,
    };
    Ok((key, record))
}

/// The columns of [`event`].
pub(crate) const EVENT: &str = "e.run, e.number, e.name, e.payload, e.raised_at";

pub(crate) fn event(row: &SqliteRow) -> Result<EventRow> {
    let read = || {
        let (name, raised_at) = (get::<&str>(row, 2)?.into(), time("raised_at", get(row, 4)?)?);
        Ok(EventRow { number: get(row, 1)?, name, payload: boxed(get(row, 3)?), raised_at })
    };
    of("durable_events", row, &[0, 1], read())
}
