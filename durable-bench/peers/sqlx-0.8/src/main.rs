//! `durare`, `duroxide` and `duroxide-pg`, each in a program of its own.

mod durare;
mod duroxide;

use peer::{Called, Error};
use std::time::Duration;

const LOCK: &str = include_str!("../Cargo.lock");

fn main() -> Result<(), Error> {
    let called = Called::new().ok_or("this program is started by `peers`, beside it")?;
    // SAFETY: there is no other thread yet.
    unsafe {
        // What `duroxide` logs by itself would be among the answers.
        std::env::set_var("RUST_LOG", "off");
        std::env::set_var("DUROXIDE_PG_POOL_MAX", peer::connections(duroxide::POSTGRES_POOL).to_string());
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(&called))
}

async fn run(called: &Called) -> Result<(), Error> {
    let (about, peer) = match called.system.as_str() {
        "durare" => durare::start(called).await?,
        "duroxide" | "duroxide-pg" => duroxide::start(called).await?,
        other => return Err(format!("no system {other:?}; there are: durare, duroxide, duroxide-pg").into()),
    };
    peer::serve(called, about, peer).await
}

/// A year.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// What is to be known about one that syncs less by itself.
fn less(called: &Called) -> &'static str {
    if called.full { "" } else { ", synchronous NORMAL as by itself" }
}

/// What the database and its durability are called.
async fn sqlite(pool: &sqlx::SqlitePool) -> Result<String, Error> {
    let mut connection = pool.acquire().await?;
    let version: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&mut *connection).await?;
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *connection).await?;
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *connection).await?;
    let synchronous = ["OFF", "NORMAL", "FULL", "EXTRA"][usize::try_from(synchronous)? % 4];
    Ok(format!("SQLite {version}, journal_mode {mode}, synchronous {synchronous}"))
}
