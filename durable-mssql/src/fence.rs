//! Who may write: statements about instances other than their heartbeats.
//!
//! A batch holds the application lock of its instance, shared, from before it reads the fence until its commit. Whoever
//! changes the fence holds the lock alone: it waits for the batches that are on their way, and those that come later
//! read what it has written, whatever the database's row versioning.

use durable_core::storage::{InstanceId, Peer};
use uuid::Uuid;

use crate::heart;
use crate::names::Schema;
use crate::read::limit_arg;
use crate::rows::time_text;
use crate::sql::{Sql, hex};

/// The name of the lock.
pub(crate) fn lock(schema: &Schema, instance: Uuid) -> String {
    schema.lock(format_args!("fence/{}", hex(instance)))
}

/// Takes the lock in the script's transaction; `@verdict` tells if it could not.
pub(crate) fn take(lock: &str, mode: &str) -> String {
    format!(
        "EXECUTE sp_getapplock {lock}, N'{mode}', N'Transaction', @patience;
         IF APPLOCK_MODE(N'public', {lock}, N'Transaction') = N'NoLock' SET @verdict = {BUSY}"
    )
}

/// The lock did not come free in time.
pub(crate) const BUSY: i32 = 3;

/// A script that does something to an instance under its lock, and answers with `@verdict` and `@rows`.
fn alone(schema: &Schema, instance: Uuid, write: impl FnOnce(&mut Sql) -> String) -> Sql {
    let mut sql = Sql::default();
    let (me, name) = (sql.id(instance), sql.text(lock(schema, instance)));
    sql.push(format!("DECLARE @me BINARY(16) = {me}, @verdict INT = 0, @rows INT = 0, @patience INT = @@LOCK_TIMEOUT"));
    sql.push("BEGIN TRANSACTION");
    sql.push(take(&name, "Exclusive"));
    let write = write(&mut sql);
    sql.push(format!("IF @verdict = 0 BEGIN {write} END"));
    sql.push("COMMIT TRANSACTION");
    sql.push("SELECT @verdict, @rows");
    sql
}

/// No row: the instance is fenced.
pub(crate) fn refence(schema: &Schema, instance: InstanceId, generation: i64) -> Sql {
    alone(schema, instance.0, |sql| {
        let generation = sql.number(generation);
        format!(
            "UPDATE f SET generation = CASE WHEN f.generation < {generation} THEN {generation} ELSE f.generation END
                 FROM {schema}.fences AS f WHERE f.instance = @me AND f.fenced_at IS NULL;
             SET @rows = @@ROWCOUNT;"
        )
    })
}

/// Looks at the heartbeat when nothing of the instance is on its way any more, and keeps it from changing. No row: it has
/// changed.
pub(crate) fn fence(schema: &Schema, seen: &Peer) -> Sql {
    alone(schema, seen.instance.0, |sql| {
        let heartbeat = sql.text(time_text(seen.heartbeat_at));
        format!(
            "UPDATE i SET heartbeat_at = i.heartbeat_at FROM {schema}.instances AS i
                 WHERE i.instance = @me AND i.heartbeat_at = CONVERT(DATETIME2(6), {heartbeat}, 126);
             SET @rows = @@ROWCOUNT;
             UPDATE f SET fenced_at = SYSUTCDATETIME() FROM {schema}.fences AS f
                 WHERE f.instance = @me AND f.fenced_at IS NULL AND @rows > 0;
             SET @rows = (SELECT COUNT(*) FROM {schema}.fences AS f
                 WHERE f.instance = @me AND f.fenced_at IS NOT NULL);"
        )
    })
}

/// The end of an instance, whatever its heartbeat.
pub(crate) fn end(schema: &Schema, instance: InstanceId) -> Sql {
    alone(schema, instance.0, |_| {
        format!(
            "UPDATE f SET fenced_at = SYSUTCDATETIME() FROM {schema}.fences AS f
                 WHERE f.instance = @me AND f.fenced_at IS NULL;"
        )
    })
}

