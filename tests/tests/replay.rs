//! An execution that resumes is first in replay, then live: nothing happens before everything that was recorded has been
//! asked for, what has not been makes the process stuck, and a cancellation arrives where the process waits, so that the
//! same rollback runs whether it was in memory, parked, or its program had died.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::*;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);
const LONG: Duration = Duration::from_secs(3600);
const GO: Event<u32> = Event::new("Go");
const IT: Definition<(), u32> = Definition::new("it");
const CHILD: Definition<(), u32> = Definition::new("child");

on_each_backend!(
    a_renamed_step_does_not_charge_twice,
    a_step_that_failed_before_it_was_renamed,
    a_step_that_was_added_in_front,
    a_step_that_was_removed,
    a_function_that_ends_early,
    an_older_program_stops,
    the_same_rollback,
    the_same_rollback_behind_a_value_on_top,
    the_same_rollback_of_branches,
    the_same_rollback_behind_a_race,
    the_same_rollback_of_one_that_awaits_a_child,
    the_same_rollback_when_it_had_begun,
    a_rollback_of_a_failure_that_is_cancelled,
    a_renamed_step_of_a_compensation,
    whatever_loses_a_select_is_asked_for,
    what_came_first_comes_first,
    values_are_written_if_they_differ,
    a_value_that_only_the_end_sets,
    a_value_that_is_too_large,
    what_else_it_awaits_is_given_a_moment,
    it_is_told_whether_it_replays,
    a_future_that_is_held_while_others_are_polled,
    what_a_start_came_to_is_judged_once,
    many_at_once,
);

async fn charge(effects: &Effects, proc: &Process, name: &'static str) -> Result<(), StepError<Failure>> {
    proc.step(name, || async { Ok::<_, Failure>(effects.add("charge")) }).await
}

/// Runs one function until it waits, in a program that then ends; and another one in its place.
struct Deploy<B> {
    backend: B,
    effects: Effects,
    host: Option<Host>,
}

impl<B: Backend> Deploy<B> {
    async fn first<F, Fut>(function: F) -> Self
    where
        F: Fn(Effects, Process) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<u32, Failure>> + Send + 'static,
    {
        let mut deploy = Self { backend: B::new().await, effects: Effects::default(), host: None };
        deploy.then(function).await;
        let handle = deploy.host().spawn(IT, "it", &()).await.unwrap();
        until("it is parked", async || handle.status().await.unwrap().waiting_for.is_some()).await;
        deploy
    }

    async fn then<F, Fut>(&mut self, function: F) -> Handle<u32, Failure>
    where
        F: Fn(Effects, Process) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<u32, Failure>> + Send + 'static,
    {
        if let Some(host) = self.host.take() {
            host.shutdown(Duration::from_secs(1)).await;
        }
        let effects = self.effects.clone();
        let builder = quick(&self.backend).await.register(IT, move |proc, ()| function(effects.clone(), proc));
        self.host = Some(builder.start().await.unwrap());
        self.host().get("it").of(IT)
    }

    fn host(&self) -> &Host {
        self.host.as_ref().unwrap()
    }
}

/// Raises `GO`, and expects the process to become stuck with a reason that says all of this.
async fn diverges(handle: &Handle<u32, Failure>, expected: &[&str]) {
    handle.raise(GO, &1).await.unwrap();
    let reason = until_status(handle, Status::Stuck).await.reason.unwrap();
    for part in ["its code and its records have diverged", "Nothing has been begun"].iter().chain(expected) {
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
}

async fn a_renamed_step_does_not_charge_twice<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    })
    .await;
    let renamed = deploy.then(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge card").await?;
        Ok(proc.event(GO).await?)
    });
    diverges(&renamed.await, &["the step \"charge\" stands", "the step \"charge card\" at", ".was(\"old name\")"])
        .await;
    assert_eq!(deploy.effects.count("charge"), 1);
    let fixed = deploy.then(async |effects: Effects, proc: Process| {
        proc.step("charge card", || async { Ok::<_, Failure>(effects.add("charge")) }).was("charge").await?;
        Ok(proc.event(GO).await?)
    });
    let handle = fixed.await;
    handle.resume().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(deploy.effects.count("charge"), 1);
}

