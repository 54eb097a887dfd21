use durable_core::{Attempt, Cancelled, Definition, Failure, Process, StepError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use crate::bank::Bank;
use crate::journal::Call;

/// How many accounts there are; the last one is closed.
pub const ACCOUNTS: u32 = 20;
/// What each account has at first, in cents.
pub const OPENING: i64 = 20_000;

/// The accounts and what they have at first.
pub fn accounts() -> impl Iterator<Item = (u32, i64, bool)> {
    (0..ACCOUNTS).map(|account| (account, OPENING, account + 1 == ACCOUNTS))
}

/// How long a step takes: long enough that a kill finds it in the middle.
pub fn moment(any: u64) -> Duration {
    Duration::from_millis(20 + any % 80)
}

/// The id of the n-th transfer.
pub fn id(n: u32) -> String {
    format!("transfer-{n:03}")
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Transfer {
    pub from: u32,
    pub to: u32,
    pub cents: i64,
}

impl Transfer {
    /// The n-th one of the demo: every tenth goes to the closed account, some ask for more than anybody has.
    pub fn number(n: u32) -> Self {
        let from = n % (ACCOUNTS - 1);
        let to = if n % 10 == 3 { ACCOUNTS - 1 } else { (from + 1 + n % 7) % (ACCOUNTS - 1) };
        let cents = if n % 17 == 5 { OPENING * 100 } else { i64::from(100 + n * 37 % 900) };
        Self { from, to, cents }
    }
}

/// Why a transfer did not happen.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Step(#[from] StepError<Failure>),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

pub const TRANSFER: Definition<Transfer, (), TransferError> = Definition::new("transfer");

/// What the bank is asked for, in this order.
pub const STEPS: [&str; 4] = ["StartTransfer1", "StartTransfer2", "CompleteTransfer1", "CompleteTransfer2"];

/// Holds the money on both accounts; whatever fails in between, a cancellation too, it gives back what it holds. Then it
/// completes both, whatever comes.
pub async fn transfer(bank: Arc<Bank>, proc: Process, transfer: Transfer) -> Result<(), TransferError> {
    let Transfer { from, to, cents } = transfer;
    let call = |step| Call::of(&proc, step);
    let holds = [("StartTransfer1", from, -cents), ("StartTransfer2", to, cents)];
    let held = async {
        for (step, account, cents) in holds {
            proc.step(step, |attempt: Attempt| bank.hold(call(step), attempt, account, cents)).await?;
        }
        Ok(())
    };
    if let Err(error) = held.await {
        let undo = proc.compensation();
        // Both, whether they have returned or not: an attempt that was cut off may hold money, and its key names the hold.
        for (step, (started, ..)) in ["RollbackTransfer1", "RollbackTransfer2"].into_iter().zip(holds) {
            undo.step(step, |attempt: Attempt| bank.roll_back(call(step), attempt, proc.key(started))).await?;
        }
        return Err(error);
    }
    let forward = proc.uncancellable();
    for (step, (started, ..)) in ["CompleteTransfer1", "CompleteTransfer2"].into_iter().zip(holds) {
        forward.step(step, |attempt: Attempt| bank.complete(call(step), attempt, proc.key(started))).await?;
    }
    Ok(())
}
