//! What people order of a process. Rare, so one by one. The process's row is locked by the first statement of each, so the
//! others see everything that concerns it.

use durable_core::storage::chores::DELETED;
use durable_core::storage::{Forget, Order, Outcome, Result, StorageError, What};
use sqlx::postgres::{PgConnection, PgRow};

use super::parts::{unwaiting, wake, woken};
use super::whole::OPEN;
use super::{FINISHED, Of, UNFINISHED, read};
use crate::rows::{get, standing};
use crate::sql::{Commits, Sql};

pub(super) async fn carry_out(connection: &mut PgConnection, of: &Of<'_>, order: &Order) -> Result<Outcome> {
    let before = ask(connection, before(of, order)).await?;
    let mut wakes = Vec::new();
    for (sql, rouses) in statements(of, order)? {
        let rows = ask(connection, sql).await?;
        if rouses {
            wakes.extend(read::mine(&rows));
        }
    }
    let more = before.first().map(|row| get(row, 2)).transpose()?.unwrap_or(false);
    let before = before.first().map(|row| standing(row, 0, 1)).transpose();
    Ok(match before {
        Ok(before) => Outcome::Asked { before, wakes, again: false, more },
        Err(why) => Outcome::Unreadable(why.to_string()),
    })
}

async fn ask(connection: &mut PgConnection, sql: Sql) -> Result<Vec<PgRow>> {
    sql.run(connection, Commits::No).await
}

/// What stands for the parts of an order.
struct Meant {
    namespace: String,
    id: String,
    me: String,
    /// The run that is given, or null.
    run: String,
}

impl Meant {
    /// The row `p` is the current run of the id, and the one that is given.
    fn current(&self) -> String {
        let Self { namespace, id, run, .. } = self;
        format!("p.namespace = {namespace} AND p.id = {id} AND p.current AND ({run} IS NULL OR p.run = {run})")
    }

    /// There are as many former runs as go at once.
    fn more(&self, of: &Of<'_>) -> String {
        let Self { namespace, id, .. } = self;
        format!(
            "((SELECT count(*) FROM (SELECT 1 FROM {of}.processes f WHERE f.namespace = {namespace} AND f.id = {id}
                 AND NOT f.current LIMIT {DELETED}) f) >= {DELETED})"
        )
    }
}

/// A statement about one process.
fn about(of: &Of<'_>, order: &Order, text: impl FnOnce(&mut Sql, &Meant) -> String) -> Sql {
    let mut sql = Sql::default();
    let (namespace, id, me) = (sql.bind(of.namespace), sql.bind(&*order.id), sql.bind(of.instance));
    let run = format!("{}::uuid", sql.bind(order.run.map(|run| run.0)));
    sql.text = text(&mut sql, &Meant { namespace, id, me, run });
    sql
}

/// A change of the current run. Answers with it, and whether the instance owns it.
fn change(of: &Of<'_>, order: &Order, only: &str, set: impl FnOnce(&mut Sql, &str) -> String) -> Sql {
    about(of, order, |sql, meant| {
        let (set, current, me) = (set(sql, &meant.me), meant.current(), &meant.me);
        format!(
            "UPDATE {of}.processes p SET {set} WHERE {current} AND {only}
             RETURNING p.run, p.owner IS NOT NULL AND p.owner = {me}"
        )
    })
}

/// Of an earlier run, too, if that is given; and whether a deletion leaves some of its former runs, and so itself.
fn before(of: &Of<'_>, order: &Order) -> Sql {
    about(of, order, |_, given| {
        let Meant { namespace, id, run, .. } = given;
        let more = if matches!(order.what, What::Delete) { given.more(of) } else { "false".to_owned() };
        let meant = if order.run.is_some() { format!("p.run = {run}") } else { format!("{run} IS NULL AND p.current") };
        format!(
            "SELECT p.run, p.status, p.current AND {more} FROM {of}.processes p WHERE p.namespace = {namespace} AND p.id = {id} AND {meant}
             FOR UPDATE OF p"
        )
    })
}

