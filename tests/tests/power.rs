//! Power that fails beneath SQLite at any moment: what was on the disk by then opens, is whole, holds every step that had
//! been acknowledged, and is gone on from.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_tests::crash::journal::{Line, What};
use durable_tests::crash::scene::{LONG, Random, Scene};
use durable_tests::crash::shared::read;
use durable_tests::disk::Disk;
use durable_tests::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const WORKER: &str = env!("CARGO_BIN_EXE_worker");

fn failures() -> u64 {
    if long() { 150 } else { 6 }
}

/// How many steps must have been acknowledged before the failures, all of them together, for them to tell anything.
fn acknowledged() -> usize {
    if long() { 10_000 } else { 100 }
}

fn returned(lines: &[Line]) -> usize {
    lines.iter().filter(|line| matches!(line.what, What::Returned { .. })).count()
}

/// What a power failure leaves opens, is whole and has whatever had returned; a program that is started on it ends
/// everything as if nothing had been.
async fn goes_on(scene: Scene<SqliteFile>, what: &str) {
    assert_eq!(scene.backend.texts("PRAGMA integrity_check").await, ["ok"], "{what}");
    let (records, _) = read(&scene.backend).await;
    let recorded: BTreeSet<_> = records.iter().map(|record| (&*record.id, &*record.step)).collect();
    let lines = scene.lines();
    let returned = lines.iter().filter_map(|line| match &line.what {
        What::Returned { step } => Some((&*line.id, &**step)),
        _ => None,
    });
    let lost: BTreeSet<_> = returned.filter(|step| !recorded.contains(step)).collect();
    assert!(lost.is_empty(), "{what}: acknowledged and lost: {lost:?}");
    assert!(scene.start(None).wait(LONG), "{what}: a worker failed");
    scene.check().await;
}

// --- The disk's blocks ---------------------------------------------------------------------------------------------

/// The blocks that have arrived on the disk while a program writes: a write that nobody has waited for is not among them.
#[test]
fn the_blocks_of_a_disk() {
    const WHAT: &str = "power failures of a disk";
    let disk = match Disk::in_a_file() {
        Ok(disk) => disk,
        Err(why) => return not_run(WHAT, &why),
    };
    run(async {
        let mut random = Random(1);
        let (mut held, mut failed) = (0, 0);
        while failed < failures() {
            let folder = tempfile::tempdir_in(disk.folder()).unwrap();
            let scene = Scene::on(SqliteFile::within(folder.path()), WORKER, 150, Duration::from_millis(3));
            let mut worker = scene.start(None);
            scene.until_begun(1).await;
            while worker.ended().is_none() && failed < failures() {
                tokio::time::sleep(Duration::from_millis(random.below(120))).await;
                worker.stop();
                let left = disk.after_power_loss();
                let within = left.folder().join(folder.path().file_name().unwrap());
                let copy = scene.copied_to(SqliteFile::within(&within));
                held += returned(&copy.lines());
                goes_on(copy, &format!("failure {failed}")).await;
                worker.signal("CONT");
                failed += 1;
            }
        }
        println!("{failed} power failures, {held} steps acknowledged before them");
        assert!(held > acknowledged(), "too few steps acknowledged before: {held}");
    });
}

// --- The files -----------------------------------------------------------------------------------------------------

/// Another program copies the database and its write-ahead journal while a program writes. What of the journal had not been
/// synced is cut short or lost, and pages that a checkpoint may be writing are torn.
#[test]
fn the_files_and_their_tail() {
    const WHAT: &str = "power failures that cut a journal";
    if !Path::new("/proc/self/task").exists() {
        return not_run(WHAT, "there is no /proc to tell that a program stands still");
    }
    run(async {
        let seed = u64::from(std::process::id());
        println!("seed {seed}");
        let mut random = Random(seed);
        let (mut held, mut failed, mut cut) = (0, 0, 0);
        while failed < failures() {
            let scene = Scene::<SqliteFile>::new(WORKER, 150, Duration::from_millis(3)).await;
            let mut worker = scene.start(None);
            scene.until_begun(1).await;
            while worker.ended().is_none() && failed < failures() {
                tokio::time::sleep(Duration::from_millis(random.below(120))).await;
                worker.stop();
                let (mut folder, mut tail) = copied(&scene.backend);
                // Few moments are between a write and the end of its sync: two failures of three wait for one of them.
                while failed % 3 > 0 && !tail.is_unsynced() && worker.ended().is_none() {
                    worker.signal("CONT");
                    tokio::time::sleep(Duration::from_micros(random.below(3000))).await;
                    worker.stop();
                    (folder, tail) = copied(&scene.backend);
                }
                if worker.ended().is_some() {
                    break;
                }
                let copy = scene.copied_to(SqliteFile::within(folder.path()));
                held += returned(&copy.lines());
                cut += u64::from(tail.lose(&mut random));
                goes_on(copy, &format!("seed {seed}, failure {failed}")).await;
                worker.signal("CONT");
                failed += 1;
            }
        }
        println!("{failed} power failures, {cut} of which lost what was not synced; {held} steps acknowledged before");
        assert!(held > acknowledged(), "too few steps acknowledged before: {held}");
        assert!(cut >= failures() / 3, "too little was lost: {cut} times of {failed}");
    });
}

