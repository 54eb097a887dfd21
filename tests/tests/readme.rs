//! The README's code compiles, and does what it says.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

type UserId = u64;

struct App {
    users: Users,
    mail: Mail,
}
struct Users;
struct Mail;

impl Users {
    async fn register(&self, email: &str) -> Result<UserId, std::io::Error> {
        Ok(email.len() as u64)
    }
    async fn activate(&self, _: UserId) -> Result<(), std::io::Error> {
        Ok(())
    }
}

impl Mail {
    async fn verify(&self, _: &str, _: Uuid) -> Result<(), std::io::Error> {
        Ok(())
    }
}

#[rustfmt::skip]
mod readme {
    use super::*;

    // From here on as in the README.
    use durable_sqlite::{Definition, Event, Failure, Host, Process, Retry, Sqlite, with};

    const REGISTER_USER: Definition<String, UserId> = Definition::new("register-user");
    const EMAIL_VERIFIED: Event<()> = Event::new("EmailVerified");

    async fn register_user(app: Arc<App>, proc: Process, email: String) -> Result<UserId, Failure> {
        let App { users, mail } = &*app;              // the service's own clients
        let user_id = proc.step("RegisterUser", || users.register(&email)).await?;
        let secret = proc.get("secret", Uuid::new_v4).await?;
        proc.step("VerifyEmail", || mail.verify(&email, secret))
            .retry(Retry::exponential(Duration::from_secs(1)).max_attempts(5))
            .await?;
        proc.event(EMAIL_VERIFIED).await?;            // takes days; costs a row, not memory
        proc.step("ActivateUser", || users.activate(user_id)).await?;
        Ok(user_id)
    }

    pub(super) async fn run(app: Arc<App>, email: String) -> Result<UserId, Box<dyn std::error::Error>> {
        let host = Host::builder(Sqlite::open("service.db").await?)
            .register(REGISTER_USER, with(&app, register_user))
            .start().await?;
        let registration = host.spawn(REGISTER_USER, "register ann@example.org", &email).await?;
        registration.raise(EMAIL_VERIFIED, &()).await?;   // from any instance
        let user_id = registration.output().await?;
        Ok(user_id)
    }
}

/// Lines of code, without what stands in front and behind.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[tokio::test]
async fn the_code_in_the_readme_works() {
    let readme = include_str!("../../README.md");
    let code = readme.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    let here = lines(include_str!("readme.rs").split("// From here on as in the README.").nth(1).unwrap());
    let mut rest = here.iter();
    for line in lines(code) {
        assert!(rest.any(|here| *here == line), "not in this test, or not in this order: {line}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    let app = Arc::new(App { users: Users, mail: Mail });
    assert_eq!(readme::run(app, "ann@example.org".into()).await.unwrap(), 15);
}
