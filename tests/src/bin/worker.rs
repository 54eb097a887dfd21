//! One instance of a service, for the crash tests to kill.
#![allow(clippy::unwrap_used)]

use durable_tests::crash::worker::{Orders, run_on_address};

fn main() {
    durable_tests::log();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let orders = Orders::from_args(&args);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run_on_address(orders, std::process::id()));
}
