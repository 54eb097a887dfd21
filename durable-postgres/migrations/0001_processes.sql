-- In every statement {schema} stands for the schema's name, quoted.

-- One row for each run of a process. Records belong to the run; `current` marks the newest run of an id.
-- Payloads are JSON text, byte for byte as they were given: json, not jsonb, which reorders keys and refuses \u0000.
--
-- What changes most often while a process lives, its count of signals, is in no index, so that such an update stays
-- within its page (HOT) as long as there is room: hence the low fill factor. A change of status, owner or due time moves
-- the row in or out of a partial index; there the room keeps the new version in the old one's page.
CREATE TABLE {schema}.processes (
    run                 uuid        NOT NULL PRIMARY KEY,
    namespace           text        COLLATE "C" NOT NULL,
    id                  text        COLLATE "C" NOT NULL,
    current             boolean     NOT NULL,
    kind                text        COLLATE "C" NOT NULL,
    -- running, waiting, completed, failed, cancelled, stuck
    status              text        COLLATE "C" NOT NULL,
    -- the instance that runs it, and how often it was claimed
    owner               uuid,
    claim               bigint      NOT NULL,
    -- the last claim that ended in order
    calm_claim          bigint      NOT NULL,
    wake_at             timestamptz,
    waiting_for         text,
    -- messages, cancellation and ends of awaited processes so far; and whether the owner has to be told
    signals             bigint      NOT NULL,
    signalled           boolean     NOT NULL,
    -- somebody has awaited its end: whoever ends it looks for waiters
    awaited             boolean     NOT NULL,
    input               json        NOT NULL,
    input_digest        text        NOT NULL,
    output              json,
    -- why it failed or is stuck, in words
    reason              text,
    cancel_requested_at timestamptz,
    cancelled_at        timestamptz,
    -- its place among the run's records
    cancelled_seq       integer,
    created_at          timestamptz NOT NULL,
    status_at           timestamptz NOT NULL,
    finished_at         timestamptz
) WITH (fillfactor = 70);

CREATE UNIQUE INDEX processes_current ON {schema}.processes (namespace, id) WHERE current;
CREATE INDEX processes_former ON {schema}.processes (namespace, id, run) WHERE NOT current;
CREATE INDEX processes_due ON {schema}.processes (namespace, kind, wake_at)
    WHERE status = 'waiting' AND wake_at IS NOT NULL;
-- With the run, so that what a dead instance owned is handed back in chunks without sorting all of it.
CREATE INDEX processes_owner ON {schema}.processes (owner, run) WHERE owner IS NOT NULL;
CREATE INDEX processes_signalled ON {schema}.processes (owner) WHERE signalled;
CREATE INDEX processes_stuck ON {schema}.processes (namespace) WHERE status = 'stuck';

-- What operations left behind. `claim` is the execution that wrote it. No index but the key: a pending record that is
-- overwritten by its outcome stays in its page.
CREATE TABLE {schema}.steps (
    run         uuid        NOT NULL,
    -- 0 the process, 1 its compensation
    scope       smallint    NOT NULL,
    name        text        COLLATE "C" NOT NULL,
    key         text        COLLATE "C" NOT NULL,
    -- step, value, delay, event, race, raise, spawn, output, transaction
    op          text        COLLATE "C" NOT NULL,
    -- pending, done, failed
    state       text        COLLATE "C" NOT NULL,
    payload     json        NOT NULL,
    attempts    integer     NOT NULL,
    -- in which order a run's records were sent to be written
    seq         integer     NOT NULL,
    claim       bigint      NOT NULL,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (run, scope, name, key)
) WITH (fillfactor = 90);

-- Mailboxes. `number` is the message's place in its run's order.
CREATE TABLE {schema}.events (
    run       uuid        NOT NULL,
    number    bigint      NOT NULL,
    name      text        COLLATE "C" NOT NULL,
    event_id  text        COLLATE "C" NOT NULL,
    payload   json        NOT NULL,
    raised_at timestamptz NOT NULL,
    taken_at  timestamptz,
    PRIMARY KEY (run, number)
);

CREATE UNIQUE INDEX events_id ON {schema}.events (run, event_id);
CREATE INDEX events_waiting ON {schema}.events (run, number) WHERE taken_at IS NULL;

