//! Plays a seed: hosts that come and go, clients, and the two phases.

use chrono::TimeDelta;
use durable_core::{Handle, Host, with};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::draw;
use crate::interpret::{interpret, kind};
use crate::judge::{judge, unfinished};
use crate::lateness::Lateness;
use crate::link::Link;
use crate::seed::Seed;
use crate::tally::{Fault, Tally};
use crate::world::{Machine, Odds, Surroundings, World};

/// What came of a seed.
pub struct Played {
    /// What must not be.
    pub wrong: Vec<String>,
    /// What went wrong on purpose.
    pub tally: Tally,
    /// What happened, if that was asked for.
    pub trace: Vec<String>,
}

/// So long after the last fault everything must have finished.
const PATIENCE: Duration = Duration::from_secs(1_200);

/// More than a seed needs, of places in memory and in a batch.
const ROOM: usize = 1_000;

/// Plays a seed from its beginning to its end.
///
/// # Panics
/// If there is no runtime to be had.
pub fn play(seed: u64, traced: bool) -> Played {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    #[allow(clippy::expect_used)]
    // Without it there is nothing to play on.
    let runtime = runtime.expect("a runtime");
    let world = runtime.block_on(async {
        let mut play = Play::new(seed, traced);
        play.storm().await;
        play.calm().await;
        judge(&play.world);
        play.world
    });
    drop(runtime);
    let mut inner = world.inner();
    Played {
        wrong: std::mem::take(&mut inner.wrong),
        tally: std::mem::take(&mut inner.tally),
        trace: inner.trace.take().unwrap_or_default(),
    }
}

/// How the hosts of a seed are set.
#[derive(Clone, Copy)]
struct Settings {
    heartbeat: Duration,
    expiry: Duration,
    quiet: Duration,
    poll: Duration,
    processes: usize,
    operations: usize,
}

/// A host's place, filled once it has started.
pub type Place = Arc<Mutex<Option<Host>>>;

/// A host's program, as it is played.
pub struct Hosted {
    pub place: Place,
    start: JoinHandle<()>,
    surroundings: Arc<Surroundings>,
    /// It runs both kinds.
    full: bool,
}

