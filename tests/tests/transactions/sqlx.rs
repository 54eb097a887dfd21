// What the cases do by way of `sqlx`.

const KEY: &str = "key";
const BEGIN: &str = "BEGIN";
const SCRATCH: &str = "CREATE TEMP TABLE scratch (dummy TEXT)";

impl From<sqlx::Error> for DebitError {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error.to_string())
    }
}

fn literal(run: durable_core::RunId) -> String {
    format!("'{run}'")
}

async fn sql(tx: &mut Tx, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut **tx).await.map(|_| ())
}

async fn number(tx: &mut Tx, sql: &'static str) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(sql).fetch_one(&mut **tx).await
}

/// In a transaction within the transaction, which is committed or dropped.
async fn within(tx: &mut Tx, sql: &'static str, commits: bool) -> Result<(), sqlx::Error> {
    let mut inner = sqlx::Connection::begin(&mut **tx).await?;
    sqlx::query(sql).execute(&mut *inner).await?;
    if commits { inner.commit().await } else { Ok(()) }
}

async fn try_run(connection: &mut <B as Sql>::Connection, sql: &'static str) -> bool {
    sqlx::raw_sql(sql).execute(&mut *connection).await.is_ok()
}

// SQL Server has none.
tests!(deferred: a_deferred_constraint_is_its_error);

mod deferred {
    use super::*;

    pub(super) async fn a_deferred_constraint_is_its_error() {
        const DEBIT: Definition<(), String> = Definition::new("debit");
        let backend = bank().await;
        backend
            .execute("CREATE TABLE lines (account BIGINT REFERENCES accounts (id) DEFERRABLE INITIALLY DEFERRED)")
            .await;
        let calls = Effects::default();
        let counted = calls.clone();
        let host = host_with(&backend, DEBIT, move |proc: Process| {
            let calls = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    calls.add("call");
                    sql(&mut tx, "INSERT INTO lines VALUES (77)").await?;
                    debit(&mut tx, 100).await
                });
                match debit.await {
                    Err(StepError::Refused(why)) => Ok(why.to_string()),
                    other => panic!("{other:?}"),
                }
            }
        })
        .await;
        let why = host.spawn(DEBIT, "d", &()).await.unwrap().output().await.unwrap();
        assert!(why.to_lowercase().contains("foreign key"), "{why}");
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (1000, 1));
    }
}
