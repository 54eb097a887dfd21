//! Each example, killed in the middle and started again: what it printed is compared with what it should have.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_tests::{Backend, PostgresSchema};
use sqlx::{Connection, Row};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(100);

/// An example that runs.
struct Running {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    printed: Vec<String>,
}

impl Running {
    fn start(name: &str, args: &[&str]) -> Self {
        // This test is in `target/…/deps`, the examples are beside that.
        let program = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples").join(name);
        assert!(program.exists(), "{} is built by `cargo build --examples --all-features`", program.display());
        let mut child = Command::new(program).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { stdin: child.stdin.take().unwrap(), child, lines, printed: Vec::new() }
    }

    /// Types a line.
    fn types(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    /// Reads until a line like this was printed.
    fn until(&mut self, line: &str) {
        let since = Instant::now();
        while !self.printed.iter().any(|printed| printed == line) {
            assert!(since.elapsed() < LONG, "{line:?} is not printed, but {:#?}", self.printed);
            self.printed.extend(self.lines.recv_timeout(Duration::from_millis(100)));
        }
    }

    /// `kill -9`; what it had printed.
    fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.printed.extend(self.lines.iter());
        self.printed
    }

    /// Waits for its end; what it has printed.
    fn end(self) -> Vec<String> {
        let (status, printed) = self.ended();
        assert!(status.success(), "{status}: {printed:#?}");
        printed
    }

