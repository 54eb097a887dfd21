use durable_core::{Cancelled, Definition, Event, Failure, Host, Process, Retry, Status, StepError};
use durable_core::{OutboxError, RaiseError, SpawnError};
use durable_tests::{Backend, Effects, Sql, quick, until, until_status};
use serde::{Deserialize, Serialize};
use std::future::{Future, IntoFuture};
use std::time::Duration;

const GO: Event<()> = Event::new("Go");
const MS: Duration = Duration::from_millis(1);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{self:?}")]
enum DebitError {
    NotEnough(i64),
    Sql(String),
}

async fn bank() -> B {
    let backend = B::new().await;
    // The storage's own tables are there before anything is put beside them.
    backend.storage().await;
    backend.execute("CREATE TABLE accounts (id BIGINT PRIMARY KEY, cents BIGINT NOT NULL)").await;
    backend.execute("INSERT INTO accounts VALUES (1, 1000), (2, 0)").await;
    backend
}

async fn cents(backend: &B, account: i64) -> i64 {
    backend.number(&format!("SELECT cents FROM accounts WHERE id = {account}")).await
}

/// Takes so many from the first account; all statements are the closure's own.
async fn debit(tx: &mut Tx, cents: i64) -> Result<i64, DebitError> {
    sql(tx, &format!("UPDATE accounts SET cents = cents - {cents} WHERE id = 1")).await?;
    let left = number(tx, "SELECT cents FROM accounts WHERE id = 1").await?;
    if left < 0 { Err(DebitError::NotEnough(left)) } else { Ok(left) }
}

async fn host_with<O, F, Fut>(backend: &B, definition: Definition<(), O>, function: F) -> Host
where
    O: Serialize + for<'d> Deserialize<'d> + Send + 'static,
    F: Fn(Process) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<O, Failure>> + Send + 'static,
{
    quick(backend).await.register(definition, move |proc, ()| function(proc)).start().await.unwrap()
}

/// That the rest of the service is not held up: another process starts and ends.
const OTHER: Definition<(), u32> = Definition::new("other");

async fn other(proc: Process, (): ()) -> Result<u32, Failure> {
    Ok(proc.step("step", || async { Ok::<_, Failure>(1) }).await?)
}

