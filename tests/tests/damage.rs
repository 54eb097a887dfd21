//! SQLite files that somebody has cut short or written over, while a program runs or while none does.
//!
//! SQLite has no checksums of its pages, and looks at those of its journal only when it opens one that was left behind. What
//! it notices is told, to whoever asks or else to the log: which file is damaged and what to do. Then nobody is told what is
//! not so, and no step runs again. A damaged text that still is one, or an entry of an index that has become another one, it
//! does not notice, and nobody is told: there, no program panics, and whoever can still be read as before gets no wrong
//! answer and runs no step again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::Storage;
use durable_core::*;
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::crash::worker::Worker;
use durable_tests::*;
use serde::{Deserialize, Serialize};
use sqlx::{Executor, SqliteConnection};
use std::fs::OpenOptions;
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const WORKER: &str = env!("CARGO_BIN_EXE_worker");
const GO: Event<u32> = Event::new("Go");
const IT: Definition<Input, u32> = Definition::new("it");
const MANY: u32 = 150;

#[derive(Clone, Serialize, Deserialize)]
struct Input {
    number: u32,
    /// So that the file has many pages.
    ballast: String,
}

async fn host(backend: &SqliteFile, effects: &Effects) -> Host {
    let effects = effects.clone();
    let it = move |proc: Process, input: Input| {
        let effects = effects.clone();
        async move {
            let first = proc.step("first", async || {
                effects.add(format!("first {}", input.number));
                Ok::<_, Failure>(input.number)
            });
            let first = first.await?;
            let second = proc.event(GO).await?;
            Ok::<_, Failure>(proc.step("last", || async { Ok::<_, Failure>(first + second) }).await?)
        }
    };
    let builder = quick(backend).await.call_timeout(Duration::from_millis(1500));
    builder.register(IT, it).start().await.unwrap()
}

/// Starts many processes, which wait for a message.
async fn all_wait(host: &Host) {
    for number in 0..MANY {
        let input = Input { number, ballast: "ballast ".repeat(150) };
        host.spawn(IT, format!("it-{number}"), &input).await.unwrap();
    }
    until("all are parked", async || host.in_memory() == 0).await;
}

/// A file with many processes that wait for a message, which nobody has open.
async fn waiting(effects: &Effects) -> SqliteFile {
    let backend = SqliteFile::new().await;
    let host = host(&backend, effects).await;
    all_wait(&host).await;
    host.shutdown(Duration::from_secs(5)).await;
    drop(host);
    backend.closed().await;
    backend
}

/// A copy of a file that nobody has open.
async fn copy(of: &SqliteFile) -> SqliteFile {
    let copy = SqliteFile::new().await;
    std::fs::copy(of.path(), copy.path()).unwrap();
    copy
}

/// What came of a message to somebody.
enum Answer {
    Output(u32),
    /// An error told of the trouble.
    Told(String),
    /// Nobody could tell, for the process does not end.
    Silent,
}

/// Sends everybody its message. Who is silent although the log has told nothing of the file is waited for.
async fn ask(host: &Host, file: &str, patience: Duration) -> Vec<Answer> {
    const LOOK: Duration = Duration::from_secs(1);
    let asked: Vec<_> = (0..MANY)
        .map(|number| {
            let handle = host.get(format!("it-{number}")).of(IT);
            let file = file.to_owned();
            tokio::spawn(async move {
                handle.raise(GO, &7).await.map_err(|error| error.to_string())?;
                handle.status().await.map_err(|error| error.to_string())?;
                let since = Instant::now();
                loop {
                    match tokio::time::timeout(LOOK, handle.output()).await {
                        Ok(output) => break output.map(Answer::Output).map_err(|error| error.to_string()),
                        Err(_) if in_the_log(&file) || since.elapsed() > patience => break Ok(Answer::Silent),
                        Err(_) => {}
                    }
                }
            })
        })
        .collect();
    let mut answers = Vec::new();
    for answer in asked {
        answers.push(answer.await.unwrap().unwrap_or_else(Answer::Told));
    }
    answers
}

/// Whether the log tells of a file that it is damaged, and what to do.
fn in_the_log(file: &str) -> bool {
    logged(&[file, "damaged", "restore a backup"])
}

