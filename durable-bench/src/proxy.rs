//! A network that is slower: what goes to the server arrives later.

use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::Error;

/// Stands before a server; the database's address by way of it. Lives as long as the runtime.
pub(crate) async fn before(url: &str, delay: Duration) -> Result<String, Error> {
    const FORM: &str = "for `remote`, give `postgres://user:password@host:port/database`";
    let (scheme, rest) = url.split_once("://").ok_or(FORM)?;
    let (user, rest) = rest.rsplit_once('@').ok_or(FORM)?;
    let (server, database) = rest.split_once('/').ok_or(FORM)?;
    let server = if server.contains(':') { server.to_owned() } else { format!("{server}:5432") };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("{scheme}://{user}@{}/{database}", listener.local_addr()?);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            if let Ok(server) = TcpStream::connect(&server).await {
                tokio::spawn(pass(client, server, delay));
            }
        }
    });
    Ok(url)
}

async fn pass(client: TcpStream, server: TcpStream, delay: Duration) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let (sender, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let read = async {
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
            if sender.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    };
    // What follows is under way at the same time.
    let write = async {
        while let Some((at, bytes)) = under_way.recv().await {
            tokio::time::sleep_until(at).await;
            if to_server.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}
