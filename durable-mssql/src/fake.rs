//! The least of a server: it takes whoever logs in, and answers each request as it is told to. For what a server cannot be
//! made to do at will.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tiberius::{AuthMethod, Config, EncryptionLevel};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::connect::Target;
use crate::session::{Bounds, Sessions, Whose};

/// How a request is answered.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Done,
    /// One row of two numbers, then nothing more.
    Numbers(i32, i32),
    /// An error of this number.
    Error(u32),
    /// So many bytes of [`Answer::Done`], then the end of the connection.
    Cut(usize),
    /// Nothing at all.
    Silence,
}

/// What a log-in is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Login {
    Welcome,
    /// Elsewhere, at this port.
    Moved(u16),
    Silence,
}

pub(crate) struct Server {
    port: u16,
    script: Arc<Script>,
}

struct Script {
    login: Mutex<Login>,
    /// For the next requests, in order; then all are done.
    answers: Mutex<Vec<Answer>>,
    logins: AtomicUsize,
}

impl Server {
    pub(crate) async fn new(login: Login) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let script =
            Arc::new(Script { login: Mutex::new(login), answers: Mutex::default(), logins: AtomicUsize::new(0) });
        let shared = script.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { port, script }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn sends_on_to(&self, port: u16) {
        *self.script.login.lock().unwrap() = Login::Moved(port);
    }

    /// How often somebody has logged in.
    pub(crate) fn logins(&self) -> usize {
        self.script.logins.load(Ordering::SeqCst)
    }

    /// The next requests are answered so.
    pub(crate) fn answers(&self, answers: impl IntoIterator<Item = Answer>) {
        self.script.answers.lock().unwrap().extend(answers);
    }

    /// Sessions with it.
    pub(crate) fn sessions(&self) -> Sessions {
        let mut config = Config::new();
        config.host("127.0.0.1");
        config.port(self.port);
        config.encryption(EncryptionLevel::NotSupported);
        config.authentication(AuthMethod::sql_server("user", "password"));
        let bounds =
            Bounds { connect: Duration::from_millis(500), statement: Duration::from_millis(500), ..Bounds::default() };
        Sessions::new(Target::plain(config, bounds), Whose::Engine, 4)
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Script>) {
    const PRELOGIN: u8 = 0x12;
    const LOGIN: u8 = 0x10;
    while let Some(kind) = request(&mut stream).await {
        let (bytes, ends) = match kind {
            // The version, and that nothing is encrypted.
            PRELOGIN => (vec![0, 0, 11, 0, 6, 1, 0, 17, 0, 1, 0xff, 15, 0, 0, 0, 0, 0, 2], false),
            LOGIN => {
                script.logins.fetch_add(1, Ordering::SeqCst);
                match script.login.lock().unwrap().clone() {
                    Login::Welcome => ([welcome(), done(0)].concat(), false),
                    Login::Moved(port) => ([welcome(), moved(port), done(0)].concat(), false),
                    Login::Silence => continue,
                }
            }
            _ => {
                let mut answers = script.answers.lock().unwrap();
                match if answers.is_empty() { Answer::Done } else { answers.remove(0) } {
                    Answer::Done => (done(0), false),
                    Answer::Numbers(one, two) => ([numbers(one, two), done(0)].concat(), false),
                    Answer::Error(number) => ([error(number), done(2)].concat(), false),
                    Answer::Cut(length) => (packet(&done(0))[..length].to_vec(), true),
                    Answer::Silence => continue,
                }
            }
        };
        if ends {
            let _ = stream.write_all(&bytes).await;
            return;
        }
        if stream.write_all(&packet(&bytes)).await.is_err() {
            return;
        }
    }
}

/// Reads a request to its end: its kind.
async fn request(stream: &mut TcpStream) -> Option<u8> {
    const LAST: u8 = 1;
    loop {
        let mut header = [0; 8];
        stream.read_exact(&mut header).await.ok()?;
        let length = usize::from(u16::from_be_bytes([header[2], header[3]])) - header.len();
        stream.read_exact(&mut vec![0; length]).await.ok()?;
        if header[1] & LAST == LAST {
            return Some(header[0]);
        }
    }
}

fn packet(body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len() + 8).unwrap().to_be_bytes();
    [&[4, 1, length[0], length[1], 0, 0, 1, 0], body].concat()
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// A token whose length is in front of it.
fn token(kind: u8, body: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_le_bytes();
    [vec![kind], length.to_vec(), body].concat()
}

fn welcome() -> Vec<u8> {
    token(0xad, vec![1, 0x74, 0, 0, 4, 0, 15, 0, 0, 0])
}

fn moved(port: u16) -> Vec<u8> {
    let host = "127.0.0.1";
    let place = [vec![0], port.to_le_bytes().to_vec(), vec![host.len() as u8, 0], utf16(host)].concat();
    let length = (place.len() as u16).to_le_bytes();
    token(0xe3, [vec![20], length.to_vec(), place, vec![0, 0]].concat())
}

fn done(status: u16) -> Vec<u8> {
    [vec![0xfd], status.to_le_bytes().to_vec(), vec![0; 10]].concat()
}

fn numbers(one: i32, two: i32) -> Vec<u8> {
    const INT: [u8; 8] = [0, 0, 0, 0, 0, 0, 0x38, 0];
    [&[0x81, 2, 0][..], &INT, &INT, &[0xd1], &one.to_le_bytes(), &two.to_le_bytes()].concat()
}

fn error(number: u32) -> Vec<u8> {
    let message = utf16("told");
    token(0xaa, [number.to_le_bytes().to_vec(), vec![1, 16, 4, 0], message, vec![0, 0], vec![1, 0, 0, 0]].concat())
}
