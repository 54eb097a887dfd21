//! The processes that are measured.

use durable_core::{Definition, Event, Failure, Process};
use std::time::Duration;

/// So many steps, one after the other.
pub const STEPS: Definition<u32, u32> = Definition::new("steps");

pub(crate) async fn steps(proc: Process, steps: u32) -> Result<u32, Failure> {
    for n in 0..steps {
        proc.step(("step", n), || async { Ok::<_, Failure>(12345) }).await?;
    }
    Ok(steps)
}

/// Waits for a year.
pub const YEAR: Definition<(), ()> = Definition::new("year");

pub(crate) async fn year(proc: Process, (): ()) -> Result<(), Failure> {
    proc.delay("a year", Duration::from_secs(365 * 24 * 3600)).await?;
    Ok(())
}

pub(crate) const GO: Event<()> = Event::new("Go");

/// Waits for a message, then takes a step.
pub(crate) const MESSAGE: Definition<(), ()> = Definition::new("message");

pub(crate) async fn message(proc: Process, (): ()) -> Result<(), Failure> {
    proc.event(GO).await?;
    proc.step("step", || async { Ok::<_, Failure>(()) }).await?;
    Ok(())
}

/// One step that takes longer than the program lives, at first.
pub(crate) const FLIGHT: Definition<(), ()> = Definition::new("flight");

pub(crate) async fn flight(proc: Process, (): ()) -> Result<(), Failure> {
    proc.step("begun", || async { Ok::<_, Failure>(()) }).await?;
    let execution = proc.execution();
    proc.step("flight", move || async move {
        if execution == 1 {
            std::future::pending::<()>().await;
        }
        Ok::<_, Failure>(())
    })
    .await?;
    Ok(())
}

/// Transactional steps on an account: the table, the account, how many.
pub(crate) const TRANSACTIONS: Definition<(String, i64, u32), u32> = Definition::new("transactions");

/// But for the type of the connection, the same on every backend.
macro_rules! transactions {
    ($backend:ident) => {
        pub(crate) mod $backend {
            use super::*;
            use ::$backend::Transactions;

            pub(crate) async fn transactions(
                proc: Process,
                (table, account, steps): (String, i64, u32),
            ) -> Result<u32, Failure> {
                let sql = format!("UPDATE {table} SET cents = cents - 1 WHERE account = $1");
                let sql = &sql;
                for n in 0..steps {
                    proc.transaction(("step", n), async |mut tx| {
                        let update = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(account);
                        update.execute(&mut *tx).await.map(|_| 12345)
                    })
                    .await?;
                }
                Ok(steps)
            }
        }
    };
}

transactions!(durable_postgres);
transactions!(durable_sqlite);