async fn attempts(effects: &Effects, proc: &Process, name: &'static str) -> Result<(), StepError<Failure>> {
    let attempt = || async {
        effects.add(name);
        Err::<(), _>(Failure::new("down"))
    };
    proc.step(name, attempt).retry(Retry::fixed(500 * MS)).await
}

/// A failed attempt may have had its effect, and has its own key.
async fn a_step_that_failed_before_it_was_renamed<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        attempts(&effects, &proc, "charge").await?;
        Ok(0)
    })
    .await;
    let renamed = deploy.then(async |effects: Effects, proc: Process| {
        attempts(&effects, &proc, "charge card").await?;
        Ok(0)
    });
    let handle = renamed.await;
    until_status(&handle, Status::Stuck).await;
    assert_eq!(deploy.effects.count("charge card"), 0);
}

/// It looks as if one had been renamed, and money decides.
async fn a_step_that_was_added_in_front<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    })
    .await;
    let added = deploy.then(async |effects: Effects, proc: Process| {
        proc.step("check", || async { Ok::<_, Failure>(effects.add("check")) }).await?;
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    });
    diverges(&added.await, &["the step \"charge\" stands", "the step \"check\" at"]).await;
    assert_eq!(deploy.effects.all(), ["charge"]);
    // Behind what was recorded it is welcome.
    let behind = deploy.then(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        proc.step("check", || async { Ok::<_, Failure>(effects.add("check")) }).await?;
        Ok(proc.event(GO).await?)
    });
    let handle = behind.await;
    handle.resume().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(deploy.effects.all(), ["charge", "check"]);
}

async fn a_step_that_was_removed<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    })
    .await;
    let handle = deploy.then(async |_: Effects, proc: Process| Ok(proc.event(GO).await?)).await;
    diverges(&handle, &["the step \"charge\" stands", "the event \"Go\" key \"#1\" at"]).await;
    handle.resume().await.unwrap();
    let again = until_status(&handle, Status::Stuck).await;
    assert!(again.reason.unwrap().contains("diverged"), "it stays so until somebody decides");
    handle.resume().forget("charge").await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
}

/// Its end is an effect, too.
async fn a_function_that_ends_early<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    })
    .await;
    let handle = deploy.then(async |_: Effects, _: Process| Ok(7)).await;
    diverges(&handle, &["the step \"charge\" stands", "next would be its end"]).await;
    let handle = deploy.then(async |_: Effects, _: Process| Err(Failure::new("no more"))).await;
    handle.resume().await.unwrap();
    until_status(&handle, Status::Stuck).await;
}

/// It would skip what a newer one has done, and complete.
async fn an_older_program_stops<B: Backend>() {
    let newer = async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        proc.step("check", || async { Ok::<_, Failure>(effects.add("check")) }).await?;
        Ok(proc.event(GO).await?)
    };
    let mut deploy = Deploy::<B>::first(newer).await;
    let older = deploy.then(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    });
    diverges(&older.await, &["the step \"check\" stands"]).await;
    let handle = deploy.then(newer).await;
    handle.resume().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(deploy.effects.all(), ["charge", "check"]);
}

/// Where a process is when it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    InMemory,
    Parked,
    /// By an instance that does not run it.
    ParkedElsewhere,
    /// Its program has died.
    Crashed,
    /// Its program dies while it compensates.
    Compensating,
}

const WAYS: [Way; 5] = [Way::InMemory, Way::Parked, Way::ParkedElsewhere, Way::Crashed, Way::Compensating];

