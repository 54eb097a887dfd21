//! SQLite files that somebody has cut short or written over, while a program runs or while none does: whoever asks is told
//! which file is damaged and what to do, nobody is told what is not so, and no step runs again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::Storage;
use durable_core::*;
use durable_tests::crash::scene::{LONG, Scene};
use durable_tests::crash::worker::Worker;
use durable_tests::*;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

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

/// A file with many processes that wait for a message, which nobody has open.
async fn waiting(effects: &Effects) -> SqliteFile {
    let backend = SqliteFile::new().await;
    let host = host(&backend, effects).await;
    for number in 0..MANY {
        let input = Input { number, ballast: "ballast ".repeat(150) };
        host.spawn(IT, format!("it-{number}"), &input).await.unwrap();
    }
    until("all are parked", async || host.in_memory() == 0).await;
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

/// Sends everybody its message. Says how many were told of the damage; all others are right.
async fn told(host: &Host, file: &str, how: &str) -> usize {
    let asked: Vec<_> = (0..MANY)
        .map(|number| {
            let handle = host.get(format!("it-{number}")).of(IT);
            tokio::spawn(async move {
                handle.raise(GO, &7).await.map_err(|error| error.to_string())?;
                handle.status().await.map_err(|error| error.to_string())?;
                match tokio::time::timeout(Duration::from_secs(4), handle.output()).await {
                    Ok(output) => Ok(Some((number, output.map_err(|error| error.to_string())?))),
                    // Nobody could read it: that is told to the log.
                    Err(_) => Ok(None),
                }
            })
        })
        .collect();
    let mut told = 0;
    for answer in asked {
        match answer.await.unwrap() {
            Ok(Some((number, output))) => assert_eq!(output, number + 7),
            Ok(None) => {}
            Err::<_, String>(error) => {
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
            assert_eq!(begun(&effects), MANY as usize, "{how}: a step ran again");
        }
        let host = host(&sound, &effects).await;
        assert_eq!(told(&host, "nobody is", "sound").await, 0);
    });
}

/// SQLite reads what is left of a page as if there were nothing else on it. Nobody is told that a process is not there.
#[test]
fn a_file_that_ends_within_a_page() {
    run(async {
        const PAGE: u64 = 4096;
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