macro_rules! tests {
    ($module:ident: $($case:ident),* $(,)?) => { $(#[test] fn $case() { run_test($module::$case()); })* };
}

tests!(cases:
    commits_with_its_record,
    an_error_rolls_back_and_is_recorded,
    a_failure_is_tried_again,
    a_cancelled_process_commits_nothing,
    a_cancellation_that_was_recorded_meanwhile,
    who_does_not_own_the_run_commits_nothing,
    a_record_that_stands_is_not_written_over,
    a_deadline_ends_it,
    one_that_nobody_polls_is_ended,
    one_that_nobody_polls_ever_fails,
    one_that_is_dropped_is_rolled_back,
    sql_that_ends_the_transaction,
    what_is_refused_within,
    a_handle_that_outlives_its_closure,
    sql_that_hides_the_tables,
    a_transaction_within_is_a_savepoint,
    what_a_closure_leaves_on_its_connection,
    a_cancellation_that_comes_while_it_is_open,
    many_at_once,
    limits,
    a_step_and_a_transaction_of_one_name,
    in_a_compensation,
    a_start_in_the_services_transaction,
    a_message_in_the_services_transaction,
    starts_and_messages_in_a_transactional_step,
    a_row_that_nobody_can_read_holds_up_nobody,
);

mod cases {
    use super::*;

    pub(super) async fn commits_with_its_record() {
        const DEBIT: Definition<(), (i64, i64)> = Definition::new("debit");
        let backend = bank().await;
        let function = async |proc: Process| {
            let one = proc.transaction(("debit", 1), async |mut tx| debit(&mut tx, 100).await).await;
            let two = proc.transaction(("debit", 2), async |mut tx| debit(&mut tx, 50).await).await;
            proc.event(GO).await?;
            Ok((one.unwrap(), two.unwrap()))
        };
        let host = host_with(&backend, DEBIT, function).await;
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
        assert_eq!(cents(&backend, 1).await, 850);
        drop(host);
        let host = host_with(&backend, DEBIT, function).await;
        let handle = host.get("d").of(DEBIT);
        handle.raise(GO, &()).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), (900, 850));
        assert_eq!(cents(&backend, 1).await, 850, "not again after a crash");
    }

    pub(super) async fn an_error_rolls_back_and_is_recorded() {
        const DEBIT: Definition<(), StepError<DebitError>> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let function = {
            let calls = calls.clone();
            move |proc: Process| {
                let calls = calls.clone();
                async move {
                    let debit = proc.transaction("debit", async |mut tx| {
                        calls.add("call");
                        debit(&mut tx, 5000).await
                    });
                    let error = debit.typed().await.unwrap_err();
                    proc.event(GO).await?;
                    Ok(error)
                }
            }
        };
        let host = host_with(&backend, DEBIT, function.clone()).await;
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
        drop(host);
        let host = host_with(&backend, DEBIT, function).await;
        let handle = host.get("d").of(DEBIT);
        handle.raise(GO, &()).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), StepError::Failed(DebitError::NotEnough(-4000)));
        assert_eq!(cents(&backend, 1).await, 1000);
        assert_eq!(calls.all().len(), 1);
    }

    pub(super) async fn a_failure_is_tried_again() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let host = host_with(&backend, DEBIT, move |proc: Process| {
            let calls = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    let left = debit(&mut tx, 100).await?;
                    calls.add("call");
                    if calls.all().len() < 3 { Err(DebitError::NotEnough(0)) } else { Ok(left) }
                });
                Ok(debit.retry(Retry::fixed(MS).max_attempts(3)).await.unwrap())
            }
        })
        .await;
        assert_eq!(host.spawn(DEBIT, "d", &()).await.unwrap().output().await.unwrap(), 900);
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (900, 3));
    }

    pub(super) async fn a_cancelled_process_commits_nothing() {
        const DEBIT: Definition<(), (), Cancelled> = Definition::new("debit");
        let backend = bank().await;
        let inside = Effects::default();
        let counted = inside.clone();
        let function = move |proc: Process, ()| {
            let inside = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    debit(&mut tx, 100).await?;
                    inside.add("inside");
                    std::future::pending::<Result<i64, DebitError>>().await
                });
                match debit.await {
                    Err(StepError::Cancelled(cancelled)) => Err(cancelled),
                    // SQLite has one writer: the order itself waits for the transaction's end.
                    Err(StepError::TimedOut(_)) => proc.event(GO).await,
                    other => panic!("{other:?}"),
                }
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it is inside", async || inside.count("inside") > 0).await;
        handle.cancel().await.unwrap();
        let ended = until_status(&handle, Status::Cancelled).await;
        assert_eq!(ended.status, Status::Cancelled);
        assert_eq!(cents(&backend, 1).await, 1000);
        assert_eq!(host.spawn(OTHER, "o", &()).await.unwrap().output().await.unwrap(), 1);
    }

    pub(super) async fn a_cancellation_that_was_recorded_meanwhile() {
        const DEBIT: Definition<(), (), Cancelled> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        // Within the transaction it looks as if the owner had recorded it; outside it never was.
        let function = move |proc: Process, ()| {
            let calls = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    calls.add("call");
                    let left = debit(&mut tx, 100).await?;
                    sql(&mut tx, &format!("UPDATE {} SET cancelled_at = CURRENT_TIMESTAMP", B::PROCESSES)).await?;
                    Ok::<_, DebitError>(left)
                });
                match debit.await {
                    Err(StepError::Cancelled(cancelled)) => Err(cancelled),
                    other => panic!("{other:?}"),
                }
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it has been called", async || !calls.all().is_empty()).await;
        handle.cancel().await.unwrap();
        until_status(&handle, Status::Cancelled).await;
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (1000, 1));
    }

    pub(super) async fn who_does_not_own_the_run_commits_nothing() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = std::sync::Arc::new(bank().await);
        let shared = backend.clone();
        let calls = Effects::default();
        let counted = calls.clone();
        let host = host_with(&backend, DEBIT, move |proc: Process| {
            let (backend, calls) = (shared.clone(), counted.clone());
            async move {
                backend.execute(&format!("UPDATE {} SET claim = claim + 1", B::PROCESSES)).await;
                let debit = proc.transaction("debit", async |mut tx| {
                    calls.add("call");
                    debit(&mut tx, 100).await
                });
                Ok(debit.await.unwrap())
            }
        })
        .await;
        host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it is dropped", async || calls.all().len() == 1 && host.in_memory() == 0).await;
        assert_eq!(cents(&backend, 1).await, 1000);
        assert_eq!(backend.number(&format!("SELECT count(*) FROM {}", B::STEPS)).await, 0);
    }

    pub(super) async fn a_record_that_stands_is_not_written_over() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        // The closure writes its own record, as a transaction whose answer was lost would have: what it does beside is
        // not kept, nor is that record.
        let host = host_with(&backend, DEBIT, move |proc: Process| {
            let calls = counted.clone();
            async move {
                let run = proc.run();
                let debit = proc.transaction("debit", async |mut tx| {
                    calls.add("call");
                    if calls.all().len() == 1 {
                        let record = format!(
                            "INSERT INTO {} (run, scope, name, {KEY}, op, state, payload, attempts, seq, claim, recorded_at)
                             VALUES ({}, 0, 'debit', '', 'transaction', 'done', '7', 0, 99, 1, CURRENT_TIMESTAMP)",
                            B::STEPS,
                            literal(run)
                        );
                        sql(&mut tx, &record).await?;
                    }
                    debit(&mut tx, 100).await
                });
                Ok(debit.await.unwrap())
            }
        })
        .await;
        assert_eq!(host.spawn(DEBIT, "d", &()).await.unwrap().output().await.unwrap(), 900);
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (900, 2));
    }

    pub(super) async fn a_deadline_ends_it() {
        const DEBIT: Definition<(), String> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, ()| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                debit(&mut tx, 100).await?;
                std::future::pending::<Result<i64, DebitError>>().await
            });
            let error = debit.timeout(100 * MS).await.unwrap_err();
            Ok::<_, Failure>(matches!(error, StepError::TimedOut(_)).to_string())
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        assert_eq!(host.spawn(OTHER, "o", &()).await.unwrap().output().await.unwrap(), 1);
        assert_eq!(handle.output().await.unwrap(), "true");
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn one_that_nobody_polls_is_ended() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let function = move |proc: Process, ()| {
            let calls = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    let left = debit(&mut tx, 100).await?;
                    calls.add("call");
                    if calls.all().len() == 1 {
                        std::future::pending::<()>().await;
                    }
                    Ok::<_, DebitError>(left)
                });
                let retry = Retry::fixed(MS).max_attempts(2);
                let mut debit = debit.timeout(100 * MS).retry(retry).into_future();
                if proc.execution() == 1 {
                    // Polled until it is inside, and then no more, while it is still there.
                    while calls.all().is_empty() {
                        assert!(futures_util::poll!(&mut debit).is_pending());
                        tokio::time::sleep(MS).await;
                    }
                    std::future::pending::<()>().await;
                }
                Ok::<_, Failure>(debit.await.unwrap())
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it is inside", async || !calls.all().is_empty()).await;
        assert_eq!(host.spawn(OTHER, "o", &()).await.unwrap().output().await.unwrap(), 1);
        assert_eq!(handle.output().await.unwrap(), 900);
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (900, 2));
    }

    pub(super) async fn one_that_nobody_polls_ever_fails() {
        const DEBIT: Definition<(), bool> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let function = move |proc: Process, ()| {
            let calls = counted.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    debit(&mut tx, 100).await?;
                    calls.add("call");
                    std::future::pending::<Result<i64, DebitError>>().await
                });
                let retry = Retry::fixed(MS).max_attempts(3);
                let mut debit = debit.timeout(100 * MS).retry(retry).into_future();
                let before = calls.all().len();
                while calls.all().len() == before {
                    if let std::task::Poll::Ready(ended) = futures_util::poll!(&mut debit) {
                        return Ok::<_, Failure>(matches!(ended, Err(StepError::TimedOut(_))));
                    }
                    tokio::time::sleep(MS).await;
                }
                std::future::pending().await
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        assert!(handle.output().await.unwrap());
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (1000, 3));
        assert_eq!(host.spawn(OTHER, "o", &()).await.unwrap().output().await.unwrap(), 1);
    }

    pub(super) async fn one_that_is_dropped_is_rolled_back() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = bank().await;
        let calls = Effects::default();
        let counted = calls.clone();
        let host = host_with(&backend, DEBIT, move |proc: Process| {
            let calls = counted.clone();
            async move {
                let once = || {
                    proc.transaction("debit", async |mut tx| {
                        let left = debit(&mut tx, 100).await?;
                        calls.add("call");
                        if calls.all().len() < 5 {
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, DebitError>(left)
                    })
                };
                for round in 1..5 {
                    let mut dropped = once().into_future();
                    while calls.all().len() < round {
                        assert!(futures_util::poll!(&mut dropped).is_pending());
                        tokio::time::sleep(MS).await;
                    }
                }
                Ok(once().await.unwrap())
            }
        })
        .await;
        assert_eq!(host.spawn(DEBIT, "d", &()).await.unwrap().output().await.unwrap(), 900);
        assert_eq!((cents(&backend, 1).await, calls.all().len()), (900, 5));
    }

    pub(super) async fn sql_that_ends_the_transaction() {
        const DEBIT: Definition<String, ()> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, ends: String| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                debit(&mut tx, 100).await?;
                for statement in ends.trim_end_matches(" then fail").split(';') {
                    sql(&mut tx, statement).await?;
                }
                if ends.ends_with("then fail") { Err(DebitError::NotEnough(0)) } else { Ok(()) }
            });
            debit.await.unwrap();
            Ok::<_, Failure>(())
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let again = ["ROLLBACK", "COMMIT"].map(|ends| format!("{ends};{BEGIN}"));
        let ends = ["COMMIT", "ROLLBACK", "COMMIT then fail", "ROLLBACK then fail"].map(str::to_owned);
        for ends in ends.into_iter().chain(again) {
            let handle = host.spawn(DEBIT, &*ends, &ends).await.unwrap();
            let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
            assert!(reason.contains("ended by its own SQL"), "{ends}: {reason}");
            assert_eq!(host.spawn(OTHER, format!("o {ends}"), &()).await.unwrap().output().await.unwrap(), 1);
        }
        assert_eq!(backend.number(&format!("SELECT count(*) FROM {} WHERE op = 'transaction'", B::STEPS)).await, 0);
    }

    pub(super) async fn what_is_refused_within() {
        const REFUSED: Definition<u32, ()> = Definition::new("refused");
        let backend = bank().await;
        let late: std::sync::Arc<std::sync::OnceLock<Host>> = std::sync::Arc::default();
        let hosts = late.clone();
        let function = move |proc: Process, which: u32| {
            let host = hosts.get().unwrap().clone();
            async move {
                let within = proc.transaction("debit", async |mut tx| {
                    debit(&mut tx, 100).await?;
                    match which {
                        0 => drop(proc.step("step", || async { Ok::<_, Failure>(()) }).await),
                        1 => drop(proc.delay("delay", MS).await),
                        2 => drop(host.spawn(OTHER, "o", &()).await),
                        3 => drop(host.get("x").raise(GO, &()).await),
                        4 => drop(host.get("x").status().await),
                        _ => drop(proc.transaction("other", async |mut tx| debit(&mut tx, 1).await).await),
                    }
                    Ok::<_, DebitError>(())
                });
                within.await.unwrap();
                Ok::<_, Failure>(())
            }
        };
        let host = quick(&backend).await.register(REFUSED, function).register(OTHER, other).start().await.unwrap();
        assert!(late.set(host.clone()).is_ok());
        for which in 0..6 {
            let handle = host.spawn(REFUSED, format!("r{which}"), &which).await.unwrap();
            let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
            assert!(reason.contains("inside the closure of a"), "{which}: {reason}");
        }
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn a_handle_that_outlives_its_closure() {
        const DEBIT: Definition<(), ()> = Definition::new("debit");
        let backend = bank().await;
        let kept: std::sync::Arc<std::sync::Mutex<Option<Tx>>> = std::sync::Arc::default();
        let keeper = kept.clone();
        let function = move |proc: Process, ()| {
            let kept = keeper.clone();
            async move {
                let debit = proc.transaction("debit", async |mut tx| {
                    debit(&mut tx, 100).await?;
                    *kept.lock().unwrap() = Some(tx);
                    Ok::<_, DebitError>(())
                });
                debit.await.unwrap();
                Ok::<_, Failure>(())
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("the handle has been kept", async || kept.lock().unwrap().is_some()).await;
        drop(kept.lock().unwrap().take());
        let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains("outlives its closure"), "{reason}");
        assert_eq!(host.spawn(OTHER, "o", &()).await.unwrap().output().await.unwrap(), 1);
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn sql_that_hides_the_tables() {
        const DEBIT: Definition<(), i64> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, ()| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                let left = debit(&mut tx, 100).await?;
                for hides in B::HIDE {
                    sql(&mut tx, hides).await?;
                }
                Ok::<_, DebitError>(left)
            });
            Ok::<_, Failure>(debit.await.unwrap())
        };
        let host = quick(&backend).await.register(DEBIT, function).register(OTHER, other).start().await.unwrap();
        for n in 0..3 {
            let left = host.spawn(DEBIT, format!("d{n}"), &()).await.unwrap().output().await.unwrap();
            assert_eq!(left, 900 - 100 * n);
            assert_eq!(host.spawn(OTHER, format!("o{n}"), &()).await.unwrap().output().await.unwrap(), 1);
        }
        assert_eq!(backend.number(&format!("SELECT count(*) FROM {} WHERE op = 'transaction'", B::STEPS)).await, 3);
    }

    pub(super) async fn a_transaction_within_is_a_savepoint() {
        const DEBIT: Definition<u32, i64> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, round: u32| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                within(&mut tx, "UPDATE accounts SET cents = cents - 100 WHERE id = 1", true).await?;
                within(&mut tx, "UPDATE accounts SET cents = 0 WHERE id = 1", false).await?;
                let left = debit(&mut tx, 1).await?;
                if round == 0 { Err(DebitError::NotEnough(left)) } else { Ok(left) }
            });
            Ok::<_, Failure>(debit.await.unwrap_or(-1))
        };
        let host = quick(&backend).await.register(DEBIT, function).start().await.unwrap();
        for (round, left) in [(0, -1), (1, 899), (2, 798)] {
            let handle = host.spawn(DEBIT, format!("d{round}"), &round).await.unwrap();
            assert_eq!(handle.output().await.unwrap(), left, "{round}");
        }
        assert_eq!(cents(&backend, 1).await, 798);
    }

    pub(super) async fn what_a_closure_leaves_on_its_connection() {
        const DEBIT: Definition<bool, i64> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, fails: bool| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                sql(&mut tx, SCRATCH).await?;
                let left = debit(&mut tx, 1).await?;
                for leaves in B::LEAVE {
                    sql(&mut tx, leaves).await?;
                }
                if fails { Err(DebitError::NotEnough(left)) } else { Ok(left) }
            });
            match debit.typed().await {
                Ok(left) => Ok::<_, Failure>(left),
                Err(StepError::Failed(DebitError::NotEnough(_))) => Ok(-1),
                Err(other) => panic!("{other:?}"),
            }
        };
        let host = quick(&backend).await.register(DEBIT, function).start().await.unwrap();
        for (n, fails) in [true, false, true, false, false].into_iter().enumerate() {
            host.spawn(DEBIT, format!("d{n}"), &fails).await.unwrap().output().await.unwrap();
        }
        assert_eq!(cents(&backend, 1).await, 997);
    }

    pub(super) async fn a_cancellation_that_comes_while_it_is_open() {
        const DEBIT: Definition<(), (), Cancelled> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, ()| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                debit(&mut tx, 100).await?;
                std::future::pending::<Result<i64, DebitError>>().await
            });
            match debit.await {
                Err(StepError::Cancelled(cancelled)) => Err(cancelled),
                // SQLite has one writer, and the transaction was it.
                Err(StepError::TimedOut(_)) => proc.event(GO).await,
                other => panic!("{other:?}"),
            }
        };
        // Its mark is committed, by hand, while the transaction waits for the right to begin, or to write.
        let mut own = backend.connection().await;
        let host = quick(&backend).await.register(DEBIT, function).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        loop {
            // Whoever holds the write lock first; on SQLite the transaction may have it until its deadline.
            if try_run(&mut own, B::BEGIN).await {
                break;
            }
        }
        run(&mut own, B::CANCELS).await;
        run(&mut own, "COMMIT").await;
        until_status(&handle, Status::Cancelled).await;
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn many_at_once() {
        const DEBIT: Definition<(), ()> = Definition::new("debit");
        let backend = bank().await;
        let host = host_with(&backend, DEBIT, async |proc: Process| {
            let one = |n| proc.transaction(("debit", n), async |mut tx| debit(&mut tx, 1).await).into_future();
            let (a, b) = tokio::join!(one(1), one(2));
            a.unwrap();
            b.unwrap();
            let all: futures_util::stream::FuturesUnordered<_> = (3..6).map(one).collect();
            let all: Vec<_> = futures_util::StreamExt::collect(all).await;
            assert!(all.into_iter().all(|left| left.is_ok()));
            Ok(())
        })
        .await;
        let mut handles = Vec::new();
        for n in 0..20 {
            handles.push(host.spawn(DEBIT, format!("d{n}"), &()).await.unwrap());
        }
        for handle in handles {
            handle.output().await.unwrap();
        }
        assert_eq!(cents(&backend, 1).await, 1000 - 20 * 5);
    }

    pub(super) async fn limits() {
        const LARGE: Definition<u32, ()> = Definition::new("large");
        let backend = bank().await;
        let function = |proc: Process, which: u32| async move {
            let debit = proc.transaction("debit", async |mut tx| {
                debit(&mut tx, 100).await?;
                Ok::<_, DebitError>("x".repeat(2000))
            });
            match which {
                0 => drop(debit.await),
                _ => drop(debit.timeout(Duration::from_secs(60)).await),
            }
            Ok::<_, Failure>(())
        };
        let host = quick(&backend).await.max_payload(1000).register(LARGE, function).start().await.unwrap();
        for (which, says) in [(0, "allowed"), (1, "half of the host's expiry")] {
            let handle = host.spawn(LARGE, format!("l{which}"), &which).await.unwrap();
            let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
            assert!(reason.contains(says), "{reason}");
        }
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn a_step_and_a_transaction_of_one_name() {
        const MIXED: Definition<(), ()> = Definition::new("mixed");
        let backend = bank().await;
        let host = host_with(&backend, MIXED, async |proc: Process| {
            proc.step("debit", || async { Ok::<_, Failure>(()) }).await?;
            proc.transaction("debit", async |mut tx| debit(&mut tx, 100).await).await.unwrap();
            Ok(())
        })
        .await;
        let handle = host.spawn(MIXED, "m", &()).await.unwrap();
        let reason = until_status(&handle, Status::Stuck).await.reason.unwrap();
        assert!(reason.contains("used twice"), "{reason}");
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    pub(super) async fn in_a_compensation() {
        const DEBIT: Definition<(), (), Cancelled> = Definition::new("debit");
        let backend = bank().await;
        let function = |proc: Process, ()| async move {
            proc.transaction("move", async |mut tx| debit(&mut tx, 100).await).await.unwrap();
            let waited = proc.event(GO).await;
            let undo = proc.compensation();
            undo.transaction("move", async |mut tx| debit(&mut tx, -100).await).await.unwrap();
            waited
        };
        let host = quick(&backend).await.register(DEBIT, function).start().await.unwrap();
        let handle = host.spawn(DEBIT, "d", &()).await.unwrap();
        until("it waits", async || handle.status().await.unwrap().waiting_for.is_some()).await;
        assert_eq!(cents(&backend, 1).await, 900);
        handle.cancel().await.unwrap();
        until_status(&handle, Status::Cancelled).await;
        assert_eq!(cents(&backend, 1).await, 1000);
    }

    const ADD: Definition<u32, u32> = Definition::new("add");
    const NUMBER: Event<u32> = Event::new("Number");

    /// Its input and what it is sent.
    async fn add(proc: Process, input: u32) -> Result<u32, Failure> {
        let step = proc.step("step", || async { Ok::<_, Failure>(input) }).await?;
        Ok(step + proc.event(NUMBER).await?)
    }

    async fn adding(backend: &B) -> Host {
        quick(backend).await.register(ADD, add).start().await.unwrap()
    }

    async fn run(connection: &mut <B as Sql>::Connection, sql: &'static str) {
        assert!(try_run(connection, sql).await, "{sql}");
    }

    pub(super) async fn a_start_in_the_services_transaction() {
        let backend = bank().await;
        let host = adding(&backend).await;
        let mut own = backend.connection().await;
        for (id, end) in [("committed", "COMMIT"), ("rolled back", "ROLLBACK")] {
            run(&mut own, B::BEGIN).await;
            run(&mut own, "UPDATE accounts SET cents = cents - 1 WHERE id = 1").await;
            host.spawn_in(&mut own, ADD, id, &7).await.unwrap();
            // The same again is the same.
            host.spawn_in(&mut own, ADD, id, &7).await.unwrap();
            match host.spawn_in(&mut own, ADD, id, &8).await {
                Err(OutboxError::Process(SpawnError::OtherInput { .. })) => {}
                other => panic!("{:?}", other.map(|_| ())),
            }
            host.spawn_in(&mut own, ADD, id, &8).existing_ok().await.unwrap();
            match host.spawn_in(&mut own, ADD, "", &8).await {
                Err(OutboxError::Process(SpawnError::Limit(_))) => {}
                other => panic!("{:?}", other.map(|_| ())),
            }
            run(&mut own, end).await;
        }
        assert_eq!(cents(&backend, 1).await, 999);
        let handle = host.get("committed").of(ADD);
        handle.raise(NUMBER, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 8);
        assert!(host.get("rolled back").status().await.is_err());
        // One that has ended is handed back, or started anew.
        run(&mut own, B::BEGIN).await;
        let same = host.spawn_in(&mut own, ADD, "committed", &7).await.unwrap();
        let anew = host.spawn_in(&mut own, ADD, "committed", &20).restart_finished().await.unwrap();
        run(&mut own, "COMMIT").await;
        assert_eq!(same.output().await.unwrap(), 8);
        anew.raise(NUMBER, &1).await.unwrap();
        assert_eq!(anew.output().await.unwrap(), 21);
    }

    pub(super) async fn a_message_in_the_services_transaction() {
        let backend = bank().await;
        let host = adding(&backend).await;
        let mut own = backend.connection().await;
        let parked = host.spawn(ADD, "parked", &1).await.unwrap();
        until("it is a row", async || host.in_memory() == 0).await;
        for (n, end) in [(100, "ROLLBACK"), (10, "COMMIT")] {
            run(&mut own, B::BEGIN).await;
            host.raise_in(&mut own, "parked", NUMBER, &n).id("once").await.unwrap();
            host.raise_in(&mut own, "parked", NUMBER, &n).id("once").await.unwrap();
            match host.raise_in(&mut own, "nobody", NUMBER, &n).await {
                Err(OutboxError::Process(RaiseError::NotFound { .. })) => {}
                other => panic!("{other:?}"),
            }
            run(&mut own, end).await;
        }
        assert_eq!(parked.output().await.unwrap(), 11);
        run(&mut own, B::BEGIN).await;
        match host.raise_in(&mut own, "parked", NUMBER, &1).await {
            Err(OutboxError::Process(RaiseError::Finished { .. })) => {}
            other => panic!("{other:?}"),
        }
        run(&mut own, "COMMIT").await;
        // In memory, and owned by whoever: its owner finds it.
        let host = backend.storage().await;
        let host = Host::builder(host).register(ADD, add).quiet_time(Duration::from_secs(60)).start().await.unwrap();
        let waiting = host.spawn(ADD, "waiting", &1).await.unwrap();
        until("it waits", async || waiting.status().await.unwrap().execution == 1).await;
        run(&mut own, B::BEGIN).await;
        host.raise_in(&mut own, "waiting", NUMBER, &5).await.unwrap();
        run(&mut own, "COMMIT").await;
        assert_eq!(waiting.output().await.unwrap(), 6);
    }

    pub(super) async fn starts_and_messages_in_a_transactional_step() {
        const PARENT: Definition<(), ()> = Definition::new("parent");
        let backend = bank().await;
        let late: std::sync::Arc<std::sync::OnceLock<Host>> = std::sync::Arc::default();
        let hosts = late.clone();
        let calls = Effects::default();
        let counted = calls.clone();
        let function = move |proc: Process, ()| {
            let (host, calls) = (hosts.get().unwrap().clone(), counted.clone());
            async move {
                let parts = proc.transaction("parts", async |mut tx| {
                    calls.add("call");
                    debit(&mut tx, 100).await?;
                    let failed = |error: &dyn std::fmt::Display| DebitError::Sql(error.to_string());
                    host.spawn_in(&mut *tx, ADD, "child", &1).await.map_err(|e| failed(&e))?;
                    host.raise_in(&mut *tx, "child", NUMBER, &2).await.map_err(|e| failed(&e))?;
                    if calls.all().len() < 3 { Err(DebitError::NotEnough(0)) } else { Ok(()) }
                });
                parts.retry(Retry::fixed(MS).max_attempts(3)).await.unwrap();
                Ok::<_, Failure>(())
            }
        };
        let host = quick(&backend).await.register(ADD, add).register(PARENT, function).start().await.unwrap();
        assert!(late.set(host.clone()).is_ok());
        host.spawn(PARENT, "p", &()).await.unwrap().output().await.unwrap();
        assert_eq!(host.get("child").of(ADD).output().await.unwrap(), 3);
        assert_eq!(cents(&backend, 1).await, 900);
    }

    pub(super) async fn a_row_that_nobody_can_read_holds_up_nobody() {
        if !B::INBOX {
            return;
        }
        let backend = bank().await;
        let host = adding(&backend).await;
        let inbox = B::PROCESSES.replace("processes", "inbox");
        let put = |what: &str, token: &str| {
            format!(
                "INSERT INTO {inbox} (namespace, what, id, name, token, payload, digest, restart, put_at)
                 VALUES ('default', '{what}', 'bad', 'add', '{token}', '1', '', {}, CURRENT_TIMESTAMP)",
                B::FALSE
            )
        };
        backend.execute(&put("start", "not a uuid")).await;
        backend.execute(&put("something else", "x")).await;
        let mut own = backend.connection().await;
        run(&mut own, B::BEGIN).await;
        let handle = host.spawn_in(&mut own, ADD, "good", &1).await.unwrap();
        run(&mut own, "COMMIT").await;
        handle.raise(NUMBER, &1).await.unwrap();
        assert_eq!(handle.output().await.unwrap(), 2);
        let refused = format!("SELECT count(*) FROM {inbox} WHERE refused IS NOT NULL");
        assert_eq!(backend.number(&refused).await, 2);
        // They go with the process, once there is one of that id.
        let bad = host.spawn(ADD, "bad", &1).await.unwrap();
        bad.raise(NUMBER, &1).await.unwrap();
        bad.output().await.unwrap();
        handle.delete().await.unwrap();
        assert_eq!(backend.number(&refused).await, 2);
        bad.delete().await.unwrap();
        assert_eq!(backend.number(&refused).await, 0);
    }
}
