//! What all hosts of a seed share: the database, the service's accounts, and what befalls them.

use chrono::{DateTime, TimeDelta, Utc};
use durable_core::memory::Memory;
use durable_core::storage::{
    Batch, Effect, Heart, InstanceId, Op, Order, Outcome, Raise, RecordKey, RecordOp, Result, RunId, Scope, Spawn,
    Storage, StorageError,
};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::{Future, pending};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::effects::Effects;
use crate::lateness::Lateness;
use crate::ledger::Ledger;
use crate::program::Program;
use crate::seed::Seed;
use crate::tally::{Fault, Place, Sight, Tally};

/// An outage of more than this is one of its own kind: whoever keeps trying for seconds only does not see its end.
const LONG: Duration = Duration::from_secs(120);

/// See above.
pub struct World {
    pub memory: Memory,
    pub programs: Vec<Program>,
    /// Nothing goes wrong at all.
    pub faultless: bool,
    /// Something was written.
    pub wrote: Notify,
    /// A host died.
    pub died: Notify,
    start: Instant,
    inner: Mutex<Inner>,
}

/// What changes.
pub struct Inner {
    pub seed: Seed,
    pub odds: Odds,
    pub ledger: Ledger,
    pub effects: Effects,
    pub tally: Tally,
    pub lateness: Lateness,
    pub hosts: Vec<Machine>,
    /// What transactional steps have written.
    pub accounts: BTreeMap<(RunId, RecordKey), u64>,
    /// Commits of transactions that are on their way.
    pub commits: BTreeMap<RunId, u32>,
    /// Nothing goes wrong any more.
    pub calm: bool,
    away: Option<Outage>,
    /// Which of eight shares of the processes' rows are locked, and until when.
    held: Option<(u64, Instant)>,
    deaths: u64,
    /// What must not be.
    pub wrong: Vec<String>,
    pub trace: Option<Vec<String>>,
}

/// Of the ids of all processes, some are held at a time.
const SHARES: u64 = 8;

/// A time in which nobody reaches the storage.
#[derive(Clone, Copy)]
struct Outage {
    since: Instant,
    until: Instant,
}

/// How likely what is.
#[derive(Clone, Debug)]
pub struct Odds {
    /// So many calls in ten thousand go wrong.
    pub fault: u64,
    /// Nothing goes wrong at all.
    pub faultless: bool,
    /// At most so many hosts die by a fault.
    pub deaths: u64,
    /// A call may take so many milliseconds each way.
    pub latency: u64,
    /// The storage can tell whether a program lives.
    pub proof: bool,
    /// The storage tells of writes.
    pub hints: bool,
    pub expiry: Duration,
}

/// One host's program and machine.
#[derive(Default)]
pub struct Machine {
    pub alive: bool,
    /// It is to shut down.
    pub stopping: bool,
    /// It runs the bad deployment.
    pub bad: bool,
    pub paused: Option<Instant>,
    pub cut: Option<Instant>,
    /// When the last heartbeat that was acknowledged was sent.
    pub acknowledged: Option<Instant>,
    pub hearts: BTreeMap<InstanceId, Box<dyn Heart>>,
}

/// What becomes of a call.
pub struct Fate {
    pub before: Option<Blow>,
    pub arrival: Duration,
    pub verdict: Verdict,
    pub after: Option<Blow>,
    pub answer: Duration,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Verdict {
    Fine,
    Unavailable,
    /// It happens, and nobody is told.
    Lost,
    /// It does not happen, and nobody is told.
    Vanished,
}

#[derive(Clone, Copy)]
pub enum Blow {
    Kill,
    Pause(Duration),
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What a future of the storage in memory comes to. It waits for nothing.
pub fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
    }
}

