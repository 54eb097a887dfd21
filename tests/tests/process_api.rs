//! Everything that a process can do, in one `Send` process, with services that it borrows; and its way through a crash.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_tests::*;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
enum Declined {
    #[error("no money: {0} short")]
    Short(u64),
}

#[derive(Default)]
struct App {
    effects: Effects,
}

impl App {
    async fn register(&self, email: &str) -> Result<u64, std::io::Error> {
        self.effects.add(format!("register {email}"));
        Ok(7)
    }
    async fn charge(&self, item: u64, attempt: Attempt) -> Result<String, Declined> {
        self.effects.add(format!("charge {item} attempt {}", attempt.number()));
        if attempt.number() < 2 { Err(Declined::Short(item)) } else { Ok(format!("receipt {item}")) }
    }
}

const PAID: Event<u64> = Event::new("Paid");
const CHILD: Definition<u64, u64, Failure> = Definition::new("child");
const EVERYTHING: Definition<String, Vec<String>, Failure> = Definition::new("everything");

async fn child(proc: Process, input: u64) -> Result<u64, Failure> {
    let doubled = proc.step("double", || async { Ok::<_, Failure>(input * 2) }).await?;
    Ok(doubled)
}

async fn everything(app: Arc<App>, proc: Process, email: String) -> Result<Vec<String>, Failure> {
    let mut log = Vec::new();
    // A step that borrows locals and shared state, its error not serialisable.
    let user = proc.step("register", || app.register(&email)).await?;
    log.push(format!("user {user}"));

    // Values and variables.
    let secret = proc.get("secret", || 40 + 2).await?;
    proc.set("progress", secret).await?;
    proc.set(("mark", 1), "once").await?;
    log.push(format!("secret {secret}"));

    // A loop with keys, retries, a typed error, an annotated argument.
    for item in [1, 2] {
        let receipt = proc
            .step(("charge", item), |attempt: Attempt| app.charge(item, attempt))
            .retry(Retry::fixed(Duration::from_millis(1)).max_attempts(3))
            .retry_if(|error| matches!(error, Declined::Short(_)))
            .timeout(Duration::from_secs(5))
            .await?;
        log.push(receipt);
    }
    // An async closure with an annotated argument.
    let key = proc.step("key", async |attempt: Attempt| Ok::<_, Failure>(attempt.key())).await?;
    log.push(format!("key {}", key.get_version_num()));

    // Concurrency: join, FuturesUnordered, all.
    let (a, b) = tokio::join!(
        proc.step("a", || async { Ok::<_, Failure>(1) }).into_future(),
        proc.delay("b", Duration::from_millis(20)).into_future()
    );
    log.push(format!("joined {} {}", a?, b?.on_time()));
    let mut many: FuturesUnordered<_> =
        (0..3).map(|n| proc.step(("many", n), move || async move { Ok::<_, Failure>(n) }).into_future()).collect();
    let mut sum = 0;
    while let Some(n) = many.next().await {
        sum += n?;
    }
    log.push(format!("sum {sum}"));
    let all = proc.all((0..3).map(|n| proc.delay(("wait", n), Duration::from_millis(n)))).await;
    log.push(format!("all {}", all.len()));

    // Events, with and without a time-out.
    log.push(format!("paid {}", proc.event(PAID).await?));
    log.push(format!("paid {:?}", proc.event(PAID).timeout(Duration::from_secs(30)).await?));
    log.push(format!("paid {:?}", proc.event(PAID).timeout(Duration::from_millis(10)).await?));

    // A race over all kinds of members.
    let first = proc
        .race("first")
        .on(proc.event(PAID), |cents| format!("paid {cents}"))
        .on(proc.delay("slow", Duration::from_secs(3600)), |_| "slow".to_owned())
        .on(proc.step("never", std::future::pending::<Result<(), Failure>>), |_| "never".to_owned())
        .on(proc.step("quick", || async { Ok::<_, Failure>(5) }), |n| format!("quick {}", n.unwrap()))
        .await?;
    log.push(first);

    // Other processes.
    let child = proc.spawn(CHILD, format!("{}/child", proc.id()), &21).await?;
    log.push(format!("child {}", child.output(&proc).await?));
    Ok(log)
}

fn registered(builder: HostBuilder, app: &Arc<App>) -> HostBuilder {
    builder.register(CHILD, child).register(EVERYTHING, with(app, everything))
}

on_each_backend!(everything_works);

async fn everything_works<B: Backend>() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let backend = B::new().await;
    let app = Arc::new(App::default());
    let host = registered(quick(&backend).await, &app).start().await.unwrap();
    let handle = is_send(host.spawn(EVERYTHING, "e-1", &"a@b.c".to_owned()).into_future()).await.unwrap();
    handle.raise(PAID, &1).await.unwrap();
    handle.raise(PAID, &2).id("two").await.unwrap();
    handle.raise(PAID, &2).id("two").await.unwrap();
    // The third receive times out, so what comes now is for the race, which the quick step wins.
    let expected = [
        "user 7",
        "secret 42",
        "receipt 1",
        "receipt 2",
        "key 5",
        "joined 1 true",
        "sum 3",
        "all 3",
        "paid 1",
        "paid Some(2)",
        "paid None",
        "quick 5",
        "child 42",
    ];
    assert_eq!(handle.output().await.unwrap(), expected);
    assert_eq!(handle.value::<u64>("progress").await.unwrap(), Some(42));
    assert_eq!(handle.value::<String>(("mark", 1)).await.unwrap().as_deref(), Some("once"));
    assert_eq!(handle.value::<u64>("nothing").await.unwrap(), None);
    let charges = ["charge 1 attempt 1", "charge 1 attempt 2", "charge 2 attempt 1", "charge 2 attempt 2"];
    assert_eq!(app.effects.all()[1..], charges);
    host.shutdown(Duration::from_secs(5)).await;
}

on_each_backend!(everything_works_through_crashes);

/// The host is dropped, as in a crash, again and again until the process has ended; then its output and its effects
/// are what they are without a crash.
async fn everything_works_through_crashes<B: Backend>() {
    let backend = B::new().await;
    let app = Arc::new(App::default());
    let mut life = Duration::from_millis(5);
    let id = "e-1".to_owned();
    let mut crashes = 0;
    let output = loop {
        let host = registered(quick(&backend).await, &app).max_crashes(1000).start().await.unwrap();
        let handle = host.spawn(EVERYTHING, &id, &"a@b.c".to_owned()).await.unwrap();
        for message in [1, 2] {
            handle.raise(PAID, &message).id(message).await.unwrap();
        }
        match tokio::time::timeout(life, handle.output()).await {
            Ok(output) => break output.unwrap(),
            Err(_) => {
                drop(host);
                crashes += 1;
                life += Duration::from_millis(15);
            }
        }
    };
    assert_eq!(output.len(), 13, "after {crashes} crashes: {output:?}");
    assert!(crashes > 3, "only {crashes} crashes");
    for attempt in 1..=2 {
        // Between an effect and its record a crash repeats the effect; a recorded one is never repeated.
        let times = app.effects.count(&format!("charge 1 attempt {attempt}"));
        assert!(times >= 1 && times <= 1 + crashes, "attempt {attempt}: {times} times in {crashes} crashes");
    }
}