/// Cancels a process that has noted that it waits, in each way, and expects the same effects.
async fn in_each_way<B, F, Fut>(function: F, expected: &[&str])
where
    B: Backend,
    F: Fn(Effects, Process) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<u32, Failure>> + Send + 'static,
{
    for way in WAYS {
        let (backend, effects) = (B::new().await, Effects::default());
        let start = async || {
            let (function, effects) = (function.clone(), effects.clone());
            let child = async |proc: Process, ()| Ok::<_, Failure>(proc.event(GO).await?);
            let quiet = if way == Way::InMemory { LONG } else { 30 * MS };
            let builder = quick(&backend).await.quiet_time(quiet).register(CHILD, child);
            let host = builder.register(IT, move |proc, ()| function(effects.clone(), proc)).start().await.unwrap();
            (host.get("it").of(IT), host)
        };
        let (handle, host) = start().await;
        host.spawn(IT, "it", &()).await.unwrap();
        until("it waits", async || effects.count("waits") > 0).await;
        let (handle, _host) = match way {
            Way::InMemory => {
                handle.cancel().await.unwrap();
                (handle, host)
            }
            Way::Parked => {
                until("it is parked", async || host.in_memory() == 0).await;
                handle.cancel().await.unwrap();
                (handle, host)
            }
            Way::ParkedElsewhere => {
                until("it is parked", async || host.in_memory() == 0).await;
                let other = quick(&backend).await.start().await.unwrap();
                other.get("it").cancel().await.unwrap();
                (handle, host)
            }
            Way::Crashed => {
                drop(host);
                let (handle, host) = start().await;
                handle.cancel().await.unwrap();
                (handle, host)
            }
            Way::Compensating => {
                effects.add("hang");
                handle.cancel().await.unwrap();
                until("it compensates", async || effects.count("hangs") > 0).await;
                drop(host);
                start().await
            }
        };
        assert_eq!(handle.output().await, Err(OutputError::WasCancelled), "{way:?}");
        let all = effects.all();
        let counted = |effect: &&String| !["waits", "hang", "hangs"].contains(&effect.as_str());
        let mut happened: Vec<&str> = all.iter().filter(counted).map(String::as_str).collect();
        happened.sort_unstable();
        assert_eq!(happened, expected, "{way:?}");
    }
}

async fn hold(effects: &Effects, proc: &Process, what: &'static str) -> Result<(), StepError<Failure>> {
    proc.step(("hold", what), || async { Ok::<_, Failure>(effects.add(format!("hold {what}"))) }).await
}

/// Gives back what is held. The first time, where a test asks for it, the last of it hangs.
async fn release(effects: &Effects, proc: &Process, what: &'static str) -> Result<(), StepError<Failure>> {
    let release = || async {
        if effects.count("hang") > effects.count("hangs") {
            effects.add("hangs");
            std::future::pending::<()>().await;
        }
        Ok::<_, Failure>(effects.add(format!("release {what}")))
    };
    proc.compensation().step(("hold", what), release).await
}

async fn the_same_rollback<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            hold(&effects, &proc, "a").await?;
            effects.add("waits");
            if let Err(cancelled) = proc.event(GO).await {
                release(&effects, &proc, "a").await?;
                return Err(cancelled.into());
            }
            Ok(1)
        },
        &["hold a", "release a"],
    )
    .await;
}

async fn the_same_rollback_behind_a_value_on_top<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            proc.set("progress", 1).await?;
            proc.set(("seen", 1), 1).await?;
            let _: u32 = proc.get("made", || 7).await?;
            hold(&effects, &proc, "a").await?;
            proc.set("progress", 2).await?;
            effects.add("waits");
            if let Err(cancelled) = proc.event(GO).await {
                proc.set("progress", 3).await?;
                proc.set("undone", true).await?;
                release(&effects, &proc, "a").await?;
                return Err(cancelled.into());
            }
            Ok(1)
        },
        &["hold a", "release a"],
    )
    .await;
}

