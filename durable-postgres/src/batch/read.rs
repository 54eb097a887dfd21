//! What became of operations, where it is not what was wanted.

use durable_core::storage::{Finish, Op, Outcome, RecordOp, Result, RunId, Sorted, Spawned, Start, StorageError};
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::{HashMap, HashSet};

use super::Of;
use super::parts::{self, record_rows, starts};
use crate::rows::{boxed, get, run, uuids};
use crate::sql::{Commits, Sql};

/// The place, from 0, of the row of the batch that a row answers.
pub(super) fn place(row: &PgRow) -> Result<usize> {
    usize::try_from(get::<i64>(row, 0)? - 1).map_err(StorageError::schema)
}

/// The outcomes that rows stand for, by their places. A row of another process that cannot be understood is told to
/// whoever asked about that process, and to nobody else.
pub(super) fn by_place(rows: &[PgRow], outcome: impl Fn(&PgRow) -> Result<Outcome>) -> Result<HashMap<usize, Outcome>> {
    let one = |row: &PgRow| Ok((place(row)?, outcome(row).unwrap_or_else(|why| Outcome::Unreadable(why.to_string()))));
    rows.iter().map(one).collect()
}

/// The outcome of a start that went as it should.
pub(super) fn new((spawn, _): &Start<'_>) -> Outcome {
    let (run, kind, digest) = (spawn.run, spawn.kind.clone(), spawn.digest.clone());
    Outcome::Spawned(Spawned { run, existed: false, kind, digest })
}

/// What the ids of starts have now: the run that was asked for, if it is there, else the current one.
pub(super) async fn existing(
    connection: &mut PgConnection,
    of: &Of<'_>,
    spawns: &[(usize, Start<'_>)],
) -> Result<HashMap<usize, Outcome>> {
    let mut sql = Sql::default();
    sql.text = existing_text(&mut sql, of, spawns);
    let rows = sql.run(connection, Commits::No).await?;
    by_place(&rows, |row| {
        let (run, existed) = (run(row, 1)?, get(row, 4)?);
        Ok(Outcome::Spawned(Spawned { run, existed, kind: boxed(get(row, 2)?), digest: boxed(get(row, 3)?) }))
    })
}

pub(super) fn existing_text(sql: &mut Sql, of: &Of<'_>, spawns: &[(usize, Start<'_>)]) -> String {
    let namespace = sql.bind(of.namespace);
    let j = starts(sql, spawns);
    let (existing, current) = (parts::existing(of, "j.run"), parts::current(of, &namespace, "j.id"));
    format!(
        "SELECT j.ord, p.run, p.kind, p.input_digest, p.run <> j.run FROM {j} JOIN {of}.processes p
             ON p.run = coalesce({existing}, {current})"
    )
}

/// The places of those records that are not in the database as they were sent. Only this instance writes records of its
/// runs, so a look after the commit is as good as one within.
pub(super) async fn lost(
    connection: &mut PgConnection,
    of: &Of<'_>,
    records: &[(usize, &RecordOp)],
) -> Result<Vec<usize>> {
    let mut sql = Sql::default();
    sql.text = lost_text(&mut sql, of, records);
    let rows = sql.run(connection, Commits::No).await?;
    let mut lost = Vec::new();
    for row in &rows {
        lost.extend(records.get(place(row)?).map(|(at, _)| *at));
    }
    Ok(lost)
}

pub(super) fn lost_text(sql: &mut Sql, of: &Of<'_>, records: &[(usize, &RecordOp)]) -> String {
    let j = record_rows(sql, records);
    format!(
        "SELECT j.ord FROM {j} WHERE (SELECT s.claim = j.claim AND s.seq = j.seq AND s.state = j.state FROM {of}.steps s
             WHERE s.run = j.run AND s.scope = j.scope AND s.name = j.name AND s.key = j.key) IS NOT TRUE"
    )
}

/// How a run stands that was not changed as it should have been.
struct State {
    status: String,
    claim: i64,
    calm: i64,
    signals: i64,
    owned: bool,
    mine: bool,
}

async fn states(connection: &mut PgConnection, of: &Of<'_>, runs: Vec<RunId>) -> Result<HashMap<RunId, State>> {
    let mut sql = Sql::default();
    sql.text = states_text(&mut sql, of, runs);
    let state = |row: &PgRow| {
        let (status, claim, calm, signals) = (get(row, 1)?, get(row, 2)?, get(row, 3)?, get(row, 4)?);
        Ok((run(row, 0)?, State { status, claim, calm, signals, owned: get(row, 5)?, mine: get(row, 6)? }))
    };
    sql.run(connection, Commits::No).await?.iter().map(state).collect()
}

pub(super) fn states_text(sql: &mut Sql, of: &Of<'_>, runs: Vec<RunId>) -> String {
    let (me, runs) = (sql.bind(of.instance), sql.bind(uuids(runs)));
    format!(
        "SELECT p.run, p.status, p.claim, p.calm_claim, p.signals, p.owner IS NOT NULL,
             p.owner IS NOT NULL AND p.owner = {me}
         FROM {of}.processes p WHERE p.run = ANY ({runs})"
    )
}

/// Notes the outcomes of changes of owned rows, of which these have been made. The others may have been by an earlier
/// attempt of this batch.
pub(super) async fn owned(
    connection: &mut PgConnection,
    of: &Of<'_>,
    sorted: &Sorted<'_>,
    made: &HashSet<RunId>,
    note: &mut impl FnMut(usize, Outcome),
) -> Result<()> {
    let missing: Vec<RunId> = sorted.owned().into_iter().filter(|run| !made.contains(run)).collect();
    let states = if missing.is_empty() { HashMap::new() } else { states(connection, of, missing).await? };
    let plain = |run: &RunId| if made.contains(run) { Outcome::Recorded } else { Outcome::Lost };
    for (at, ((run, _), _)) in &sorted.accepts {
        note(*at, plain(run));
    }
    for (at, ((run, _), _)) in &sorted.seen {
        note(*at, plain(run));
    }
    for (at, finish) in &sorted.finishes {
        let Finish { run, claim, status, .. } = finish;
        let before = states.get(run).is_some_and(|s| s.claim == *claim && s.status == status.as_str() && !s.owned);
        let ended = made.contains(run) || before;
        note(*at, if ended { Outcome::Finished { wakes: Vec::new() } } else { Outcome::Lost });
    }
    for (at, park) in &sorted.parks {
        note(
            *at,
            match states.get(&park.run) {
                _ if made.contains(&park.run) => Outcome::Recorded,
                Some(state) if state.mine && state.claim == park.claim => Outcome::Signalled(state.signals),
                Some(state) if state.calm >= park.claim - park.deaths => Outcome::Recorded,
                _ => Outcome::Lost,
            },
        );
    }
    Ok(())
}

/// Every operation has its outcome.
pub(super) fn complete(ops: &[Op], outcomes: Vec<Option<Outcome>>) -> Result<Vec<Outcome>> {
    debug_assert_eq!(ops.len(), outcomes.len());
    let missing = || StorageError::schema("a batch has an operation that this version does not know");
    outcomes.into_iter().map(|outcome| outcome.ok_or_else(missing)).collect()
}

/// The runs of rows that say in their second column that they are the instance's.
pub(super) fn mine(rows: &[PgRow]) -> Vec<RunId> {
    let mine = |row: &PgRow| get::<bool>(row, 1).ok().filter(|mine| *mine).and_then(|_| run(row, 0).ok());
    rows.iter().filter_map(mine).collect()
}