pub struct Play {
    pub seed: Seed,
    pub world: Arc<World>,
    settings: Settings,
    most_hosts: usize,
    pub hosts: Vec<Hosted>,
    /// The next message's number.
    pub messages: u64,
    /// How many processes clients have begun to start.
    pub started: usize,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Play {
    fn new(number: u64, traced: bool) -> Self {
        let mut seed = Seed::new(number);
        let faultless = seed.permille(50);
        let heartbeat = seed.between(1_000, 3_000);
        let expiry = ms(heartbeat * seed.between(3, 5));
        let room = seed.permille(800);
        let settings = Settings {
            heartbeat: ms(heartbeat),
            expiry,
            quiet: ms(seed.between(20, 3_000)),
            poll: ms(seed.between(100, 3_000)),
            processes: if room { ROOM } else { seed.between(1, 4) as usize },
            operations: if seed.permille(200) { seed.between(1, 4) as usize } else { ROOM },
        };
        let programs = draw::programs(&mut seed.fork(), room);
        let odds = Odds {
            faultless,
            fault: if faultless { 0 } else { *seed.one(&[0, 10, 40, 100, 250]) },
            deaths: seed.below(6),
            latency: *seed.one(&[0, 1, 3, 30, 200]),
            proof: seed.permille(700),
            hints: seed.permille(600),
            expiry,
        };
        // A look, what is between it and the process's code, and something to spare: far below what heals by itself.
        let round_trips = ms(odds.latency * 8);
        let bound = settings.poll + round_trips + ms(4_000);
        let grace = expiry + settings.heartbeat * 3 + round_trips + ms(3_000);
        // Where there is no room, what is due may have to wait for some.
        let lateness = Lateness::new((room && settings.operations == ROOM).then_some(bound), grace);
        let world = Arc::new(World::new(seed.fork(), programs, odds, lateness, traced));
        let most_hosts = seed.between(1, 4) as usize;
        Self { seed, world, settings, most_hosts, hosts: Vec::new(), messages: 0, started: 0 }
    }

    /// Starts a host in a program of its own: for all kinds, or for some.
    fn start_host(&mut self, all: bool) {
        let apart =
            if self.seed.permille(700) || self.world.faultless { 0 } else { self.seed.between(0, 7_200_000) as i64 };
        let offset = TimeDelta::milliseconds(apart - if self.seed.permille(500) { 0 } else { apart * 2 });
        let host = {
            let mut inner = self.world.inner();
            if apart > 60_000 {
                inner.tally.hit(Fault::Apart, &[]);
            }
            let bad = !all && !self.world.faultless && self.seed.permille(200);
            if bad {
                inner.tally.hit(Fault::Renamed, &[]);
            }
            inner.hosts.push(Machine { alive: true, bad, ..Machine::default() });
            inner.hosts.len() - 1
        };
        self.world.say(|_| format!("host {host} starts, its clock {} ms apart", offset.num_milliseconds()));
        let link = Link { world: self.world.clone(), host };
        let Settings { heartbeat, expiry, quiet, poll, processes, operations } = self.settings;
        let kinds: &[usize] = match self.seed.below(4) {
            0 if !all => &[0],
            1 if !all => &[1],
            _ => &[0, 1],
        };
        let full = kinds.len() == 2;
        let surroundings = Surroundings::new(offset, self.seed.fork());
        let actor = Arc::new(link.clone());
        let mut builder = Host::builder(link)
            .surroundings(surroundings.clone())
            .label("simulated")
            .heartbeat(heartbeat, expiry)
            .quiet_time(quiet)
            .poll(poll)
            .max_processes(processes)
            .batch(operations, 4 << 20)
            .max_crashes(10_000);
        for of in kinds {
            builder = builder.register(kind(*of), with(&actor, interpret));
        }
        let place = Place::default();
        let starting = place.clone();
        let world = self.world.clone();
        let start = tokio::spawn(async move {
            match builder.start().await {
                Ok(host) => *starting.lock().unwrap_or_else(PoisonError::into_inner) = Some(host),
                Err(error) => {
                    world.say(|_| format!("host {host} did not start: {error}"));
                    world.ended(host);
                }
            }
        });
        self.hosts.push(Hosted { place, start, surroundings, full });
    }

    pub fn alive(&self) -> Vec<usize> {
        let inner = self.world.inner();
        (0..inner.hosts.len()).filter(|host| inner.hosts[*host].alive).collect()
    }

    /// Takes away what is left of dead programs.
    fn reap(&mut self) {
        let alive = self.alive();
        for (host, Hosted { place, start, .. }) in self.hosts.iter().enumerate() {
            if !alive.contains(&host) {
                start.abort();
                let dead = place.lock().unwrap_or_else(PoisonError::into_inner).take();
                drop(dead);
            }
        }
    }

    /// A living host, as clients use it.
    pub fn handle(&mut self, id: &str) -> Option<Handle> {
        let hosts = self.alive();
        if hosts.is_empty() {
            return None;
        }
        let host = *self.seed.one(&hosts);
        let place = self.hosts[host].place.lock().unwrap_or_else(PoisonError::into_inner);
        place.as_ref().map(|host| host.get(id))
    }

    /// The first phase.
    async fn storm(&mut self) {
        for _ in 0..self.seed.between(1, self.most_hosts as u64) {
            self.start_host(false);
        }
        let end = Instant::now() + ms(self.seed.between(5_000, 60_000));
        // An outage ends by itself: the storm goes on until the storage is back.
        while Instant::now() < end || self.world.is_away() {
            // Nothing much can happen meanwhile.
            let longest = if self.world.is_away() { 15_000 } else { 3_000 };
            let pause = ms(1 + self.seed.ms(longest));
            let world = self.world.clone();
            let _ = timeout(pause, world.died.notified()).await;
            self.reap();
            self.look();
            self.act();
        }
    }

    /// Looks at what is late. Where no host runs all kinds, something may wait for one.
    fn look(&self) {
        let ready = self.alive().into_iter().any(|host| {
            let started = self.hosts[host].place.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            started && self.hosts[host].full && !self.world.inner().hosts[host].stopping
        });
        if !ready {
            self.world.trouble(Duration::ZERO);
        }
        self.world.prompt();
    }

    fn act(&mut self) {
        let alive = self.alive();
        let others = self.most_hosts.saturating_sub(alive.len());
        match self.seed.below(1000) {
            0..350 => self.start_process(),
            350..600 => self.message(),
            600..650 => self.watch(),
            650..678 => self.read(),
            678..680 => self.resume(),
            680..800 if others > 0 => self.start_host(false),
            _ if self.world.faultless || alive.is_empty() => {}
            800..840 => self.cancel(),
            840..870 => {
                let host = *self.seed.one(&alive);
                if self.world.inner().odds.deaths > 0 {
                    self.world.inner().tally.hit(Fault::Killed, &[]);
                    self.world.kill(host);
                }
            }
            870..910 => {
                let host = *self.seed.one(&alive);
                self.world.pause(host);
            }
            910..940 => {
                let (host, time) = (*self.seed.one(&alive), self.seed.ms(60_000));
                self.world.cut(host, ms(time));
            }
            940..955 => {
                let time =
                    if self.seed.permille(200) { self.seed.between(120_000, 600_000) } else { self.seed.ms(60_000) };
                if !self.world.is_away() {
                    self.world.away(ms(time));
                }
            }
            955..980 => {
                let host = *self.seed.one(&alive);
                self.shut_down(host);
            }
            980..990 => {
                let by = self.jump();
                self.world.say(|_| format!("the storage's clock jumps by {} ms", by.num_milliseconds()));
                let fault = if by < TimeDelta::zero() { Fault::Backwards } else { Fault::Forwards };
                self.world.inner().tally.hit(fault, &[]);
                self.world.memory.jump(by);
                if by < TimeDelta::zero() {
                    self.world.inner().lateness.went_back = Some(Instant::now());
                }
                // Who waits in memory for a time looks at the clock again so soon.
                self.world.trouble(ms(30_000));
            }
            990.. => {
                let (host, by) = (*self.seed.one(&alive), self.jump());
                self.world.say(|_| format!("host {host}'s clock jumps by {} ms", by.num_milliseconds()));
                self.world.inner().tally.hit(Fault::OwnJump, &[]);
                self.hosts[host].surroundings.jump(by);
            }
            _ => {}
        }
    }

    /// How far a clock jumps: seconds at least.
    fn jump(&mut self) -> TimeDelta {
        let by = TimeDelta::milliseconds(1_000 + self.seed.ms(180_000) as i64);
        if self.seed.permille(500) { by } else { -by }
    }

    /// An orderly end.
    fn shut_down(&mut self, host: usize) {
        let grace = ms(self.seed.ms(8_000));
        let place = self.hosts[host].place.clone();
        let ending = place.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(ending) = ending else { return };
        self.world.inner().tally.hit(Fault::Shutdown, &[]);
        self.world.say(|_| format!("host {host} is to shut down"));
        self.world.inner().hosts[host].stopping = true;
        self.world.trouble(grace);
        let world = self.world.clone();
        tokio::spawn(async move {
            ending.shutdown(grace).await;
            if world.inner().hosts[host].alive {
                world.ended(host);
            }
            *place.lock().unwrap_or_else(PoisonError::into_inner) = None;
        });
    }

    /// The second phase: everything finishes.
    async fn calm(&mut self) {
        self.world.calm();
        // The deployment is taken back.
        for host in self.alive() {
            if self.world.inner().hosts[host].bad {
                self.world.kill(host);
            }
        }
        self.reap();
        let end = Instant::now() + PATIENCE;
        let roots = self.world.programs.iter().filter(|program| !program.child).count();
        loop {
            self.reap();
            if !self.alive().iter().any(|host| self.hosts[*host].full) {
                self.start_host(true);
            }
            sleep(ms(1_000)).await;
            self.look();
            self.resume();
            let missing = (0..roots).find(|index| !self.world.inner().ledger.ids.contains_key(&format!("p{index}")));
            if let Some(missing) = missing {
                self.started = missing;
                self.start_process();
            }
            let wanting = self.wanting();
            for (to, event) in &wanting {
                self.send(*to, *event);
            }
            let open = !self.world.inner().ledger.unfinished().is_empty();
            if missing.is_none() && !open {
                break;
            }
            if Instant::now() > end {
                unfinished(&self.world);
                return;
            }
        }
        // What was on its way arrives.
        sleep(ms(30_000)).await;
    }
}
