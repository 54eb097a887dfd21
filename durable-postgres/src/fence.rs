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

/// The owners of processes that are no instances: somebody has deleted a row of theirs. One look for each owner, not for each
/// process.
pub(crate) fn strangers(schema: &Schema) -> Sql {
    let mut sql = Sql::default();
    sql.text = format!(
        "WITH RECURSIVE owners (owner) AS (
             (SELECT owner FROM {schema}.processes WHERE owner >= '00000000-0000-0000-0000-000000000000'
                 ORDER BY owner LIMIT 1)
             UNION ALL
             SELECT (SELECT p.owner FROM {schema}.processes p WHERE p.owner > o.owner ORDER BY p.owner LIMIT 1)
             FROM owners o WHERE o.owner IS NOT NULL)
         SELECT o.owner FROM owners o WHERE o.owner IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {schema}.instances i
             JOIN {schema}.fences f ON f.instance = i.instance WHERE i.instance = o.owner)"
    );
    sql
}

/// Makes an owner known again, as a fenced one, if it still owns something. Waits for the batch that holds the fence, where
/// there is one.
pub(crate) fn reinstate(schema: &Schema, owner: InstanceId) -> Sql {
    let mut sql = Sql::default();
    let instance = sql.bind(owner.0);
    sql.text = format!(
        "WITH of AS MATERIALIZED (SELECT owner, namespace FROM {schema}.processes WHERE owner = {instance} LIMIT 1),
         fence AS (INSERT INTO {schema}.fences AS f (instance, generation, fenced_at) SELECT owner, 0, now() FROM of
             ON CONFLICT (instance) DO UPDATE SET fenced_at = coalesce(f.fenced_at, excluded.fenced_at))
         INSERT INTO {schema}.instances (instance, namespace, label, kinds, started_at, heartbeat_at, lock_key)
         SELECT owner, namespace, 'unknown', '{{}}', now(), now(), 0 FROM of ON CONFLICT DO NOTHING"
    );
    sql
}
