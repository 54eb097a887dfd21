use chrono::{DateTime, Utc};
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

/// What the engine takes from the machine, besides the runtime's clock: set apart, so that a simulation can have it all
/// from one seed. Services never see it.
pub trait Surroundings: fmt::Debug + Send + Sync + 'static {
    /// The machine's own clock.
    fn now(&self) -> DateTime<Utc>;
    /// Time since some moment, on a clock that also counts the time in which the machine was suspended.
    fn since_boot(&self) -> Duration;
    /// A new id, that sorts after those made before it.
    fn id(&self) -> Uuid;
}

/// The real ones.
#[derive(Debug)]
pub(crate) struct Machine;

impl Surroundings for Machine {
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn since_boot(&self) -> Duration {
        #[cfg(target_os = "linux")]
        {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
            Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
        }
        #[cfg(not(target_os = "linux"))]
        {
            static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
            START.get_or_init(std::time::Instant::now).elapsed()
        }
    }

    fn id(&self) -> Uuid {
        Uuid::now_v7()
    }
}
