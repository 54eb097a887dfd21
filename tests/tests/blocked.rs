//! Code that blocks threads of the runtime: its neighbours go on, and so does the host.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::Storage;
use durable_core::*;
use durable_tests::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const BLOCK: Definition<(), u32> = Definition::new("block");
const TICK: Definition<(), u32> = Definition::new("tick");
const EXPIRY: Duration = Duration::from_millis(1500);

on_each_backend!(a_fence_beside_a_blocked_thread, a_shutdown_beside_a_blocked_thread);

/// A step that blocks its thread, when it begins for the first time, until it is told to end.
#[derive(Clone, Default)]
struct Blocks {
    begun: Arc<AtomicU32>,
    ends: Arc<AtomicBool>,
}

impl Blocks {
    fn register(&self, builder: HostBuilder) -> HostBuilder {
        let blocks = self.clone();
        let tick = async |proc: Process, ()| {
            for n in 0..3 {
                proc.step(("tick", n), || async { Ok::<_, Failure>(()) }).await?;
                proc.delay(("pause", n), EXPIRY / 10).await?;
            }
            Ok::<_, Failure>(3)
        };
        let block = move |proc: Process, ()| {
            let blocks = blocks.clone();
            async move {
                let block = || async {
                    let first = blocks.begun.fetch_add(1, Ordering::SeqCst) == 0;
                    while first && !blocks.ends.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Ok::<_, Failure>(1)
                };
                Ok::<_, Failure>(proc.step("block", block).await?)
            }
        };
        builder.register(BLOCK, block).register(TICK, tick)
    }

    fn end(&self) {
        self.ends.store(true, Ordering::SeqCst);
    }

    async fn begin(&self) {
        until("it blocks", async || self.begun.load(Ordering::SeqCst) == 1).await;
    }
}

/// Whatever happens, no thread is blocked for ever.
struct InTheEnd(Blocks);

impl Drop for InTheEnd {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The host goes on as a new instance, without what does not end.
async fn a_fence_beside_a_blocked_thread<B: Backend>() {
    let backend = B::new().await;
    let blocks = Blocks::default();
    let _end = InTheEnd(blocks.clone());
    let host = blocks.register(quick(&backend).await).start().await.unwrap();
    let blocked = host.spawn(BLOCK, "b", &()).await.unwrap();
    blocks.begin().await;
    let storage = backend.storage().await;
    let me = durable_core::storage::InstanceId::new();
    until("it is fenced", async || {
        let peers = storage.peers("default", me).await.unwrap().peers;
        match peers.first() {
            Some(peer) => storage.fence(peer).await.unwrap(),
            None => false,
        }
    })
    .await;
    let other = host.spawn(TICK, "other", &()).await.unwrap();
    assert_eq!(other.output().await.unwrap(), 3);
    // What blocks is taken up like everything that a fenced instance had.
    assert_eq!(blocked.output().await.unwrap(), 1);
    assert_eq!(blocks.begun.load(Ordering::SeqCst), 2);
}

/// What does not end is handed over with the rest.
async fn a_shutdown_beside_a_blocked_thread<B: Backend>() {
    let backend = B::new().await;
    let blocks = Blocks::default();
    let _end = InTheEnd(blocks.clone());
    let builder = quick(&backend).await.call_timeout(Duration::from_secs(3600));
    let host = blocks.register(builder).start().await.unwrap();
    host.spawn(BLOCK, "b", &()).await.unwrap();
    blocks.begin().await;
    host.shutdown(Duration::from_millis(10)).await;
    assert!(logged(&["its code blocks a thread", "id=b"]));
    let next = blocks.register(quick(&backend).await).start().await.unwrap();
    assert_eq!(next.get("b").of(BLOCK).output().await.unwrap(), 1);
}

/// The heartbeat lives outside of the runtime whose only thread is blocked: only a database's has a thread of its own.
mod blocked_runtimes {
    use super::*;

    #[test]
    fn sqlite() {
        for_a_while::<SqliteFile>();
        for_good::<SqliteFile>();
    }

    #[test]
    fn postgres() {
        match PostgresSchema::address() {
            Ok(_) => {
                for_a_while::<PostgresSchema>();
                for_good::<PostgresSchema>();
            }
            Err(why) => println!("not run: {why}"),
        }
    }
}

/// A runtime whose only thread is blocked, and another one with a host of its own.
fn beside_a_blocked_runtime<B: Backend, F: Future<Output = ()>>(
    settings: impl Fn(HostBuilder) -> HostBuilder,
    test: impl FnOnce(Host, Host, Blocks) -> F,
) {
    log();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let backend = runtime.block_on(B::new());
    let blocked = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let blocks = Blocks::default();
    let _end = InTheEnd(blocks.clone());
    let start = async || {
        let builder = settings(quick(&backend).await.heartbeat(EXPIRY / 5, EXPIRY));
        blocks.register(builder).start().await.unwrap()
    };
    let host = blocked.block_on(start());
    blocked.block_on(async { host.spawn(TICK, "t", &()).await.unwrap() });
    let spawned = host.clone();
    blocked.spawn(async move { spawned.spawn(BLOCK, "b", &()).await });
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), async {
            blocks.begin().await;
            let other = start().await;
            test(host, other, blocks.clone()).await;
        })
        .await
        .expect("the test hangs");
    });
    blocked.shutdown_timeout(Duration::from_secs(1));
}

/// Twice the expiry does not cost the lease.
fn for_a_while<B: Backend>() {
    beside_a_blocked_runtime::<B, _>(
        |builder| builder,
        async |host: Host, other: Host, blocks: Blocks| {
            until("it has been blocked for long", async || host.health().runtime > EXPIRY * 2).await;
            assert!(host.health().heartbeat < EXPIRY, "{:?}", host.health());
            blocks.end();
            let handle = other.get("b").of(BLOCK);
            assert_eq!(handle.output().await.unwrap(), 1);
            assert_eq!(handle.status().await.unwrap().execution, 1, "it was taken over");
            assert_eq!(blocks.begun.load(Ordering::SeqCst), 1);
        },
    );
}

/// From the limit on others take over, whatever its heart could do; once it is free, it goes on as a new instance.
fn for_good<B: Backend>() {
    beside_a_blocked_runtime::<B, _>(
        |builder| builder.stall_limit(EXPIRY),
        async |host: Host, other: Host, blocks: Blocks| {
            assert_eq!(other.get("t").of(TICK).output().await.unwrap(), 3);
            let health = host.health();
            assert!(health.runtime > EXPIRY / 2 && health.poller > EXPIRY / 2, "{health:?}");
            assert!(other.health().runtime < EXPIRY, "{:?}", other.health());
            assert!(logged(&["code has blocked the runtime's threads"]));
            assert_eq!(other.get("b").of(BLOCK).output().await.unwrap(), 1);
            blocks.end();
            other.shutdown(EXPIRY).await;
            let again = host.spawn(TICK, "t2", &()).await.unwrap();
            assert_eq!(again.output().await.unwrap(), 3);
        },
    );
}