/// Sends everybody its message: everybody is right, or told of the damage. Says how many were told, themselves or by the
/// log.
async fn told(host: &Host, file: &str, how: &str) -> usize {
    let mut told = 0;
    for (number, answer) in (0..).zip(ask(host, file, Duration::from_secs(20)).await) {
        match answer {
            Answer::Output(output) => assert_eq!(output, number + 7, "{how}"),
            Answer::Silent => {
                assert!(in_the_log(file), "{how}: it-{number} does not end, and nobody is told why");
                told += 1;
            }
            Answer::Told(error) => {
                assert!(error.contains(file), "{how}: {error}");
                assert!(error.contains("damaged") && error.contains("restore a backup"), "{how}: {error}");
                told += 1;
            }
        }
    }
    told
}

/// Does to a file what its program does not know of.
fn damage(file: &str, how: &str) {
    let length = std::fs::metadata(file).unwrap().len();
    let page = 4096;
    let middle = length / page / 4;
    let write = |from: u64, pages: u64, what: &str| {
        // By another program: this one would lose its locks if it closed the file.
        let what =
            format!("yes '{what}' | dd of={file} bs={page} seek={from} count={pages} conv=notrunc iflag=fullblock");
        assert!(Command::new("sh").args(["-c", &what]).output().unwrap().status.success());
    };
    let cut = |length: u64| {
        let size = format!("--size={length}");
        assert!(Command::new("truncate").args([&size, file]).status().unwrap().success());
    };
    match how {
        "cut in half" => cut(length / page / 2 * page),
        "cut within a page" => cut(length / 2 / page * page + 1000),
        "cut to its first page" => cut(page),
        "cut within its first page" => cut(100),
        "written over in the middle" => write(middle, middle * 2, "something else"),
        "written over at its beginning" => write(0, 1, "something else"),
        "written over but for its beginning" => write(1, length / page - 1, "something else"),
        other => panic!("{other}"),
    }
}

const DAMAGES: [&str; 7] = [
    "cut in half",
    "cut within a page",
    "cut to its first page",
    "cut within its first page",
    "written over in the middle",
    "written over at its beginning",
    "written over but for its beginning",
];

fn begun(effects: &Effects) -> usize {
    effects.all().len()
}

/// While no program runs.
#[test]
fn a_file_that_is_damaged_when_it_is_opened() {
    run(async {
        let effects = Effects::default();
        let sound = waiting(&effects).await;
        for how in DAMAGES {
            let damaged = copy(&sound).await;
            damage(&damaged.path(), how);
            let before = std::fs::read(damaged.path()).unwrap();
            match Sqlite::open(damaged.path()).await {
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(&damaged.path()) && error.contains("damaged"), "{how}: {error}");
                    assert!(before == std::fs::read(damaged.path()).unwrap(), "{how}: it was changed");
                    println!("{how}: not opened");
                }
                Ok(_) => {
                    let host = host(&damaged, &effects).await;
                    let told = told(&host, &damaged.path(), how).await;
                    println!("{how}: {told} told");
                    assert!(told > 0, "{how}");
                }
            }
            assert_eq!(begun(&effects), MANY as usize, "{how}: a step ran again");
        }
        let host = host(&sound, &effects).await;
        assert_eq!(told(&host, "nobody is", "sound").await, 0);
    });
}

/// Beneath a program that runs. Started again on a backup, it goes on from there.
#[test]
fn a_file_that_is_damaged_beneath_a_program() {
    run(async {
        let effects = Effects::default();
        let sound = waiting(&effects).await;
        let damages = if long() { &DAMAGES[..] } else { &DAMAGES[1..5] };
        for how in damages {
            let damaged = copy(&sound).await;
            let one = host(&damaged, &effects).await;
            damage(&damaged.path(), how);
            let told = told(&one, &damaged.path(), how).await;
            println!("{how}: {told} told");
            assert!(told > 0, "{how}");
            assert_eq!(begun(&effects), MANY as usize, "{how}: a step ran again");
        }
        let host = host(&sound, &effects).await;
        assert_eq!(told(&host, "nobody is", "sound").await, 0);
    });
}

