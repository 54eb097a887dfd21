//! The database's clock decides which of several things was first, however late a process looks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::memory::Memory;
use durable_core::*;
use std::time::Duration;

const PAID: Event<u32> = Event::new("Paid");
const RACE: Definition<bool, String> = Definition::new("race");
const RECEIVE: Definition<(), Option<u32>> = Definition::new("receive");
const CHILD: Definition<(), u32> = Definition::new("child");
const HOUR: Duration = Duration::from_secs(3600);

fn registered(builder: HostBuilder) -> HostBuilder {
    let race = async |proc: Process, timer_first: bool| {
        let late = proc.delay("late", HOUR);
        let paid = proc.event(PAID);
        let child = proc.output(CHILD, "child");
        let (late_is, paid_is) = (|_| "late".to_owned(), |n| format!("paid {n}"));
        let ended = |end: Result<u32, OutputError<Failure>>| format!("ended {}", end.unwrap());
        let first = match timer_first {
            true => proc.race("first").on(late, late_is).on(child, ended).on(paid, paid_is).await?,
            false => proc.race("first").on(paid, paid_is).on(child, ended).on(late, late_is).await?,
        };
        Ok::<_, Failure>(first)
    };
    let receive = async |proc: Process, ()| Ok::<_, Failure>(proc.event(PAID).timeout(HOUR).await?);
    builder.register(RACE, race).register(RECEIVE, receive)
}

async fn host(memory: &Memory) -> Host {
    registered(Host::builder(memory.clone())).start().await.unwrap()
}

/// All of it happens while no instance runs them: `what`, so long after they began to wait; then two hours are over.
async fn after_an_outage(what: impl AsyncFn(&Host), when: Duration) -> (Vec<String>, Option<u32>) {
    let memory = Memory::new();
    let elsewhere = Host::builder(memory.clone());
    let elsewhere = elsewhere.register(CHILD, async |proc: Process, ()| proc.event(PAID).await.map_err(Failure::from));
    let elsewhere = elsewhere.start().await.unwrap();
    elsewhere.spawn(CHILD, "child", &()).await.unwrap();
    let first = host(&memory).await;
    let mut races = Vec::new();
    for timer_first in [true, false] {
        races.push(first.spawn(RACE, format!("race-{timer_first}"), &timer_first).await.unwrap());
    }
    let receive = first.spawn(RECEIVE, "receive", &()).await.unwrap();
    for handle in &races {
        durable_tests::until_status(handle, Status::Waiting).await;
    }
    durable_tests::until_status(&receive, Status::Waiting).await;
    first.shutdown(Duration::from_secs(1)).await;
    tokio::time::advance(when).await;
    what(&elsewhere).await;
    tokio::time::sleep(HOUR * 2 - when).await;
    let second = host(&memory).await;
    let mut results = Vec::new();
    for handle in races {
        results.push(second.get(handle.id()).of(RACE).output().await.unwrap());
    }
    (results, second.get("receive").of(RECEIVE).output().await.unwrap())
}

async fn paid(host: &Host) {
    for id in ["race-true", "race-false", "receive"] {
        host.get(id).raise(PAID, &7).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_in_time() {
    let (races, received) = after_an_outage(paid, HOUR / 6).await;
    assert_eq!(races, ["paid 7", "paid 7"]);
    assert_eq!(received, Some(7));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_comes_too_late() {
    let (races, received) = after_an_outage(paid, HOUR * 3 / 2).await;
    assert_eq!(races, ["late", "late"]);
    assert_eq!(received, None);
}

/// A process that ended before the message came, and one that ended when the time was over.
#[tokio::test(start_paused = true)]
async fn the_end_of_another_process() {
    let ends = async |host: &Host| {
        let child = host.get("child").of(CHILD);
        child.raise(PAID, &5).await.unwrap();
        assert_eq!(child.output().await.unwrap(), 5);
        tokio::time::sleep(Duration::from_secs(60)).await;
        paid(host).await;
    };
    let (races, received) = after_an_outage(ends, HOUR / 2).await;
    assert_eq!(races, ["ended 5", "ended 5"]);
    assert_eq!(received, Some(7));
    let (races, _) = after_an_outage(ends, HOUR * 3 / 2).await;
    assert_eq!(races, ["late", "late"]);
}

/// It is there before the deadline, though it was put in when that was over: the clock was set back since.
#[tokio::test(start_paused = true)]
async fn a_message_from_before_the_clock_was_set_back() {
    let memory = Memory::new();
    let elsewhere = Host::builder(memory.clone()).start().await.unwrap();
    let first = host(&memory).await;
    let receive = first.spawn(RECEIVE, "receive", &()).await.unwrap();
    durable_tests::until_status(&receive, Status::Waiting).await;
    first.shutdown(Duration::from_secs(1)).await;
    tokio::time::advance(HOUR * 3 / 2).await;
    elsewhere.get("receive").raise(PAID, &7).await.unwrap();
    memory.jump(-chrono::TimeDelta::hours(1));
    // It is woken by the clock as it is now.
    elsewhere.get("receive").raise(Event::<u32>::new("Other"), &0).await.unwrap();
    let second = host(&memory).await;
    assert_eq!(second.get("receive").of(RECEIVE).output().await.unwrap(), Some(7));
}
