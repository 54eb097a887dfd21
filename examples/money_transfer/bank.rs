//! Another system, with a database of its own: the engine's transactions do not reach it. Like every good one it takes an
//! idempotency key with each call, and notes every call that it gets.

use durable_sqlite::Attempt;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, Sqlite, Transaction};
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

use crate::Error;

pub struct Bank(SqlitePool);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum BankError {
    #[error("account {0} is closed")]
    Closed(u32),
    #[error("account {account} is {cents} cents short")]
    Short { account: u32, cents: i64 },
}

/// Which step of which execution calls: for the account at the end, the bank itself does not care.
pub struct Call {
    pub id: String,
    pub execution: i64,
    pub step: &'static str,
}

/// A call as the bank has noted it.
pub struct Noted {
    pub id: String,
    pub execution: i64,
    pub step: String,
    pub key: String,
}

impl Bank {
    async fn connect(path: &Path) -> Result<Self, Error> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(30));
        // One connection: the bank does one thing after the other.
        Ok(Self(
            SqlitePoolOptions::new()
                .max_connections(1)
                .acquire_timeout(Duration::from_secs(60))
                .connect_with(options)
                .await?,
        ))
    }

    /// A new bank with these accounts.
    pub async fn create(path: &Path, accounts: impl Iterator<Item = (u32, i64, bool)>) -> Result<Self, Error> {
        let bank = Self::connect(path).await?;
        sqlx::raw_sql(
            "CREATE TABLE accounts (account INTEGER PRIMARY KEY, cents INTEGER NOT NULL, closed INTEGER NOT NULL);
             CREATE TABLE holds (hold TEXT PRIMARY KEY, account INTEGER NOT NULL, cents INTEGER NOT NULL, state TEXT NOT NULL);
             CREATE TABLE calls (call INTEGER PRIMARY KEY, id TEXT NOT NULL, execution INTEGER NOT NULL, step TEXT NOT NULL,
                 key TEXT NOT NULL, program INTEGER NOT NULL, ended INTEGER NOT NULL)",
        )
        .execute(&bank.0)
        .await?;
        for (account, cents, closed) in accounts {
            let insert = sqlx::query("INSERT INTO accounts VALUES (?, ?, ?)").bind(account).bind(cents).bind(closed);
            insert.execute(&bank.0).await?;
        }
        Ok(bank)
    }

    /// The bank that is there.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        Self::connect(path).await
    }

    /// Holds money on an account: it is taken from it at once, or will be added to it when the hold is completed.
    pub async fn hold(&self, call: Call, attempt: Attempt, account: u32, cents: i64) -> Result<Uuid, BankError> {
        let (mut tx, number) = self.begin(call, attempt.key()).await.unwrap_or_else(broken);
        let held = try_hold(&mut tx, attempt.key(), account, cents).await.unwrap_or_else(broken);
        end(tx, number).await.unwrap_or_else(broken);
        held.map(|()| attempt.key())
    }

    /// Completes a hold.
    pub async fn complete(&self, call: Call, attempt: Attempt, hold: Uuid) -> Result<(), BankError> {
        self.settle(call, attempt, hold, "completed", "max(cents, 0)").await
    }

    /// Takes a hold back.
    pub async fn roll_back(&self, call: Call, attempt: Attempt, hold: Uuid) -> Result<(), BankError> {
        self.settle(call, attempt, hold, "rolled back", "-min(cents, 0)").await
    }

    async fn settle(&self, call: Call, attempt: Attempt, hold: Uuid, state: &str, back: &str) -> Result<(), BankError> {
        let (mut tx, number) = self.begin(call, attempt.key()).await.unwrap_or_else(broken);
        try_settle(&mut tx, hold, state, back).await.unwrap_or_else(broken);
        end(tx, number).await.unwrap_or_else(broken);
        Ok(())
    }

    /// Notes the call, takes its time, and begins to serve it.
    async fn begin(&self, call: Call, key: Uuid) -> Result<(Transaction<'static, Sqlite>, i64), sqlx::Error> {
        let insert =
            sqlx::query("INSERT INTO calls (id, execution, step, key, program, ended) VALUES (?, ?, ?, ?, ?, 0)");
        let insert = insert.bind(call.id).bind(call.execution).bind(call.step).bind(key.to_string());
        let number = insert.bind(std::process::id()).execute(&self.0).await?.last_insert_rowid();
        // The network, and somebody else's computer.
        tokio::time::sleep(Duration::from_millis(20 + key.as_u128() as u64 % 80)).await;
        Ok((self.0.begin_with("BEGIN IMMEDIATE").await?, number))
    }

    /// How many calls of a program have not been answered.
    pub async fn under_way(&self, program: u32) -> Result<i64, Error> {
        let count = sqlx::query("SELECT count(*) FROM calls WHERE program = ? AND ended = 0").bind(program);
        Ok(count.fetch_one(&self.0).await?.get(0))
    }

    /// All calls, in order.
    pub async fn calls(&self) -> Result<Vec<Noted>, Error> {
        let rows = sqlx::query("SELECT id, execution, step, key FROM calls ORDER BY call").fetch_all(&self.0).await?;
        let noted = |row: sqlx::sqlite::SqliteRow| Noted {
            id: row.get(0),
            execution: row.get(1),
            step: row.get(2),
            key: row.get(3),
        };
        Ok(rows.into_iter().map(noted).collect())
    }

    /// What is on all accounts together, and on holds that are neither completed nor taken back.
    pub async fn totals(&self) -> Result<(i64, i64), Error> {
        let row =
            sqlx::query("SELECT (SELECT sum(cents) FROM accounts), (SELECT count(*) FROM holds WHERE state = 'held')");
        let row = row.fetch_one(&self.0).await?;
        Ok((row.get(0), row.get(1)))
    }

    /// What is on one account.
    pub async fn balance(&self, account: u32) -> Result<i64, Error> {
        let row = sqlx::query("SELECT cents FROM accounts WHERE account = ?").bind(account);
        Ok(row.fetch_one(&self.0).await?.get(0))
    }
}