// --- At random -----------------------------------------------------------------------------------------------------

/// Where there are pages in a file: the first one, and from one to the next.
struct Pages {
    first: u64,
    stride: u64,
}

const PAGE: u64 = 4096;
const OF_THE_FILE: Pages = Pages { first: 0, stride: PAGE };
/// Behind the journal's header, each behind a header of its own.
const OF_THE_JOURNAL: Pages = Pages { first: 32 + 24, stride: 24 + PAGE };

#[derive(Clone, Copy, Debug, PartialEq)]
enum AtRandom {
    /// Pages of zeros: writes that never came.
    Pages,
    /// Sectors of something else.
    Sectors,
    /// Some bits are not what they were.
    Bits,
    /// All of it is something else.
    All,
    /// The end is missing.
    Cut,
}

impl AtRandom {
    /// Does it to a file which programs have open.
    fn hit(self, file: &str, pages: &Pages, random: &mut Random) {
        const SECTOR: u64 = 512;
        // Not closed again: that would let go of the locks that SQLite has on the file in this program.
        let opened = ManuallyDrop::new(OpenOptions::new().read(true).write(true).open(file).unwrap());
        let write = |at: u64, bytes: &[u8]| opened.write_all_at(bytes, at).unwrap();
        let length = opened.metadata().unwrap().len();
        let noise = |random: &mut Random, length: u64| (0..length).map(|_| random.below(256) as u8).collect::<Vec<_>>();
        match self {
            Self::Pages => {
                for _ in 0..=random.below(length / PAGE / 20) {
                    let page = random.below((length - pages.first) / pages.stride);
                    write(pages.first + page * pages.stride, &[0; PAGE as usize]);
                }
            }
            Self::Sectors => {
                for _ in 0..=random.below(length / PAGE / 20) {
                    let at = random.below(length / SECTOR) * SECTOR;
                    write(at, &noise(random, SECTOR));
                }
            }
            Self::Bits => {
                for _ in 0..=random.below(length / PAGE) {
                    let (at, mut byte) = (random.below(length), [0]);
                    opened.read_exact_at(&mut byte, at).unwrap();
                    write(at, &[byte[0] ^ 1 << random.below(8)]);
                }
            }
            Self::All => write(0, &noise(random, length)),
            Self::Cut => opened.set_len(random.below(length)).unwrap(),
        }
    }
}

/// What a process and the record of its first step are; `None` if there is no such thing, `Err` if it cannot be read.
type Row = Result<Option<Vec<u8>>, String>;

/// What a connection of the test's own reads.
async fn rows(connection: &mut SqliteConnection) -> Vec<Row> {
    const ROW: &str = "
        SELECT CAST(concat_ws('|', p.run, p.kind, p.status, p.claim, p.signals, p.input, p.created_at, s.op, s.state,
            s.payload) AS BLOB)
        FROM durable_processes p
        JOIN durable_steps s ON s.run = p.run AND s.scope = 0 AND s.name = 'first' AND s.key = ''
        WHERE p.namespace = 'default' AND p.id = ? AND p.current = 1";
    let mut rows = Vec::new();
    for number in 0..MANY {
        let row = sqlx::query_scalar(ROW).bind(format!("it-{number}")).fetch_optional(&mut *connection).await;
        rows.push(row.map_err(|error| error.to_string()));
    }
    rows
}

/// A connection that knows the tables, as the host's do, and has read nothing of what is in them.
async fn reader(of: &SqliteFile) -> SqliteConnection {
    let mut connection = of.connection().await;
    sqlx::query("SELECT count(*) FROM durable_audit").fetch_one(&mut connection).await.unwrap();
    connection
}

/// How many panics there were in this program.
fn panics() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static COUNTING: Once = Once::new();
    COUNTING.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            told(panic);
        }));
    });
    PANICS.load(Ordering::Relaxed)
}

