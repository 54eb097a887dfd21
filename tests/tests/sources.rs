//! What can be told from the sources: that each row of the documentation's tables has its test, and that no SQL is made of
//! what a service gives.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All Rust files in a folder of the workspace: their paths in it, and what is in them.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let folder = root().join(folder);
    let mut found = Vec::new();
    walk(&folder, &mut found);
    found.sort();
    let named = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.strip_prefix(&folder).unwrap().to_str().unwrap().replace('\\', "/"), text)
    };
    found.into_iter().map(named).collect()
}

// --- Tables --------------------------------------------------------------------------------------------------------

/// The tests that the last column of a document's tables names, as `file::test`.
fn named(document: &str) -> Vec<String> {
    let rows = document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| given |"));
    let mut tests = Vec::new();
    for row in rows {
        let held_by = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let before = tests.len();
        tests.extend(held_by.split('`').skip(1).step_by(2).map(str::to_owned));
        assert!(tests.len() > before, "no test holds this: {row}");
    }
    tests
}

/// Those of the named tests that there are not. Each is a function in a file, or in a folder's file, of that name.
fn missing(tests: &[String]) -> Vec<&String> {
    let folders = [
        "tests/tests",
        "durable-core/src",
        "durable-postgres/src",
        "durable-sqlite/src",
        "durable-mssql/src",
        "simulation/tests",
    ];
    let files: Vec<_> = folders.iter().flat_map(|folder| sources(folder)).collect();
    let exists = |test: &&String| {
        let (file, function) = test.split_once("::").expect("file::test");
        let defines =
            |text: &str| [format!("fn {function}("), format!("fn {function}<")].iter().any(|f| text.contains(f));
        files.iter().any(|(path, text)| {
            let stem = path.trim_end_matches(".rs").rsplit('/').next().unwrap();
            stem == file && defines(text)
        })
    };
    tests.iter().filter(|test| !exists(test)).collect()
}

#[test]
fn each_row_has_its_test() {
    let tests = named(include_str!("../../docs/hostile-input.md"));
    assert!(tests.len() > 50, "the tables are not read any more: {tests:?}");
    assert_eq!(missing(&tests), Vec::<&String>::new(), "named in docs/hostile-input.md");
    // And this test can fail.
    let invented = ["hostile::invented", "invented::numbers_come_back", "misuse::numbers_come_back"].map(str::to_owned);
    assert_eq!(missing(&invented).len(), 3);
}

/// The tests that a text names: `file::test`, `folder … file::test`, or a test alone, whose name has many words.
fn named_in_passing(text: &str) -> Vec<String> {
    let code = text.split('`').skip(1).step_by(2).filter_map(|code| code.split_whitespace().last());
    let snake = |code: &&str| code.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == ':');
    let many = |code: &&str| code.contains("::") || code.matches('_').count() > 1;
    let ours = |code: &&str| !code.starts_with("durable_") && !code.starts_with("tokio::");
    code.filter(snake).filter(many).filter(ours).map(str::to_owned).collect()
}

#[test]
fn what_is_named_in_passing_is_there() {
    let folders =
        ["tests", "simulation", "durable-core", "durable-postgres", "durable-sqlite", "durable-mssql", "durable-bench"];
    let files: Vec<_> = folders.iter().flat_map(|folder| sources(folder)).collect();
    let there = |name: &str| {
        let (of, function) = name.rsplit_once("::").unwrap_or(("", name));
        // The file or folder is the first that is named; a module of tests within is of no interest.
        let of = of.split("::").next().unwrap();
        files.iter().any(|(path, text)| {
            let within = of.is_empty() || path.split(['/', '.']).any(|part| part == of);
            // The last is a case that a macro makes a test of.
            let defined = ["fn {}(", "fn {}<", "mod {} ", "    {}: |"].map(|form| form.replace("{}", function));
            within && (function == "tests" || defined.iter().any(|defined| text.contains(defined)))
        })
    };
    for (document, text) in [
        ("ARCHITECTURE.md", include_str!("../../ARCHITECTURE.md")),
        ("CHANGELOG.md", include_str!("../../CHANGELOG.md")),
        ("README.md", include_str!("../../README.md")),
        ("SECURITY.md", include_str!("../../SECURITY.md")),
        ("docs/performance.md", include_str!("../../docs/performance.md")),
    ] {
        let missing: Vec<String> = named_in_passing(text).into_iter().filter(|name| !there(name)).collect();
        assert_eq!(missing, Vec::<String>::new(), "named in {document}");
    }
    assert!(!there("hostile::invented") && !there("misuse::numbers_come_back"), "and this test can fail");
}