/// Hands processes of a fenced instance back, and says how many.
pub(crate) fn release(schema: &Schema, fenced: InstanceId, limit: usize) -> Sql {
    alone(schema, fenced.0, |sql| {
        // Above some thousands the server would lock the whole table.
        let limit = sql.number(limit_arg(limit.min(2000)));
        format!(
            "UPDATE p SET owner = NULL, status = N'waiting', wake_at = SYSUTCDATETIME(), signalled = 0,
                     status_at = SYSUTCDATETIME()
                 FROM {schema}.processes AS p
                 WHERE p.owner = @me AND p.run IN (SELECT TOP ({limit}) q.run FROM {schema}.processes AS q
                     WHERE q.owner = @me ORDER BY q.run)
                 AND EXISTS (SELECT 1 FROM {schema}.fences AS f WHERE f.instance = @me AND f.fenced_at IS NOT NULL);
             SET @rows = @@ROWCOUNT;"
        )
    })
}

/// Removes what is left of a fenced instance that owns nothing any more.
pub(crate) fn forget(schema: &Schema, instance: InstanceId) -> Sql {
    alone(schema, instance.0, |_| {
        format!(
            "IF NOT EXISTS (SELECT 1 FROM {schema}.processes AS p WHERE p.owner = @me)
                 AND EXISTS (SELECT 1 FROM {schema}.fences AS f WHERE f.instance = @me AND f.fenced_at IS NOT NULL)
             BEGIN
                 DELETE FROM {schema}.fences WHERE instance = @me;
                 DELETE FROM {schema}.instances WHERE instance = @me;
             END;
             SET @rows = (SELECT COUNT(*) FROM {schema}.fences AS f WHERE f.instance = @me AND f.fenced_at IS NOT NULL);"
        )
    })
}

/// Instances of which a row is missing: somebody has deleted it. One look for each owner, not for each process.
pub(crate) fn strangers(schema: &Schema) -> Sql {
    let mut sql = Sql::default();
    let next = |after: &str| {
        format!("SET @owner = (SELECT TOP (1) p.owner FROM {schema}.processes AS p WHERE {after} ORDER BY p.owner)")
    };
    sql.push("DECLARE @owner BINARY(16)");
    sql.push("DECLARE @every TABLE (instance BINARY(16))");
    sql.push(next("p.owner IS NOT NULL"));
    sql.push(format!(
        "WHILE @owner IS NOT NULL BEGIN
             INSERT INTO @every (instance) VALUES (@owner);
             {};
         END",
        next("p.owner > @owner")
    ));
    sql.push(format!("INSERT INTO @every (instance) SELECT i.instance FROM {schema}.instances AS i"));
    sql.push(format!("INSERT INTO @every (instance) SELECT f.instance FROM {schema}.fences AS f"));
    sql.push(format!("SELECT DISTINCT e.instance FROM @every AS e WHERE NOT EXISTS ({})", known(schema, "e.instance")));
    sql
}

fn known(schema: &Schema, instance: &str) -> String {
    format!(
        "SELECT 1 FROM {schema}.instances AS i JOIN {schema}.fences AS f ON f.instance = i.instance
                 WHERE i.instance = {instance}"
    )
}

/// Makes an instance of which a row is missing known again, as a fenced one; or removes its fence, if that is all there is.
pub(crate) fn reinstate(schema: &Schema, stranger: InstanceId) -> Sql {
    alone(schema, stranger.0, |sql| {
        let (alive, known) = (sql.text(heart::lock(schema, stranger.0)), known(schema, "@me"));
        format!(
            "IF NOT EXISTS ({known})
             BEGIN
                 INSERT INTO {schema}.instances (instance, namespace, label, kinds, started_at, heartbeat_at, lock_name)
                     SELECT TOP (1) @me, p.namespace, N'unknown', N'[]', SYSUTCDATETIME(), SYSUTCDATETIME(), {alive}
                     FROM {schema}.processes AS p WHERE p.owner = @me
                         AND NOT EXISTS (SELECT 1 FROM {schema}.instances AS i WHERE i.instance = @me);
                 IF EXISTS (SELECT 1 FROM {schema}.instances AS i WHERE i.instance = @me)
                 BEGIN
                     UPDATE f SET fenced_at = SYSUTCDATETIME() FROM {schema}.fences AS f
                         WHERE f.instance = @me AND f.fenced_at IS NULL;
                     INSERT INTO {schema}.fences (instance, generation, fenced_at) SELECT @me, 0, SYSUTCDATETIME()
                         WHERE NOT EXISTS (SELECT 1 FROM {schema}.fences AS f WHERE f.instance = @me);
                 END
                 ELSE DELETE FROM {schema}.fences WHERE instance = @me;
             END;"
        )
    })
}
