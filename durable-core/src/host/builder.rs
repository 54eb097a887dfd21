use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

use super::Host;
use crate::definition::Definition;
use crate::engine::registry::{Entry, Typed};
use crate::engine::surroundings::{Machine, Surroundings};
use crate::engine::{Core, Settings, supervise};
use crate::error::{ProcessError, StartError};
use crate::limits;
use crate::process::Process;
use crate::storage::{Storage, StorageError};

/// What a host does again and again, it does not do more often than so.
const SHORTEST: Duration = Duration::from_millis(1);

/// Configures a [`Host`].
#[must_use = "nothing runs before `start`"]
pub struct HostBuilder {
    storage: Arc<dyn Storage>,
    surroundings: Arc<dyn Surroundings>,
    namespace: Box<str>,
    settings: Settings,
    kinds: HashMap<Arc<str>, Arc<dyn Entry>>,
    twice: Option<&'static str>,
}

/// Hands shared state to a process's function: `with(&app, transfer)` is a function of the process and its input.
///
/// ```
/// # use durable_core::*;
/// # use durable_core::memory::Memory;
/// # use std::sync::Arc;
/// # struct App;
/// const TRANSFER: Definition<u64, ()> = Definition::new("transfer");
/// async fn transfer(app: Arc<App>, proc: Process, cents: u64) -> Result<(), Failure> { Ok(()) }
/// # let app = Arc::new(App);
/// let builder = Host::builder(Memory::new()).register(TRANSFER, with(&app, transfer));
/// ```
pub fn with<S, I, F, Fut>(state: &Arc<S>, function: F) -> impl Fn(Process, I) -> Fut + Send + Sync + 'static
where
    S: Send + Sync + 'static,
    F: Fn(Arc<S>, Process, I) -> Fut + Send + Sync + 'static,
{
    let state = state.clone();
    move |process, input| function(state.clone(), process, input)
}

