//! The worker program: one instance of a service. And how a test starts it.

use durable_core::storage::Storage;
use durable_core::{Host, HostBuilder};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::deadly::{Boundary, Deadly, Fuse, signal};
use super::journal::Journal;
use super::workload::{self, Bench, GO, WORK};
use crate::{MssqlSchema, PostgresSchema, Sqlite};

/// What the worker is told.
#[derive(Clone, Debug)]
pub struct Orders {
    /// The storage's address.
    pub storage: String,
    /// The journal.
    pub journal: PathBuf,
    /// It starts processes `p-0` to `p-{n-1}`, sends each its message, and stops once all have ended. The same ids may
    /// be started by several workers.
    pub processes: u32,
    /// Where it dies.
    pub die: Option<Boundary>,
    /// How long each step takes.
    pub pace: Duration,
    /// See [`Deadly::forgets`].
    pub forgets: Option<u32>,
    /// The hosts' own settings, not [those of the tests](settings).
    pub defaults: bool,
}

impl Orders {
    fn to_args(&self) -> Vec<String> {
        let die = self.die.map_or_else(|| "-".to_owned(), |die| die.to_string());
        let pace = self.pace.as_millis().to_string();
        let forgets = self.forgets.unwrap_or(0).to_string();
        let journal = self.journal.to_str().unwrap().to_owned();
        let defaults = self.defaults.to_string();
        vec![self.storage.clone(), journal, self.processes.to_string(), die, pace, forgets, defaults]
    }

    /// From the program's arguments.
    pub fn from_args(args: &[String]) -> Self {
        let [storage, journal, processes, die, pace, forgets, defaults] = args else {
            panic!("seven arguments, not {args:?}")
        };
        Self {
            storage: storage.clone(),
            journal: journal.into(),
            processes: processes.parse().unwrap(),
            die: (die != "-").then(|| die.parse().unwrap()),
            pace: Duration::from_millis(pace.parse().unwrap()),
            forgets: forgets.parse().ok().filter(|nth| *nth > 0),
            defaults: defaults.parse().unwrap(),
        }
    }

    /// Starts the worker program, with these variables in its environment.
    pub fn start(&self, program: &Path, environment: &[(&str, &str)]) -> Worker {
        let mut command = Command::new(program);
        command.args(self.to_args()).envs(environment.iter().copied()).stdin(Stdio::null());
        Worker(command.spawn().unwrap())
    }
}

/// A worker that runs; killed when dropped.
pub struct Worker(Child);

impl Worker {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
    /// Sends it a signal.
    pub fn signal(&self, name: &str) {
        signal(self.0.id(), name);
    }
    /// Stops it, and waits until none of its threads runs any more. It may have ended.
    pub fn stop(&self) {
        self.signal("STOP");
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // Behind the name, which may have anything in it.
            stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
        };
        let tasks = format!("/proc/{}/task", self.id());
        while !std::fs::read_dir(&tasks).unwrap().map_while(Result::ok).all(stopped) {
            std::thread::yield_now();
        }
    }
    /// Whether it has ended, and whether well.
    pub fn ended(&mut self) -> Option<bool> {
        self.0.try_wait().unwrap().map(|status| status.success())
    }
    /// Waits for its end and says whether it went well; kills it if it does not come.
    pub fn wait(&mut self, at_most: Duration) -> bool {
        let since = std::time::Instant::now();
        loop {
            if let Some(well) = self.ended() {
                return well;
            }
            if since.elapsed() > at_most {
                self.kill();
                panic!("the worker did not end within {at_most:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// After this time of silence a worker is taken over.
pub const EXPIRY: Duration = Duration::from_secs(2);

/// The settings of all workers: short times, so that tests need not wait for long.
pub fn settings(builder: HostBuilder) -> HostBuilder {
    builder
        .heartbeat(Duration::from_millis(300), EXPIRY)
        // So long before the timers of the workload are due that a slow disk leaves time to park.
        .quiet_time(Duration::from_millis(5))
        .poll(Duration::from_millis(200))
        .max_crashes(10_000)
}

/// Is the worker with this number, on the storage that the orders name.
pub async fn run_on_address(orders: Orders, program: u32) {
    if orders.storage.starts_with("postgres") {
        let storage = PostgresSchema::storage_at(&orders.storage, orders.defaults).await;
        run(storage, orders, program).await;
    } else if orders.storage.starts_with("server=") {
        let storage = MssqlSchema::storage_at(&orders.storage).await;
        run(storage, orders, program).await;
    } else {
        let storage = Sqlite::open(&orders.storage).await.unwrap();
        run(storage, orders, program).await;
    }
}

/// Is the worker with this number.
pub async fn run(storage: impl Storage, orders: Orders, program: u32) {
    let fuse = Fuse::new(orders.die);
    let journal = Journal::open(&orders.journal, program).unwrap();
    let bench = Bench { journal, fuse: fuse.clone(), pace: orders.pace };
    let builder = Host::builder(Deadly::new(storage, fuse).forgets(orders.forgets));
    let builder = if orders.defaults { builder } else { settings(builder) };
    let host =
        builder.register(WORK, move |proc, input| workload::work(bench.clone(), proc, input)).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..orders.processes {
        let host = host.clone();
        handles.push(tokio::spawn(async move {
            let process = host.spawn(WORK, format!("p-{n}"), &n).await.unwrap();
            match process.raise(GO, &1).id("go").await {
                Ok(()) => {}
                Err(durable_core::RaiseError::Finished { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            assert_eq!(process.output().await.unwrap(), workload::expected(n));
        }));
    }
    for handle in handles {
        handle.await.unwrap();
    }
    host.shutdown(Duration::from_secs(5)).await;
}
