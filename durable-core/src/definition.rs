use std::fmt;
use std::marker::PhantomData;

use crate::error::Failure;

/// A kind of process, typed by its input, its output and its error.
///
/// Whoever has the definition can spawn processes of the kind and read their outputs; the function itself is
/// registered with the hosts that run it ([`HostBuilder::register`](crate::HostBuilder::register)). The kind is
/// written to the database: it must not change while processes of it exist.
///
/// ```
/// # use durable_core::{Definition, Failure};
/// pub const REGISTER_USER: Definition<String, u64> = Definition::new("register-user");
/// assert_eq!(REGISTER_USER.kind(), "register-user");
/// ```
pub struct Definition<I, O, E = Failure> {
    kind: &'static str,
    types: PhantomData<fn(I) -> Result<O, E>>,
}

impl<I, O, E> Definition<I, O, E> {
    /// A definition of this kind: 1 to 128 characters.
    pub const fn new(kind: &'static str) -> Self {
        Self { kind, types: PhantomData }
    }
    /// Its kind.
    pub const fn kind(&self) -> &'static str {
        self.kind
    }
}

impl<I, O, E> Clone for Definition<I, O, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<I, O, E> Copy for Definition<I, O, E> {}
impl<I, O, E> fmt::Debug for Definition<I, O, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Definition({:?})", self.kind)
    }
}

/// A kind of message that processes receive, typed by its payload.
///
/// ```
/// # use durable_core::Event;
/// # #[derive(serde::Serialize, serde::Deserialize)] struct Transaction { cents: i64 }
/// pub const TRANSACTION_APPEARED: Event<Transaction> = Event::new("TransactionAppeared");
/// ```
pub struct Event<T> {
    name: &'static str,
    payload: PhantomData<fn(T) -> T>,
}

impl<T> Event<T> {
    /// An event of this name: 1 to 128 characters.
    pub const fn new(name: &'static str) -> Self {
        Self { name, payload: PhantomData }
    }
    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<T> Clone for Event<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Event<T> {}
impl<T> fmt::Debug for Event<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?})", self.name)
    }
}