impl World {
    pub fn new(mut seed: Seed, programs: Vec<Program>, odds: Odds, lateness: Lateness, traced: bool) -> Self {
        let beginning = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::days(20_000);
        let faultless = odds.faultless;
        let inner = Inner {
            seed: seed.fork(),
            odds,
            ledger: Ledger::default(),
            effects: Effects::default(),
            tally: Tally::default(),
            lateness,
            hosts: Vec::new(),
            accounts: BTreeMap::new(),
            commits: BTreeMap::new(),
            calm: false,
            away: None,
            held: None,
            deaths: 0,
            wrong: Vec::new(),
            trace: traced.then(Vec::new),
        };
        Self {
            memory: Memory::starting_at(beginning),
            programs,
            faultless,
            wrote: Notify::new(),
            died: Notify::new(),
            start: Instant::now(),
            inner: Mutex::new(inner),
        }
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line of the trace.
    pub fn say(&self, what: impl FnOnce(&Inner) -> String) {
        let mut inner = self.inner();
        if inner.trace.is_none() {
            return;
        }
        let line = format!("{:>8} {}", self.start.elapsed().as_millis(), what(&inner));
        inner.trace.as_mut().into_iter().for_each(|trace| trace.push(line.clone()));
    }

    /// Something that must be seen now and then.
    pub fn saw(&self, sight: Sight) {
        self.inner().tally.saw(sight);
    }

    /// Something that must not be.
    pub fn wrong(&self, what: impl Display) {
        let what = what.to_string();
        self.say(|_| format!("WRONG: {what}"));
        self.inner().wrong.push(what);
    }

    /// Returns while the host runs: never if it is dead, later if it is paused.
    pub async fn awake(&self, host: usize) {
        loop {
            let until = {
                let machine = &self.inner().hosts[host];
                match machine.paused {
                    _ if !machine.alive => None,
                    Some(until) if until > Instant::now() => Some(until),
                    _ => return,
                }
            };
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => pending().await,
            }
        }
    }

    /// What becomes of a call of a host's.
    pub fn fate(&self, host: usize, before: &[Place], after: &[Place], writes: bool) -> Fate {
        let mut inner = self.inner();
        let inner = &mut *inner;
        let (seed, odds) = (&mut inner.seed, &inner.odds);
        let mut latency = || if odds.latency == 0 || seed.permille(500) { 0 } else { seed.below(odds.latency + 1) };
        let (arrival, answer) = (ms(latency()), ms(latency()));
        let mut fate = Fate { before: None, arrival, verdict: Verdict::Fine, after: None, answer };
        if inner.calm {
            return fate;
        }
        let now = Instant::now();
        let gone = |until: Option<Instant>| until.is_some_and(|until| until > now);
        let away = gone(inner.away.map(|away| away.until));
        if away || gone(inner.hosts[host].cut) {
            inner.tally.met(if away { Fault::Away } else { Fault::Cut }, before);
            fate.verdict = if writes && seed.permille(100) { Verdict::Vanished } else { Verdict::Unavailable };
            fate.arrival = ms(seed.ms(2_000));
            return fate;
        }
        let factor = before.iter().map(|place| often(*place)).max().unwrap_or(1);
        if seed.below(10_000) >= odds.fault * factor {
            return fate;
        }
        let (fault, places) = match seed.below(100) {
            0..18 => (Fault::Before, before),
            18..20 => (Fault::Away, before),
            20..35 if writes => (Fault::Lost, after),
            35..43 if writes => (Fault::Vanished, before),
            43..58 if writes => (Fault::Late, after),
            58..71 => (Fault::Delayed, before),
            71..75 => (Fault::Cut, before),
            75..80 if inner.deaths < odds.deaths => (Fault::Killed, before),
            80..85 if inner.deaths < odds.deaths => (Fault::Killed, after),
            85..92 => (Fault::Paused, before),
            92..100 => (Fault::Paused, after),
            _ => (Fault::Before, before),
        };
        let first = std::ptr::eq(places, before) && !(std::ptr::eq(before, after) && seed.permille(500));
        let blow = |blow: Blow, fate: &mut Fate| if first { fate.before = Some(blow) } else { fate.after = Some(blow) };
        match fault {
            Fault::Before => fate.verdict = Verdict::Unavailable,
            Fault::Lost => fate.verdict = Verdict::Lost,
            Fault::Vanished => fate.verdict = Verdict::Vanished,
            Fault::Late => {
                fate.verdict = Verdict::Lost;
                fate.arrival = ms(seed.ms(20_000));
            }
            Fault::Away => {
                fate.verdict = Verdict::Unavailable;
                let outage = Outage { since: now, until: now + ms(seed.ms(10_000)) };
                inner.away = Some(outage);
                inner.lateness.trouble(outage.until);
            }
            Fault::Cut => {
                fate.verdict = Verdict::Unavailable;
                inner.hosts[host].cut = Some(now + ms(seed.ms(20_000)));
            }
            Fault::Killed => blow(Blow::Kill, &mut fate),
            Fault::Paused => blow(Blow::Pause(pause(seed, odds)), &mut fate),
            _ if seed.permille(500) => fate.arrival = ms(seed.ms(15_000)),
            _ => fate.answer = ms(seed.ms(15_000)),
        }
        inner.lateness.trouble((now + fate.arrival + fate.answer).max(inner.hosts[host].cut.unwrap_or(now)));
        inner.tally.hit(fault, places);
        fate
    }

