//! The examples are beside this file: `cargo run -p durable-examples --example money_transfer`.
