use durable_core::storage::RunId;
use durable_mssql::tiberius::{ColumnData, Config, QueryItem, Row};
use durable_mssql::{Client, Mssql};
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use crate::crash::shared::Shared;
use crate::proxy::{Proxied, Proxy};
use crate::{Backend, Sql};

/// A schema of its own, and a user who may do nothing but use it, in the database that `DURABLE_MSSQL_URL` names; dropped
/// with it.
pub struct MssqlSchema {
    address: String,
    name: String,
}

const PASSWORD: &str = "Durable-1433";

/// Who makes the schemas.
fn administrator() -> Result<String, String> {
    const URL: &str = "DURABLE_MSSQL_URL";
    std::env::var(URL).map_err(|_| format!("{URL} is not set"))
}

async fn connect(address: &str) -> Client {
    use tokio_util::compat::TokioAsyncWriteCompatExt;
    let config = Config::from_ado_string(address).unwrap();
    let stream = tokio::net::TcpStream::connect(config.get_addr()).await.unwrap();
    Box::pin(Client::connect(config, stream.compat_write())).await.unwrap()
}

const SLOW: &str = "the first statements of each of its sessions take longer than the test's times";

const NEVER_PARKED: &str = "a commit takes so long that what a process waits for is there before it leaves memory";

/// What the tests run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The real one, which is excused from nothing.
    SqlServer,
    /// Babelfish for PostgreSQL, which speaks its protocol.
    Babelfish,
}

impl Target {
    async fn of(client: &mut Client) -> Self {
        let version = rows(client, "SELECT @@VERSION").await;
        let babelfish = version[0].get::<&str, _>(0).unwrap().contains("Babelfish");
        if babelfish { Self::Babelfish } else { Self::SqlServer }
    }

    /// What it cannot do: the ends of tests' names, and why.
    fn excuses(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::SqlServer => &[],
            Self::Babelfish => &[
                ("records::texts_up_to_their_limits", "its OPENJSON cuts texts off after 4,000 characters"),
                ("a_user_without_rights_to_create", "it has one number for most errors, a missing right among them"),
                ("a_storage_that_stays_away", SLOW),
                ("retries_survive_a_crash", SLOW),
                ("timers_go_on_after_a_crash", SLOW),
                ("everything_works_through_crashes", SLOW),
                ("while_parking", NEVER_PARKED),
                ("after_parking", NEVER_PARKED),
                ("while_claiming", NEVER_PARKED),
                ("after_claiming", NEVER_PARKED),
                ("a_timed_receive_that_was_dropped_leaves_no_deadline", SLOW),
            ],
        }
    }

    /// Whether it has rights to databases, apart from those to schemas.
    fn grants_on_databases(self) -> bool {
        self == Self::SqlServer
    }
}

async fn rows(client: &mut Client, sql: &str) -> Vec<Row> {
    use futures_util::TryStreamExt;
    let items: Vec<QueryItem> = client.simple_query(sql).await.unwrap().try_collect().await.unwrap();
    items.into_iter().filter_map(QueryItem::into_row).collect()
}

