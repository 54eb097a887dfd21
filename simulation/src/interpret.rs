//! The one durable function, that does what a program says and tells the oracle what it sees.

use durable_core::storage::{OpKind, RecordKey, Scope};
use durable_core::{
    Attempt, Cancelled, Definition, Event, Failure, Name, OutputError, Process, RaiseError, Retry, SpawnError,
    StepError, Transaction,
};
use futures_util::StreamExt;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::FuturesUnordered;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::effects::{Attempted, TIMED_OUT};
use crate::lateness::{Awaited, Waiting};
use crate::link::{Link, after};
use crate::program::{EVENTS, Member, Node, Step, Together, Undo, Use, Value, first_name, renamed};
use crate::tally::{Fault, Place, Sight};
use crate::transaction::Writes;
use crate::values::Valued;

/// What a process returns: what its operations have, by name.
pub type Results = Vec<(String, String)>;

/// The kinds of processes, of which one host may run one only. The input is the index of the program.
const KINDS: [Definition<usize, Results>; 2] = [Definition::new("even"), Definition::new("odd")];

/// The kind of a process.
pub fn kind(index: usize) -> Definition<usize, Results> {
    KINDS[index % 2]
}

/// What processes receive.
pub const MESSAGES: [Event<String>; EVENTS] = [Event::new("E0"), Event::new("E1"), Event::new("E2")];

/// What the body of a step fails with.
const FAILED: &str = "failed";

/// After which an attempt of a transaction is given up.
const TRANSACTION_MS: u64 = 1_400;

/// Why a program ends early.
enum Stop {
    Cancelled(Cancelled),
    Failed(String),
}

impl From<Cancelled> for Stop {
    fn from(cancelled: Cancelled) -> Self {
        Self::Cancelled(cancelled)
    }
}

type Done = Result<(), Stop>;

/// Runs a program.
pub async fn interpret(link: Arc<Link>, proc: Process, index: usize) -> Result<Results, Failure> {
    let program = link.world.programs[index].clone();
    let _runs = link.world.waits(proc.run(), proc.execution(), Awaited::Runs);
    let player = Player::new(&link, proc, Scope::Process);
    let Err(stop) = player.nodes(&program.nodes, None).await else {
        let mut results = std::mem::take(&mut *player.results.lock().unwrap_or_else(PoisonError::into_inner));
        results.sort();
        return Ok(results);
    };
    if matches!(stop, Stop::Cancelled(_)) {
        link.world.is_cancelled(player.proc.run(), player.proc.execution());
        if player.proc.is_replaying() {
            link.world.saw(Sight::Unwound);
        }
    }
    link.world.saw(Sight::Compensated);
    let compensating = Player::new(&link, player.proc.compensation(), Scope::Compensation);
    for undo in &program.compensation {
        let done = match undo {
            Undo::Step(step) => compensating.step(&Step { fatal: false, ..step.clone() }, None).await,
            Undo::Value(value) => compensating.value(value, None).await,
            Undo::Recall(name) => player.recall(name).await,
        };
        if let Err(Stop::Cancelled(_)) = done {
            player.link.world.wrong(format!("{undo:?} in the compensation of {} was cancelled", player.proc.id()));
        }
    }
    Err(match stop {
        Stop::Cancelled(cancelled) => Failure::from(cancelled),
        Stop::Failed(why) => Failure::new(why),
    })
}

struct Player {
    link: Arc<Link>,
    proc: Process,
    scope: Scope,
    results: Arc<Mutex<Results>>,
}

