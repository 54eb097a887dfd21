//! Rows that nothing will ever touch again.

use crate::Sql;

/// What there is of them, by kind; empty if there is nothing. While processes run, rows on their way may be among them.
pub async fn orphans<B: Sql>(backend: &B) -> Vec<String> {
    let prefix = B::PROCESSES.strip_suffix("processes").unwrap();
    let gone = |of: &str| {
        format!(
            "NOT EXISTS (SELECT 1 FROM {prefix}processes p WHERE p.run = {of})
                 AND NOT EXISTS (SELECT 1 FROM {prefix}chores c WHERE c.run = {of} AND c.what = 'delete')"
        )
    };
    let over = |of: &str| {
        format!(
            "NOT EXISTS (SELECT 1 FROM {prefix}processes p WHERE p.run = {of}
                 AND p.status IN ('running', 'waiting', 'stuck'))"
        )
    };
    let mut kinds = vec![
        ("records without a process", format!("steps s WHERE {}", gone("s.run"))),
        ("messages without a process", format!("events e WHERE {}", gone("e.run"))),
        ("forgotten records without a process", format!("audit a WHERE {}", gone("a.run"))),
        ("waiters that have ended", format!("waiters w WHERE {}", over("w.waiter"))),
        ("waiters for what has ended", format!("waiters w WHERE {}", over("w.target"))),
        (
            "former runs without a current one",
            format!(
                "processes f WHERE f.\"current\" = {} AND NOT EXISTS (SELECT 1 FROM {prefix}processes p
                     WHERE p.namespace = f.namespace AND p.id = f.id AND p.\"current\" <> f.\"current\")",
                B::FALSE
            ),
        ),
        ("processes that run nowhere", "processes r WHERE r.status = 'running' AND r.owner IS NULL".into()),
        (
            "processes whose owner is unknown",
            format!(
                "processes r WHERE r.owner IS NOT NULL
                     AND NOT EXISTS (SELECT 1 FROM {prefix}instances i WHERE i.instance = r.owner)"
            ),
        ),
        (
            "processes that have ended and have an owner or a time",
            "processes r WHERE r.status IN ('completed', 'failed', 'cancelled')
                 AND (r.owner IS NOT NULL OR r.wake_at IS NOT NULL)"
                .into(),
        ),
        (
            "fences without an instance",
            format!(
                "fences f WHERE NOT EXISTS (SELECT 1 FROM {prefix}instances i WHERE i.instance = f.instance)
                     AND NOT EXISTS (SELECT 1 FROM {prefix}processes r WHERE r.owner = f.instance)"
            ),
        ),
        (
            "instances without a fence",
            format!("instances i WHERE NOT EXISTS (SELECT 1 FROM {prefix}fences f WHERE f.instance = i.instance)"),
        ),
    ];
    if B::INBOX {
        kinds.push(("starts and messages that nobody moves on", "inbox WHERE refused IS NULL".into()));
    }
    let mut found = Vec::new();
    for (kind, rows) in kinds {
        let number = backend.number(&format!("SELECT CAST(count(*) AS BIGINT) FROM {prefix}{rows}")).await;
        if number > 0 {
            found.push(format!("{number} {kind}"));
        }
    }
    found
}
