//! A user registers, gets an e-mail with a secret, comes back with it days later (here: seconds), and is activated.
//!
//! Kill it at any time and start it again: it goes on where it was.
//!
//! `cargo run -p durable-examples --example user_registration -- ann@example.org`

use clap::Parser;
use durable_sqlite::{Definition, Event, Failure, Host, Process, Retry, Sqlite, with};
use std::sync::Arc;
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// Who registers.
    #[arg(default_value = "ann@example.org")]
    email: String,
    /// The service's database.
    #[arg(long, default_value = "user_registration.db")]
    db: String,
    /// How long the user takes to read the e-mail, in milliseconds.
    #[arg(long, default_value_t = 2000)]
    reads_after: u64,
}

const REGISTER_USER: Definition<String, u64> = Definition::new("register-user");
/// The user has come back with the secret.
const EMAIL_VERIFIED: Event<u32> = Event::new("EmailVerified");

/// The service's clients: of the user database, and of the mail provider.
struct App {
    users: Users,
    mail: Mail,
}
struct Users;
struct Mail;

async fn register_user(app: Arc<App>, proc: Process, email: String) -> Result<u64, Failure> {
    let App { users, mail } = &*app;
    let user_id = proc.step("RegisterUser", || users.register(&email)).await?;
    let secret = proc.get("secret", || 1000 + user_id as u32 % 9000).await?;
    proc.step("VerifyEmail", || mail.verify(&email, secret))
        .retry(Retry::exponential(Duration::from_secs(1)).max_attempts(5))
        .await?;
    // Takes days; costs a row, not memory.
    while proc.event(EMAIL_VERIFIED).await? != secret {}
    proc.step("ActivateUser", || users.activate(user_id)).await?;
    Ok(user_id)
}

impl Users {
    async fn register(&self, email: &str) -> Result<u64, std::io::Error> {
        let id = email.bytes().fold(7, |id, byte| (id * 31 + u64::from(byte)) % 100_000);
        println!("registered {email} as user {id}");
        Ok(id)
    }
    async fn activate(&self, user_id: u64) -> Result<(), std::io::Error> {
        println!("user {user_id} is active");
        Ok(())
    }
}

impl Mail {
    async fn verify(&self, email: &str, secret: u32) -> Result<(), std::io::Error> {
        println!("to {email}: your secret is {secret}");
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let app = Arc::new(App { users: Users, mail: Mail });
    let host = Host::builder(Sqlite::open(&*args.db).await?)
        .register(REGISTER_USER, with(&app, register_user))
        .start()
        .await?;
    // The same e-mail address twice is the same registration.
    let registration = host.spawn(REGISTER_USER, format!("register {}", args.email), &args.email).await?;

    // The user's side: reads the mail, types something wrong, then the secret.
    let inbox = registration.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(args.reads_after)).await;
        while let Ok(None) = inbox.value::<u32>("secret").await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Ok(Some(secret)) = inbox.value::<u32>("secret").await {
            let _ = inbox.raise(EMAIL_VERIFIED, &1).id("first try").await;
            let _ = inbox.raise(EMAIL_VERIFIED, &secret).id("second try").await;
        }
    });

    let user_id = registration.output().await?;
    println!("registration of user {user_id} is complete");
    host.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