/// The call was answered.
async fn end(mut tx: Transaction<'static, Sqlite>, number: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE calls SET ended = 1 WHERE call = ?").bind(number).execute(&mut *tx).await?;
    tx.commit().await
}

async fn try_hold(
    tx: &mut Transaction<'static, Sqlite>,
    hold: Uuid,
    account: u32,
    cents: i64,
) -> Result<Result<(), BankError>, sqlx::Error> {
    let known = sqlx::query("SELECT 1 FROM holds WHERE hold = ?").bind(hold.to_string());
    // A call that comes again.
    if known.fetch_optional(&mut **tx).await?.is_some() {
        return Ok(Ok(()));
    }
    let row = sqlx::query("SELECT cents, closed FROM accounts WHERE account = ?").bind(account);
    let row = row.fetch_one(&mut **tx).await?;
    if row.get::<bool, _>(1) {
        return Ok(Err(BankError::Closed(account)));
    }
    let short = -(row.get::<i64, _>(0) + cents);
    if short > 0 {
        return Ok(Err(BankError::Short { account, cents: short }));
    }
    let insert = sqlx::query("INSERT INTO holds VALUES (?, ?, ?, 'held')").bind(hold.to_string()).bind(account);
    insert.bind(cents).execute(&mut **tx).await?;
    let update = sqlx::query("UPDATE accounts SET cents = cents + min(?, 0) WHERE account = ?");
    update.bind(cents).bind(account).execute(&mut **tx).await?;
    Ok(Ok(()))
}

async fn try_settle(
    tx: &mut Transaction<'static, Sqlite>,
    hold: Uuid,
    state: &str,
    back: &str,
) -> Result<(), sqlx::Error> {
    let update = sqlx::query("UPDATE holds SET state = ? WHERE hold = ? AND state = 'held'");
    let settled = update.bind(state).bind(hold.to_string()).execute(&mut **tx).await?.rows_affected();
    // A call that comes again finds it settled.
    if settled == 1 {
        let sql = format!(
            "UPDATE accounts SET cents = cents + (SELECT {back} FROM holds WHERE hold = ?1)
             WHERE account = (SELECT account FROM holds WHERE hold = ?1)"
        );
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(hold.to_string()).execute(&mut **tx).await?;
    }
    Ok(())
}

/// The demo's own bank; a real service would tell apart what is worth a retry.
fn broken<T>(error: sqlx::Error) -> T {
    panic!("the bank's database: {error}")
}
