//! What only reads.

use durable_core::storage::housekeeping::Todo;
use durable_core::storage::{
    Counted, EventRow, Filter, InstanceId, Load, Loaded, Poll, Polled, ProcessRow, Record, RecordKey, Result, RunId,
    RunState, Scales, StorageError, Target,
};
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::HashMap;
use uuid::Uuid;

use crate::batch::FINISHED;
use crate::names::Schema;
use crate::rows::{self, boxed, get, maybe_time, readable, run, time_text};
use crate::sql::Sql;

/// What the runs need: everything in one statement, which is one snapshot, with the kind of each row in its last column.
pub(crate) fn load_statement(schema: &Schema, load: &Load) -> Sql {
    let mut sql = Sql::default();
    let runs = sql.bind(load.ids().map(|run| run.0).collect::<Vec<Uuid>>());
    let (process, event, target, record) =
        (rows::PROCESS, rows::event_columns(), rows::target_columns(), rows::record_columns());
    let mut parts = vec![format!("(SELECT {process}, 'process' FROM {schema}.processes p WHERE p.run = ANY ({runs}))")];
    let awaited = format!(
        "SELECT {target}, 'target' FROM {schema}.waiters w LEFT JOIN {schema}.processes t ON t.run = w.target
             WHERE w.waiter = ANY ({runs})"
    );
    // Not those that were ever taken: the index has the others alone.
    if load.records {
        parts.push(format!(
            "(SELECT {event}, 'event' FROM {schema}.events e WHERE e.run = ANY ({runs}) AND e.taken_at IS NULL)"
        ));
        parts.push(format!("({awaited})"));
        parts.push(format!("(SELECT {record}, 'record' FROM {schema}.steps s WHERE s.run = ANY ({runs}))"));
    } else {
        let wanted = wanted(&mut sql, load);
        parts.push(format!(
            // In this order: a join could be turned around.
            "(SELECT {event}, 'event' FROM {wanted} CROSS JOIN LATERAL (SELECT * FROM {schema}.events a
                 WHERE a.run = j.run AND a.number > j.seen AND a.taken_at IS NULL OFFSET 0) e)"
        ));
        parts.push(format!("({awaited} AND (t.status IS NULL OR t.status IN {FINISHED}))"));
    }
    sql.text = parts.join("\nUNION ALL\n");
    sql
}

fn wanted(sql: &mut Sql, load: &Load) -> String {
    sql.rows()
        .column("run", load.ids().map(|run| run.0))
        .column("seen", load.runs.iter().map(|wanted| wanted.seen))
        .named("j")
}

/// None if it is more than it may be. Then the connection is in the middle of an answer.
pub(crate) async fn load(connection: &mut PgConnection, schema: &Schema, load: &Load) -> Result<Option<Vec<Loaded>>> {
    let mut scales = Scales::of(load);
    let rows = load_statement(schema, load).run_while(connection, |row| scales.add(rows::weight(row))).await?;
    rows.map(|rows| loaded(load, &rows)).transpose()
}

/// How many bytes the runs come to.
pub(crate) fn weigh_statement(schema: &Schema, load: &Load) -> Sql {
    let mut sql = Sql::default();
    let wanted = wanted(&mut sql, load);
    let row = Scales::ROW;
    let of =
        |what: &str, from: String| format!("(SELECT coalesce(sum(octet_length({what}::text) + {row}), 0) FROM {from})");
    let mut parts = vec![
        format!("octet_length(p.input::text) + coalesce(octet_length(p.output::text), 0) + {row}"),
        of("e.payload", format!("{schema}.events e WHERE e.run = j.run AND e.number > j.seen AND e.taken_at IS NULL")),
        of(
            "coalesce(t.output, 'null')",
            format!("{schema}.waiters w LEFT JOIN {schema}.processes t ON t.run = w.target WHERE w.waiter = j.run"),
        ),
    ];
    if load.records {
        parts.push(of("s.payload", format!("{schema}.steps s WHERE s.run = j.run")));
    }
    sql.text = format!(
        "SELECT j.run, ({})::bigint FROM {wanted} JOIN {schema}.processes p ON p.run = j.run",
        parts.join("\n + ")
    );
    sql
}

pub(crate) fn weights(rows: &[PgRow]) -> Result<Vec<(RunId, usize)>> {
    let weight = |row: &PgRow| Ok((run(row, 0)?, usize::try_from(get::<i64>(row, 1)?).map_err(StorageError::schema)?));
    rows.iter().map(weight).collect()
}

