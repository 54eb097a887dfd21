//! Nothing stands still: not for what the database refuses or has lost, not for code that never gives way, not for a
//! neighbour.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::memory::Memory;
use durable_core::storage::{Op, OpKind, RecordState, RunId, Status, StorageError};
use durable_core::*;
use durable_tests::faulty::{Fault, Faulty};
use durable_tests::*;
use std::collections::BTreeSet;
use std::future::{IntoFuture, poll_fn};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

const IT: Definition<(), u32> = Definition::new("it");
const GO: Event<u32> = Event::new("Go");
const PAUSE: Duration = Duration::from_millis(10);

on_each_backend!(
    a_record_that_is_refused_after_its_operation_was_dropped,
    a_reason_that_the_database_does_not_take,
    one_that_cannot_be_read,
    one_whose_messages_cannot_be_read,
);

on_each_database!(a_database_that_has_lost_messages);

/// Nobody awaits it; its next use would, for ever.
async fn a_record_that_is_refused_after_its_operation_was_dropped<B: Backend>() {
    let backend = B::new().await;
    let is_step = |op: &Op| matches!(op, Op::Record(r) if r.op == OpKind::Step && r.state == RecordState::Done);
    let storage = Faulty::once(backend.storage().await, Fault::Refused, is_step);
    let function = async |proc: Process, ()| {
        let mut dropped = Box::pin(proc.step("charge", || async { Ok::<_, Failure>(1) }).into_future());
        // Its record is on its way, and it is not awaited.
        poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx).is_ready())).await;
        drop(dropped);
        Ok::<_, Failure>(proc.step("charge", || async { Ok::<_, Failure>(2) }).await?)
    };
    let host = Host::builder(storage).quiet_time(PAUSE).register(IT, function).start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains("the database refuses the record of step \"charge\""), "{reason}");
    handle.resume().await.unwrap();
    handle.output().await.unwrap();
}

/// It is marked all the same, or it would run again and again.
async fn a_reason_that_the_database_does_not_take<B: Backend>() {
    let backend = B::new().await;
    let foreign = |op: &Op| match op {
        Op::Finish(finish) => finish.reason.as_ref().is_some_and(|reason| !reason.is_ascii()),
        _ => false,
    };
    let storage =
        Faulty::new(backend.storage().await, move |batch| batch.ops.iter().any(foreign).then_some(Fault::Refused));
    let effects = Effects::default();
    let counted = effects.clone();
    let function = move |proc: Process, ()| {
        let effects = counted.clone();
        async move {
            effects.add("run");
            assert!(proc.is_replaying(), "out of cheese → →");
            Ok::<_, Failure>(0)
        }
    };
    let builder = Host::builder(storage).reconcile_every(50 * PAUSE).register(IT, function);
    let host = builder.start().await.unwrap();
    let handle = host.spawn(IT, "it", &()).await.unwrap();
    let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
    assert!(reason.contains(r"out of cheese \u{2192} \u{2192}"), "{reason}");
    assert_eq!(effects.all().len(), 1);
}

const MANY: usize = 20;

async fn waits(proc: Process, (): ()) -> Result<u32, Failure> {
    proc.step("begin", async || Ok::<_, Failure>(())).await?;
    Ok(proc.event(GO).await?)
}

/// What reading one run comes to, while it cannot be read; and whether that is its own fault.
fn errors() -> [(fn() -> StorageError, bool); 3] {
    [
        (|| StorageError::unavailable("an answer that no connection brings"), false),
        (|| StorageError::blocked("a statement's time-out"), true),
        (|| StorageError::schema("a damaged page"), true),
    ]
}

