//! One host's way to the storage, where calls go wrong.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{
    Batch, Counted, Filter, Heart, InstanceId, Load, Loaded, LockState, NewInstance, Op, Order, Outcome, Peer, Peers,
    Poll, Polled, ProcessRow, Record, RecordKey, Result, RunId, Storage, StorageError, What,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::ledger::Ledger;
use crate::tally::{Fault, Place, Sight};
use crate::world::{Verdict, World, at_once};

/// See above.
#[derive(Clone)]
pub struct Link {
    pub world: Arc<World>,
    pub host: usize,
}

/// Some time, or none: not even a tick of the clock.
pub async fn after(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

/// A call that was sent, until it has come to something.
struct UnderWay<'l>(&'l Link);

impl UnderWay<'_> {
    fn over(self) {
        std::mem::forget(self);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.world.inner();
        // A program that dies, or a seed that is over, drops all it has.
        if inner.hosts[self.0.host].alive && !inner.calm {
            inner.tally.hit(Fault::CallDropped, &[]);
        }
    }
}

impl Link {
    /// A call that writes: it happens on the storage's side, whatever becomes of the caller.
    pub async fn write<T: Send + 'static>(
        &self,
        places: (&[Place], &[Place]),
        act: impl FnOnce(&Arc<World>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.send(places, || act).await
    }

    /// A call that writes, and is made when it is sent: a program that dies before sends nothing.
    pub async fn send<T: Send + 'static, A: FnOnce(&Arc<World>) -> Result<T> + Send + 'static>(
        &self,
        (before, happened): (&[Place], &[Place]),
        make: impl FnOnce() -> A + Send,
    ) -> Result<T> {
        let Self { world, host } = self;
        let host = *host;
        world.awake(host).await;
        let fate = world.fate(host, before, happened, true);
        world.strike(host, fate.before);
        world.awake(host).await;
        if fate.verdict == Verdict::Unavailable {
            after(fate.arrival).await;
            world.awake(host).await;
            return Err(StorageError::unavailable("no connection"));
        }
        let (reply, answer) = oneshot::channel();
        let there = world.clone();
        let act = make();
        let lost = fate.verdict != Verdict::Fine;
        let under_way = UnderWay(self);
        tokio::spawn(async move {
            after(fate.arrival).await;
            if fate.verdict == Verdict::Vanished {
                return;
            }
            let result = act(&there);
            there.strike(host, fate.after);
            if !lost {
                after(fate.answer).await;
                let _ = reply.send(result);
            }
        });
        if lost {
            // Sooner or later than it happens.
            sleep(fate.answer + Duration::from_millis(1)).await;
            world.awake(host).await;
            under_way.over();
            return Err(StorageError::unknown("the connection was cut"));
        }
        let result = answer.await;
        world.awake(host).await;
        under_way.over();
        result.unwrap_or_else(|_| Err(StorageError::unknown("the server is gone")))
    }

    /// A call that reads.
    pub async fn read<T>(&self, places: &[Place], act: impl FnOnce(&World) -> Result<T>) -> Result<T> {
        let Self { world, host } = self;
        world.awake(*host).await;
        let fate = world.fate(*host, places, places, false);
        world.strike(*host, fate.before);
        world.awake(*host).await;
        after(fate.arrival).await;
        if fate.verdict != Verdict::Fine {
            world.awake(*host).await;
            return Err(StorageError::unavailable("no connection"));
        }
        let result = act(world);
        let under_way = UnderWay(self);
        world.strike(*host, fate.after);
        after(fate.answer).await;
        world.awake(*host).await;
        under_way.over();
        result
    }
}

/// Where a batch stands, before and after it happens.
fn places(batch: &Batch) -> (Vec<Place>, Vec<Place>) {
    let mut before = Vec::new();
    for op in &batch.ops {
        let place = match op {
            Op::Spawn(_) => Place::Starting,
            Op::Raise(_) => Place::Raising,
            Op::Record(_) => Place::BeforeRecord,
            Op::AcceptCancel { .. } | Op::Order(Order { what: What::Cancel, .. }) => Place::Cancelling,
            Op::Finish(_) => Place::Completing,
            Op::Park(_) => Place::Parking,
            Op::Claim { .. } => Place::Claiming,
            Op::Await { .. } => Place::Awaiting,
            Op::Seen { .. } => Place::Noting,
            _ => continue,
        };
        if !before.contains(&place) {
            before.push(place);
        }
    }
    let later = |place: &Place| if *place == Place::BeforeRecord { Place::AfterRecord } else { *place };
    let after = before.iter().map(later).collect();
    (before, after)
}

