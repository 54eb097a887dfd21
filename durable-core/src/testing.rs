//! For the tests of services: runs a process's function on a storage in memory, in virtual time.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use crate::definition::Definition;
use crate::error::{Failure, OutputError};
use crate::host::{Handle, Host};
use crate::memory::Memory;
use crate::process::Process;
use crate::storage::Status;

/// Runs a function as a process to its end and returns its output. Waiting takes no time.
///
/// # Panics
/// If the process becomes stuck, with the reason; or if it waits for something that never comes, with what that is.
///
/// ```
/// use durable_core::{Failure, testing::run_process};
/// let sum = run_process(|proc| async move {
///     let a = proc.get("a", || 1).await?;
///     let b = proc.step("b", || async { Failure::ok(2) }).await?;
///     Ok(a + b)
/// });
/// assert_eq!(sum.unwrap(), 3);
/// ```
pub fn run_process<T, F, Fut>(function: F) -> Result<T, OutputError<Failure>>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<T, Failure>> + Send + 'static,
{
    run_process_with(function, |_| async {})
}

/// Like [`run_process`], with something beside it that has the process's handle: to raise events, say.
///
/// # Panics
/// If the process becomes stuck, with the reason; or if `beside` has ended and the process waits for something that never
/// comes, with what that is.
pub fn run_process_with<T, F, Fut, B, BFut>(function: F, beside: B) -> Result<T, OutputError<Failure>>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<T, Failure>> + Send + 'static,
    B: FnOnce(Handle<T, Failure>) -> BFut,
    BFut: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    #[allow(clippy::expect_used)] // A test's own machinery: without it there is no test.
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async move {
        let definition = Definition::<(), T, Failure>::new("test");
        let host = Host::builder(Memory::new()).register(definition, move |process, ()| function(process)).start();
        #[allow(clippy::expect_used)] // The storage in memory refuses neither.
        let (host, handle) = {
            let host = host.await.expect("a host in memory");
            let handle = host.spawn(definition, "test", &()).await.expect("a new process");
            (host, handle)
        };
        let output = handle.output();
        let alone = Cell::new(false);
        let ends_never = async {
            loop {
                tokio::time::sleep(Duration::from_secs(3600)).await;
                let Ok(info) = handle.status().await else { continue };
                if info.status == Status::Stuck {
                    return format!("the process is stuck: {}", info.reason.unwrap_or_default());
                }
                // An hour after whatever happened last it is a row, and has no time at which it goes on.
                if info.status == Status::Waiting && info.next_wake.is_none() && alone.get() {
                    let what = info.waiting_for.unwrap_or_default();
                    return format!("the process waits for ever: for {what}, and nothing is left that could bring it");
                }
            }
        };
        let beside = async {
            beside(handle.clone()).await;
            alone.set(true);
        };
        let ((), output) = tokio::join!(beside, async {
            tokio::select! {
                output = output => output,
                why = ends_never => panic!("{why}"),
            }
        });
        drop(host);
        output
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::Event;

    const GO: Event<u32> = Event::new("Go");

    #[test]
    #[should_panic(expected = "the process waits for ever: for event \"Go\"")]
    fn a_message_that_nobody_sends() {
        let _ = run_process(|proc| async move {
            proc.delay("first", Duration::from_secs(86_400)).await?;
            Ok(proc.event(GO).await?)
        });
    }

    #[test]
    fn a_message_that_comes_late() {
        let late = |handle: Handle<u32, Failure>| async move {
            tokio::time::sleep(Duration::from_secs(86_400)).await;
            assert!(handle.raise(GO, &7).await.is_ok());
        };
        assert_eq!(run_process_with(|proc| async move { Ok(proc.event(GO).await?) }, late).unwrap(), 7);
    }
}
