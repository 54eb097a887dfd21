use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;

use super::Process;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::{At, Part, Run};
use crate::error::RaiseError;
use crate::host::check_message;
use crate::payload::{self, EncodeError};
use crate::storage::{Effect, OpKind, Outcome, Raise, Raised, RunId};

/// A message that a process sends, to be awaited. See [`Process::raise`].
#[must_use = "nothing happens before it is awaited"]
pub struct RaiseFrom<'p> {
    run: Arc<Run>,
    part: Part,
    at: At,
    id: String,
    event: &'static str,
    key: Option<String>,
    payload: Result<Box<str>, EncodeError>,
    process: PhantomData<&'p ()>,
}

impl<'p> RaiseFrom<'p> {
    #[track_caller]
    pub(super) fn new(
        process: &'p Process,
        id: String,
        event: &'static str,
        payload: Result<Box<str>, EncodeError>,
    ) -> Self {
        Self {
            run: process.run.clone(),
            part: process.part(),
            at: Location::caller(),
            id,
            event,
            key: None,
            payload,
            process: PhantomData,
        }
    }

    /// The key of its record, for a second message of the same event to the same process in one run.
    pub fn key(mut self, key: impl std::fmt::Display) -> Self {
        self.key = Some(key.to_string());
        self
    }
}

impl<'p> IntoFuture for RaiseFrom<'p> {
    type Output = Result<(), RaiseError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self { run, part, at, id, event, key, payload, .. } = self;
            let key = key.unwrap_or_else(|| format!(">{id}"));
            let mut operation = Operation::with_key(&run, part, event, &key, OpKind::Raise, at);
            // From the record's key, so it is the same after a crash: the mailbox recognises a repetition.
            let event_id = operation.key.idempotency(run.run).simple().to_string();
            let payload = check_message(&run.core, &id, event, &event_id, payload)?;
            let raised = match operation.begin().await? {
                Begun::Recorded(record) => match payload::decode::<Box<str>>(&record.payload) {
                    Ok(text) => from_record(&text),
                    Err(why) => return operation.undecodable(&why).await,
                },
                Begun::Open(_) => {
                    let raise = Raise { id: (*id).into(), name: event.into(), event_id: event_id.into(), payload };
                    let write = Write { effect: Some(Effect::Raise(raise)), ..Write::done("") };
                    match operation.record(write).await? {
                        Outcome::Raised(raised) => Some(raised),
                        _ => None,
                    }
                }
            };
            let Some(raised) = raised else {
                return operation.undecodable("it is none of the outcomes of a raise").await;
            };
            operation.done();
            match raised {
                Raised::Delivered { .. } => Ok(()),
                Raised::Finished => Err(RaiseError::Finished { id: id.into() }),
                Raised::NotFound => Err(RaiseError::NotFound { id: id.into() }),
            }
        })
    }
}

fn from_record(text: &str) -> Option<Raised> {
    let delivered = Raised::Delivered { run: RunId(uuid::Uuid::nil()), number: 0, mine: false };
    [delivered, Raised::Finished, Raised::NotFound]
        .into_iter()
        .find(|raised| raised.as_json().trim_matches('"') == text)
}