    /// How long a batch waits in vain for rows that are locked, if it touches any.
    pub fn held_up(&self, batch: &Batch) -> Option<Duration> {
        let mut inner = self.inner();
        let inner = &mut *inner;
        let now = Instant::now();
        if inner.calm {
            return None;
        }
        if inner.held.is_none_or(|(_, until)| until <= now) {
            inner.held = None;
            if inner.seed.below(10_000) < inner.odds.fault {
                let until = now + ms(inner.seed.ms(20_000));
                inner.held = Some((inner.seed.below(SHARES), until));
                inner.lateness.trouble(until);
                inner.tally.hit(Fault::HeldUp, &[]);
            }
        }
        let (share, _) = inner.held?;
        let held = |id: &str| id.bytes().map(u64::from).sum::<u64>() % SHARES == share;
        let of = |run: &RunId| held(inner.ledger.id(*run));
        let touched = |op: &Op| match op {
            Op::Spawn(Spawn { id, .. }) | Op::Raise(Raise { id, .. }) | Op::Order(Order { id, .. }) => held(id),
            Op::Record(record) => {
                of(&record.run)
                    || match &record.effect {
                        Some(Effect::Spawn(spawn)) => held(&spawn.id),
                        Some(Effect::Raise(raise)) => held(&raise.id),
                        None => false,
                    }
            }
            Op::Await { run, id, .. } => of(run) || held(id),
            Op::AcceptCancel { run, .. } | Op::Seen { run, .. } => of(run),
            Op::Finish(finish) => of(&finish.run),
            Op::Park(park) => of(&park.run),
            _ => false,
        };
        let touched = batch.ops.iter().any(touched);
        let longest = batch.patience.unwrap_or(Duration::from_secs(2));
        touched.then(|| longest.min(ms(inner.seed.ms(2_000))))
    }

    /// What befalls a host in the middle of its own code.
    pub fn mishap(&self, host: usize, place: Place) {
        let blow = {
            let mut inner = self.inner();
            let inner = &mut *inner;
            let (seed, odds) = (&mut inner.seed, &inner.odds);
            if inner.calm || seed.below(10_000) >= odds.fault * 4 {
                return;
            }
            let dies = inner.deaths < odds.deaths && seed.permille(500);
            let blow = if dies { Blow::Kill } else { Blow::Pause(pause(seed, odds)) };
            inner.tally.hit(if dies { Fault::Killed } else { Fault::Paused }, &[place]);
            blow
        };
        self.strike(host, Some(blow));
    }

    /// A blow falls.
    pub fn strike(&self, host: usize, blow: Option<Blow>) {
        match blow {
            None => {}
            Some(Blow::Pause(pause)) => {
                self.say(|_| format!("host {host} is paused for {} ms", pause.as_millis()));
                let until = Instant::now() + pause;
                let mut inner = self.inner();
                inner.hosts[host].paused = Some(until);
                inner.lateness.trouble(until);
            }
            Some(Blow::Kill) => self.kill(host),
        }
    }