/// Its statements, and whether they answer with runs that are to be woken.
pub(super) fn statements(of: &Of<'_>, order: &Order) -> Result<Vec<(Sql, bool)>> {
    Ok(match &order.what {
        What::Cancel => cancelled(of, order).into(),
        What::Terminate { reason } => terminated(of, order, reason).into(),
        What::Resume { forget } => resumed(of, order, forget).into_iter().map(|sql| (sql, false)).collect(),
        What::Delete => deleted(of, order),
        _ => return Err(StorageError::schema("an order that this version does not know")),
    })
}

fn cancelled(of: &Of<'_>, order: &Order) -> [(Sql, bool); 3] {
    let only = format!("p.status IN {UNFINISHED} AND NOT (p.claim = 0 AND p.owner IS NULL)");
    let told = change(of, order, &only, |_, me| {
        let wake = wake(me);
        format!("signals = p.signals + 1, {wake}, cancel_requested_at = coalesce(p.cancel_requested_at, now())")
    });
    // One that never ran has nothing to compensate.
    let ended = change(of, order, "p.status = 'waiting' AND p.claim = 0", |_, _| {
        "status = 'cancelled', wake_at = NULL, status_at = now(), finished_at = now(), cancel_requested_at = now()"
            .to_owned()
    });
    [(told, true), (ended, true), (ended_wakes(of, order), true)]
}

/// Wakes those that await it, if it is cancelled now.
fn ended_wakes(of: &Of<'_>, order: &Order) -> Sql {
    about(of, order, |sql, meant| {
        let current = meant.current();
        woken(sql, of, &format!("SELECT p.run FROM {of}.processes p WHERE {current} AND p.status = 'cancelled'"))
    })
}

fn terminated(of: &Of<'_>, order: &Order, reason: &str) -> [(Sql, bool); 3] {
    let ended = change(of, order, &format!("p.status IN {UNFINISHED}"), |sql, _| {
        let reason = sql.bind(reason);
        format!(
            "status = 'cancelled', owner = NULL, calm_claim = p.claim, wake_at = NULL, waiting_for = NULL,
             signalled = false, output = NULL, reason = {reason}, status_at = now(), finished_at = now(),
             cancel_requested_at = coalesce(p.cancel_requested_at, now())"
        )
    });
    let unwaiting = about(of, order, |_, meant| {
        let current = meant.current();
        let cancelled = format!("SELECT p.run FROM {of}.processes p WHERE {current} AND p.status = 'cancelled'");
        unwaiting(of, &cancelled, OPEN)
    });
    [(ended, false), (unwaiting, false), (ended_wakes(of, order), true)]
}

fn resumed(of: &Of<'_>, order: &Order, forget: &[Forget]) -> Vec<Sql> {
    // Processes that were woken by its failure may await it again. The chore goes first, by a statement of its own: an instance
    // that is doing a part of it holds its row, and the next statement sees whom that part has woken.
    let mut statements = vec![
        about(of, order, |_, meant| {
            let current = meant.current();
            format!(
                "DELETE FROM {of}.chores c USING {of}.processes p
                 WHERE c.run = p.run AND {current} AND c.what = 'wake' AND p.status = 'failed'"
            )
        }),
        about(of, order, |_, meant| {
            let current = meant.current();
            format!(
                "UPDATE {of}.waiters w SET told = false FROM {of}.processes p
                 WHERE w.target = p.run AND {current} AND p.status = 'failed' AND w.told"
            )
        }),
    ];
    if !forget.is_empty() {
        statements.push(about(of, order, |sql, meant| {
            let (j, current) = (forgotten(sql, forget), meant.current());
            format!(
                "INSERT INTO {of}.audit (audit, run, forgotten_at, scope, name, key, op, state, payload, attempts, seq, claim,
                     recorded_at)
                 SELECT j.audit, s.run, now(), s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.seq, s.claim,
                     s.recorded_at
                 FROM {j} JOIN {of}.processes p ON {current} AND p.status IN ('stuck', 'failed')
                     JOIN {of}.steps s ON s.run = p.run AND s.scope = j.scope AND s.name = j.name AND s.key = j.key
                 ON CONFLICT DO NOTHING"
            )
        }));
        // Only what this order has put into the audit: a record that was made since an earlier attempt stays.
        let mut sql = Sql::default();
        let j = forgotten(&mut sql, forget);
        sql.text = format!(
            "DELETE FROM {of}.steps s USING {j} JOIN {of}.audit a ON a.audit = j.audit
             WHERE s.run = a.run AND s.scope = a.scope AND s.name = a.name AND s.key = a.key AND s.claim = a.claim
                 AND s.recorded_at = a.recorded_at"
        );
        statements.push(sql);
    }
    statements.push(change(of, order, "p.status IN ('stuck', 'failed')", |_, _| {
        "status = 'waiting', wake_at = now(), calm_claim = p.claim, output = NULL, reason = NULL, status_at = now(),
             finished_at = NULL"
            .to_owned()
    }));
    statements
}

