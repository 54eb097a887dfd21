//! A TCP proxy in front of a database's server, for networks that misbehave.

use durable_core::storage::RunId;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::crash::scene::Random;
use crate::crash::shared::Shared;

/// How the network is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network {
    /// Nothing passes, and nobody is told.
    pub stalled: bool,
    /// What is sent passes; an answer ends its connection.
    pub swallows: bool,
    /// Everything passes so much later, one way.
    pub latency: Duration,
    /// Connections before this one are cut.
    cuts: u32,
    /// Over connections before this one nothing passes any more, either way, and nobody is told.
    mutes: u32,
}

/// How far something is that is held back on its way to the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Held {
    #[default]
    No,
    Yes,
    LetGo,
}

/// A database that is reached over a network.
pub trait Proxied: Shared {
    /// How many bytes lie between two places at which an answer is cut.
    const STRIDE: usize;
    /// A run, in SQL.
    fn literal(run: RunId) -> String;
    /// A proxy in front of the server.
    fn proxy(&self) -> impl Future<Output = Proxy> + Send;
    /// The storage by way of it.
    fn through(&self, proxy: &Proxy) -> impl Future<Output = Self::Storage> + Send;
    /// One that says nothing but what it is told to.
    fn alone_through(&self, proxy: &Proxy) -> impl Future<Output = Self::Storage> + Send;
}

/// Between a program and the server.
pub struct Proxy {
    /// The server's address by way of the proxy.
    pub url: String,
    wires: Arc<Wires>,
}

#[derive(Default)]
struct Wires {
    network: watch::Sender<Network>,
    /// So many bytes are answered to the next thing that is sent, then its connection is cut.
    next_answer: Mutex<Option<usize>>,
    /// The longest life of a connection, in bytes either way, and where the length of each comes from.
    lives: Mutex<Option<(u64, Random)>>,
    /// What is sent next with this in it waits until it is let go.
    holds: Mutex<Option<&'static str>>,
    held: watch::Sender<Held>,
    server: Mutex<String>,
    answered: AtomicUsize,
    round_trips: AtomicUsize,
    lost: AtomicUsize,
}

impl Proxy {
    /// In front of the server that the address names, with the host as `@host:port/`.
    pub async fn before(url: &str) -> Self {
        let (login, place) = url.split_once('@').expect("user:password@host:port/");
        let (server, rest) = place.split_once('/').expect("host:port/database");
        Self::to(server, |place| format!("{login}@{place}/{rest}")).await
    }

    /// In front of the server at `host:port`; the address by way of the proxy is made of the proxy's own place.
    pub async fn to(server: &str, address: impl FnOnce(SocketAddr) -> String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wires = Arc::new(Wires::default());
        let proxy = Self { url: address(listener.local_addr().unwrap()), wires: wires.clone() };
        proxy.lead_to(server);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection(client, wires.clone()));
            }
        });
        proxy
    }

    /// New connections go to the server at `host:port`.
    pub fn lead_to(&self, server: &str) {
        server.clone_into(&mut self.wires.server.lock().unwrap());
    }

    /// New connections are cut after fewer bytes than this, both ways together: in the middle of whatever is under way.
    /// With `None` they live for ever.
    pub fn cut_within(&self, bytes: Option<u64>, seed: u64) {
        *self.wires.lives.lock().unwrap() = bytes.map(|bytes| (bytes, Random(seed)));
    }

    /// Changes how the network is.
    pub fn network(&self, change: impl FnOnce(&mut Network)) {
        self.wires.network.send_modify(change);
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.network(|network| network.cuts += 1);
    }

    /// All connections fall silent, for ever, as if the server's machine were gone without a word. New ones pass.
    pub fn mute(&self) {
        self.network(|network| network.mutes += 1);
    }

    /// Of the answer to what is sent next, so many bytes pass; then its connection is cut. `None`: all of it.
    pub fn cut_next_answer(&self, after: Option<usize>) {
        *self.wires.next_answer.lock().unwrap() = after;
    }

    /// What is sent next with this text in it does not pass before it is [let go](Self::let_go), whatever becomes of whoever
    /// has sent it.
    pub fn hold_back(&self, text: &'static str) {
        self.wires.held.send_replace(Held::No);
        *self.wires.holds.lock().unwrap() = Some(text);
    }

    /// Lets go of what is held back, once there is something.
    pub async fn let_go(&self) {
        self.wires.held.subscribe().wait_for(|held| *held == Held::Yes).await.unwrap();
        self.wires.held.send_replace(Held::LetGo);
    }

    /// How many bytes the server has answered.
    pub fn answered(&self) -> usize {
        self.wires.answered.load(Ordering::SeqCst)
    }

    /// How often something was sent to a server that had answered everything before.
    pub fn round_trips(&self) -> usize {
        self.wires.round_trips.load(Ordering::SeqCst)
    }

    /// How many answers did not pass as a whole.
    pub fn lost(&self) -> usize {
        self.wires.lost.load(Ordering::SeqCst)
    }
}

