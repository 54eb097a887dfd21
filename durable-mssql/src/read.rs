//! What only reads.

use durable_core::storage::housekeeping::Todo;
use durable_core::storage::{
    Counted, EventRow, Filter, InstanceId, Load, Loaded, Poll, Polled, Record, RecordKey, Result, RunId, RunState,
    Scales, StorageError, Target,
};
use std::collections::HashMap;
use tiberius::Row;
use uuid::Uuid;

use crate::batch::FINISHED;
use crate::json::{Column, Table, runs as run_table};
use crate::names::Schema;
use crate::rows::{self, get, maybe_time, readable, run, text, time_text};
use crate::session::Client;
use crate::sql::Sql;

const WANTED: &[(&str, Column)] = &[("run", Column::Id), ("seen", Column::Number)];

/// The runs that are wanted, in a table of the script's own.
fn wanted(sql: &mut Sql, load: &Load) {
    let mut table = Table::new(WANTED);
    load.runs.iter().for_each(|wanted| table.row([wanted.run.into(), wanted.seen.into()]));
    let j = table.named(sql, "j");
    sql.declare("@runs TABLE (run BINARY(16) NOT NULL PRIMARY KEY, seen BIGINT NOT NULL)");
    sql.push(format!("INSERT INTO @runs (run, seen) SELECT j.run, j.seen FROM {j}"));
}

/// What the runs need, a statement for each kind of row: first the processes, whose counts of signals say what must be
/// found after that. What comes in between is found, too.
pub(crate) fn load_script(schema: &Schema, load: &Load) -> Sql {
    let mut sql = Sql::default();
    wanted(&mut sql, load);
    let (process, event, target, record) = (rows::PROCESS, rows::EVENT, rows::TARGET, rows::RECORD);
    sql.push(format!("SELECT {process} FROM @runs AS r JOIN {schema}.processes AS p ON p.run = r.run"));
    sql.push(format!(
        "SELECT {event} FROM @runs AS r JOIN {schema}.events AS e ON e.run = r.run
         WHERE e.number > r.seen AND e.taken_at IS NULL"
    ));
    let over = if load.records { String::new() } else { format!("WHERE t.status IS NULL OR t.status IN {FINISHED}") };
    sql.push(format!(
        "SELECT {target} FROM @runs AS r JOIN {schema}.waiters AS w ON w.waiter = r.run
             LEFT JOIN {schema}.processes AS t ON t.run = w.target {over}"
    ));
    if load.records {
        sql.push(format!("SELECT {record} FROM @runs AS r JOIN {schema}.steps AS s ON s.run = r.run"));
    }
    sql
}

/// None if it is more than it may be. Then the session is in the middle of an answer.
pub(crate) async fn load(client: &mut Client, schema: &Schema, load: &Load) -> Result<Option<Vec<Loaded>>> {
    let mut scales = Scales::of(load);
    let welcome = |result: usize, row: &Row| scales.add(rows::weight(result, row));
    let parts = load_script(schema, load).run_while(client, welcome).await?;
    Ok(parts.map(|parts| loaded(load, &parts)))
}

/// How many bytes the runs come to; of texts, as they are stored.
pub(crate) fn weigh_script(schema: &Schema, load: &Load) -> Sql {
    let mut sql = Sql::default();
    wanted(&mut sql, load);
    let row = Scales::ROW;
    // Two bytes for a character.
    let bytes = |what: &str| format!("DATALENGTH({what}) / 2");
    let of = |what: &str, from: String| format!("COALESCE((SELECT SUM({} + {row}) FROM {from}), 0)", bytes(what));
    let mut parts = vec![
        format!("{} + COALESCE({}, 0) + {row}", bytes("p.input"), bytes("p.[output]")),
        of(
            "e.payload",
            format!("{schema}.events AS e WHERE e.run = r.run AND e.number > r.seen AND e.taken_at IS NULL"),
        ),
        of(
            "COALESCE(t.[output], N'')",
            format!(
                "{schema}.waiters AS w LEFT JOIN {schema}.processes AS t ON t.run = w.target WHERE w.waiter = r.run"
            ),
        ),
    ];
    if load.records {
        parts.push(of("s.payload", format!("{schema}.steps AS s WHERE s.run = r.run")));
    }
    sql.push(format!(
        "SELECT r.run, CONVERT(BIGINT, {}) FROM @runs AS r JOIN {schema}.processes AS p ON p.run = r.run",
        parts.join(" + ")
    ));
    sql
}

pub(crate) fn weights(rows: &[Row]) -> Result<Vec<(RunId, usize)>> {
    let weight = |row: &Row| Ok((run(row, 0)?, usize::try_from(get::<i64>(row, 1)?).map_err(StorageError::schema)?));
    rows.iter().map(weight).collect()
}

enum Part {
    Event(EventRow),
    Target(Option<Target>),
    Record(RecordKey, Record),
}