-- Who awaits whose output.
CREATE TABLE {schema}.waiters (
    target uuid    NOT NULL,
    waiter uuid    NOT NULL,
    -- a chore has woken it
    told   boolean NOT NULL DEFAULT false,
    PRIMARY KEY (target, waiter)
);

CREATE INDEX waiters_waiter ON {schema}.waiters (waiter);
CREATE INDEX waiters_untold ON {schema}.waiters (target) WHERE NOT told;

-- What is too much for one transaction, done a part at a time.
CREATE TABLE {schema}.chores (
    run    uuid        NOT NULL PRIMARY KEY,
    -- wake: the run has ended, and the processes that await it are to be woken; delete: the run is deleted, so besides its
    -- rows in the other tables are to be deleted
    what   text        COLLATE "C" NOT NULL,
    due_at timestamptz NOT NULL
);

CREATE INDEX chores_due ON {schema}.chores (due_at);

-- Starts and messages out of transactions of the service's own, in the order in which they were put in. Such a transaction
-- only inserts here, so that while it is open nobody waits for it; whoever comes by moves what is committed on.
CREATE TABLE {schema}.inbox (
    number     bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    namespace  text        COLLATE "C" NOT NULL,
    -- start, message
    what       text        COLLATE "C" NOT NULL,
    -- the process's id
    id         text        COLLATE "C" NOT NULL,
    -- a start's kind, a message's event
    name       text        COLLATE "C" NOT NULL,
    -- a start's run, a message's id
    token      text        COLLATE "C" NOT NULL,
    payload    json        NOT NULL,
    -- of a start: the digest of its input, and whether a finished process makes way
    digest     text        NOT NULL,
    restart    boolean     NOT NULL,
    put_at     timestamptz NOT NULL,
    -- why the database would not have it moved on: it stays here until its process is deleted
    refused    text
);

CREATE INDEX inbox_waiting ON {schema}.inbox (namespace, number) WHERE refused IS NULL;
CREATE INDEX inbox_id ON {schema}.inbox (namespace, id, number) WHERE refused IS NULL;
CREATE INDEX inbox_refused ON {schema}.inbox (namespace, id) WHERE refused IS NOT NULL;

-- The engines that share this database. No index but the key, so that a heartbeat stays within its page.
CREATE TABLE {schema}.instances (
    instance     uuid        NOT NULL PRIMARY KEY,
    namespace    text        COLLATE "C" NOT NULL,
    label        text        NOT NULL,
    -- the kinds that it has registered
    kinds        text[]      NOT NULL,
    started_at   timestamptz NOT NULL,
    heartbeat_at timestamptz NOT NULL,
    -- the advisory lock that its session holds while it lives; and which run of the server it held it in at its last
    -- heartbeat, null if it did not
    lock_key     bigint      NOT NULL,
    locked_in    text,
    -- how long its session took to be had at most: others give it some time to have one again
    comeback_ms  integer     NOT NULL DEFAULT 0,
    -- after which silence it counts as dead
    expiry_ms    bigint      NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- A row whose fence is set may write no more. Apart from the heartbeat: every batch locks its fence, and must not hold
-- up the instance's own heartbeat.
CREATE TABLE {schema}.fences (
    instance   uuid   NOT NULL PRIMARY KEY,
    generation bigint NOT NULL,
    fenced_at  timestamptz
) WITH (fillfactor = 50);

-- Records that somebody told a resume to forget.
CREATE TABLE {schema}.audit (
    audit        uuid        NOT NULL PRIMARY KEY,
    run          uuid        NOT NULL,
    forgotten_at timestamptz NOT NULL,
    scope        smallint    NOT NULL,
    name         text        COLLATE "C" NOT NULL,
    key          text        COLLATE "C" NOT NULL,
    op           text        COLLATE "C" NOT NULL,
    state        text        COLLATE "C" NOT NULL,
    payload      json        NOT NULL,
    attempts     integer     NOT NULL,
    seq          integer     NOT NULL,
    claim        bigint      NOT NULL,
    recorded_at  timestamptz NOT NULL
);

CREATE INDEX audit_run ON {schema}.audit (run);
