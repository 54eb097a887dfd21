//! What can go wrong on SQLite alone: disks that are full, statements that nobody waits for.

use durable_core::{Definition, Failure, Host, Process, Status};
use durable_sqlite::{Outbox, Transactions};
use durable_tests::{Backend, Effects, Sql, SqliteFile, quick, until_status};
use serde::{Deserialize, Serialize};
use sqlx::Executor;
use std::future::IntoFuture;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
struct Hidden(String);

impl From<sqlx::Error> for Hidden {
    fn from(error: sqlx::Error) -> Self {
        Self(error.to_string())
    }
}

/// The database's page count may not grow for the closure's first call.
#[test]
fn a_full_disk_is_none_of_the_processs_business() {
    const FILL: Definition<(String, bool), bool> = Definition::new("fill");
    const ROWS: &str = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100)
        INSERT INTO filled SELECT zeroblob(10000) FROM n";
    const A_ROW: &str = "INSERT INTO filled VALUES (zeroblob(1000000))";
    durable_tests::run(async {
        let backend = SqliteFile::new().await;
        backend.storage().await;
        backend.execute("CREATE TABLE filled (content BLOB)").await;
        let calls = Effects::default();
        let counted = calls.clone();
        let function = move |proc: Process, (fills, fails): (String, bool)| {
            let calls = counted.clone();
            async move {
                let fill = proc.transaction("fill", async |mut tx| {
                    calls.add(&fills);
                    tx.execute("INSERT INTO filled VALUES ('')").await?;
                    if calls.count(&fills) == 1 {
                        tx.execute("PRAGMA max_page_count = 1").await?;
                    }
                    match tx.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(fills.clone()))).await {
                        Err(error) if fails => Err(Hidden::from(error)),
                        // Whoever overlooks it has nothing left that could be committed.
                        done => Ok::<_, Hidden>(done.is_ok()),
                    }
                });
                Ok::<_, Failure>(fill.await.unwrap())
            }
        };
        let host: Host = quick(&backend).await.register(FILL, function).start().await.unwrap();
        for (fills, fails) in [(A_ROW, true), (ROWS, true), (A_ROW, false)] {
            let sql = format!("{fills} -- {fails}");
            let handle = host.spawn(FILL, fails.to_string() + &fills[..4], &(sql.clone(), fails)).await.unwrap();
            assert!(handle.output().await.unwrap(), "{sql}");
            assert_eq!(calls.count(&sql), 2, "{sql}");
        }
        assert_eq!(backend.number("SELECT count(*) FROM filled").await, 3 + 1 + 100 + 1);
    });
}

/// The closure's own COMMIT keeps nothing, whatever came of its handle.
#[test]
fn a_commit_of_the_closures_keeps_nothing() {
    const KEEP: Definition<String, ()> = Definition::new("keep");
    durable_tests::run(async {
        let backend = SqliteFile::new().await;
        backend.storage().await;
        backend.execute("CREATE TABLE kept (what TEXT)").await;
        let function = |proc: Process, ends: String| async move {
            let keep = proc.transaction("keep", async |mut tx| {
                for sql in ["INSERT INTO kept VALUES ('before')", &ends, "INSERT INTO kept VALUES ('behind')"] {
                    let _ = tx.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned()))).await;
                }
                Ok::<_, Hidden>(())
            });
            keep.await.unwrap();
            Ok::<_, Failure>(())
        };
        let host = quick(&backend).await.register(KEEP, function).start().await.unwrap();
        for ends in ["COMMIT", "ROLLBACK"] {
            let handle = host.spawn(KEEP, ends, &ends.to_owned()).await.unwrap();
            until_status(&handle, Status::Stuck).await;
        }
        assert_eq!(backend.number("SELECT count(*) FROM kept").await, 0);
    });
}

