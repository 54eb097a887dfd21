//! A user registers, and is active once the e-mail is verified.

use durable_sqlite::{Definition, Event, Failure, Host, Process, Retry, Sqlite};
use std::{error::Error, io, time::Duration};

const REGISTER: Definition<String, u64> = Definition::new("register-user");
const VERIFIED: Event<()> = Event::new("EmailVerified");

async fn register(proc: Process, email: String) -> Result<u64, Failure> {
    let user = proc.step("CreateUser", || create_user(&email)).await?;
    proc.step("SendEmail", || send_email(&email))
        .retry(Retry::exponential(Duration::from_secs(1)).max_attempts(5))
        .await?;
    proc.event(VERIFIED).await?; // may take days; costs a row, not memory
    proc.step("ActivateUser", || activate(user)).await?;
    Ok(user)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let host = Host::builder(Sqlite::open("service.db").await?).register(REGISTER, register).start().await?;
    let email = "ann@example.org";
    let registration = host.spawn(REGISTER, format!("register {email}"), email).await?;
    // From any instance of the service. One that has ended takes no more messages.
    if let Err(error) = registration.raise(VERIFIED, &()).await {
        println!("{error}");
    }
    println!("registered user {}", registration.output().await?);
    host.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

async fn create_user(email: &str) -> Result<u64, io::Error> {
    println!("creating a user for {email}");
    Ok(7)
}

async fn send_email(email: &str) -> Result<(), io::Error> {
    println!("sending an e-mail to {email}");
    Ok(())
}

async fn activate(user: u64) -> Result<(), io::Error> {
    println!("activating user {user}");
    Ok(())
}
