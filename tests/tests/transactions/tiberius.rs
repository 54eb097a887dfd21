// What the cases do by way of `tiberius`.

use durable_mssql::tiberius::error::Error;

const KEY: &str = "[key]";
const BEGIN: &str = "BEGIN TRANSACTION";
const SCRATCH: &str = "CREATE TABLE #scratch (dummy INT)";

impl From<Error> for DebitError {
    fn from(error: Error) -> Self {
        Self::Sql(error.to_string())
    }
}

fn literal(run: durable_core::RunId) -> String {
    format!("0x{}", run.0.simple())
}

async fn sql(tx: &mut Tx, sql: &str) -> Result<(), Error> {
    tx.simple_query(sql).await?.into_results().await.map(drop)
}

async fn number(tx: &mut Tx, sql: &'static str) -> Result<i64, Error> {
    let row = tx.query(sql, &[]).await?.into_row().await?;
    Ok(row.and_then(|row| row.get(0)).unwrap())
}

/// In a part of the transaction that is kept or undone.
async fn within(tx: &mut Tx, statement: &'static str, commits: bool) -> Result<(), Error> {
    sql(tx, "SAVE TRANSACTION part").await?;
    sql(tx, statement).await?;
    if commits { Ok(()) } else { sql(tx, "ROLLBACK TRANSACTION part").await }
}

async fn try_run(connection: &mut <B as Sql>::Connection, sql: &'static str) -> bool {
    let ran = async { connection.simple_query(sql).await?.into_results().await };
    ran.await.is_ok()
}