async fn the_same_rollback_of_branches<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            let effects = &effects;
            let branch = async |what: &'static str, wait: bool| {
                hold(effects, &proc, what).await?;
                if wait {
                    effects.add("waits");
                    proc.event(GO).await?;
                } else {
                    proc.delay(("pause", what), LONG).await?;
                }
                Ok::<_, Failure>(())
            };
            let (a, b) = tokio::join!(branch("a", false), branch("b", true));
            let Err(cancelled) = a.and(b) else { return Ok(1) };
            // Both in one go.
            let (a, b) = tokio::join!(release(effects, &proc, "a"), release(effects, &proc, "b"));
            a.and(b)?;
            Err(cancelled)
        },
        &["hold a", "hold b", "release a", "release b"],
    )
    .await;
}

async fn the_same_rollback_behind_a_race<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            let quick = proc.step("quick", || async { Ok::<_, Failure>(()) });
            proc.race("first").on(proc.delay("slow", LONG), |_| ()).on(quick, |_| ()).await?;
            hold(&effects, &proc, "a").await?;
            effects.add("waits");
            let second = proc.race("second").on(proc.event(GO), |_| ()).on(proc.delay("late", LONG), |_| ());
            if let Err(cancelled) = second.await {
                release(&effects, &proc, "a").await?;
                return Err(cancelled.into());
            }
            Ok(1)
        },
        &["hold a", "release a"],
    )
    .await;
}

async fn the_same_rollback_of_one_that_awaits_a_child<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            let child = proc.spawn(CHILD, "child", &()).await?;
            hold(&effects, &proc, "a").await?;
            effects.add("waits");
            if let Err(cancelled) = child.output(&proc).await {
                release(&effects, &proc, "a").await?;
                return Err(cancelled.into());
            }
            Ok(1)
        },
        &["hold a", "release a"],
    )
    .await;
}

/// One step after the other, of which some are done when its program dies.
async fn the_same_rollback_when_it_had_begun<B: Backend>() {
    in_each_way::<B, _, _>(
        async |effects: Effects, proc: Process| {
            for what in ["a", "b", "c"] {
                hold(&effects, &proc, what).await?;
            }
            effects.add("waits");
            if let Err(cancelled) = proc.event(GO).await {
                let undo = proc.compensation();
                undo.step("first", || async { Ok::<_, Failure>(effects.add("first")) }).await?;
                for what in ["c", "b", "a"] {
                    release(&effects, &proc, what).await?;
                }
                return Err(cancelled.into());
            }
            Ok(1)
        },
        &["first", "hold a", "hold b", "hold c", "release a", "release b", "release c"],
    )
    .await;
}

/// The compensation of a failure is out of reach of a cancellation, after a resume as well.
async fn a_rollback_of_a_failure_that_is_cancelled<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let function = |effects: Effects| {
        move |proc: Process, ()| {
            let effects = effects.clone();
            async move {
                hold(&effects, &proc, "a").await?;
                let failed = proc.step("ship", || async { Err::<(), _>(Failure::new("no")) }).await;
                let undo = proc.compensation();
                undo.step("tell", || async { Ok::<_, Failure>(effects.add("tell")) }).await?;
                effects.add("waits");
                undo.event(GO).await?;
                release(&effects, &proc, "a").await?;
                failed?;
                Ok::<u32, Failure>(1)
            }
        }
    };
    let host = quick(&backend).await.register(IT, function(effects.clone())).start().await.unwrap();
    host.spawn(IT, "it", &()).await.unwrap();
    until("it waits", async || effects.count("waits") > 0).await;
    drop(host);
    let host = quick(&backend).await.register(IT, function(effects.clone())).start().await.unwrap();
    let handle = host.get("it").of(IT);
    handle.cancel().await.unwrap();
    until("it waits again", async || effects.count("waits") > 1).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap_err(), OutputError::Failed(Failure::new("no")));
    assert_eq!(effects.count("tell"), 1);
    assert_eq!(effects.count("release a"), 1);
}

