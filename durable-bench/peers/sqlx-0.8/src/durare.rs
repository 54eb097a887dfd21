use async_trait::async_trait;
use durare::{
    DurableContext, DurableEngine, Error as Failure, PostgresProvider, SqliteProvider, StateProvider, WorkflowOptions,
};
use peer::{About, Called, Error, Peer};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use std::sync::Arc;
use std::time::Duration;

use crate::{LOCK, YEAR};

/// Tried: 8, which it has by itself, to 64.
const POSTGRES_POOL: usize = 32;
/// Tried: 1 to 16; 5 is what it has by itself.
const SQLITE_POOL: usize = 5;

struct Durare {
    engine: DurableEngine,
}

async fn steps(ctx: DurableContext, steps: u32) -> durare::Result<u32> {
    for _ in 0..steps {
        ctx.step("step", || async { Ok::<_, Failure>(12345) }).await?;
    }
    Ok(steps)
}

async fn year(ctx: DurableContext, _: ()) -> durare::Result<()> {
    ctx.sleep(YEAR).await
}

pub(crate) async fn start(called: &Called) -> Result<(About, Arc<dyn Peer>), Error> {
    let on_postgres = called.address.contains("://");
    let pool = peer::connections(if on_postgres { POSTGRES_POOL } else { SQLITE_POOL });
    let connections = u32::try_from(pool)?;
    let (provider, database): (Arc<dyn StateProvider>, String) = if on_postgres {
        let pool = PgPoolOptions::new().max_connections(connections).connect(&called.address).await?;
        (Arc::new(PostgresProvider::from_pool_with_schema(pool, "dbos")?), String::new())
    } else {
        // As in its own `connect`, but for what `full` is about.
        let synchronous = if called.full { SqliteSynchronous::Full } else { SqliteSynchronous::Normal };
        let options = SqliteConnectOptions::new()
            .filename(&called.address)
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .busy_timeout(Duration::from_secs(60));
        let pool = SqlitePoolOptions::new().max_connections(connections).connect_with(options).await?;
        let database = crate::sqlite(&pool).await?;
        (Arc::new(SqliteProvider::from_pool(pool)), database)
    };
    let mut builder = DurableEngine::builder(provider);
    builder.register("steps", steps).register("year", year);
    let engine = builder.build().await?;
    engine.launch().await?;
    let about = About {
        system: peer::version(LOCK, "durare"),
        database,
        settings: format!("started directly, {pool} connections{}", crate::less(called)),
        concurrent: peer::concurrent(64),
    };
    Ok((about, Arc::new(Durare { engine })))
}

#[async_trait]
impl Peer for Durare {
    async fn run(&self, id: String, steps: u32) -> Result<(), Error> {
        let handle = self.engine.start::<u32, u32>("steps", steps, WorkflowOptions::with_id(id)).await?;
        handle.result().await?;
        Ok(())
    }

    async fn wait(&self, id: String) -> Result<(), Error> {
        self.engine.start::<(), ()>("year", (), WorkflowOptions::with_id(id)).await?;
        Ok(())
    }

    async fn end(&self) -> Result<(), Error> {
        // What waits does not end.
        let _ = self.engine.shutdown(Duration::from_millis(100)).await;
        Ok(())
    }
}