/// Those that are taken up with it go on; it is stuck, and goes on when it has been mended.
async fn one_that_cannot_be_read<B: Backend>() {
    for (error, its_own) in errors() {
        let backend = B::new().await;
        let client = quick(&backend).await.start().await.unwrap();
        let mut handles = Vec::new();
        for n in 0..MANY {
            handles.push(client.spawn(IT, format!("p-{n}"), &()).await.unwrap());
        }
        let (broken, bad) = (Arc::new(AtomicBool::new(true)), handles[MANY / 3].run().unwrap());
        let set = broken.clone();
        let storage = Faulty::reading(backend.storage().await, move |runs| {
            (set.load(Ordering::SeqCst) && runs.contains(&bad)).then(error)
        });
        let _host = Host::builder(storage).register(IT, waits).start().await.unwrap();
        for handle in &handles {
            handle.raise(GO, &1).await.unwrap();
            if handle.run() == Some(bad) && !its_own {
                // It is tried again and again, alone.
            } else if handle.run() == Some(bad) {
                let reason = until_status(handle, Status::Stuck).await.reason.unwrap();
                assert!(reason.contains("what is stored cannot be read"), "{reason}");
            } else {
                assert_eq!(handle.output().await.unwrap(), 1);
            }
        }
        broken.store(false, Ordering::SeqCst);
        if its_own {
            handles[MANY / 3].resume().await.unwrap();
        }
        assert_eq!(handles[MANY / 3].output().await.unwrap(), 1);
    }
}

/// Messages from elsewhere, for many in memory.
async fn one_whose_messages_cannot_be_read<B: Backend>() {
    for (error, its_own) in errors() {
        let backend = B::new().await;
        let bad = Arc::new(std::sync::Mutex::new(None));
        let read = bad.clone();
        let storage = Faulty::reading(backend.storage().await, move |runs| {
            read.lock().unwrap().is_some_and(|bad| runs.contains(&bad)).then(error)
        });
        let builder = Host::builder(storage).poll(PAUSE).quiet_time(Duration::from_secs(3600)).register(IT, waits);
        let host = builder.start().await.unwrap();
        let client = quick(&backend).await.start().await.unwrap();
        let mut handles = Vec::new();
        for n in 0..MANY {
            handles.push(host.spawn(IT, format!("p-{n}"), &()).await.unwrap());
        }
        *bad.lock().unwrap() = handles[MANY / 3].run();
        for handle in &handles {
            client.get(handle.id()).raise(GO, &1).await.unwrap();
        }
        for handle in &handles {
            if handle.run() == handles[MANY / 3].run() && !its_own {
                *bad.lock().unwrap() = None;
                assert_eq!(handle.output().await.unwrap(), 1);
            } else if handle.run() == handles[MANY / 3].run() {
                let reason = until_status(handle, Status::Stuck).await.reason.unwrap();
                assert!(reason.contains("its messages cannot be read"), "{reason}");
            } else {
                assert_eq!(handle.output().await.unwrap(), 1);
            }
        }
    }
}

/// What met the damage, and what of it was tried apart, which would run or write what stands beside the damage.
#[derive(Default)]
struct Damage {
    whole: AtomicBool,
    tries: AtomicUsize,
    met: Mutex<BTreeSet<RunId>>,
    apart: Mutex<Vec<RunId>>,
}

impl Damage {
    /// So often a part is tried together before it is split, where the fault may be in one of it.
    const OFTEN: usize = 8;

    fn meets(&self, runs: &[RunId], bad: RunId) -> bool {
        let mut met = self.met.lock().unwrap();
        if self.whole.load(Ordering::SeqCst) {
            false
        } else if runs.contains(&bad) {
            self.tries.fetch_add(1, Ordering::SeqCst);
            met.extend(runs);
            true
        } else {
            self.apart.lock().unwrap().extend(runs.iter().filter(|run| met.contains(run)));
            false
        }
    }

    async fn is_met_often(&self) {
        until("it was met often", async || self.tries.load(Ordering::SeqCst) > Self::OFTEN).await;
        assert!(self.met.lock().unwrap().len() > 1);
        assert_eq!(*self.apart.lock().unwrap(), []);
        self.whole.store(true, Ordering::SeqCst);
    }
}

/// Processes that no instance runs yet, for one that claims them together.
async fn started(memory: &Memory) -> (Host, Vec<Handle<u32, Failure>>) {
    let client = Host::builder(memory.clone()).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..MANY {
        handles.push(client.spawn(IT, format!("p-{n}"), &()).await.unwrap());
    }
    (client, handles)
}