impl MssqlSchema {
    /// Why this thread's test cannot run here: there is no database, or what is there cannot do what it asks.
    pub fn missing() -> Option<String> {
        let administrator = match administrator() {
            Ok(administrator) => administrator,
            Err(why) => return Some(why),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let target = runtime.block_on(async { Target::of(&mut connect(&administrator).await).await });
        let (_, why) = target.excuses().iter().find(|(test, _)| is_test(test))?;
        Some(format!("{target:?} is excused: {why}"))
    }

    /// Runs a test if there is a database that can do it, else says so.
    pub fn run(test: impl Future<Output = ()>) {
        match Self::missing() {
            // Most of what a session of Babelfish's takes is its first statements.
            None => crate::run_within(Duration::from_secs(if crate::long() { 1800 } else { 300 }), test),
            Some(why) => {
                let test = std::thread::current().name().unwrap_or_default().to_owned();
                let what = if why.contains("excused") { format!("{test} on mssql") } else { "mssql".to_owned() };
                crate::not_run(&what, &why);
            }
        }
    }

    /// The database's address, as the schema's own user.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The schema's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The storage at an address, that of a proxy say.
    pub async fn storage_by(&self, address: &str) -> Mssql {
        Mssql::connect(address).schema(&self.name).max_connections(3).max_transactions(2).await.unwrap()
    }

    /// Waits until so many of the storage's sessions wait for a lock.
    pub async fn waiting(&self, sessions: i64) {
        let mut client = connect(&administrator().unwrap()).await;
        let waiting = match Target::of(&mut client).await {
            Target::SqlServer => format!(
                "SELECT COUNT_BIG(*) FROM sys.dm_exec_requests AS r JOIN sys.dm_exec_sessions AS s
                     ON s.session_id = r.session_id WHERE s.login_name = '{}' AND r.wait_type LIKE 'LCK%'",
                self.name
            ),
            Target::Babelfish => format!(
                "SELECT COUNT_BIG(*) FROM pg_stat_activity WHERE usename = '{}' AND wait_event_type = 'Lock'",
                self.name
            ),
        };
        crate::until("it waits for a lock", async || {
            rows(&mut client, &waiting).await[0].get::<i64, _>(0).unwrap() >= sessions
        })
        .await;
    }

    /// A connection of the test's own.
    pub async fn connect(&self) -> Client {
        connect(&self.address).await
    }
}

impl Backend for MssqlSchema {
    type Storage = Mssql;

    async fn new() -> Self {
        let administrator = administrator().unwrap();
        let name = format!("test_{}", durable_core::RunId::new().0.simple());
        let mut client = connect(&administrator).await;
        for sql in [
            format!("CREATE LOGIN {name} WITH PASSWORD = N'{PASSWORD}'"),
            format!("CREATE USER {name} FOR LOGIN {name} WITH DEFAULT_SCHEMA = {name}"),
            format!("CREATE SCHEMA {name} AUTHORIZATION {name}"),
        ] {
            rows(&mut client, &sql).await;
        }
        if Target::of(&mut client).await.grants_on_databases() {
            rows(&mut client, &format!("GRANT CREATE TABLE TO {name}")).await;
        }
        let place: Vec<&str> = administrator
            .split(';')
            .filter(|pair| !["user", "uid", "user id", "username", "password", "pwd"].contains(&key(pair).as_str()))
            .collect();
        Self { address: format!("{};user={name};password={PASSWORD}", place.join(";")), name }
    }

    async fn storage(&self) -> Mssql {
        self.storage_by(&self.address).await
    }
}

impl Sql for MssqlSchema {
    const PROCESSES: &'static str = "processes";
    const STEPS: &'static str = "steps";
    const FALSE: &'static str = "0";
    const INBOX: bool = true;
    const HIDE: &'static [&'static str] = &["CREATE TABLE #steps (dummy INT)", "USE tempdb"];
    const LEAVE: &'static [&'static str] = &["SET LANGUAGE French", "SET DATEFIRST 3", "SET TEXTSIZE 10"];
    const CANCELS: &'static str =
        "UPDATE processes SET cancel_requested_at = SYSUTCDATETIME(), signals = signals + 1, signalled = 1";
    type Connection = Client;
    const BEGIN: &'static str = "BEGIN TRANSACTION";
    async fn connection(&self) -> Client {
        self.connect().await
    }
    async fn execute(&self, sql: &str) {
        rows(&mut self.connect().await, sql).await;
    }
    async fn number(&self, sql: &str) -> i64 {
        let rows = rows(&mut self.connect().await, sql).await;
        let mut row = rows.into_iter().next().unwrap().into_iter();
        match row.next().unwrap() {
            ColumnData::I32(Some(number)) => number.into(),
            ColumnData::I64(Some(number)) => number,
            other => panic!("not a number: {other:?}"),
        }
    }
    async fn texts(&self, sql: &str) -> Vec<String> {
        let rows = rows(&mut self.connect().await, sql).await;
        rows.iter().map(|row| row.get::<&str, _>(0).unwrap().to_owned()).collect()
    }
}