/// The records of a compensation are judged once the cancellation has arrived.
async fn a_renamed_step_of_a_compensation<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let function = |effects: Effects, name: &'static str| {
        move |proc: Process, ()| {
            let effects = effects.clone();
            async move {
                hold(&effects, &proc, "a").await?;
                effects.add("waits");
                let Err(cancelled) = proc.event(GO).await else { return Ok(1) };
                let undo = proc.compensation();
                undo.step(name, || async { Ok::<_, Failure>(effects.add("refund")) }).await?;
                undo.event(GO).await?;
                Err::<u32, Failure>(cancelled.into())
            }
        }
    };
    let host = quick(&backend).await.register(IT, function(effects.clone(), "refund")).start().await.unwrap();
    host.spawn(IT, "it", &()).await.unwrap();
    until("it waits", async || effects.count("waits") > 0).await;
    host.get("it").cancel().await.unwrap();
    until("it is refunded", async || effects.count("refund") > 0).await;
    until("it is parked", async || host.in_memory() == 0).await;
    host.shutdown(Duration::from_secs(1)).await;
    let host = quick(&backend).await.register(IT, function(effects.clone(), "pay back")).start().await.unwrap();
    host.get("it").raise(GO, &1).await.unwrap();
    let reason = until_status(&host.get("it"), Status::Stuck).await.reason.unwrap();
    assert!(reason.contains("the step \"refund\" (compensation) stands"), "{reason}");
    assert_eq!(effects.count("refund"), 1);
}

/// A branch of several steps against a timer, over and over, with programs that die: whoever lost is asked for again, and
/// whoever won wins again.
async fn whatever_loses_a_select_is_asked_for<B: Backend>() {
    let (backend, effects) = (B::new().await, Effects::default());
    let function = |effects: Effects| {
        move |proc: Process, ()| {
            let effects = effects.clone();
            async move {
                let (mut won, proc) = (0, &proc);
                for n in 0..12_u32 {
                    let branch = async {
                        for m in 0..3_u32 {
                            proc.step(("step", format!("{n}.{m}")), || async {
                                tokio::time::sleep(MS * (n * 7 % 5 + m)).await;
                                Ok::<_, Failure>(())
                            })
                            .await?;
                        }
                        Ok::<_, Failure>(())
                    };
                    // In no order of its own.
                    let first = tokio::select! {
                        done = branch => done.map(|()| true),
                        late = proc.delay(("late", n), MS * (n * 5 % 9)).into_future() => {
                            late.map(|_| false).map_err(Failure::from)
                        }
                    };
                    won += u32::from(first?);
                    let name = format!("won {n}");
                    let noted = proc.step(("won", n), || async { Ok::<_, Failure>(won) }).await?;
                    assert_eq!(noted, won, "{name}");
                    effects.add(name);
                    proc.event(GO).await?;
                }
                Ok::<_, Failure>(won)
            }
        }
    };
    for life in 0..12 {
        let host = quick(&backend).await.register(IT, function(effects.clone())).start().await.unwrap();
        let handle = host.spawn(IT, "it", &()).await.unwrap();
        until("it goes on", async || {
            let stuck = handle.status().await.unwrap().reason;
            assert_eq!(stuck, None, "in life {life}");
            effects.count(&format!("won {life}")) > 0
        })
        .await;
        handle.raise(GO, &life).await.unwrap();
        if life == 11 {
            handle.output().await.unwrap();
        }
    }
}

/// The results of steps that ran at the same time come in the order in which they came before.
async fn what_came_first_comes_first<B: Backend>() {
    const ORDER: Definition<(), Vec<u64>> = Definition::new("order");
    let backend = B::new().await;
    let seen = Arc::new(std::sync::Mutex::new(Vec::<Vec<u64>>::new()));
    let function = |seen: Arc<std::sync::Mutex<Vec<Vec<u64>>>>| {
        move |proc: Process, ()| {
            let seen = seen.clone();
            async move {
                let proc = &proc;
                let step = |n: u64| {
                    proc.step(("step", n), move || async move {
                        tokio::time::sleep(Duration::from_micros(n * 379 % 1000)).await;
                        Ok::<_, Failure>(n)
                    })
                    .into_future()
                };
                let mut steps: FuturesUnordered<_> = (0..40).map(step).collect();
                let mut order = Vec::new();
                while let Some(n) = steps.next().await {
                    order.push(n?);
                }
                seen.lock().unwrap().push(order.clone());
                proc.event(GO).await?;
                Ok::<_, Failure>(order)
            }
        }
    };
    let lives = 3;
    for life in 1..=lives {
        let host = quick(&backend).await.register(ORDER, function(seen.clone())).start().await.unwrap();
        let handle = host.spawn(ORDER, "o", &()).await.unwrap();
        until("it waits", async || seen.lock().unwrap().len() >= life).await;
        if life == lives {
            handle.raise(GO, &1).await.unwrap();
            handle.output().await.unwrap();
        }
    }
    let seen = seen.lock().unwrap();
    assert!(seen.iter().all(|order| *order == seen[0]), "{seen:#?}");
}

