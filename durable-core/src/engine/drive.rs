//! Drives one run: polls its future, notices when only the database can wake it, and ends it in each of the ways in
//! which a run can end.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

use super::operation::{Operation, Write};
use super::queue::{Answer, From};
use super::registry::Ended;
use super::replay::Next;
use super::run::{Cancel, End, Part, Run, State, WaitFor};
use super::wake::{Context, Inside};
use crate::storage::{Finish, Op, OpKind, Outcome, Park, RecordKey};

/// After this time a run that cannot park is looked at again: the database's clock may have jumped, and a waker that
/// somebody else held may be gone.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

type UserFuture = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// What the driver has to do next. Small, since every process in memory has room for it.
enum Turn {
    Returned(Box<Ended>),
    End(End),
    /// Nothing but the engine can wake the process, and it has been quiet for long enough.
    Quiet(Box<Park>),
}

/// Runs a process until it ends, parks, or is not ours any more. Not an `async fn`, whose arguments would have their room
/// twice: a task of every process in memory is made of this.
#[allow(clippy::manual_async_fn)]
pub(super) fn drive(run: Arc<Run>, input: Box<str>) -> impl Future<Output = ()> {
    async move {
        let span = tracing::info_span!("process", id = %run.id, kind = %run.kind, run = %run.run, claim = run.claim);
        let mut future = start(&run, &span, input);
        // Behind the future, on the heap only while something is waited for.
        let mut sleep: Option<Pin<Box<Sleep>>> = None;
        run.wake.nudge();
        let turn = loop {
            match poll_fn(|cx| turn(&run, &span, &mut future, &mut sleep, cx)).await {
                Turn::Quiet(park) => match Box::pin(park_quiet(&run, *park)).await {
                    Parked::Yes => break None,
                    Parked::No => {}
                },
                turn => break Some(turn),
            }
        };
        // On the heap, and so is the park: a process that waits need not carry the room for its end.
        Box::pin(leave(run, span, turn, future, sleep)).await;
    }
}

/// Ends the execution, however it came to its end.
async fn leave(
    run: Arc<Run>,
    span: tracing::Span,
    turn: Option<Turn>,
    future: Option<UserFuture>,
    sleep: Option<Pin<Box<Sleep>>>,
) {
    // Whatever happens next, no code of the process runs any more.
    let fault = drop_quietly(&run, future);
    drop(sleep);
    run.state().code_over = true;
    let end = match (turn, fault) {
        (None, _) => None,
        (Some(Turn::Returned(ended)), None) => finish(&run, *ended).await.err(),
        (Some(Turn::End(end @ End::Gone)), _) => Some(end),
        (_, Some(fault)) => Some(End::Stuck(fault)),
        (Some(Turn::End(end)), None) => Some(end),
        (Some(Turn::Quiet(_)), None) => None,
    };
    match end {
        None => {}
        Some(End::Gone) => tracing::info!(parent: &span, "the run is not ours any more; dropped"),
        Some(End::Stuck(reason)) => stuck(&run, reason).await,
        Some(End::Release) => give_back(&run).await,
        Some(End::Unreadable(reason)) => unreadable(&run, reason).await,
    }
    run.core.left_memory(&run);
    if run.state().read_again {
        run.core.compare_soon();
    }
}

fn start(run: &Arc<Run>, span: &tracing::Span, input: Box<str>) -> Option<UserFuture> {
    let Some(entry) = run.core.kinds.get(&*run.kind).cloned() else {
        run.fault(format_args!("the kind {:?} is not registered here", run.kind));
        return None;
    };
    let _context = Context { run: run.serial, inside: Inside::Function }.enter();
    let _span = span.enter();
    match catch_unwind(AssertUnwindSafe(|| entry.start(run.clone(), &input))) {
        Ok(Ok(future)) => {
            run.root.wake_by_ref();
            return Some(future);
        }
        Ok(Err(why)) => run.unreadable(format!("the input of process {:?} does not decode: {why}", run.id)),
        Err(panic) => run.fault(panic_message(&*panic)),
    }
    None
}

