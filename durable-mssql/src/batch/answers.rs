//! What a script tells of what it has done.

use durable_core::storage::{Claimed, Finish, Op, Outcome, Raised, Result, RunId, Sorted, Spawned, StorageError, What};
use std::collections::{HashMap, HashSet};
use tiberius::Row;
use uuid::Uuid;

use super::{COMMITTED, Committed, INBOX, judge};
use crate::rows::{get, maybe, maybe_id, maybe_text, run, standing, text};

/// What is told, a row each: which part tells it, the operation's place, and what.
pub(super) const TABLE: &str = "@out TABLE (part INT NOT NULL, ord BIGINT NULL, run BINARY(16) NULL, \
    owner BINARY(16) NULL, a BIGINT NULL, b BIGINT NULL, c BIGINT NULL, text NVARCHAR(MAX) NULL, more NVARCHAR(MAX) NULL)";
pub(super) const SELECT: &str = "SELECT o.part, o.ord, o.run, o.a, o.b, o.c, o.owner, o.text, o.more FROM @out AS o";

/// A start found this: run, existed, kind, digest.
pub(super) const EXISTING: i32 = 1;
/// A message's process: run, number, unfinished, owner.
pub(super) const DELIVERED: i32 = 2;
/// A record is not there.
pub(super) const LOST: i32 = 3;
/// What is awaited: run, status, output.
pub(super) const AWAITED: i32 = 4;
/// An owned run was changed.
pub(super) const MADE: i32 = 5;
/// One was not, and stands so: owner, claim, calm claim, signals, status.
pub(super) const STATE: i32 = 6;
/// A run was signalled by an end: its owner.
pub(super) const WOKEN: i32 = 7;
/// What an order found: run, whether it has more former runs than go at once, status.
pub(super) const BEFORE: i32 = 8;
/// A process is the instance's, under this claim.
pub(super) const CLAIMED: i32 = 9;
/// A run was signalled by an order: its owner.
pub(super) const ROUSED: i32 = 10;

struct State {
    status: Box<str>,
    claim: i64,
    calm: i64,
    signals: i64,
    owner: Option<Uuid>,
}

/// From here on all is committed, unless the verdict says otherwise: whatever is wrong with the answer does not undo it.
pub(super) fn committed(parts: &[Vec<Row>], me: Uuid, ops: &[Op], sorted: &Sorted<'_>) -> Result<Committed> {
    let unknown = |why: &dyn std::fmt::Display| StorageError::unknown(why.to_string());
    let first = parts.first().and_then(|rows| rows.first()).ok_or_else(|| unknown(&"a batch has no answer"))?;
    let (verdict, open): (i32, i32) =
        (get(first, 0).map_err(|why| unknown(&why))?, get(first, 1).map_err(|why| unknown(&why))?);
    if open != 0 {
        return Err(unknown(&"a batch has left its transaction open"));
    }
    match verdict {
        COMMITTED => {
            let told = parts.get(1).map(Vec::as_slice).unwrap_or_default();
            outcomes(told, me, ops, sorted).map(Committed::Done).map_err(|why| unknown(&why))
        }
        INBOX => Ok(Committed::Inbox),
        other => Err(judge(other)),
    }
}