/// What is read beside the damage may be what is left of more: a record that is missing is a step that runs again.
#[test]
fn a_damaged_database_is_not_read_in_parts() {
    run(async {
        let memory = Memory::new();
        let (_client, handles) = started(&memory).await;
        let (damage, bad) = (Arc::new(Damage::default()), handles[MANY / 3].run().unwrap());
        let met = damage.clone();
        let storage = Faulty::reading(memory, move |runs| {
            met.meets(runs, bad).then(|| StorageError::damaged("the file is damaged"))
        });
        let _host = Host::builder(storage).register(IT, waits).start().await.unwrap();
        damage.is_met_often().await;
        for handle in &handles {
            handle.raise(GO, &1).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), 1);
        }
    });
}

/// What is written beside the damage may destroy what was still whole.
#[test]
fn a_damaged_database_is_not_written_in_parts() {
    run(async {
        let memory = Memory::new();
        let (_client, handles) = started(&memory).await;
        let damage = Arc::new(Damage::default());
        let (met, mut bad) = (damage.clone(), None);
        let ran = Arc::new(AtomicUsize::new(0));
        let all = ran.clone();
        let storage = Faulty::new(memory, move |batch| {
            let finishes = |op: &Op| if let Op::Finish(finish) = op { Some(finish.run) } else { None };
            let runs: Vec<RunId> = batch.ops.iter().filter_map(finishes).collect();
            // Behind the first that ends, all others come together.
            if !runs.is_empty() && all.load(Ordering::SeqCst) < MANY {
                return Some(Fault::Before);
            }
            bad = bad.or_else(|| (runs.len() > 1).then(|| runs[0]));
            met.meets(&runs, bad?).then_some(Fault::Damaged)
        });
        let it = move |_: Process, ()| {
            ran.fetch_add(1, Ordering::SeqCst);
            async { Failure::ok(1) }
        };
        let _host = Host::builder(storage).register(IT, it).start().await.unwrap();
        damage.is_met_often().await;
        for handle in handles {
            assert_eq!(handle.output().await.unwrap(), 1);
        }
    });
}

/// A standby that was behind, a restored backup: it knows less than the processes in memory.
async fn a_database_that_has_lost_messages<B: Sql>() {
    let backend = B::new().await;
    let function = async |proc: Process, ()| {
        let mut sum = 0;
        for _ in 0..3 {
            sum += proc.event(GO).await?;
        }
        Ok::<_, Failure>(sum)
    };
    // From its own instance, and from another one.
    for own in [true, false] {
        let id = format!("it {own}");
        let builder = quick(&backend).await.quiet_time(Duration::from_secs(3600)).register(IT, function);
        let host = builder.start().await.unwrap();
        let other = quick(&backend).await.start().await.unwrap();
        let handle = host.spawn(IT, &*id, &()).await.unwrap();
        for n in [1, 10] {
            handle.raise(GO, &n).await.unwrap();
        }
        let (steps, processes) = (B::STEPS, B::PROCESSES);
        let run = format!("run IN (SELECT run FROM {processes} WHERE id = '{id}')");
        let taken = format!("SELECT count(*) FROM {steps} WHERE {run} AND state = 'done'");
        until("it has taken two", async || backend.number(&taken).await == 2).await;
        let events = processes.replace("processes", "events");
        backend.execute(&format!("DELETE FROM {events} WHERE {run}")).await;
        backend.execute(&format!("UPDATE {processes} SET signals = 0 WHERE id = '{id}'")).await;
        let sender = if own { handle.clone() } else { other.get(&*id).of(IT) };
        sender.raise(GO, &100).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 111, "{own}");
    }
}

/// As futures of other libraries do; the runtime has one thread.
#[test]
fn a_future_that_wakes_itself() {
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let done = Arc::new(AtomicBool::new(false));
            let seen = done.clone();
            let function = move |_: Process, ()| {
                let done = seen.clone();
                async move {
                    poll_fn(|cx| {
                        if done.load(Ordering::SeqCst) {
                            return Poll::Ready(());
                        }
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    })
                    .await;
                    Ok::<_, Failure>(1)
                }
            };
            let host = Host::builder(Memory::new()).register(IT, function).start().await.unwrap();
            let handle = host.spawn(IT, "it", &()).await.unwrap();
            tokio::time::sleep(PAUSE).await;
            done.store(true, Ordering::SeqCst);
            assert_eq!(handle.output().await.unwrap(), 1);
        });
        ended.send(()).unwrap();
    });
    end.recv_timeout(Duration::from_secs(30)).expect("the runtime is dead");
}