fn name(of: &str, key: Option<u64>) -> Name {
    match key {
        Some(key) => (of.to_owned(), key).into(),
        None => of.to_owned().into(),
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn retry(step: &Step) -> Retry {
    Retry::fixed(ms(step.pause)).max_attempts(step.attempts)
}

impl Player {
    fn new(link: &Arc<Link>, proc: Process, scope: Scope) -> Self {
        Self { link: link.clone(), proc, scope, results: Arc::default() }
    }

    fn key(&self, name: &Name) -> RecordKey {
        RecordKey { scope: self.scope, name: name.name().into(), key: name.key().into() }
    }

    fn returned(&self, op: OpKind, key: RecordKey, text: String) {
        let first = RecordKey { name: first_name(&key.name).into(), ..key.clone() };
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push((first.to_string(), text.clone()));
        self.told(op, key, text);
    }

    fn told(&self, op: OpKind, key: RecordKey, text: String) {
        self.link.world.returned(self.proc.run(), self.proc.execution(), key, op, text);
    }

    /// Something begins that has an effect.
    fn begins(&self, key: &RecordKey) {
        if self.proc.execution() > 1 {
            self.link.world.saw(Sight::Replayed);
        }
        self.link.world.begins_something(self.proc.run(), self.proc.execution(), key);
    }

    /// What this program calls a step, if the deployment has another name for it.
    fn deployed(&self, step: &Step) -> Option<(String, bool)> {
        let index: usize = self.proc.id().get(1..)?.parse().ok()?;
        let of = self.link.world.programs.get(index)?.renamed.as_deref()?;
        let bad = self.link.world.inner().hosts[self.link.host].bad;
        (of == step.name && self.scope == Scope::Process).then(|| (renamed(of), bad))
    }

    fn waits(&self, what: Awaited) -> Waiting {
        self.link.world.waits(self.proc.run(), self.proc.execution(), what)
    }

    fn nodes<'a>(&'a self, nodes: &'a [Node], key: Option<u64>) -> BoxFuture<'a, Done> {
        Box::pin(async move {
            for node in nodes {
                self.node(node, key).await?;
            }
            Ok(())
        })
    }

    async fn node(&self, node: &Node, key: Option<u64>) -> Done {
        self.link.world.saw(node.sight());
        match node {
            Node::Step(step) => self.step(step, key).await,
            Node::Dropped(node, after) => {
                match tokio::time::timeout(ms(*after), Box::pin(self.node(node, key))).await {
                    Ok(done) => done,
                    Err(_) => {
                        self.link.world.inner().tally.hit(Fault::OperationDropped, &[]);
                        Box::pin(self.node(node, key)).await
                    }
                }
            }
            Node::Transaction(step) => self.transaction(step, key).await,
            Node::Value(value) => self.value(value, key).await,
            Node::Delay { name: of, ms: after } => {
                let name = name(of, key);
                let delayed = self.proc.delay(name.clone(), ms(*after)).await?;
                if delayed.woke < delayed.due {
                    self.link.world.wrong(format!("{of} of {} woke early: {delayed:?}", self.proc.id()));
                }
                self.returned(OpKind::Delay, self.key(&name), format!("{delayed:?}"));
                Ok(())
            }
            Node::Receive { event, timeout } => self.receive(*event, *timeout).await,
            Node::Raise { to, event, key: of } => {
                let of = key.map_or_else(|| of.clone(), |key| format!("{of}.{key}"));
                let payload = format!("{}.{of}", self.proc.id());
                let raise = self.proc.raise(format!("p{to}"), MESSAGES[*event], &payload).key(&of).await;
                let text = match raise {
                    Ok(()) => "delivered",
                    Err(RaiseError::Finished { .. }) => "finished",
                    Err(RaiseError::NotFound { .. }) => "not found",
                    Err(RaiseError::Cancelled(cancelled)) => return Err(cancelled.into()),
                    Err(error) => {
                        self.link.world.wrong(format!("a message of {}: {error}", self.proc.id()));
                        return Ok(());
                    }
                };
                let key =
                    RecordKey { scope: self.scope, name: MESSAGES[*event].name().into(), key: of.as_str().into() };
                self.returned(OpKind::Raise, key, text.into());
                Ok(())
            }
            Node::Child { child, awaited } => self.child(*child, *awaited).await,
            Node::Race { name, members } => self.race(name, members, key).await,
            Node::Both(together, branches) => {
                let branches = branches.iter().map(|branch| self.nodes(branch, key));
                let done: Vec<Done> = match together {
                    Together::All => self.proc.all(branches).await,
                    Together::Join => join_all(branches).await,
                    Together::Unordered => branches.collect::<FuturesUnordered<_>>().collect().await,
                };
                done.into_iter().collect()
            }
            Node::Forward(body) => {
                let (link, results) = (self.link.clone(), self.results.clone());
                let forward = Self { link, proc: self.proc.uncancellable(), scope: self.scope, results };
                match forward.nodes(body, key).await {
                    Err(Stop::Cancelled(_)) => {
                        self.link.world.wrong(format!("{} was cancelled behind a point of no return", self.proc.id()));
                        Ok(())
                    }
                    done => done,
                }
            }
            Node::Loop { times, body } => {
                for key in 0..*times {
                    self.nodes(body, Some(key)).await?;
                }
                Ok(())
            }
        }
    }

    /// What the body of a step returns if it does not fail.
    fn value_of(&self, key: &RecordKey) -> String {
        let first = RecordKey { name: first_name(&key.name).into(), ..key.clone() };
        format!("{} did {first}", self.proc.id())
    }

    async fn body(&self, step: &Step, key: RecordKey, attempt: Attempt, racing: bool) -> Result<String, String> {
        let (world, host) = (&self.link.world, self.link.host);
        self.begins(&key);
        let _running = world.begins(Attempted {
            host,
            run: self.proc.run(),
            first: RecordKey { name: first_name(&key.name).into(), ..key.clone() },
            key: key.clone(),
            claim: self.proc.execution(),
            number: attempt.number(),
            idempotency: attempt.key(),
            racing,
        });
        world.mishap(host, Place::BeforeEffect);
        world.awake(host).await;
        after(ms(step.takes)).await;
        world.awake(host).await;
        world.mishap(host, Place::AfterEffect);
        world.awake(host).await;
        if attempt.number() <= step.fails { Err(FAILED.into()) } else { Ok(self.value_of(&key)) }
    }

    async fn step(&self, step: &Step, key: Option<u64>) -> Done {
        let (mut named, mut was) = (name(&step.name, key), None);
        if let Some((other, bad)) = self.deployed(step) {
            let other = name(&other, key);
            if bad {
                named = other;
            } else {
                // The good one knows of the bad one.
                was = Some(other);
            }
        }
        let mut key = self.key(&named);
        if let Some(was) = &was {
            let (was, inner) = (self.key(was), self.link.world.inner());
            let stands = |key| inner.ledger.stands_recorded(self.proc.run(), key);
            if stands(&was) && !stands(&key) {
                key = was;
            }
        }
        let mut made = self.proc.step(named, |attempt: Attempt| self.body(step, key.clone(), attempt, false)).typed();
        made = made.retry(retry(step));
        if let Some(was) = was {
            made = made.was(was);
        }
        if let Some(timeout) = step.timeout {
            made = made.timeout(ms(timeout));
        }
        let result = made.await;
        self.judge(OpKind::Step, step, key, result)
    }

    async fn transaction(&self, step: &Step, key: Option<u64>) -> Done {
        let name = name(&step.name, key);
        let key = self.key(&name);
        let mut calls = 0;
        let fails = step.fails;
        let statements = |mut tx: durable_core::storage::Tx<Writes>| {
            calls += 1;
            let (key, call) = (key.clone(), calls);
            async move {
                let (world, host) = (&self.link.world, self.link.host);
                self.begins(&key);
                world.awake(host).await;
                tx.amount += 1;
                after(ms(step.takes)).await;
                world.mishap(host, Place::BeforeCommit);
                world.awake(host).await;
                if call <= fails { Err(FAILED.to_owned()) } else { Ok(self.value_of(&key)) }
            }
        };
        let made = Transaction::<Link, _, _>::new(&self.proc, name, statements).typed().retry(retry(step));
        let made = made.timeout(ms(TRANSACTION_MS));
        let result = made.await;
        self.judge(OpKind::Transaction, step, key.clone(), result)
    }

    fn judge(&self, op: OpKind, step: &Step, key: RecordKey, result: Result<String, StepError<String>>) -> Done {
        let (text, succeeded) = match result {
            Err(StepError::Cancelled(cancelled)) => return Err(cancelled.into()),
            result => {
                self.fits(op, step, &key, &result);
                match result {
                    Ok(value) => (value, true),
                    Err(error) => (error.to_string(), false),
                }
            }
        };
        self.returned(op, key.clone(), text);
        if !succeeded && step.fatal {
            let first = RecordKey { name: first_name(&key.name).into(), ..key };
            return Err(Stop::Failed(format!("{first} failed")));
        }
        Ok(())
    }

    /// A step returns only what its program lets it.
    fn fits(&self, op: OpKind, step: &Step, key: &RecordKey, result: &Result<String, StepError<String>>) {
        let world = &self.link.world;
        // How often a transaction was called is not how often it has failed: it may have been made again.
        let counted = op != OpKind::Transaction;
        let fails = step.fails >= step.attempts;
        let timeout = if counted { step.timeout } else { Some(TRANSACTION_MS) };
        let fits = match result {
            Ok(value) => *value == self.value_of(key) && !(counted && fails),
            Err(StepError::Failed(error)) => error == FAILED && step.fails > 0 && (fails || !counted),
            Err(StepError::TimedOut(after)) => {
                timeout.map(ms) == Some(*after) && !(world.faultless && ms(step.takes) < *after)
            }
            Err(_) => false,
        };
        if !fits {
            world.wrong(format!("{key} of {} returned {result:?}, and is {step:?}", self.proc.id()));
        }
    }

    async fn value(&self, value: &Value, key: Option<u64>) -> Done {
        let name = name(&value.name, value.keyed.then(|| key.unwrap_or(0)));
        for of in &value.uses {
            match *of {
                Use::Get => {
                    let got: u64 = self.proc.get(name.clone(), || 0).await?;
                    self.valued(&name, Valued::Got(got));
                }
                Use::Set(to) => {
                    self.proc.set(name.clone(), to).await?;
                    self.valued(&name, Valued::Set(to));
                }
            }
        }
        Ok(())
    }

    fn valued(&self, name: &Name, valued: Valued) {
        let replaying = self.proc.is_replaying();
        self.link.world.valued(self.proc.run(), self.proc.execution(), &self.key(name), valued, replaying);
    }

    /// Gets a variable when the process has failed or was cancelled: it is what it was.
    async fn recall(&self, of: &str) -> Done {
        let name = name(of, None);
        let got = self.proc.get(name.clone(), || 0).await?;
        self.valued(&name, Valued::Got(got));
        Ok(())
    }

    async fn receive(&self, event: usize, timeout: Option<u64>) -> Done {
        let _waits = self.waits(Awaited::Message(event));
        let receive = self.proc.event(MESSAGES[event]);
        let message = match timeout {
            Some(timeout) => receive.timeout(ms(timeout)).await?,
            None => Some(receive.await?),
        };
        // Which of the event's receives it was is in the name of a record that nobody had before.
        self.received(event, message);
        Ok(())
    }

    fn received(&self, event: usize, message: Option<String>) {
        let world = &self.link.world;
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let text = message.unwrap_or_else(|| {
            world.saw(Sight::GaveUp);
            TIMED_OUT.into()
        });
        let place = format!("{}/", MESSAGES[event].name());
        let before = results.iter().filter(|(name, _)| name.starts_with(&place)).count();
        results.push((format!("{place}{before}"), text.clone()));
        drop(results);
        world.received(self.proc.run(), MESSAGES[event].name(), before, text);
    }

    async fn child(&self, child: usize, awaited: bool) -> Done {
        let kind = kind(child);
        let started = match self.proc.spawn(kind, format!("p{child}"), &child).await {
            Ok(started) => started,
            Err(SpawnError::Cancelled(cancelled)) => return Err(cancelled.into()),
            Err(error) => {
                self.link.world.wrong(format!("a child of {}: {error}", self.proc.id()));
                return Ok(());
            }
        };
        let key = |sign: &str| RecordKey {
            scope: self.scope,
            name: kind.kind().into(),
            key: format!("{sign}p{child}").into(),
        };
        self.returned(OpKind::Spawn, key("+"), format!("{} {}", started.run(), started.existed()));
        if awaited {
            let _waits = self.waits(Awaited::End(child));
            let text = self.ended(child, started.output(&self.proc).await)?;
            self.returned(OpKind::Output, key("="), text);
        }
        Ok(())
    }

    /// How another process has ended, if it has ended so.
    fn ended(&self, child: usize, output: Result<Results, OutputError<Failure>>) -> Result<String, Stop> {
        let text = match output {
            Ok(results) => serde_json::to_string(&results).unwrap_or_default(),
            Err(OutputError::Cancelled(cancelled)) => return Err(cancelled.into()),
            Err(error) => error.to_string(),
        };
        self.link.world.ended_as(&format!("p{child}"), &text);
        Ok(text)
    }

    async fn race(&self, of: &str, members: &[Member], key: Option<u64>) -> Done {
        let name_of = name(of, key);
        let mut race = self.proc.race::<Result<(Option<usize>, String), Stop>>(name_of.clone());
        let mut waits = Vec::new();
        for member in members {
            race = match member {
                Member::Delay { name: of, ms: after } => {
                    race.on(self.proc.delay(name(of, key), ms(*after)), |delayed| Ok((None, format!("{delayed:?}"))))
                }
                Member::Receive(event) => {
                    let event = *event;
                    waits.push(self.waits(Awaited::Message(event)));
                    race.on(self.proc.event(MESSAGES[event]), move |message| Ok((Some(event), message)))
                }
                Member::Step(step) => {
                    let name = name(&step.name, key);
                    let key = self.key(&name);
                    let of = key.clone();
                    let made =
                        self.proc.step(name, move |attempt: Attempt| self.body(step, key.clone(), attempt, true));
                    race.on(made.typed().retry(retry(step)), move |result| {
                        // Its attempts have no time-out there.
                        self.fits(OpKind::Step, &Step { timeout: None, ..step.clone() }, &of, &result);
                        Ok((None, format!("{result:?}")))
                    })
                }
                Member::Output(child) => {
                    let child = *child;
                    waits.push(self.waits(Awaited::End(child)));
                    let output = self.proc.output(kind(child), format!("p{child}"));
                    race.on(output, move |output| self.ended(child, output).map(|text| (None, text)))
                }
            };
        }
        let (event, text) = race.await??;
        drop(waits);
        let key = self.key(&name_of);
        match event {
            None => self.returned(OpKind::Race, key, text),
            Some(event) => {
                self.told(OpKind::Race, key, text.clone());
                self.received(event, Some(text));
            }
        }
        Ok(())
    }
}
