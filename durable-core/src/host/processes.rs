use chrono::{DateTime, TimeDelta, Utc};
use std::sync::Arc;
use std::time::Duration;

use super::handle::{Handle, Info, Json};
use crate::definition::Definition;
use crate::engine::Core;
use crate::error::{Failure, HandleError, Unavailable};
use crate::limits;
use crate::process::All;
use crate::storage::{Counted, Filter, Op, Order, RunId, Status, What};

/// The processes of a namespace: a filter, to list, to count, to resume in bulk.
///
/// ```
/// # use durable_core::*;
/// # use durable_core::memory::Memory;
/// # use std::time::Duration;
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # let host = Host::builder(Memory::new()).start().await.unwrap();
/// // Page by page through what has been stuck for an hour.
/// let mut page = host.processes().status(Status::Stuck).unchanged_for(Duration::from_secs(3600));
/// loop {
///     let found = page.list(100).await?;
///     let Some(last) = found.last() else { break };
///     page = page.after(last.run);
/// }
/// // How many wait for a kind that no live instance registers?
/// let unserved: u64 = host.processes().count().await?.iter().filter(|c| !c.served).map(|c| c.count).sum();
/// # assert_eq!(unserved, 0);
/// # Ok::<_, Unavailable>(()) }).unwrap();
/// ```
#[derive(Clone)]
#[must_use = "nothing is read before `list` or `count`"]
pub struct Processes {
    core: Arc<Core>,
    filter: Filter,
    unchanged_for: Option<Duration>,
}

impl Processes {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core, filter: Filter::default(), unchanged_for: None }
    }

    /// Only this kind.
    pub fn kind<I, O, E>(mut self, definition: Definition<I, O, E>) -> Self {
        self.filter.kind = Some(definition.kind().into());
        self
    }

    /// Only this status.
    pub fn status(mut self, status: Status) -> Self {
        self.filter.status = Some(status);
        self
    }

    /// Only those whose status has not changed for so long, by the database's clock.
    pub fn unchanged_for(mut self, age: Duration) -> Self {
        self.unchanged_for = Some(age);
        self
    }

    /// The page that begins behind this run: the last one of the page before.
    pub fn after(mut self, run: RunId) -> Self {
        self.filter.after = Some(run);
        self
    }

    /// Whether it asks for a kind that no process can have; some databases would not even take the question.
    fn is_of_none(&self) -> bool {
        self.filter.kind.as_deref().is_some_and(|kind| limits::check("kind", kind, limits::MAX_NAME).is_err())
    }

    fn filter(&self, limit: usize) -> Filter {
        let now = self.core.clock.now();
        let since = |age: Duration| {
            let since = TimeDelta::from_std(age).ok().and_then(|age| now.checked_sub_signed(age));
            since.unwrap_or(DateTime::<Utc>::UNIX_EPOCH)
        };
        Filter { unchanged_since: self.unchanged_for.map(since), limit, ..self.filter.clone() }
    }

    /// Up to `limit` of them, in the order in which they were started.
    ///
    /// # Errors
    /// No answer.
    pub async fn list(&self, limit: usize) -> Result<Vec<Info>, Unavailable> {
        if self.is_of_none() {
            return Ok(Vec::new());
        }
        let (core, filter) = (&self.core, self.filter(limit));
        let rows = core.read(|| core.storage.list(&core.namespace, &filter)).await?;
        Ok(rows.into_iter().map(Info::from_row).collect())
    }

    /// How many there are of each kind and status, and whether a live instance registers the kind. It looks at every
    /// one of them: not for a hot path.
    ///
    /// # Errors
    /// No answer.
    pub async fn count(&self) -> Result<Vec<Counted>, Unavailable> {
        if self.is_of_none() {
            return Ok(Vec::new());
        }
        let (core, filter) = (&self.core, self.filter(usize::MAX));
        core.read(|| core.storage.count(&core.namespace, &filter)).await
    }

    /// Resumes all stuck processes that pass the filter and says how many: one call after a fix, also for neighbours
    /// that were marked together with the culprit.
    ///
    /// # Errors
    /// No answer; those before it are resumed.
    pub async fn resume_stuck(&self) -> Result<usize, Unavailable> {
        let resume = |info: Info| async move {
            let order = Order { id: info.id, run: Some(info.run), what: What::Resume { forget: Vec::new() } };
            self.core.ask(Op::Order(order), None).await.map(|_| true)
        };
        self.resume(Status::Stuck, resume).await
    }

    /// Resumes all failed processes that pass the filter, at the steps that failed, and says how many: when what they
    /// called works again. Those whose compensation has run stay as they are.
    ///
    /// # Errors
    /// No answer; those before it are resumed.
    pub async fn resume_failed(&self) -> Result<usize, Unavailable> {
        let resume = |info: Info| async move {
            let handle = Handle::<Json, Failure>::new(self.core.clone(), info.id, Some(info.run), None);
            match handle.resume().await {
                Ok(()) => Ok(true),
                Err(HandleError::Unavailable(why)) => Err(why),
                // Compensated; or it was resumed, restarted or deleted meanwhile.
                Err(_) => Ok(false),
            }
        };
        self.resume(Status::Failed, resume).await
    }

    /// Resumes page by page, and counts those of which `resume` says that it did.
    async fn resume<F>(&self, status: Status, resume: impl Fn(Info) -> F) -> Result<usize, Unavailable>
    where
        F: Future<Output = Result<bool, Unavailable>>,
    {
        const PAGE: usize = 200;
        let mut page = self.clone().status(status);
        let mut resumed = 0;
        loop {
            let found = page.list(PAGE).await?;
            let Some(last) = found.last() else { return Ok(resumed) };
            page = page.after(last.run);
            for done in All::new(found.into_iter().map(&resume)).await {
                resumed += usize::from(done?);
            }
        }
    }
}

impl std::fmt::Debug for Processes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Processes").field("filter", &self.filter).finish_non_exhaustive()
    }
}