// --- SQL -----------------------------------------------------------------------------------------------------------

/// Where a text that is no constant is handed to a driver as SQL, how often, and why it holds nothing that a service gave.
const HANDED_OVER: [(&str, usize, &str); 16] = [
    ("durable-mssql/connect.rs", 1, "a constant"),
    ("durable-mssql/migrate.rs", 1, "the migrations' constants and the schema's checked name"),
    ("durable-mssql/session.rs", 2, "constants, and numbers of this crate's settings"),
    ("durable-mssql/sql.rs", 2, "what is bound stands in it as @P1; see BUILT"),
    ("durable-mssql/transaction.rs", 1, "constants, the schema's checked name and a UUID, in a lock's name"),
    ("durable-postgres/connect.rs", 1, "a constant and the schema's checked name"),
    ("durable-postgres/heart.rs", 1, "a number of this crate's own, in a lock's key"),
    ("durable-postgres/listen.rs", 1, "a channel: the schema's checked name"),
    ("durable-postgres/migrate.rs", 4, "the migrations' constants and the schema's checked name"),
    ("durable-postgres/pooler.rs", 1, "constants and numbers of this crate's settings"),
    ("durable-postgres/session.rs", 1, "constants and numbers of this crate's settings"),
    ("durable-postgres/sql.rs", 2, "what is bound stands in it as $1; see BUILT"),
    (
        "durable-postgres/transaction.rs",
        2,
        "constants, the schema's checked name, and a record's texts as literals: see LITERALS",
    ),
    ("durable-sqlite/migrate.rs", 1, "the migrations' constants"),
    ("durable-sqlite/outbox.rs", 1, "constants; what is bound stands in it as ?"),
    ("durable-sqlite/script.rs", 1, "what is bound stands in it as ?; see BUILT"),
];

/// Where SQL is put together of parts, and what the parts are.
const BUILT: [(&str, &str); 33] = [
    ("durable-mssql/batch/", "the schema, parameters, columns of the batch's JSON"),
    ("durable-mssql/fence.rs", "the schema, parameters, a lock's name out of a UUID"),
    ("durable-mssql/heart.rs", "the schema, parameters, a lock's name out of a UUID"),
    ("durable-mssql/json.rs", "columns of the batch's JSON: constants"),
    ("durable-mssql/migrate.rs", "the schema"),
    ("durable-mssql/outbox.rs", "the schema, parameters"),
    ("durable-mssql/read.rs", "the schema, parameters, conditions that are constants"),
    ("durable-mssql/session.rs", "numbers of this crate's settings"),
    ("durable-mssql/sql.rs", "parameters"),
    ("durable-mssql/connect.rs", "a database's name, in an error for people"),
    ("durable-mssql/transaction.rs", "the schema, parameters, a lock's name out of a UUID"),
    ("durable-postgres/batch/", "the schema, parameters, arrays of a batch"),
    ("durable-postgres/connect.rs", "a database's name, in an error for people"),
    ("durable-postgres/fence.rs", "the schema, parameters"),
    ("durable-postgres/heart.rs", "the schema, parameters, a lock's number"),
    ("durable-postgres/listen.rs", "a channel: the schema's checked name"),
    ("durable-postgres/migrate.rs", "the schema"),
    ("durable-postgres/outbox.rs", "the schema, parameters"),
    ("durable-postgres/pooler.rs", "numbers of this crate's settings"),
    ("durable-postgres/read.rs", "the schema, parameters, conditions that are constants"),
    ("durable-postgres/session.rs", "numbers of this crate's settings"),
    ("durable-postgres/sql.rs", "parameters"),
    ("durable-postgres/transaction.rs", "the schema, parameters, literals"),
    ("durable-sqlite/batch/", "parameters, columns of a batch"),
    ("durable-sqlite/cells.rs", "columns of a batch"),
    ("durable-sqlite/fence.rs", "constants"),
    ("durable-sqlite/heart.rs", "constants"),
    ("durable-sqlite/migrate.rs", "the migrations' constants"),
    ("durable-sqlite/reads.rs", "columns and tables that are constants"),
    ("durable-sqlite/outbox.rs", "lists of statuses: constants"),
    ("durable-sqlite/script.rs", "statements one after the other"),
    ("durable-sqlite/store.rs", "conditions and columns that are constants"),
    ("durable-sqlite/transaction.rs", "constants"),
];