    /// The host's program is dead.
    pub fn kill(&self, host: usize) {
        self.say(|_| format!("host {host} dies"));
        let hearts = {
            let mut inner = self.inner();
            inner.deaths += 1;
            inner.lateness.trouble(Instant::now());
            let machine = &mut inner.hosts[host];
            machine.alive = false;
            let hearts = std::mem::take(&mut machine.hearts);
            inner.effects.host_gone(host);
            hearts
        };
        drop(hearts);
        self.died.notify_one();
    }

    /// The host's program has ended in order.
    pub fn ended(&self, host: usize) {
        self.say(|_| format!("host {host} has shut down"));
        let mut inner = self.inner();
        inner.hosts[host].alive = false;
        inner.lateness.trouble(Instant::now());
        inner.effects.host_gone(host);
    }

    /// The host goes on pausing until then; a pause that is over.
    pub fn pause(&self, host: usize) {
        let blow = {
            let mut inner = self.inner();
            let inner = &mut *inner;
            inner.tally.hit(Fault::Paused, &[]);
            Blow::Pause(pause(&mut inner.seed, &inner.odds))
        };
        self.strike(host, Some(blow));
    }

    /// The host does not reach the storage for a while.
    pub fn cut(&self, host: usize, time: Duration) {
        self.say(|_| format!("host {host} is cut off for {} ms", time.as_millis()));
        let mut inner = self.inner();
        inner.tally.hit(Fault::Cut, &[]);
        let until = Instant::now() + time;
        inner.hosts[host].cut = Some(until);
        inner.lateness.trouble(until);
    }

    /// Nobody reaches the storage for a while.
    pub fn away(&self, time: Duration) {
        self.say(|_| format!("the storage is away for {} ms", time.as_millis()));
        let mut inner = self.inner();
        inner.tally.hit(Fault::Away, &[]);
        let since = Instant::now();
        inner.away = Some(Outage { since, until: since + time });
        inner.lateness.trouble(since + time);
    }

    /// Whether nobody reaches the storage now. An outage that was long is counted once it is over.
    pub fn is_away(&self) -> bool {
        let mut inner = self.inner();
        let Some(Outage { since, until }) = inner.away else { return false };
        if until > Instant::now() {
            return true;
        }
        inner.away = None;
        if until - since >= LONG {
            inner.tally.hit(Fault::AwayLong, &[]);
        }
        false
    }

    /// From now on nothing goes wrong.
    pub fn calm(&self) {
        self.say(|_| "nothing goes wrong any more".into());
        let mut inner = self.inner();
        inner.calm = true;
        inner.lateness.trouble(Instant::now());
        for machine in &mut inner.hosts {
            machine.cut = None;
            // Whoever waits for its end looks again then.
            machine.paused = None;
        }
    }

    /// Commits a batch, and follows it in the ledger.
    pub fn commit(&self, host: usize, batch: &Batch) -> Result<Vec<Outcome>> {
        let result = at_once(self.memory.commit(batch));
        if self.inner().trace.is_some() {
            let told = crate::link::told(&self.inner().ledger, host, batch, &result);
            told.into_iter().for_each(|line| self.say(|_| line));
        }
        if let Ok(outcomes) = &result {
            self.timers(batch, outcomes);
            for (op, outcome) in batch.ops.iter().zip(outcomes) {
                if let Op::Record(record) = op {
                    self.shielded(record);
                }
                if let (Op::Record(record), Outcome::Spawned(_) | Outcome::Raised(_)) = (op, outcome) {
                    self.begins_something(record.run, record.claim, &record.key);
                }
            }
            let wrong = {
                let mut inner = self.inner();
                let inner = &mut *inner;
                let wrong = inner.ledger.committed(batch, outcomes);
                std::mem::take(&mut inner.ledger.seen).into_iter().for_each(|sight| inner.tally.saw(sight));
                wrong
            };
            wrong.into_iter().for_each(|wrong| self.wrong(wrong));
            self.divergences(host);
            self.wrote.notify_waiters();
        } else if matches!(result, Err(StorageError::Fenced)) && self.inner().ledger.is_fenced(batch.fence.instance) {
            self.saw(Sight::Zombie);
        }
        result
    }
}

