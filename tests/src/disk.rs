//! File systems of a test's own: one that becomes full, and one on a disk in a file, which fails or loses its power.
//! Mounting them needs root. And what any user can do to files and programs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system; unmounted when dropped.
pub struct Disk {
    _home: tempfile::TempDir,
    mounted: PathBuf,
    source: String,
    options: &'static str,
}

impl Disk {
    /// One in memory, of this size. Or why there is none.
    pub fn small(size: &'static str) -> Result<Self, String> {
        Self::new(|_| Ok("tmpfs".into()), size)
    }

    /// One on a disk in a file, of which every block that is written is known. It becomes read-only when it fails, and
    /// writes nothing by itself that a program has not asked for.
    pub fn in_a_file() -> Result<Self, String> {
        const OPTIONS: &str = "loop,errors=remount-ro,commit=300";
        let image = |home: &Path| {
            let image = home.join("image");
            std::fs::File::create(&image).and_then(|file| file.set_len(48 << 20)).map_err(|error| error.to_string())?;
            done(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
            Ok(text(&image))
        };
        Self::new(image, OPTIONS)
    }

    fn new(source: impl FnOnce(&Path) -> Result<String, String>, options: &'static str) -> Result<Self, String> {
        let home = tempfile::tempdir().unwrap();
        let mounted = home.path().join("mounted");
        std::fs::create_dir(&mounted).unwrap();
        let source = source(home.path())?;
        let disk = Self { _home: home, mounted, source, options };
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.mounted
    }

    fn mount(&self) -> Result<(), String> {
        let mut mount = Command::new("mount");
        if self.source == "tmpfs" {
            mount.args(["-t", "tmpfs", "-o", &format!("size={}", self.options)]);
        } else {
            mount.args(["-o", self.options]);
        }
        done(mount.arg(&self.source).arg(&self.mounted))
    }

    /// Unmounts it, and mounts it again: what had failed works again.
    pub fn mount_again(&self) {
        done(Command::new("umount").arg(&self.mounted)).unwrap();
        self.mount().unwrap();
    }

    /// Forbids writing, or allows it. No program may have a file open to write.
    pub fn read_only(&self, read_only: bool) {
        let option = if read_only { "remount,ro" } else { "remount,rw" };
        done(Command::new("mount").args(["-o", option]).arg(&self.mounted)).unwrap();
    }

    /// The file system finds an error, and becomes read-only beneath those who write.
    pub fn fail(&self) {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mounted = text(&self.mounted);
        let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(&mounted)).unwrap();
        let device = line.split(' ').next().unwrap().trim_start_matches("/dev/");
        std::fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "a test").unwrap();
    }

    /// A disk with what has arrived on this one so far, which its power loss leaves.
    pub fn after_power_loss(&self) -> Self {
        let copied = |home: &Path| {
            let image = home.join("image");
            std::fs::copy(&self.source, &image).map_err(|error| error.to_string())?;
            Ok(text(&image))
        };
        Self::new(copied, self.options).unwrap()
    }

    fn filler(&self) -> PathBuf {
        self.mounted.join("filler")
    }

    /// Takes all the room that there is.
    pub fn fill(&self) {
        let mut size = 2 << 20;
        while size > 0 {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
            if file.write_all(&vec![0; size]).is_err() {
                size /= 2;
            }
        }
    }

    /// Gives it back.
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever still has a file open there keeps it for as long.
        let _ = Command::new("umount").arg("-l").arg(&self.mounted).status();
    }
}

/// Whether nobody may write to a file, whatever they may otherwise and whoever has it open. Fails where that is unknown.
pub fn immutable(file: &Path, immutable: bool) -> Result<(), String> {
    done(Command::new("chattr").arg(if immutable { "+i" } else { "-i" }).arg(file))
}

/// A program in this folder that runs another one after these lines of `sh`, in `exec`'s place.
pub fn wrapped(folder: &Path, lines: &str) -> &'static str {
    let path = folder.join("wrapped");
    std::fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    mode(&path, 0o755);
    text(&path).leak()
}

/// What a file's owner and others may do with it.
pub fn mode(file: &Path, mode: u32) {
    std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

/// How long the files are that a program may write, or without a limit. Fails where nobody can set that.
pub fn longest_file(program: u32, limit: Option<u64>) -> Result<(), String> {
    let limit = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    done(Command::new("prlimit").arg(format!("--pid={program}")).arg(format!("--fsize={limit}:")))
}

/// Whether there is such a program to run, and it does what it is told. Or why not.
pub fn can(program: &str, arguments: &[&str]) -> Result<(), String> {
    done(Command::new(program).args(arguments))
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn done(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(said.trim().replace('\n', " ")) }
}