/// One look at the run.
fn turn(
    run: &Arc<Run>,
    span: &tracing::Span,
    future: &mut Option<UserFuture>,
    sleep: &mut Option<Pin<Box<Sleep>>>,
    cx: &mut TaskContext<'_>,
) -> Poll<Turn> {
    /// A function that wakes itself, or replays much, lets others go on in between.
    const POLLS: u32 = 32;
    run.wake.driven_by(cx.waker());
    let mut polls = 0;
    loop {
        let accept_cancel = {
            let mut state = run.state();
            if let Some(end) = state.end.take() {
                // The mark stays, so that no operation goes on while the future is dropped.
                state.end = Some(End::Gone);
                return Poll::Ready(Turn::End(end));
            }
            if state.stopping && state.steps == 0 && state.commits == 0 {
                state.end = Some(End::Gone);
                return Poll::Ready(Turn::End(End::Release));
            }
            let accept = state.cancel == Cancel::Requested && state.accepts_cancel();
            if accept {
                state.cancel = Cancel::Recording;
            }
            accept
        };
        if accept_cancel {
            record_cancel(run);
        }
        if run.wake.take_woken() {
            *sleep = None;
            let Some(user) = future.as_mut() else { continue };
            polls += 1;
            if polls > POLLS {
                run.root.wake_by_ref();
                return Poll::Pending;
            }
            {
                let mut state = run.state();
                state.polled = (state.mail.seen, state.cancel);
                state.rested = false;
                state.polling();
            }
            let polled = {
                let _context = Context { run: run.serial, inside: Inside::Function }.enter();
                let _span = span.enter();
                let mut user_cx = TaskContext::from_waker(&run.root);
                catch_unwind(AssertUnwindSafe(|| user.as_mut().poll(&mut user_cx)))
            };
            run.core.queue.announce();
            match polled {
                Ok(Poll::Ready(ended)) => {
                    let state = run.state();
                    // A fault that came up in the same poll goes before what the function made of it.
                    if state.end.is_none() {
                        return Poll::Ready(Turn::Returned(Box::new(ended)));
                    }
                }
                Ok(Poll::Pending) => {
                    let again = run.state().sent.polled();
                    if again {
                        run.notify();
                    }
                }
                Err(panic) => run.fault(panic_message(&*panic)),
            }
            continue;
        }
        let alone = run.only_we_can_wake();
        let next = run.state().next(alone);
        match next {
            Next::Rest => {}
            Next::Poll => {
                run.notify();
                continue;
            }
            Next::Wait(until) => {
                let waits = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
                std::task::ready!(waits.as_mut().poll(cx));
                *sleep = None;
                continue;
            }
            Next::AcceptCancel => {
                record_cancel(run);
                continue;
            }
            Next::Settle(values) => {
                settle(run, values);
                continue;
            }
            Next::Diverged(reason) => {
                run.unreadable(reason);
                continue;
            }
        }
        match rest(run, sleep, cx) {
            Poll::Ready(Some(park)) => return Poll::Ready(Turn::Quiet(Box::new(park))),
            Poll::Ready(None) => {}
            Poll::Pending => return Poll::Pending,
        }
    }
}