impl World {
    /// Only what is behind a point of no return, or in a compensation, is out of reach of a cancellation.
    fn shielded(&self, record: &RecordOp) {
        let id = self.inner().ledger.id(record.run).to_owned();
        let program = id.get(1..).and_then(|index| self.programs.get(index.parse::<usize>().ok()?));
        let forward = program.is_some_and(Program::goes_forward);
        let compensates = record.key.scope == Scope::Compensation;
        if compensates && !record.shielded || !compensates && record.shielded && !forward {
            self.wrong(format!("{} of {id} is shielded: {}", record.key, record.shielded));
        }
    }

    /// Whether those that this host has found stuck have diverged: it runs the bad deployment, and a step of theirs has another
    /// name in it.
    fn divergences(&self, host: usize) {
        let mut wrong = Vec::new();
        {
            let mut inner = self.inner();
            let inner = &mut *inner;
            for (run, claim) in std::mem::take(&mut inner.ledger.diverged) {
                let row = &inner.ledger.rows[&run];
                let program = row.id[1..].parse::<usize>().ok().and_then(|index| self.programs.get(index));
                let renamed = program.and_then(|program| program.renamed.as_deref());
                if !inner.hosts[host].bad || !renamed.is_some_and(|name| inner.ledger.knows(run, name)) {
                    let (id, reason) = (&row.id, &row.reason);
                    wrong.push(format!(
                        "{id} is stuck under claim {claim} on host {host}, and has not diverged: {reason:?}"
                    ));
                }
            }
        }
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }
}

/// How much more often a call there goes wrong than one that is made all the time.
fn often(place: Place) -> u64 {
    use Place::{AfterCommit, Awaiting, Cancelling, Comparing, Delivering, Noting, Reading, Refencing, Retiring};
    match place {
        Place::Polling | Place::Beating | Place::Peering => 1,
        Place::BeforeCommit | Place::Claiming | Place::Completing | Place::Parking => 10,
        AfterCommit | Comparing | Delivering => 40,
        Awaiting | Cancelling | Noting | Reading | Refencing | Retiring => 20,
        _ => 4,
    }
}

fn pause(seed: &mut Seed, odds: &Odds) -> Duration {
    let expiry = odds.expiry.as_millis() as u64;
    // Mostly beyond the expiry.
    ms(if seed.permille(300) { seed.ms(expiry) } else { seed.between(expiry, expiry * 3) })
}

/// A host's clocks and ids.
#[derive(Debug)]
pub struct Surroundings {
    start: Instant,
    offset: Mutex<TimeDelta>,
    ids: Mutex<Seed>,
}

impl Surroundings {
    pub fn new(offset: TimeDelta, seed: Seed) -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), offset: Mutex::new(offset), ids: Mutex::new(seed) })
    }

    /// Its clock jumps.
    pub fn jump(&self, by: TimeDelta) {
        *self.offset.lock().unwrap_or_else(PoisonError::into_inner) += by;
    }
}

impl durable_core::Surroundings for Surroundings {
    fn now(&self) -> DateTime<Utc> {
        let elapsed = TimeDelta::from_std(self.start.elapsed()).unwrap_or(TimeDelta::MAX);
        DateTime::<Utc>::UNIX_EPOCH
            + TimeDelta::days(20_000)
            + elapsed
            + *self.offset.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_boot(&self) -> Duration {
        self.start.elapsed()
    }

    fn id(&self) -> Uuid {
        let mut seed = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let millis = self.now().timestamp_millis().max(0).unsigned_abs();
        uuid::Builder::from_unix_timestamp_millis(millis, &random(&mut seed)).into_uuid()
    }
}

fn random(seed: &mut Seed) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&seed.number().to_le_bytes());
    bytes[8..].copy_from_slice(&seed.number().to_le_bytes()[..2]);
    bytes
}
