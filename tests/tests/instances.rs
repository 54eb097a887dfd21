//! Several instances on one database: each process has one owner, whoever dies is taken over, whoever only seemed dead
//! writes no more.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::{
    Batch, Claimed, Fence, Finish, InstanceId, NewInstance, Op, Outcome, Park, Storage, StorageError,
};
use durable_core::*;
use durable_tests::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const GO: Event<u32> = Event::new("Go");
const WORK: Definition<u32, u32> = Definition::new("work");

fn working(builder: HostBuilder, effects: &Effects) -> HostBuilder {
    let effects = effects.clone();
    builder.register(WORK, move |proc: Process, input| {
        let effects = effects.clone();
        async move {
            for n in 0..3 {
                proc.step(("step", n), || async { Ok::<_, Failure>(effects.add(format!("{} {n}", proc.id()))) })
                    .await?;
            }
            Ok::<_, Failure>(proc.event(GO).await? + input)
        }
    })
}

on_each_backend!(
    work_is_shared,
    a_dropped_host_is_taken_over_at_once,
    a_shutdown_hands_over,
    a_shutdown_lets_steps_end,
    a_shutdown_does_not_wait_for_ever,
    an_instance_that_was_fenced_goes_on_as_a_new_one,
    a_zombie_writes_nothing,
    what_nobody_holds_is_taken_up,
    what_is_not_owned_is_dropped,
    there_is_no_more_in_memory_than_allowed,
    a_message_races_with_parking,
    two_race_for_each_process,
    shutdowns_that_come_at_any_moment,
    fences_that_come_at_any_moment,
);

const SECOND: Definition<u32, u32> = Definition::new("second");

async fn quick_work(proc: Process, input: u32) -> Result<u32, Failure> {
    Ok(proc.step("a", || async { Ok::<_, Failure>(input) }).await?)
}

/// While two kinds are due and claims are on their way.
async fn shutdowns_that_come_at_any_moment<B: Backend>() {
    const MANY: u32 = 40;
    let backend = B::new().await;
    let client = quick(&backend).await.start().await.unwrap();
    for n in 0..MANY {
        client.spawn(WORK, format!("w-{n}"), &n).await.unwrap();
        client.spawn(SECOND, format!("s-{n}"), &n).await.unwrap();
    }
    for round in 0..25 {
        let builder = quick(&backend).await.max_processes(3).register(WORK, quick_work).register(SECOND, quick_work);
        let host = builder.start().await.unwrap();
        tokio::time::sleep(Duration::from_micros(round * 300)).await;
        host.shutdown(Duration::from_secs(5)).await;
    }
    let _host = quick(&backend).await.register(WORK, quick_work).register(SECOND, quick_work).start().await.unwrap();
    for n in 0..MANY {
        assert_eq!(client.get(format!("w-{n}")).of(WORK).output().await.unwrap(), n);
        assert_eq!(client.get(format!("s-{n}")).of(SECOND).output().await.unwrap(), n);
    }
}

/// Wrong suspicions again and again, while everything is under way: the host goes on as a new instance each time.
async fn fences_that_come_at_any_moment<B: Backend>() {
    const MANY: u32 = 200;
    let backend = B::new().await;
    let storage = backend.storage().await;
    let builder = quick(&backend).await.max_crashes(1000).register(WORK, quick_work).register(SECOND, quick_work);
    let host = builder.start().await.unwrap();
    let spawning = {
        let host = host.clone();
        tokio::spawn(async move {
            for n in 0..MANY {
                host.spawn(WORK, format!("w-{n}"), &n).await.unwrap();
                host.spawn(SECOND, format!("s-{n}"), &n).await.unwrap();
            }
        })
    };
    let mut fenced = 0;
    while fenced < 8 && !spawning.is_finished() {
        for peer in instances(&storage).await {
            if !peer.fenced && storage.fence(&peer).await.unwrap() {
                fenced += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    spawning.await.unwrap();
    assert!(fenced > 0);
    for n in 0..MANY {
        assert_eq!(host.get(format!("w-{n}")).of(WORK).output().await.unwrap(), n);
        assert_eq!(host.get(format!("s-{n}")).of(SECOND).output().await.unwrap(), n);
    }
    host.shutdown(Duration::from_secs(5)).await;
}

async fn work_is_shared<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let client = quick(&backend).await.start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..60 {
        handles.push(client.spawn(WORK, format!("w-{n}"), &n).await.unwrap());
    }
    let mut hosts = Vec::new();
    for _ in 0..3 {
        hosts.push(working(quick(&backend).await, &effects).max_processes(25).start().await.unwrap());
    }
    for handle in &handles {
        handle.raise(GO, &1000).await.unwrap();
    }
    for (n, handle) in (0..).zip(&handles) {
        assert_eq!(handle.output().await.unwrap(), 1000 + n);
    }
    let all = effects.all();
    let different: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!((all.len(), different.len()), (180, 180), "each step once");
}

async fn a_dropped_host_is_taken_over_at_once<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    // A heartbeat that takes long to expire: it is the lock that tells.
    let slow = |builder: HostBuilder| builder.heartbeat(Duration::from_millis(300), Duration::from_secs(60));
    let host =
        slow(working(quick(&backend).await, &effects)).quiet_time(Duration::from_secs(60)).start().await.unwrap();
    for n in 0..10 {
        host.spawn(WORK, format!("w-{n}"), &n).await.unwrap();
    }
    until("all wait", async || effects.all().len() == 30).await;
    let other = slow(working(quick(&backend).await, &effects)).start().await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(host.in_memory(), 10, "a living one is left alone");
    drop(host);
    let since = Instant::now();
    until("all are taken over", async || {
        let mut taken = 0;
        for n in 0..10 {
            taken += usize::from(other.get(format!("w-{n}")).status().await.unwrap().execution == 2);
        }
        taken == 10
    })
    .await;
    assert!(since.elapsed() < Duration::from_secs(20));
    for n in 0..10 {
        let handle = other.get(format!("w-{n}")).of(WORK);
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), n + 1);
    }
    assert_eq!(effects.all().len(), 30, "no recorded step ran again");
}

