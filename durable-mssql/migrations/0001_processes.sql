-- In every statement {schema} stands for the schema's name, quoted.

-- One row for each run of a process. Records belong to the run; `current` marks the newest run of an id.
-- Ids and names are compared unit by unit: by the server's default "Order-1" and "order-1" would be one process. Runs are
-- BINARY(16), which sorts as they were made; UNIQUEIDENTIFIER does not. Payloads are JSON text, as they were given. There
-- are no foreign keys: each would be looked up by every batch.
CREATE TABLE {schema}.processes (
    run                 BINARY(16)    NOT NULL,
    namespace           NVARCHAR(64)  COLLATE Latin1_General_BIN2 NOT NULL,
    id                  NVARCHAR(256) COLLATE Latin1_General_BIN2 NOT NULL,
    [current]           BIT           NOT NULL,
    kind                NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
    -- running, waiting, completed, failed, cancelled, stuck
    status              NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    -- the instance that runs it, and how often it was claimed
    owner               BINARY(16)    NULL,
    claim               BIGINT        NOT NULL,
    -- the last claim that ended in order
    calm_claim          BIGINT        NOT NULL,
    wake_at             DATETIME2(6)  NULL,
    waiting_for         NVARCHAR(MAX) NULL,
    -- messages, cancellation and ends of awaited processes so far; and whether the owner has to be told
    signals             BIGINT        NOT NULL,
    signalled           BIT           NOT NULL,
    -- somebody has awaited its end
    awaited             BIT           NOT NULL,
    input               NVARCHAR(MAX) NOT NULL,
    input_digest        NVARCHAR(64)  COLLATE Latin1_General_BIN2 NOT NULL,
    [output]            NVARCHAR(MAX) NULL,
    -- why it failed or is stuck, in words
    reason              NVARCHAR(MAX) NULL,
    cancel_requested_at DATETIME2(6)  NULL,
    cancelled_at        DATETIME2(6)  NULL,
    -- its place among the run's records
    cancelled_seq       INT           NULL,
    created_at          DATETIME2(6)  NOT NULL,
    status_at           DATETIME2(6)  NOT NULL,
    finished_at         DATETIME2(6)  NULL,
    CONSTRAINT processes_key PRIMARY KEY CLUSTERED (run)
);

CREATE UNIQUE INDEX processes_current ON {schema}.processes (namespace, id) WHERE [current] = 1;
CREATE INDEX processes_former ON {schema}.processes (namespace, id, run) WHERE [current] = 0;
CREATE INDEX processes_due ON {schema}.processes (namespace, kind, wake_at) INCLUDE (status)
    WHERE status = N'waiting' AND wake_at IS NOT NULL;
-- With the run, so that what a dead instance owned is handed back in chunks without sorting all of it.
CREATE INDEX processes_owner ON {schema}.processes (owner, run) WHERE owner IS NOT NULL;
CREATE INDEX processes_signalled ON {schema}.processes (owner) INCLUDE (signalled) WHERE signalled = 1;
CREATE INDEX processes_stuck ON {schema}.processes (namespace) INCLUDE (status) WHERE status = N'stuck';

-- What operations left behind. `claim` is the execution that wrote it.
CREATE TABLE {schema}.steps (
    run         BINARY(16)    NOT NULL,
    -- 0 the process, 1 its compensation
    scope       SMALLINT      NOT NULL,
    name        NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
    -- as given, or an id behind a sign
    [key]       NVARCHAR(260) COLLATE Latin1_General_BIN2 NOT NULL,
    -- step, value, delay, event, race, raise, spawn, output, transaction
    op          NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    -- pending, done, failed
    state       NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    payload     NVARCHAR(MAX) NOT NULL,
    attempts    INT           NOT NULL,
    -- in which order a run's records were sent to be written
    seq         INT           NOT NULL,
    claim       BIGINT        NOT NULL,
    recorded_at DATETIME2(6)  NOT NULL,
    CONSTRAINT steps_key PRIMARY KEY CLUSTERED (run, scope, name, [key])
);

-- Mailboxes. `number` is the message's place in its run's order.
CREATE TABLE {schema}.events (
    run       BINARY(16)    NOT NULL,
    number    BIGINT        NOT NULL,
    name      NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
    event_id  NVARCHAR(256) COLLATE Latin1_General_BIN2 NOT NULL,
    payload   NVARCHAR(MAX) NOT NULL,
    raised_at DATETIME2(6)  NOT NULL,
    taken_at  DATETIME2(6)  NULL,
    CONSTRAINT events_key PRIMARY KEY CLUSTERED (run, number)
);

CREATE UNIQUE INDEX events_id ON {schema}.events (run, event_id);
CREATE INDEX events_waiting ON {schema}.events (run, number) INCLUDE (taken_at) WHERE taken_at IS NULL;

-- Who awaits whose output.
CREATE TABLE {schema}.waiters (
    target BINARY(16) NOT NULL,
    waiter BINARY(16) NOT NULL,
    -- a chore has woken it
    told   BIT        NOT NULL CONSTRAINT waiters_told DEFAULT 0,
    CONSTRAINT waiters_key PRIMARY KEY CLUSTERED (target, waiter)
);