impl Wires {
    fn holds_back(&self, bytes: &[u8]) -> bool {
        let mut holds = self.holds.lock().unwrap();
        let found = holds.is_some_and(|text| bytes.windows(text.len()).any(|part| part == text.as_bytes()));
        if found {
            *holds = None;
        }
        found
    }
}

async fn connection(client: TcpStream, wires: Arc<Wires>) {
    let server = wires.server.lock().unwrap().clone();
    let life = wires.lives.lock().unwrap().as_mut().map(|(most, random)| {
        // Of any order of magnitude.
        let most = *most >> random.below(9);
        random.below(most) as usize
    });
    let life = Mutex::new(life);
    let lives = |length: usize| match &mut *life.lock().unwrap() {
        Some(left) if *left < length => Passes::Part(*left),
        Some(left) => {
            *left -= length;
            Passes::All
        }
        None => Passes::All,
    };
    let Ok(server) = TcpStream::connect(server).await else { return };
    for end in [&client, &server] {
        let _ = end.set_nodelay(true);
    }
    let mut network = wires.network.subscribe();
    let cuts = network.borrow_and_update().cuts;
    let cut = async move { while network.changed().await.is_ok() && network.borrow().cuts == cuts {} };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // How much of an answer may still pass here.
    let left = Mutex::new(None);
    let waits = AtomicBool::new(false);
    let asks = |length: usize| {
        if !waits.swap(true, Ordering::SeqCst) {
            wires.round_trips.fetch_add(1, Ordering::SeqCst);
        }
        if let Some(after) = wires.next_answer.lock().unwrap().take() {
            *left.lock().unwrap() = Some(after);
        }
        lives(length)
    };
    let answers = |length: usize| {
        waits.store(false, Ordering::SeqCst);
        wires.answered.fetch_add(length, Ordering::SeqCst);
        let mut left = left.lock().unwrap();
        match *left {
            _ if wires.network.borrow().swallows => Passes::Part(0),
            Some(part) if part <= length => Passes::Part(part),
            Some(part) => {
                *left = Some(part - length);
                Passes::All
            }
            None => lives(length),
        }
    };
    tokio::select! {
        () = cut => {}
        () = pass(from_client, to_server, &wires, asks) => {}
        () = pass(from_server, to_client, &wires, answers) => {}
    }
}

enum Passes {
    All,
    /// So many bytes, and nothing after them.
    Part(usize),
}

fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    wires: &Wires,
    decide: impl Fn(usize) -> Passes,
) -> impl Future<Output = ()> {
    let mut network = wires.network.subscribe();
    let mutes = network.borrow().mutes;
    async move {
        let mut buffer = vec![0; 65_536];
        loop {
            let Ok(length @ 1..) = from.read(&mut buffer).await else { return };
            let latency = network.borrow().latency;
            if !latency.is_zero() {
                tokio::time::sleep(latency).await;
            }
            if network.wait_for(|network| !network.stalled).await.is_err() {
                return;
            }
            if wires.holds_back(&buffer[..length]) {
                let mut held = wires.held.subscribe();
                wires.held.send_replace(Held::Yes);
                if held.wait_for(|held| *held == Held::LetGo).await.is_err() {
                    return;
                }
            }
            if network.borrow().mutes != mutes {
                return std::future::pending().await;
            }
            let (passes, last) = match decide(length) {
                Passes::All => (length, false),
                Passes::Part(part) => (part, true),
            };
            if last {
                wires.lost.fetch_add(1, Ordering::SeqCst);
            }
            if to.write_all(&buffer[..passes]).await.is_err() || last {
                let _ = to.flush().await;
                return;
            }
        }
    }
}
