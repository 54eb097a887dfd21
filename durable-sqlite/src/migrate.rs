use durable_core::storage::migration::{Applied, Migration, pending};
use durable_core::storage::{Result, StorageError};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::errors::reading;
use crate::rows::get;
use crate::script::NOW;

/// The schema's steps.
pub const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "processes",
    sql: include_str!("../migrations/0001_processes.sql"),
    oldest_code: 1,
}];

const TABLE: &str = "CREATE TABLE IF NOT EXISTS durable_migrations (
    version INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, oldest_code INTEGER NOT NULL,
    applied_at TEXT NOT NULL)";

/// The whole schema as one script, for people who apply it themselves.
pub fn schema_sql() -> String {
    let mut sql = format!("{TABLE};\n");
    for migration in MIGRATIONS {
        sql.push_str(migration.sql);
        sql.push_str(&record(migration));
    }
    sql
}

fn record(migration: &Migration) -> String {
    let Migration { version, name, oldest_code, .. } = migration;
    format!(
        "\nINSERT INTO durable_migrations (version, name, checksum, oldest_code, applied_at) \
         VALUES ({version}, '{name}', '{}', {oldest_code}, {NOW});\n",
        migration.checksum()
    )
}

/// What the database remembers; none if it has no table of migrations.
async fn applied(connection: &mut SqliteConnection) -> Result<Option<Vec<Applied>>> {
    let table = sqlx::query("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'durable_migrations'");
    if connection.fetch_optional(table).await.map_err(reading)?.is_none() {
        return Ok(None);
    }
    let rows = sqlx::query("SELECT version, checksum, oldest_code FROM durable_migrations ORDER BY version");
    let rows = connection.fetch_all(rows).await.map_err(reading)?;
    let applied = |row| Ok(Applied { version: get(row, 0)?, checksum: get(row, 1)?, oldest_code: get(row, 2)? });
    rows.iter().map(applied).collect::<Result<_>>().map(Some)
}

/// Refuses a schema that this code does not fit, and changes nothing.
pub(crate) async fn verify(connection: &mut SqliteConnection) -> Result<()> {
    let applied = applied(connection).await?.unwrap_or_default();
    match pending(MIGRATIONS, &applied)?.first() {
        None => Ok(()),
        Some(missing) => Err(StorageError::schema(format!(
            "the database lacks migration {} ({}); apply it (`durable_sqlite::schema_sql()` prints the schema), \
             or connect without `.verify_only()`",
            missing.version, missing.name
        ))),
    }
}

/// Applies what is missing, under the database's write lock: of several programs that start together one does it.
pub(crate) async fn migrate(connection: &mut SqliteConnection) -> Result<()> {
    // A look first: where nothing is missing nobody need wait for the lock.
    if let Some(applied) = applied(connection).await?
        && pending(MIGRATIONS, &applied)?.is_empty()
    {
        return Ok(());
    }
    connection.execute("BEGIN IMMEDIATE").await.map_err(reading)?;
    let result = apply(connection).await;
    let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
    let ended = connection.execute(end).await.map_err(reading);
    result.and(ended.map(|_| ()))
}

async fn apply(connection: &mut SqliteConnection) -> Result<()> {
    connection.execute(TABLE).await.map_err(reading)?;
    let applied = applied(connection).await?.unwrap_or_default();
    for migration in pending(MIGRATIONS, &applied)? {
        tracing::info!(version = migration.version, name = migration.name, "migrating");
        connection.execute(migration.sql).await.map_err(reading)?;
        connection.execute(AssertSqlSafe(record(migration))).await.map_err(reading)?;
    }
    Ok(())
}
