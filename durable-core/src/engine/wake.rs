use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};

use super::lock;

/// What wakes a process's future. Durable operations never clone its waker: they leave a note in the run, which
/// wakes the whole future. So the number of clones tells whether anything else could wake it, and a process with none
/// may leave memory.
#[derive(Debug, Default)]
pub(crate) struct RootWake {
    woken: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl RootWake {
    pub(crate) fn take_woken(&self) -> bool {
        self.woken.swap(false, Ordering::AcqRel)
    }

    /// Remembers the task that drives the run.
    pub(crate) fn driven_by(&self, waker: &Waker) {
        let mut task = lock(&self.task);
        match &mut *task {
            Some(known) => known.clone_from(waker),
            None => *task = Some(waker.clone()),
        }
    }

    /// Makes the driver look again, at the run and not at the future.
    pub(crate) fn nudge(&self) {
        let task = lock(&self.task).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl Wake for RootWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.nudge();
    }
}

thread_local! {
    /// Which run's future is being polled on this thread, and whether inside a step's own closure.
    static CONTEXT: Cell<Context> = const { Cell::new(Context { run: 0, inside: Inside::Function }) };
}

/// Where the calling code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    /// The run's serial number in this program; 0 outside any.
    pub(crate) run: u64,
    pub(crate) inside: Inside,
}

/// Which of a process's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inside {
    /// Its function itself, or no process at all.
    Function,
    /// The closure of a step.
    Step,
    /// The closure of a transaction: the database may be waiting for it.
    Transaction,
}

impl Context {
    pub(crate) fn current() -> Self {
        CONTEXT.get()
    }

    /// Until the guard is dropped, code on this thread runs here.
    pub(crate) fn enter(self) -> ContextGuard {
        ContextGuard(CONTEXT.replace(self))
    }
}

pub(crate) struct ContextGuard(Context);

impl Drop for ContextGuard {
    fn drop(&mut self) {
        CONTEXT.set(self.0);
    }
}
