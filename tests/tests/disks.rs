//! SQLite on disks that are full, read-only or fail, and files that somebody has cut short, written over or deleted. What
//! is recorded stays, nobody is told what is not so, and when the trouble has gone everything goes on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::storage::StorageError;
use durable_core::*;
use durable_tests::crash::scene::{LONG, Scene};
use durable_tests::crash::worker::Worker;
use durable_tests::disk::{Disk, can, immutable, longest_file, mode, wrapped};
use durable_tests::*;
use std::path::{Path, PathBuf};
use std::time::Duration;

const WORKER: &str = env!("CARGO_BIN_EXE_worker");
const GO: Event<u32> = Event::new("Go");
const IT: Definition<u32, u32> = Definition::new("it");

async fn it(proc: Process, input: u32) -> Result<u32, Failure> {
    let first = proc.step("first", || async { Ok::<_, Failure>(input) }).await?;
    let second = proc.event(GO).await?;
    Ok(proc.step("last", || async { Ok::<_, Failure>(first + second) }).await?)
}

/// Runs a test on such a disk, or says why it does not.
fn on<T: Future<Output = ()>>(what: &str, disk: Result<Disk, String>, test: impl FnOnce(Disk) -> T) {
    match disk {
        Ok(disk) => run(test(disk)),
        Err(why) => not_run(what, &why),
    }
}

/// How often trouble comes and goes.
fn rounds() -> usize {
    if long() { 15 } else { 3 }
}

// --- Full ----------------------------------------------------------------------------------------------------------

/// Calls from outside are told, nothing is lost, and it goes on once there is room.
#[test]
fn a_full_disk() {
    on("a full disk", Disk::small("2m"), async |disk| {
        let path = disk.folder().join("full.db");
        let storage = Sqlite::open(path.to_str().unwrap()).await.unwrap();
        let builder = Host::builder(storage).call_timeout(Duration::from_millis(1500));
        let host = builder.register(IT, it).start().await.unwrap();
        let first = host.spawn(IT, "first", &1).await.unwrap();
        disk.fill();
        let mut told = None;
        for n in 0..200 {
            if let Err(error) = host.spawn(IT, format!("it-{n}"), &n).await {
                told = Some((n, error.to_string()));
                break;
            }
        }
        let (n, error) = told.expect("the disk is never full");
        assert!(error.contains("full") && error.contains("may be made again"), "{error}");
        disk.free();
        host.spawn(IT, format!("it-{n}"), &n).await.unwrap();
        first.raise(GO, &1).await.unwrap();
        assert_eq!(first.output().await.unwrap(), 2);
        for m in 0..=n {
            let handle = host.get(format!("it-{m}")).of(IT);
            handle.raise(GO, &1).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), m + 1);
        }
    });
}