/// The one place where texts that a service gave stand in SQL, so that a transactional step's end takes one round trip: as
/// literals, each character beyond plain ASCII by its number.
const LITERALS: [(&str, usize); 1] = [("durable-postgres/transaction.rs", 5)];

/// The backends' files, without the tests at their ends.
fn backends() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for backend in ["durable-mssql", "durable-postgres", "durable-sqlite"] {
        for (path, text) in sources(&format!("{backend}/src")) {
            let test = "#[cfg(test)]\nmod tests {";
            let code = text.split(test).next().unwrap().lines().map(str::trim);
            let code: Vec<&str> = code.filter(|line| !line.starts_with("//")).collect();
            // Modules of tests alone.
            if !["plans.rs", "statements.rs", "fake.rs"].contains(&&*path) {
                files.push((format!("{backend}/{path}"), code.join("\n")));
            }
        }
    }
    files
}

/// The texts in double quotes.
fn quoted(code: &str) -> Vec<String> {
    let (mut texts, mut text, mut chars) = (Vec::new(), None::<String>, code.chars().peekable());
    while let Some(char) = chars.next() {
        match (&mut text, char) {
            (None, '"') => text = Some(String::new()),
            // A character, not the beginning of a text.
            (None, '\'') if chars.peek() == Some(&'"') => drop(chars.next()),
            (None, _) => {}
            (Some(_), '"') => texts.extend(text.take()),
            (Some(text), '\\') => {
                text.push(char);
                text.extend(chars.next());
            }
            (Some(text), _) => text.push(char),
        }
    }
    texts
}

/// Whether a text is SQL with gaps to be filled.
fn has_gaps(text: &str) -> bool {
    const WORDS: [&str; 14] = [
        "SELECT", "INSERT", "UPDATE", "DELETE", "WHERE", "FROM", "VALUES", "CREATE", "DROP", "EXECUTE", "JOIN", "SET",
        "CONVERT", "LISTEN",
    ];
    let gaps = text.replace("{{", "").replace("{schema}", "").contains('{');
    gaps && text.split(|c: char| !c.is_ascii_alphabetic()).any(|word| WORDS.contains(&word))
}

#[test]
fn no_sql_is_made_of_input() {
    let files = backends();
    let listed = |path: &str, list: &[(&str, &str)]| list.iter().any(|(listed, _)| path.starts_with(listed));
    let mut handed_over = BTreeMap::new();
    for (path, code) in &files {
        let over = ["AssertSqlSafe(", ".simple_query(", ".query(self", "query_with(\""];
        let mut count: usize = over.iter().map(|call| code.matches(call).count()).sum();
        // Constants are.
        count -= code.matches(".simple_query(\"").count();
        handed_over.insert(path.as_str(), count);
        for text in quoted(code).iter().filter(|text| has_gaps(text)) {
            assert!(
                listed(path, &BUILT),
                "SQL that is put together in {path}: {text:?}; is any of it given by a service?"
            );
        }
        let begins = |at: usize| !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
        let literals = code.match_indices("literal(").filter(|(at, _)| begins(*at)).count();
        let allowed = LITERALS.iter().find(|(listed, _)| listed == path).map_or(0, |(_, count)| *count);
        assert!(path.ends_with("postgres/sql.rs") || literals == allowed, "literals in {path}: {literals}");
    }
    for (path, count) in handed_over {
        let allowed = HANDED_OVER.iter().find(|(listed, ..)| *listed == path).map_or(0, |(_, count, _)| *count);
        assert_eq!(
            count, allowed,
            "{path} hands SQL to its driver {count} times, and {allowed} are on the list with a reason"
        );
    }
    // The lists name what there is.
    for path in HANDED_OVER.map(|(path, ..)| path).iter().chain(BUILT.map(|(path, _)| path).iter()) {
        let exists = files.iter().any(|(file, _)| file.starts_with(path));
        assert!(exists, "{path} is on a list, but is not there");
    }
    assert!(has_gaps("SELECT 1 FROM {table}") && !has_gaps("SELECT 1 FROM {schema}.steps") && !has_gaps("{a} of {b}"));
}
