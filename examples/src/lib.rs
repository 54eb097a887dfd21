//! The examples are beside this file: `cargo run --release --example money_transfer`.
