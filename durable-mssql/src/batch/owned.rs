//! Changes of rows that the instance owns, whom the ends among them wake, and claims.

use durable_core::storage::Sorted;
use durable_core::storage::chores::{UNAWAITED, WOKEN};

use super::{Of, UNFINISHED, WAKE, answers};
use crate::json::{self, Column, Table};
use crate::rows::time_text;
use crate::sql::Sql;

pub(super) fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    accept(sql, of, sorted);
    see(sql, of, sorted);
    finish(sql, of, sorted);
    park(sql, of, sorted);
    let owned = sorted.owned();
    if owned.is_empty() {
        return;
    }
    // How those stand that were not changed: an earlier attempt of this batch may have changed them.
    let (made, state, count) = (answers::MADE, answers::STATE, sql.count(owned.len()));
    let j = json::runs(sql, owned);
    sql.push(format!(
        "IF (SELECT COUNT(*) FROM @out AS o WHERE o.part = {made}) < {count}
         INSERT INTO @out (part, run, owner, a, b, c, text)
         SELECT {state}, p.run, p.owner, p.claim, p.calm_claim, p.signals, p.status
         FROM {j} JOIN {of}.processes AS p ON p.run = j.run"
    ));
}

/// A change of the rows in `j` that the instance owns under their claim.
fn change(sql: &mut Sql, of: &Of<'_>, j: &str, set: &str, only: &str) {
    let made = answers::MADE;
    sql.push(format!(
        "UPDATE p SET {set} OUTPUT {made}, inserted.run INTO @out (part, run) FROM {of}.processes AS p, {j}
             WHERE p.run = j.run AND p.claim = j.claim AND p.owner = @me{only}"
    ));
}

/// Cancellations that owners record.
fn accept(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.accepts.is_empty() {
        return;
    }
    let mut table = Table::new(&[("run", Column::Id), ("claim", Column::Number), ("seq", Column::Number)]);
    for (_, ((run, claim), seq)) in &sorted.accepts {
        table.row([(*run).into(), (*claim).into(), i64::from(*seq).into()]);
    }
    let j = table.named(sql, "j");
    let set = "cancelled_at = COALESCE(p.cancelled_at, @now), cancelled_seq = COALESCE(p.cancelled_seq, j.seq)";
    change(sql, of, &j, set, "");
}

/// Signals that owners have read.
fn see(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.seen.is_empty() {
        return;
    }
    let mut table = Table::new(&[("run", Column::Id), ("claim", Column::Number), ("signals", Column::Number)]);
    for (_, ((run, claim), signals)) in &sorted.seen {
        table.row([(*run).into(), (*claim).into(), (*signals).into()]);
    }
    let j = table.named(sql, "j");
    let set = "signalled = CASE WHEN p.signalled = 1 AND p.signals <> j.signals THEN 1 ELSE 0 END";
    change(sql, of, &j, set, "");
}

const FINISHES: &[(&str, Column)] = &[
    ("run", Column::Id),
    ("claim", Column::Number),
    ("status", Column::Key(16)),
    ("output", Column::Text),
    ("reason", Column::Text),
    ("ended", Column::Bit),
];

/// Ends, and which processes they wake.
fn finish(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.finishes.is_empty() {
        return;
    }
    let mut table = Table::new(FINISHES);
    for (_, finish) in &sorted.finishes {
        table.row([
            finish.run.into(),
            finish.claim.into(),
            finish.status.as_str().into(),
            finish.output.as_deref().into(),
            finish.reason.as_deref().into(),
            finish.status.is_finished().into(),
        ]);
    }
    let j = table.named(sql, "j");
    let set = "status = j.status, [output] = j.[output], reason = j.reason, owner = NULL, wake_at = NULL, waiting_for = NULL, signalled = 0, status_at = @now, finished_at = CASE WHEN j.ended = 1 THEN @now END";
    change(sql, of, &j, set, "");
    if sorted.ending().is_empty() {
        return;
    }
    // Now or by an earlier attempt.
    let ended = format!(
        "SELECT t.run FROM {j} JOIN {of}.processes AS t ON t.run = j.run AND t.claim = j.claim AND t.status = j.status
         WHERE j.ended = 1 AND t.owner IS NULL"
    );
    unwait(sql, of, &ended);
    wake(sql, of, &ended, answers::WOKEN);
}

