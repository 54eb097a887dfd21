//! A batch as a transaction: the same parts, a statement each, in the order of the variants of `Op`. Each has a snapshot
//! of its own, which is taken when all rows that it goes by are locked.

use durable_core::storage::chores::WOKEN;
use durable_core::storage::{Claimed, Op, Outcome, Raised, RecordOp, Result, RunId, Sorted, StorageError};
use sqlx::Executor;
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::HashSet;
use std::time::Duration;

use super::parts::{self, Payload, Standing};
use super::{FINISHED, Of, mail, orders, read};
use crate::errors::{reading, sort};
use crate::rows::{get, run, uuids};
use crate::sql::{Commits, Sql};

/// The fence is held from the first statement to the commit, so the later ones need not ask for it.
pub(super) const OPEN: &str = "true";

pub(super) async fn commit(
    connection: &mut PgConnection,
    of: &Of<'_>,
    ops: &[Op],
    sorted: &Sorted<'_>,
    patience: Option<Duration>,
) -> Result<Vec<Outcome>> {
    connection.execute("BEGIN").await.map_err(reading)?;
    let written = async {
        if let Some(patience) = patience {
            bound(patience).run(connection, Commits::No).await?;
        }
        write(connection, of, ops, sorted).await
    };
    let written = written.await;
    end(connection, written).await
}

/// Ends a transaction: commits what succeeded.
pub(super) async fn end<T>(connection: &mut PgConnection, written: Result<T>) -> Result<T> {
    match written {
        Ok(written) => {
            connection.execute("COMMIT").await.map_err(|error| sort(error, true))?;
            Ok(written)
        }
        Err(error) => {
            // If this fails, so has the connection; and with it goes the transaction. Who asked is told the first error,
            // after which the connection is not used again unless this worked.
            connection.execute("ROLLBACK").await.map_err(reading)?;
            Err(error)
        }
    }
}

/// How long this transaction's statements may wait for a lock, and how long they may take.
fn bound(patience: Duration) -> Sql {
    /// What a statement takes besides waiting, at most this many times as long.
    const WORK: u32 = 20;
    let text = |time: Duration| time.as_millis().max(1).to_string();
    let mut sql = Sql::default();
    let (lock, statement) = (sql.bind(text(patience)), sql.bind(text(patience * WORK)));
    sql.text = format!(
        "SELECT pg_catalog.set_config('lock_timeout', {lock}, true),
             pg_catalog.set_config('statement_timeout', {statement}, true)"
    );
    sql
}

async fn run_part(connection: &mut PgConnection, part: impl FnOnce(&mut Sql) -> String) -> Result<Vec<PgRow>> {
    let mut sql = Sql::default();
    sql.text = part(&mut sql);
    sql.run(connection, Commits::No).await
}

/// Locks the fence, and then every row of a process that the batch will touch, as far as they can be told beforehand,
/// in their order: so that batches wait for each other in that order, and not in a circle.
pub(super) fn lock(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) -> String {
    let fence = parts::fence(sql, of);
    let (ids, targets) = sorted.others();
    let (namespace, ids) = (sql.bind(of.namespace), sql.bind(ids));
    let current = parts::current(of, &namespace, "i.id");
    let mut runs = sorted.owned();
    runs.extend(targets);
    let (runs, ending) = (sql.bind(uuids(runs)), sql.bind(uuids(sorted.ending())));
    format!(
        "WITH fence AS MATERIALIZED ({fence}),
         few AS MATERIALIZED (SELECT waiter FROM {of}.waiters WHERE target = ANY ({ending}) LIMIT {WOKEN} + 1),
         wanted AS MATERIALIZED (SELECT unnest({runs}) AS run
             UNION SELECT {current} FROM unnest({ids}) AS i (id)
             UNION SELECT waiter FROM few WHERE (SELECT count(*) FROM few) <= {WOKEN}),
         held AS MATERIALIZED (SELECT p.run FROM {of}.processes p
             WHERE p.run = ANY (ARRAY (SELECT run FROM wanted)) AND EXISTS (SELECT 1 FROM fence)
             ORDER BY p.run FOR NO KEY UPDATE)
         SELECT EXISTS (SELECT 1 FROM fence), (SELECT count(*) FROM held)"
    )
}

