//! A batch as one statement: the parts that are in it, as `WITH` queries.
//!
//! All of them see one snapshot, none sees what another one writes, and no row may be changed by two of them. Which of
//! them can be together:
//!
//! - Starts insert rows that nobody else in the batch can know: their runs are only told when it is committed.
//! - Records, and the messages that they consume, change rows of their own, those that replace one and those that do not:
//!   where one of the latter finds one after all, nothing is written, and the transaction judges. They ask the process's row for its owner,
//!   and get the owner from before the batch: in order too they would come before ends and parks. The engine lets no
//!   record join a batch behind its run's end or park.
//! - Ends, parks, accepted cancellations and seen signals change each process's row once: of those the engine takes one
//!   for each run into a batch.
//! - Claims choose among rows that wait by the snapshot; the others change rows that somebody owns.
//!
//! - Messages change the rows of processes that are named by their ids, which may be those of any run: they go with
//!   starts and records alone. One to a process that is started in the same batch is not put in, and found below.
//!
//! What does not fit: the end of a process that others await (they may be ending or parking in the same batch), and
//! orders. Nor does it tell why a message was not put in: then the whole batch is written once more, as a transaction
//! that finds everything else done.

use durable_core::storage::{Claimed, Op, Outcome, Prepared, Raised, RecordOp, Result, RunId, Sorted, StorageError};
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::HashSet;
use uuid::Uuid;

use super::parts::{self, Payload, Standing};
use super::{Of, mail, read};
use crate::errors::is_duplicate;
use crate::rows::{get, uuids};
use crate::sql::{Commits, Sql};

pub(super) fn fits(sorted: &Sorted<'_>) -> bool {
    let plain_starts = sorted.spawns.iter().all(|(_, (spawn, from))| from.is_none() && !spawn.restart_finished);
    let plain_raises = sorted.raises.iter().all(|(_, (_, from))| from.is_none());
    let others_rows = sorted.owned().is_empty() && sorted.claims.is_empty();
    plain_starts
        && plain_raises
        && (sorted.raises.is_empty() || others_rows)
        && sorted.awaits.is_empty()
        && sorted.orders.is_empty()
        && sorted.claims.len() <= 1
}

/// What a column of the answer tells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// How many.
    Spawned,
    Recorded,
    /// How many were put in; and of those that were about to be: which messages, of which runs, with which numbers, and
    /// whose: five columns.
    Raised,
    /// Which runs.
    Owned,
    /// Which runs, and under which claims: two columns.
    Claimed,
}

pub(super) struct Statement {
    pub(super) sql: Sql,
    /// Nothing if the number of rows that it has written tells all.
    told: Option<Vec<Told>>,
}

/// Records alone, none of which replaces one: what a process does by itself most of the time.
fn records(of: &Of<'_>, sorted: &Sorted<'_>) -> Statement {
    let mut sql = Sql::default();
    let gate = format!("EXISTS ({})", parts::fence(&mut sql, of));
    sql.text = match &sorted.records[..] {
        [(_, record)] => parts::recorded_alone(&mut sql, of, record, &gate),
        records => parts::recorded(&mut sql, of, records, &Payload::GIVEN, Standing::Refused, &gate),
    };
    Statement { sql, told: None }
}

