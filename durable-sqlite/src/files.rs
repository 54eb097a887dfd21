//! The database's file and its journal: whether they still are where they were opened, and whole as far as their length
//! tells. What is written to files that somebody has deleted is gone when the program ends.

use sqlx::sqlite::SqliteConnection;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::errors::damaged;
use crate::rows::get;
use crate::script::Script;
use crate::store::all;
use durable_core::storage::{Result, StorageError};

/// As they were opened.
pub(crate) struct Files {
    database: (PathBuf, Option<Id>),
    journal: (PathBuf, Option<Id>),
    /// The size of the database's pages.
    page: u64,
    /// The database itself has all that the journal had when it was missed.
    saved: AtomicBool,
    opened: Instant,
    /// When they were found as they should be, in microseconds since they were opened.
    looked: AtomicU64,
}

/// For how long a look at them is good enough for what is written.
const FRESH: Duration = Duration::from_millis(10);

/// No time at which they were looked at.
const NEVER: u64 = u64::MAX;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(NEVER)
}

/// What tells a file from another one in its place.
type Id = (u64, u64);

/// `None` where that is not known.
fn id(file: &Metadata) -> Option<Id> {
    #[cfg(unix)]
    return Some((std::os::unix::fs::MetadataExt::dev(file), std::os::unix::fs::MetadataExt::ino(file)));
    #[cfg(not(unix))]
    return file.is_file().then_some((0, 0));
}

impl Files {
    /// Of a database that is open, whose journal therefore stays.
    pub(crate) fn opened(database: &Path, journal: PathBuf, page: u64) -> Self {
        let known = |path: PathBuf| {
            let id = std::fs::metadata(&path).ok().as_ref().and_then(id);
            (path, id)
        };
        let (database, journal) = (known(database.to_owned()), known(journal));
        let (saved, opened, looked) = (AtomicBool::new(false), Instant::now(), AtomicU64::new(NEVER));
        Self { database, journal, page, saved, opened, looked }
    }

    pub(crate) fn journal(&self) -> &Path {
        &self.journal.0
    }

    /// A page of which a part is missing reads as if there were nothing on it. (Whole pages that are missing SQLite notices,
    /// and larger ones are written in parts.)
    fn is_cut(&self, database: &Metadata) -> bool {
        const PART: u64 = 512;
        !database.len().is_multiple_of(self.page.clamp(PART, 4096))
    }

    /// Whether what is read now is what was written, and what is written now stays.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        // If it is not as it should be, the next one looks as well.
        self.looked.store(NEVER, Ordering::Release);
        let at = self.opened.elapsed();
        let database = std::fs::metadata(&self.database.0);
        if database.as_ref().is_ok_and(|file| self.is_cut(file)) {
            return Err(damaged(&format!("{} ends within a page", self.database.0.display())));
        }
        let gone = |opened: &Option<Id>, now: std::io::Result<Metadata>| match now {
            Ok(now) => opened.is_some() && id(&now) != *opened,
            Err(error) => opened.is_some() && error.kind() == std::io::ErrorKind::NotFound,
        };
        let missing = if gone(&self.database.1, database) {
            &self.database.0
        } else if gone(&self.journal.1, std::fs::metadata(&self.journal.0)) {
            &self.journal.0
        } else {
            self.looked.store(micros(at), Ordering::Release);
            return Ok(());
        };
        let advice = if missing == self.journal() {
            "stop every program that uses the database, and start them again"
        } else {
            "stop every program that uses it, and restore it"
        };
        Err(format!(
            "{} was deleted or replaced beneath this program, so nothing is recorded any more; {advice}",
            missing.display()
        ))
    }

    /// The same for what is written: looked at no more often than [`FRESH`], for each look costs some percent of a small
    /// commit. What goes into a file in the moment after it was deleted is as lost as what went there in the moment before.
    pub(crate) fn check_now_and_then(&self) -> std::result::Result<(), String> {
        let looked = self.looked.load(Ordering::Acquire);
        let is_fresh = looked != NEVER && micros(self.opened.elapsed()).saturating_sub(looked) < micros(FRESH);
        if is_fresh { Ok(()) } else { self.check() }
    }

    /// The same before a connection writes. What it has in a journal that was deleted goes into the database, once.
    pub(crate) async fn admit(&self, connection: Option<&mut SqliteConnection>) -> Result<()> {
        // One that is opened now might begin a journal of its own, so then it must be certain.
        let checked = if connection.is_some() { self.check_now_and_then() } else { self.check() };
        let Err(why) = checked else { return Ok(()) };
        if let Some(connection) = connection
            && !self.saved.load(Ordering::Acquire)
        {
            let mut script = Script::default();
            script.add("PRAGMA wal_checkpoint(TRUNCATE)", []);
            let saved = script.run(connection).await;
            let busy = saved.ok().and_then(|answers| all(&answers).next().and_then(|row| get::<i64>(row, 0).ok()));
            self.saved.store(busy == Some(0), Ordering::Release);
            tracing::error!("{why}");
        }
        Err(StorageError::unavailable(why))
    }
}