pub(super) async fn write(
    connection: &mut PgConnection,
    of: &Of<'_>,
    ops: &[Op],
    sorted: &Sorted<'_>,
) -> Result<Vec<Outcome>> {
    let locked = run_part(connection, |sql| lock(sql, of, sorted)).await?;
    if !locked.first().map(|row| get(row, 0)).transpose()?.unwrap_or(false) {
        return Err(StorageError::Fenced);
    }
    let mut outcomes: Vec<Option<Outcome>> = vec![None; ops.len()];
    spawns(connection, of, sorted, &mut outcomes).await?;
    raises(connection, of, sorted, &mut outcomes).await?;
    records(connection, of, sorted, &mut outcomes).await?;
    if !sorted.awaits.is_empty() {
        for (at, outcome) in mail::awaits(connection, of, sorted).await? {
            outcomes[at] = Some(outcome);
        }
    }
    owned(connection, of, sorted, &mut outcomes).await?;
    for (at, order) in &sorted.orders {
        outcomes[*at] = Some(orders::carry_out(connection, of, order).await?);
    }
    for (at, (kind, limit)) in &sorted.claims {
        let rows = run_part(connection, |sql| claims(sql, of, kind, *limit));
        let claimed = |row: &PgRow| Ok(Claimed { run: run(row, 0)?, claim: get(row, 1)? });
        outcomes[*at] = Some(Outcome::Claimed(rows.await?.iter().map(claimed).collect::<Result<_>>()?));
    }
    read::complete(ops, outcomes)
}

fn claims(sql: &mut Sql, of: &Of<'_>, kind: &str, limit: usize) -> String {
    let [due, claimed] = parts::claimed(sql, of, kind, limit, OPEN);
    format!("WITH due AS MATERIALIZED ({due}) {claimed}")
}

type Outcomes = [Option<Outcome>];

async fn spawns(
    connection: &mut PgConnection,
    of: &Of<'_>,
    sorted: &Sorted<'_>,
    outcomes: &mut Outcomes,
) -> Result<()> {
    if sorted.spawns.is_empty() {
        return Ok(());
    }
    if sorted.spawns.iter().any(|(_, (spawn, _))| spawn.restart_finished) {
        run_part(connection, |sql| restarted(sql, of, sorted)).await?;
    }
    let written = run_part(connection, |sql| parts::spawned(sql, of, &sorted.spawns, OPEN)).await?;
    if written.len() == sorted.spawns.len() {
        for (at, start) in &sorted.spawns {
            outcomes[*at] = Some(read::new(start));
        }
    } else {
        let mut existing = read::existing(connection, of, &sorted.spawns).await?;
        for (nth, (at, (_, from))) in sorted.spawns.iter().enumerate() {
            outcomes[*at] = Some(match (existing.remove(&nth), from) {
                (Some(outcome), _) => outcome,
                // Its record is not written, which is told below.
                (None, Some(_)) => Outcome::Lost,
                (None, None) => return Err(StorageError::unavailable("a process was deleted meanwhile")),
            });
        }
    }
    Ok(())
}

/// The finished runs that a start replaces make way.
pub(super) fn restarted(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) -> String {
    let (me, namespace) = (sql.bind(of.instance), sql.bind(of.namespace));
    let j = parts::starts(sql, &sorted.spawns);
    let (owner, current) = (parts::starter_owns(of, &me), parts::current(of, &namespace, "j.id"));
    let existing = parts::existing(of, "j.run");
    format!(
        "UPDATE {of}.processes p SET current = false FROM {j}
         WHERE p.run = {current} AND p.current AND j.restart AND p.status IN {FINISHED} AND p.kind = j.kind
             AND {existing} IS NULL AND {owner}"
    )
}

async fn raises(
    connection: &mut PgConnection,
    of: &Of<'_>,
    sorted: &Sorted<'_>,
    outcomes: &mut Outcomes,
) -> Result<()> {
    if sorted.raises.is_empty() {
        return Ok(());
    }
    run_part(connection, |sql| mail::put_text(sql, of, &sorted.raises, OPEN)).await?;
    let rows = run_part(connection, |sql| mail::delivered(sql, of, &sorted.raises)).await?;
    for (at, outcome) in mail::outcomes(&sorted.raises, &rows)? {
        outcomes[at] = Some(outcome);
    }
    Ok(())
}