async fn a_shutdown_hands_over<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let host = working(quick(&backend).await, &effects).quiet_time(Duration::from_secs(60)).start().await.unwrap();
    let handle = host.spawn(WORK, "w", &1).await.unwrap();
    until("it waits", async || effects.all().len() == 3).await;
    host.shutdown(Duration::from_secs(10)).await;
    assert_eq!(host.in_memory(), 0);
    let error = handle.status().await.map(|_| ()).err();
    assert!(matches!(error, None | Some(HandleError::Unavailable(Unavailable::Stopped))));
    let other = working(quick(&backend).await, &effects).start().await.unwrap();
    let info = other.get("w").status().await.unwrap();
    assert!(matches!(info.status, Status::Waiting | Status::Running), "{info:?}");
    other.get("w").raise(GO, &1).await.unwrap();
    assert_eq!(other.get("w").of(WORK).output().await.unwrap(), 2);
    // An orderly end is no crash, and leaves no instance behind.
    let peers = backend.storage().await.peers("default", InstanceId::new()).await.unwrap().peers;
    assert_eq!(peers.len(), 1, "{peers:?}");
}

const SLOW: Definition<(), u32> = Definition::new("slow");

async fn slow_host<B: Backend>(backend: &B, effects: &Effects, pace: Duration) -> Host {
    let effects = effects.clone();
    let slow = move |proc: Process, ()| {
        let effects = effects.clone();
        async move {
            proc.step("slow", || async {
                effects.add("begin");
                tokio::time::sleep(pace).await;
                Ok::<_, Failure>(effects.add("end"))
            })
            .await?;
            proc.step("next", || async { Ok::<_, Failure>(effects.add("next")) }).await?;
            Ok::<_, Failure>(1)
        }
    };
    quick(backend).await.register(SLOW, slow).start().await.unwrap()
}

async fn a_shutdown_lets_steps_end<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let host = slow_host(&backend, &effects, Duration::from_millis(200)).await;
    host.spawn(SLOW, "s", &()).await.unwrap();
    until("it has begun", async || effects.all().len() == 1).await;
    host.shutdown(Duration::from_secs(20)).await;
    assert_eq!(effects.all(), ["begin", "end"], "the step ended, the next one did not begin");
    let host = slow_host(&backend, &effects, Duration::ZERO).await;
    assert_eq!(host.get("s").of(SLOW).output().await.unwrap(), 1);
    assert_eq!(effects.all(), ["begin", "end", "next"], "and it was recorded");
}

async fn a_shutdown_does_not_wait_for_ever<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let host = slow_host(&backend, &effects, Duration::from_secs(3600)).await;
    host.spawn(SLOW, "s", &()).await.unwrap();
    until("it has begun", async || effects.all().len() == 1).await;
    let since = Instant::now();
    host.shutdown(Duration::from_millis(100)).await;
    assert!(since.elapsed() < Duration::from_secs(20));
    let host = slow_host(&backend, &effects, Duration::ZERO).await;
    assert_eq!(host.get("s").of(SLOW).output().await.unwrap(), 1);
    assert_eq!(effects.all(), ["begin", "begin", "end", "next"]);
    assert_eq!(host.get("s").status().await.unwrap().reason, None);
}

