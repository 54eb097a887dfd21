use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;

use super::Process;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::{At, Part, Run, State, WaitFor};
use crate::error::{OutputError, SpawnError};
use crate::host::check_spawn;
use crate::limits;
use crate::payload::{self, EncodeError};
use crate::storage::{Effect, Ended, Fate, Op, OpKind, Outcome, RunId, Spawn, SpawnRecord, Status, Target};

/// Another process that a process has started. See [`Process::spawn`].
#[derive(Debug)]
pub struct Child<O, E> {
    id: Box<str>,
    kind: &'static str,
    run: RunId,
    existed: bool,
    types: PhantomData<fn() -> Result<O, E>>,
}

impl<O, E> Child<O, E> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }
    /// Its run.
    pub fn run(&self) -> RunId {
        self.run
    }
    /// A process of that id, kind and input was there already.
    pub fn existed(&self) -> bool {
        self.existed
    }
    /// Awaits its output, as an operation of `process`.
    #[track_caller]
    pub fn output<'p>(&self, process: &'p Process) -> AwaitOutput<'p, O, E> {
        AwaitOutput::new(process, self.kind, self.id.clone().into(), Some(self.run))
    }
}

/// The start of another process, to be awaited. See [`Process::spawn`].
#[must_use = "nothing happens before it is awaited"]
pub struct SpawnChild<'p, O, E> {
    run: Arc<Run>,
    part: Part,
    at: At,
    kind: &'static str,
    id: String,
    input: Result<Box<str>, EncodeError>,
    existing_ok: bool,
    restart_finished: bool,
    types: PhantomData<(&'p (), fn() -> Result<O, E>)>,
}

impl<'p, O, E> SpawnChild<'p, O, E> {
    #[track_caller]
    pub(super) fn new(
        process: &'p Process,
        kind: &'static str,
        id: String,
        input: Result<Box<str>, EncodeError>,
    ) -> Self {
        Self {
            run: process.run.clone(),
            part: process.part(),
            at: Location::caller(),
            kind,
            id,
            input,
            existing_ok: false,
            restart_finished: false,
            types: PhantomData,
        }
    }

    /// A process of that id and kind will do, whatever its input.
    pub fn existing_ok(mut self) -> Self {
        self.existing_ok = true;
        self
    }

    /// If the process has ended, it gets a new run with this input.
    pub fn restart_finished(mut self) -> Self {
        self.restart_finished = true;
        self
    }
}

impl<'p, O, E> IntoFuture for SpawnChild<'p, O, E> {
    type Output = Result<Child<O, E>, SpawnError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { run, part, at, kind, id, input, existing_ok, restart_finished, .. } = self;
        let future = spawn(run, part, at, kind, id, input, existing_ok, restart_finished);
        Box::pin(async move {
            let (id, spawned) = future.await?;
            Ok(Child { id, kind, run: spawned.run, existed: spawned.existed, types: PhantomData })
        })
    }
}

#[allow(clippy::too_many_arguments)]
async fn spawn(
    run: Arc<Run>,
    part: Part,
    at: At,
    kind: &'static str,
    id: String,
    input: Result<Box<str>, EncodeError>,
    existing_ok: bool,
    restart_finished: bool,
) -> Result<(Box<str>, SpawnRecord), SpawnError> {
    let input = check_spawn(&run.core, kind, &id, input)?;
    let id: Box<str> = id.into();
    let mut operation = Operation::with_key(&run, part, kind, &format!("+{id}"), OpKind::Spawn, at);
    let record = match operation.begin().await? {
        Begun::Recorded(record) => record.payload,
        Begun::Open(_) => {
            let places = run.core.may_take(kind);
            // Made once, outside whatever is retried: by it a repetition recognises its own success.
            let child = run.core.new_run();
            let digest = payload::digest(&input);
            // What is there is judged now, and never again by what a later version of the code would give.
            let asked = if existing_ok { "".into() } else { digest.clone() };
            let spawn = Spawn {
                run: child,
                id: id.clone(),
                kind: kind.into(),
                input,
                digest,
                take: places.is_some(),
                restart_finished,
            };
            let write = Write { effect: Some(Effect::Spawn(spawn)), places, ..Write::done(&*asked) };
            match operation.record(write).await? {
                Outcome::Spawned(spawned) => spawned.to_json(&asked),
                other => return operation.undecodable(&format!("the storage answered {other:?}")).await,
            }
        }
    };
    let record: SpawnRecord = match payload::decode(&record) {
        Ok(record) => record,
        Err(why) => return operation.undecodable(&why).await,
    };
    operation.done();
    if *record.kind != *kind {
        return Err(SpawnError::OtherKind { id, asked: kind.into(), found: record.kind });
    }
    if record.other_input {
        return Err(SpawnError::OtherInput { id });
    }
    Ok((id, record))
}

/// The output of another process, to be awaited. See [`Process::output`].
#[must_use = "nothing happens before it is awaited"]
pub struct AwaitOutput<'p, O, E> {
    pub(super) run: Arc<Run>,
    pub(super) part: Part,
    pub(super) at: At,
    pub(super) kind: &'static str,
    pub(super) id: String,
    pub(super) target: Option<RunId>,
    types: PhantomData<(&'p (), fn() -> Result<O, E>)>,
}

