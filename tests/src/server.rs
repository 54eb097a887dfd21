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
                let folder = std::env::temp_dir().join(format!("durable-{}", uuid::Uuid::now_v7().simple()));
                let mut server = Self { folder, url: String::new() };
                server.url = server.script("start").await;
                test(server).await;
            }),
            Err(why) => crate::not_run("a PostgreSQL server of the test's own", &why),
        }
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
        self.script("crash").await;
        self.script("start").await;
    }

    async fn script(&self, what: &str) -> String {
        let output = tokio::process::Command::new(SCRIPT).arg(what).arg(&self.folder).output().await.unwrap();
        said(output).unwrap()
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
