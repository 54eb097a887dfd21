//! The check of what a run left: from the journal, in the order in which things happened, and from the records. It is
//! exact, and it is tested itself: broken invariants must be found (`tests/checker.rs`).

use std::collections::{BTreeMap, BTreeSet};

use super::journal::{Line, What};

/// A record, as the database has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// The process's id.
    pub id: String,
    /// The step.
    pub step: String,
    /// The execution that wrote it.
    pub claim: i64,
    /// Attempts that failed before it.
    pub attempts: i64,
}

/// A process, as the database has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Its id.
    pub id: String,
    /// Its status.
    pub status: String,
    /// How often it was claimed.
    pub claims: i64,
}

/// What is wrong; empty if nothing is.
pub fn check(lines: &[Line], records: &[Recorded], processes: &[Ended], steps: &[&str]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut claims_of = BTreeMap::new();
    for record in records {
        if claims_of.insert((&*record.id, &*record.step), record).is_some() {
            wrong.push(format!("{} {}: recorded twice", record.id, record.step));
        }
    }
    for process in processes {
        if process.status != "completed" {
            wrong.push(format!("{} is {}", process.id, process.status));
        }
        for step in steps {
            match claims_of.get(&(&*process.id, *step)) {
                None => wrong.push(format!("{} {step}: not recorded", process.id)),
                Some(record) if record.claim > process.claims => {
                    wrong.push(format!(
                        "{} {step}: recorded by execution {} of {}",
                        process.id, record.claim, process.claims
                    ));
                }
                Some(_) => {}
            }
        }
    }
    let mut keys: BTreeMap<(&str, &str), &str> = BTreeMap::new();
    let mut programs: BTreeMap<(&str, i64), u32> = BTreeMap::new();
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    let mut effects: BTreeSet<(&str, &str)> = BTreeSet::new();
    let mut open: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    for line in lines {
        let id = &*line.id;
        let program = *programs.entry((id, line.execution)).or_insert(line.program);
        if program != line.program {
            wrong.push(format!(
                "{id}: execution {} ran in two programs, {program} and {}",
                line.execution, line.program
            ));
        }
        match &line.what {
            What::Begin { step, key } => {
                let (name, attempt) = split(step);
                if *keys.entry((id, name)).or_insert(key) != key {
                    wrong.push(format!("{id} {step}: another idempotency key"));
                }
                // The record says which execution wrote it: a later one must not have begun the step again.
                if let Some(record) = claims_of.get(&(id, name))
                    && line.execution > record.claim
                {
                    wrong.push(format!(
                        "{id} {step}: recorded by execution {}, begun again by {}",
                        record.claim, line.execution
                    ));
                }
                if let Some(record) = claims_of.get(&(id, name))
                    && attempt > record.attempts + 1
                {
                    wrong.push(format!("{id} {step}: {} attempts failed, yet there is this one", record.attempts));
                }
                // The newer execution owns the process: the older one may end what it began, and begin nothing.
                let newest = newest.entry(id).or_insert(line.execution);
                if line.execution < *newest {
                    wrong.push(format!("{id} {step}: begun by execution {} after {newest} had begun", line.execution));
                }
                *newest = line.execution.max(*newest);
                if open.insert((id, step), line.execution) == Some(line.execution) {
                    wrong.push(format!("{id} {step}: begun twice by execution {}", line.execution));
                }
            }
            What::Effect { step } => {
                effects.insert((id, split(step).0));
            }
            What::Returned { step } => {
                match claims_of.get(&(id, &**step)) {
                    None => wrong.push(format!("{id} {step}: returned without a record")),
                    Some(record) if record.claim > line.execution => {
                        let (execution, claim) = (line.execution, record.claim);
                        wrong.push(format!("{id} {step}: returned by execution {execution}, recorded only by {claim}"));
                    }
                    Some(_) => {}
                }
                if !effects.contains(&(id, step)) {
                    wrong.push(format!("{id} {step}: returned without an effect"));
                }
            }
            What::End => {}
        }
    }
    for record in records {
        if !effects.contains(&(&*record.id, &*record.step)) {
            wrong.push(format!("{} {}: recorded without an effect", record.id, record.step));
        }
    }
    wrong
}

/// A step's name and the number of its attempt.
fn split(step: &str) -> (&str, i64) {
    let (name, attempt) = step.rsplit_once('#').unwrap_or((step, "1"));
    (name, attempt.parse().unwrap_or(1))
}