async fn values_are_written_if_they_differ<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        proc.set("progress", "first").await?;
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    })
    .await;
    assert_eq!(deploy.host().get("it").value::<String>("progress").await.unwrap().unwrap(), "first");
    let handle = deploy.then(async |effects: Effects, proc: Process| {
        proc.set("progress", "second").await?;
        proc.set("more", "third").await?;
        assert_eq!(proc.get("progress", String::new).await?, "second");
        charge(&effects, &proc, "charge").await?;
        let made: String = proc.get("made", || "fourth".into()).await?;
        assert_eq!(proc.get("made", String::new).await?, made);
        // They stand in the database before it goes on.
        let host = proc.host();
        let look = || async {
            let mut stand = Vec::new();
            for name in ["progress", "more", "made"] {
                stand.push(host.get("it").value::<String>(name).await.unwrap());
            }
            Ok::<_, Failure>(stand)
        };
        let stand = proc.step("look", look).await?;
        assert_eq!(stand, ["second", "third", "fourth"].map(|value| Some(value.to_owned())));
        Ok(proc.event(GO).await?)
    });
    let handle = handle.await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(deploy.effects.all(), ["charge"]);
}

/// Nothing is left to wait for.
async fn a_value_that_only_the_end_sets<B: Backend>() {
    let mut deploy = Deploy::<B>::first(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        let n = proc.event(GO).timeout(200 * MS).await?;
        proc.delay("pause", LONG).await?;
        Ok(n.unwrap_or(0))
    })
    .await;
    let handle = deploy.host().get("it").of(IT);
    until("it waits for the timer", async || {
        handle.status().await.unwrap().waiting_for.is_some_and(|what| what.contains("pause"))
    })
    .await;
    let handle = deploy.then(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        let n = proc.event(GO).timeout(LONG).await?;
        proc.set("progress", "done").await?;
        // A pending record of a timer is asked for by nobody: it would be, too.
        let _ = futures_util::poll!(proc.delay("pause", LONG).into_future());
        Ok(n.unwrap_or(7))
    });
    let handle = handle.await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 7);
    assert_eq!(handle.value::<String>("progress").await.unwrap().as_deref(), Some("done"));
}

/// Set in a replay, it is refused as it would be in live.
async fn a_value_that_is_too_large<B: Backend>() {
    let function = async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        Ok(proc.event(GO).await?)
    };
    let mut deploy = Deploy::<B>::first(function).await;
    let larger = deploy.then(async |effects: Effects, proc: Process| {
        charge(&effects, &proc, "charge").await?;
        proc.set("large", "x".repeat(2 << 20)).await?;
        Ok(proc.event(GO).await?)
    });
    let handle = larger.await;
    handle.raise(GO, &1).await.unwrap();
    let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains("the value \"large\": ") && reason.contains("at most 1048576"), "{reason}");
    let handle = deploy.then(function).await;
    handle.resume().await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
}

/// What it awaits besides may lead to what was recorded.
async fn what_else_it_awaits_is_given_a_moment<B: Backend>() {
    let slow = |pause: Duration| {
        move |effects: Effects, proc: Process| async move {
            let beside = async {
                tokio::time::sleep(pause).await;
                charge(&effects, &proc, "charge").await
            };
            let (charged, n) = tokio::join!(beside, proc.event(GO).into_future());
            charged?;
            Ok(n?)
        }
    };
    let mut deploy = Deploy::<B>::first(slow(MS)).await;
    let handle = deploy.then(slow(400 * MS)).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    let mut deploy = Deploy::<B>::first(slow(MS)).await;
    let handle = deploy.then(slow(LONG)).await;
    diverges(&handle, &["the step \"charge\" stands", "the event \"Go\""]).await;
}

