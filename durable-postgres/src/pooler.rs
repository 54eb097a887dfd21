//! Whether sessions are the engine's own. A pooler may lend them by the transaction: then the next client that is lent a
//! session meets what another one has set or locked in it.
//!
//! All of this is asked by the simple protocol, which needs no prepared statement.

use durable_core::storage::{Result, StorageError};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row};

use crate::errors::reading;
use crate::session::{self, Bounds, Whose};

/// Whether two connections share sessions, or one of them has several. In turns: a pooler lends the session that came back
/// last, or each of them in its turn.
pub(crate) async fn lends(one: &mut PgConnection, other: &mut PgConnection) -> sqlx::Result<bool> {
    let mut pids: [Vec<i32>; 2] = [Vec::new(), Vec::new()];
    for nth in [0, 1, 0, 1, 1, 0, 0, 1] {
        let connection = if nth == 0 { &mut *one } else { &mut *other };
        let row = connection.fetch_one(sqlx::raw_sql("SELECT pg_catalog.pg_backend_pid()")).await?;
        pids[nth].push(row.get(0));
    }
    let [one, other] = pids;
    let several = |pids: &[i32]| pids.iter().any(|pid| *pid != pids[0]);
    // Not every database tells which session is whose.
    Ok(one[0] > 0 && (several(&one) || several(&other) || one[0] == other[0]))
}

/// Whether the engine can live with lent sessions.
///
/// # Errors
/// What is missing, and what to do.
pub(crate) async fn judge(one: &mut PgConnection, other: &mut PgConnection, bounds: Bounds) -> Result<()> {
    const LENT: &str =
        "a pooler lends sessions by the transaction here. Let the engine connect to the server itself, or";
    let named = session::named(bounds, Whose::Engine);
    let missing = format!(
        "SELECT pg_catalog.format('ALTER ROLE %I SET %s = %L', current_user, v.name, v.value)
         FROM {named} JOIN pg_catalog.pg_settings s ON s.name = v.name
         WHERE s.setting <> v.value AND v.name NOT LIKE 'tcp%' ORDER BY v.name"
    );
    // Constants, and numbers of this crate's settings.
    let missing = one.fetch_all(sqlx::raw_sql(AssertSqlSafe(missing))).await.map_err(reading)?;
    if !missing.is_empty() {
        let missing: Vec<String> = missing.iter().map(|row| row.get(0)).collect();
        return Err(StorageError::schema(format!(
            "{LENT} give it a role of its own, for what it sets would reach others, with these settings: {}",
            missing.join("; ")
        )));
    }
    for nth in 0..4 {
        let connection = if nth % 2 == 0 { &mut *one } else { &mut *other };
        let prepared = sqlx::query("SELECT $1::integer").bind(nth);
        if let Err(error) = connection.fetch_one(prepared).await {
            return Err(StorageError::schema(format!(
                "{LENT} have it handle prepared statements (PgBouncer 1.21 and later: max_prepared_statements); \
                 without, the server says: {error}"
            )));
        }
    }
    Ok(())
}
