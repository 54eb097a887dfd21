use durable_core::storage::{
    Batch, Claimed, Effect, Finish, Op, Outcome, Park, Raised, RecordOp, Result, RunId, Spawned, Status, StorageError,
};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use std::collections::{HashMap, HashSet};

use crate::cells::{Rows, cells};
use crate::rows::{boxed, get, of, run, standing};
use crate::script::{Answer, Script};

/// What an answer is for: the places of the operations, in the order of their rows.
pub(super) enum Part {
    Spawns { at: Vec<usize>, existing: usize },
    Raises { at: Vec<usize>, answers: usize },
    Records { at: Vec<usize>, written: usize },
    Awaits { at: Vec<usize>, answers: usize },
    Owned { at: Vec<(usize, RunId)>, answers: usize },
    Finishes { at: Vec<usize>, finished: usize, wakes: usize },
    Parks { at: Vec<usize>, parked: usize },
    Asked { at: usize, before: usize, wakes: Vec<usize> },
    Claimed { at: usize, answers: usize },
}

/// The answers to outcomes, in the order of the batch. It is committed by now: a row of another process that cannot be
/// understood is told to whoever asked about that process, and to nobody else.
pub(super) async fn read(
    connection: &mut SqliteConnection,
    batch: &Batch,
    parts: Vec<Part>,
    answers: &mut [Answer],
) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; batch.ops.len()];
    let mut lost: HashSet<usize> = HashSet::new();
    let mut rows = |at: usize| answers.get_mut(at).map(std::mem::take).unwrap_or_default();
    for part in parts {
        match part {
            Part::Spawns { at, existing } => {
                let others = by_key(&rows(existing).rows, |row| {
                    let kind_and_digest = || Ok((boxed(get(row, 2)?), boxed(get(row, 3)?)));
                    let (kind, digest) = of("durable_processes", row, &[1], kind_and_digest())?;
                    Ok(Outcome::Spawned(Spawned { run: run(row, 1)?, existed: true, kind, digest }))
                })?;
                answer(&mut outcomes, at, others, |at| match &batch.ops[at] {
                    Op::Spawn(spawn) | Op::Record(RecordOp { effect: Some(Effect::Spawn(spawn)), .. }) => {
                        let (run, kind, digest) = (spawn.run, spawn.kind.clone(), spawn.digest.clone());
                        Outcome::Spawned(Spawned { run, existed: false, kind, digest })
                    }
                    _ => Outcome::Lost,
                });
            }
            Part::Raises { at, answers: statement } => {
                let delivered = by_key(&rows(statement).rows, |row| {
                    Ok(Outcome::Raised(match get::<Option<i64>>(row, 2)? {
                        Some(number) => Raised::Delivered { run: run(row, 1)?, number, mine: get(row, 3)? },
                        None => Raised::Finished,
                    }))
                })?;
                answer(&mut outcomes, at, delivered, |_| Outcome::Raised(Raised::NotFound));
            }
            Part::Records { at, written } => {
                if rows(written).changes != at.len() as u64 {
                    lost.extend(lost_records(connection, batch, &at).await?);
                }
                for at in at {
                    outcomes[at].get_or_insert(Outcome::Recorded);
                }
            }
            Part::Awaits { at, answers: statement } => {
                let targets = by_key(&rows(statement).rows, |row| {
                    let (run, status) = standing(row, 1, 2)?;
                    let output = get::<Option<&str>>(row, 3)?.map(boxed);
                    Ok(Outcome::Awaits(Some((run, status.is_finished().then_some((status, output))))))
                })?;
                answer(&mut outcomes, at, targets, |_| Outcome::Awaits(None));
            }
            Part::Owned { at, answers: statement } => {
                let owned: HashSet<RunId> = rows(statement).rows.iter().filter_map(|row| run(row, 0).ok()).collect();
                for (at, run) in at {
                    outcomes[at] = Some(if owned.contains(&run) { Outcome::Recorded } else { Outcome::Lost });
                }
            }
            Part::Finishes { at, finished, wakes } => {
                let complete = rows(finished).changes == at.len() as u64;
                let mut wakes = mine(&rows(wakes).rows);
                // Where not all were finished now, some may have been by an earlier attempt of this batch.
                let states = if complete { HashMap::new() } else { states(connection, batch).await? };
                for at in at {
                    let Op::Finish(finish) = &batch.ops[at] else { continue };
                    let before = states.get(&finish.run).is_some_and(|state| {
                        state.claim == finish.claim && state.status == finish.status.as_str() && !state.owned
                    });
                    let wakes = std::mem::take(&mut wakes);
                    outcomes[at] = Some(if complete || before { Outcome::Finished { wakes } } else { Outcome::Lost });
                }
            }
            Part::Parks { at, parked } => {
                let complete = rows(parked).changes == at.len() as u64;
                let states = if complete { HashMap::new() } else { states(connection, batch).await? };
                for at in at {
                    let Op::Park(park) = &batch.ops[at] else { continue };
                    outcomes[at] = Some(match states.get(&park.run) {
                        _ if complete => Outcome::Recorded,
                        Some(state) if state.mine && state.claim == park.claim => Outcome::Signalled(state.signals),
                        Some(state) if state.calm >= park.claim - park.deaths => Outcome::Recorded,
                        _ => Outcome::Lost,
                    });
                }
            }
            Part::Asked { at, before, wakes } => {
                let before = rows(before).rows;
                let more = before.first().map(|row| get(row, 2)).transpose()?.unwrap_or(false);
                let before: Result<Option<(RunId, Status)>> = before.first().map(|row| standing(row, 0, 1)).transpose();
                let wakes = wakes.into_iter().flat_map(|statement| mine(&rows(statement).rows)).collect();
                outcomes[at] = Some(match before {
                    Ok(before) => Outcome::Asked { before, wakes, again: false, more },
                    Err(why) => Outcome::Unreadable(why.to_string()),
                });
            }
            Part::Claimed { at, answers: statement } => {
                let claimed = |row: &SqliteRow| match (run(row, 0), get(row, 1)) {
                    (Ok(run), Ok(claim)) => Some(Claimed { run, claim }),
                    (Err(why), _) | (_, Err(why)) => {
                        tracing::error!("a process that was claimed cannot be run: {why}");
                        None
                    }
                };
                outcomes[at] = Some(Outcome::Claimed(rows(statement).rows.iter().filter_map(claimed).collect()));
            }
        }
    }
    for at in lost {
        outcomes[at] = Some(Outcome::Lost);
    }
    let missing = || StorageError::schema("a batch has an operation that this version does not know");
    outcomes.into_iter().map(|outcome| outcome.ok_or_else(missing)).collect()
}

