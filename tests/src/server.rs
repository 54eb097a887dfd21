use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};
use std::path::PathBuf;
use std::process::Output;

/// A PostgreSQL server of the test's own, which it may do everything to. It goes when it is dropped.
pub struct Server {
    folder: PathBuf,
    url: String,
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/postgres");

impl Server {
    /// Runs a test with one, or says why it does not.
    pub fn run<T: Future<Output = ()>>(test: impl FnOnce(Self) -> T) {
        let there = std::process::Command::new(SCRIPT).arg("programs").output();
        match there.map_err(|error| error.to_string()).and_then(said) {
            Ok(_) => crate::run(async {
                test(Self::started(&["start"]).await).await;
            }),
            Err(why) => crate::not_run("a PostgreSQL server of the test's own", &why),
        }
    }

    async fn started(how: &[&str]) -> Self {
        let folder = std::env::temp_dir().join(format!("durable-{}", uuid::Uuid::now_v7().simple()));
        let mut server = Self { folder, url: String::new() };
        server.url = server.script(how).await;
        server
    }

    /// Another one, which has whatever somebody was told is committed here, and can take over.
    pub async fn standby(&self) -> Self {
        let standby = Self::started(&["standby", &self.url]).await;
        let mut connection = PgConnection::connect(&self.url).await.unwrap();
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await.unwrap();
        connection.execute("SELECT pg_reload_conf()").await.unwrap();
        let follows = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
        let follows = async || sqlx::query_scalar::<_, i64>(follows).fetch_one(&mut connection).await.unwrap() == 1;
        crate::until("it follows", follows).await;
        standby
    }

    /// Makes a standby one that is written to, and waits for nobody.
    pub async fn promote(&self) {
        self.script(&["promote"]).await;
        let mut connection = PgConnection::connect(&self.url).await.unwrap();
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names").await.unwrap();
        connection.execute("SELECT pg_reload_conf()").await.unwrap();
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it has written to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("server.log")).unwrap()
    }

    /// Stops it at once, without a word to anybody, and starts it again.
    pub async fn crash_and_start(&self) {
        self.crash().await;
        self.script(&["start"]).await;
    }

    /// Stops it at once, without a word to anybody.
    pub async fn crash(&self) {
        self.script(&["crash"]).await;
    }

    /// What the script says when it is told to do this with the server's folder.
    async fn script(&self, what: &[&str]) -> String {
        let mut command = tokio::process::Command::new(SCRIPT);
        said(command.arg(what[0]).arg(&self.folder).args(&what[1..]).output().await.unwrap()).unwrap()
    }
}

fn said(output: Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::process::Command::new(SCRIPT).arg("stop").arg(&self.folder).output();
    }
}