impl Shared for MssqlSchema {
    const NOW: &'static str = "SYSUTCDATETIME()";
    const COUNT_TAKEOVERS: &'static str = "
        CREATE TABLE taken_over (processes BIGINT NOT NULL, silent BIGINT NOT NULL);
        EXEC (N'CREATE TRIGGER count_takeovers ON fences AFTER UPDATE AS
            INSERT INTO taken_over (processes, silent)
            SELECT (SELECT COUNT_BIG(*) FROM processes AS p WHERE p.owner = i.instance),
                (SELECT DATEDIFF_BIG(MILLISECOND, n.heartbeat_at, SYSUTCDATETIME()) FROM instances AS n
                    WHERE n.instance = i.instance)
            FROM inserted AS i JOIN deleted AS d ON d.instance = i.instance
            WHERE d.fenced_at IS NULL AND i.fenced_at IS NOT NULL');";
    /// With the schema as its fragment.
    fn worker_address(&self) -> String {
        format!("{}#{}", self.address, self.name)
    }
    async fn is_held(&self) -> bool {
        let mut client = connect(&administrator().unwrap()).await;
        let held = format!(
            "SELECT s.session_id FROM sys.dm_exec_sessions AS s
             WHERE s.login_name = '{}' AND s.status = 'sleeping' AND s.open_transaction_count > 0",
            self.name
        );
        !rows(&mut client, &held).await.is_empty()
    }
}

impl Proxied for MssqlSchema {
    // A connection takes long on the one, and its answers are long.
    const STRIDE: usize = 23;
    fn literal(run: RunId) -> String {
        format!("0x{}", run.0.simple())
    }
    async fn proxy(&self) -> Proxy {
        let (before, rest) = self.address.split_once("tcp:").unwrap();
        let (place, rest) = rest.split_once(';').unwrap();
        let address = |place: SocketAddr| format!("{before}tcp:{},{};{rest}", place.ip(), place.port());
        Proxy::to(&place.replace(',', ":"), address).await
    }
    async fn through(&self, proxy: &Proxy) -> Mssql {
        self.storage_by(&proxy.url).await
    }
    async fn alone_through(&self, proxy: &Proxy) -> Mssql {
        self.storage_by(&proxy.url).await
    }
}

impl MssqlSchema {
    /// The storage at the address of a worker.
    pub async fn storage_at(address: &str) -> Mssql {
        let (address, schema) = address.rsplit_once('#').expect("address#schema");
        Mssql::connect(address).schema(schema).await.unwrap()
    }
}

impl Drop for MssqlSchema {
    fn drop(&mut self) {
        let name = self.name.clone();
        // In a thread of its own: whoever drops it may be on a runtime. What is still in use stays.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut client = connect(&administrator().unwrap()).await;
                let tables = format!(
                    "SELECT t.name FROM sys.tables AS t JOIN sys.schemas AS s ON s.schema_id = t.schema_id
                     WHERE s.name = '{name}'"
                );
                let tables = rows(&mut client, &tables).await;
                let tables = tables.iter().map(|row| format!("TABLE {name}.{}", row.get::<&str, _>(0).unwrap()));
                for what in tables.chain(["SCHEMA", "USER", "LOGIN"].map(|what| format!("{what} {name}"))) {
                    if let Ok(dropped) = client.simple_query(format!("DROP {what}")).await {
                        let _ = dropped.into_results().await;
                    }
                }
            });
        });
        let _ = dropping.join();
    }
}

/// Whether this thread's test is the one with this name.
fn is_test(test: &str) -> bool {
    let thread = std::thread::current();
    let (module, case) = test.split_once("::").unwrap_or(("", test));
    let name = thread.name().unwrap_or_default();
    name.contains(module) && name.contains(case)
}

fn key(pair: &str) -> String {
    pair.split('=').next().unwrap_or_default().trim().to_lowercase()
}