/// Nothing to poll: sleeps until the next due time or until it has been quiet for long enough. Ready without a park
/// means: look again.
fn rest(run: &Arc<Run>, sleep: &mut Option<Pin<Box<Sleep>>>, cx: &mut TaskContext<'_>) -> Poll<Option<Park>> {
    let core = &run.core;
    let quiet = run.only_we_can_wake();
    let (due, parks, park_now, rested) = {
        let state = run.state();
        let due = match state.cancel {
            // No due time lets an operation go on now: the answer will.
            Cancel::Recording => None,
            _ => state.next_due(),
        };
        if due.is_none() && state.commits > 0 {
            // The answer will wake it, and comes sooner than any timer.
            *sleep = None;
            return Poll::Pending;
        }
        let waits = !state.waits.is_empty() && !state.waits.iter().any(|w| matches!(w.what, WaitFor::Engine));
        // A signal that came since the last poll is on its way to the process; so is a cancellation.
        let up_to_date = state.polled.1 == state.cancel && matches!(state.cancel, Cancel::No | Cancel::Recorded);
        let parks = quiet && waits && up_to_date && state.steps == 0 && state.commits == 0;
        (due, parks, state.pressed, state.rested)
    };
    let armed = sleep.get_or_insert_with(|| {
        // Who woke it may still hold the waker for a moment, so whatever holds it now is looked at again soon, once.
        let soon = parks || !rested || run.has_foreign_to_ask();
        let quiet = Instant::now() + if soon { core.settings.quiet_time } else { LOOK_AGAIN };
        let due = due.map(|due| core.clock.instant(due));
        Box::pin(tokio::time::sleep_until(due.map_or(quiet, |due| due.min(quiet))))
    });
    if !park_now || !parks {
        std::task::ready!(armed.as_mut().poll(cx));
    }
    *sleep = None;
    run.state().rested = true;
    let now = core.clock.now();
    if due.is_some_and(|due| due <= now) {
        run.state().tell_due(now);
        run.notify();
        return Poll::Ready(None);
    }
    if !parks && run.has_foreign_to_ask() {
        run.ask_foreign();
        return Poll::Ready(None);
    }
    if !parks {
        let state = run.state();
        if state.steps == 0
            && state.commits == 0
            && !state.waits.is_empty()
            && core.said_kept_in_memory.insert(&run.kind)
        {
            tracing::info!(id = %run.id, kind = %run.kind, "kept in memory while it waits: something besides durable operations holds its waker (said once for each kind)");
        }
        return Poll::Ready(None);
    }
    if let Some(due) = due
        && !park_now
        && core.clock.instant(due) <= Instant::now() + Duration::from_millis(1)
    {
        return Poll::Ready(None);
    }
    let state = run.state();
    let seen = Some(state.polled.0);
    #[cfg(durable_mutations)]
    let seen = seen.filter(|_| !crate::mutation::is_broken(crate::mutation::Rule::ParkChecksSignals));
    let waits: Vec<String> = state.waits.iter().take(8).map(|wait| wait.what.to_string()).collect();
    Poll::Ready(Some(Park {
        run: run.run,
        claim: run.claim,
        wake_at: due,
        seen,
        waiting_for: Some(waits.join(", ").into()),
        deaths: 0,
    }))
}

fn record_cancel(run: &Arc<Run>) {
    let seq = run.state().next_seq();
    let answer = run.submit(Op::AcceptCancel { run: run.run, claim: run.claim, seq }, None);
    let run = run.clone();
    tokio::spawn(async move {
        match answer.await {
            Ok(Ok(Outcome::Recorded)) => {
                run.state().cancel = Cancel::Recorded;
                run.notify();
            }
            Ok(Ok(_)) => run.end(End::Gone),
            Ok(Err(refused)) => run.fault(format_args!("the cancellation cannot be recorded: {refused}")),
            Err(_) => {}
        }
    });
}

/// Writes what the function has set and got in its replay; then it is live.
fn settle(run: &Arc<Run>, values: Vec<(RecordKey, Box<str>)>) {
    let run = run.clone();
    tokio::spawn(async move {
        match write_values(&run, values).await {
            Ok(()) => {
                run.state().settled();
                run.notify();
            }
            Err(end) => run.end(end),
        }
    });
}

/// Writes values; or says how the execution ends instead.
async fn write_values(run: &Arc<Run>, values: Vec<(RecordKey, Box<str>)>) -> Result<(), End> {
    let sent: Vec<_> = values.into_iter().map(|(key, payload)| write_value(run, key, payload)).collect();
    for answer in sent {
        match answer.await {
            Ok(Ok(Outcome::Recorded)) => {}
            Ok(Err(refused)) => return Err(End::Stuck(format!("the database refuses a value: {refused}"))),
            Ok(Ok(_)) | Err(_) => return Err(End::Gone),
        }
    }
    Ok(())
}

fn write_value(run: &Arc<Run>, key: RecordKey, payload: Box<str>) -> oneshot::Receiver<Answer> {
    let part = Part { scope: key.scope, uncancellable: false };
    let operation = Operation::with_key(run, part, &key.name, &key.key, OpKind::Value, Location::caller());
    let (op, _) = operation.record_op(Write::done(payload));
    run.state().names.of(&op.key).recording += 1;
    run.submit(Op::Record(op), None)
}

enum Parked {
    Yes,
    No,
}

async fn park_quiet(run: &Arc<Run>, park: Park) -> Parked {
    let seen = park.seen;
    match run.submit(Op::Park(park), None).await {
        Ok(Ok(Outcome::Signalled(signals))) if seen.is_some_and(|seen| seen > signals) => {
            run.behind();
            Parked::No
        }
        Ok(Ok(Outcome::Signalled(signals))) => {
            if seen.is_some_and(|seen| seen < signals) && run.state().mail.seen < signals {
                run.core.post.fetch([run.run]);
            }
            run.state().pressed = false;
            Parked::No
        }
        Ok(Ok(_)) => {
            tracing::debug!(id = %run.id, run = %run.run, "parked");
            Parked::Yes
        }
        Ok(Err(refused)) => {
            run.fault(format_args!("the database refuses to park it: {refused}"));
            Parked::No
        }
        // The epoch is over: the driver sees it at its next look.
        Err(_) => {
            run.end(End::Gone);
            Parked::No
        }
    }
}

