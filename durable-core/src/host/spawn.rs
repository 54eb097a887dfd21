use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;

use super::Handle;
use crate::engine::Core;
use crate::error::SpawnError;
use crate::limits::{self, LimitError};
use crate::payload::{self, EncodeError};
use crate::storage::{Op, Outcome, Spawn, Spawned};

/// The start of a process, to be awaited. See [`Host::spawn`](super::Host::spawn).
#[must_use = "nothing happens before it is awaited"]
pub struct SpawnProcess<O, E> {
    core: Arc<Core>,
    kind: &'static str,
    id: String,
    input: Result<Box<str>, EncodeError>,
    existing_ok: bool,
    restart_finished: bool,
    types: PhantomData<fn() -> Result<O, E>>,
}

impl<O, E> SpawnProcess<O, E> {
    pub(super) fn new(core: Arc<Core>, kind: &'static str, id: String, input: Result<Box<str>, EncodeError>) -> Self {
        Self { core, kind, id, input, existing_ok: false, restart_finished: false, types: PhantomData }
    }

    /// A process of that id and kind will do, whatever its input.
    pub fn existing_ok(mut self) -> Self {
        self.existing_ok = true;
        self
    }

    /// If the process has ended, it gets a new run with this input; its former runs and their records stay until it is
    /// deleted.
    pub fn restart_finished(mut self) -> Self {
        self.restart_finished = true;
        self
    }
}

impl<O, E> SpawnProcess<O, E> {
    /// What is to be written, once it has been checked. Not taken by this host.
    pub(super) fn prepare(&mut self) -> Result<Spawn, LimitError> {
        let input = std::mem::replace(&mut self.input, Ok("".into()));
        let input = check_spawn(&self.core, self.kind, &self.id, input)?;
        let digest = payload::digest(&input);
        Ok(Spawn {
            run: self.core.new_run(),
            id: (*self.id).into(),
            kind: self.kind.into(),
            input,
            digest,
            take: false,
            restart_finished: self.restart_finished,
        })
    }

    /// What the id has now, if that is what was asked for.
    pub(super) fn judge(self, digest: &str, spawned: &Spawned) -> Result<Handle<O, E>, SpawnError> {
        judge_spawned(spawned, &self.id, self.kind, digest, self.existing_ok)?;
        Ok(Handle::new(self.core, self.id.into(), Some(spawned.run), Some(self.kind)))
    }

    /// As [`judge`](Self::judge), where it depends on others which run a new process will be.
    pub(super) fn judge_coming(self, digest: &str, spawned: &Spawned) -> Result<Handle<O, E>, SpawnError> {
        let run = spawned.existed.then_some(spawned.run);
        judge_spawned(spawned, &self.id, self.kind, digest, self.existing_ok)?;
        Ok(Handle::new(self.core, self.id.into(), run, Some(self.kind)))
    }

    pub(super) fn namespace(&self) -> &str {
        &self.core.namespace
    }
}

impl<O: 'static, E: 'static> IntoFuture for SpawnProcess<O, E> {
    type Output = Result<Handle<O, E>, SpawnError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(mut self) -> Self::IntoFuture {
        Box::pin(async move {
            let mut spawn = self.prepare()?;
            let digest = spawn.digest.clone();
            let places = self.core.may_take(self.kind);
            spawn.take = places.is_some();
            match self.core.ask(Op::Spawn(spawn), places).await? {
                Outcome::Spawned(spawned) => self.judge(&digest, &spawned),
                _ => Err(SpawnError::Unavailable(self.core.strange_answer())),
            }
        })
    }
}

/// Checks everything that a start is given, before anything is written.
pub(crate) fn check_spawn(
    core: &Core,
    kind: &str,
    id: &str,
    input: Result<Box<str>, EncodeError>,
) -> Result<Box<str>, LimitError> {
    limits::check("kind", kind, limits::MAX_NAME)?;
    limits::check("process id", id, limits::MAX_ID)?;
    check_payload(core, "input", input)
}

/// Checks everything that a message is given, before anything is written.
pub(crate) fn check_message(
    core: &Core,
    id: &str,
    event: &str,
    event_id: &str,
    payload: Result<Box<str>, EncodeError>,
) -> Result<Box<str>, LimitError> {
    limits::check("process id", id, limits::MAX_ID)?;
    limits::check("event name", event, limits::MAX_NAME)?;
    limits::check("message id", event_id, limits::MAX_ID)?;
    check_payload(core, "message", payload)
}

fn check_payload(
    core: &Core,
    what: &'static str,
    payload: Result<Box<str>, EncodeError>,
) -> Result<Box<str>, LimitError> {
    let payload = payload.map_err(|why| LimitError::Encode { what, why })?;
    let (given, allowed) = (payload.len(), core.settings.max_payload);
    if given > allowed { Err(LimitError::Payload { what, given, allowed }) } else { Ok(payload) }
}

/// Whether what has the id now is what was asked for.
fn judge_spawned(spawned: &Spawned, id: &str, kind: &str, digest: &str, existing_ok: bool) -> Result<(), SpawnError> {
    if *spawned.kind != *kind {
        return Err(SpawnError::OtherKind { id: id.into(), asked: kind.into(), found: spawned.kind.clone() });
    }
    if *spawned.digest != *digest && !existing_ok {
        return Err(SpawnError::OtherInput { id: id.into() });
    }
    Ok(())
}