/// A copy of a database with whatever is beside it, and what is not safe yet there.
fn copied(database: &SqliteFile) -> (tempfile::TempDir, Tail) {
    let to = tempfile::tempdir().unwrap();
    let path = PathBuf::from(database.path());
    let everything = format!("{}/.", path.parent().unwrap().display());
    assert!(std::process::Command::new("cp").arg("-r").arg(everything).arg(to.path()).status().unwrap().success());
    let tail = Tail::of(to.path());
    (to, tail)
}

/// What is not safe yet of a database and its journal. SQLite's index of the journal tells: a commit is entered there once
/// its frames are synced.
struct Tail {
    folder: PathBuf,
    journal: Vec<u8>,
    page: usize,
    /// How many frames are synced; none if the journal is about to begin anew, and must not be touched.
    synced: Option<usize>,
}

impl Tail {
    const HEADER: usize = 32;

    /// Of a copy, whose index goes: it is memory.
    fn of(folder: &Path) -> Self {
        let index = folder.join("test.db-shm");
        // Both are gone if the program has ended.
        let memory = std::fs::read(&index).unwrap_or_default();
        let _ = std::fs::remove_file(index);
        let journal = std::fs::read(folder.join("test.db-wal")).unwrap_or_default();
        let number = |at: usize| u32::from_be_bytes(journal[at..at + 4].try_into().unwrap()) as usize;
        let same = journal.len().min(memory.len()) > Self::HEADER && memory[32..40] == journal[16..24];
        let synced = same.then(|| u32::from_ne_bytes(memory[16..20].try_into().unwrap()) as usize);
        let page = if journal.len() < Self::HEADER { 0 } else { number(8) };
        Self { folder: folder.to_owned(), page, synced, journal }
    }

    /// Whether there are frames of which nobody was told that they are safe.
    fn is_unsynced(&self) -> bool {
        self.synced.is_some_and(|synced| self.end() > self.frame(synced))
    }

    /// Where a frame begins.
    fn frame(&self, number: usize) -> usize {
        Self::HEADER + number * (24 + self.page)
    }

    /// Where the frames end that were written since the journal began anew; what is behind them was in the database before.
    fn end(&self) -> usize {
        let salt = &self.journal[16..24];
        let is_new = |number: &usize| {
            self.journal.get(self.frame(*number)..).is_some_and(|frame| frame.get(8..16) == Some(salt))
        };
        let frames = (0..).take_while(is_new).count();
        self.frame(frames).min(self.journal.len())
    }

    /// Loses some of it. Says whether any of that had been written since the journal began anew.
    fn lose(mut self, random: &mut Random) -> bool {
        let Some(synced) = self.synced else { return false };
        self.tear(synced, random);
        let from = self.frame(synced);
        let before = self.journal[..self.end()].to_vec();
        // Within what is new, if anything is.
        let length = if self.is_unsynced() { self.end() } else { self.journal.len() } - from;
        let place = |random: &mut Random| from + random.below(length as u64 + 1) as usize;
        let (one, other) = (place(random), place(random));
        match random.below(3) {
            0 => self.journal.truncate(one),
            1 => self.journal[one.min(other)..one.max(other)].fill(0),
            _ => self.journal[one.min(other)..one.max(other)].fill(0xa5),
        }
        std::fs::write(self.folder.join("test.db-wal"), &self.journal).unwrap();
        !self.journal.starts_with(&before)
    }

    /// Tears pages of the database that are in the journal: what is there counts, until the journal begins anew.
    fn tear(&self, synced: usize, random: &mut Random) {
        const SECTOR: u64 = 512;
        let path = self.folder.join("test.db");
        let mut database = std::fs::read(&path).unwrap();
        for frame in 0..synced {
            let at = self.frame(frame);
            let page = u32::from_be_bytes(self.journal[at..at + 4].try_into().unwrap()) as usize;
            let begin = (page - 1) * self.page;
            // The first one tells a reader that there is a journal.
            if page > 1 && begin < database.len() && random.below(3) == 0 {
                let sectors = random.below(self.page as u64 / SECTOR) * SECTOR;
                database[begin..begin + sectors as usize].fill(0x5a);
            }
        }
        std::fs::write(path, database).unwrap();
    }
}
