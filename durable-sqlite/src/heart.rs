//! The heartbeat, and what it tells of others.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use durable_core::storage::{Heart, InstanceId, NewInstance, Peer, Peers, Result, StorageError, millis};
use serde_json::json;
use sqlx::sqlite::SqliteRow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::connect::connect;
use crate::errors::reading;
use crate::lend::Single;
use crate::life::Life;
use crate::rows::{get, id, time};
use crate::script::{NOW, Script};
use crate::store::{Shared, all, now_in, patiently, readable};

pub(crate) async fn enlist(shared: &Arc<Shared>, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)> {
    let life = shared.lives.begin(instance.id)?;
    shared.files.admit(None).await?;
    let mut connection = connect(&shared.options).await.map_err(|error| shared.named(reading(error)))?;
    let of = instance.id.to_string();
    let kinds = json!(instance.kinds).to_string();
    let script = || {
        let mut script = Script::default();
        script.add("BEGIN IMMEDIATE", []);
        script.add(
            "INSERT INTO durable_fences (instance, generation) VALUES (?, 0) ON CONFLICT DO NOTHING",
            [of.as_str().into()],
        );
        script.add(
            &format!(
                "INSERT INTO durable_instances (instance, namespace, label, kinds, expiry_ms, started_at, heartbeat_at)
                 VALUES (?, ?, ?, ?, ?, {NOW}, {NOW}) ON CONFLICT DO NOTHING"
            ),
            [
                of.as_str().into(),
                (&*instance.namespace).into(),
                (&*instance.label).into(),
                kinds.as_str().into(),
                instance.expiry_ms().into(),
            ],
        );
        script.add(&format!("SELECT {NOW}"), []);
        script.add("COMMIT", []);
        script
    };
    let answers = patiently(script, &mut connection).await.map_err(|error| shared.named(error))?;
    let now = now_in(&answers)?;
    let heart = SqliteHeart { shared: shared.clone(), connection: Single::new(connection), instance: of, _life: life };
    Ok((Box::new(heart), now))
}

/// The others, and the time.
pub(crate) async fn peers(shared: &Shared, namespace: &str, me: InstanceId) -> Result<Peers> {
    let others =
        "SELECT i.instance, i.heartbeat_at, f.fenced_at IS NOT NULL, i.expiry_ms, i.kinds FROM durable_instances i
             LEFT JOIN durable_fences f ON f.instance = i.instance
         WHERE i.namespace = ? AND i.instance <> ?";
    let args = vec![namespace.into(), me.to_string().into()];
    let answers = shared.read([(format!("SELECT {NOW}"), vec![]), (others.to_owned(), args)]).await?;
    let now = now_in(&answers)?;
    let peer = |row: &SqliteRow| {
        let instance = id("instance", get::<&str>(row, 0)?)?;
        // Looked at after the heartbeat was read: one that began to live since then has another heartbeat.
        let lock = shared.lives.look(instance);
        Ok(Peer {
            instance,
            heartbeat_at: time("heartbeat_at", get(row, 1)?)?,
            lock,
            fenced: get(row, 2)?,
            comeback: Duration::ZERO,
            expiry: millis(get(row, 3)?),
            kinds: get::<&str>(row, 4).ok().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default(),
        })
    };
    let rows = answers.iter().skip(1).flat_map(|answer| &answer.rows);
    let peers: Vec<Peer> = rows.filter_map(|row| readable(peer(row))).collect();
    shared.breath.has_company(!peers.is_empty());
    Ok(Peers { now, peers })
}

/// The heartbeat: on a connection of its own, so that nothing in this program holds it up; it asks batches to let it
/// pass.
struct SqliteHeart {
    shared: Arc<Shared>,
    connection: Single,
    instance: String,
    _life: Life,
}

#[async_trait]
impl Heart for SqliteHeart {
    async fn beat(&mut self) -> Result<DateTime<Utc>> {
        let script = || {
            let mut script = Script::default();
            script.add(
                &format!(
                    "UPDATE durable_instances SET heartbeat_at = {NOW} WHERE instance = ?1 AND EXISTS (
                         SELECT 1 FROM durable_fences WHERE instance = ?1 AND fenced_at IS NULL)
                     RETURNING heartbeat_at"
                ),
                [self.instance.as_str().into()],
            );
            script
        };
        let mut lent = self.connection.lend(&self.shared.options, &self.shared.files).await?;
        let waiting = Waiting::begin(&self.shared.hearts_waiting);
        let result = patiently(script, &mut lent.connection).await;
        drop(waiting);
        let answers = lent.done(result)?;
        if all(&answers).next().is_none() {
            return Err(StorageError::Fenced);
        }
        now_in(&answers)
    }
}

/// A heart waits for the write lock while this lives.
struct Waiting<'s>(&'s AtomicUsize);

impl<'s> Waiting<'s> {
    fn begin(hearts: &'s AtomicUsize) -> Self {
        hearts.fetch_add(1, Ordering::AcqRel);
        Self(hearts)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