/// The outcomes that rows stand for, by their places in the JSON array.
fn by_key(rows: &[SqliteRow], outcome: impl Fn(&SqliteRow) -> Result<Outcome>) -> Result<HashMap<usize, Outcome>> {
    let one =
        |row: &SqliteRow| Ok((key(row)?, outcome(row).unwrap_or_else(|why| Outcome::Unreadable(why.to_string()))));
    rows.iter().map(one).collect()
}

/// Notes the outcomes of the operations at these places; `absent` is that of one that no row stands for.
fn answer(
    outcomes: &mut [Option<Outcome>],
    at: Vec<usize>,
    mut rows: HashMap<usize, Outcome>,
    absent: impl Fn(usize) -> Outcome,
) {
    for (nth, at) in at.into_iter().enumerate() {
        outcomes[at] = Some(rows.remove(&nth).unwrap_or_else(|| absent(at)));
    }
}

/// The place in the JSON array that a row answers.
fn key(row: &SqliteRow) -> Result<usize> {
    usize::try_from(get::<i64>(row, 0)?).map_err(StorageError::schema)
}

/// The runs of rows that say that they are the instance's.
fn mine(rows: &[SqliteRow]) -> Vec<RunId> {
    let mine = |row: &SqliteRow| get::<bool>(row, 1).ok().filter(|mine| *mine).and_then(|_| run(row, 0).ok());
    rows.iter().filter_map(mine).collect()
}

/// Those of the records that are not in the database as they were sent. Only this instance writes records of its runs,
/// so a look after the commit is as good as one within.
async fn lost_records(connection: &mut SqliteConnection, batch: &Batch, at: &[usize]) -> Result<Vec<usize>> {
    let mut rows = Rows::default();
    for at in at {
        if let Op::Record(RecordOp { run, key, claim, state, seq, .. }) = &batch.ops[*at] {
            rows.push(cells![run.0, key.scope as i64, &key.name, &key.key, *claim, state.as_str(), i64::from(*seq)]);
        }
    }
    let mut script = Script::default();
    script.add(
        "SELECT j.key FROM jsonb_each(?) j WHERE NOT EXISTS (SELECT 1 FROM durable_steps s
             WHERE s.run = j.value->>0 AND s.scope = j.value->>1 AND s.name = j.value->>2 AND s.key = j.value->>3
                 AND s.claim = j.value->>4 AND s.state = j.value->>5 AND s.seq = j.value->>6)",
        [rows.arg()],
    );
    let mut lost = Vec::new();
    for row in script.run(connection).await?.iter().flat_map(|answer| &answer.rows) {
        lost.extend(at.get(key(row)?));
    }
    Ok(lost)
}

/// How a run stands that was not changed as it should have been.
struct State {
    status: String,
    claim: i64,
    calm: i64,
    signals: i64,
    owned: bool,
    /// Owned by the batch's instance.
    mine: bool,
}

/// How the runs of a batch's ends and parks stand.
async fn states(connection: &mut SqliteConnection, batch: &Batch) -> Result<HashMap<RunId, State>> {
    let mut runs = Rows::default();
    for op in &batch.ops {
        if let Op::Finish(Finish { run, .. }) | Op::Park(Park { run, .. }) = op {
            runs.push(cells![run.0]);
        }
    }
    let mut script = Script::default();
    script.add(
        "SELECT p.run, p.status, p.claim, p.calm_claim, p.signals, p.owner IS NOT NULL, p.owner IS NOT NULL AND p.owner = ?
         FROM jsonb_each(?) j CROSS JOIN durable_processes p ON p.run = j.value->>0",
        [batch.fence.instance.to_string().into(), runs.arg()],
    );
    let state = |row: &SqliteRow| {
        let status = get(row, 1)?;
        let (claim, calm, signals) = (get(row, 2)?, get(row, 3)?, get(row, 4)?);
        Ok((run(row, 0)?, State { status, claim, calm, signals, owned: get(row, 5)?, mine: get(row, 6)? }))
    };
    script.run(connection).await?.iter().flat_map(|answer| &answer.rows).map(state).collect()
}