fn loaded(load: &Load, parts: &[Vec<Row>]) -> Vec<Loaded> {
    let mut states: HashMap<RunId, RunState> = HashMap::new();
    let mut broken: HashMap<RunId, String> = HashMap::new();
    let part = |nth: usize| parts.get(nth).map(Vec::as_slice).unwrap_or_default();
    for row in part(0) {
        let Some(run) = readable(run(row, 0)) else { continue };
        match rows::process(row) {
            Ok(process) => {
                states.insert(run, RunState::of(process));
            }
            Err(why) => {
                broken.insert(run, why.to_string());
            }
        }
    }
    let events = part(1).iter().map(|row| (row, rows::event(row).map(Part::Event)));
    // One that cannot be understood has not ended, as far as those go that await it.
    let targets = part(2).iter().map(|row| (row, Ok(Part::Target(readable(rows::target(row))))));
    let records = part(3).iter().map(|row| (row, rows::record(row).map(|(key, record)| Part::Record(key, record))));
    for (row, part) in events.chain(targets).chain(records) {
        let Some(run) = readable(run(row, 0)) else { continue };
        match (states.get_mut(&run), part) {
            (None, _) => {}
            (Some(_), Err(why)) => {
                broken.entry(run).or_insert_with(|| why.to_string());
            }
            (Some(state), Ok(Part::Event(event))) => state.events.push(event),
            (Some(state), Ok(Part::Target(target))) => state.targets.extend(target),
            (Some(state), Ok(Part::Record(key, record))) => state.records.push((key, record)),
        }
    }
    let one = |run: RunId| Loaded {
        run,
        state: match (broken.remove(&run), states.remove(&run)) {
            (Some(why), _) => Err(why),
            (None, Some(mut state)) => {
                state.events.sort_by_key(|event| event.number);
                Ok(Some(state))
            }
            (None, None) => Ok(None),
        },
    };
    load.ids().map(one).collect()
}

pub(crate) fn owned_script(schema: &Schema, instance: InstanceId, after: Option<RunId>, limit: usize) -> Sql {
    let mut sql = Sql::default();
    let (me, after) = (sql.id(instance.0), sql.id(after.map_or(Uuid::nil(), |run| run.0)));
    let limit = sql.number(limit_arg(limit));
    sql.push(format!("DECLARE @me BINARY(16) = {me}, @after BINARY(16) = {after}"));
    sql.push(format!(
        "SELECT TOP ({limit}) p.run, p.claim FROM {schema}.processes AS p
         WHERE p.owner = @me AND p.owner IS NOT NULL AND p.run > @after ORDER BY p.run"
    ));
    sql
}

pub(crate) fn owned(rows: &[Row]) -> Result<Vec<(RunId, i64)>> {
    rows.iter().map(|row| Ok((run(row, 0)?, get(row, 1)?))).collect()
}

/// Each part goes by an index that holds only such rows. The inbox is looked at past what a transaction that is still
/// open has put in: nobody waits for that.
pub(crate) fn poll_script(schema: &Schema, poll: &Poll) -> Sql {
    let mut sql = Sql::default();
    let (namespace, me) = (sql.text(&*poll.namespace), sql.id(poll.instance.0));
    let mut kinds = Table::new(&[("kind", Column::Key(128))]);
    poll.kinds.iter().for_each(|kind| kinds.row([(&**kind).into()]));
    let kinds = kinds.named(&mut sql, "k");
    let watched = run_table(&mut sql, poll.watched.iter().copied());
    sql.push(format!("DECLARE @me BINARY(16) = {me}, @namespace NVARCHAR(64) = {namespace}"));
    sql.push(format!(
        "SELECT SYSUTCDATETIME(), CONVERT(BIT, CASE WHEN EXISTS (SELECT 1
             FROM {schema}.inbox AS i WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
             WHERE i.namespace = @namespace AND i.refused IS NULL) THEN 1 ELSE 0 END),
         CONVERT(BIT, CASE WHEN EXISTS (SELECT 1 FROM {schema}.chores AS c WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
             WHERE c.due_at <= SYSUTCDATETIME()) THEN 1 ELSE 0 END)"
    ));
    sql.push(format!(
        "SELECT k.kind, d.wake_at FROM {kinds} CROSS APPLY (SELECT TOP (1) p.wake_at FROM {schema}.processes AS p
             WHERE p.namespace = @namespace AND p.kind = k.kind AND p.status = N'waiting' AND p.wake_at IS NOT NULL
             ORDER BY p.wake_at) AS d"
    ));
    sql.push(format!("SELECT p.run, p.signals FROM {schema}.processes AS p WHERE p.owner = @me AND p.signalled = 1"));
    sql.push(format!(
        "SELECT j.run FROM {watched} LEFT JOIN {schema}.processes AS p ON p.run = j.run
         WHERE p.status IS NULL OR p.status IN (N'completed', N'failed', N'cancelled')"
    ));
    sql
}

