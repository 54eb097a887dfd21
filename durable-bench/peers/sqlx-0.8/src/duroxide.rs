use async_trait::async_trait;
use duroxide::providers::Provider;
use duroxide::providers::sqlite::SqliteProvider;
use duroxide::runtime::registry::ActivityRegistry;
use duroxide::runtime::{OrchestrationStatus, Runtime, RuntimeOptions};
use duroxide::{ActivityContext, Client, OrchestrationContext, OrchestrationRegistry};
use duroxide_pg::PostgresProvider;
use peer::{About, Called, Error, Peer};
use std::sync::Arc;
use std::time::Duration;

use crate::{LOCK, YEAR};

struct Duroxide {
    client: Client,
    runtime: Arc<Runtime>,
}

async fn steps(context: OrchestrationContext, steps: String) -> Result<String, String> {
    let count: u32 = steps.parse().map_err(|error| format!("{error}"))?;
    for n in 0..count {
        context.schedule_activity("step", n.to_string()).await?;
    }
    Ok(steps)
}

async fn year(context: OrchestrationContext, _: String) -> Result<String, String> {
    context.schedule_timer(YEAR).await;
    Ok(String::new())
}

/// How its SQLite provider connects, with the same number of connections.
const SQLITE_POOL: usize = 5;
/// Its own is 10; it goes with what follows.
pub(crate) const POSTGRES_POOL: usize = 32;

pub(crate) async fn start(called: &Called) -> Result<(About, Arc<dyn Peer>), Error> {
    let (provider, database, workers, pool): (Arc<dyn Provider>, String, usize, usize) = if called.system == "duroxide"
    {
        let provider = SqliteProvider::new(&format!("sqlite:{}?mode=rwc", called.address), None).await?;
        let pool = provider.get_pool();
        if called.full {
            // Each connection of its pool, at once, so that it is each.
            let mut all = Vec::new();
            for _ in 0..SQLITE_POOL {
                let mut connection = pool.acquire().await?;
                sqlx::query("PRAGMA synchronous = FULL").execute(&mut *connection).await?;
                all.push(connection);
            }
        }
        let database = crate::sqlite(pool).await?;
        (Arc::new(provider), database, 2, SQLITE_POOL)
    } else {
        (Arc::new(PostgresProvider::new(&called.address).await?), String::new(), 8, peer::connections(POSTGRES_POOL))
    };
    let workers = peer::setting("PEER_WORKERS", workers);
    let poll = Duration::from_millis(1);
    let options = RuntimeOptions {
        dispatcher_min_poll_interval: poll,
        orchestration_concurrency: workers,
        worker_concurrency: workers,
        ..RuntimeOptions::default()
    };
    let activities = ActivityRegistry::builder()
        .register("step", |_: ActivityContext, _: String| async { Ok("12345".to_owned()) })
        .build();
    let orchestrations = OrchestrationRegistry::builder().register("steps", steps).register("year", year).build();
    let runtime = Runtime::start_with_options(provider.clone(), activities, orchestrations, options).await;
    let about = About {
        system: peer::version(LOCK, &called.system),
        database,
        settings: format!(
            "{workers} orchestration and {workers} activity workers, polling every {} ms, {pool} connections{}",
            poll.as_millis(),
            crate::less(called)
        ),
        concurrent: peer::concurrent(if called.system == "duroxide" { 16 } else { 64 }),
    };
    Ok((about, Arc::new(Duroxide { client: Client::new(provider), runtime })))
}

#[async_trait]
impl Peer for Duroxide {
    async fn run(&self, id: String, steps: u32) -> Result<(), Error> {
        self.client.start_orchestration(&id, "steps", steps.to_string()).await?;
        match self.client.wait_for_orchestration(&id, Duration::from_secs(600)).await? {
            OrchestrationStatus::Completed { .. } => Ok(()),
            other => Err(format!("{id}: {other:?}").into()),
        }
    }

    async fn wait(&self, id: String) -> Result<(), Error> {
        Ok(self.client.start_orchestration(&id, "year", "").await?)
    }

    async fn end(&self) -> Result<(), Error> {
        self.runtime.clone().shutdown(Some(100)).await;
        Ok(())
    }
}
