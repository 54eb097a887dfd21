//! What is left, checked: against the bank's own books, and against the records.

use durable_sqlite::storage::{Filter, OpKind, Storage};
use durable_sqlite::{RunId, Status};
use std::collections::{BTreeMap, HashMap};

use crate::Error;
use crate::bank::Bank;
use crate::saga::{self, OPENING, Transfer};

/// Prints the account of the run; an error if anything is wrong.
pub async fn check(storage: &impl Storage, bank: &Bank, transfers: u32, killed: u32) -> Result<(), Error> {
    let mut wrong = Vec::new();
    let filter = Filter { limit: usize::MAX, ..Filter::default() };
    let processes = storage.list("default", &filter).await?;
    let mut records = HashMap::new();
    let mut resumed = 0;
    let mut runs: Vec<RunId> = processes.iter().map(|process| process.run).collect();
    while !runs.is_empty() {
        let loaded = storage.load(&runs, true).await?;
        runs.retain(|run| !loaded.iter().any(|loaded| loaded.run == *run));
        for state in loaded.into_iter().filter_map(|loaded| loaded.state.ok().flatten()) {
            for (key, record) in state.records.into_iter().filter(|(_, record)| record.op == OpKind::Step) {
                // The last execution found it there, and did not run it.
                resumed += u32::from(record.claim < state.process.claim);
                records.insert((state.process.id.clone(), key.name), record.claim);
            }
        }
    }

    // Every transfer completed or rolled back, and the bank says the same.
    let (mut completed, mut rolled_back) = (0, 0);
    let mut expected: BTreeMap<u32, i64> = saga::accounts().map(|(account, cents, _)| (account, cents)).collect();
    let by_id: HashMap<&str, &_> = processes.iter().map(|process| (&*process.id, process)).collect();
    for n in 0..transfers {
        match by_id.get(&*saga::id(n)).map(|process| process.status) {
            Some(Status::Completed) => {
                completed += 1;
                let Transfer { from, to, cents } = Transfer::number(n);
                *expected.entry(from).or_default() -= cents;
                *expected.entry(to).or_default() += cents;
            }
            Some(Status::Failed) => rolled_back += 1,
            other => wrong.push(format!("{} is {other:?}", saga::id(n))),
        }
    }
    for (account, cents) in &expected {
        let has = bank.balance(*account).await?;
        if has != *cents {
            wrong.push(format!("account {account} has {has} cents instead of {cents}"));
        }
    }
    let (total, held) = bank.totals().await?;
    let opening = i64::from(saga::ACCOUNTS) * OPENING;
    if total != opening || held != 0 {
        wrong.push(format!("the bank has {total} cents of {opening}, and {held} open holds"));
    }

    // No recorded step ran again; what ran again was cut off between its effect and its record, with the same key.
    let calls = bank.calls().await?;
    let mut keys: HashMap<(&str, &str), &str> = HashMap::new();
    let mut again = 0;
    for call in &calls {
        match records.get(&(call.id.as_str().into(), call.step.as_str().into())) {
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

    println!("  transfers  {transfers:>6}  {completed} completed, {rolled_back} rolled back");
    println!("  steps      {:>6}  recorded, each once", records.len());
    println!("  resumed    {resumed:>6}  found in their records after a kill, and not run");
    println!("  again      {again:>6}  cut off by a kill before their record, run again with the same key");
    println!("  bank       {:>6}  cents, as at the beginning; {} calls", total, calls.len());
    if wrong.is_empty() {
        println!(
            "\nok: {killed} kills, every transfer completed or rolled back, not a cent lost, no recorded step ran twice"
        );
        return Ok(());
    }
    for line in &wrong {
        println!("  WRONG: {line}");
    }
    Err(format!("{} things are wrong", wrong.len()).into())
}
