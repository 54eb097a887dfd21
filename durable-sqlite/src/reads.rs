//! What a run needs in order to go on.

use durable_core::storage::{
    EventRow, Fate, Load, Loaded, Record, RecordKey, Result, RunId, RunState, Scales, StorageError, Target,
};
use serde_json::json;
use sqlx::sqlite::SqliteRow;
use std::collections::{HashMap, HashSet};

use crate::batch::FINISHED;
use crate::errors::damaged;
use crate::rows::{self, boxed, get};
use crate::script::{Answer, Arg};
use crate::store::{all, readable};

fn ids(load: &Load) -> Arg {
    json!(load.ids().map(|run| run.to_string()).collect::<Vec<_>>()).to_string().into()
}

fn wanted(load: &Load) -> Arg {
    json!(load.runs.iter().map(|wanted| (wanted.run.to_string(), wanted.seen)).collect::<Vec<_>>()).to_string().into()
}

/// The processes, the messages, what is awaited, and the records.
pub(crate) fn load(load: &Load) -> Vec<(String, Vec<Arg>)> {
    let list = ids(load);
    let of = |columns: &str, table: &str, alias: &str, and: &str| {
        let sql = format!("SELECT {columns} FROM json_each(?) j CROSS JOIN {table} {alias} ON run = j.value {and}");
        (sql, vec![list.clone()])
    };
    // Not those that were ever taken: the index has the others alone.
    const WAITING: &str = "durable_events e INDEXED BY durable_events_waiting";
    let awaited =
        "SELECT w.waiter, w.target, t.status, t.output, t.id, coalesce(t.finished_at, t.status_at) FROM json_each(?) j
        CROSS JOIN durable_waiters w ON w.waiter = j.value LEFT JOIN durable_processes t ON t.run = w.target";
    let processes = of(rows::PROCESS, "durable_processes", "p", "");
    if load.records {
        let events = of(rows::EVENT, WAITING, "", "AND e.taken_at IS NULL ORDER BY j.key, e.number");
        let records = of(rows::RECORD, "durable_steps", "s", "");
        return vec![processes, events, (awaited.to_owned(), vec![list.clone()]), records];
    }
    let events = format!(
        "SELECT {} FROM json_each(?) j CROSS JOIN {WAITING} ON e.run = j.value->>0 AND e.number > j.value->>1
             AND e.taken_at IS NULL ORDER BY j.key, e.number",
        rows::EVENT
    );
    let awaited = format!("{awaited} WHERE t.status IS NULL OR t.status IN {FINISHED}");
    vec![processes, (events, vec![wanted(load)]), (awaited, vec![list.clone()])]
}

/// How many bytes of JSON a row of the nth statement holds.
pub(crate) fn weight(statement: usize, row: &SqliteRow) -> usize {
    let bytes = |column| get::<Option<&str>>(row, column).ok().flatten().map_or(0, str::len);
    match statement {
        0 => bytes(4) + bytes(5),
        1 => bytes(3),
        2 => bytes(3),
        _ => bytes(6),
    }
}

/// How many bytes the runs come to.
pub(crate) fn weigh(load: &Load) -> (String, Vec<Arg>) {
    let row = Scales::ROW;
    let of = |what: &str, from: &str| format!("(SELECT coalesce(sum(octet_length({what}) + {row}), 0) FROM {from})");
    let mut parts = vec![
        format!("octet_length(p.input) + coalesce(octet_length(p.output), 0) + {row}"),
        of(
            "e.payload",
            "durable_events e INDEXED BY durable_events_waiting
                 WHERE e.run = p.run AND e.number > j.value->>1 AND e.taken_at IS NULL",
        ),
        of(
            "coalesce(t.output, '')",
            "durable_waiters w LEFT JOIN durable_processes t ON t.run = w.target WHERE w.waiter = p.run",
        ),
    ];
    if load.records {
        parts.push(of("s.payload", "durable_steps s WHERE s.run = p.run"));
    }
    let sql = format!(
        "SELECT p.run, {} FROM json_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0",
        parts.join(" + ")
    );
    (sql, vec![wanted(load)])
}

pub(crate) fn weights(answers: &[Answer]) -> Result<Vec<(RunId, usize)>> {
    let weight =
        |row: &SqliteRow| Ok((rows::run(row, 0)?, usize::try_from(get::<i64>(row, 1)?).map_err(StorageError::schema)?));
    all(answers).map(weight).collect()
}

/// Sorts the rows of a load by run. A run whose rows cannot be understood says so, alone.
pub(crate) fn loaded(load: &Load, answers: &[Answer]) -> Result<Vec<Loaded>> {
    let [processes, events, targets, rest @ ..] = answers else {
        return Err(StorageError::schema("a load has too few answers"));
    };
    let asked: HashSet<RunId> = load.ids().collect();
    // Every row was found by its run.
    let run = |row| match rows::run(row, 0) {
        Ok(run) if asked.contains(&run) => Ok(run),
        Ok(run) => Err(StorageError::damaged(damaged(&format!("rows of {run} stand where others should")))),
        Err(why) => Err(StorageError::damaged(damaged(&why))),
    };
    let mut states: HashMap<RunId, RunState> = HashMap::new();
    let mut broken: HashMap<RunId, String> = HashMap::new();
    for row in &processes.rows {
        let run = run(row)?;
        match rows::process(row) {
            Ok(process) => {
                states.insert(run, RunState::of(process));
            }
            Err(error) => {
                broken.insert(run, error.to_string());
            }
        }
    }
    let mut sort = |row, result: Result<Part>| -> Result<()> {
        let run = run(row)?;
        match (states.get_mut(&run), result) {
            (Some(state), Ok(Part::Event(event))) => state.events.push(event),
            (Some(state), Ok(Part::Target(Some(target)))) => state.targets.push(target),
            (Some(state), Ok(Part::Record(record))) => state.records.push(record),
            (_, Err(error)) => {
                broken.entry(run).or_insert_with(|| error.to_string());
            }
            _ => {}
        }
        Ok(())
    };
    for row in &events.rows {
        sort(row, rows::event(row).map(Part::Event))?;
    }
    for row in &targets.rows {
        // One that cannot be understood has not ended, as far as those go that await it.
        sort(row, Ok(Part::Target(readable(target(row)))))?;
    }
    for row in rest.iter().flat_map(|answer| &answer.rows) {
        sort(row, rows::record(row).map(Part::Record))?;
    }
    let one = |run: RunId| Loaded {
        run,
        state: match broken.remove(&run) {
            Some(why) => Err(why),
            None => Ok(states.remove(&run)),
        },
    };
    Ok(load.ids().map(one).collect())
}

enum Part {
    Event(EventRow),
    Target(Option<Target>),
    Record((RecordKey, Record)),
}

fn target(row: &SqliteRow) -> Result<Target> {
    if matches!(get::<Option<&str>>(row, 2), Ok(None)) {
        return Ok(Target { run: rows::run(row, 1)?, id: "".into(), fate: Fate::Gone });
    }
    let (run, status) = rows::standing(row, 1, 2)?;
    let output = get::<Option<&str>>(row, 3)?.map(boxed);
    let at = || rows::time("finished_at", get(row, 5)?);
    let fate = if status.is_finished() { Fate::Ended((status, output), at()?) } else { Fate::Open };
    Ok(Target { run, id: boxed(get(row, 4)?), fate })
}
