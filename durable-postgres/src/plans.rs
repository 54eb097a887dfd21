//! How the server carries statements out, pinned: on tables with a million finished processes none goes through a table
//! or an index from end to end.

use durable_core::storage::{
    Batch, Claimed, Effect, Fence, Filter, Finish, Forget, InstanceId, NewInstance, Op, OpKind, Outcome, Park, Peer,
    Poll, Raise, RecordKey, RecordOp, RecordState, RunId, Scope, Spawn, Status, Storage,
};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, Row};

use crate::names::Schema;
use crate::session::{self, Bounds};
use crate::sql::Sql;
use crate::{Postgres, batch, fence, heart, outbox, read, transaction};

/// Of a service that has run for long: a million processes that have ended, few of them with rows in other tables, and
/// a few thousand that live.
const FILL: &[&str] = &[
    "INSERT INTO {s}.processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, signals, signalled,
         awaited, input, input_digest, output, created_at, status_at, finished_at)
     SELECT gen_random_uuid(), 'default', 'done-' || n, n % 10 > 0, 'kind-' || n % 5, 'completed', NULL, 1, 0, 0, false, false,
         '{}', 'd', '7', now(), now(), now() FROM generate_series(1, 1000000) n",
    "INSERT INTO {s}.processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, wake_at, signals,
         signalled, awaited, input, input_digest, created_at, status_at)
     SELECT gen_random_uuid(), 'default', 'live-' || n, true, 'kind-' || n % 5,
         CASE WHEN n % 3 = 0 THEN 'running' ELSE 'waiting' END,
         CASE WHEN n % 3 = 0 THEN '00000000-0000-7000-8000-00000000000a'::uuid END, 1, 0,
         CASE WHEN n % 3 = 1 THEN now() + n * interval '1 minute' END, 0, n % 30 = 0, false, '{}', 'd', now(), now()
     FROM generate_series(1, 20000) n",
    "INSERT INTO {s}.steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
     SELECT run, 0, 'step', n::text, 'step', 'done', '1', 0, n, 1, now()
     FROM (SELECT run FROM {s}.processes LIMIT 100000) p, generate_series(1, 3) n",
    "INSERT INTO {s}.events (run, number, name, event_id, payload, raised_at, taken_at)
     SELECT run, n, 'event', n::text, '1', now(), now()
     FROM (SELECT run FROM {s}.processes LIMIT 50000) p, generate_series(1, 3) n",
    "INSERT INTO {s}.waiters (target, waiter) SELECT run, gen_random_uuid() FROM (SELECT run FROM {s}.processes
         LIMIT 20000) p",
    "INSERT INTO {s}.audit SELECT gen_random_uuid(), run, now(), scope, name, key, op, state, payload, attempts, seq, claim,
         recorded_at FROM (SELECT * FROM {s}.steps LIMIT 20000) s",
    "INSERT INTO {s}.inbox (namespace, what, id, name, token, payload, digest, restart, put_at, refused)
     SELECT 'default', 'message', 'done-' || n, 'event', n::text, '1', '', false, now(), 'the process has ended'
     FROM generate_series(1, 20000) n",
    "ANALYZE {s}.processes, {s}.steps, {s}.events, {s}.waiters, {s}.audit, {s}.inbox",
];

/// What a batch is made of: everything that goes into one statement, messages and what goes with them, a record alone, several,
/// everything.
#[derive(PartialEq, Eq)]
enum Kind {
    Single,
    Messages,
    Record,
    Records,
    Whole,
}