/// Records, those of effects by what came of these.
async fn records(
    connection: &mut PgConnection,
    of: &Of<'_>,
    sorted: &Sorted<'_>,
    outcomes: &mut Outcomes,
) -> Result<()> {
    write_records(connection, of, &sorted.start_records, outcomes, start_records).await?;
    write_records(connection, of, &sorted.raise_records, outcomes, raise_records).await?;
    write_records(connection, of, &sorted.records, outcomes, plain_records).await?;
    let all: Vec<_> = sorted.all_records().copied().collect();
    for part in [parts::taken, parts::awaited] {
        let mut sql = Sql::default();
        if let Some(text) = part(&mut sql, of, &all, OPEN) {
            sql.text = text;
            sql.run(connection, Commits::No).await?;
        }
    }
    Ok(())
}

type Records<'r, 'b> = &'r [(usize, &'b RecordOp)];

async fn write_records(
    connection: &mut PgConnection,
    of: &Of<'_>,
    records: Records<'_, '_>,
    outcomes: &mut Outcomes,
    part: fn(&mut Sql, &Of<'_>, Records<'_, '_>) -> String,
) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let written = run_part(connection, |sql| part(sql, of, records) + " RETURNING 1").await?;
    let lost = if written.len() == records.len() { Vec::new() } else { read::lost(connection, of, records).await? };
    for (at, _) in records {
        outcomes[*at].get_or_insert(Outcome::Recorded);
    }
    for at in lost {
        outcomes[at] = Some(Outcome::Lost);
    }
    Ok(())
}

pub(super) fn plain_records(sql: &mut Sql, of: &Of<'_>, records: Records<'_, '_>) -> String {
    parts::recorded(sql, of, records, &Payload::GIVEN, Standing::Judged, OPEN)
}

/// What the id has now.
pub(super) fn start_records(sql: &mut Sql, of: &Of<'_>, records: Records<'_, '_>) -> String {
    let namespace = sql.bind(of.namespace);
    let (current, existing) =
        (parts::current(of, &namespace, "j.effect_id"), parts::existing(of, "j.effect_token::uuid"));
    let join = format!("JOIN {of}.processes c ON c.run = coalesce({existing}, {current})");
    // Without blanks, unlike json_build_object.
    let expression = "(SELECT row_to_json(o) FROM (SELECT c.run, c.run <> j.effect_token::uuid AS existed, c.kind,
        j.payload <> '' AND c.input_digest <> j.payload AS other_input) o)";
    parts::recorded(sql, of, records, &Payload { expression, join: &join }, Standing::Judged, OPEN)
}

/// What became of the message.
pub(super) fn raise_records(sql: &mut Sql, of: &Of<'_>, records: Records<'_, '_>) -> String {
    let namespace = sql.bind(of.namespace);
    let (current, number) =
        (parts::current(of, &namespace, "j.effect_id"), parts::number(of, "c.run", "j.effect_token"));
    let join = format!("LEFT JOIN {of}.processes c ON c.run = {current}");
    let delivered = Raised::Delivered { run: RunId(uuid::Uuid::nil()), number: 0, mine: false };
    let expression = format!(
        "(CASE WHEN c.run IS NULL THEN '{}' WHEN {number} IS NOT NULL THEN '{}' ELSE '{}' END)::json",
        Raised::NotFound.as_json(),
        delivered.as_json(),
        Raised::Finished.as_json()
    );
    parts::recorded(sql, of, records, &Payload { expression: &expression, join: &join }, Standing::Judged, OPEN)
}

