use std::time::Duration;

use super::Host;

/// How long the parts of a host have not moved: [`Host::health`].
///
/// A probe compares them with what it tolerates. All are small while all is well: the heartbeat's age stays below
/// [`heartbeat`](crate::HostBuilder::heartbeat)'s interval and a round trip, the poller's below [`poll`](crate::HostBuilder::poll)
/// and one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Health {
    /// How old the last heartbeat is that the database has acknowledged. From half the expiry on no attempt of a step starts;
    /// from the expiry on another instance takes over.
    pub heartbeat: Duration,
    /// For how long nothing of what waits to be written has been. Zero if nothing waits.
    pub writer: Duration,
    /// How many operations are blocked, by a row that another session has locked for example, or wait behind a blocked one.
    /// The log names those that are blocked.
    pub held_up: usize,
    /// For how long it has not looked for work.
    pub poller: Duration,
    /// For how long the runtime has run none of the engine's tasks: code blocks its threads. From
    /// [`stall_limit`](crate::HostBuilder::stall_limit) on the host gives up what it owns.
    pub runtime: Duration,
    /// What the database complained of last, if ever: it may be over.
    pub trouble: Option<Box<str>>,
}

impl Host {
    /// How long this host's heartbeat, writer, poller and runtime have not moved. It needs neither the
    /// database nor the runtime, and answers at once on any thread. To notice that every thread of the runtime is blocked, call
    /// it from a thread of your own.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::memory::Memory;
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let host = Host::builder(Memory::new()).start().await?;
    /// let health = host.health();
    /// assert!(health.writer < std::time::Duration::from_secs(20), "nothing is written: {:?}", health.trouble);
    /// # Ok::<_, Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    pub fn health(&self) -> Health {
        let core = &self.core;
        Health {
            heartbeat: core.live.age(),
            writer: core.queue.stalled(),
            held_up: core.queue.aside_len(),
            poller: core.pulse.looked.age(),
            runtime: core.blocked(),
            trouble: core.trouble(),
        }
    }
}
