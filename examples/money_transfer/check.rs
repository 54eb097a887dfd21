//! What is left, checked: against the books of whoever keeps the accounts, the journal, and the records.

use durable_core::storage::{Filter, Load, OpKind, ProcessRow, Storage};
use durable_core::{RunId, Status};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::bank::Bank;
use crate::demo::Blow;
use crate::journal::Journal;
use crate::place::Place;
use crate::saga::{self, OPENING, Transfer};
use crate::{Accounts, Args, Error, ledger};

/// Where the accounts are, as the check sees them.
pub enum Books {
    Bank(Bank),
    Database(ledger::Books),
}

impl Books {
    /// New accounts.
    pub async fn create(args: &Args, place: &Place) -> Result<Self, Error> {
        Ok(match args.accounts {
            Accounts::Bank => Self::Bank(Bank::create(&args.folder, saga::accounts()).await?),
            Accounts::Database => Self::Database(ledger::Books::create(place, saga::accounts()).await?),
        })
    }

    async fn balances(&mut self) -> Result<BTreeMap<u32, i64>, Error> {
        match self {
            Self::Bank(bank) => bank.balances().await,
            Self::Database(books) => books.balances().await,
        }
    }
}

/// Prints the account of the run; an error if anything is wrong.
pub async fn check(args: &Args, storage: &impl Storage, books: &mut Books, blows: &[Blow]) -> Result<(), Error> {
    let mut wrong = Vec::new();
    let Records { processes, records, resumed } = Records::load(storage).await?;

    // Every transfer completed or rolled back, and the books say the same.
    let (mut completed, mut rolled_back, mut cancelled, mut too_late) = (0, 0, 0, 0);
    let mut expected: BTreeMap<u32, i64> = saga::accounts().map(|(account, cents, _)| (account, cents)).collect();
    let by_id: HashMap<&str, &_> = processes.iter().map(|process| (&*process.id, process)).collect();
    for n in 0..args.transfers {
        match by_id.get(&*saga::id(n)).map(|process| process.status) {
            Some(Status::Completed) => {
                completed += 1;
                too_late += u32::from(by_id[&*saga::id(n)].cancel_requested_at.is_some());
                let Transfer { from, to, cents } = Transfer::number(n);
                *expected.entry(from).or_default() -= cents;
                *expected.entry(to).or_default() += cents;
            }
            Some(Status::Failed) => rolled_back += 1,
            Some(Status::Cancelled) => cancelled += 1,
            other => wrong.push(format!("{} is {other:?}", saga::id(n))),
        }
    }
    let balances = books.balances().await?;
    for (account, cents) in &expected {
        let has = balances.get(account).copied().unwrap_or_default();
        if has != *cents {
            wrong.push(format!("account {account} has {has} cents instead of {cents}"));
        }
    }
    let (total, opening) = (balances.values().sum::<i64>(), i64::from(saga::ACCOUNTS) * OPENING);
    if total != opening {
        wrong.push(format!("all accounts together have {total} cents of {opening}"));
    }
    match books {
        Books::Bank(bank) => {
            let held = bank.open_holds().await?;
            if held != 0 {
                wrong.push(format!("the bank has {held} open holds"));
            }
        }
        Books::Database(books) => {
            let lines = books.lines().await?;
            let completed = |n: u32| by_id.get(&*saga::id(n)).is_some_and(|row| row.status == Status::Completed);
            wrong.extend((0..args.transfers).filter_map(|n| wrong_lines(&lines, n, completed(n))));
        }
    }

    // No recorded step ran again; what ran again was cut off between its effect and its record, with the same key.
    let calls = Journal::open(&args.folder).await?.calls().await?;
    let mut keys: HashMap<(&str, &str), &str> = HashMap::new();
    let mut again = 0;
    for call in &calls {
        match records.get(&(call.id.as_str().into(), call.step.as_str().into())) {
            // Cut off by the cancellation.
            None if by_id.get(&*call.id).is_some_and(|row| row.status == Status::Cancelled) => {}
            None => wrong.push(format!("{} {}: called, and never recorded", call.id, call.step)),
            Some(claim) if call.execution > *claim => {
                wrong.push(format!(
                    "{} {}: recorded by execution {claim}, run again by {}",
                    call.id, call.step, call.execution
                ));
            }
            Some(_) => {}
        }
        if let Some(key) = keys.insert((&call.id, &call.step), &call.key) {
            again += 1;
            if key != call.key {
                wrong.push(format!("{} {}: called with another key", call.id, call.step));
            }
        }
    }
    let slow = blows.iter().filter(|blow| blow.killed && blow.seconds > args.within);
    wrong.extend(slow.map(|blow| {
        format!("{} was taken over after {:.1} s; {} s are allowed", blow.program, blow.seconds, args.within)
    }));

    let (keeper, cut_off) = match args.accounts {
        Accounts::Bank => ("bank", "cut off before their record, run again with the same key"),
        Accounts::Database => ("books", "cut off before their commit: nothing of them was kept, run again"),
    };
    println!("  transfers  {:>6}  {completed} completed, {rolled_back} rolled back", args.transfers);
    println!("  cancelled  {cancelled:>6}  rolled back; {too_late} more were past the point of no return");
    println!("  steps      {:>6}  recorded, each once", records.len());
    println!("  resumed    {resumed:>6}  found in their records after a kill, and not run");
    println!("  again      {again:>6}  {cut_off}");
    println!("  {keeper:<10} {total:>6}  cents, as at the beginning; {} calls", calls.len());
    let killed = blows.iter().filter(|blow| blow.killed);
    let slowest = killed.clone().map(|blow| blow.seconds).fold(0.0, f64::max);
    println!("  take-over  {slowest:>6.1}  seconds at most from a kill until others ran what it had run");
    if wrong.is_empty() {
        let once =
            if args.accounts == Accounts::Bank { "no recorded step ran twice" } else { "every step exactly once" };
        let kills = killed.count();
        println!("\nok: {kills} kills, every transfer completed or rolled back, not a cent lost, {once}");
        return Ok(());
    }
    for line in &wrong {
        println!("  WRONG: {line}");
    }
    Err(format!("{} things are wrong", wrong.len()).into())
}

