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
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::listen::Listener;
use super::tls;
use crate::access::caller::Peer;
use crate::config::Limits;
use crate::http::guard::Transport;
use crate::http::stream::Hangup;
use crate::state::AppState;

/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// Bytes of a request's head, and of what is buffered of its body.
const BUFFER_MAX: usize = 64 << 10;
/// Pause after a failed accept (descriptors used up), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener serves, and within which bounds.
#[derive(Clone)]
pub(super) struct Service {
    pub router: Router,
    pub limits: Limits,
    pub metrics: Option<AppState>,
    pub closing: watch::Receiver<bool>,
}

/// Serves until the service closes, then lets what is in flight end, for as long as its limits say.
pub(super) async fn run(listener: Listener, service: Service) {
    let closing = service.closing.clone();
    let drain = Duration::from_secs(service.limits.drain_seconds.into());
    let slots = Arc::new(Semaphore::new(service.limits.connections as usize));
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
            accepted = accept(&listener, &service) => match accepted {
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

async fn accept(listener: &Listener, service: &Service) -> std::io::Result<Connection> {
    let service = service.clone();
    Ok(match listener {
        Listener::Unix(listener, _) | Listener::Passed(listener, _) => {
            let (stream, _) = listener.accept().await?;
            // Of the process that connected; another that it passes the socket to is taken for it.
            let peer = stream.peer_cred().ok().map(|c| Peer::Unix { uid: c.uid(), gid: c.gid() });
            Box::pin(connection(stream, Transport::Unix, peer, service))
        }
        Listener::Tcp(listener, _) => {
            let (stream, _) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            Box::pin(connection(stream, Transport::LoopbackTcp, Some(Peer::Tcp), service))
        }
        Listener::Tls(listener, _, acceptor) => {
            let (stream, _) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            Box::pin(secured(stream, acceptor.clone(), service))
        }
    })
}

/// A connection with a handshake before it, on a task of its own like every other.
async fn secured(stream: TcpStream, acceptor: TlsAcceptor, service: Service) {
    let limit = Duration::from_secs(service.limits.handshake_seconds.into());
    match tokio::time::timeout(limit, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let names = shown.map_or_else(Vec::new, |c| tls::names(c));
            connection(stream, Transport::Tls, Some(Peer::Tls { names }), service).await;
        }
        Ok(Err(error)) => tracing::info!(%error, "a TLS handshake failed"),
        Err(_) => tracing::info!("a TLS handshake took too long"),
    }
}

async fn connection<S>(stream: S, transport: Transport, peer: Option<Peer>, service: Service)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Service { router, limits, metrics, closing } = service;
    let _counted = metrics.as_ref().map(|state| state.metrics().connection());
    let hangup = Hangup::default();
    let theirs = hangup.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(transport);
        request.extensions_mut().insert(theirs.clone());
        if let Some(peer) = &peer {
            request.extensions_mut().insert(peer.clone());
        }
        let request = request.map(Body::new);
        router.clone().oneshot(request)
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.header_seconds.into()))
        .max_headers(HEADERS_MAX)
        .max_buf_size(BUFFER_MAX);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = hangup.wanted() => return,
        () = closed(closing.clone()) => {
            served.as_mut().graceful_shutdown();
            tokio::select! {
                result = served.as_mut() => result,
                () = hangup.wanted() => return,
            }
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
        drain_seconds: u32,
    ) -> (tempfile::TempDir, UnixStream, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = listen::open(Listen::Unix(path.clone()), None).await.unwrap().remove(0);
        let (close, closing) = watch::channel(false);
        let limits = Limits { drain_seconds, header_seconds: 1, ..Limits::default() };
        let task = tokio::spawn(run(listener, Service { router, limits, metrics: None, closing }));
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
        let (dir, mut stream, close, task) = serve(slow(200), 5).await;
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
        let (_dir, mut stream, close, task) = serve(slow(60_000), 0).await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        close.send(true).unwrap();
        tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_head_that_does_not_come_ends_the_connection() {
        let (_dir, mut stream, _close, _task) = serve(slow(0), 0).await;
        stream.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
    }
}