fn batch_of(kind: Kind) -> Batch {
    let run = RunId::new();
    let id: Box<str> = "p-1".into();
    let spawn = |restart_finished| Spawn {
        run: RunId::new(),
        id: id.clone(),
        kind: "kind".into(),
        input: "1".into(),
        digest: "d".into(),
        take: true,
        restart_finished,
    };
    let raise = || Raise { id: id.clone(), name: "e".into(), event_id: "x".into(), payload: "1".into() };
    let key = || RecordKey { scope: Scope::Process, name: "n".into(), key: "k".into() };
    let plain = RecordOp {
        run,
        claim: 1,
        key: key(),
        op: OpKind::Step,
        state: RecordState::Done,
        replaces: false,
        payload: "1".into(),
        attempts: 0,
        shielded: false,
        seq: 1,
        takes: None,
        effect: None,
        awaited: None,
    };
    let record = |effect| Op::Record(RecordOp { takes: Some(1), awaited: Some(RunId::new()), effect, ..plain.clone() });
    let finish = Finish { run, claim: 1, status: Status::Completed, output: None, reason: None };
    let mut ops = vec![
        Op::Spawn(spawn(false)),
        record(None),
        Op::Record(RecordOp { replaces: true, ..plain.clone() }),
        Op::AcceptCancel { run, claim: 1, seq: 1 },
        Op::Seen { run, claim: 1, signals: 1 },
        Op::Finish(finish),
        Op::Park(Park { run, claim: 1, wake_at: None, seen: Some(1), waiting_for: None, deaths: 0 }),
        Op::Claim { kind: "kind".into(), limit: 10 },
    ];
    if kind == Kind::Messages {
        ops.truncate(3);
        ops.push(Op::Raise(raise()));
    }
    if kind == Kind::Record || kind == Kind::Records {
        ops = vec![Op::Record(plain.clone()); if kind == Kind::Record { 1 } else { 2 }];
    }
    if kind == Kind::Whole {
        ops.extend([
            Op::Spawn(spawn(true)),
            Op::Raise(raise()),
            record(Some(Effect::Spawn(spawn(false)))),
            record(Some(Effect::Raise(raise()))),
            Op::Await { run, id: id.clone(), target: None },
            Op::cancel(id.clone()),
            Op::resume(id.clone(), vec![Forget { key: key(), audit: uuid::Uuid::now_v7() }]),
            Op::delete(id.clone()),
        ]);
    }
    Batch::new(Fence { instance: InstanceId::new(), generation: 0 }, "default", ops)
}

fn statements(schema: &Schema) -> Vec<(&'static str, Sql)> {
    let (instance, run) = (InstanceId::new(), RunId::new());
    let poll = Poll { instance, namespace: "default".into(), kinds: vec!["kind-1".into()], watched: vec![run] };
    let seen = Peer {
        instance,
        heartbeat_at: chrono::Utc::now(),
        lock: durable_core::storage::LockState::Unknown,
        fenced: false,
        comeback: std::time::Duration::ZERO,
        expiry: std::time::Duration::ZERO,
        kinds: vec![],
    };
    let key = RecordKey { scope: Scope::Process, name: "n".into(), key: "k".into() };
    let page = Filter { after: Some(run), limit: 10, ..Filter::default() };
    let stuck = Filter { status: Some(Status::Stuck), limit: 10, ..Filter::default() };
    let mut statements = vec![
        ("load", read::load_statement(schema, &durable_core::storage::Load::whole(&[run]))),
        ("signals", read::load_statement(schema, &durable_core::storage::Load::signals(&[run]))),
        ("weigh", read::weigh_statement(schema, &durable_core::storage::Load::whole(&[run]))),
        ("owned", read::owned_statement(schema, instance, None, 1000)),
        ("poll", read::poll_statement(schema, &poll)),
        ("find", read::find_statement(schema, "default", "p", None)),
        ("find a run", read::find_statement(schema, "default", "p", Some(run))),
        ("record", read::record_statement(schema, run, &key)),
        ("list", read::list_statement(schema, "default", &page)),
        ("list what is stuck", read::list_statement(schema, "default", &stuck)),
        ("count what is stuck", read::count_statement(schema, "default", &stuck)),
        ("peers", heart::peers_statement(schema, "default", instance)),
        ("refence", fence::refence(schema, instance, 1)),
        ("fence", fence::fence(schema, &seen)),
        ("end", fence::end(schema, instance)),
        ("release", fence::release(schema, instance, 1000)),
        ("forget", fence::forget(schema, instance)),
        ("strangers", fence::strangers(schema)),
        ("reinstate", fence::reinstate(schema, instance)),
    ];
    for op in batch_of(Kind::Whole).ops {
        match op {
            Op::Spawn(spawn) => statements.push(("start put in", outbox::put_start(schema, "default", &spawn))),
            Op::Raise(raise) => statements.push(("message put in", outbox::put_message(schema, "default", &raise))),
            Op::Record(record) => {
                let mut insert = Sql::default();
                insert.text = transaction::insert(schema, instance, &record);
                statements.push(("record of a transaction", insert));
                statements.push(("why there is none", transaction::reason(schema, instance, &record)));
            }
            _ => {}
        }
    }
    statements.push(("inbox", batch::waiting(schema, "default", None, &[], 10)));
    statements.push(("inbox of ids", batch::waiting(schema, "default", Some(&["p-1", "p-2"]), &["p-3".into()], 10)));
    statements.extend(batch::chores(schema).into_iter().map(|sql| ("chores", sql)));
    statements.push(("inbox, held", batch::held(schema, &[1, 2])));
    for kind in [Kind::Single, Kind::Messages, Kind::Record, Kind::Records, Kind::Whole] {
        statements.extend(batch::statements(schema, &batch_of(kind)));
    }
    statements
}

