//! What the engine sets in its own sessions.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};
use std::time::Duration;

/// The bounds of the engine's sessions; the defaults are below half of the default expiry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) statement: Duration,
    pub(crate) lock: Duration,
    pub(crate) idle_in_transaction: Duration,
    /// Sessions are a pooler's, which lends them to others as well: nothing is set in them, and nothing is cleared away.
    pub(crate) lent: bool,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            statement: Duration::from_secs(30),
            lock: Duration::from_secs(2),
            idle_in_transaction: Duration::from_secs(4),
            lent: false,
        }
    }
}

impl Bounds {
    /// For how long an answer is waited for: a server whose machine is gone without a word never gives one, and what the
    /// server itself bounds comes before that.
    pub(crate) fn answer(&self) -> Duration {
        self.statement.saturating_add(self.lock.max(Duration::from_secs(1)))
    }

    /// For how long those to several statements are, one after the other.
    pub(crate) fn answers(&self) -> Duration {
        self.answer().saturating_mul(4)
    }

    /// For how long that to a heartbeat is: it waits for nothing but a lock.
    pub(crate) fn beat(&self) -> Duration {
        self.lock.saturating_add(Duration::from_secs(3))
    }
}

/// Whose statements a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The engine's, whose plans are known.
    Engine,
    /// The service's: only what frees locks is set.
    Service,
}

/// Sets what the session needs.
pub(crate) async fn set(connection: &mut PgConnection, bounds: Bounds, whose: Whose) -> sqlx::Result<()> {
    if !bounds.lent {
        connection.execute(sqlx::raw_sql(AssertSqlSafe(settings(bounds, whose)))).await?;
    }
    Ok(())
}

/// By a statement and not at the login, where poolers refuse what they do not know; and only those settings that this
/// server has.
pub(crate) fn settings(bounds: Bounds, whose: Whose) -> String {
    // Not by way of `pg_settings`, which takes half a millisecond: as long as several commits.
    format!(
        "SELECT pg_catalog.set_config(name, value, false) FROM {}
             WHERE pg_catalog.current_setting(name, true) IS NOT NULL",
        named(bounds, whose)
    )
}

/// The settings, as rows.
pub(crate) fn named(bounds: Bounds, whose: Whose) -> String {
    let ms = |time: Duration| time.as_millis().max(1).to_string();
    let frees = [
        // A zombie's locks are let go of when its machine is gone: nobody waits for them for long.
        ("idle_in_transaction_session_timeout", ms(bounds.idle_in_transaction)),
        ("client_connection_check_interval", "1000".to_owned()),
        ("tcp_keepalives_idle", "5".to_owned()),
        ("tcp_keepalives_interval", "2".to_owned()),
        ("tcp_keepalives_count", "3".to_owned()),
    ];
    let engine = [
        ("statement_timeout", ms(bounds.statement)),
        ("lock_timeout", ms(bounds.lock)),
        // Every statement has its own view of what is committed: the interleavings are thought through for this.
        ("default_transaction_isolation", "read committed".to_owned()),
        // Statements are run again and again with batches of all sizes. Planning one takes as long as committing a small
        // batch: with plans of its own for each, a process of one step takes 1.3 ms instead of 0.75.
        ("plan_cache_mode", "force_generic_plan".to_owned()),
        // A plan that was made while a table was small is used until the server's next look at its statistics, a minute
        // and a hundred thousand rows later: so every plan is one for large tables from the beginning.
        ("enable_seqscan", "off".to_owned()),
        ("enable_hashjoin", "off".to_owned()),
        ("enable_mergejoin", "off".to_owned()),
        // Compiling a statement takes longer than running it.
        ("jit", "off".to_owned()),
    ];
    let engine = engine.into_iter().filter(|_| whose == Whose::Engine);
    let values: Vec<String> =
        frees.into_iter().chain(engine).map(|(name, value)| format!("('{name}', '{value}')")).collect();
    format!("(VALUES {}) AS v (name, value)", values.join(", "))
}