/// Damages a file beneath a host whose processes wait, and sends everybody its message. Says how many processes it hurt.
///
/// Whoever can be read as before gets the right answer or none, and of whoever cannot be read no step runs again, which is
/// told unless the host had it in its memory. Of a process that is another one now, or gone, only that is known which pages
/// of zeros did: SQLite does not notice it.
async fn hurt(damaged: &SqliteFile, host: &Host, effects: &Effects, kind: AtRandom, journal: bool, seed: u64) -> usize {
    let before = rows(&mut reader(damaged).await).await;
    assert!(before.iter().all(|row| matches!(row, Ok(Some(_)))));
    let mut reader = reader(damaged).await;
    let (file, pages) = if journal { ("-wal", OF_THE_JOURNAL) } else { ("", OF_THE_FILE) };
    // Seeds next to each other begin alike.
    let mut random = Random(seed << 32);
    kind.hit(&(damaged.path() + file), &pages, &mut random);
    let after = rows(&mut reader).await;
    let ran = begun(effects);
    let patience = Duration::from_secs(if kind == AtRandom::Pages { 20 } else { 2 });
    let answers = ask(host, &damaged.path(), patience).await;
    let again = effects.all().split_off(ran);
    let in_the_log = in_the_log(&damaged.path());
    let mut hurt = 0;
    for (number, answer) in (0..).zip(&answers) {
        let what = format!("{kind:?} of {file:?}, seed {seed}: it-{number}");
        let (before, after) = (&before[number as usize], &after[number as usize]);
        let is_right = matches!(answer, Answer::Output(output) if *output == number + 7);
        let is_told = in_the_log || matches!(answer, Answer::Told(_));
        hurt += usize::from(!is_right);
        if kind == AtRandom::Pages || after.is_err() {
            assert!(is_right || is_told, "{what}: nobody is told");
        }
        let is_another = matches!(after, Ok(row) if Ok(row) != before.as_ref());
        if !is_another {
            assert!(!again.contains(&format!("first {number}")), "{what}: its step ran again");
            assert!(is_right || !matches!(answer, Answer::Output(_)), "{what}: a wrong answer");
        }
    }
    hurt
}

fn seeds(short: u64) -> std::ops::Range<u64> {
    0..if long() { 30 } else { short }
}

/// Beneath a program that runs.
#[test]
fn a_file_that_is_damaged_at_random() {
    run(async {
        let before = panics();
        let effects = Effects::default();
        let sound = waiting(&effects).await;
        let (mut rounds, mut hits) = (0, 0);
        for seed in seeds(3) {
            for kind in [AtRandom::Pages, AtRandom::Sectors, AtRandom::Bits] {
                let damaged = copy(&sound).await;
                let host = host(&damaged, &effects).await;
                rounds += 1;
                hits += usize::from(hurt(&damaged, &host, &effects, kind, false, seed).await > 0);
            }
        }
        assert!(hits * 2 > rounds, "most did no harm: {hits} of {rounds} did");
        assert_eq!(panics(), before);
    });
}

/// The same of its journal, where all is that it has written: nobody has moved any of it into the file.
#[test]
fn a_journal_that_is_damaged_at_random() {
    run(async {
        let before = panics();
        let effects = Effects::default();
        let (mut rounds, mut hits) = (0, 0);
        for seed in seeds(2) {
            for kind in [AtRandom::Pages, AtRandom::Sectors, AtRandom::Bits, AtRandom::All, AtRandom::Cut] {
                let damaged = SqliteFile::new().await;
                let one = host(&damaged, &effects).await;
                // As long as somebody reads what was there at the beginning, what came later stays in the journal.
                let mut first = damaged.connection().await;
                first.execute("BEGIN").await.unwrap();
                first.execute("SELECT count(*) FROM durable_processes").await.unwrap();
                all_wait(&one).await;
                one.shutdown(Duration::from_secs(5)).await;
                // One that has nothing of it in its memory.
                let host = host(&damaged, &effects).await;
                drop(first);
                rounds += 1;
                hits += usize::from(hurt(&damaged, &host, &effects, kind, true, seed).await > 0);
            }
        }
        assert!(hits * 2 > rounds, "most did no harm: {hits} of {rounds} did");
        assert_eq!(panics(), before);
    });
}