/// What is wrong with the lines of the n-th transfer: each of its steps has one, and nothing is left of one that was
/// rolled back.
fn wrong_lines(lines: &ledger::Lines, n: u32, completed: bool) -> Option<String> {
    let Transfer { from, to, cents } = Transfer::number(n);
    let line = |step: &str, account, cents| (step.to_owned(), account, cents);
    let (debit, give_back) = (line("Debit", from, -cents), line("GiveBack", from, cents));
    let mut have = lines.get(&saga::id(n)).cloned().unwrap_or_default();
    have.sort();
    let right = if completed {
        have == [line("Credit", to, cents), debit]
    } else {
        have.is_empty() || have == [debit, give_back]
    };
    (!right).then(|| format!("{} (completed: {completed}) has the lines {have:?}", saga::id(n)))
}

struct Records {
    processes: Vec<ProcessRow>,
    /// By id and step: the execution that recorded it.
    records: HashMap<(Box<str>, Arc<str>), i64>,
    /// How many a later execution found there, and did not run.
    resumed: u32,
}

impl Records {
    async fn load(storage: &impl Storage) -> Result<Self, Error> {
        let filter = Filter { limit: usize::MAX, ..Filter::default() };
        let processes = storage.list("default", &filter).await?;
        let (mut records, mut resumed) = (HashMap::new(), 0);
        let runs: Vec<RunId> = processes.iter().map(|process| process.run).collect();
        for runs in runs.chunks(500) {
            let loaded = storage.load(&Load::whole(runs)).await?;
            for state in loaded.into_iter().flatten().filter_map(|loaded| loaded.state.ok().flatten()) {
                let steps = state.records.into_iter();
                for (key, record) in steps.filter(|(_, it)| matches!(it.op, OpKind::Step | OpKind::Transaction)) {
                    resumed += u32::from(record.claim < state.process.claim);
                    records.insert((state.process.id.clone(), key.name), record.claim);
                }
            }
        }
        Ok(Self { processes, records, resumed })
    }
}