fn forgotten(sql: &mut Sql, forget: &[Forget]) -> String {
    sql.rows()
        .column("audit", forget.iter().map(|forget| forget.audit))
        .column("scope", forget.iter().map(|forget| forget.key.scope as i16))
        .column("name", forget.iter().map(|forget| &*forget.key.name))
        .column("key", forget.iter().map(|forget| &*forget.key.key))
        .named("j")
}

/// All runs of the id, the current one last, if that is meant and may go; or an earlier one alone. What they leave in the
/// other tables is cleared away later.
fn deleted(of: &Of<'_>, order: &Order) -> Vec<(Sql, bool)> {
    let current = |Meant { namespace, id, run, .. }: &Meant| {
        format!(
            "SELECT q.run FROM {of}.processes q WHERE q.namespace = {namespace} AND q.id = {id} AND q.current
                 AND ({run} IS NULL OR q.run = {run}) AND (q.status IN {FINISHED} OR q.status = 'stuck')"
        )
    };
    let runs = |meant: &Meant| {
        let (Meant { namespace, id, run, .. }, current, more) = (meant, current(meant), meant.more(of));
        format!(
            "SELECT f.run FROM (SELECT f.run FROM {of}.processes f WHERE f.namespace = {namespace} AND f.id = {id}
                     AND NOT f.current ORDER BY f.run LIMIT {DELETED}) f WHERE EXISTS ({current})
             UNION ALL SELECT c.run FROM ({current}) c WHERE NOT {more}
             UNION ALL SELECT r.run FROM {of}.processes r WHERE r.namespace = {namespace} AND r.id = {id} AND r.run = {run}
                 AND NOT r.current"
        )
    };
    let woken = about(of, order, |sql, meant| woken(sql, of, &runs(meant)));
    let refused = about(of, order, |_, meant| {
        let (Meant { namespace, id, .. }, current) = (meant, current(meant));
        format!(
            "DELETE FROM {of}.inbox WHERE namespace = {namespace} AND id = {id} AND refused IS NOT NULL
                 AND EXISTS ({current})"
        )
    });
    let deleted = about(of, order, |_, meant| {
        let runs = runs(meant);
        format!(
            "WITH gone AS (DELETE FROM {of}.processes WHERE run = ANY (ARRAY ({runs})) RETURNING run)
             INSERT INTO {of}.chores (run, what, due_at) SELECT run, 'delete', now() FROM gone
             ON CONFLICT (run) DO UPDATE SET what = 'delete'"
        )
    });
    vec![(woken, true), (refused, false), (deleted, false)]
}

/// Every statement of an order.
#[cfg(test)]
pub(super) fn all(of: &Of<'_>, order: &Order) -> Vec<Sql> {
    let statements = statements(of, order).unwrap_or_default().into_iter().map(|(sql, _)| sql);
    statements.chain([before(of, order)]).collect()
}