fn outcomes(told: &[Row], me: Uuid, ops: &[Op], sorted: &Sorted<'_>) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; ops.len()];
    let mut lost: HashSet<usize> = HashSet::new();
    let mut made: HashSet<RunId> = HashSet::new();
    let mut states: HashMap<RunId, State> = HashMap::new();
    let (mut woken, mut roused) = (Vec::new(), Vec::new());
    let mut claimed: Vec<Claimed> = Vec::new();
    let mut before: HashMap<usize, Result<(RunId, durable_core::Status)>> = HashMap::new();
    let mut more: HashSet<usize> = HashSet::new();
    // A row of another process that cannot be understood is told to whoever asked about that process.
    let readable = |outcome: Result<Outcome>| Some(outcome.unwrap_or_else(|why| Outcome::Unreadable(why.to_string())));
    for row in told {
        match get(row, 0)? {
            EXISTING => outcomes[place(row, ops)?] = readable(existing(row)),
            DELIVERED => {
                let at = place(row, ops)?;
                outcomes[at] = Some(delivered(row, me, matches!(ops[at], Op::Record(_)))?);
            }
            LOST => {
                lost.insert(place(row, ops)?);
            }
            AWAITED => outcomes[place(row, ops)?] = readable(awaited(row)),
            MADE => {
                made.insert(run(row, 2)?);
            }
            STATE => {
                states.insert(run(row, 2)?, state(row)?);
            }
            WOKEN if maybe_id(row, 6)? == Some(me) => woken.push(run(row, 2)?),
            ROUSED if maybe_id(row, 6)? == Some(me) => roused.push(run(row, 2)?),
            WOKEN | ROUSED => {}
            BEFORE => {
                let at = place(row, ops)?;
                before.insert(at, standing(row, 2, 7));
                if get::<i64>(row, 3)? == 1 {
                    more.insert(at);
                }
            }
            CLAIMED => claimed.push(Claimed { run: run(row, 2)?, claim: get(row, 3)? }),
            other => return Err(StorageError::schema(format!("part {other} is not known"))),
        }
    }
    for (at, (spawn, from)) in &sorted.spawns {
        let new = || {
            let (run, kind, digest) = (spawn.run, spawn.kind.clone(), spawn.digest.clone());
            Outcome::Spawned(Spawned { run, existed: false, kind, digest })
        };
        // Found without an owner's word: neither it nor what was in its way is there.
        let missing = from.is_some() && lost.contains(at);
        outcomes[*at].get_or_insert_with(|| if missing { Outcome::Lost } else { new() });
    }
    for (at, _) in &sorted.raises {
        outcomes[*at].get_or_insert(Outcome::Raised(Raised::NotFound));
    }
    for (at, _) in sorted.all_records() {
        outcomes[*at].get_or_insert(Outcome::Recorded);
    }
    for at in lost {
        outcomes[at] = Some(Outcome::Lost);
    }
    for (at, _) in &sorted.awaits {
        outcomes[*at].get_or_insert(Outcome::Awaits(None));
    }
    owned(sorted, me, &made, &states, &mut outcomes);
    for (at, order) in &sorted.orders {
        let more = more.contains(at) && matches!(order.what, What::Delete);
        outcomes[*at] = Some(match before.remove(at).transpose() {
            Ok(before) => Outcome::Asked { before, wakes: Vec::new(), again: false, more },
            Err(why) => Outcome::Unreadable(why.to_string()),
        });
    }
    if let [(at, _)] = sorted.claims[..] {
        outcomes[at] = Some(Outcome::Claimed(claimed));
    }
    // Whom ends wake is told with the first of them, and likewise for orders.
    for outcome in outcomes.iter_mut().flatten() {
        match outcome {
            Outcome::Finished { wakes } => *wakes = std::mem::take(&mut woken),
            Outcome::Asked { wakes, .. } => *wakes = std::mem::take(&mut roused),
            _ => {}
        }
    }
    let missing = || StorageError::schema("a batch has an operation that this version does not know");
    outcomes.into_iter().map(|outcome| outcome.ok_or_else(missing)).collect()
}

fn place(row: &Row, ops: &[Op]) -> Result<usize> {
    let place = usize::try_from(get::<i64>(row, 1)?).map_err(StorageError::schema)?;
    if place < ops.len() { Ok(place) } else { Err(StorageError::schema(format!("there is no operation {place}"))) }
}

fn existing(row: &Row) -> Result<Outcome> {
    let existed = get::<i64>(row, 3)? == 1;
    Ok(Outcome::Spawned(Spawned { run: run(row, 2)?, existed, kind: text(row, 7)?, digest: text(row, 8)? }))
}

fn delivered(row: &Row, me: Uuid, durable: bool) -> Result<Outcome> {
    let unfinished = get::<i64>(row, 4)? == 1;
    Ok(Outcome::Raised(match maybe::<i64>(row, 3)? {
        Some(number) => Raised::Delivered { run: run(row, 2)?, number, mine: maybe_id(row, 6)? == Some(me) },
        // Its run took the place of another meanwhile. Again, from the start.
        None if unfinished && !durable => return Err(StorageError::unavailable("a process was restarted meanwhile")),
        None => Raised::Finished,
    }))
}

