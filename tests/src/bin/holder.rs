//! Holds the write lock of a SQLite file until its standard input ends, for the tests that need another program for that.
#![allow(clippy::unwrap_used)]

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Executor};
use std::io::Read;
use std::time::Duration;

fn main() {
    let file = std::env::args().nth(1).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(file).busy_timeout(Duration::from_secs(30));
        let mut connection = options.connect().await.unwrap();
        println!("asks");
        connection.execute("BEGIN IMMEDIATE").await.unwrap();
        println!("holds");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        connection.execute("ROLLBACK").await.unwrap();
    });
}