    fn ended(mut self) -> (ExitStatus, Vec<String>) {
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(since.elapsed() < LONG, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        self.printed.extend(self.lines.iter());
        (status, self.printed)
    }
}

/// Waits until so many steps are recorded.
fn until_recorded(database: &Path, steps: i64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let since = Instant::now();
    runtime.block_on(async {
        let mut connection =
            sqlx::SqliteConnection::connect(&format!("sqlite://{}", database.display())).await.unwrap();
        loop {
            let count = sqlx::query("SELECT count(*) FROM durable_steps WHERE op = 'step'");
            if count.fetch_one(&mut connection).await.unwrap().get::<i64, _>(0) >= steps {
                return;
            }
            assert!(since.elapsed() < LONG, "{steps} steps are not recorded");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("example.db");
    (folder, database)
}

#[test]
fn user_registration() {
    let (_folder, database) = folder();
    let db = database.to_str().unwrap();
    let mut first = Running::start("user_registration", &["ann@example.org", "--db", db, "--reads-after", "100000"]);
    first.until("to ann@example.org: your secret is 5890");
    until_recorded(&database, 2);
    let printed = first.kill();
    assert_eq!(printed, ["registered ann@example.org as user 76890", "to ann@example.org: your secret is 5890"]);
    let second = Running::start("user_registration", &["ann@example.org", "--db", db, "--reads-after", "10"]);
    assert_eq!(second.end(), ["user 76890 is active", "registration of user 76890 is complete"]);
    // Once more: it has ended, and only its output is read.
    let third = Running::start("user_registration", &["ann@example.org", "--db", db, "--reads-after", "10"]);
    assert_eq!(third.end(), ["registration of user 76890 is complete"]);
}

#[test]
fn schedule() {
    let (_folder, database) = folder();
    let args = ["--db", database.to_str().unwrap(), "--month-ms", "150"];
    let mut first = Running::start("schedule", &args);
    first.until("to ann@example.org: Welcome!");
    until_recorded(&database, 1);
    assert_eq!(first.kill(), ["to ann@example.org: Welcome!"]);
    let expected = [
        "to ann@example.org: Your 1st month with us. Congrats!",
        "the year's mail is on time",
        "to ann@example.org: Your 1st year with us. Congrats!",
        "all greetings are sent",
    ];
    assert_eq!(Running::start("schedule", &args).end(), expected);
}

#[test]
fn credit_card() {
    const HELP: &str = "commands: add CARD EMAIL, tran CARD, delete CARD, exit";
    let (_folder, database) = folder();
    let args = ["--db", database.to_str().unwrap(), "--inactive-ms", "600"];
    let mut first = Running::start("credit_card", &args);
    first.types("add 1111 ann@example.org");
    first.until("to ann@example.org: 1111 was assigned to you");
    first.types("tran 1111");
    first.until("to ann@example.org: 1111 received 1st transaction");
    first.types("add 2222 bob@example.org");
    first.until("to bob@example.org: 2222 was assigned to you");
    until_recorded(&database, 3);
    first.kill();
    let mut second = Running::start("credit_card", &args);
    second.until("known: card 1111");
    second.until("known: card 2222");
    second.until("to bob@example.org: 2222 is inactive long time");
    second.types("tran 1111");
    second.until("ok: tran 1111");
    second.types("delete 1111");
    second.until("to ann@example.org: 1111 was deleted");
    second.until("ok: delete 1111");
    second.types("tran 1111");
    second.until("no: process \"card 1111\" has ended");
    second.types("tran 3333");
    second.until("no: there is no process \"card 3333\"");
    second.types("add 1111 eve@example.org");
    second.until("to eve@example.org: 1111 was assigned to you");
    second.types("tran 1111");
    second.until("to eve@example.org: 1111 received 1st transaction");
    second.types("what");
    second.types("exit");
    let mut printed = second.end();
    printed.retain(|line| !line.starts_with("ok: ") && line != "to eve@example.org: 1111 is inactive long time");
    printed.sort();
    let mut expected = [
        HELP,
        "known: card 1111",
        "known: card 2222",
        "no: commands: add CARD EMAIL, tran CARD, delete CARD, exit",
        "no: process \"card 1111\" has ended",
        "no: there is no process \"card 3333\"",
        "to ann@example.org: 1111 was deleted",
        "to bob@example.org: 2222 is inactive long time",
        "to eve@example.org: 1111 received 1st transaction",
        "to eve@example.org: 1111 was assigned to you",
    ];
    expected.sort_unstable();
    assert_eq!(printed, expected);
}

/// Its account at the end; process ids and counts of what a kill cut off differ from run to run.
fn money_transfer(accounts: &str, stops: usize, more: &[&str]) {
    let (folder, _) = folder();
    let args =
        ["--folder", folder.path().to_str().unwrap(), "--transfers", "120", "--kills", "3", "--accounts", accounts];
    // How soon others take over is no matter of a test: the machine may be busy.
    let printed = Running::start("money_transfer", &[&args[..], &["--within", "50"], more].concat()).end();
    let line = |start: &str| printed.iter().filter(|line| line.trim_start().starts_with(start)).count();
    let (keeper, once) = match accounts {
        "bank" => ("bank ", "no recorded step ran twice"),
        _ => ("books", "every step exactly once"),
    };
    assert_eq!(line("kill -9"), 3, "{printed:#?}");
    assert_eq!(line("kill -STOP"), stops, "{printed:#?}");
    let numbers = |start: &str| -> Vec<u32> {
        let line = printed.iter().find(|line| line.trim_start().starts_with(start)).unwrap();
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    let [all, completed, rolled_back] = numbers("transfers ")[..] else { panic!("{printed:#?}") };
    let cancelled = numbers("cancelled ")[0];
    assert_eq!(completed + rolled_back + cancelled, all, "{printed:#?}");
    // Of those that would complete, and of those that would not.
    assert!(completed <= 102 && rolled_back <= 18 && cancelled < 40, "{printed:#?}");
    assert_eq!(line(&format!("{keeper}      400000  cents, as at the beginning")), 1, "{printed:#?}");
    let ok = format!("ok: 3 kills, every transfer completed or rolled back, not a cent lost, {once}");
    assert_eq!(line(&ok), 1, "{printed:#?}");
    assert_eq!(line("WRONG"), 0, "{printed:#?}");
}

/// Three workers share a database, if there is one.
fn money_transfer_on_postgres(accounts: &str) {
    if let Err(why) = PostgresSchema::address() {
        println!("not run: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let schema = runtime.block_on(PostgresSchema::new());
    money_transfer(accounts, 1, &["--storage", schema.url(), "--schema", schema.name()]);
}

#[test]
fn money_transfer_to_a_bank_sqlite() {
    money_transfer("bank", 0, &[]);
}

#[test]
fn money_transfer_within_the_database_sqlite() {
    money_transfer("database", 0, &[]);
}

#[test]
fn money_transfer_to_a_bank_postgres() {
    money_transfer_on_postgres("bank");
}

#[test]
fn money_transfer_within_the_database_postgres() {
    money_transfer_on_postgres("database");
}

/// What is not the demo's is not dropped.
#[test]
fn a_schema_of_somebody_else_postgres() {
    PostgresSchema::run(async {
        let schema = PostgresSchema::new().await;
        schema.storage().await;
        let (folder, _) = folder();
        let args = ["--storage", schema.url(), "--schema", schema.name(), "--folder", folder.path().to_str().unwrap()];
        let (status, _) = Running::start("money_transfer", &args).ended();
        assert!(!status.success());
        schema.storage().await;
    });
}