CREATE INDEX waiters_waiter ON {schema}.waiters (waiter);
CREATE INDEX waiters_untold ON {schema}.waiters (target) INCLUDE (told) WHERE told = 0;

-- What is too much for one transaction, done a part at a time.
CREATE TABLE {schema}.chores (
    run    BINARY(16)   NOT NULL,
    -- wake: the run has ended, and the processes that await it are to be woken; delete: the run is deleted, so besides its
    -- rows in the other tables are to be deleted
    what   NVARCHAR(16) COLLATE Latin1_General_BIN2 NOT NULL,
    due_at DATETIME2(6) NOT NULL,
    CONSTRAINT chores_key PRIMARY KEY CLUSTERED (run)
);

CREATE INDEX chores_due ON {schema}.chores (due_at);

-- Starts and messages out of transactions of the service's own, in the order in which they were put in. Such a transaction
-- only inserts here, so that while it is open nobody waits for it; whoever comes by moves what is committed on.
CREATE TABLE {schema}.inbox (
    number    BIGINT        IDENTITY(1, 1) NOT NULL,
    namespace NVARCHAR(64)  COLLATE Latin1_General_BIN2 NOT NULL,
    -- start, message
    what      NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    -- the process's id
    id        NVARCHAR(256) COLLATE Latin1_General_BIN2 NOT NULL,
    -- a start's kind, a message's event
    name      NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
    -- a start's run, a message's id
    token     NVARCHAR(256) COLLATE Latin1_General_BIN2 NOT NULL,
    payload   NVARCHAR(MAX) NOT NULL,
    -- of a start: the digest of its input, and whether a finished process makes way
    digest    NVARCHAR(64)  COLLATE Latin1_General_BIN2 NOT NULL,
    restart   BIT           NOT NULL,
    put_at    DATETIME2(6)  NOT NULL,
    -- why it could not be moved on: it stays here, and somebody has to look at it
    refused   NVARCHAR(MAX) NULL,
    CONSTRAINT inbox_key PRIMARY KEY CLUSTERED (number)
);

CREATE INDEX inbox_waiting ON {schema}.inbox (namespace, number) INCLUDE (refused) WHERE refused IS NULL;
CREATE INDEX inbox_id ON {schema}.inbox (namespace, id, number) INCLUDE (refused) WHERE refused IS NULL;
CREATE INDEX inbox_refused ON {schema}.inbox (namespace, id) INCLUDE (refused) WHERE refused IS NOT NULL;

-- The engines that share this database.
CREATE TABLE {schema}.instances (
    instance     BINARY(16)    NOT NULL,
    namespace    NVARCHAR(64)  COLLATE Latin1_General_BIN2 NOT NULL,
    label        NVARCHAR(MAX) NOT NULL,
    -- the kinds that it has registered, a JSON array
    kinds        NVARCHAR(MAX) NOT NULL,
    started_at   DATETIME2(6)  NOT NULL,
    heartbeat_at DATETIME2(6)  NOT NULL,
    -- the application lock that its session holds while it lives
    lock_name    NVARCHAR(200) COLLATE Latin1_General_BIN2 NOT NULL,
    -- which run of the server its session held its lock in at its last heartbeat, null if it did not
    locked_in    NVARCHAR(64)  NULL,
    -- how long its session took to be had at most: others give it some time to have one again
    comeback_ms  BIGINT        NOT NULL DEFAULT 0,
    -- after which silence it counts as dead
    expiry_ms    BIGINT        NOT NULL DEFAULT 0,
    CONSTRAINT instances_key PRIMARY KEY CLUSTERED (instance)
);

-- A row whose fence is set may write no more. Who reads it to write, or changes it, holds the application lock of the
-- same instance.
CREATE TABLE {schema}.fences (
    instance   BINARY(16)   NOT NULL,
    generation BIGINT       NOT NULL,
    fenced_at  DATETIME2(6) NULL,
    CONSTRAINT fences_key PRIMARY KEY CLUSTERED (instance)
);

-- Records that somebody told a resume to forget.
CREATE TABLE {schema}.audit (
    audit        BINARY(16)    NOT NULL,
    run          BINARY(16)    NOT NULL,
    forgotten_at DATETIME2(6)  NOT NULL,
    scope        SMALLINT      NOT NULL,
    name         NVARCHAR(128) COLLATE Latin1_General_BIN2 NOT NULL,
    [key]        NVARCHAR(260) COLLATE Latin1_General_BIN2 NOT NULL,
    op           NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    state        NVARCHAR(16)  COLLATE Latin1_General_BIN2 NOT NULL,
    payload      NVARCHAR(MAX) NOT NULL,
    attempts     INT           NOT NULL,
    seq          INT           NOT NULL,
    claim        BIGINT        NOT NULL,
    recorded_at  DATETIME2(6)  NOT NULL,
    CONSTRAINT audit_key PRIMARY KEY CLUSTERED (audit)
);

CREATE INDEX audit_run ON {schema}.audit (run);