impl<'p, O, E> AwaitOutput<'p, O, E> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, kind: &'static str, id: String, target: Option<RunId>) -> Self {
        let (run, part, at) = (process.run.clone(), process.part(), Location::caller());
        Self { run, part, at, kind, id, target, types: PhantomData }
    }

    /// The key of its record.
    pub(super) fn key(&self) -> String {
        format!("={}", self.id)
    }
}

/// What stands in the record: how the awaited process ended.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum End {
    Completed(Box<RawValue>),
    Failed(Box<RawValue>),
    Cancelled,
    NotFound,
}

impl End {
    fn from_row(ended: Option<Ended>) -> Result<Self, String> {
        let Some((status, output)) = ended else { return Ok(Self::NotFound) };
        let json = || match &output {
            Some(text) => RawValue::from_string(text.clone().into()).map_err(|e| e.to_string()),
            None => Err("it has no output".to_owned()),
        };
        match status {
            Status::Completed => json().map(Self::Completed),
            Status::Failed => json().map(Self::Failed),
            _ => Ok(Self::Cancelled),
        }
    }

    pub(super) fn decode<O: DeserializeOwned, E: DeserializeOwned>(
        &self,
        id: &str,
    ) -> Result<Result<O, OutputError<E>>, String> {
        match self {
            Self::Completed(json) => payload::decode(json.get()).map(Ok),
            Self::Failed(json) => payload::decode(json.get()).map(|error| Err(OutputError::Failed(error))),
            Self::Cancelled => Ok(Err(OutputError::WasCancelled)),
            Self::NotFound => Ok(Err(OutputError::NotFound(id.into()))),
        }
    }
}

impl<'p, O, E> IntoFuture for AwaitOutput<'p, O, E>
where
    O: DeserializeOwned + Send + 'p,
    E: DeserializeOwned + Send + 'p,
{
    type Output = Result<O, OutputError<E>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            if self.nobodys() {
                return Err(OutputError::NotFound(self.id.into()));
            }
            let mut operation =
                Operation::with_key(&self.run, self.part, self.kind, &self.key(), OpKind::Output, self.at);
            let end = match operation.begin().await? {
                Begun::Recorded(record) => match payload::decode::<End>(&record.payload) {
                    Ok(end) => end,
                    Err(why) => return operation.undecodable(&why).await,
                },
                Begun::Open(_) => {
                    let (end, awaited) = self.ended(&operation).await?;
                    let payload = match payload::encode_record(&end) {
                        Ok(payload) => payload,
                        Err(error) => return operation.unencodable(&error).await,
                    };
                    operation.record(Write { awaited, ..Write::done(payload) }).await?;
                    end
                }
            };
            match end.decode(&self.id) {
                Ok(output) => {
                    operation.done();
                    output
                }
                Err(why) => operation.undecodable(&why).await,
            }
        })
    }
}

impl<O, E> AwaitOutput<'_, O, E> {
    /// Whether no process can have this id: there is nothing to look for then, and no record that could name it.
    fn nobodys(&self) -> bool {
        limits::check("process id", &self.id, limits::MAX_ID).is_err()
    }

    /// The awaited run, if the database need not be asked for it: the waiter row of an earlier execution stands, and the run has
    /// not ended since, so it is still the current run of its id; or the caller has given the run, and its end is known.
    fn stands(&self) -> Option<RunId> {
        let state = self.run.state();
        if let Some(target) = self.target.filter(|target| state.mail.targets.contains_key(target)) {
            return Some(target);
        }
        let is_it = |(id, run): &&(Box<str>, RunId)| {
            self.target.map_or(**id == *self.id, |target| target == *run) && !state.mail.targets.contains_key(run)
        };
        state.mail.awaits.iter().find(is_it).map(|(_, run)| *run)
    }

    /// Waits until the process has ended. Writes no record; says which waiter row is to go with it.
    pub(super) async fn ended(&self, operation: &Operation) -> Result<(End, Option<RunId>), crate::Cancelled> {
        if self.nobodys() {
            return Ok((End::NotFound, None));
        }
        let (target, ended) = match self.stands() {
            Some(target) => (target, None),
            None => {
                let (id, target) = (self.id.as_str().into(), self.target);
                let answer = self.run.submit(Op::Await { run: self.run.run, id, target }, None);
                match self.run.outcome(answer).await {
                    Outcome::Awaits(Some((target, ended))) => {
                        // The end of an earlier run of this id must not decide a race between its members.
                        let is_it = |run: &RunId, of: &mut Target| *run == target || *of.id != *self.id;
                        self.run.state().mail.targets.retain(is_it);
                        (target, ended)
                    }
                    _ => return Ok((End::NotFound, None)),
                }
            }
        };
        let ended = match ended {
            Some(ended) => Some(ended),
            None => {
                let what = WaitFor::Output(self.id.as_str().into());
                let ended = |state: &mut State, _| match &state.mail.targets.get(&target)?.fate {
                    Fate::Ended(ended, _) => Some(Some(ended.clone())),
                    Fate::Gone | Fate::Open => Some(None),
                };
                operation.wait(what, None, ended).await?
            }
        };
        match End::from_row(ended) {
            Ok(end) => Ok((end, Some(target))),
            Err(why) => operation.undecodable(&format!("the output of process {:?}: {why}", self.id)).await,
        }
    }
}