fn awaited(row: &Row) -> Result<Outcome> {
    let (run, status) = standing(row, 2, 7)?;
    let ended = if status.is_finished() { Some((status, maybe_text(row, 8)?)) } else { None };
    Ok(Outcome::Awaits(Some((run, ended))))
}

fn state(row: &Row) -> Result<State> {
    Ok(State {
        claim: get(row, 3)?,
        calm: get(row, 4)?,
        signals: get(row, 5)?,
        owner: maybe_id(row, 6)?,
        status: text(row, 7)?,
    })
}

/// Changes of owned rows, of which these have been made. The others may have been by an earlier attempt of this batch.
fn owned(
    sorted: &Sorted<'_>,
    me: Uuid,
    made: &HashSet<RunId>,
    states: &HashMap<RunId, State>,
    outcomes: &mut [Option<Outcome>],
) {
    let plain = |run: &RunId| Some(if made.contains(run) { Outcome::Recorded } else { Outcome::Lost });
    for (at, ((run, _), _)) in &sorted.accepts {
        outcomes[*at] = plain(run);
    }
    for (at, ((run, _), _)) in &sorted.seen {
        outcomes[*at] = plain(run);
    }
    for (at, finish) in &sorted.finishes {
        let Finish { run, claim, status, .. } = finish;
        let before =
            states.get(run).is_some_and(|s| s.claim == *claim && &*s.status == status.as_str() && s.owner.is_none());
        let ended = made.contains(run) || before;
        outcomes[*at] = Some(if ended { Outcome::Finished { wakes: Vec::new() } } else { Outcome::Lost });
    }
    for (at, park) in &sorted.parks {
        outcomes[*at] = Some(match states.get(&park.run) {
            _ if made.contains(&park.run) => Outcome::Recorded,
            Some(state) if state.owner == Some(me) && state.claim == park.claim => Outcome::Signalled(state.signals),
            Some(state) if state.calm >= park.claim - park.deaths => Outcome::Recorded,
            _ => Outcome::Lost,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Answer, Login, Server};
    use crate::names::Schema;
    use durable_core::storage::{Batch, Fence, InstanceId};

    /// What a batch without operations comes to, by its verdict and the transactions that it says are open.
    async fn comes_to(answer: Answer) -> Result<bool> {
        let server = Server::new(Login::Welcome).await;
        let mut lent = server.sessions().lend().await?;
        server.answers([answer]);
        let fence = Fence { instance: InstanceId::new(), generation: 0 };
        let batch = Batch::new(fence, "default", Vec::new());
        let result = super::super::commit(&mut lent, &Schema::new("durable")?, &batch, false).await;
        Ok(matches!(result?, Committed::Done(_)))
    }

    #[tokio::test]
    async fn verdicts() {
        assert!(comes_to(Answer::Numbers(COMMITTED, 0)).await.unwrap());
        assert!(!comes_to(Answer::Numbers(INBOX, 0)).await.unwrap());
        assert!(matches!(comes_to(Answer::Numbers(super::super::FENCED, 0)).await, Err(StorageError::Fenced)));
        assert!(matches!(comes_to(Answer::Numbers(crate::fence::BUSY, 0)).await, Err(StorageError::Unavailable(_))));
        assert!(matches!(comes_to(Answer::Numbers(COMMITTED, 1)).await, Err(StorageError::Unknown(_))), "left open");
        assert!(matches!(comes_to(Answer::Numbers(99, 0)).await, Err(StorageError::Unknown(_))));
        assert!(matches!(comes_to(Answer::Done).await, Err(StorageError::Unknown(_))), "no answer at all");
        assert!(
            matches!(comes_to(Answer::Error(1205)).await, Err(StorageError::Unknown(_))),
            "run again, without answer"
        );
        assert!(matches!(comes_to(Answer::Error(9002)).await, Err(StorageError::Unavailable(_))));
        assert!(matches!(comes_to(Answer::Error(547)).await, Err(StorageError::Refused(_))));
    }
}