/// Writes how the process ended; or says how its execution ends instead.
async fn finish(run: &Arc<Run>, ended: Ended) -> Result<(), End> {
    let (diverged, values) = {
        let mut state = run.state();
        (state.diverged_at_end(), state.unwritten_values())
    };
    if let Some(reason) = diverged {
        return Err(End::Stuck(reason));
    }
    write_values(run, values).await?;
    match ended {
        Ended::Output { status, output, reason } => {
            if let Some(given) = output.as_ref().map(|o| o.len()).filter(|len| *len > run.core.settings.max_payload) {
                let allowed = run.core.settings.max_payload;
                let error = crate::limits::LimitError::Payload { what: "output", given, allowed };
                return Err(End::Stuck(error.to_string()));
            }
            tracing::info!(id = %run.id, kind = %run.kind, run = %run.run, "{status}");
            let op = Finish { run: run.run, claim: run.claim, status, output, reason };
            match run.submit(Op::Finish(op), None).await {
                Ok(Err(refused)) => Err(End::Stuck(format!("the database refuses its output: {refused}"))),
                Ok(Ok(Outcome::Lost)) | Err(_) => Err(End::Gone),
                Ok(Ok(_)) => Ok(()),
            }
        }
        Ended::Unencodable(why) => Err(End::Stuck(format!("its output cannot be recorded: {why}"))),
    }
}

async fn stuck(run: &Arc<Run>, reason: String) {
    tracing::error!(id = %run.id, kind = %run.kind, run = %run.run, "stuck: {reason}");
    run.core.mark_stuck(run.run, run.claim, || From::Run(run.clone()), &reason).await;
}

async fn give_back(run: &Arc<Run>) {
    let wake_at = Some(run.core.clock.now());
    let op = Park { run: run.run, claim: run.claim, wake_at, seen: None, waiting_for: None, deaths: 0 };
    let _ = run.submit(Op::Park(op), None).await;
}

/// Parks it for a moment, in which another instance may look at it. Nothing of it has happened here but its replay.
async fn unreadable(run: &Arc<Run>, reason: String) {
    const SHOWN: usize = 200;
    let core = &run.core;
    if core.foreign.is_alone_with(&run.kind)
        && let Ok(peers) = core.storage.peers(&core.namespace, run.instance).await
    {
        // Others may have come since the last look.
        core.foreign.looked(&peers);
    }
    let claim = |state: &State| state.names.iter().filter_map(|(_, name)| Some(name.record.as_ref()?.claim)).max();
    let newest = claim(&run.state()).unwrap_or(0);
    let Some(pause) = core.foreign.leave(&run.kind, run.run, newest, core.settings.unreadable_patience) else {
        return stuck(run, reason).await;
    };
    tracing::warn!(id = %run.id, kind = %run.kind, run = %run.run, "left to an instance that can read it: {reason}");
    let shown: String = reason.chars().filter(|c| c.is_ascii() && !c.is_control()).take(SHOWN).collect();
    let mut seen = run.state().mail.seen;
    loop {
        let park = Park {
            run: run.run,
            claim: run.claim,
            wake_at: Some(run.core.clock.now() + pause),
            seen: Some(seen),
            waiting_for: Some(format!("an instance that can read it: {shown}").into()),
            deaths: 0,
        };
        match run.submit(Op::Park(park), None).await {
            Ok(Ok(Outcome::Signalled(signals))) => seen = signals,
            _ => return,
        }
    }
}

/// Drops the process's future within its context; it may run code, which may panic.
fn drop_quietly(run: &Arc<Run>, future: Option<UserFuture>) -> Option<String> {
    {
        let mut state = run.state();
        if state.end.is_none() {
            state.end = Some(End::Gone);
        }
    }
    let dropped = {
        let _context = Context { run: run.serial, inside: Inside::Function }.enter();
        catch_unwind(AssertUnwindSafe(|| drop(future)))
    };
    run.core.queue.announce();
    dropped.err().map(|panic| panic_message(&*panic))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&'static str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no message)".into());
    format!("its code panicked: {message}")
}
