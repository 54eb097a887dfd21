//! The systems that this program can be linked with: this library, and `dbos`.

use async_trait::async_trait;
use dbos::{Config, DBOS, StartOptions, WorkflowRef};
use durable_bench::processes::{STEPS, YEAR};
use durable_bench::site::At;
use durable_core::Host;
use peer::{About, Called, Error, Peer};
use std::sync::Arc;
use std::time::Duration;

const LOCK: &str = include_str!("../Cargo.lock");

/// This is such a program.
pub(crate) async fn run(called: &Called) -> Result<(), Error> {
    let (about, peer): (About, Arc<dyn Peer>) = match called.system.as_str() {
        "durable" => durable(called).await?,
        "dbos" => dbos(called).await?,
        other => return Err(format!("no system {other:?}; there are: durable, dbos").into()),
    };
    peer::serve(called, about, peer).await
}

struct Durable(Host);

async fn durable(called: &Called) -> Result<(About, Arc<dyn Peer>), Error> {
    let schema = called.address.contains("://").then(|| "durable".to_owned());
    let host = At::new(called.address.clone(), schema).host().await?.start().await?;
    let about = About {
        system: peer::version(LOCK, "durable-core").replace("-core", ""),
        database: String::new(),
        settings: "as it is by itself".into(),
        concurrent: peer::concurrent(4000),
    };
    Ok((about, Arc::new(Durable(host))))
}

#[async_trait]
impl Peer for Durable {
    async fn run(&self, id: String, steps: u32) -> Result<(), Error> {
        self.0.spawn(STEPS, id, &steps).await?.output().await?;
        Ok(())
    }

    async fn wait(&self, id: String) -> Result<(), Error> {
        self.0.spawn(YEAR, id, &()).await?;
        Ok(())
    }

    async fn end(&self) -> Result<(), Error> {
        self.0.shutdown(Duration::from_secs(5)).await;
        Ok(())
    }
}

struct Dbos {
    dbos: DBOS,
    steps: WorkflowRef<u32, u32, dbos::EngineOnly>,
    year: WorkflowRef<(), (), dbos::EngineOnly>,
}

async fn steps(steps: u32) -> dbos::Result<u32> {
    for _ in 0..steps {
        dbos::step("step", || async { dbos::Result::Ok(12345) }).await?;
    }
    Ok(steps)
}

async fn year((): ()) -> dbos::Result<()> {
    dbos::sleep(Duration::from_secs(365 * 24 * 3600)).await
}

/// Its own is 10.
const DBOS_POOL: usize = 32;

async fn dbos(called: &Called) -> Result<(About, Arc<dyn Peer>), Error> {
    let pool = peer::connections(DBOS_POOL);
    let dbos = DBOS::new(Config {
        app_version: Some("1".into()),
        max_connections: u32::try_from(pool)?,
        ..Config::new("bench", called.address.clone())
    });
    let (steps, year) = (dbos.register_workflow("steps", steps)?, dbos.register_workflow("year", year)?);
    dbos.launch().await?;
    let about = About {
        system: peer::version(LOCK, "dbos"),
        database: String::new(),
        settings: format!("started directly, {pool} connections"),
        concurrent: peer::concurrent(64),
    };
    Ok((about, Arc::new(Dbos { dbos, steps, year })))
}

#[async_trait]
impl Peer for Dbos {
    async fn run(&self, id: String, steps: u32) -> Result<(), Error> {
        let options = StartOptions { workflow_id: Some(&id), ..Default::default() };
        self.steps.start_with(steps, options).await?.result().await?;
        Ok(())
    }

    async fn wait(&self, id: String) -> Result<(), Error> {
        let options = StartOptions { workflow_id: Some(&id), ..Default::default() };
        self.year.start_with((), options).await?;
        Ok(())
    }

    async fn end(&self) -> Result<(), Error> {
        self.dbos.shutdown().await;
        Ok(())
    }
}
