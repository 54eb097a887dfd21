-- One row for each run of a process. Records belong to the run; `current` marks the newest run of an id.
-- Times are UTC, as text that sorts. Payloads are JSON text, byte for byte as they were given.
CREATE TABLE durable_processes (
    run                 TEXT    NOT NULL PRIMARY KEY,
    namespace           TEXT    NOT NULL,
    id                  TEXT    NOT NULL,
    current             INTEGER NOT NULL,
    kind                TEXT    NOT NULL,
    -- running, waiting, completed, failed, cancelled, stuck
    status              TEXT    NOT NULL,
    -- the instance that runs it, and how often it was claimed
    owner               TEXT,
    claim               INTEGER NOT NULL,
    -- the last claim that ended in order
    calm_claim          INTEGER NOT NULL,
    wake_at             TEXT,
    waiting_for         TEXT,
    -- messages, cancellation and ends of awaited processes so far; and whether the owner has to be told
    signals             INTEGER NOT NULL,
    signalled           INTEGER NOT NULL,
    input               TEXT    NOT NULL,
    input_digest        TEXT    NOT NULL,
    output              TEXT,
    -- why it failed or is stuck, in words
    reason              TEXT,
    cancel_requested_at TEXT,
    cancelled_at        TEXT,
    -- its place among the run's records
    cancelled_seq       INTEGER,
    created_at          TEXT    NOT NULL,
    status_at           TEXT    NOT NULL,
    finished_at         TEXT
) WITHOUT ROWID;

CREATE UNIQUE INDEX durable_processes_current ON durable_processes (namespace, id) WHERE current = 1;
CREATE INDEX durable_processes_former ON durable_processes (namespace, id, run) WHERE current = 0;
CREATE INDEX durable_processes_due ON durable_processes (namespace, kind, wake_at)
    WHERE status = 'waiting' AND wake_at IS NOT NULL;
CREATE INDEX durable_processes_owner ON durable_processes (owner) WHERE owner IS NOT NULL;
CREATE INDEX durable_processes_signalled ON durable_processes (owner) WHERE signalled = 1;
CREATE INDEX durable_processes_stuck ON durable_processes (namespace) WHERE status = 'stuck';

-- What operations left behind. `claim` is the execution that wrote it.
CREATE TABLE durable_steps (
    run         TEXT    NOT NULL,
    -- 0 the process, 1 its compensation
    scope       INTEGER NOT NULL,
    name        TEXT    NOT NULL,
    key         TEXT    NOT NULL,
    -- step, value, delay, event, race, raise, spawn, output, transaction
    op          TEXT    NOT NULL,
    -- pending, done, failed
    state       TEXT    NOT NULL,
    payload     TEXT    NOT NULL,
    attempts    INTEGER NOT NULL,
    -- in which order a run's records were sent to be written
    seq         INTEGER NOT NULL,
    claim       INTEGER NOT NULL,
    recorded_at TEXT    NOT NULL,
    PRIMARY KEY (run, scope, name, key)
) WITHOUT ROWID;

-- Mailboxes. `number` is the message's place in its run's order.
CREATE TABLE durable_events (
    run       TEXT    NOT NULL,
    number    INTEGER NOT NULL,
    name      TEXT    NOT NULL,
    event_id  TEXT    NOT NULL,
    payload   TEXT    NOT NULL,
    raised_at TEXT    NOT NULL,
    taken_at  TEXT,
    PRIMARY KEY (run, number)
) WITHOUT ROWID;

CREATE UNIQUE INDEX durable_events_id ON durable_events (run, event_id);
CREATE INDEX durable_events_waiting ON durable_events (run, number) WHERE taken_at IS NULL;

-- Who awaits whose output.
CREATE TABLE durable_waiters (
    target TEXT    NOT NULL,
    waiter TEXT    NOT NULL,
    -- a chore has woken it
    told   INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (target, waiter)
) WITHOUT ROWID;

CREATE INDEX durable_waiters_waiter ON durable_waiters (waiter);
CREATE INDEX durable_waiters_untold ON durable_waiters (target) WHERE told = 0;

-- What is too much for one transaction, done a part at a time.
CREATE TABLE durable_chores (
    run    TEXT NOT NULL PRIMARY KEY,
    -- wake: the run has ended, and the processes that await it are to be woken; delete: the run is deleted, so besides its
    -- rows in the other tables are to be deleted
    what   TEXT NOT NULL,
    due_at TEXT NOT NULL
) WITHOUT ROWID;

CREATE INDEX durable_chores_due ON durable_chores (due_at);

-- The engines that share this database. A row whose fence is set may write no more.
CREATE TABLE durable_instances (
    instance     TEXT NOT NULL PRIMARY KEY,
    namespace    TEXT NOT NULL,
    label        TEXT NOT NULL,
    -- the kinds that it has registered, a JSON array
    kinds        TEXT NOT NULL,
    started_at   TEXT NOT NULL,
    heartbeat_at TEXT NOT NULL,
    -- after which silence it counts as dead
    expiry_ms    INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

CREATE TABLE durable_fences (
    instance   TEXT    NOT NULL PRIMARY KEY,
    generation INTEGER NOT NULL,
    fenced_at  TEXT
) WITHOUT ROWID;

-- Records that somebody told a resume to forget.
CREATE TABLE durable_audit (
    audit        TEXT    NOT NULL PRIMARY KEY,
    run          TEXT    NOT NULL,
    forgotten_at TEXT    NOT NULL,
    scope        INTEGER NOT NULL,
    name         TEXT    NOT NULL,
    key          TEXT    NOT NULL,
    op           TEXT    NOT NULL,
    state        TEXT    NOT NULL,
    payload      TEXT    NOT NULL,
    attempts     INTEGER NOT NULL,
    seq          INTEGER NOT NULL,
    claim        INTEGER NOT NULL,
    recorded_at  TEXT    NOT NULL
) WITHOUT ROWID;

CREATE INDEX durable_audit_run ON durable_audit (run);
