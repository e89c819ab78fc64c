//! The accept loop. Not `axum::serve`: that has no timeout on headers and no deadline for draining.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use super::listen::Listener;
use crate::http::guard::Transport;

/// Longest time that a request's head may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections at once, for each listener; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 512;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// Bytes of a request's head, and of what is buffered of its body.
const BUFFER_MAX: usize = 64 << 10;
/// Pause after a failed accept (descriptors used up), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` until `closing` turns true, then lets what is in flight end, for at most `drain`.
pub(super) async fn run(listener: Listener, router: Router, closing: watch::Receiver<bool>, drain: Duration) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let slot = tokio::select! {
            slot = slots.clone().acquire_owned() => slot,
            () = closed(closing.clone()) => break,
        };
        let Ok(slot) = slot else { break };
        // Finished ones are forgotten as we go.
        while connections.try_join_next().is_some() {}
        tokio::select! {
            accepted = accept(&listener, &router, &closing) => match accepted {
                Ok(connection) => {
                    connections.spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = closed(closing.clone()) => break,
        }
    }
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, all).await.is_err() {
        tracing::warn!(left = connections.len(), "drain deadline: closing what is left");
        connections.shutdown().await;
    }
    // The listener goes last: while it is there, nobody takes the socket for stale.
    drop(listener);
}

type Connection = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

async fn accept(
    listener: &Listener,
    router: &Router,
    closing: &watch::Receiver<bool>,
) -> std::io::Result<Connection> {
    let (router, closing) = (router.clone(), closing.clone());
    Ok(match listener {
        Listener::Unix(listener, _) => {
            let (stream, _) = listener.accept().await?;
            Box::pin(connection(stream, Transport::Unix, router, closing))
        }
        Listener::Tcp(listener, _) => {
            let (stream, _) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            Box::pin(connection(stream, Transport::LoopbackTcp, router, closing))
        }
    })
}

async fn connection<S>(stream: S, transport: Transport, router: Router, closing: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(transport);
        let request = request.map(Body::new);
        router.clone().oneshot(request)
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER_MAX);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = closed(closing.clone()) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        // Slow heads, resets and the like: the peer's business.
        tracing::debug!(%error, "connection ended early");
    }
}

async fn closed(mut closing: watch::Receiver<bool>) {
    // An error means that the sender is gone, and the daemon with it.
    let _ = closing.wait_for(|closing| *closing).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::*;
    use crate::serve::listen::{self, Listen};

    async fn serve(
        router: Router,
        drain: Duration,
    ) -> (tempfile::TempDir, UnixStream, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = listen::open(Listen::Unix(path.clone())).await.unwrap();
        let (close, closing) = watch::channel(false);
        let task = tokio::spawn(run(listener, router, closing, drain));
        let stream = UnixStream::connect(path).await.unwrap();
        (dir, stream, close, task)
    }

    fn slow(millis: u64) -> Router {
        Router::new().route(
            "/",
            get(move || async move {
                tokio::time::sleep(Duration::from_millis(millis)).await;
                "done"
            }),
        )
    }

    #[tokio::test]
    async fn a_request_in_flight_is_answered_before_the_end() {
        let (dir, mut stream, close, task) = serve(slow(200), Duration::from_secs(5)).await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        close.send(true).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
        task.await.unwrap();
        assert!(!dir.path().join("s").exists());
    }

    #[tokio::test]
    async fn draining_has_an_end() {
        let (_dir, mut stream, close, task) = serve(slow(60_000), Duration::from_millis(100)).await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        close.send(true).unwrap();
        tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
    }
}