/// The instances of the default namespace.
async fn instances(storage: &impl Storage) -> Vec<storage::Peer> {
    storage.peers("default", InstanceId::new()).await.unwrap().peers
}

async fn an_instance_that_was_fenced_goes_on_as_a_new_one<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let host = working(quick(&backend).await, &effects).quiet_time(Duration::from_secs(60)).start().await.unwrap();
    let handle = host.spawn(WORK, "w", &1).await.unwrap();
    until("it waits", async || effects.all().len() == 3).await;
    // A wrong suspicion.
    let storage = backend.storage().await;
    let [victim] = &instances(&storage).await[..] else { panic!() };
    until("it is fenced", async || {
        let peers = instances(&storage).await;
        match peers.iter().find(|peer| peer.instance == victim.instance) {
            Some(peer) => storage.fence(peer).await.unwrap(),
            None => true,
        }
    })
    .await;
    until("it has found out", async || instances(&storage).await.iter().any(|peer| peer.instance != victim.instance))
        .await;
    // It takes over from itself, and calls from outside go on as if nothing had been.
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 2);
    assert_eq!(effects.all().len(), 3, "no recorded step ran again");
    until("the old one is gone", async || instances(&storage).await.len() == 1).await;
}

async fn enlist(storage: &impl Storage) -> (InstanceId, Box<dyn storage::Heart>) {
    let id = InstanceId::new();
    let new = NewInstance {
        id,
        namespace: "default".into(),
        label: "test".into(),
        kinds: vec![WORK.kind().into()],
        expiry: std::time::Duration::from_secs(10),
    };
    (id, storage.enlist(&new).await.unwrap().0)
}

fn batch(instance: InstanceId, ops: Vec<Op>) -> Batch {
    Batch::new(Fence { instance, generation: 0 }, "default", ops)
}

/// Everything that a zombie may still have in its queue.
async fn a_zombie_writes_nothing<B: Backend>() {
    let backend = B::new().await;
    let storage = backend.storage().await;
    let host = quick(&backend).await.start().await.unwrap();
    let handle = host.spawn(WORK, "w", &1).await.unwrap();
    let (zombie, _heart) = enlist(&storage).await;
    let claim = Op::Claim { kind: WORK.kind().into(), limit: 10 };
    let outcomes = storage.commit(&batch(zombie, vec![claim.clone()])).await.unwrap();
    let [Outcome::Claimed(claimed)] = &outcomes[..] else { panic!("{outcomes:?}") };
    let [Claimed { run, claim: number }] = claimed[..] else { panic!("{claimed:?}") };
    let peers = storage.peers("default", InstanceId::new()).await.unwrap().peers;
    let peer = peers.iter().find(|peer| peer.instance == zombie).unwrap();
    assert!(storage.fence(peer).await.unwrap());
    let finish = Finish { run, claim: number, status: Status::Completed, output: Some("0".into()), reason: None };
    let park = Park { run, claim: number, wake_at: None, seen: None, waiting_for: None, deaths: 0 };
    for op in [Op::Finish(finish), Op::Park(park), Op::cancel("w".into()), claim] {
        let refused = storage.commit(&batch(zombie, vec![op])).await;
        assert!(matches!(refused, Err(StorageError::Fenced)), "{refused:?}");
    }
    assert!(matches!(storage.refence(zombie, 1).await, Err(StorageError::Fenced)));
    let info = handle.status().await.unwrap();
    // The other instance may have handed the process back by now.
    assert!(matches!(info.status, Status::Running | Status::Waiting), "{info:?}");
    assert_eq!(info.cancel_requested_at, None);
}

async fn what_nobody_holds_is_taken_up<B: Backend>() {
    // A claim whose answer is lost with everything that knew of it: the instance finds what it owns and does not hold.
    use durable_tests::faulty::{Fault, Faulty};
    let backend = B::new().await;
    let effects = Effects::default();
    let client = quick(&backend).await.start().await.unwrap();
    let handle = client.spawn(WORK, "w", &1).await.unwrap();
    let storage = Faulty::once(backend.storage().await, Fault::Lost, |op| matches!(op, Op::Claim { .. }));
    let _host = working(Host::builder(storage), &effects).start().await.unwrap();
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 2);
    assert_eq!(effects.all().len(), 3);
}