/// A batch and its outcomes, for the trace.
pub fn told(ledger: &Ledger, host: usize, batch: &Batch, result: &Result<Vec<Outcome>>) -> Vec<String> {
    let text = |op: &Op| match op {
        Op::Spawn(spawn) => format!("start {}", spawn.id),
        Op::Raise(raise) => format!("message {} to {}", raise.payload, raise.id),
        Op::Record(record) => {
            let (id, key, state) = (ledger.id(record.run), &record.key, record.state);
            format!("record {id} {key} {state} {} by claim {}", record.payload, record.claim)
        }
        Op::Await { run, id, .. } => format!("{} awaits {id}", ledger.id(*run)),
        Op::AcceptCancel { run, claim, .. } => format!("{} accepts its cancellation, claim {claim}", ledger.id(*run)),
        Op::Seen { run, signals, .. } => format!("{} has seen {signals}", ledger.id(*run)),
        Op::Finish(end) => format!("end {} {} by claim {}", ledger.id(end.run), end.status, end.claim),
        Op::Park(park) => {
            let (id, claim, seen) = (ledger.id(park.run), park.claim, park.seen);
            format!("park {id}, claim {claim}, seen {seen:?}, until {:?}, for {:?}", park.wake_at, park.waiting_for)
        }
        Op::Claim { kind, .. } => format!("claim {kind}"),
        other => format!("{other:?}"),
    };
    let told = |outcome: &Outcome| match outcome {
        Outcome::Claimed(claimed) => {
            let of = |c: &durable_core::storage::Claimed| format!("{} as {}", ledger.id(c.run), c.claim);
            format!("{:?}", claimed.iter().map(of).collect::<Vec<_>>())
        }
        other => format!("{other:?}"),
    };
    let fence = batch.fence;
    let writer = format!("host {host} as {}/{}", short(fence.instance), fence.generation);
    match result {
        Ok(outcomes) => {
            let op = |(op, outcome): (&Op, &Outcome)| format!("{writer}: {} -> {}", text(op), told(outcome));
            batch.ops.iter().zip(outcomes).map(op).collect()
        }
        Err(error) => batch.ops.iter().map(|op| format!("{writer}: {} -> {error}", text(op))).collect(),
    }
}

/// The end of an instance's id.
pub fn short(instance: InstanceId) -> String {
    instance.to_string().split_off(30)
}

