use durable_core::storage::migration::{Applied, Migration, pending};
use durable_core::storage::{Result, StorageError};
use tiberius::Row;

use crate::errors::reading;
use crate::names::Schema;
use crate::rows::{get, text};
use crate::session::Client;
use crate::sql::{Commits, Sql};

/// The schema's steps. In their statements `{schema}` stands for the schema's name, quoted.
pub const MIGRATIONS: &[Migration] = &[Migration {
    version: 1,
    name: "processes",
    sql: include_str!("../migrations/0001_processes.sql"),
    oldest_code: 1,
}];

const TABLE: &str = "CREATE TABLE {schema}.migrations (
    version BIGINT NOT NULL, name NVARCHAR(128) NOT NULL, checksum NVARCHAR(64) NOT NULL, oldest_code BIGINT NOT NULL,
    applied_at DATETIME2(6) NOT NULL, CONSTRAINT migrations_key PRIMARY KEY CLUSTERED (version))";

/// The whole schema as one script, for people who apply it themselves.
///
/// # Errors
/// If `schema` is not a name that [`Connect::schema`](crate::Connect::schema) takes.
pub fn schema_sql(schema: &str) -> Result<String> {
    let schema = Schema::new(schema)?;
    let mut sql = format!("{}\n{};\n\n", create(&schema), within(&schema, TABLE));
    for migration in MIGRATIONS {
        sql.push_str(&within(&schema, migration.sql));
        sql.push_str(&record(&schema, migration));
    }
    Ok(sql)
}

/// A schema must be created by a batch of its own.
fn create(schema: &Schema) -> String {
    let name = schema.name();
    format!("IF SCHEMA_ID(N'{name}') IS NULL EXEC (N'CREATE SCHEMA [{name}]');")
}

fn within(schema: &Schema, sql: &str) -> String {
    sql.replace("{schema}", &schema.to_string())
}

fn record(schema: &Schema, migration: &Migration) -> String {
    let Migration { version, name, oldest_code, .. } = migration;
    format!(
        "\nINSERT INTO {schema}.migrations (version, name, checksum, oldest_code, applied_at)
    VALUES ({version}, N'{name}', N'{}', {oldest_code}, SYSUTCDATETIME());\n",
        migration.checksum()
    )
}

async fn exists(client: &mut Client, schema: &Schema) -> Result<bool> {
    let mut sql = Sql::default();
    let name = sql.text(schema.name());
    sql.push(format!(
        "SELECT 1 FROM sys.tables AS t JOIN sys.schemas AS s ON s.schema_id = t.schema_id
         WHERE s.name = {name} AND t.name = N'migrations'"
    ));
    Ok(!sql.run(client, Commits::No).await?.rows().is_empty())
}

/// What the database remembers; none if it has no table of migrations.
async fn applied(client: &mut Client, schema: &Schema) -> Result<Option<Vec<Applied>>> {
    if !exists(client, schema).await? {
        return Ok(None);
    }
    let mut sql = Sql::default();
    sql.push(format!("SELECT version, checksum, oldest_code FROM {schema}.migrations ORDER BY version"));
    let rows = sql.fetch(client).await.map_err(|error| explain(schema, error))?.rows();
    let applied =
        |row: &Row| Ok(Applied { version: get(row, 0)?, checksum: text(row, 1)?.into(), oldest_code: get(row, 2)? });
    rows.iter().map(applied).collect::<Result<_>>().map(Some)
}

/// Refuses a schema that this code does not fit, and changes nothing.
pub(crate) async fn verify(client: &mut Client, schema: &Schema) -> Result<()> {
    let applied = applied(client, schema).await?.unwrap_or_default();
    match pending(MIGRATIONS, &applied)?.first() {
        None => Ok(()),
        Some(missing) => Err(StorageError::schema(format!(
            "schema {schema} lacks migration {} ({}); apply it (`durable_mssql::schema_sql({:?})` prints it), or connect \
             without `.verify_only()`",
            missing.version,
            missing.name,
            schema.name()
        ))),
    }
}

