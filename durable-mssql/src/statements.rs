//! Every statement is T-SQL, as far as a parser can tell, and stays what it is until somebody means to change it.

use chrono::DateTime;
use durable_core::storage::{
    Batch, Effect, Fence, Filter, Finish, Forget, InstanceId, Load, LockState, NewInstance, Op, OpKind, Park, Peer,
    Poll, Raise, RecordKey, RecordOp, RecordState, RunId, Scope, Spawn, Status,
};
use sqlparser::dialect::MsSqlDialect;
use sqlparser::parser::Parser;
use std::sync::atomic::AtomicI64;
use std::time::Duration;
use uuid::Uuid;

use crate::batch::scripts;
use crate::heart::{self, Life};
use crate::sql::Sql;
use crate::{Mssql, fence, migrate, outbox, read, transaction};

/// Snapshots, as one text; each is parsed.
fn snapshot(scripts: impl IntoIterator<Item = (&'static str, Sql)>) -> String {
    let mut all = String::new();
    for (name, sql) in scripts {
        let script = sql.script();
        parse(name, &script);
        all.push_str(&format!("-- {name}\n{script}\n"));
    }
    all
}

fn parse(name: &str, text: &str) {
    // The parser does not know how many rows a DELETE may be told to take, nor hints behind its table.
    let known = |text: &str| {
        let (of, rest) = text.split_once(") FROM ")?;
        let (table, rest) = rest.split_once("WHERE")?;
        of.chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '@')
            .then(|| format!("DELETE FROM {} WHERE{rest}", table.split(" WITH").next().unwrap()))
    };
    let mut parts = text.split("DELETE TOP (");
    let first = parts.next().unwrap_or_default().to_owned();
    let text = parts.fold(first, |all, part| all + &known(part).unwrap_or_else(|| format!("DELETE TOP ({part}")));
    if let Err(error) = Parser::parse_sql(&MsSqlDialect {}, &text) {
        panic!("{name}: {error}\n{text}");
    }
}

fn run() -> RunId {
    RunId(Uuid::from_u128(7))
}

fn instance() -> InstanceId {
    InstanceId(Uuid::from_u128(1))
}

fn spawn(restart_finished: bool) -> Spawn {
    let (id, kind, input, digest) = ("id".into(), "kind".into(), "{}".into(), "digest".into());
    Spawn { run: run(), id, kind, input, digest, take: true, restart_finished }
}

fn raise() -> Raise {
    Raise { id: "id".into(), name: "event".into(), event_id: "1".into(), payload: "{}".into() }
}

fn key() -> RecordKey {
    RecordKey { scope: Scope::Process, name: "name".into(), key: "key".into() }
}

fn record(effect: Option<Effect>) -> RecordOp {
    RecordOp {
        run: run(),
        claim: 1,
        key: key(),
        op: OpKind::Step,
        state: RecordState::Done,
        replaces: false,
        payload: "{}".into(),
        attempts: 0,
        shielded: false,
        seq: 1,
        takes: Some(1),
        effect,
        awaited: Some(run()),
    }
}

fn batch(ops: Vec<Op>) -> Batch {
    let fence = Fence { instance: instance(), generation: 0 };
    Batch::new(fence, "default", ops)
}

#[tokio::test]
async fn batches() {
    let at = DateTime::from_timestamp(1_700_000_000, 0);
    let finish = |status| Finish { run: run(), claim: 1, status, output: None, reason: None };
    let park = Park { run: run(), claim: 1, wake_at: at, seen: Some(1), waiting_for: None, deaths: 0 };
    let forget = vec![Forget { key: key(), audit: Uuid::from_u128(3) }];
    let orders = vec![Op::cancel("a".into()), Op::resume("b".into(), forget), Op::delete("c".into())];
    let batches = [
        ("starts", vec![Op::Spawn(spawn(false))]),
        ("starts that replace", vec![Op::Spawn(spawn(true))]),
        ("messages", vec![Op::Raise(raise())]),
        ("records", vec![Op::Record(record(None))]),
        ("a record that starts", vec![Op::Record(record(Some(Effect::Spawn(spawn(false)))))]),
        ("a record that sends", vec![Op::Record(record(Some(Effect::Raise(raise()))))]),
        ("awaits", vec![Op::Await { run: run(), id: "id".into(), target: None }]),
        ("an awaited run", vec![Op::Await { run: run(), id: "id".into(), target: Some(run()) }]),
        ("accepted", vec![Op::AcceptCancel { run: run(), claim: 1, seq: 1 }]),
        ("seen", vec![Op::Seen { run: run(), claim: 1, signals: 1 }]),
        ("ends", vec![Op::Finish(finish(Status::Completed))]),
        ("stuck", vec![Op::Finish(finish(Status::Stuck))]),
        ("parks", vec![Op::Park(park)]),
        ("orders", orders),
        ("claims", vec![Op::Claim { kind: "kind".into(), limit: 10 }]),
    ];
    let schema = Mssql::offline().0.schema.clone();
    let all = batches.into_iter().map(|(name, ops)| (name, scripts(&schema, &batch(ops))));
    insta::assert_snapshot!(snapshot(all));
}