/// A handle that was given away holds the right to write for as long as it is kept, but whatever is done with it is undone.
#[test]
fn what_a_handle_does_that_was_given_away_is_undone() {
    const KEEP: Definition<(), ()> = Definition::new("keep");
    durable_tests::run(async {
        let backend = SqliteFile::new().await;
        backend.storage().await;
        backend.execute("CREATE TABLE kept (what TEXT)").await;
        let (give, mut given) = tokio::sync::mpsc::unbounded_channel();
        let function = move |proc: Process, ()| {
            let give = give.clone();
            async move {
                let keep = proc.transaction("keep", async |mut tx| {
                    tx.execute("INSERT INTO kept VALUES ('within')").await?;
                    let _ = give.send(tx);
                    Ok::<_, Hidden>(())
                });
                keep.await.unwrap();
                Ok::<_, Failure>(())
            }
        };
        let host = quick(&backend).await.register(KEEP, function).start().await.unwrap();
        let handle = host.spawn(KEEP, "k", &()).await.unwrap();
        let mut tx = given.recv().await.unwrap();
        let _ = tx.execute("INSERT INTO kept VALUES ('behind')").await;
        tx.execute("COMMIT").await.unwrap_err();
        // It is still kept.
        until_status(&handle, Status::Stuck).await;
        let _ = tx.execute("INSERT INTO kept VALUES ('much later')").await;
        drop(tx);
        assert_eq!(backend.number("SELECT count(*) FROM kept").await, 0);
    });
}

/// A start that is dropped before it returns, in a transaction that is committed all the same, has happened or has not.
#[test]
fn a_start_that_is_dropped_is_whole_or_nothing() {
    const NOTHING: Definition<u32, ()> = Definition::new("nothing");
    durable_tests::run(async {
        let backend = SqliteFile::new().await;
        let host =
            quick(&backend).await.register(NOTHING, async |_, _: u32| Ok::<_, Failure>(())).start().await.unwrap();
        host.spawn(NOTHING, "n", &0).await.unwrap().output().await.unwrap();
        // So slow that what waits for it is gone before it is over.
        backend
            .execute(
                "CREATE TABLE slow (n INTEGER);
                 CREATE TRIGGER slow AFTER UPDATE OF current ON durable_processes BEGIN
                     INSERT INTO slow WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100000)
                         SELECT count(*) FROM n;
                 END",
            )
            .await;
        let mut own = backend.connection().await;
        for input in 1..6 {
            until_status(&host.get("n"), Status::Completed).await;
            own.execute("BEGIN IMMEDIATE").await.unwrap();
            {
                let restart = host.spawn_in(&mut own, NOTHING, "n", &input).restart_finished();
                let restart = std::pin::pin!(restart.into_future());
                let _ = futures_util::poll!(restart);
            }
            own.execute("COMMIT").await.unwrap();
            let current = "SELECT count(*) FROM durable_processes WHERE id = 'n' AND current = 1";
            assert_eq!(backend.number(current).await, 1, "{input}");
        }
    });
}

/// What is committed into a file that is not there any more is not taken for recorded: the process goes no further until the
/// file is back.
#[test]
fn a_database_that_is_replaced_beneath_one() {
    const MOVES: Definition<(), ()> = Definition::new("moves");
    durable_tests::run(async {
        let backend = SqliteFile::new().await;
        let (path, effects) = (backend.path(), Effects::default());
        let elsewhere = format!("{path}.moved");
        let (counted, from, to) = (effects.clone(), path.clone(), elsewhere.clone());
        let function = move |proc: Process, ()| {
            let (effects, from, to) = (counted.clone(), from.clone(), to.clone());
            async move {
                let moves = proc.transaction("moves", async |mut tx| {
                    tx.execute("CREATE TABLE moved (n INTEGER)").await?;
                    std::fs::rename(&from, &to).map_err(sqlx::Error::Io)?;
                    Ok::<_, sqlx::Error>(())
                });
                moves.await?;
                let after = || async {
                    Ok::<_, Failure>(effects.add(format!("after: {}", std::path::Path::new(&from).exists())))
                };
                Ok::<_, Failure>(proc.step("after", after).await?)
            }
        };
        let host: Host = quick(&backend).await.register(MOVES, function).start().await.unwrap();
        let handle = host.spawn(MOVES, "it", &()).await.unwrap();
        durable_tests::until("it is gone", async || !std::path::Path::new(&path).exists()).await;
        // For long enough to take the wrong turn.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        std::fs::rename(&elsewhere, &path).unwrap();
        handle.output().await.unwrap();
        assert_eq!(effects.all(), ["after: true"]);
    });
}