/// Applies what is missing, under a lock of the schema: of several programs that start together one does it.
pub(crate) async fn migrate(client: &mut Client, schema: &Schema) -> Result<()> {
    // A look first: where nothing is missing nobody need wait, nor have a right to create anything.
    if let Some(applied) = applied(client, schema).await?
        && pending(MIGRATIONS, &applied)?.is_empty()
    {
        return Ok(());
    }
    // Programs that run lock tables as they are used, in their order: the server may choose this one to give way.
    const TRIES: usize = 5;
    let mut tries = 0;
    loop {
        tries += 1;
        execute(client, "BEGIN TRANSACTION").await.map_err(reading)?;
        let result = apply(client, schema).await;
        // An error has rolled it back already.
        let end = match result {
            Ok(()) => "COMMIT TRANSACTION",
            Err(_) => "IF @@TRANCOUNT > 0 ROLLBACK TRANSACTION",
        };
        let ended = execute(client, end).await;
        match result {
            Ok(()) => return ended.map_err(|error| explain(schema, error)),
            // Over a lost connection it cannot even begin.
            Err(StorageError::Blocked(why) | StorageError::Unavailable(why)) if tries < TRIES => {
                tracing::info!("the migration of {schema} is tried again: {why}");
            }
            Err(why) => return Err(why),
        }
    }
}

async fn execute(client: &mut Client, sql: impl Into<String>) -> tiberius::Result<()> {
    client.simple_query(sql.into()).await?.into_results().await.map(drop)
}

async fn apply(client: &mut Client, schema: &Schema) -> Result<()> {
    const PATIENCE: u32 = 20_000;
    let mut sql = Sql::default();
    let lock = sql.text(schema.lock("migrations"));
    sql.push(format!("EXECUTE sp_getapplock {lock}, N'Exclusive', N'Transaction', {PATIENCE}"));
    sql.push(format!(
        "SELECT CONVERT(BIT, CASE APPLOCK_MODE(N'public', {lock}, N'Transaction') WHEN N'Exclusive' THEN 1 ELSE 0 END)"
    ));
    let rows = sql.run(client, Commits::No).await?.rows();
    if !rows.first().map(|row| get::<bool>(row, 0)).transpose()?.unwrap_or(false) {
        return Err(StorageError::unavailable(format!("schema {schema} is being changed by another program")));
    }
    let explained = |error| explain(schema, error);
    execute(client, create(schema)).await.map_err(explained)?;
    if !exists(client, schema).await? {
        execute(client, within(schema, TABLE)).await.map_err(explained)?;
    }
    let applied = applied(client, schema).await?.unwrap_or_default();
    for migration in pending(MIGRATIONS, &applied)? {
        tracing::info!(version = migration.version, name = migration.name, "migrating");
        for sql in [within(schema, migration.sql), record(schema, migration)] {
            execute(client, sql).await.map_err(explained)?;
        }
    }
    Ok(())
}

fn explain(schema: &Schema, error: tiberius::error::Error) -> StorageError {
    // No right to a statement, to an object; a schema that is not there or may not be used.
    const NO_RIGHT: [u32; 5] = [262, 229, 230, 2759, 2760];
    if !error.code().is_some_and(|number| NO_RIGHT.contains(&number)) {
        return reading(error);
    }
    let name = schema.name();
    StorageError::schema(format!(
        "{}; to create the tables a user needs `CREATE TABLE`, and `CREATE SCHEMA` or `ALTER` on schema {schema}. Let another \
         one apply `durable_mssql::schema_sql({name:?})`, then grant this one what it needs to run: `GRANT SELECT, INSERT, \
         UPDATE, DELETE ON SCHEMA::[{name}] TO …`",
        reading(error)
    ))
}
