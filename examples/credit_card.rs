//! Watches credit cards: tells their owners when a card was assigned, when it is used for the first time, when it is not
//! used for a long time, and when it is deleted. Commands come from the console:
//!
//! ```text
//! add 1111-1111 ann@example.org
//! tran 1111-1111
//! delete 1111-1111
//! exit
//! ```
//!
//! Kill it and start it again: it still knows its cards. A deleted card can be added again.

use clap::Parser;
use durable_sqlite::{Definition, Event, Failure, Handle, Host, Process, RaiseError, SpawnError, Sqlite};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};

#[derive(Parser)]
struct Args {
    /// The service's database.
    #[arg(long, default_value = "credit_card.db")]
    db: String,
    /// After how long without a transaction a card counts as inactive, in milliseconds.
    #[arg(long, default_value_t = 5 * 60 * 1000)]
    inactive_ms: u64,
}

const CREDIT_CARD: Definition<Assigned, ()> = Definition::new("credit-card");
const TRANSACTION_APPEARED: Event<()> = Event::new("TransactionAppeared");
const CREDIT_CARD_DELETED: Event<()> = Event::new("CreditCardDeleted");

/// What a card's process starts with.
#[derive(serde::Serialize, serde::Deserialize)]
struct Assigned {
    card: String,
    email: String,
}

/// What can happen to a card, typed: this is all that the rest of the service knows of the process.
struct CreditCard(Handle);

impl CreditCard {
    fn of(host: &Host, card: &str) -> Self {
        Self(host.get(format!("card {card}")))
    }
    async fn assign(host: &Host, card: &str, email: &str) -> Result<(), SpawnError> {
        let assigned = Assigned { card: card.to_owned(), email: email.to_owned() };
        host.spawn(CREDIT_CARD, format!("card {card}"), &assigned).restart_finished().await.map(|_| ())
    }
    async fn transaction_appeared(&self) -> Result<(), RaiseError> {
        self.0.raise(TRANSACTION_APPEARED, &()).await
    }
    async fn deleted(&self) -> Result<(), RaiseError> {
        self.0.raise(CREDIT_CARD_DELETED, &()).await
    }
    /// Waits until the process has told the owner that the card was deleted.
    async fn gone(&self) {
        let _ = self.0.of(CREDIT_CARD).output().await;
    }
}

enum Happened {
    Transaction,
    Deleted,
    LongTime,
}

async fn credit_card(inactive: Duration, proc: Process, assigned: Assigned) -> Result<(), Failure> {
    let Assigned { card, email } = &assigned;
    let tell = |text: String| {
        move || {
            let text = text.clone();
            async move {
                println!("to {email}: {text}");
            }
        }
    };
    proc.step("assigned", tell(format!("{card} was assigned to you"))).await?;
    let check_at = proc.get("check at", || proc.now() + inactive).await?;
    let mut transactions = 0;
    let mut checked = false;
    loop {
        let mut race = proc
            .race(("what happens", transactions + u32::from(checked)))
            .on(proc.event(CREDIT_CARD_DELETED), |()| Happened::Deleted)
            .on(proc.event(TRANSACTION_APPEARED), |()| Happened::Transaction);
        if !checked && transactions == 0 {
            race = race.on(proc.delay_until("check", check_at), |_| Happened::LongTime);
        }
        match race.await? {
            Happened::Deleted => break,
            Happened::Transaction => {
                transactions += 1;
                if transactions == 1 {
                    proc.step("first", tell(format!("{card} received 1st transaction"))).await?;
                }
            }
            Happened::LongTime => {
                checked = true;
                proc.step("inactive", tell(format!("{card} is inactive long time"))).await?;
            }
        }
    }
    proc.step("deleted", tell(format!("{card} was deleted"))).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let inactive = Duration::from_millis(args.inactive_ms);
    let host = Host::builder(Sqlite::open(&*args.db).await?)
        .register(CREDIT_CARD, move |proc, assigned| credit_card(inactive, proc, assigned))
        .start()
        .await?;
    for card in host.processes().kind(CREDIT_CARD).list(1000).await? {
        if !card.status.is_finished() {
            println!("known: {}", card.id);
        }
    }
    println!("commands: add CARD EMAIL, tran CARD, delete CARD, exit");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let words: Vec<&str> = line.split_whitespace().collect();
        let done = match words[..] {
            ["add", card, email] => CreditCard::assign(&host, card, email).await.map_err(|e| e.to_string()),
            ["tran", card] => CreditCard::of(&host, card).transaction_appeared().await.map_err(|e| e.to_string()),
            ["delete", card] => {
                let process = CreditCard::of(&host, card);
                match process.deleted().await {
                    Ok(()) => {
                        process.gone().await;
                        Ok(())
                    }
                    Err(error) => Err(error.to_string()),
                }
            }
            ["exit"] => break,
            [] => Ok(()),
            _ => Err("commands: add CARD EMAIL, tran CARD, delete CARD, exit".to_owned()),
        };
        match done {
            Ok(()) => println!("ok: {line}"),
            Err(error) => println!("no: {error}"),
        }
    }
    host.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