async fn it_is_told_whether_it_replays<B: Backend>() {
    let function = async |effects: Effects, proc: Process| {
        let note = |what: &str| {
            if !proc.is_replaying() {
                effects.add(what);
            }
        };
        note("begun");
        charge(&effects, &proc, "charge").await?;
        note("charged");
        let n = proc.event(GO).await?;
        note("told");
        Ok(n)
    };
    let mut deploy = Deploy::<B>::first(function).await;
    let handle = deploy.then(function).await;
    handle.raise(GO, &1).await.unwrap();
    handle.output().await.unwrap();
    assert_eq!(deploy.effects.all(), ["begun", "charge", "charged", "told"]);
}

/// Its turn has come, and nobody polls it.
async fn a_future_that_is_held_while_others_are_polled<B: Backend>() {
    let function = async |effects: Effects, proc: Process| {
        let mut held = std::pin::pin!(proc.step("held", || async { Ok::<_, Failure>(2) }).into_future());
        let early = futures_util::poll!(held.as_mut());
        charge(&effects, &proc, "charge").await?;
        charge(&effects, &proc, "charge again").await?;
        let held = match early {
            std::task::Poll::Ready(held) => held?,
            std::task::Poll::Pending => held.await?,
        };
        Ok(held + proc.event(GO).await?)
    };
    let mut deploy = Deploy::<B>::first(function).await;
    let handle = deploy.then(function).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 3);
    assert_eq!(deploy.effects.count("charge"), 2);
}

/// A later version of the code, or the order of a set, would give the child another input; and an error stays one.
async fn what_a_start_came_to_is_judged_once<B: Backend>() {
    const OTHER: Definition<u32, u32> = Definition::new("other");
    let starts = |input: u32| {
        move |effects: Effects, proc: Process| async move {
            let mut came = Vec::new();
            came.push(proc.spawn(OTHER, "mine", &input).await.map(|child| child.run()));
            came.push(proc.spawn(OTHER, "there", &(input + 1)).await.map(|child| child.run()));
            came.push(proc.spawn(OTHER, "there too", &(input + 1)).existing_ok().await.map(|child| child.run()));
            effects.add(format!("{came:?}"));
            Ok(proc.event(GO).await?)
        }
    };
    let mut deploy = Deploy::<B> { backend: B::new().await, effects: Effects::default(), host: None };
    deploy.then(starts(1)).await;
    for id in ["there", "there too"] {
        deploy.host().spawn(OTHER, id, &7).await.unwrap();
    }
    let handle = deploy.host().spawn(IT, "it", &()).await.unwrap();
    until("it is parked", async || handle.status().await.unwrap().waiting_for.is_some()).await;
    let handle = deploy.then(starts(6)).await;
    handle.raise(GO, &1).await.unwrap();
    handle.output().await.unwrap();
    let all = deploy.effects.all();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0], all[1]);
    assert!(all[0].starts_with("[Ok(") && all[0].contains("Err(OtherInput { id: \"there\" }), Ok("), "{}", all[0]);
}

/// A thousand that were recorded at the same time.
async fn many_at_once<B: Backend>() {
    let function = async |effects: Effects, proc: Process| {
        let steps = (0..1000_u32).map(|n| {
            let effects = &effects;
            proc.step(("n", n), move || async move { Ok::<_, Failure>(effects.add("n")) })
        });
        for done in proc.all(steps).await {
            done?;
        }
        Ok(proc.event(GO).await?)
    };
    let mut deploy = Deploy::<B>::first(function).await;
    let handle = deploy.then(function).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 1);
    assert_eq!(deploy.effects.count("n"), 1000);
}
