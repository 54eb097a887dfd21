//! Counts an engine's claims, from what it logs.

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

static CLAIMS: AtomicUsize = AtomicUsize::new(0);
static EMPTY: AtomicUsize = AtomicUsize::new(0);

/// Counts from now on.
pub(crate) fn count() -> Result<(), crate::Error> {
    Ok(tracing::subscriber::set_global_default(Claims)?)
}

/// How many claims there were, and how many of them came back with nothing: a claim is made when something is due, so
/// others had it all.
pub(crate) fn counted() -> (usize, usize) {
    (CLAIMS.load(Ordering::Relaxed), EMPTY.load(Ordering::Relaxed))
}

struct Claims;

fn tells(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && metadata.target().ends_with("engine::poller") && metadata.fields().field("count").is_some()
}

impl Subscriber for Claims {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if tells(metadata) { Interest::always() } else { Interest::never() }
    }
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        tells(metadata)
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        CLAIMS.fetch_add(1, Ordering::Relaxed);
        event.record(&mut Nothing);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Nothing;

impl Visit for Nothing {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "count" && value == 0 {
            EMPTY.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}