/// Changes of rows that the instance owns, and whom the ends among them wake.
async fn owned(connection: &mut PgConnection, of: &Of<'_>, sorted: &Sorted<'_>, outcomes: &mut Outcomes) -> Result<()> {
    let mut made: HashSet<RunId> = HashSet::new();
    if !sorted.accepts.is_empty() {
        let rows = run_part(connection, |sql| parts::accepted(sql, of, &sorted.accepts, OPEN)).await?;
        extend(&mut made, &rows)?;
    }
    if !sorted.seen.is_empty() {
        let rows = run_part(connection, |sql| parts::seen(sql, of, &sorted.seen, OPEN)).await?;
        extend(&mut made, &rows)?;
    }
    let mut wakes = Vec::new();
    if !sorted.finishes.is_empty() {
        let rows = run_part(connection, |sql| parts::finished(sql, of, &sorted.finishes, OPEN)).await?;
        extend(&mut made, &rows)?;
        run_part(connection, |sql| unwaiting(sql, of, sorted)).await?;
        let rows = run_part(connection, |sql| woken(sql, of, sorted));
        wakes = read::mine(&rows.await?);
    }
    if !sorted.parks.is_empty() {
        let rows = run_part(connection, |sql| parts::parked(sql, of, &sorted.parks, OPEN)).await?;
        extend(&mut made, &rows)?;
    }
    read::owned(connection, of, sorted, &made, &mut |at, outcome| outcomes[at] = Some(outcome)).await?;
    // Whom the ends of the batch wake is told with the first of them.
    for (at, _) in &sorted.finishes {
        if let Some(Outcome::Finished { wakes: told }) = &mut outcomes[*at] {
            *told = std::mem::take(&mut wakes);
        }
    }
    Ok(())
}

pub(super) fn unwaiting(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) -> String {
    let ended = parts::ended(sql, of, &sorted.finishes);
    parts::unwaiting(of, &ended, OPEN)
}

pub(super) fn woken(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) -> String {
    let ended = parts::ended(sql, of, &sorted.finishes);
    parts::woken(sql, of, &ended)
}

fn extend(made: &mut HashSet<RunId>, rows: &[PgRow]) -> Result<()> {
    for row in rows {
        made.insert(run(row, 0)?);
    }
    Ok(())
}

/// Every statement of such a batch.
#[cfg(test)]
pub(super) fn statements(of: &Of<'_>, sorted: &Sorted<'_>) -> Vec<(&'static str, Sql)> {
    let made = |part: &mut dyn FnMut(&mut Sql) -> String| {
        let mut sql = Sql::default();
        sql.text = part(&mut sql);
        sql
    };
    let all: Vec<_> = sorted.all_records().copied().collect();
    let mut statements = vec![
        ("lock", made(&mut |sql| lock(sql, of, sorted))),
        ("restarted", made(&mut |sql| restarted(sql, of, sorted))),
        ("spawned", made(&mut |sql| parts::spawned(sql, of, &sorted.spawns, OPEN))),
        ("existing", made(&mut |sql| read::existing_text(sql, of, &sorted.spawns))),
        ("put", made(&mut |sql| mail::put_text(sql, of, &sorted.raises, OPEN))),
        ("delivered", made(&mut |sql| mail::delivered(sql, of, &sorted.raises))),
        ("start records", made(&mut |sql| start_records(sql, of, &sorted.start_records))),
        ("raise records", made(&mut |sql| raise_records(sql, of, &sorted.raise_records))),
        ("records", made(&mut |sql| plain_records(sql, of, &sorted.records))),
        ("lost", made(&mut |sql| read::lost_text(sql, of, &sorted.records))),
        ("taken", made(&mut |sql| parts::taken(sql, of, &all, OPEN).unwrap())),
        ("awaited", made(&mut |sql| parts::awaited(sql, of, &all, OPEN).unwrap())),
        ("awaits", made(&mut |sql| mail::awaits_text(sql, of, sorted))),
        ("accepted", made(&mut |sql| parts::accepted(sql, of, &sorted.accepts, OPEN))),
        ("seen", made(&mut |sql| parts::seen(sql, of, &sorted.seen, OPEN))),
        ("finished", made(&mut |sql| parts::finished(sql, of, &sorted.finishes, OPEN))),
        ("unwaiting", made(&mut |sql| unwaiting(sql, of, sorted))),
        ("woken", made(&mut |sql| woken(sql, of, sorted))),
        ("parked", made(&mut |sql| parts::parked(sql, of, &sorted.parks, OPEN))),
        ("states", made(&mut |sql| read::states_text(sql, of, sorted.owned()))),
        ("claimed", made(&mut |sql| claims(sql, of, "kind", 10))),
    ];
    statements.extend(sorted.orders.iter().flat_map(|(_, order)| orders::all(of, order)).map(|sql| ("order", sql)));
    statements
}
