//! Chores: what is too much for one transaction.

use async_trait::async_trait;
use durable_core::storage::Result;
use durable_core::storage::chores::Chores;
use uuid::Uuid;

use super::{UNFINISHED, wake};
use crate::script::{Arg, NOW, Script};
use crate::store::Shared;

/// All chores of a file.
pub(crate) struct All<'s>(pub(crate) &'s Shared);

#[async_trait]
impl Chores for All<'_> {
    async fn part(&mut self, most: usize, rows: usize) -> Result<bool> {
        let answers = self.0.write(|| part(most, rows)).await?;
        // Neither the transaction's beginning, nor whose turn is next, nor its end.
        let did = answers.get(1..answers.len().saturating_sub(2)).unwrap_or_default();
        Ok(did.iter().any(|answer| answer.changes > 0))
    }

    async fn put_off(&mut self) -> Result<()> {
        self.0.write(put_off).await.map(drop)
    }
}

/// The tables in which a run leaves rows, their keys, and the column that names it.
const LEFT: [(&str, &str, &str); 4] = [
    ("durable_steps", "run, scope, name, key", "run"),
    ("durable_events", "run, number", "run"),
    ("durable_audit", "audit", "run"),
    ("durable_waiters", "target, waiter", "waiter"),
];

fn part(most: usize, rows: usize) -> Script {
    let rows = limit(rows);
    let all = format!("SELECT c.run FROM durable_chores c WHERE c.due_at <= {NOW} ORDER BY c.due_at LIMIT ?");
    let deleted = format!("SELECT d.run FROM durable_chores d WHERE d.what = 'delete' AND d.run IN ({all})");
    let untold =
        format!("FROM durable_waiters w WHERE w.told = 0 AND w.target IN ({all}) ORDER BY w.target, w.waiter LIMIT ?");
    let mut script = Script::default();
    script.add("BEGIN IMMEDIATE", []);
    script.add(
        &format!(
            "UPDATE durable_processes SET signals = signals + 1, {} WHERE status IN {UNFINISHED}
                 AND run IN (SELECT w.waiter {untold})",
            wake()
        ),
        [Uuid::nil().to_string().into(), limit(most), rows.clone()],
    );
    script.add(
        &format!("UPDATE durable_waiters SET told = 1 WHERE (target, waiter) IN (SELECT w.target, w.waiter {untold})"),
        [limit(most), rows.clone()],
    );
    for (table, key, run) in LEFT {
        script.add(
            &format!(
                "DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} WHERE {run} IN ({deleted}) LIMIT ?)"
            ),
            [limit(most), rows.clone()],
        );
    }
    let nothing_left = LEFT
        .map(|(table, _, run)| format!("NOT EXISTS (SELECT 1 FROM {table} t WHERE t.{run} = durable_chores.run)"))
        .join(" AND ");
    script.add(
        &format!(
            "DELETE FROM durable_chores WHERE run IN ({all})
                 AND NOT EXISTS (SELECT 1 FROM durable_waiters t WHERE t.target = durable_chores.run AND t.told = 0)
                 AND (what = 'wake' OR {nothing_left})"
        ),
        [limit(most)],
    );
    // The others are next.
    script.add(&format!("UPDATE durable_chores SET due_at = {NOW} WHERE run IN ({all})"), [limit(most)]);
    script.add("COMMIT", []);
    script
}

fn put_off() -> Script {
    let mut script = Script::default();
    script.add(
        &format!(
            "UPDATE durable_chores SET due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+1 minute') WHERE run = (
                 SELECT c.run FROM durable_chores c WHERE c.due_at <= {NOW} ORDER BY c.due_at LIMIT 1)"
        ),
        [],
    );
    script
}

fn limit(rows: usize) -> Arg {
    i64::try_from(rows).unwrap_or(-1).into()
}
