use durable_core::storage::migration::{Applied, Migration, pending};
use durable_core::storage::{Result, StorageError};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Executor};

use crate::errors::{code, reading};
use crate::names::Schema;
use crate::rows::get;

/// The schema's steps. In their statements `{schema}` stands for the schema's name, quoted.
pub const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "processes",
    sql: include_str!("../migrations/0001_processes.sql"),
    oldest_code: 1,
}];

const TABLE: &str = "CREATE TABLE IF NOT EXISTS {schema}.migrations (
    version bigint NOT NULL PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, oldest_code bigint NOT NULL,
    applied_at timestamptz NOT NULL)";

/// The whole schema as one script, for people who apply it themselves.
///
/// # Errors
/// If `schema` is not a name that [`Connect::schema`](crate::Connect::schema) takes.
pub fn schema_sql(schema: &str) -> Result<String> {
    let schema = Schema::new(schema)?;
    let mut sql = format!("CREATE SCHEMA IF NOT EXISTS {schema};\n{};\n", within(&schema, TABLE));
    for migration in MIGRATIONS {
        sql.push_str(&within(&schema, migration.sql));
        sql.push_str(&record(&schema, migration));
    }
    Ok(sql)
}

fn within(schema: &Schema, sql: &str) -> String {
    sql.replace("{schema}", &schema.to_string())
}

fn record(schema: &Schema, migration: &Migration) -> String {
    let Migration { version, name, oldest_code, .. } = migration;
    format!(
        "\nINSERT INTO {schema}.migrations (version, name, checksum, oldest_code, applied_at) \
         VALUES ({version}, '{name}', '{}', {oldest_code}, now());\n",
        migration.checksum()
    )
}

/// What the database remembers; none if it has no table of migrations.
async fn applied(connection: &mut PgConnection, schema: &Schema) -> Result<Option<Vec<Applied>>> {
    let table = sqlx::query("SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = $1 AND tablename = 'migrations'");
    if connection.fetch_optional(table.bind(schema.name())).await.map_err(reading)?.is_none() {
        return Ok(None);
    }
    let rows = format!("SELECT version, checksum, oldest_code FROM {schema}.migrations ORDER BY version");
    let rows = connection.fetch_all(sqlx::query(AssertSqlSafe(rows))).await.map_err(|e| explain(schema, e))?;
    let applied =
        |row: &PgRow| Ok(Applied { version: get(row, 0)?, checksum: get(row, 1)?, oldest_code: get(row, 2)? });
    rows.iter().map(applied).collect::<Result<_>>().map(Some)
}

/// Refuses a schema that this code does not fit, and changes nothing.
pub(crate) async fn verify(connection: &mut PgConnection, schema: &Schema) -> Result<()> {
    let applied = applied(connection, schema).await?.unwrap_or_default();
    match pending(MIGRATIONS, &applied)?.first() {
        None => Ok(()),
        Some(missing) => Err(StorageError::schema(format!(
            "schema {schema} lacks migration {} ({}); apply it (`durable_postgres::schema_sql({:?})` prints it), or \
             connect without `.verify_only()`",
            missing.version,
            missing.name,
            schema.name()
        ))),
    }
}

/// Applies what is missing, under a lock of the schema: of several programs that start together one does it.
pub(crate) async fn migrate(connection: &mut PgConnection, schema: &Schema) -> Result<()> {
    const TRIES: usize = 20;
    for _ in 1..TRIES {
        // A look first: where nothing is missing nobody need wait, nor have a right to create anything.
        if let Some(applied) = applied(connection, schema).await?
            && pending(MIGRATIONS, &applied)?.is_empty()
        {
            return Ok(());
        }
        let lock = i64::from_be_bytes(key(schema));
        connection.execute("BEGIN").await.map_err(reading)?;
        let result = apply(connection, schema, lock).await;
        let end = if matches!(result, Ok(Ok(()))) { "COMMIT" } else { "ROLLBACK" };
        let ended = connection.execute(end).await;
        match result? {
            Ok(()) => return ended.map(|_| ()).map_err(|e| explain(schema, e)),
            // Where the lock excludes nobody, or the schema is being made by other hands, another may have been first. And
            // programs that run on the tables may lock them in another order than a migration does.
            Err(error) if code(&error).is_some_and(|code| is_race(&code)) => {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            Err(error) => return Err(explain(schema, error)),
        }
    }
    Err(StorageError::unavailable(format!("schema {schema} is being changed by others again and again")))
}

fn is_race(code: &str) -> bool {
    const DUPLICATE_SCHEMA: &str = "42P06";
    const DUPLICATE_TABLE: &str = "42P07";
    const UNIQUE: &str = "23505";
    const SERIALIZATION: &str = "40001";
    const DEADLOCK: &str = "40P01";
    [DUPLICATE_SCHEMA, DUPLICATE_TABLE, UNIQUE, SERIALIZATION, DEADLOCK].contains(&code)
}

fn key(schema: &Schema) -> [u8; 8] {
    let id = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, format!("durable migrations {schema}").as_bytes());
    let mut key = [0; 8];
    key.copy_from_slice(&id.as_bytes()[..8]);
    key
}

/// The inner error is the server's.
async fn apply(connection: &mut PgConnection, schema: &Schema, lock: i64) -> Result<sqlx::Result<()>> {
    let made = async {
        connection.execute(sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(lock)).await?;
        let exists = sqlx::query("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = $1").bind(schema.name());
        // Asked for first: `IF NOT EXISTS` needs the right to create one even where there is one.
        if connection.fetch_optional(exists).await?.is_none() {
            connection.execute(AssertSqlSafe(format!("CREATE SCHEMA IF NOT EXISTS {schema}"))).await?;
        }
        connection.execute(AssertSqlSafe(within(schema, TABLE))).await.map(|_| ())
    };
    if let Err(error) = made.await {
        return Ok(Err(error));
    }
    let applied = applied(connection, schema).await?.unwrap_or_default();
    for migration in pending(MIGRATIONS, &applied)? {
        tracing::info!(version = migration.version, name = migration.name, "migrating");
        for sql in [within(schema, migration.sql), record(schema, migration)] {
            if let Err(error) = connection.execute(AssertSqlSafe(sql)).await {
                return Ok(Err(error));
            }
        }
    }
    Ok(Ok(()))
}

fn explain(schema: &Schema, error: sqlx::Error) -> StorageError {
    const NO_RIGHT: &str = "42501";
    if code(&error).as_deref() != Some(NO_RIGHT) {
        return reading(error);
    }
    let name = schema.name();
    StorageError::schema(format!(
        "{}; to create the tables a role needs `CREATE` on the database, or on schema {schema} if that exists. Let \
         another role apply `durable_postgres::schema_sql({name:?})`, then grant this one what it needs to run: `GRANT \
         USAGE ON SCHEMA {schema}` and `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema}`",
        reading(error)
    ))
}
