//! What a service holds: [`Host`], the engine in its program, and [`Handle`], one process seen from outside.

mod builder;
mod handle;
mod health;
mod outbox;
mod processes;
mod spawn;

pub use builder::{HostBuilder, with};
pub use handle::{Handle, Info, Json, Resume, Send};
pub use health::Health;
pub use outbox::{OutboxError, RaiseIn, SpawnIn};
pub use processes::Processes;
pub use spawn::SpawnProcess;
pub(crate) use spawn::{check_message, check_spawn};

use std::borrow::Borrow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

use crate::definition::Definition;
use crate::engine::held::Places;
use crate::engine::queue::{Answer, From, Job};
use crate::engine::run::End;
use crate::engine::wake::{Context, Inside};
use crate::engine::{Core, Phase, reaches};
use crate::error::Unavailable;
use crate::storage::{Op, Outcome, StorageError, Transactional};

/// The engine in one program: one of any number of instances that share a database.
///
/// It runs the kinds that are registered with it, takes over from instances that die, and is the way to every process
/// in the database, wherever it runs. Clones are the same host; when the last one is dropped without
/// [`shutdown`](Self::shutdown), that counts as a crash: other instances take over.
///
/// ```
/// # use durable_core::*;
/// # use durable_core::memory::Memory;
/// const GREET: Definition<String, String> = Definition::new("greet");
///
/// async fn greet(proc: Process, name: String) -> Result<String, Failure> {
///     Ok(proc.step("greet", || async { Failure::ok(format!("Hello, {name}!")) }).await?)
/// }
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let host = Host::builder(Memory::new()).register(GREET, greet).start().await?;
/// let handle = host.spawn(GREET, "greeting-1", &"Ann".to_owned()).await?;
/// assert_eq!(handle.output().await?, "Hello, Ann!");
/// host.shutdown(std::time::Duration::from_secs(5)).await;
/// # Ok::<_, Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct Host {
    pub(crate) core: Arc<Core>,
    /// Ends the host with its last owner. None where a process asks for its host: it does not own it.
    _guard: Option<Arc<Guard>>,
}

struct Guard(Arc<Core>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.phase.reach(Phase::Dead);
        self.0.held.drop_all();
    }
}

impl Host {
    /// A host over this storage, to be configured and started.
    pub fn builder(storage: impl crate::storage::Storage) -> HostBuilder {
        HostBuilder::new(Arc::new(storage))
    }

    fn owning(core: Arc<Core>) -> Self {
        Self { _guard: Some(Arc::new(Guard(core.clone()))), core }
    }

    pub(crate) fn of(core: Arc<Core>) -> Self {
        Self { core, _guard: None }
    }

    /// Starts a process, idempotent by its id: the same id, kind and input again hands back the one that exists.
    /// Returns once its row is committed; from then on it survives any crash.
    ///
    /// An input that is a `String` may be given as a `&str`, a `Vec` as a slice.
    ///
    /// It runs at once in this host if it has room and the kind is registered here; else it waits for an instance that
    /// has. Spawning needs the definition only.
    ///
    /// # Errors
    /// The id is in use by another kind or with another input; the id or the input is outside the limits; or there was
    /// no answer, in which case it may have happened and may be called again.
    ///
    /// # Cancel safety
    /// Dropped before it returns, the process may or may not have been started.
    pub fn spawn<I, O, E, Q>(
        &self,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnProcess<O, E>
    where
        I: Borrow<Q>,
        Q: serde::Serialize + ?Sized,
    {
        SpawnProcess::new(self.core.clone(), definition.kind(), id.into(), crate::payload::encode(input))
    }

    /// A process in the database, whatever its kind, wherever it runs, whether it exists or not: [`Handle::of`] types
    /// it.
    pub fn get(&self, id: impl Into<String>) -> Handle {
        Handle::new(self.core.clone(), id.into().into(), None, None)
    }

    /// The host's storage, if it is an `S`. For the extension traits of backends.
    pub fn storage<S: Transactional>(&self) -> Option<&S> {
        self.core.transactional()
    }

    /// The processes of this host's namespace: to list, to count, to resume in bulk.
    pub fn processes(&self) -> Processes {
        Processes::new(self.core.clone())
    }

    /// How many processes this host has in memory.
    pub fn in_memory(&self) -> usize {
        self.core.held.len()
    }

    /// Ends the host in order. Steps that run get `grace` to end and be recorded; everything else stops at its await
    /// at once. Nothing is reported as failed: what had not ended goes on on another instance, or at the next start. What
    /// blocks its thread is left behind a second later, and handed to others like what was given back.
    pub async fn shutdown(&self, grace: Duration) {
        let core = &self.core;
        tracing::info!(in_memory = self.in_memory(), ?grace, "the host is stopping");
        core.phase.reach(Phase::Stopping);
        for run in core.held.runs() {
            run.state().stopping = true;
            run.wake.nudge();
        }
        if tokio::time::timeout(grace, core.held.empty()).await.is_err() {
            for run in core.held.runs() {
                run.end(End::Release);
            }
        }
        let dead = async {
            core.held.vacate().await;
            reaches(core, Phase::Dead).await;
        };
        // Giving back what was under way needs the storage. If that stays away, the end is a crash, and is treated so.
        if tokio::time::timeout(core.settings.call_timeout, dead).await.is_err() {
            tracing::warn!("the storage did not answer at the shutdown; another instance will take over");
            core.phase.reach(Phase::Dead);
            core.held.drop_all();
        }
        tracing::info!("the host has stopped");
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("storage", &self.core.storage.name())
            .field("in_memory", &self.in_memory())
            .finish_non_exhaustive()
    }
}

impl Core {
    /// The storage, if it is an `S`.
    pub(crate) fn transactional<S: Transactional>(&self) -> Option<&S> {
        self.storage.transactional().and_then(|storage| storage.downcast_ref())
    }

