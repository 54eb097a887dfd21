//! Rows of the database to the engine's types. The database is shared with other programs: nothing that stands in it
//! is taken on trust.

use chrono::{DateTime, Utc};
use durable_core::storage::{
    EventRow, InstanceId, OpKind, ProcessRow, Record, RecordKey, RecordState, Result, RunId, Scope, Status,
    StorageError,
};
use sqlx::sqlite::SqliteRow;
use sqlx::{Decode, Row, Sqlite, Type};
use std::str::FromStr;

pub(crate) fn get<'r, T: Decode<'r, Sqlite> + Type<Sqlite>>(row: &'r SqliteRow, column: usize) -> Result<T> {
    row.try_get(column).map_err(StorageError::schema)
}

fn bad(column: &str, text: &str) -> StorageError {
    StorageError::schema(format!("{column} holds {text:?}, which this version does not know"))
}

pub(crate) fn id<T: FromStr>(column: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| bad(column, text))
}

pub(crate) fn time(column: &str, text: &str) -> Result<DateTime<Utc>> {
    DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Utc)).map_err(|_| bad(column, text))
}

fn maybe<T>(column: &str, text: Option<&str>, parse: impl FnOnce(&str, &str) -> Result<T>) -> Result<Option<T>> {
    text.map(|text| parse(column, text)).transpose()
}

pub(crate) fn boxed(text: &str) -> Box<str> {
    text.into()
}

/// The columns of [`process`], of a table that is called `p`.
pub(crate) const PROCESS: &str = "p.run, p.id, p.kind, p.status, p.input, p.output, p.reason, p.owner, p.claim, \
    p.calm_claim, p.wake_at, p.waiting_for, p.signals, p.cancel_requested_at, p.cancelled_at, p.unasked, \
    p.created_at, p.status_at, p.finished_at";

pub(crate) fn status(text: &str) -> Result<Status> {
    Status::parse(text).ok_or_else(|| bad("status", text))
}

pub(crate) fn run(row: &SqliteRow, column: usize) -> Result<RunId> {
    id("run", get::<&str>(row, column)?)
}

pub(crate) fn process(row: &SqliteRow) -> Result<ProcessRow> {
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
        unasked: text(15)?.map(boxed),
        created_at: time("created_at", get(row, 16)?)?,
        status_at: time("status_at", get(row, 17)?)?,
        finished_at: maybe("finished_at", text(18)?, time)?,
    })
}

/// The columns of [`record`].
pub(crate) const RECORD: &str = "s.run, s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.claim";

pub(crate) fn record(row: &SqliteRow) -> Result<(RecordKey, Record)> {
    let scope: i64 = get(row, 1)?;
    let (op, state) = (get::<&str>(row, 4)?, get::<&str>(row, 5)?);
    let key = RecordKey {
        scope: Scope::from_number(scope).ok_or_else(|| bad("scope", &scope.to_string()))?,
        name: get::<&str>(row, 2)?.into(),
        key: get::<&str>(row, 3)?.into(),
    };
    let record = Record {
        op: OpKind::parse(op).ok_or_else(|| bad("op", op))?,
        state: RecordState::parse(state).ok_or_else(|| bad("state", state))?,
        payload: boxed(get(row, 6)?),
        attempts: get(row, 7)?,
        claim: get(row, 8)?,
    };
    Ok((key, record))
}

/// The columns of [`event`].
pub(crate) const EVENT: &str = "e.run, e.number, e.name, e.payload";

pub(crate) fn event(row: &SqliteRow) -> Result<EventRow> {
    Ok(EventRow { number: get(row, 1)?, name: get::<&str>(row, 2)?.into(), payload: boxed(get(row, 3)?) })
}
