//! Another system, with a database of its own: the engine's transactions do not reach it. Like every good one it takes an
//! idempotency key with each call, and notes every call that it gets.

use durable_core::Attempt;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqlitePool;
use sqlx::{Row, Sqlite, Transaction};
use std::collections::BTreeMap;
use std::path::Path;
use uuid::Uuid;

use crate::journal::{Call, Journal};
use crate::saga::moment;
use crate::{Error, files};

pub struct Bank {
    pool: SqlitePool,
    journal: Journal,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum BankError {
    #[error("account {0} is closed")]
    Closed(u32),
    #[error("account {account} is {cents} cents short")]
    Short { account: u32, cents: i64 },
}

impl Bank {
    /// A new bank with these accounts.
    pub async fn create(folder: &Path, accounts: impl Iterator<Item = (u32, i64, bool)>) -> Result<Self, Error> {
        let bank = Self::open(folder).await?;
        sqlx::raw_sql(
            "CREATE TABLE accounts (account INTEGER PRIMARY KEY, cents INTEGER NOT NULL, closed INTEGER NOT NULL);
             CREATE TABLE holds (hold TEXT PRIMARY KEY, account INTEGER NOT NULL, cents INTEGER NOT NULL, state TEXT NOT NULL)",
        )
        .execute(&bank.pool)
        .await?;
        for (account, cents, closed) in accounts {
            let insert = sqlx::query("INSERT INTO accounts VALUES (?, ?, ?)").bind(account).bind(cents).bind(closed);
            insert.execute(&bank.pool).await?;
        }
        Ok(bank)
    }

    /// The bank that is there.
    pub async fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self { pool: files::pool(&files::bank(folder)).await?, journal: Journal::open(folder).await? })
    }

    /// Holds money on an account: it is taken from it at once, or will be added to it when the hold is completed.
    /// The attempt's key names the hold.
    pub async fn hold(&self, call: Call, attempt: Attempt, account: u32, cents: i64) -> Result<(), BankError> {
        let (mut tx, number) = self.begin(call, &attempt).await.unwrap_or_else(broken);
        let held = try_hold(&mut tx, attempt.key(), account, cents).await.unwrap_or_else(broken);
        self.end(tx, number).await.unwrap_or_else(broken);
        held
    }

    /// Completes a hold.
    pub async fn complete(&self, call: Call, attempt: Attempt, hold: Uuid) -> Result<(), BankError> {
        self.settle(call, attempt, hold, "completed", "max(cents, 0)").await
    }

    /// Takes a hold back; one that is not there is never made from then on, however late its call arrives.
    pub async fn roll_back(&self, call: Call, attempt: Attempt, hold: Uuid) -> Result<(), BankError> {
        self.settle(call, attempt, hold, "rolled back", "-min(cents, 0)").await
    }

    async fn settle(&self, call: Call, attempt: Attempt, hold: Uuid, state: &str, back: &str) -> Result<(), BankError> {
        let (mut tx, number) = self.begin(call, &attempt).await.unwrap_or_else(broken);
        try_settle(&mut tx, hold, state, back).await.unwrap_or_else(broken);
        self.end(tx, number).await.unwrap_or_else(broken);
        Ok(())
    }

    /// Notes the call, takes its time, and begins to serve it.
    async fn begin(&self, call: Call, attempt: &Attempt) -> Result<(Transaction<'static, Sqlite>, i64), sqlx::Error> {
        let key = attempt.key();
        let number = self.journal.begin(Call { key: key.to_string(), ..call }).await?;
        // The network, and somebody else's computer.
        tokio::time::sleep(moment(key.as_u128() as u64)).await;
        Ok((self.pool.begin_with("BEGIN IMMEDIATE").await?, number))
    }

    /// The call was answered.
    async fn end(&self, tx: Transaction<'static, Sqlite>, number: i64) -> Result<(), sqlx::Error> {
        tx.commit().await?;
        self.journal.end(number).await
    }

    /// How many holds are neither completed nor taken back.
    pub async fn open_holds(&self) -> Result<i64, Error> {
        let row = sqlx::query("SELECT count(*) FROM holds WHERE state = 'held'").fetch_one(&self.pool).await?;
        Ok(row.get(0))
    }

    /// What is on each account.
    pub async fn balances(&self) -> Result<BTreeMap<u32, i64>, Error> {
        let rows = sqlx::query("SELECT account, cents FROM accounts").fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|row| (row.get(0), row.get(1))).collect())
    }
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
    // Of a hold that nobody has made yet.
    let insert = sqlx::query("INSERT INTO holds VALUES (?, -1, 0, ?) ON CONFLICT DO NOTHING");
    insert.bind(hold.to_string()).bind(state).execute(&mut **tx).await?;
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
