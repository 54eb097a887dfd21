//! Who may write: statements about instances other than their heartbeats.

use durable_core::storage::{InstanceId, Peer};

use crate::names::Schema;
use crate::read::limit_arg;
use crate::rows::time_text;
use crate::sql::Sql;

/// Waits for the lock that an earlier batch holds on the row, if it is still on its way; one that comes later finds the
/// row changed. No row: the instance is fenced.
pub(crate) fn refence(schema: &Schema, instance: InstanceId, generation: i64) -> Sql {
    let mut sql = Sql::default();
    let (instance, generation) = (sql.bind(instance.0), sql.bind(generation));
    sql.text = format!(
        "UPDATE {schema}.fences SET generation = greatest(generation, {generation})
         WHERE instance = {instance} AND fenced_at IS NULL RETURNING 1"
    );
    sql
}

/// Waits for the batch that holds the fence, and looks at the heartbeat after that. No row: it has changed.
pub(crate) fn fence(schema: &Schema, seen: &Peer) -> Sql {
    let mut sql = Sql::default();
    let (instance, heartbeat) = (sql.bind(seen.instance.0), sql.bind(time_text(seen.heartbeat_at)));
    sql.text = format!(
        "WITH fence AS MATERIALIZED (SELECT instance, fenced_at FROM {schema}.fences WHERE instance = {instance}
             FOR NO KEY UPDATE),
         silent AS MATERIALIZED (SELECT instance FROM {schema}.instances WHERE instance = {instance}
             AND heartbeat_at = {heartbeat}::timestamptz AND EXISTS (SELECT 1 FROM fence) FOR NO KEY UPDATE)
         UPDATE {schema}.fences f SET fenced_at = coalesce(f.fenced_at, now()) FROM fence
         WHERE f.instance = fence.instance AND (fence.fenced_at IS NOT NULL OR EXISTS (SELECT 1 FROM silent))
         RETURNING 1"
    );
    sql
}

/// The end of an instance, whatever its heartbeat.
pub(crate) fn end(schema: &Schema, instance: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let instance = sql.bind(instance.0);
    sql.text = format!("UPDATE {schema}.fences SET fenced_at = coalesce(fenced_at, now()) WHERE instance = {instance}");
    sql
}

/// Hands processes of a fenced instance back; a row for each.
pub(crate) fn release(schema: &Schema, fenced: InstanceId, limit: usize) -> Sql {
    let mut sql = Sql::default();
    let (instance, limit) = (sql.bind(fenced.0), sql.bind(limit_arg(limit)));
    sql.text = format!(
        "WITH theirs AS MATERIALIZED (SELECT run FROM {schema}.processes WHERE owner = {instance}
             AND EXISTS (SELECT 1 FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NOT NULL)
             ORDER BY run LIMIT {limit} FOR NO KEY UPDATE)
         UPDATE {schema}.processes p SET owner = NULL, status = 'waiting', wake_at = now(), signalled = false,
             status_at = now()
         FROM theirs WHERE p.run = theirs.run RETURNING 1"
    );
    sql
}

/// Removes what is left of a fenced instance that owns nothing any more. Answers whether it still owns something.
pub(crate) fn forget(schema: &Schema, instance: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let instance = sql.bind(instance.0);
    sql.text = format!(
        "WITH owns AS MATERIALIZED (SELECT 1 FROM {schema}.processes WHERE owner = {instance} LIMIT 1),
         gone AS (DELETE FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM owns) RETURNING instance),
         removed AS (DELETE FROM {schema}.instances i USING gone WHERE i.instance = gone.instance RETURNING 1)
         SELECT EXISTS (SELECT 1 FROM owns)
             AND EXISTS (SELECT 1 FROM {schema}.fences WHERE instance = {instance} AND fenced_at IS NOT NULL)"
    );
    sql
}

/// Instances of which a row is missing: somebody has deleted it. One look for each owner, not for each process.
pub(crate) fn strangers(schema: &Schema) -> Sql {
    let mut sql = Sql::default();
    sql.text = format!(
        "WITH RECURSIVE owners (owner) AS (
             (SELECT owner FROM {schema}.processes WHERE owner >= '00000000-0000-0000-0000-000000000000'
                 ORDER BY owner LIMIT 1)
             UNION ALL
             SELECT (SELECT p.owner FROM {schema}.processes p WHERE p.owner > o.owner ORDER BY p.owner LIMIT 1)
             FROM owners o WHERE o.owner IS NOT NULL),
         every (instance) AS (SELECT owner FROM owners WHERE owner IS NOT NULL
             UNION SELECT instance FROM {schema}.instances UNION SELECT instance FROM {schema}.fences)
         SELECT e.instance FROM every e WHERE NOT EXISTS ({})",
        known(schema, "e.instance")
    );
    sql
}

fn known(schema: &Schema, instance: &str) -> String {
    format!(
        "SELECT 1 FROM {schema}.instances i JOIN {schema}.fences f ON f.instance = i.instance
             WHERE i.instance = {instance}"
    )
}

/// Makes an instance of which a row is missing known again, as a fenced one; or removes its fence, if that is all there is.
/// Waits for the batch that holds the fence, where there is one, before it says whose the other row is.
pub(crate) fn reinstate(schema: &Schema, stranger: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let instance = sql.bind(stranger.0);
    sql.text = format!(
        "WITH owns AS MATERIALIZED (SELECT owner, namespace FROM {schema}.processes WHERE owner = {instance} LIMIT 1),
         named AS MATERIALIZED (SELECT 1 FROM owns UNION ALL
             SELECT 1 FROM {schema}.instances WHERE instance = {instance}),
         fence AS (INSERT INTO {schema}.fences AS f (instance, generation, fenced_at) SELECT {instance}, 0, now()
             WHERE EXISTS (SELECT 1 FROM named) AND NOT EXISTS ({})
             ON CONFLICT (instance) DO UPDATE SET fenced_at = coalesce(f.fenced_at, excluded.fenced_at)
             RETURNING instance),
         gone AS (DELETE FROM {schema}.fences WHERE instance = {instance} AND NOT EXISTS (SELECT 1 FROM named))
         INSERT INTO {schema}.instances (instance, namespace, label, kinds, started_at, heartbeat_at, lock_key)
         SELECT owner, namespace, 'unknown', '{{}}', now(), now(), 0 FROM owns JOIN fence ON fence.instance = owns.owner
         ON CONFLICT DO NOTHING",
        known(schema, &instance)
    );
    sql
}