#[async_trait]
impl Storage for Link {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn heartbeat_thread(&self) -> bool {
        false
    }

    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        Some(self)
    }

    async fn enlist(&self, new: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
        let (new, link, sent) = (new.clone(), self.clone(), Instant::now());
        let places = &[Place::Enlisting];
        let enlisted = self.write((places, places), move |world| {
            let instance = new.id;
            let (heart, now) = at_once(world.memory.enlist(&new))?;
            world.say(|_| format!("host {} enlists as {}", link.host, short(instance)));
            let mut inner = world.inner();
            inner.ledger.enlisted(instance);
            // A program that has died meanwhile holds nothing.
            if inner.hosts[link.host].alive {
                inner.hosts[link.host].hearts.insert(instance, heart);
            }
            Ok((Beating { link, instance }, now))
        });
        let (heart, now) = enlisted.await?;
        self.acknowledged(sent);
        Ok((Box::new(heart), now))
    }

    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()> {
        let places = &[Place::Refencing];
        self.write((places, places), move |world| {
            let refenced = at_once(world.memory.refence(instance, generation));
            world.say(|_| format!("{} refences to {generation}: {refenced:?}", short(instance)));
            if refenced.is_ok() {
                world.inner().ledger.refenced(instance, generation);
            }
            refenced
        })
        .await
    }

    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>> {
        let (before, after) = places(batch);
        #[cfg(durable_mutations)]
        if durable_core::mutation::is_broken(durable_core::mutation::Rule::FenceUnderLock)
            && !self.world.inner().ledger.stands(batch.fence)
        {
            return Err(StorageError::Fenced);
        }
        if let Some(wait) = self.world.held_up(batch) {
            sleep(wait).await;
            self.world.awake(self.host).await;
            return Err(StorageError::blocked("somebody holds a row"));
        }
        let apart = batch.patience.is_some();
        let (batch, host) = (batch.clone(), self.host);
        let result = self.write((&before, &after), move |world| world.commit(host, &batch)).await;
        let mut inner = self.world.inner();
        if apart && result.is_ok() {
            inner.tally.saw(Sight::Apart);
        }
        for outcome in result.iter().flatten() {
            if let Outcome::Claimed(claimed) = outcome {
                for claimed in claimed {
                    inner.ledger.untold.remove(&(claimed.run, claimed.claim));
                }
            }
        }
        drop(inner);
        result
    }

    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>> {
        let places: &[Place] = if load.records { &[Place::Loading] } else { &[Place::Delivering] };
        if load.records {
            let mut inner = self.world.inner();
            let inner = &mut *inner;
            for run in load.ids() {
                let claim = inner.ledger.rows.get(&run).map_or(0, |row| row.claim);
                // Its claim was never answered: it was found among what the instance owns.
                if inner.ledger.untold.remove(&(run, claim)) {
                    inner.tally.saw(Sight::Stray);
                }
            }
        }
        self.read(places, |world| {
            // As if it were too much for one read: it is weighed, and read in parts.
            let much = load.records && load.runs.len() > 1 && world.inner().seed.permille(50);
            if much { Ok(None) } else { at_once(world.memory.load(load)) }
        })
        .await
    }

    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>> {
        self.read(&[Place::Loading], |world| at_once(world.memory.weigh(load))).await
    }

    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>> {
        self.read(&[Place::Comparing], |world| at_once(world.memory.owned(instance, after, limit))).await
    }

    async fn poll(&self, poll: &Poll) -> Result<Polled> {
        self.read(&[Place::Polling], |world| at_once(world.memory.poll(poll))).await
    }

    async fn changed(&self, _: &mut u64, at_most: Duration) {
        if self.world.inner().odds.hints {
            let _ = tokio::time::timeout(at_most, self.world.wrote.notified()).await;
        } else {
            sleep(at_most).await;
        }
        self.world.awake(self.host).await;
    }

    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers> {
        let mut peers = self.read(&[Place::Peering], |world| at_once(world.memory.peers(namespace, me))).await?;
        if !self.world.inner().odds.proof {
            peers.peers.iter_mut().for_each(|peer| peer.lock = LockState::Unknown);
        }
        Ok(peers)
    }

    async fn fence(&self, seen: &Peer) -> Result<bool> {
        let (seen, places) = (seen.clone(), &[Place::TakingOver]);
        self.write((places, places), move |world| {
            let fenced = at_once(world.memory.fence(&seen))?;
            world.say(|_| format!("{} is fenced: {fenced}", short(seen.instance)));
            if fenced {
                world.inner().ledger.fenced(seen.instance);
            }
            Ok(fenced)
        })
        .await
    }

    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize> {
        let places = &[Place::TakingOver];
        self.write((places, places), move |world| {
            let released = at_once(world.memory.release(fenced, limit))?;
            world.say(|_| format!("what {} owned is released: {released}", short(fenced)));
            if world.inner().ledger.is_fenced(fenced) {
                world.inner().ledger.released(fenced);
            }
            world.wrote.notify_waiters();
            Ok(released)
        })
        .await
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        let places = &[Place::Retiring];
        self.write((places, places), move |world| {
            at_once(world.memory.retire(instance))?;
            world.say(|_| format!("{} retires", short(instance)));
            let mut inner = world.inner();
            inner.ledger.fenced(instance);
            inner.ledger.released(instance);
            Ok(())
        })
        .await
    }

    async fn reinstate(&self) -> Result<usize> {
        let places = &[Place::Reinstating];
        self.write((places, places), |world| at_once(world.memory.reinstate())).await
    }

    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>> {
        self.read(&[Place::Finding], |world| at_once(world.memory.find(namespace, id, run))).await
    }

    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        self.read(&[Place::Reading], |world| at_once(world.memory.record(run, key))).await
    }

    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>> {
        self.read(&[Place::Polling], |world| at_once(world.memory.list(namespace, filter))).await
    }

    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>> {
        self.read(&[Place::Polling], |world| at_once(world.memory.count(namespace, filter))).await
    }
}

impl Link {
    /// A heartbeat that was sent then was acknowledged.
    fn acknowledged(&self, sent: Instant) {
        let machine = &mut self.world.inner().hosts[self.host];
        machine.acknowledged = machine.acknowledged.max(Some(sent));
    }
}

/// The heart of an instance, whose proof of life the world keeps, so that it goes with the program.
struct Beating {
    link: Link,
    instance: InstanceId,
}

impl Drop for Beating {
    fn drop(&mut self) {
        let heart = self.link.world.inner().hosts[self.link.host].hearts.remove(&self.instance);
        drop(heart);
    }
}

#[async_trait]
impl Heart for Beating {
    async fn beat(&mut self) -> Result<DateTime<Utc>> {
        let (host, instance, sent) = (self.link.host, self.instance, Instant::now());
        let places = &[Place::Beating];
        let beat =
            self.link.write((places, places), move |world| match world.inner().hosts[host].hearts.get_mut(&instance) {
                Some(heart) => at_once(heart.beat()),
                None => Err(StorageError::unavailable("no connection")),
            });
        let now = beat.await?;
        self.link.acknowledged(sent);
        Ok(now)
    }
}
