//! The database's file and its journal: whether they still are where they were opened, and whole as far as their length
//! tells. What is written to files that
//! somebody has deleted is gone when the program ends.

use sqlx::sqlite::SqliteConnection;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

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
}

/// What tells a file from another one in its place.
type Id = (u64, u64);

/// `None` where that is not known.
fn id(path: &Path) -> std::io::Result<Option<Id>> {
    let file = std::fs::metadata(path)?;
    #[cfg(unix)]
    return Ok(Some((std::os::unix::fs::MetadataExt::dev(&file), std::os::unix::fs::MetadataExt::ino(&file))));
    #[cfg(not(unix))]
    return Ok(file.is_file().then_some((0, 0)));
}

impl Files {
    /// Of a database that is open, whose journal therefore stays.
    pub(crate) fn opened(database: &Path, journal: PathBuf, page: u64) -> Self {
        let known = |path: PathBuf| {
            let id = id(&path).ok().flatten();
            (path, id)
        };
        Self { database: known(database.to_owned()), journal: known(journal), page, saved: AtomicBool::new(false) }
    }

    pub(crate) fn journal(&self) -> &Path {
        &self.journal.0
    }

    /// A page of which a part is missing reads as if there were nothing on it. (Whole pages that are missing SQLite notices,
    /// and larger ones are written in parts.)
    fn is_cut(&self) -> bool {
        const PART: u64 = 512;
        std::fs::metadata(&self.database.0).is_ok_and(|file| !file.len().is_multiple_of(self.page.clamp(PART, 4096)))
    }

    /// Which of them was deleted or replaced.
    fn missing(&self) -> Option<&Path> {
        let gone = |(path, opened): &(PathBuf, Option<Id>)| match id(path) {
            Ok(now) => now != *opened,
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        [&self.database, &self.journal].into_iter().find(|file| file.1.is_some() && gone(file)).map(|file| &*file.0)
    }

    /// Whether what is read now is what was written, and what is written now stays.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        if self.is_cut() {
            return Err(damaged(&format!("{} ends within a page", self.database.0.display())));
        }
        let Some(missing) = self.missing() else { return Ok(()) };
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

    /// The same before a connection writes. What it has in a journal that was deleted goes into the database, once.
    pub(crate) async fn admit(&self, connection: Option<&mut SqliteConnection>) -> Result<()> {
        let Err(why) = self.check() else { return Ok(()) };
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