async fn what_is_not_owned_is_dropped<B: Backend>() {
    let backend = B::new().await;
    let effects = Effects::default();
    let builder = working(quick(&backend).await, &effects).quiet_time(Duration::from_secs(60));
    let host = builder.reconcile_every(Duration::from_millis(100)).start().await.unwrap();
    let handle = host.spawn(WORK, "w", &1).await.unwrap();
    until("it waits", async || effects.all().len() == 3).await;
    // Somebody gives it back behind the instance's back.
    let storage = backend.storage().await;
    let owner = handle.status().await.unwrap().owner.unwrap();
    let park = Park { run: handle.run().unwrap(), claim: 1, wake_at: None, seen: None, waiting_for: None, deaths: 0 };
    storage.commit(&batch(owner, vec![Op::Park(park)])).await.unwrap();
    until("it is dropped", async || host.in_memory() == 0).await;
    handle.raise(GO, &1).await.unwrap();
    assert_eq!(handle.output().await.unwrap(), 2);
}

async fn there_is_no_more_in_memory_than_allowed<B: Backend>() {
    const MANY: usize = 60;
    const ROOM: usize = 7;
    let backend = B::new().await;
    let (here, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = (here, most.clone());
    let count = move |proc: Process, input: u32| {
        let (here, most) = counted.clone();
        async move {
            struct Leave(Arc<AtomicUsize>);
            impl Drop for Leave {
                fn drop(&mut self) {
                    self.0.fetch_sub(1, Ordering::SeqCst);
                }
            }
            most.fetch_max(here.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let _leave = Leave(here);
            proc.step("a", || async { Ok::<_, Failure>(tokio::time::sleep(Duration::from_millis(2)).await) }).await?;
            // Waiting in memory it would keep the others out for a minute: it has to make room.
            proc.event(GO).await?;
            Ok::<_, Failure>(input)
        }
    };
    let builder = quick(&backend).await.max_processes(ROOM).quiet_time(Duration::from_secs(60));
    let host = builder.register(WORK, count).start().await.unwrap();
    let mut handles = Vec::new();
    for n in 0..MANY as u32 {
        handles.push(host.spawn(WORK, format!("w-{n}"), &n).await.unwrap());
    }
    for (n, handle) in (0..MANY as u32).zip(&handles).rev() {
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), n);
    }
    assert!(most.load(Ordering::SeqCst) <= ROOM, "{}", most.load(Ordering::SeqCst));
}

/// A process that parks as soon as it can, and messages from another instance that try to hit the moment.
async fn a_message_races_with_parking<B: Backend>() {
    const ROUNDS: u32 = 200;
    const LOOP: Definition<(), u32> = Definition::new("loop");
    let backend = B::new().await;
    let looping = async |proc: Process, ()| {
        let mut sum = 0;
        for _ in 0..ROUNDS {
            sum += proc.event(GO).await?;
        }
        Ok::<_, Failure>(sum)
    };
    let builder = quick(&backend).await.quiet_time(Duration::ZERO).poll(Duration::from_millis(20));
    let _host = builder.register(LOOP, looping).start().await.unwrap();
    let client = quick(&backend).await.start().await.unwrap();
    let handle = client.spawn(LOOP, "l", &()).await.unwrap();
    for n in 0..ROUNDS {
        handle.raise(GO, &1).await.unwrap();
        if n % 3 == 0 {
            tokio::time::sleep(Duration::from_micros(u64::from(n) * 37 % 4000)).await;
        }
    }
    assert_eq!(handle.output().await.unwrap(), ROUNDS);
}

async fn two_race_for_each_process<B: Backend>() {
    const MANY: usize = 200;
    let backend = B::new().await;
    let storages = [backend.storage().await, backend.storage().await];
    let host = quick(&backend).await.start().await.unwrap();
    for n in 0..MANY as u32 {
        host.spawn(WORK, format!("w-{n}"), &n).await.unwrap();
    }
    let claim = |storage: B::Storage| async move {
        let (me, _heart) = enlist(&storage).await;
        let mut mine = Vec::new();
        loop {
            let op = Op::Claim { kind: WORK.kind().into(), limit: 3 };
            match &storage.commit(&batch(me, vec![op])).await.unwrap()[..] {
                [Outcome::Claimed(claimed)] if claimed.is_empty() => return mine,
                [Outcome::Claimed(claimed)] => mine.extend(claimed.iter().map(|c| (c.run, c.claim))),
                other => panic!("{other:?}"),
            }
        }
    };
    let [one, two] = storages.map(|storage| tokio::spawn(claim(storage)));
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    assert_eq!(one.len() + two.len(), MANY);
    assert!(one.iter().chain(&two).all(|(_, claim)| *claim == 1));
    assert!(one.iter().all(|it| !two.contains(it)), "one winner each");
}
