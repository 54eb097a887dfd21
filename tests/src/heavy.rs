//! Processes that are hard to resume: large ones, and one of which programs die.

use durable_core::storage::Storage;
use durable_core::{Definition, Event, Failure, Host, HostBuilder, Process, Status};
use durable_sqlite::Sqlite;
use std::time::Duration;

use crate::{MssqlSchema, PostgresSchema, until_ever};

/// Records as many texts of a megabyte; waits; ends with their number.
pub const LARGE: Definition<u32, usize> = Definition::new("large");
/// Takes a moment, and then another.
pub const INNOCENT: Definition<(), ()> = Definition::new("innocent");
/// Kills the program.
pub const CULPRIT: Definition<(), ()> = Definition::new("culprit");
/// What a large one waits for.
pub const GO: Event<()> = Event::new("Go");

/// A megabyte, and some room for its quotes.
const TEXT: usize = (1 << 20) - 2;
const MOMENT: Duration = Duration::from_millis(100);

/// A builder that knows the large ones.
pub fn large(builder: HostBuilder) -> HostBuilder {
    builder.register(LARGE, async |proc: Process, parts: u32| {
        let mut bytes = 0;
        for n in 0..parts {
            // Nothing that a database would make smaller.
            let text = async || {
                let mut seed = u64::from(n) + 1;
                let mut letter = || {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    char::from(b'a' + (seed >> 60) as u8)
                };
                Ok::<String, Failure>((0..TEXT).map(|_| letter()).collect())
            };
            bytes += proc.step(("part", n), text).await?.len();
        }
        proc.event(GO).await?;
        Ok::<_, Failure>(bytes)
    })
}

fn deadly(builder: HostBuilder) -> HostBuilder {
    let innocent = async |proc: Process, ()| {
        proc.step("works", async || Ok::<_, Failure>(tokio::time::sleep(MOMENT * 3).await)).await.map_err(Failure::from)
    };
    let culprit = async |proc: Process, ()| {
        let kills = async || {
            tokio::time::sleep(MOMENT).await;
            std::process::abort();
            #[allow(unreachable_code)]
            Ok::<_, Failure>(())
        };
        proc.step("kills", kills).await.map_err(Failure::from)
    };
    builder.register(INNOCENT, innocent).register(CULPRIT, culprit).max_crashes(7)
}

/// The program `resumer`: a service that runs what waits at this address until nothing does, and tells how much memory it
/// took at most.
pub async fn resume(address: &str, what: &str) {
    if address.starts_with("postgres") {
        resume_on(PostgresSchema::storage_at(address, false).await, what).await;
    } else if address.starts_with("server=") {
        resume_on(MssqlSchema::storage_at(address).await, what).await;
    } else {
        resume_on(Sqlite::open(address).await.unwrap(), what).await;
    }
}

async fn resume_on(storage: impl Storage, what: &str) {
    let builder = Host::builder(storage).quiet_time(Duration::from_millis(20));
    let builder = builder.heartbeat(Duration::from_millis(300), Duration::from_secs(5));
    let builder = if what == "large" { large(builder) } else { deadly(builder) };
    let host = builder.start().await.unwrap();
    until_ever(async || {
        let counts = host.processes().count().await.unwrap();
        counts.iter().all(|counted| counted.status.is_finished() || counted.status == Status::Stuck)
    })
    .await;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    println!("{}", most.trim().trim_end_matches(" kB"));
}