impl HostBuilder {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        let settings = Settings {
            label: label().into(),
            heartbeat: Duration::from_secs(2),
            expiry: Duration::from_secs(10),
            quiet_time: Duration::from_secs(2),
            poll: Duration::from_secs(1),
            max_processes: 10_000,
            max_payload: limits::DEFAULT_PAYLOAD,
            max_crashes: 10,
            call_timeout: Duration::from_secs(30),
            batch_ops: 1000,
            batch_bytes: 4 * 1024 * 1024,
            claim: 500,
            max_loaded: 256 << 20,
            unreadable_patience: Duration::from_secs(300),
            stall_limit: Duration::from_secs(60),
            reconcile_every: Duration::from_secs(if storage.announces_everything() { 3600 } else { 60 }),
        };
        Self {
            storage,
            surroundings: Arc::new(Machine),
            namespace: "default".into(),
            settings,
            kinds: HashMap::new(),
            twice: None,
        }
    }

    /// Registers the function that runs processes of a kind: an `async fn` of the process and its input. Services that
    /// it uses are captured, or handed over by [`with`].
    ///
    /// It is called anew at each execution of a process; what it does between durable operations happens each time.
    pub fn register<I, O, E, F, Fut, R>(mut self, definition: Definition<I, O, E>, function: F) -> Self
    where
        I: DeserializeOwned + Send + 'static,
        O: Serialize + DeserializeOwned + Send + 'static,
        E: ProcessError,
        F: Fn(Process, I) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, R>> + Send + 'static,
        R: Into<E> + 'static,
    {
        let entry = Arc::new(Typed { function, types: PhantomData::<fn(I, R) -> Result<O, E>> });
        if self.kinds.insert(definition.kind().into(), entry).is_some() {
            self.twice = Some(definition.kind());
        }
        self
    }

    /// The namespace: services with different ones share a database without seeing each other's processes. `default`
    /// by default.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into().into();
        self
    }

    /// For people who look at the instances table: the program's name and process id by default.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.settings.label = label.into().into();
        self
    }

    /// How many processes may be in memory; 10,000 by default. Further ones wait in the database until there is room.
    pub fn max_processes(mut self, max: usize) -> Self {
        self.settings.max_processes = max;
        self
    }

    /// How many bytes of JSON an input, a result or a message may have; 1 MiB by default.
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.settings.max_payload = bytes;
        self
    }

    /// How often the heartbeat is renewed, and after which silence an instance counts as dead; 2 s and 10 s by
    /// default. Instances that share a database should agree. An instance whose own heartbeat is older than half the
    /// expiry starts no attempt of a step.
    pub fn heartbeat(mut self, interval: Duration, expiry: Duration) -> Self {
        self.settings.heartbeat = interval;
        self.settings.expiry = expiry;
        self
    }

    /// How long a process waits in memory before it becomes a row; 2 s by default.
    pub fn quiet_time(mut self, quiet: Duration) -> Self {
        self.settings.quiet_time = quiet;
        self
    }

    /// The longest time between two looks for work in the database; 1 s by default. What happens in this program is
    /// noticed at once, other programs' work by hints, where the storage has them.
    pub fn poll(mut self, interval: Duration) -> Self {
        self.settings.poll = interval;
        self
    }

    /// How many bytes of records and messages one process may have when it resumes; 256 MiB by default. A larger process
    /// becomes stuck; resume it on a host with a higher limit.
    ///
    /// All processes that resume at the same time share 64 MiB: the others wait in the database meanwhile. A process that is
    /// larger than that resumes alone.
    pub fn max_loaded(mut self, bytes: usize) -> Self {
        self.settings.max_loaded = bytes;
        self
    }

    /// How long this host leaves a process to other instances if its own code cannot read the process's input or records, or
    /// does not ask for some of them; five minutes by default. After that the process becomes stuck.
    ///
    /// While a service is being deployed, an instance with the older code may claim a process that newer code has started. It
    /// runs no step of it, and gives it back. As long as it does so, it claims the due processes of that kind about a second
    /// later than the other instances.
    ///
    /// The process becomes stuck at once if no other instance has registered its kind, or if one of its steps is under way:
    /// each further execution would begin that step again.
    pub fn unreadable_patience(mut self, patience: Duration) -> Self {
        self.settings.unreadable_patience = patience;
        self
    }

    /// A process becomes stuck when the program died so many times in a row while it ran it, without a new record in
    /// between; 10 by default. Orderly ends do not count.
    pub fn max_crashes(mut self, crashes: u32) -> Self {
        self.settings.max_crashes = i64::from(crashes.max(1));
        self
    }

    /// How long calls from outside processes wait for the storage before they give up; 30 s by default.
    pub fn call_timeout(mut self, timeout: Duration) -> Self {
        self.settings.call_timeout = timeout;
        self
    }

    /// The bounds of one batch: 1,000 operations and 4 MiB by default.
    pub fn batch(mut self, operations: usize, bytes: usize) -> Self {
        self.settings.batch_ops = operations.max(1);
        self.settings.batch_bytes = bytes;
        self
    }

    /// How often the instance compares what it owns in the database with what it holds in memory; 60 s by default.
    /// After a lost answer it does so at once.
    pub fn reconcile_every(mut self, interval: Duration) -> Self {
        self.settings.reconcile_every = interval;
        self
    }

    /// How long code may block the runtime's threads, so that none of the engine's tasks runs, before other instances take
    /// over what this host owns; 60 s by default, and never less than the expiry. If it blocks them for less, the host keeps
    /// its processes: the heartbeat has a thread of its own. Once the runtime runs again, the host goes on as a new instance.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.settings.stall_limit = limit;
        self
    }

    /// Clocks and ids from somewhere else than the machine: for simulations.
    #[doc(hidden)]
    pub fn surroundings(mut self, surroundings: Arc<dyn Surroundings>) -> Self {
        self.surroundings = surroundings;
        self
    }

    /// Makes the instance known and starts to run processes. Returns once the storage has answered; one that is not
    /// available is tried again until the [call time-out](Self::call_timeout).
    ///
    /// # Errors
    /// A kind, the namespace or the label is outside the limits or registered twice; settings that contradict each other; or the
    /// storage cannot be used.
    pub async fn start(self) -> Result<Host, StartError> {
        let Self { storage, surroundings, namespace, mut settings, kinds, twice } = self;
        if let Some(kind) = twice {
            return Err(StartError::Twice(kind));
        }
        limits::check("namespace", &namespace, limits::MAX_NAMESPACE)?;
        limits::check("label", &settings.label, limits::MAX_ID)?;
        for kind in kinds.keys() {
            limits::check("kind", kind, limits::MAX_NAME)?;
        }
        settings.bound();
        if settings.heartbeat < SHORTEST {
            let given = settings.heartbeat;
            let message = format!("a heartbeat every {given:?} is too often; it must be at least {SHORTEST:?}");
            return Err(StartError::Setting(message.into()));
        }
        if settings.expiry < settings.heartbeat * 3 {
            let (given, least) = (settings.expiry, settings.heartbeat * 3);
            let message =
                format!("an expiry of {given:?} is too short; it must be at least three heartbeats, {least:?}");
            return Err(StartError::Setting(message.into()));
        }
        settings.stall_limit = settings.stall_limit.max(settings.expiry);
        if storage.announces_everything() {
            const HOUR: Duration = Duration::from_secs(3600);
            settings.heartbeat = HOUR;
            settings.expiry = HOUR * 5;
            settings.poll = HOUR;
        }
        let core = Arc::new(Core::new(storage, surroundings, namespace, settings, kinds));
        let host = Host::owning(core.clone());
        let (ready, started) = oneshot::channel();
        tokio::spawn(supervise(core, ready));
        started.await.unwrap_or_else(|_| Err(StorageError::unavailable("the engine's task ended")))?;
        let Core { namespace, settings, .. } = &*host.core;
        let (storage, kinds) = (host.core.storage.name(), host.core.kind_names());
        tracing::info!(storage, namespace = %namespace, label = %settings.label, ?kinds, "the host has started");
        Ok(host)
    }
}

impl Settings {
    /// `Duration::MAX` stands for "never": as long as the clocks can add it up.
    fn bound(&mut self) {
        const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
        let Self { heartbeat, expiry, quiet_time, poll, call_timeout, reconcile_every, stall_limit, .. } = self;
        for time in [&mut *heartbeat, expiry, quiet_time, &mut *poll, call_timeout, reconcile_every, stall_limit] {
            *time = (*time).min(LONGEST);
        }
        *poll = (*poll).max(SHORTEST);
        // So that the longest expiry is long enough for it.
        *heartbeat = (*heartbeat).min(LONGEST / 3);
    }
}

/// The program's name and process id.
fn label() -> String {
    let program = std::env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    // A file may have a name that a label may not.
    let program: Option<String> = program.map(|name| name.chars().filter(|c| !c.is_control()).take(100).collect());
    format!("{} {}", program.as_deref().unwrap_or("program"), std::process::id()).trim().to_owned()
}

impl std::fmt::Debug for HostBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut kinds: Vec<_> = self.kinds.keys().collect();
        kinds.sort();
        f.debug_struct("HostBuilder").field("namespace", &self.namespace).field("kinds", &kinds).finish_non_exhaustive()
    }
}