/// Waits until no attempt begins any more, although there is work left.
async fn until_it_stands(scene: &Scene<SqliteFile>, workers: &mut [Worker]) {
    let mut begun = 0;
    while begun != scene.begun() {
        begun = scene.begun();
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    assert!(workers.iter_mut().all(|worker| worker.ended().is_none()), "they ended before anything went wrong");
}

/// Two programs, and a disk that becomes full again and again beneath them.
#[test]
fn a_disk_that_becomes_full_again_and_again() {
    on("a full disk", Disk::small("16m"), async |disk| {
        let processes = 60 * rounds() as u32;
        let scene = Scene::on(SqliteFile::within(disk.folder()), WORKER, processes, Duration::from_millis(40));
        let mut workers = [scene.start(None), scene.start(None)];
        for round in 1..=rounds() {
            scene.until_begun(round * 60).await;
            disk.fill();
            until_it_stands(&scene, &mut workers).await;
            disk.free();
        }
        ended_well(workers);
        scene.check().await;
        whole(&scene.backend).await;
    });
}

fn ended_well(workers: impl IntoIterator<Item = Worker>) {
    for mut worker in workers {
        assert!(worker.wait(LONG), "a worker failed");
    }
}

async fn whole(backend: &SqliteFile) {
    assert_eq!(backend.texts("PRAGMA integrity_check").await, ["ok"]);
}

/// Files that may not become longer than a limit, again and again, beneath two programs: whatever the system says to that,
/// they wait, and go on by themselves. It is no full disk (SQLite calls it an error of the disk's), but needs no root.
#[test]
fn files_that_may_not_grow() {
    const WHAT: &str = "files that may not grow";
    // More than the test's own journal needs, less than SQLite's when it begins anew.
    const LIMIT: u64 = 1 << 20;
    if let Err(why) = can("prlimit", &["--fsize=1000000:", "true"]) {
        return not_run(WHAT, &why);
    }
    run(async {
        let folder = tempfile::tempdir().unwrap();
        // A write beyond it is to be an error, not a signal that ends the program.
        let worker = wrapped(folder.path(), &format!("trap '' XFSZ\nexec '{WORKER}' \"$@\""));
        let processes = 60 * rounds() as u32;
        let scene = Scene::<SqliteFile>::new(worker, processes, Duration::from_millis(40)).await;
        let mut workers = [scene.start(None), scene.start(None)];
        for round in 1..=rounds() {
            scene.until_begun(round * 60).await;
            workers.iter().for_each(|worker| longest_file(worker.id(), Some(LIMIT)).unwrap());
            until_it_stands(&scene, &mut workers).await;
            workers.iter().for_each(|worker| longest_file(worker.id(), None).unwrap());
        }
        ended_well(workers);
        scene.check().await;
        whole(&scene.backend).await;
    });
}

// --- Read-only -----------------------------------------------------------------------------------------------------

/// A file system that is read-only when the program starts: it says so, and changes nothing.
#[test]
fn a_read_only_file_system() {
    on("a read-only file system", Disk::small("4m"), async |disk| {
        let backend = SqliteFile::within(disk.folder());
        let host = quick(&backend).await.register(IT, it).start().await.unwrap();
        let handle = host.spawn(IT, "it", &1).await.unwrap();
        until("it is parked", async || host.in_memory() == 0).await;
        host.shutdown(Duration::from_secs(5)).await;
        drop((handle, host));
        backend.closed().await;
        disk.read_only(true);
        let error = Sqlite::open(backend.path()).await.unwrap_err();
        assert!(matches!(error, StorageError::Unavailable(_)), "{error:?}");
        let error = error.to_string();
        assert!(error.contains(&backend.path()) && error.contains("writ"), "{error}");
        disk.read_only(false);
        let host = quick(&backend).await.register(IT, it).start().await.unwrap();
        let handle = host.get("it").of(IT);
        handle.raise(GO, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
    });
}

/// A file, or the folder of one, that this user may not write: the program says so, and changes nothing. Needs no root: who
/// is root does without what root may do.
#[test]
fn what_nobody_may_write() {
    const WHAT: &str = "files that may not be written";
    const AS_ANYBODY: [&str; 2] = ["--inh-caps=-all", "--bounding-set=-all"];
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|file| std::os::unix::fs::MetadataExt::uid(&file) == 0);
    if is_root && let Err(why) = can("setpriv", &[AS_ANYBODY[0], AS_ANYBODY[1], "true"]) {
        return not_run(WHAT, &why);
    }
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("told");
        let setpriv = if is_root { format!("setpriv {}", AS_ANYBODY.join(" ")) } else { String::new() };
        let worker =
            wrapped(folder.path(), &format!("exec {setpriv} '{WORKER}' \"$@\" 2>'{}'", told.to_str().unwrap()));
        let scene = Scene::<SqliteFile>::new(worker, 20, Duration::from_millis(5)).await;
        drop(scene.backend.storage().await);
        scene.backend.closed().await;
        let file = PathBuf::from(scene.backend.path());
        let before = std::fs::read(&file).unwrap();
        for (what, forbidden, allowed) in [(file.parent().unwrap(), 0o555, 0o755), (&*file, 0o444, 0o644)] {
            mode(what, forbidden);
            let ended_well = scene.start(None).wait(LONG);
            mode(what, allowed);
            // SQLite gives what it puts there the file's own mode.
            for beside in ["-wal", "-shm"].map(|suffix| scene.backend.path() + suffix) {
                if Path::new(&beside).exists() {
                    mode(beside.as_ref(), 0o644);
                }
            }
            let told = std::fs::read_to_string(&told).unwrap();
            // When it opens the file, not when it gives up waiting for a first answer.
            let says_so = told.contains(&format!("{} cannot be", scene.backend.path())) && told.contains("writ");
            assert!(!ended_well && says_so, "{what:?}: {told}");
            assert!(std::fs::read(&file).unwrap() == before, "{what:?}: it was changed");
        }
        ended_well([scene.start(None)]);
        scene.check().await;
    });
}

/// A disk that fails beneath two programs: none of them records anything from then on, and what was recorded is there when
/// they are started again on the disk that works.
#[test]
fn a_disk_that_fails() {
    on("a disk that fails", Disk::in_a_file(), async |disk| {
        let scene = Scene::on(SqliteFile::within(disk.folder()), WORKER, 60, Duration::from_millis(40));
        for round in 1..=rounds() {
            let mut workers = [scene.start(None), scene.start(None)];
            scene.until_begun(round * 60).await;
            disk.fail();
            let mut begun = 0;
            while begun != scene.begun() {
                begun = scene.begun();
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            workers.iter_mut().for_each(Worker::kill);
            disk.mount_again();
        }
        ended_well([scene.start(None)]);
        scene.check().await;
        whole(&scene.backend).await;
    });
}

/// Files that may not be written any more, for a while, beneath two programs that have them open: they go on by themselves.
#[test]
fn files_that_become_read_only() {
    on("files that become read-only", Disk::in_a_file(), async |disk| {
        let processes = 60 * rounds() as u32;
        let scene = Scene::on(SqliteFile::within(disk.folder()), WORKER, processes, Duration::from_millis(40));
        let mut workers = [scene.start(None), scene.start(None)];
        let path = scene.backend.path();
        let files = [path.clone(), path + "-wal"];
        for round in 1..=rounds() {
            scene.until_begun(round * 60).await;
            files.iter().for_each(|file| immutable(Path::new(file), true).unwrap());
            until_it_stands(&scene, &mut workers).await;
            files.iter().for_each(|file| immutable(Path::new(file), false).unwrap());
        }
        ended_well(workers);
        scene.check().await;
        whole(&scene.backend).await;
    });
}
