//! What a seed has come to in the end, beside what its programs say.

use durable_core::Status;
use durable_core::storage::{Filter, OpKind, RecordKey, RecordState, RunId, Scope, Storage};
use std::collections::BTreeMap;

use crate::effects::Sent;
use crate::interpret::Results;
use crate::ledger::{Final, Row};
use crate::program::{Program, Step, Undo, Use, first_name};
use crate::world::{Inner, World, at_once};

/// Says what has not finished.
pub fn unfinished(world: &World) {
    let rows = at_once(world.memory.list("default", &Filter { limit: 1_000, ..Default::default() }));
    for row in rows.into_iter().flatten().filter(|row| !row.status.is_finished()) {
        let (id, status, owner, wake, waits) = (row.id, row.status, row.owner, row.wake_at, row.waiting_for);
        world.wrong(format!("{id} has not finished: {status}, owner {owner:?}, due {wake:?}, waits for {waits:?}"));
    }
}

/// What came of it is what the programs say.
pub fn judge(world: &World) {
    let mut wrong = Vec::new();
    let runs: Vec<_> = world.inner().ledger.rows.keys().copied().collect();
    for run in runs {
        let results = world.results(run);
        let inner = world.inner();
        let row = &inner.ledger.rows[&run];
        let index: usize = row.id[1..].parse().unwrap_or(usize::MAX);
        let Some(program) = world.programs.get(index) else { continue };
        let stored = at_once(world.memory.find("default", &row.id, None)).ok().flatten();
        if stored.as_ref().map(|stored| stored.status) != Some(row.status) {
            wrong.push(format!("{} is {}, and stands as {stored:?}", row.id, row.status));
        }
        if row.status == Status::Cancelled && row.asked.is_none() {
            wrong.push(format!("{} was cancelled by nobody", row.id));
        }
        for (key, outcome) in inner.ledger.outcomes(run) {
            let stands = at_once(world.memory.record(run, key)).ok().flatten();
            let stands = stands.map(|record| (record.op, record.state, record.payload.into_string()));
            if stands.as_ref() != Some(&(outcome.op, outcome.state, outcome.payload.clone())) {
                let (id, payload) = (&row.id, &outcome.payload);
                wrong.push(format!("{key} of {id} was recorded as {payload}, and stands as {stands:?}"));
            }
            if outcome.op == OpKind::Transaction {
                let written = inner.accounts.get(&(run, key.clone())).copied().unwrap_or(0);
                let due = u64::from(outcome.state == RecordState::Done);
                if written != due {
                    wrong.push(format!("{key} of {} was written {written} times, not {due}", row.id));
                }
            }
            if outcome.op == OpKind::Raise {
                let copies = inner.ledger.copies(&format!("\"{}.{}\"", row.id, key.key));
                let due = usize::from(outcome.payload == "\"delivered\"");
                if copies != due {
                    wrong.push(format!("{key} of {} is in mailboxes {copies} times, not {due}", row.id));
                }
            }
        }
        wrong.extend(ending(&inner, run, row, program));
        if row.status != Status::Completed {
            continue;
        }
        let output: Results = serde_json::from_str(row.output.as_deref().unwrap_or_default()).unwrap_or_default();
        if output.len() != program.results() {
            wrong.push(format!("{} has {} results, not {}: {output:?}", row.id, output.len(), program.results()));
        }
        for (name, text) in &output {
            if results.get(name) != Some(text) {
                wrong.push(format!("{name} of {} is {text} in the end, and was {:?}", row.id, results.get(name)));
            }
        }
        if world.faultless {
            for (step, loops) in program.plain_steps() {
                let of_step = |((of, key), _): &(&(_, RecordKey), &u32)| {
                    *of == run && *key.name == *step.name && key.scope == Scope::Process
                };
                let begun: u32 = inner.effects.begun.iter().filter(of_step).map(|(_, count)| count).sum();
                let due = (step.fails + 1).min(step.attempts) * u32::try_from(loops.max(1)).unwrap_or(1);
                if begun != due {
                    wrong.push(format!("{} of {} ran {begun} times, not {due}", step.name, row.id));
                }
            }
        }
    }
    {
        let inner = world.inner();
        for (text, sent) in &inner.effects.sent {
            let copies = inner.ledger.copies(&format!("{text:?}"));
            let fits = match sent {
                Sent::Accepted => copies == 1,
                Sent::Unknown => copies <= 1,
                Sent::Refused => copies == 0,
            };
            if !fits {
                wrong.push(format!("the message {text} is {sent:?}, and is there {copies} times"));
            }
        }
    }
    wrong.into_iter().for_each(|wrong| world.wrong(wrong));
}

