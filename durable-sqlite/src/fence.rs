//! Who may write: statements about instances other than their heartbeats.

use durable_core::storage::{InstanceId, Peer};

use crate::script::{Arg, NOW, Script};
use crate::store::limit_arg;

fn script<const N: usize>(sql: &str, args: [Arg; N]) -> Script {
    let mut script = Script::default();
    script.add(sql, args);
    script
}

/// No row changed: the instance is fenced.
pub(crate) fn refence(instance: InstanceId, generation: i64) -> Script {
    script(
        "UPDATE durable_fences SET generation = max(generation, ?) WHERE instance = ? AND fenced_at IS NULL",
        [generation.into(), instance.to_string().into()],
    )
}

/// No row changed: the heartbeat has.
pub(crate) fn fence(seen: &Peer) -> Script {
    script(
        &format!(
            "UPDATE durable_fences SET fenced_at = coalesce(fenced_at, {NOW}) WHERE instance = ?1 AND (
                 fenced_at IS NOT NULL OR EXISTS (SELECT 1 FROM durable_instances i
                     WHERE i.instance = ?1 AND i.heartbeat_at = ?2))"
        ),
        [seen.instance.to_string().into(), crate::time_text(seen.heartbeat_at).into()],
    )
}

/// The end of an instance, whatever its heartbeat.
pub(crate) fn end(instance: InstanceId) -> Script {
    script(
        &format!("UPDATE durable_fences SET fenced_at = coalesce(fenced_at, {NOW}) WHERE instance = ?"),
        [instance.to_string().into()],
    )
}

/// Hands processes of a fenced instance back.
pub(crate) fn release(fenced: InstanceId, limit: usize) -> Script {
    script(
        &format!(
            "{}
             WHERE run IN (SELECT run FROM durable_processes WHERE owner = ?1 LIMIT ?2)
                 AND EXISTS (SELECT 1 FROM durable_fences WHERE instance = ?1 AND fenced_at IS NOT NULL)",
            hand_back()
        ),
        [fenced.to_string().into(), limit_arg(limit)],
    )
}

/// Removes what is left of a fenced instance that owns nothing any more.
pub(crate) fn forget(instance: InstanceId) -> Script {
    let mut script = Script::default();
    script.add("BEGIN IMMEDIATE", []);
    for table in ["durable_instances", "durable_fences"] {
        script.add(
            &format!(
                "DELETE FROM {table} WHERE instance = ?1
                     AND NOT EXISTS (SELECT 1 FROM durable_processes WHERE owner = ?1)
                     AND EXISTS (SELECT 1 FROM durable_fences WHERE instance = ?1 AND fenced_at IS NOT NULL)"
            ),
            [instance.to_string().into()],
        );
    }
    script.add("COMMIT", []);
    script
}

/// Instances of which a row is missing: somebody has deleted it. Each as its bytes and as it stands there, which may be
/// anything. One look for each owner, not for each process.
pub(crate) fn strangers() -> (String, Vec<Arg>) {
    let sql = "WITH RECURSIVE owners (owner) AS (
             SELECT (SELECT owner FROM durable_processes WHERE owner >= '' ORDER BY owner LIMIT 1)
             UNION ALL
             SELECT (SELECT p.owner FROM durable_processes p WHERE p.owner > o.owner ORDER BY p.owner LIMIT 1)
             FROM owners o WHERE o.owner IS NOT NULL),
         every (instance) AS (SELECT owner FROM owners o WHERE owner IS NOT NULL
             UNION SELECT instance FROM durable_instances i UNION SELECT instance FROM durable_fences f)
         SELECT hex(e.instance), e.instance FROM every e WHERE NOT EXISTS (SELECT 1 FROM durable_instances i
             CROSS JOIN durable_fences f ON f.instance = i.instance WHERE i.instance = e.instance)";
    (sql.to_owned(), Vec::new())
}

/// Makes an instance of which a row is missing known again, as a fenced one; or removes its fence, if that is all there is.
pub(crate) fn reinstate(stranger: InstanceId) -> Script {
    let of = stranger.to_string();
    let mut script = Script::default();
    script.add("BEGIN IMMEDIATE", []);
    for sql in [
        // One that is known by now has a fence, which stays as it is.
        format!(
            "INSERT INTO durable_fences (instance, generation, fenced_at) SELECT ?1, 0, {NOW} WHERE NOT EXISTS (
                 SELECT 1 FROM durable_instances i CROSS JOIN durable_fences f ON f.instance = i.instance
                 WHERE i.instance = ?1)
             ON CONFLICT (instance) DO UPDATE SET fenced_at = coalesce(fenced_at, excluded.fenced_at)"
        ),
        format!(
            "INSERT INTO durable_instances (instance, namespace, label, kinds, started_at, heartbeat_at)
             SELECT ?1, p.namespace, 'unknown', '[]', {NOW}, {NOW} FROM durable_processes p WHERE p.owner = ?1 LIMIT 1
             ON CONFLICT DO NOTHING"
        ),
        "DELETE FROM durable_fences WHERE instance = ?1
             AND NOT EXISTS (SELECT 1 FROM durable_instances WHERE instance = ?1)"
            .to_owned(),
    ] {
        script.add(&sql, [of.as_str().into()]);
    }
    script.add("COMMIT", []);
    script
}

/// Hands back what is owned by what no instance can be called.
pub(crate) fn release_all(bytes: &str) -> Script {
    script(&format!("{} WHERE owner >= '' AND hex(owner) = ?", hand_back()), [bytes.into()])
}

fn hand_back() -> String {
    format!(
        "UPDATE durable_processes SET owner = NULL, status = 'waiting', wake_at = {NOW}, signalled = 0,
             status_at = {NOW}"
    )
}