/// Scans from end to end: of a table, or of an index without a condition.
fn scans(what: &str, plan: &[String]) -> Vec<String> {
    const TABLES: [&str; 7] = ["processes", "steps", "events", "waiters", "audit", "inbox", "chores"];
    let of_table = |line: &str| TABLES.iter().any(|table| line.contains(&format!(" on {table}")));
    let by_index = |line: &str| line.contains("Index Scan") || line.contains("Index Only Scan");
    let mut scans = Vec::new();
    for (nth, line) in plan.iter().enumerate() {
        if line.contains("Seq Scan") && of_table(line) {
            scans.push(line.clone());
        }
        if by_index(line) && !line.contains("instances") && !line.contains("fences") {
            let mut own = plan[nth + 1..].iter().take_while(|next| !next.contains("->"));
            let condition = own.find(|next| next.contains("Index Cond"));
            // Every process of a namespace is no condition, nor is every message that a process was ever sent, unless it
            // is gone.
            let needs = match () {
                () if line.contains("_current") || line.contains("_former") => " AND (id = ",
                () if line.contains("events_id") && what != "chores" => " AND (event_id = ",
                () => "Index Cond",
            };
            if condition.is_none_or(|condition| !condition.contains(needs)) {
                scans.push(line.clone());
            }
        }
    }
    scans
}