/// SQLite reads what is left of a page as if there were nothing else on it. Nobody is told that a process is not there.
#[test]
fn a_file_that_ends_within_a_page() {
    run(async {
        let sound = waiting(&Effects::default()).await;
        let pages = std::fs::metadata(sound.path()).unwrap().len() / PAGE;
        let mut told = 0;
        for page in (1..pages).step_by(if long() { 1 } else { 7 }) {
            let cut = copy(&sound).await;
            let storage = cut.storage().await;
            // In its journal, so that the file need not be as long as it says.
            cut.execute("UPDATE durable_processes SET reason = 'changed' WHERE id = 'it-0'").await;
            let size = format!("--size={}", page * PAGE + 1000);
            assert!(Command::new("truncate").args([&size, &cut.path()]).status().unwrap().success());
            for number in 0..MANY {
                match storage.find("default", &format!("it-{number}"), None).await {
                    Ok(found) => assert!(found.is_some(), "page {page}: it-{number} is not there"),
                    Err(error) => {
                        let error = error.to_string();
                        assert!(error.contains(&cut.path()) && error.contains("damaged"), "{error}");
                        told += 1;
                    }
                }
            }
            let error = Sqlite::open(cut.path()).await.unwrap_err().to_string();
            assert!(error.contains(&cut.path()) && error.contains("damaged"), "{error}");
        }
        println!("{told} told of {pages} pages");
        assert!(told > 0);
    });
}

/// A database that is gone while its journal is there is no new one.
#[test]
fn a_file_that_is_gone_and_has_left_its_journal() {
    run(async {
        let effects = Effects::default();
        let sound = waiting(&effects).await;
        let journal = b"what is not in the database yet";
        for gone in [true, false] {
            let left = copy(&sound).await;
            std::fs::write(left.path() + "-wal", journal).unwrap();
            if gone {
                std::fs::remove_file(left.path()).unwrap();
            } else {
                OpenOptions::new().write(true).truncate(true).open(left.path()).unwrap();
            }
            for open in [Sqlite::open(left.path()), Sqlite::open(format!("sqlite://{}", left.path()))] {
                let error = open.await.unwrap_err().to_string();
                assert!(error.contains(&left.path()) && error.contains("-wal") && error.contains("restore"), "{error}");
            }
            assert_eq!(std::fs::read(left.path() + "-wal").unwrap(), journal);
            assert_eq!(Path::new(&left.path()).exists(), !gone);
        }
    });
}

/// A journal that is deleted beneath programs which write: what they had is saved, nothing more is recorded, and after they
/// have been killed and started again nothing is missing.
#[test]
fn a_journal_that_is_deleted_beneath_programs() {
    run(async {
        for programs in [1, 2] {
            let scene = Scene::<SqliteFile>::new(WORKER, 150, Duration::from_millis(40)).await;
            let mut workers: Vec<Worker> = (0..programs).map(|_| scene.start(None)).collect();
            scene.until_begun(200).await;
            std::fs::remove_file(scene.backend.path() + "-wal").unwrap();
            let mut begun = 0;
            while begun != scene.begun() {
                begun = scene.begun();
                tokio::time::sleep(Duration::from_millis(600)).await;
            }
            assert!(workers.iter_mut().all(|worker| worker.ended().is_none()), "they went on");
            drop(workers);
            assert!(scene.start(None).wait(LONG), "a worker failed");
            scene.check().await;
        }
    });
}

/// Whoever asks is told of it. The same of the database itself.
#[test]
fn a_file_that_is_deleted_beneath_a_program() {
    run(async {
        let effects = Effects::default();
        for (suffix, todo) in [("-wal", "start them again"), ("", "restore it")] {
            let backend = SqliteFile::new().await;
            let host = host(&backend, &effects).await;
            let spawn = async |number| {
                let input = Input { number, ballast: String::new() };
                host.spawn(IT, number.to_string(), &input).await
            };
            spawn(0).await.unwrap();
            let gone = backend.path() + suffix;
            std::fs::remove_file(&gone).unwrap();
            let (mut number, mut told) = (0, String::new());
            until("it is told, if not at once", async || match spawn(number).await {
                Ok(_) => {
                    number += 1;
                    false
                }
                Err(error) => {
                    told = error.to_string();
                    true
                }
            })
            .await;
            assert!(told.contains(&gone) && told.contains(todo), "{told}");
        }
    });
}