/// What there is to do.
pub(crate) fn polled(parts: &[Vec<Row>]) -> Result<(Polled, Todo)> {
    let [first, due, signalled, ended] = parts else { return Err(StorageError::schema("a look has no answer")) };
    let first = first.first().ok_or_else(|| StorageError::schema("the database did not tell its time"))?;
    let now = rows::time(first, 0)?;
    // A time that this version cannot hold is due: the claim clears it away.
    let one_due = |row: &Row| Ok((text(row, 0)?, maybe_time(row, 1).ok().flatten().unwrap_or(now)));
    let polled = Polled {
        now,
        due: due.iter().map(one_due).collect::<Result<_>>()?,
        signalled: owned(signalled)?,
        ended: ended.iter().map(|row| run(row, 0)).collect::<Result<_>>()?,
        more: false,
    };
    Ok((polled, Todo { inbox: get(first, 1)?, chores: get(first, 2)? }))
}

pub(crate) fn find_script(schema: &Schema, namespace: &str, id: &str, which: Option<RunId>) -> Sql {
    let mut sql = Sql::default();
    let (namespace, id) = (sql.text(namespace), sql.text(id));
    let which = match which {
        Some(run) => format!("p.run = {}", sql.id(run.0)),
        None => "p.[current] = 1".to_owned(),
    };
    sql.push(format!(
        "SELECT {} FROM {schema}.processes AS p WHERE p.namespace = {namespace} AND p.id = {id} AND {which}",
        rows::found()
    ));
    sql
}

pub(crate) fn record_script(schema: &Schema, run: RunId, key: &RecordKey) -> Sql {
    let mut sql = Sql::default();
    let (run, scope) = (sql.id(run.0), sql.number(key.scope as i64));
    let (name, key) = (sql.text(&*key.name), sql.text(&*key.key));
    sql.push(format!(
        "SELECT {} FROM {schema}.steps AS s
         WHERE s.run = {run} AND s.scope = {scope} AND s.name = {name} AND s.[key] = {key}",
        rows::RECORD
    ));
    sql
}

pub(crate) fn list_script(schema: &Schema, namespace: &str, filter: &Filter) -> Sql {
    let mut sql = Sql::default();
    let conditions = filtered(&mut sql, namespace, filter);
    let limit = sql.number(limit_arg(filter.limit));
    sql.push(format!(
        "SELECT TOP ({limit}) {} FROM {schema}.processes AS p WHERE {conditions} ORDER BY p.run",
        rows::listed()
    ));
    sql
}

pub(crate) fn count_script(schema: &Schema, namespace: &str, filter: &Filter) -> Sql {
    let mut sql = Sql::default();
    let conditions = filtered(&mut sql, namespace, filter);
    let namespace = sql.text(namespace);
    sql.push(format!(
        "SELECT c.kind, c.status, c.number, CONVERT(BIT, CASE WHEN EXISTS (SELECT 1 FROM {schema}.instances AS i
                 LEFT JOIN {schema}.fences AS f ON f.instance = i.instance
                 CROSS APPLY OPENJSON(CASE WHEN ISJSON(i.kinds) = 1 THEN i.kinds ELSE N'[]' END) AS k
             WHERE i.namespace = {namespace} AND f.fenced_at IS NULL AND k.value COLLATE Latin1_General_BIN2 = c.kind)
             THEN 1 ELSE 0 END)
         FROM (SELECT p.kind, p.status, COUNT_BIG(*) AS number FROM {schema}.processes AS p WHERE {conditions}
             GROUP BY p.kind, p.status) AS c ORDER BY c.kind, c.status"
    ));
    sql
}

/// The one record that was asked for.
pub(crate) fn recorded(rows: &[Row]) -> Result<Option<Record>> {
    rows.first().map(|row| rows::record(row).map(|(_, record)| record)).transpose()
}

pub(crate) fn counted(rows: &[Row]) -> Vec<Counted> {
    let counted = |row: &Row| {
        let count = u64::try_from(get::<i64>(row, 2)?).map_err(StorageError::schema)?;
        Ok(Counted { kind: text(row, 0)?, status: rows::status(row, 1)?, count, served: get(row, 3)? })
    };
    rows.iter().filter_map(|row| readable(counted(row))).collect()
}

pub(crate) fn limit_arg(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn filtered(sql: &mut Sql, namespace: &str, filter: &Filter) -> String {
    let mut conditions = format!("p.namespace = {}", sql.text(namespace));
    let mut and = |condition: String| {
        conditions.push_str(" AND ");
        conditions.push_str(&condition);
    };
    if let Some(kind) = filter.kind.as_deref() {
        and(format!("p.kind = {}", sql.text(kind)));
    }
    if let Some(status) = filter.status {
        // In the text, so that a filtered index can be used.
        and(format!("p.status = N'{status}'"));
    }
    if let Some(since) = filter.unchanged_since {
        and(format!("p.status_at <= CONVERT(DATETIME2(6), {}, 126)", sql.text(time_text(since))));
    }
    if let Some(after) = filter.after {
        and(format!("p.run > {}", sql.id(after.0)));
    }
    conditions
}