    /// Whether a new process of this kind starts here at once: the kind is registered and there is room, which is
    /// reserved.
    pub(crate) fn may_take(&self, kind: &str) -> Option<Places> {
        let runs_here = self.kinds.contains_key(kind) && !self.is_stopping();
        runs_here.then(|| self.held.reserve(1, self.settings.max_processes)).flatten()
    }

    /// Has an operation committed, for a call from outside a process.
    pub(crate) async fn ask(&self, op: Op, places: Option<Places>) -> Result<Outcome, Unavailable> {
        self.outside_of_transactions().await;
        let (reply, answer) = oneshot::channel::<Answer>();
        self.queue.push(Job { places, ..Job::new(op, From::Host, Some(reply)) });
        let answer = async {
            match answer.await {
                Ok(Ok(Outcome::Unreadable(why))) => Err(Unavailable::Refused(why.into())),
                Ok(Ok(outcome)) => Ok(outcome),
                Ok(Err(refused)) => Err(Unavailable::Refused(refused)),
                Err(_) => Err(Unavailable::Stopped),
            }
        };
        self.bounded(answer).await
    }

    /// Reads from the storage, again and again until it answers.
    pub(crate) async fn read<T, Fut>(&self, mut read: impl FnMut() -> Fut) -> Result<T, Unavailable>
    where
        Fut: Future<Output = Result<T, StorageError>>,
    {
        self.outside_of_transactions().await;
        self.bounded(async {
            let mut backoff = crate::engine::Backoff::new();
            loop {
                match read().await {
                    Ok(answer) => return Ok(answer),
                    Err(error) if error.is_transient() => {
                        self.note_trouble(&error.to_string());
                        tokio::time::sleep(backoff.next()).await;
                    }
                    Err(error) => return Err(Unavailable::Refused(error.to_string().into())),
                }
            }
        })
        .await
    }

    /// Never returns inside the closure of a transaction, and makes the process stuck: the database may wait for the
    /// transaction, and the call for the database.
    async fn outside_of_transactions(&self) {
        let here = Context::current();
        if here.inside == Inside::Transaction {
            if let Some(run) = self.held.runs().iter().find(|run| run.serial == here.run) {
                run.fault(
                    "a call of Host or Handle inside the closure of a transaction; call it beside the transaction, or use \
                     what takes the transaction itself",
                );
            }
            std::future::pending().await
        }
    }

    /// Bounds a call from outside by the call time-out. A call that a process makes is not bounded, and never fails
    /// for want of an answer: the process's code would take that for an error of its own.
    async fn bounded<T>(&self, call: impl Future<Output = Result<T, Unavailable>>) -> Result<T, Unavailable> {
        if Context::current().run != 0 {
            return match call.await {
                Err(Unavailable::Stopped) => std::future::pending().await,
                answer => answer,
            };
        }
        let after = self.settings.call_timeout;
        tokio::select! {
            biased;
            answer = call => answer,
            () = reaches(self, Phase::Dead) => Err(Unavailable::Stopped),
            () = tokio::time::sleep(after) => Err(Unavailable::Storage { after, last: self.trouble() }),
        }
    }
}