pub(super) fn statement(of: &Of<'_>, ops: &[Op], sorted: &Sorted<'_>) -> Statement {
    const GATE: &str = "EXISTS (SELECT 1 FROM clear)";
    let new = |(_, record): &(usize, &RecordOp)| !record.replaces;
    let alone = |(_, record): &(usize, &RecordOp)| record.takes.is_none() && record.awaited.is_none();
    let records_alone = !ops.is_empty() && sorted.records.len() == ops.len();
    if records_alone && sorted.records.iter().all(|record| new(record) && alone(record)) {
        return records(of, sorted);
    }
    let mut sql = Sql::default();
    let mut with = vec![format!("fence AS MATERIALIZED ({})", parts::fence(&mut sql, of))];
    let mut columns = Vec::new();
    let mut told = Vec::new();
    // Nothing is written before the fence is held. Where rows of processes are changed they are locked first, in their
    // order; and as they are now: somebody may have come to await one of them since the snapshot, and is missing in it.
    let owned = sorted.owned();
    if !sorted.raises.is_empty() {
        let queries = mail::put(&mut sql, of, &sorted.raises, "EXISTS (SELECT 1 FROM fence)");
        with.extend(queries.map(|(name, query)| format!("{name} ({query})")));
        with.push("clear AS MATERIALIZED (SELECT 1 FROM fence WHERE (SELECT count(*) FROM target) >= 0)".to_owned());
        columns.push("(SELECT count(*) FROM put)".to_owned());
        for column in ["ord", "run", "number", "mine"] {
            columns.push(format!("(SELECT array_agg({column}) FROM fresh)"));
        }
        told.push(Told::Raised);
    } else if owned.is_empty() {
        with.push("clear AS MATERIALIZED (SELECT 1 FROM fence)".to_owned());
    } else {
        let (owned, ending) = (sql.bind(uuids(owned)), sql.bind(uuids(sorted.ending())));
        with.push(format!(
            "held AS MATERIALIZED (SELECT run, awaited FROM {of}.processes WHERE run = ANY ({owned})
                 AND EXISTS (SELECT 1 FROM fence) ORDER BY run FOR NO KEY UPDATE)"
        ));
        with.push(format!(
            "clear AS MATERIALIZED (SELECT 1 FROM fence
                 WHERE NOT EXISTS (SELECT 1 FROM held WHERE awaited AND run = ANY ({ending})))"
        ));
    }
    let mut part = |name: &str, body: String| with.push(format!("{name} AS ({body})"));
    let count = |name: &str| format!("(SELECT count(*) FROM {name})");
    let runs = |name: &str| format!("(SELECT array_agg(run) FROM {name})");
    if !sorted.spawns.is_empty() {
        part("spawned", parts::spawned(&mut sql, of, &sorted.spawns, GATE));
        columns.push(count("spawned"));
        told.push(Told::Spawned);
    }
    if !sorted.records.is_empty() {
        let mut written = Vec::new();
        let (first, again): (Vec<_>, Vec<_>) = sorted.records.iter().partition(|record| new(record));
        for (name, records, standing) in [("recorded", first, Standing::Refused), ("replaced", again, Standing::Judged)]
        {
            if !records.is_empty() {
                let body = parts::recorded(&mut sql, of, &records, &Payload::GIVEN, standing, GATE);
                part(name, body + " RETURNING 1");
                written.push(count(name));
            }
        }
        columns.push(written.join(" + "));
        told.push(Told::Recorded);
    }
    if let Some(taken) = parts::taken(&mut sql, of, &sorted.records, GATE) {
        part("taken", taken);
    }
    if let Some(awaited) = parts::awaited(&mut sql, of, &sorted.records, GATE) {
        part("unawaited", awaited);
    }
    let mut owned = |name: &str, body: String| {
        part(name, body);
        columns.push(runs(name));
        told.push(Told::Owned);
    };
    if !sorted.accepts.is_empty() {
        owned("accepted", parts::accepted(&mut sql, of, &sorted.accepts, GATE));
    }
    if !sorted.seen.is_empty() {
        owned("seen", parts::seen(&mut sql, of, &sorted.seen, GATE));
    }
    if !sorted.finishes.is_empty() {
        owned("finished", parts::finished(&mut sql, of, &sorted.finishes, GATE));
    }
    if !sorted.parks.is_empty() {
        owned("parked", parts::parked(&mut sql, of, &sorted.parks, GATE));
    }
    if !sorted.finishes.is_empty() {
        let ending = sql.bind(uuids(sorted.ending()));
        let ended = format!("SELECT f.run FROM finished f WHERE f.run = ANY ({ending})");
        part("unwaiting", parts::unwaiting(of, &ended, GATE));
    }
    if let [(_, (kind, limit))] = sorted.claims[..] {
        let [due, claimed] = parts::claimed(&mut sql, of, kind, limit, GATE);
        with.push(format!("due AS MATERIALIZED ({due})"));
        with.push(format!("claimed AS ({claimed})"));
        columns.push(runs("claimed"));
        columns.push("(SELECT array_agg(claim) FROM claimed)".to_owned());
        told.push(Told::Claimed);
    }
    let (with, columns) = (with.join(",\n"), columns.iter().map(|column| format!(",\n{column}")).collect::<String>());
    sql.text = format!("WITH {with}\nSELECT EXISTS (SELECT 1 FROM fence), EXISTS (SELECT 1 FROM clear){columns}");
    Statement { sql, told: Some(told) }
}

/// What came of it.
pub(super) enum Answer {
    Done(Vec<Outcome>),
    /// Nothing is written: an end must look for those that await it, a record for the one that stands there, or the fence
    /// does not hold.
    Nothing,
    /// A message or a record was not put in, and why must be found out: all else is written.
    Partly,
}