async fn plan(connection: &mut PgConnection, sql: &Sql) -> Vec<String> {
    if sql.types.is_empty() {
        let explain = format!("EXPLAIN (COSTS OFF) {}", sql.text);
        let rows = connection.fetch_all(AssertSqlSafe(explain)).await.unwrap();
        return rows.iter().map(|row| row.get(0)).collect();
    }
    let nulls = vec!["NULL"; sql.types.len()].join(", ");
    let prepare = format!("PREPARE it ({}) AS {}", sql.types.join(", "), sql.text);
    connection.execute(AssertSqlSafe(prepare)).await.unwrap();
    let explain = format!("EXPLAIN (COSTS OFF) EXECUTE it ({nulls})");
    let rows = connection.fetch_all(AssertSqlSafe(explain)).await.unwrap();
    connection.execute("DEALLOCATE it").await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn bad_plans(connection: &mut PgConnection, schema: &Schema) -> Vec<String> {
    let mut found = Vec::new();
    for (what, sql) in statements(schema) {
        let plan = plan(connection, &sql).await;
        let scans = scans(what, &plan);
        if !scans.is_empty() {
            found.push(format!("{what}: {scans:#?}\n{}\n{}", sql.text, plan.join("\n")));
        }
        if std::env::var_os("DURABLE_SHOW_PLANS").is_some() {
            println!("== {what}\n{}\n{}", sql.text, plan.join("\n"));
        }
    }
    found
}

/// A schema of its own, and a connection with the engine's settings; none where there is no database.
async fn place() -> Option<(String, Postgres, PgConnection)> {
    let Ok(url) = std::env::var("DURABLE_POSTGRES_URL") else {
        let required = std::env::var("DURABLE_REQUIRE").unwrap_or_default();
        assert!(!required.contains("postgres"), "DURABLE_POSTGRES_URL is not set, and is required");
        println!("not run: DURABLE_POSTGRES_URL is not set");
        return None;
    };
    let name = format!("plans_{}", RunId::new().0.simple());
    let storage = Postgres::connect(&*url).schema(&*name).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    session::set(&mut connection, Bounds::default(), session::Whose::Engine).await.unwrap();
    Some((name, storage, connection))
}

/// How many pages of tables and indexes the statement looked at. What it wrote is undone.
async fn pages(connection: &mut PgConnection, mut sql: Sql) -> i64 {
    sql.text.insert_str(0, "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY OFF) ");
    let mut transaction = connection.begin().await.unwrap();
    let plan = sql.fetch(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    // Of the topmost node, which counts those beneath it.
    let lines: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let buffers = lines.iter().find(|line| line.contains("Buffers: ")).unwrap();
    let numbers = buffers.split([' ', '=']).collect::<Vec<_>>();
    let of =
        |what: &str| numbers.iter().position(|word| *word == what).map_or(0, |at| numbers[at + 1].parse().unwrap());
    of("hit") + of("read")
}

/// Somebody holds an old snapshot open while processes park and are claimed again and again, so that no dead row can be
/// removed. Plans stay. Looks for what is due go over the dead entries that come before it, a few pages for each at most;
/// once the snapshot is gone, so are they.
#[tokio::test]
async fn an_old_snapshot() {
    const PROCESSES: usize = 200;
    const ROUNDS: usize = 30;
    let Some((name, storage, mut connection)) = place().await else { return };
    let schema = &storage.0.schema;
    let mut old = PgConnection::connect(&std::env::var("DURABLE_POSTGRES_URL").unwrap()).await.unwrap();
    let new = NewInstance {
        id: InstanceId::new(),
        namespace: "default".into(),
        label: "test".into(),
        kinds: vec!["kind-1".into()],
        expiry: std::time::Duration::from_secs(10),
    };
    let (_heart, _) = storage.enlist(&new).await.unwrap();
    let fence = || Fence { instance: new.id, generation: 0 };
    let batch = |ops| Batch::new(fence(), "default", ops);
    let claim = || batch(vec![Op::Claim { kind: "kind-1".into(), limit: PROCESSES }]);
    let poll = Poll { instance: new.id, namespace: "default".into(), kinds: new.kinds.clone(), watched: vec![] };
    let spawn = |n: usize| {
        Op::Spawn(Spawn {
            run: RunId::new(),
            id: format!("p-{n}").into(),
            kind: "kind-1".into(),
            input: "1".into(),
            digest: "d".into(),
            take: false,
            restart_finished: false,
        })
    };
    storage.commit(&batch((0..PROCESSES).map(spawn).collect())).await.unwrap();
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    old.execute(AssertSqlSafe(format!("SELECT 1 FROM {name}.processes"))).await.unwrap();
    let churn = async |rounds: usize| {
        for _ in 0..rounds {
            let outcomes = storage.commit(&claim()).await.unwrap();
            let Outcome::Claimed(claimed) = &outcomes[0] else { panic!("{outcomes:?}") };
            assert_eq!(claimed.len(), PROCESSES);
            let park = |claimed: &Claimed| {
                let wake_at = Some(chrono::Utc::now());
                Op::Park(Park {
                    run: claimed.run,
                    claim: claimed.claim,
                    wake_at,
                    seen: Some(0),
                    waiting_for: None,
                    deaths: 0,
                })
            };
            storage.commit(&batch(claimed.iter().map(park).collect())).await.unwrap();
        }
    };
    let mut look = async || {
        let (_, claims) = batch::statements(schema, &claim()).remove(0);
        let polls = pages(&mut connection, read::poll_statement(schema, &poll)).await;
        [polls, pages(&mut connection, claims).await]
    };
    churn(1).await;
    let first = look().await;
    churn(ROUNDS).await;
    let last = look().await;
    let dead = (ROUNDS * PROCESSES) as i64;
    println!("pages of a look and of {PROCESSES} claims: at first {first:?}, with {dead} dead entries {last:?}");
    assert!(last[0] - first[0] < dead / 5, "a look: {first:?}, then {last:?}");
    assert!(last[1] - first[1] < dead * 10, "claims: {first:?}, then {last:?}");
    old.execute("ROLLBACK").await.unwrap();
    // Others may hold snapshots of their own for a while.
    let vacuumed = async {
        loop {
            old.execute(AssertSqlSafe(format!("VACUUM ANALYZE {name}.processes"))).await.unwrap();
            let now = look().await;
            if now[0] < first[0] * 4 && now[1] < first[1] * 2 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, vacuumed).await.expect("dead entries are still there");
    let found = bad_plans(&mut connection, schema).await;
    connection.execute(AssertSqlSafe(format!("DROP SCHEMA {name} CASCADE"))).await.unwrap();
    assert!(found.is_empty(), "{}", found.join("\n\n"));
}

#[tokio::test]
async fn no_statement_goes_through_a_table() {
    let Some((name, storage, mut connection)) = place().await else { return };
    assert_eq!(storage.name(), "postgres");
    // Nor on tables of which the server knows nothing yet: those plans are used for a while.
    let mut found = bad_plans(&mut connection, &storage.0.schema).await;
    // For the filling alone.
    connection.execute("SET synchronous_commit = off").await.unwrap();
    for sql in FILL {
        connection.execute(AssertSqlSafe(sql.replace("{s}", &name))).await.unwrap();
    }
    found.extend(bad_plans(&mut connection, &storage.0.schema).await);
    connection.execute(AssertSqlSafe(format!("DROP SCHEMA {name} CASCADE"))).await.unwrap();
    assert!(found.is_empty(), "{}", found.join("\n\n"));
}
