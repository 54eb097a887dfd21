use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;

use super::Process;
use crate::engine::operation::{Begun, Operation, Write};
use crate::error::Cancelled;
use crate::name::Name;
use crate::payload::{self, EncodeError};
use crate::storage::{OpKind, Record};

/// A recorded value, to be awaited. See [`Process::get`].
#[must_use = "nothing happens before it is awaited"]
pub struct Get<'p, T, F> {
    operation: Operation,
    make: F,
    value: PhantomData<(&'p (), fn() -> T)>,
}

impl<'p, T, F> Get<'p, T, F> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, name: Name, make: F) -> Self {
        let operation = Operation::new(&process.run, process.part(), &name, OpKind::Value, Location::caller());
        Self { operation, make, value: PhantomData }
    }
}

impl<'p, T, F> IntoFuture for Get<'p, T, F>
where
    T: Serialize + DeserializeOwned + Send + 'p,
    F: FnOnce() -> T + Send + 'p,
{
    type Output = Result<T, Cancelled>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { mut operation, make, .. } = self;
        Box::pin(async move {
            match operation.begin().await? {
                Begun::Recorded(Record { payload, .. }) => match payload::decode(&payload) {
                    Ok(value) => Ok(value),
                    Err(why) => operation.undecodable(&why).await,
                },
                Begun::Open(_) => {
                    let (payload, value) = match payload::encode_back(make()) {
                        Ok(encoded) => encoded,
                        Err(error) => return operation.unencodable(&error).await,
                    };
                    if !operation.keep(&payload) {
                        operation.record(Write::done(payload)).await?;
                    }
                    operation.done();
                    Ok(value)
                }
            }
        })
    }
}

/// A durable variable's new value, to be awaited. See [`Process::set`].
#[must_use = "nothing happens before it is awaited"]
pub struct Set<'p, T> {
    operation: Operation,
    payload: Result<Box<str>, EncodeError>,
    value: PhantomData<(&'p (), fn() -> T)>,
}

impl<'p, T: Serialize> Set<'p, T> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, name: Name, value: T) -> Self {
        let operation = Operation::new(&process.run, process.part(), &name, OpKind::Value, Location::caller());
        Self { operation, payload: payload::encode(&value), value: PhantomData }
    }
}

impl<'p, T: Send + 'p> IntoFuture for Set<'p, T> {
    type Output = Result<(), Cancelled>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { mut operation, payload, .. } = self;
        Box::pin(async move {
            let payload = match payload {
                Ok(payload) => payload,
                Err(error) => return operation.unencodable(&error).await,
            };
            match operation.begin().await? {
                Begun::Recorded(_) if !operation.key.key.is_empty() => return Ok(()),
                #[cfg(durable_mutations)]
                Begun::Recorded(_) if crate::mutation::is_broken(crate::mutation::Rule::SetWrites) => return Ok(()),
                // An unkeyed one writes again.
                Begun::Recorded(_) | Begun::Open(_) => {}
            }
            if !operation.keep(&payload) {
                operation.record(Write::done(payload)).await?;
            }
            operation.done();
            Ok(())
        })
    }
}