/// Commits it.
pub(super) async fn commit(
    connection: &mut PgConnection,
    of: &Of<'_>,
    ops: &[Op],
    sorted: &Sorted<'_>,
    prepared: &Prepared,
) -> Result<Answer> {
    let Statement { sql, told } = prepared.take().unwrap_or_else(|| statement(of, ops, sorted));
    let Some(told) = told else {
        return Ok(match sql.write(connection).await {
            Ok(written) if usize::try_from(written) == Ok(ops.len()) => {
                Answer::Done(vec![Outcome::Recorded; ops.len()])
            }
            Ok(0) => Answer::Nothing,
            Ok(_) => Answer::Partly,
            Err(error) if is_duplicate(&error) => Answer::Nothing,
            Err(error) => return Err(error),
        });
    };
    let rows = match sql.run(connection, Commits::Yes).await {
        Err(error) if is_duplicate(&error) => return Ok(Answer::Nothing),
        rows => rows?,
    };
    let Some(row) = rows.first() else { return Err(StorageError::unknown("a batch has no answer")) };
    // From here on it is committed; whatever goes wrong with the answers does not undo it.
    let unknown = |error: StorageError| StorageError::unknown(error.to_string());
    let (fence, clear): (bool, bool) = (get(row, 0).map_err(unknown)?, get(row, 1).map_err(unknown)?);
    if !fence {
        return Err(StorageError::Fenced);
    }
    if !clear {
        return Ok(Answer::Nothing);
    }
    outcomes(connection, of, ops, sorted, row, &told).await.map_err(unknown)
}

async fn outcomes(
    connection: &mut PgConnection,
    of: &Of<'_>,
    ops: &[Op],
    sorted: &Sorted<'_>,
    row: &PgRow,
    told: &[Told],
) -> Result<Answer> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; ops.len()];
    let mut made: HashSet<RunId> = HashSet::new();
    let mut column = 2;
    for told in told {
        let all = |of: usize| -> Result<bool> { Ok(usize::try_from(get::<i64>(row, column)?) == Ok(of)) };
        match told {
            Told::Spawned => {
                let mut existing = if all(sorted.spawns.len())? {
                    None
                } else {
                    Some(read::existing(connection, of, &sorted.spawns).await?)
                };
                for (nth, (at, start)) in sorted.spawns.iter().enumerate() {
                    outcomes[*at] = Some(match &mut existing {
                        None => read::new(start),
                        // Neither this start nor the process that was in its way: deleted meanwhile. The same again
                        // will tell.
                        Some(existing) => existing
                            .remove(&nth)
                            .ok_or_else(|| StorageError::unavailable("a process was deleted meanwhile"))?,
                    });
                }
            }
            Told::Raised => {
                let places = get::<Option<Vec<i64>>>(row, column + 1)?.unwrap_or_default();
                if places.len() != sorted.raises.len() || !all(places.len())? {
                    return Ok(Answer::Partly);
                }
                let runs = get::<Vec<Uuid>>(row, column + 2)?;
                let numbers = get::<Vec<i64>>(row, column + 3)?;
                let mine = get::<Vec<bool>>(row, column + 4)?;
                for (((place, run), number), mine) in places.into_iter().zip(runs).zip(numbers).zip(mine) {
                    let nth = usize::try_from(place - 1).map_err(StorageError::schema)?;
                    let (at, _) = sorted.raises.get(nth).ok_or_else(|| StorageError::schema("no such message"))?;
                    outcomes[*at] = Some(Outcome::Raised(Raised::Delivered { run: RunId(run), number, mine }));
                }
                column += 4;
            }
            Told::Recorded => {
                let lost = if all(sorted.records.len())? {
                    Vec::new()
                } else {
                    read::lost(connection, of, &sorted.records).await?
                };
                for (at, _) in &sorted.records {
                    outcomes[*at] = Some(if lost.contains(at) { Outcome::Lost } else { Outcome::Recorded });
                }
            }
            Told::Owned => {
                made.extend(get::<Option<Vec<Uuid>>>(row, column)?.unwrap_or_default().into_iter().map(RunId))
            }
            Told::Claimed => {
                let runs = get::<Option<Vec<Uuid>>>(row, column)?.unwrap_or_default();
                column += 1;
                let claims = get::<Option<Vec<i64>>>(row, column)?.unwrap_or_default();
                let claimed = runs.into_iter().zip(claims).map(|(run, claim)| Claimed { run: RunId(run), claim });
                if let [(at, _)] = sorted.claims[..] {
                    outcomes[at] = Some(Outcome::Claimed(claimed.collect()));
                }
            }
        }
        column += 1;
    }
    read::owned(connection, of, sorted, &made, &mut |at, outcome| outcomes[at] = Some(outcome)).await?;
    read::complete(ops, outcomes).map(Answer::Done)
}