#[tokio::test]
async fn reads() {
    let schema = Mssql::offline().0.schema.clone();
    let poll =
        Poll { instance: instance(), namespace: "default".into(), kinds: vec!["kind".into()], watched: vec![run()] };
    let filter = Filter {
        kind: Some("kind".into()),
        status: Some(Status::Stuck),
        unchanged_since: DateTime::from_timestamp(1_700_000_000, 0),
        after: Some(run()),
        limit: 10,
    };
    insta::assert_snapshot!(snapshot([
        ("load", read::load_script(&schema, &Load::whole(&[run()]))),
        ("signals", read::load_script(&schema, &Load::signals(&[run()]))),
        ("weigh", read::weigh_script(&schema, &Load::whole(&[run()]))),
        ("owned", read::owned_script(&schema, instance(), Some(run()), 10)),
        ("poll", read::poll_script(&schema, &poll)),
        ("find", read::find_script(&schema, "default", "id", None)),
        ("find a run", read::find_script(&schema, "default", "id", Some(run()))),
        ("record", read::record_script(&schema, run(), &key())),
        ("list", read::list_script(&schema, "default", &filter)),
        ("count", read::count_script(&schema, "default", &filter)),
        ("inbox", crate::batch::waiting(&schema, "default", None, &[], 10)),
        ("chores", crate::batch::part(&schema, 10, 100)),
        ("a chore that is put off", crate::batch::put_off(&schema)),
        ("inbox of ids", crate::batch::waiting(&schema, "default", Some(&["id", "other"]), &["held".into()], 10)),
    ]));
}

#[tokio::test]
async fn instances() {
    let shared = Mssql::offline().0;
    let schema = shared.schema.clone();
    let heartbeat_at = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    let peer = Peer {
        instance: instance(),
        heartbeat_at,
        lock: LockState::Held,
        fenced: false,
        comeback: Duration::ZERO,
        expiry: std::time::Duration::ZERO,
        kinds: vec![],
    };
    let new = NewInstance {
        id: instance(),
        namespace: "default".into(),
        label: "test".into(),
        kinds: vec!["kind".into()],
        expiry: std::time::Duration::from_secs(10),
    };
    let life = Life { shared, instance: instance(), comeback_ms: AtomicI64::new(7) };
    insta::assert_snapshot!(snapshot([
        ("enter", life.enter(&new).unwrap()),
        ("beat", life.beat()),
        ("peers", heart::peers(&schema, "default", instance())),
        ("refence", fence::refence(&schema, instance(), 2)),
        ("fence", fence::fence(&schema, &peer)),
        ("end", fence::end(&schema, instance())),
        ("release", fence::release(&schema, instance(), 10)),
        ("forget", fence::forget(&schema, instance())),
        ("strangers", fence::strangers(&schema)),
        ("reinstate", fence::reinstate(&schema, instance())),
    ]));
}

#[tokio::test]
async fn the_services_transactions() {
    let shared = Mssql::offline().0;
    let (schema, bounds) = (&shared.schema, shared.bounds);
    insta::assert_snapshot!(snapshot([
        ("the record of a transaction", transaction::write(schema, bounds, "lock", instance(), &record(None))),
        ("a start", outbox::put_start(schema, "default", &spawn(true))),
        ("a message", outbox::put_message(schema, "default", &raise())),
    ]));
}

#[test]
fn the_schema() {
    let sql = migrate::schema_sql("durable").unwrap();
    parse("the schema", &sql);
    insta::assert_snapshot!(sql);
}
