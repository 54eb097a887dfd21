//! The oracle of the mailboxes: each message is there once, in order, and is taken once.

use durable_core::storage::{Raised, RecordKey, RunId};
use std::collections::BTreeMap;
use tokio::time::Instant;

use crate::ledger::{Ledger, Violations};
use crate::tally::Sight;

/// A message that is in a mailbox.
pub struct Message {
    pub event: String,
    pub payload: String,
    id: String,
    /// When it came.
    pub at: Instant,
    pub taken: Option<RecordKey>,
}

impl Ledger {
    /// What became of a message.
    pub fn raised(&mut self, event: &str, id: &str, payload: &str, raised: Raised, wrong: &mut Violations) {
        let Raised::Delivered { run, number, .. } = raised else { return };
        let finished = self.rows.get(&run).is_some_and(|row| row.status.is_finished());
        let messages = self.messages.entry(run).or_default();
        if let Some(known) = messages.get(&number) {
            if known.id != id {
                wrong.push(format!("message {number} of {run} is {id}, and was {}", known.id));
            }
            self.seen.push(Sight::OwnMessage);
            return;
        }
        if let Some((first, _)) = messages.iter().find(|(_, message)| message.id == id) {
            wrong.push(format!("the message {id} was put in twice: as {first} and as {number}"));
        }
        if messages.keys().last().is_some_and(|last| *last > number) {
            wrong.push(format!("message {number} of {run} comes behind later ones"));
        }
        if finished {
            wrong.push(format!("message {number} was put into {}, which had ended", self.id(run)));
        }
        let message =
            Message { event: event.into(), payload: payload.into(), id: id.into(), at: Instant::now(), taken: None };
        self.messages.entry(run).or_default().insert(number, message);
    }

    /// A record takes a message.
    pub fn taken(&mut self, run: RunId, number: i64, key: &RecordKey, wrong: &mut Violations) {
        let id = self.id(run).to_owned();
        let messages = self.messages.entry(run).or_default();
        let Some(message) = messages.get(&number) else {
            wrong.push(format!("{key} of {id} takes message {number}, which there is not"));
            return;
        };
        match &message.taken {
            Some(other) if other == key => return,
            Some(other) => wrong.push(format!("{key} of {id} takes message {number}, which {other} has taken")),
            None => {}
        }
        let event = message.event.clone();
        let earlier =
            messages.iter().find(|(at, other)| **at < number && other.event == event && other.taken.is_none());
        if let Some((earlier, _)) = earlier {
            wrong.push(format!("{key} of {id} takes message {number}, and {earlier} comes first"));
        }
        if let Some(message) = messages.get_mut(&number) {
            message.taken = Some(key.clone());
        }
    }

    /// In how many mailboxes a message with this payload is, counted with repetitions.
    pub fn copies(&self, payload: &str) -> usize {
        self.messages.values().flat_map(BTreeMap::values).filter(|message| message.payload == payload).count()
    }

    /// How many messages of an event a process was sent.
    pub fn sent(&self, id: &str, event: &str) -> u64 {
        let messages = self.ids.get(id).and_then(|run| self.messages.get(run));
        messages.map_or(0, |messages| messages.values().filter(|message| message.event == event).count() as u64)
    }
}