/// Deletes waiter rows of the runs that `ended` selects, which await nothing any more.
pub(super) fn unwait(sql: &mut Sql, of: &Of<'_>, ended: &str) {
    sql.push(format!("DELETE TOP ({UNAWAITED}) FROM {of}.waiters WHERE waiter IN ({ended})"));
}

/// Signals everybody who awaits one of the runs that `ended` selects, and tells it as this part; or leaves it as chores.
pub(super) fn wake(sql: &mut Sql, of: &Of<'_>, ended: &str, woken: i32) {
    sql.push(format!(
        "SET @count = (SELECT COUNT(*) FROM (SELECT TOP ({WOKEN} + 1) w.waiter FROM {of}.waiters AS w
             WHERE w.target IN ({ended})) AS m)"
    ));
    sql.push(format!(
        "IF @count > {WOKEN} INSERT INTO {of}.chores (run, what, due_at)
             SELECT DISTINCT w.target, N'wake', @now FROM {of}.waiters AS w
             WHERE w.target IN ({ended}) AND NOT EXISTS (SELECT 1 FROM {of}.chores AS c WHERE c.run = w.target)
         ELSE UPDATE p SET signals = p.signals + 1, {WAKE} OUTPUT {woken}, inserted.run, inserted.owner INTO @out (part, run, owner)
         FROM {of}.processes AS p
         WHERE p.run IN (SELECT w.waiter FROM {of}.waiters AS w WHERE w.target IN ({ended})) AND p.status IN {UNFINISHED}"
    ));
}

const PARKS: &[(&str, Column)] = &[
    ("run", Column::Id),
    ("claim", Column::Number),
    ("wake_at", Column::Time),
    ("seen", Column::Number),
    ("waiting_for", Column::Text),
    ("deaths", Column::Number),
];

/// Parks: whether every signal was seen is decided on the row, under its lock.
fn park(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    if sorted.parks.is_empty() {
        return;
    }
    let mut table = Table::new(PARKS);
    for (_, park) in &sorted.parks {
        let wake_at = park.wake_at.map(time_text);
        table.row([
            park.run.into(),
            park.claim.into(),
            wake_at.as_deref().into(),
            park.seen.into(),
            park.waiting_for.as_deref().into(),
            park.deaths.into(),
        ]);
    }
    let j = table.named(sql, "j");
    let set = "status = N'waiting', owner = NULL, calm_claim = p.claim - j.deaths, signalled = 0,
        wake_at = CASE WHEN j.seen IS NULL AND j.wake_at > @now THEN @now ELSE j.wake_at END, waiting_for = j.waiting_for, status_at = @now";
    change(sql, of, &j, set, " AND (j.seen IS NULL OR j.seen = p.signals)");
}

/// Claims: what is due, the earliest first, without waiting for what another instance is about to claim. Whether it is
/// still to be had is asked again of each row as it is changed, and what was changed counts.
pub(super) fn claim(sql: &mut Sql, of: &Of<'_>, kind: &str, limit: usize) {
    let (kind, limit, claimed) = (sql.text(kind), sql.count(limit), answers::CLAIMED);
    let due = |p: &str| {
        format!(
            "{p}.namespace = @namespace AND {p}.kind = {kind} AND {p}.status = N'waiting' AND {p}.wake_at IS NOT NULL
             AND {p}.wake_at <= @now"
        )
    };
    let (outer, inner) = (due("p"), due("q"));
    sql.push(format!(
        "UPDATE p SET owner = @me, claim = p.claim + 1, status = N'running', wake_at = NULL, waiting_for = NULL,
             status_at = @now
         OUTPUT {claimed}, inserted.run, inserted.claim INTO @out (part, run, a)
         FROM {of}.processes AS p WITH (ROWLOCK, READPAST, READCOMMITTEDLOCK)
         WHERE p.run IN (SELECT TOP ({limit}) q.run
             FROM {of}.processes AS q WITH (UPDLOCK, READPAST, ROWLOCK, READCOMMITTEDLOCK)
             WHERE {inner} ORDER BY q.wake_at) AND {outer}"
    ));
}
