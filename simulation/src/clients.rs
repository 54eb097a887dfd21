//! Clients: what they ask for, and what they are told.

use durable_core::{Handle, HandleError, RaiseError, SpawnError, Status};
use std::sync::PoisonError;
use std::time::Duration;
use tokio::time::timeout;

use crate::draw::VARIABLES;
use crate::effects::Sent;
use crate::interpret::{MESSAGES, kind};
use crate::play::Play;
use crate::program::EVENTS;
use crate::tally::Fault;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Play {
    /// A call of a client's, that may go away before it has its answer.
    pub fn call(&mut self, call: impl Future<Output = ()> + Send + 'static) {
        let world = self.world.clone();
        let patience =
            (!self.world.faultless && !world.inner().calm && self.seed.permille(100)).then(|| ms(self.seed.ms(2_000)));
        tokio::spawn(async move {
            match patience {
                None => call.await,
                Some(patience) => {
                    if timeout(patience, call).await.is_err() {
                        world.inner().tally.hit(Fault::ClientGone, &[]);
                    }
                }
            }
        });
    }

    /// A client starts the next process.
    pub fn start_process(&mut self) {
        let next = self.world.programs.iter().position(|program| program.child).unwrap_or(self.world.programs.len());
        let index = if self.started < next { self.started } else { self.seed.below(next as u64) as usize };
        let id = format!("p{index}");
        let hosts = self.alive();
        if hosts.is_empty() {
            return;
        }
        let host = *self.seed.one(&hosts);
        let Some(host) = self.hosts[host].place.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
        self.started = self.started.max(index + 1);
        let spawn = host.spawn(kind(index), &*id, &index).into_future();
        drop(host);
        let world = self.world.clone();
        self.call(async move {
            match spawn.await {
                Ok(handle) => {
                    let known = world.inner().ledger.ids.get(&id).copied();
                    if known.is_none() || known != handle.run() {
                        world.wrong(format!("{id} was started as {:?}, and is {known:?}", handle.run()));
                    }
                }
                Err(SpawnError::Unavailable(why)) => world.say(|_| format!("the start of {id}: {why}")),
                Err(error) => world.wrong(format!("the start of {id}: {error}")),
            }
        });
    }

    /// A client sends a message to some process.
    pub fn message(&mut self) {
        let (to, event) = (self.seed.below(self.world.programs.len() as u64), self.seed.below(EVENTS as u64));
        self.send(to as usize, event as usize);
    }

    pub fn send(&mut self, to: usize, event: usize) {
        let id = format!("p{to}");
        let handles: Vec<Handle> = (0..self.seed.between(1, 3)).filter_map(|_| self.handle(&id)).collect();
        if handles.is_empty() {
            return;
        }
        self.messages += 1;
        let text = format!("c{}", self.messages);
        // With an id it can be sent again.
        let named = self.seed.permille(500);
        let world = self.world.clone();
        world.inner().effects.sent.insert(text.clone(), Sent::Unknown);
        self.call(async move {
            let mut unknown = false;
            for handle in handles.into_iter().take(if named { 3 } else { 1 }) {
                let mut raise = handle.raise(MESSAGES[event], &text);
                if named {
                    raise = raise.id(&text);
                }
                let sent = match raise.await {
                    Ok(()) => Sent::Accepted,
                    Err(RaiseError::NotFound { .. } | RaiseError::Finished { .. }) => Sent::Refused,
                    Err(RaiseError::Unavailable(_)) => Sent::Unknown,
                    Err(error) => {
                        world.wrong(format!("the message {text}: {error}"));
                        return;
                    }
                };
                world.say(|_| format!("the message {text} to {id}: {sent:?}"));
                let copies = world.inner().ledger.copies(&format!("{text:?}"));
                if sent == Sent::Accepted && copies != 1 {
                    world.wrong(format!("the message {text} was accepted, and is there {copies} times"));
                }
                if sent == Sent::Unknown {
                    unknown = true;
                    continue;
                }
                // What is refused now may still be on its way from a call before.
                let sent = if unknown && sent == Sent::Refused { Sent::Unknown } else { sent };
                world.inner().effects.sent.insert(text, sent);
                return;
            }
        });
    }

    pub fn cancel(&mut self) {
        let id = format!("p{}", self.seed.below(self.world.programs.len() as u64));
        let Some(handle) = self.handle(&id) else { return };
        let world = self.world.clone();
        self.call(async move {
            let result = handle.cancel().await;
            world.say(|_| format!("the cancellation of {id}: {result:?}"));
            let inner = world.inner();
            let asked = inner.ledger.ids.get(&id).is_some_and(|run| inner.ledger.rows[run].asked.is_some());
            drop(inner);
            match result {
                Ok(()) if !asked => world.wrong(format!("{id} was asked to cancel, and has not been")),
                Ok(())
                | Err(HandleError::NotFound { .. } | HandleError::Status { .. } | HandleError::Unavailable(_)) => {}
                Err(error) => world.wrong(format!("the cancellation of {id}: {error}")),
            }
        });
    }

    /// Somebody has the processes resumed that are stuck.
    pub fn resume(&mut self) {
        let stuck = {
            let inner = self.world.inner();
            let stuck = inner.ledger.rows.values().filter(|row| row.status == Status::Stuck);
            stuck.map(|row| row.id.clone()).collect::<Vec<_>>()
        };
        for id in stuck {
            let Some(handle) = self.handle(&id) else { return };
            let world = self.world.clone();
            self.call(async move {
                let result = handle.resume().await;
                world.say(|_| format!("the resume of {id}: {result:?}"));
                match result {
                    // Another client was first, and it has gone on, or failed and compensated, since.
                    Ok(())
                    | Err(HandleError::Status { .. } | HandleError::Compensated { .. } | HandleError::Unavailable(_)) =>
                        {}
                    Err(error) => world.wrong(format!("the resume of {id}: {error}")),
                }
            });
        }
    }

    /// A client looks at a variable of some process.
    pub fn read(&mut self) {
        let index = self.seed.below(self.world.programs.len() as u64);
        let (id, name) = (format!("p{index}"), *self.seed.one(&VARIABLES));
        let Some(handle) = self.handle(&id) else { return };
        let world = self.world.clone();
        self.call(async move {
            let before = world.recorded(&id, name);
            match handle.value::<u64>(name).await {
                Ok(value) => world.shown(&id, name, before, value),
                Err(HandleError::NotFound { .. } | HandleError::Unavailable(_)) => {}
                Err(error) => world.wrong(format!("the value {name} of {id}: {error}")),
            }
        });
    }

    /// A client awaits the end of some process.
    pub fn watch(&mut self) {
        let index = self.seed.below(self.world.programs.len() as u64) as usize;
        let id = format!("p{index}");
        let Some(handle) = self.handle(&id) else { return };
        let (handle, world) = (handle.of(kind(index)), self.world.clone());
        self.call(async move {
            let text = match handle.output().await {
                Ok(results) => serde_json::to_string(&results).unwrap_or_default(),
                Err(durable_core::OutputError::Unavailable(_)) => return,
                Err(error) => error.to_string(),
            };
            world.ended_as(&id, &text);
        });
    }

    /// Which processes have fewer messages than they could take.
    pub fn wanting(&self) -> Vec<(usize, usize)> {
        let inner = self.world.inner();
        let mut wanting = Vec::new();
        for (index, program) in self.world.programs.iter().enumerate() {
            let id = format!("p{index}");
            let there = inner.ledger.ids.get(&id).and_then(|run| inner.ledger.rows.get(run));
            if there.is_none_or(|row| row.status.is_finished()) {
                continue;
            }
            for (event, count) in program.receives().into_iter().enumerate() {
                if inner.ledger.sent(&id, MESSAGES[event].name()) < count {
                    wanting.push((index, event));
                }
            }
        }
        wanting
    }
}
