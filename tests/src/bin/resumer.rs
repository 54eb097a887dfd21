//! A service that resumes what waits, for the tests that measure it or see it die.
#![allow(clippy::unwrap_used)]

fn main() {
    durable_tests::log();
    let [address, what] = std::env::args().skip(1).collect::<Vec<_>>().try_into().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(durable_tests::heavy::resume(&address, &what));
}