enum Part {
    Process(Box<ProcessRow>),
    Event(EventRow),
    Target(Option<Target>),
    Record((RecordKey, Record)),
}

/// Sorts the rows of a load by run. A run whose rows cannot be understood says so, alone.
fn loaded(load: &Load, rows: &[PgRow]) -> Result<Vec<Loaded>> {
    const KIND: usize = 19;
    let mut states: HashMap<RunId, RunState> = HashMap::new();
    let mut broken: HashMap<RunId, String> = HashMap::new();
    let mut parts = Vec::with_capacity(rows.len());
    for row in rows {
        let part = match get::<&str>(row, KIND)? {
            "process" => rows::process(row).map(|process| Part::Process(Box::new(process))),
            "event" => rows::event(row).map(Part::Event),
            // One that cannot be understood has not ended, as far as those go that await it.
            "target" => Ok(Part::Target(readable(rows::target(row)))),
            _ => rows::record(row).map(Part::Record),
        };
        match (run(row, 0)?, part) {
            (run, Ok(Part::Process(process))) => {
                states.insert(run, RunState::of(*process));
            }
            (run, Ok(part)) => parts.push((run, part)),
            (run, Err(error)) => {
                broken.entry(run).or_insert_with(|| error.to_string());
            }
        }
    }
    for (run, part) in parts {
        let Some(state) = states.get_mut(&run) else { continue };
        match part {
            Part::Event(event) => state.events.push(event),
            Part::Target(target) => state.targets.extend(target),
            Part::Record(record) => state.records.push(record),
            Part::Process(_) => {}
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
    Ok(load.ids().map(one).collect())
}

pub(crate) fn owned_statement(schema: &Schema, instance: InstanceId, after: Option<RunId>, limit: usize) -> Sql {
    let mut sql = Sql::default();
    let (instance, after) = (sql.bind(instance.0), sql.bind(after.map_or(Uuid::nil(), |run| run.0)));
    let limit = sql.bind(limit_arg(limit));
    sql.text = format!(
        "SELECT run, claim FROM {schema}.processes WHERE owner = {instance} AND run > {after} ORDER BY run LIMIT {limit}"
    );
    sql
}

pub(crate) fn owned(rows: &[PgRow]) -> Result<Vec<(RunId, i64)>> {
    rows.iter().map(|row| Ok((run(row, 0)?, get(row, 1)?))).collect()
}

/// Each part goes by an index that holds only such rows.
pub(crate) fn poll_statement(schema: &Schema, poll: &Poll) -> Sql {
    let mut sql = Sql::default();
    let (namespace, instance) = (sql.bind(&*poll.namespace), sql.bind(poll.instance.0));
    let kinds = sql.bind(poll.kinds.iter().map(|kind| &**kind).collect::<Vec<&str>>());
    let watched = sql.bind(poll.watched.iter().map(|run| run.0).collect::<Vec<Uuid>>());
    sql.text = format!(
        "SELECT 'now', NULL::text, clock_timestamp(), NULL::uuid, NULL::bigint
         UNION ALL
         SELECT 'due', k.kind, d.wake_at, NULL, NULL FROM unnest({kinds}) AS k (kind)
             CROSS JOIN LATERAL (SELECT p.wake_at FROM {schema}.processes p WHERE p.namespace = {namespace}
                 AND p.kind = k.kind AND p.status = 'waiting' AND p.wake_at IS NOT NULL ORDER BY p.wake_at LIMIT 1) d
         UNION ALL
         SELECT 'inbox', NULL, NULL, NULL, NULL
             WHERE EXISTS (SELECT 1 FROM {schema}.inbox WHERE namespace = {namespace} AND refused IS NULL)
         UNION ALL
         SELECT 'chores', NULL, NULL, NULL, NULL WHERE EXISTS (SELECT 1 FROM {schema}.chores WHERE due_at <= now())
         UNION ALL
         SELECT 'signalled', NULL, NULL, p.run, p.signals FROM {schema}.processes p
             WHERE p.owner = {instance} AND p.signalled
         UNION ALL
         SELECT 'ended', NULL, NULL, w.run, NULL FROM unnest({watched}) AS w (run)
             LEFT JOIN {schema}.processes p ON p.run = w.run
             WHERE p.status IS NULL OR p.status IN ('completed', 'failed', 'cancelled')"
    );
    sql
}

/// What there is to do.
pub(crate) fn polled(rows: &[PgRow]) -> Result<(Polled, Todo)> {
    let mut polled = Polled::default();
    let mut todo = Todo::default();
    for row in rows {
        match get::<&str>(row, 0)? {
            "now" => polled.now = rows::time(row, 2)?,
            // A time that this version cannot hold, infinity say, is due: the claim clears it away.
            "due" => {
                let at = maybe_time(row, 2).ok().flatten().unwrap_or(polled.now);
                polled.due.push((boxed(get(row, 1)?), at));
            }
            "inbox" => todo.inbox = true,
            "chores" => todo.chores = true,
            "signalled" => polled.signalled.push((run(row, 3)?, get(row, 4)?)),
            _ => polled.ended.push(run(row, 3)?),
        }
    }
    Ok((polled, todo))
}

pub(crate) fn find_statement(schema: &Schema, namespace: &str, id: &str, run: Option<RunId>) -> Sql {
    let mut sql = Sql::default();
    let (namespace, id) = (sql.bind(namespace), sql.bind(id));
    let which = match run {
        Some(run) => format!("p.run = {}", sql.bind(run.0)),
        None => "p.current".to_owned(),
    };
    sql.text = format!(
        "SELECT {} FROM {schema}.processes p WHERE p.namespace = {namespace} AND p.id = {id} AND {which}",
        rows::found()
    );
    sql
}

pub(crate) fn record_statement(schema: &Schema, run: RunId, key: &RecordKey) -> Sql {
    let mut sql = Sql::default();
    let (run, scope) = (sql.bind(run.0), sql.bind(key.scope as i16));
    let (name, key) = (sql.bind(&*key.name), sql.bind(&*key.key));
    sql.text = format!(
        "SELECT {} FROM {schema}.steps s WHERE s.run = {run} AND s.scope = {scope} AND s.name = {name} AND s.key = {key}",
        rows::record_columns()
    );
    sql
}

pub(crate) fn list_statement(schema: &Schema, namespace: &str, filter: &Filter) -> Sql {
    let mut sql = Sql::default();
    let conditions = filtered(&mut sql, namespace, filter);
    let limit = sql.bind(limit_arg(filter.limit));
    sql.text =
        format!("SELECT {} FROM {schema}.processes p WHERE {conditions} ORDER BY p.run LIMIT {limit}", rows::listed());
    sql
}

pub(crate) fn count_statement(schema: &Schema, namespace: &str, filter: &Filter) -> Sql {
    let mut sql = Sql::default();
    let conditions = filtered(&mut sql, namespace, filter);
    let namespace = sql.bind(namespace);
    sql.text = format!(
        "SELECT p.kind, p.status, count(*), EXISTS (SELECT 1 FROM {schema}.instances i
                 LEFT JOIN {schema}.fences f ON f.instance = i.instance
             WHERE i.namespace = {namespace} AND f.fenced_at IS NULL AND p.kind = ANY (i.kinds))
         FROM {schema}.processes p WHERE {conditions} GROUP BY p.kind, p.status ORDER BY p.kind, p.status"
    );
    sql
}

/// The one record that was asked for.
pub(crate) fn recorded(rows: &[PgRow]) -> Result<Option<Record>> {
    rows.first().map(|row| rows::record(row).map(|(_, record)| record)).transpose()
}

pub(crate) fn counted(rows: &[PgRow]) -> Vec<Counted> {
    let counted = |row: &PgRow| {
        let count = u64::try_from(get::<i64>(row, 2)?).map_err(StorageError::schema)?;
        Ok(Counted { kind: boxed(get(row, 0)?), status: rows::status(row, 1)?, count, served: get(row, 3)? })
    };
    rows.iter().filter_map(|row| readable(counted(row))).collect()
}

pub(crate) fn limit_arg(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn filtered(sql: &mut Sql, namespace: &str, filter: &Filter) -> String {
    let mut conditions = format!("p.namespace = {}", sql.bind(namespace));
    let mut and = |condition: String| {
        conditions.push_str(" AND ");
        conditions.push_str(&condition);
    };
    if let Some(kind) = filter.kind.as_deref() {
        and(format!("p.kind = {}", sql.bind(kind)));
    }
    if let Some(status) = filter.status {
        // In the text, so that a partial index can be used.
        and(format!("p.status = '{status}'"));
    }
    if let Some(since) = filter.unchanged_since {
        and(format!("p.status_at <= {}::timestamptz", sql.bind(time_text(since))));
    }
    if let Some(after) = filter.after {
        and(format!("p.run > {}", sql.bind(after.0)));
    }
    conditions
}
