//! Mails a welcome, a greeting after a month, and one after a year. Kill it, restart it whenever you like: each mail is
//! sent at its time, or at the next start if that has passed.
//!
//! `cargo run --example schedule -- --month-ms 2000` makes a month two seconds long.

use clap::Parser;
use durable_sqlite::{Definition, Failure, Host, Process, Sqlite};
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// Who gets the mails.
    #[arg(default_value = "ann@example.org")]
    email: String,
    /// The service's database.
    #[arg(long, default_value = "schedule.db")]
    db: String,
    /// How long a month is, in milliseconds.
    #[arg(long, default_value_t = 30 * 24 * 3600 * 1000)]
    month_ms: u64,
}

const GREETINGS: Definition<String, ()> = Definition::new("greetings");

async fn greetings(month: Duration, proc: Process, email: String) -> Result<(), Failure> {
    let send = |text: &'static str| {
        let email = &email;
        move || async move { println!("to {email}: {text}") }
    };
    proc.step("Welcome", send("Welcome!")).await?;
    proc.delay("Wait1m", month).await?;
    proc.step("CongratsMonth", send("Your 1st month with us. Congrats!")).await?;
    let delayed = proc.delay("Wait1y", month * 11).await?;
    println!("the year's mail is {}", if delayed.on_time() { "on time" } else { "late: no instance was alive" });
    proc.step("CongratsYear", send("Your 1st year with us. Congrats!")).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let month = Duration::from_millis(args.month_ms);
    let host = Host::builder(Sqlite::open(&*args.db).await?)
        .register(GREETINGS, move |proc, email| greetings(month, proc, email))
        .start()
        .await?;
    host.spawn(GREETINGS, format!("greetings {}", args.email), &args.email).await?.output().await?;
    println!("all greetings are sent");
    host.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
