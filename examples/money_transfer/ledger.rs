//! The accounts as tables in the same database as the processes: debit and credit are transactional steps, so they
//! happen exactly once, and need no idempotency key.

use durable_core::{Failure, Process, Retry, StepError};
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use crate::Error;
use crate::journal::{Call, Journal};
use crate::place::Place;
use crate::saga::{Transfer, TransferError, moment};

/// What the tables are called, for the steps' statements.
pub struct Ledger {
    accounts: String,
    lines: String,
    journal: Journal,
    /// On SQLite an open transaction keeps everybody from writing, so it is short.
    hurry: u32,
}

/// Why a step failed; rolled back by then.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("account {0} is closed, or has less than {1} cents")]
    Refused(u32, i64),
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
}

impl Ledger {
    /// The one that is there.
    pub async fn open(place: &Place, folder: &Path) -> Result<Self, Error> {
        let hurry = if matches!(place, Place::Sqlite(_)) { 4 } else { 1 };
        let (accounts, lines) = (place.table("accounts"), place.table("lines"));
        Ok(Self { accounts, lines, journal: Journal::open(folder).await?, hurry })
    }

    async fn begin(&self, call: Call) -> i64 {
        let number = self.journal.begin(call).await;
        number.unwrap_or_else(|error| panic!("the journal: {error}"))
    }

    async fn end(&self, number: i64) {
        self.journal.end(number).await.unwrap_or_else(|error| panic!("the journal: {error}"));
    }
}

/// The transactions of a transfer, in this order.
pub const STEPS: [&str; 2] = ["Debit", "Credit"];

/// The saga's statements run on the connection of a transaction of the backend's; but for its type all is the same.
macro_rules! saga {
    ($backend:ident) => {
        pub mod $backend {
            use super::*;
            use ::$backend::Transactions;
            use std::sync::Arc;

            /// Takes from one account and adds to the other; if that fails or is cancelled, gives back.
            pub async fn transfer(ledger: Arc<Ledger>, proc: Process, transfer: Transfer) -> Result<(), TransferError> {
                let Transfer { from, to, cents } = transfer;
                book(&ledger, &proc, "Debit", from, -cents).await?;
                let credited = book(&ledger, &proc, "Credit", to, cents).await;
                if credited.is_err() {
                    book(&ledger, &proc.compensation(), "GiveBack", from, cents).await?;
                }
                Ok(credited?)
            }

            /// Adds to an account, and writes the line of it.
            async fn book(
                ledger: &Ledger,
                proc: &Process,
                step: &'static str,
                account: u32,
                cents: i64,
            ) -> Result<(), StepError<Failure>> {
                let Ledger { accounts, lines, hurry, .. } = ledger;
                let update = format!(
                    "UPDATE {accounts} SET cents = cents + $1 WHERE account = $2 AND cents + $1 >= 0 AND NOT closed"
                );
                let insert = format!("INSERT INTO {lines} (transfer, step, account, cents) VALUES ($1, $2, $3, $4)");
                let (update, insert) = (&update, &insert);
                proc.transaction(step, async |mut tx| {
                    let number = ledger.begin(Call::of(proc, step)).await;
                    let update = sqlx::query(AssertSqlSafe(update.as_str())).bind(cents).bind(i64::from(account));
                    if update.execute(&mut *tx).await?.rows_affected() == 1 {
                        let insert = sqlx::query(AssertSqlSafe(insert.as_str())).bind(proc.id()).bind(step);
                        insert.bind(i64::from(account)).bind(cents).execute(&mut *tx).await?;
                        tokio::time::sleep(moment(number as u64 * 37) / *hurry).await;
                        ledger.end(number).await;
                        return Ok(());
                    }
                    ledger.end(number).await;
                    Err(LedgerError::Refused(account, -cents))
                })
                // A stopped program may hold an account's lock for as long as this one may wait: not a reason to give up.
                .retry(Retry::exponential(Duration::from_millis(100)).max_attempts(10))
                .retry_if(|error| !matches!(error, LedgerError::Refused(..)))
                .await
            }
        }
    };
}

saga!(durable_sqlite);
#[cfg(feature = "postgres")]
saga!(durable_postgres);

/// The books as an auditor sees them.
pub struct Books(AnyConnection, Place);

/// What is written of a transfer: step, account, cents.
pub type Lines = HashMap<String, Vec<(String, u32, i64)>>;

impl Books {
    /// New tables with these accounts.
    pub async fn create(place: &Place, accounts: impl Iterator<Item = (u32, i64, bool)>) -> Result<Self, Error> {
        let mut books = Self(place.connect().await?, place.clone());
        let (table, lines) = (place.table("accounts"), place.table("lines"));
        let accounts: Vec<_> = accounts.map(|account| format!("{account:?}")).collect();
        let sql = format!(
            "CREATE TABLE {table} (account BIGINT PRIMARY KEY, cents BIGINT NOT NULL, closed BOOLEAN NOT NULL);
             CREATE TABLE {lines} (transfer TEXT NOT NULL, step TEXT NOT NULL, account BIGINT NOT NULL, cents BIGINT NOT NULL);
             INSERT INTO {table} VALUES {}",
            accounts.join(", ")
        );
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut books.0).await?;
        Ok(books)
    }

    /// What is on each account.
    pub async fn balances(&mut self) -> Result<BTreeMap<u32, i64>, Error> {
        let sql = format!("SELECT account, cents FROM {}", self.1.table("accounts"));
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut self.0).await?;
        rows.iter().map(|row| Ok((u32::try_from(row.get::<i64, _>(0))?, row.get(1)))).collect()
    }

    /// All lines, by transfer.
    pub async fn lines(&mut self) -> Result<Lines, Error> {
        let sql = format!("SELECT transfer, step, account, cents FROM {}", self.1.table("lines"));
        let mut lines = Lines::new();
        for row in sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut self.0).await? {
            let line = (row.get(1), u32::try_from(row.get::<i64, _>(2))?, row.get(3));
            lines.entry(row.get(0)).or_default().push(line);
        }
        Ok(lines)
    }
}
