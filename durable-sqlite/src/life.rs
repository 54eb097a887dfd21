//! The proof that an instance lives: a lock on a file of its own beside the database, which the operating system
//! releases when the program dies. (Not a process id: two containers may share a disk and not their ids.)

use durable_core::storage::{InstanceId, LockState, Result, StorageError};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where the lock files of a database are.
#[derive(Clone, Debug)]
pub(crate) struct Lives(PathBuf);

/// Held as long as the instance lives.
pub(crate) struct Life {
    _locked: File,
}

impl Lives {
    pub(crate) fn beside(database: &Path) -> Self {
        let mut name = database.as_os_str().to_owned();
        name.push("-instances");
        Self(name.into())
    }

    fn file(&self, instance: InstanceId) -> PathBuf {
        self.0.join(format!("{instance}.lock"))
    }

    /// Takes an instance's lock.
    pub(crate) fn begin(&self, instance: InstanceId) -> Result<Life> {
        let path = self.file(instance);
        let failed = |e: std::io::Error| StorageError::unavailable(format!("no lock file {}: {e}", path.display()));
        std::fs::create_dir_all(&self.0).map_err(failed)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        file.try_lock()
            .map_err(|error| StorageError::unavailable(format!("no lock on {}: {error}", path.display())))?;
        Ok(Life { _locked: file })
    }

    /// Whether the instance's lock is held. Looked at with a shared lock, so that two that look at the same time do
    /// not take each other for the owner.
    pub(crate) fn look(&self, instance: InstanceId) -> LockState {
        let file = match OpenOptions::new().read(true).open(self.file(instance)) {
            Ok(file) => file,
            // Somebody has tidied up, or the folder is another one here: that proves nothing.
            Err(_) => return LockState::Unknown,
        };
        match file.try_lock_shared() {
            Ok(()) => LockState::Free,
            Err(TryLockError::WouldBlock) => LockState::Held,
            Err(TryLockError::Error(_)) => LockState::Unknown,
        }
    }

    /// Removes the lock file of an instance that is gone.
    pub(crate) fn remove(&self, instance: InstanceId) {
        if let Err(error) = std::fs::remove_file(self.file(instance))
            && error.kind() != ErrorKind::NotFound
        {
            tracing::debug!("the lock file of instance {instance} stays: {error}");
        }
        // Only an empty folder goes.
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_seen_until_it_ends() {
        let folder = std::env::temp_dir().join(format!("durable-{}", InstanceId::new()));
        let lives = Lives::beside(&folder);
        let (one, other) = (InstanceId::new(), InstanceId::new());
        let life = lives.begin(one).unwrap();
        assert_eq!(lives.look(one), LockState::Held);
        assert_eq!(lives.look(other), LockState::Unknown);
        assert!(lives.begin(one).is_err(), "a second one of the same");
        drop(life);
        assert_eq!(lives.look(one), LockState::Free);
        assert_eq!(lives.look(one), LockState::Free, "looking leaves no lock behind");
        lives.remove(one);
        assert_eq!(lives.look(one), LockState::Unknown);
    }
}
