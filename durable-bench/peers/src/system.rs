//! The systems, each in a program of its own: this one started again, or the one with the peers that cannot be linked
//! with this library.

use durable_bench::Error;
use durable_bench::site::Place;
use peer::{About, Answer, Ask, Called};
use std::path::PathBuf;
use std::process::{Command as Cargo, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::ground::Ground;

/// One that is measured.
#[derive(Clone)]
pub(crate) struct System {
    pub(crate) name: &'static str,
    program: PathBuf,
    /// As durable as the database can, and not as it is by itself.
    pub(crate) full: bool,
}

/// Names, whether each is in this program, and on what.
const SYSTEMS: [(&str, bool, &str); 7] = [
    ("durable", true, "postgres"),
    ("dbos", true, "postgres"),
    ("durare", false, "postgres"),
    ("duroxide-pg", false, "postgres"),
    ("durable", true, "sqlite"),
    ("durare", false, "sqlite"),
    ("duroxide", false, "sqlite"),
];
/// Those that sync less by themselves.
const LESS: [&str; 2] = ["durare", "duroxide"];

/// Those on this storage, this library first.
pub(crate) fn systems(place: &Place, only: &[String]) -> Result<Vec<System>, Error> {
    let wanted = |name: &str| name == "durable" || only.is_empty() || only.iter().any(|one| one == name);
    if let Some(unknown) = only.iter().find(|one| !SYSTEMS.iter().any(|(name, ..)| name == one)) {
        return Err(format!("no system {unknown:?}; there are: durable, dbos, durare, duroxide, duroxide-pg").into());
    }
    let (here, mut beside) = (std::env::current_exe()?, None);
    let mut all = Vec::new();
    for (name, in_this, storage) in SYSTEMS {
        if storage != place.name() || !wanted(name) {
            continue;
        }
        let program = match (in_this, &beside) {
            (true, _) => here.clone(),
            (false, Some(program)) => PathBuf::clone(program),
            (false, None) => beside.insert(build()?).clone(),
        };
        all.push(System { name, program: program.clone(), full: true });
        if storage == "sqlite" && LESS.contains(&name) {
            all.push(System { name, program, full: false });
        }
    }
    Ok(all)
}

/// Builds the program beside this one; where it is.
fn build() -> Result<PathBuf, Error> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/sqlx-0.8/Cargo.toml");
    let mut cargo = Cargo::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    // What `cargo run` says about this package: build scripts that look at it would all run again.
    for (name, _) in std::env::vars() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|own| name.starts_with(own)) {
            cargo.env_remove(name);
        }
    }
    let built = cargo
        .args(["build", "--release", "--locked", "--message-format", "json-render-diagnostics"])
        .args(["--manifest-path", manifest])
        .stderr(Stdio::inherit())
        .output()?;
    let lines = String::from_utf8_lossy(&built.stdout).into_owned();
    let executable = lines.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message.get("executable")?.as_str().map(PathBuf::from)
    });
    executable.ok_or_else(|| format!("{manifest} could not be built").into())
}

/// One that runs, in a database of its own.
pub(crate) struct Running {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    pub(crate) about: About,
}

impl System {
    /// Its tables have been made by a program before, so that what is counted is not that.
    pub(crate) async fn start(&self, ground: &Ground) -> Result<Running, Error> {
        self.program(ground, true).await?.end().await?;
        self.program(ground, false).await
    }

    async fn program(&self, ground: &Ground, setup: bool) -> Result<Running, Error> {
        let called = Called { system: self.name.into(), address: ground.address(), full: self.full, setup };
        let mut child = Command::new(&self.program)
            .args(called.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let output = child.stdout.take().ok_or("a program has no output")?;
        let (input, mut lines) = (child.stdin.take(), BufReader::new(output).lines());
        match self.says(&mut lines).await? {
            Answer::Ready(about) => Ok(Running { child, input, lines, about }),
            other => Err(format!("{} says {other:?} instead of being ready", self.name).into()),
        }
    }

    async fn says(&self, lines: &mut Lines<BufReader<ChildStdout>>) -> Result<Answer, Error> {
        let line = lines.next_line().await?.ok_or_else(|| format!("{} has ended by itself", self.name))?;
        serde_json::from_str(&line).map_err(|_| format!("{} says {line:?}, which is no answer", self.name).into())
    }

    /// Asks, and calls this for what is done so far until there is an answer.
    pub(crate) async fn ask(
        &self,
        running: &mut Running,
        ask: &Ask,
        mut done: impl FnMut(usize),
    ) -> Result<Answer, Error> {
        let input = running.input.as_mut().ok_or("a program has no input")?;
        input.write_all(format!("{}\n", serde_json::to_string(ask)?).as_bytes()).await?;
        loop {
            match self.says(&mut running.lines).await? {
                Answer::Done(count) => done(count),
                answer => return Ok(answer),
            }
        }
    }
}

impl Running {
    pub(crate) async fn end(mut self) -> Result<(), Error> {
        self.input = None;
        self.child.wait().await?;
        Ok(())
    }
}
