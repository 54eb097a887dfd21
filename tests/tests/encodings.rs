//! A database whose encoding lacks characters: what it cannot hold is an error for the caller, or makes the process stuck, and
//! no process runs again and again for it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use durable_core::*;
use durable_postgres::Postgres;
use durable_tests::*;
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const PANICS: Definition<String, ()> = Definition::new("panics");
const RETURNS: Definition<String, String> = Definition::new("returns");

#[test]
fn a_database_that_lacks_characters() {
    Server::run(async |server| {
        let mut session = PgConnection::connect(server.url()).await.unwrap();
        let latin = "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0";
        session.execute(latin).await.unwrap();
        let (server, _) = server.url().rsplit_once('/').unwrap();
        let storage = Postgres::connect(format!("{server}/latin")).await.unwrap();
        let count = Arc::new(AtomicU32::new(0));
        let (counted, counts) = (count.clone(), count.clone());
        let panics = move |proc: Process, text: String| {
            let counted = counted.clone();
            async move {
                let step = || async {
                    counted.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Failure>(())
                };
                proc.step("counts", step).await?;
                panic!("{text} \u{2192} not reachable");
                #[allow(unreachable_code)]
                Ok::<_, Failure>(())
            }
        };
        let returns = move |proc: Process, text: String| {
            let counts = counts.clone();
            async move {
                let step = || async {
                    counts.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Failure>(format!("{text} \u{2192}"))
                };
                proc.step("returns", step).await.map_err(Failure::from)
            }
        };
        let builder = Host::builder(storage).register(PANICS, panics).register(RETURNS, returns);
        let host = builder.reconcile_every(Duration::from_millis(300)).start().await.unwrap();
        let panics = host.spawn(PANICS, "panics", &"h\u{f6}chst".to_owned()).await.unwrap();
        let returns = host.spawn(RETURNS, "returns", &"h\u{f6}chst".to_owned()).await.unwrap();
        let reason = until_status(&panics, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains("h\\u{f6}chst \\u{2192} not reachable"), "{reason}");
        let reason = until_status(&returns, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains("the database refuses the record of step \"returns\""), "{reason}");
        let refused = host.spawn(PANICS, "p-\u{2192}", &"x".to_owned()).await.unwrap_err();
        assert!(matches!(refused, SpawnError::Unavailable(_)), "{refused:?}");
        // Nothing is compared in vain: both stay as they are.
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(count.load(Ordering::SeqCst), 2);
    });
}
