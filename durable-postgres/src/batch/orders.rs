//! What people order: cancel, resume, delete. Rare, so one by one. The process's row is locked by the first statement of
//! each, so the others see everything that concerns it.

use durable_core::storage::{Forget, Op, Outcome, Result, StorageError};
use sqlx::postgres::{PgConnection, PgRow};

use super::parts::{wake, woken};
use super::{FINISHED, Of, UNFINISHED, read};
use crate::rows::{get, standing};
use crate::sql::{Commits, Sql};

pub(super) async fn carry_out(connection: &mut PgConnection, of: &Of<'_>, order: &Op) -> Result<Outcome> {
    let (Op::Cancel { id } | Op::Resume { id, .. } | Op::Delete { id }) = order else {
        return Err(StorageError::schema("an order that this version does not know"));
    };
    let before = ask(connection, before(of, id)).await?;
    let mut wakes = Vec::new();
    match order {
        Op::Cancel { .. } => {
            for sql in cancelled(of, id) {
                wakes.extend(read::mine(&ask(connection, sql).await?));
            }
        }
        Op::Resume { forget, .. } => {
            for sql in resumed(of, id, forget) {
                ask(connection, sql).await?;
            }
        }
        _ => {
            // However many rows they are: given up, it would be tried again and again.
            let bound = statement_timeout(connection, "0").await?;
            for sql in deleted(of, id) {
                wakes.extend(read::mine(&ask(connection, sql).await?));
            }
            statement_timeout(connection, &bound).await?;
        }
    }
    let before = before.first().map(|row| standing(row, 0, 1)).transpose();
    Ok(match before {
        Ok(before) => Outcome::Asked { before, wakes, again: false },
        Err(why) => Outcome::Unreadable(why.to_string()),
    })
}

async fn ask(connection: &mut PgConnection, sql: Sql) -> Result<Vec<PgRow>> {
    sql.run(connection, Commits::No).await
}

/// Sets how long the statements of this transaction may take, and says what it was before.
async fn statement_timeout(connection: &mut PgConnection, to: &str) -> Result<String> {
    let mut sql = Sql::default();
    let to = sql.bind(to);
    sql.text = format!(
        "WITH before AS MATERIALIZED (SELECT pg_catalog.current_setting('statement_timeout') AS value)
         SELECT value, pg_catalog.set_config('statement_timeout', {to}, true) FROM before"
    );
    let rows = ask(connection, sql).await?;
    rows.first().map(|row| get(row, 0)).unwrap_or_else(|| Err(StorageError::schema("no answer")))
}

/// A statement about one process: the text is given what stands for its namespace, its id and the instance.
fn about(of: &Of<'_>, id: &str, text: impl FnOnce(&mut Sql, &str, &str, &str) -> String) -> Sql {
    let mut sql = Sql::default();
    let (namespace, id, me) = (sql.bind(of.namespace), sql.bind(id), sql.bind(of.instance));
    sql.text = text(&mut sql, &namespace, &id, &me);
    sql
}

/// A change of the id's current run. Answers with it, and whether the instance owns it.
fn change(of: &Of<'_>, id: &str, only: &str, set: impl FnOnce(&str) -> String) -> Sql {
    about(of, id, |_, namespace, id, me| {
        let set = set(me);
        format!(
            "UPDATE {of}.processes p SET {set} WHERE p.namespace = {namespace} AND p.id = {id} AND p.current AND {only}
             RETURNING p.run, p.owner IS NOT NULL AND p.owner = {me}"
        )
    })
}

fn before(of: &Of<'_>, id: &str) -> Sql {
    about(of, id, |_, namespace, id, _| {
        format!(
            "SELECT p.run, p.status FROM {of}.processes p
             WHERE p.namespace = {namespace} AND p.id = {id} AND p.current FOR UPDATE"
        )
    })
}

fn cancelled(of: &Of<'_>, id: &str) -> [Sql; 3] {
    let told = change(of, id, &format!("p.status IN {UNFINISHED} AND NOT (p.claim = 0 AND p.owner IS NULL)"), |me| {
        let wake = wake(me);
        format!("signals = p.signals + 1, {wake}, cancel_requested_at = coalesce(p.cancel_requested_at, now())")
    });
    // One that never ran has nothing to compensate.
    let ended = change(of, id, "p.status = 'waiting' AND p.claim = 0", |_| {
        "status = 'cancelled', wake_at = NULL, status_at = now(), finished_at = now(), cancel_requested_at = now()"
            .to_owned()
    });
    let woken = about(of, id, |sql, namespace, id, _| {
        let ended = format!(
            "SELECT t.run FROM {of}.processes t WHERE t.namespace = {namespace} AND t.id = {id} AND t.current
                 AND t.status = 'cancelled'"
        );
        woken(sql, of, &ended)
    });
    [told, ended, woken]
}

fn resumed(of: &Of<'_>, id: &str, forget: &[Forget]) -> Vec<Sql> {
    let mut statements = Vec::new();
    if !forget.is_empty() {
        statements.push(about(of, id, |sql, namespace, id, _| {
            let j = forgotten(sql, forget);
            format!(
                "INSERT INTO {of}.audit (audit, run, forgotten_at, scope, name, key, op, state, payload, attempts, seq, claim,
                     recorded_at)
                 SELECT j.audit, s.run, now(), s.scope, s.name, s.key, s.op, s.state, s.payload, s.attempts, s.seq, s.claim,
                     s.recorded_at
                 FROM {j} JOIN {of}.processes p ON p.namespace = {namespace} AND p.id = {id} AND p.current
                         AND p.status IN ('stuck', 'failed')
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
    statements.push(change(of, id, "p.status IN ('stuck', 'failed')", |_| {
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

/// All runs of the id, if the current one may go. The rows themselves last: the others are found through them.
fn deleted(of: &Of<'_>, id: &str) -> Vec<Sql> {
    let runs = |namespace: &str, id: &str| {
        format!(
            "SELECT r.run FROM {of}.processes r WHERE r.namespace = {namespace} AND r.id = {id}
                 AND (r.current OR NOT r.current)
                 AND EXISTS (SELECT 1 FROM {of}.processes q WHERE q.namespace = {namespace} AND q.id = {id} AND q.current
                     AND (q.status IN {FINISHED} OR q.status = 'stuck'))"
        )
    };
    let woken = about(of, id, |sql, namespace, id, _| woken(sql, of, &runs(namespace, id)));
    let refused = about(of, id, |_, namespace, id, _| {
        let runs = runs(namespace, id);
        format!(
            "DELETE FROM {of}.inbox WHERE namespace = {namespace} AND id = {id} AND refused IS NOT NULL
                 AND EXISTS ({runs})"
        )
    });
    let mut statements = vec![woken, refused];
    for (table, column) in
        [("steps", "run"), ("events", "run"), ("audit", "run"), ("waiters", "waiter"), ("processes", "run")]
    {
        let mut sql = Sql::default();
        let (namespace, id) = (sql.bind(of.namespace), sql.bind(id));
        sql.text = format!("DELETE FROM {of}.{table} WHERE {column} IN ({})", runs(&namespace, &id));
        statements.push(sql);
    }
    statements
}

/// Every statement of an order.
#[cfg(test)]
pub(super) fn statements(of: &Of<'_>, order: &Op) -> Vec<Sql> {
    match order {
        Op::Cancel { id } => cancelled(of, id).into_iter().chain([before(of, id)]).collect(),
        Op::Resume { id, forget } => resumed(of, id, forget),
        Op::Delete { id } => deleted(of, id),
        _ => Vec::new(),
    }
}