/// A process that failed has failed by a step that it cannot do without; it, and one that was cancelled, is compensated for as
/// its program says, and no other.
fn ending(inner: &Inner, run: RunId, row: &Row, program: &Program) -> Vec<String> {
    let (id, status, mut wrong) = (&row.id, row.status, Vec::new());
    let fatal = program.fatal();
    let failed = |(key, outcome): &(&RecordKey, &Final)| {
        outcome.state == RecordState::Failed && key.scope == Scope::Process && fatal.contains(&first_name(&key.name))
    };
    let reason = |(key, _): (&RecordKey, &Final)| {
        let first = RecordKey { name: first_name(&key.name).into(), ..key.clone() };
        format!("{first} failed")
    };
    let reasons: Vec<String> = inner.ledger.outcomes(run).filter(failed).map(reason).collect();
    if status == Status::Completed && !reasons.is_empty() {
        wrong.push(format!("{id} has completed, and {reasons:?}"));
    }
    if status == Status::Failed && !row.reason.as_ref().is_some_and(|reason| reasons.contains(reason)) {
        wrong.push(format!("{id} has failed, as {:?}, and {reasons:?}", row.reason));
    }
    // One that was cancelled before it ever ran has nothing to undo.
    let undoes = matches!(status, Status::Failed | Status::Cancelled) && row.claim > 0;
    if !undoes {
        let undone = inner.ledger.outcomes(run).find(|(key, _)| key.scope == Scope::Compensation);
        wrong.extend(undone.map(|(key, _)| format!("{id} is {status}, and {key} is recorded")));
        return wrong;
    }
    let place =
        |name: &str, key: &str| (run, RecordKey { scope: Scope::Compensation, name: name.into(), key: key.into() });
    let mut last = BTreeMap::new();
    for undo in &program.compensation {
        match undo {
            Undo::Step(Step { name, fails, attempts, timeout, .. }) => {
                let place = place(name, "");
                let recorded = inner.ledger.outcome(run, &place.1).map(|outcome| outcome.state);
                let due = if fails < attempts { RecordState::Done } else { RecordState::Failed };
                let fits = recorded == Some(due) || timeout.is_some() && recorded == Some(RecordState::Failed);
                if !fits || !inner.effects.returned.contains_key(&place) {
                    wrong.push(format!("{id} is {status}, and {} is {recorded:?}, not {due}", place.1));
                }
            }
            Undo::Value(value) => {
                let place = place(&value.name, if value.keyed { "0" } else { "" });
                for of in &value.uses {
                    // With a key, the first that was written stays.
                    match of {
                        Use::Set(to) if !value.keyed => last.insert(place.clone(), Some(*to)),
                        Use::Set(_) | Use::Get => last.insert(place.clone(), last.get(&place).copied().flatten()),
                    };
                }
            }
            Undo::Recall(_) => {}
        }
    }
    for (place, last) in last {
        let recorded = inner.ledger.outcome(run, &place.1).map(|outcome| &outcome.payload);
        if recorded.is_none_or(|recorded| last.is_some_and(|last| *recorded != last.to_string())) {
            wrong.push(format!("{id} is {status}, and {} is {recorded:?}, not {last:?}", place.1));
        }
    }
    wrong
}
