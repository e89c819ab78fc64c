//! The accept loop. Not `axum::serve`: that has no timeout on headers, no deadline for draining, and lets
//! whoever comes first keep everybody else out.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::body::{Body as _, Bytes, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::listen::Listener;
use super::shares::{Admission, Owner, RESERVED, Seat, Seated, Shares};
use super::tls;
use super::wire::Wire;
use crate::access::caller::Peer;
use crate::config::Limits;
use crate::http::guard::Transport;
use crate::http::middleware::{self, Crowded, HEAD_MAX};
use crate::http::quiet;
use crate::http::stream::Hangup;
use crate::metrics::Turned;
use crate::problem::{Problem, ProblemCode};
use crate::state::AppState;

/// How many headers a request may have.
const HEADERS_MAX: usize = 64;
/// How long to wait after a failed accept (no free descriptors), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a last answer may take to be sent, and how long the other end may then say nothing, before the
/// connection is cut.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long both may take together. Meanwhile the place is anybody's who wants it.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// How many bytes are read and thrown away after the last answer: clients that send all of a body before
/// they read are told that it is too large, and not that the connection broke. Twice the largest body that
/// is taken.
const LAST_BYTES: usize = 32 << 20;

/// What a listener serves, and within which bounds.
#[derive(Clone)]
pub(super) struct Service {
    pub router: Router,
    pub limits: Limits,
    /// How many connections may be open at once.
    pub places: usize,
    pub state: Option<AppState>,
    pub closing: watch::Receiver<bool>,
}

/// Serves until the service closes, then lets requests in flight end, for as long as the limits allow.
pub(super) async fn run(listener: Listener, service: Service) {
    let closing = service.closing.clone();
    let drain = Duration::from_secs(service.limits.drain_seconds.into());
    let shares = Shares::new(service.places);
    let address = listener.address();
    let mut connections = JoinSet::new();
    loop {
        // Finished ones are forgotten as we go.
        while connections.try_join_next().is_some() {}
        tokio::select! {
            accepted = accept(&listener) => match accepted {
                Ok(accepted) => match admit(&shares, &accepted, &service, &address) {
                    Some(guest) => {
                        connections.spawn(serve(accepted, guest, service.clone()));
                        // Those that have lost their places are on their way out, and no faster than that do
                        // others come in.
                        if connections.len() > service.places + 2 * RESERVED {
                            connections.join_next().await;
                        }
                    }
                    None => drop(accepted),
                },
                Err(error) => {
                    if let Some(left_out) = quiet::admits("accept") {
                        tracing::warn!(%error, left_out, listener = address, "cannot accept a connection");
                    }
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

/// A connection as it was accepted.
enum Accepted {
    Unix(tokio::net::UnixStream, Option<Peer>, Owner),
    Tcp(TcpStream, SocketAddr),
    Tls(TcpStream, SocketAddr, TlsAcceptor),
}

impl Accepted {
    fn owner(&self) -> Owner {
        match self {
            Self::Unix(_, _, owner) => *owner,
            Self::Tcp(_, theirs) | Self::Tls(_, theirs, _) => Owner::of(theirs.ip()),
        }
    }
}

async fn accept(listener: &Listener) -> std::io::Result<Accepted> {
    Ok(match listener {
        Listener::Unix(listener, _) | Listener::Passed(listener, _) => {
            let (stream, _) = listener.accept().await?;
            // Of the process that connected; another that it passes the socket to is taken for it.
            let credentials = stream.peer_cred().ok();
            let owner = credentials.map_or(Owner::Unknown, |c| Owner::User(c.uid()));
            let peer = credentials.map(|c| Peer::Unix { uid: c.uid(), gid: c.gid() });
            Accepted::Unix(stream, peer, owner)
        }
        Listener::Tcp(listener, _) => {
            let (stream, theirs) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            Accepted::Tcp(stream, theirs)
        }
        Listener::Tls(listener, _, acceptor, _) => {
            let (stream, theirs) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            Accepted::Tls(stream, theirs, acceptor.clone())
        }
    })
}

/// Finds a place for the connection, and tells log and counters when somebody had to make room.
fn admit(shares: &Arc<Shares>, accepted: &Accepted, service: &Service, address: &str) -> Option<Seated> {
    let (guest, turned) = match shares.admit(accepted.owner()) {
        Admission::Seated { guest, in_place } => {
            let reserved = guest.seat.is_reserved();
            let turned = match (in_place, reserved) {
                (false, false) => return Some(guest),
                (true, false) => Turned::Replaced,
                (_, true) => Turned::Reserved,
            };
            (Some(guest), turned)
        }
        Admission::Full => (None, Turned::Refused),
    };
    if let Some(state) = &service.state {
        state.metrics().turned(turned);
    }
    if let Some(left_out) = quiet::admits("listener_full") {
        let connections = service.places;
        let what = turned.name();
        tracing::warn!(listener = address, connections, what, left_out, "a listener is full");
    }
    guest
}

async fn serve(accepted: Accepted, guest: Seated, service: Service) {
    let seat = Arc::clone(&guest.seat);
    match accepted {
        Accepted::Unix(stream, peer, _) => connection(stream, Transport::Unix, peer, service, seat).await,
        Accepted::Tcp(stream, _) => {
            connection(stream, Transport::LoopbackTcp, Some(Peer::Tcp), service, seat).await;
        }
        Accepted::Tls(stream, _, acceptor) => secured(stream, acceptor, service, seat).await,
    }
    drop(guest);
}

/// Serves a connection that begins with a handshake, in a task of its own like every other.
async fn secured(stream: TcpStream, acceptor: TlsAcceptor, service: Service, seat: Arc<Seat>) {
    let limit = Duration::from_secs(service.limits.handshake_seconds.into());
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(limit, acceptor.accept(stream)) => shaken,
        () = seat.given_away() => return,
    };
    match shaken {
        Ok(Ok(stream)) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let names = shown.map_or_else(Vec::new, |c| tls::names(c));
            connection(stream, Transport::Tls, Some(Peer::Tls { names }), service, seat).await;
        }
        Ok(Err(error)) => {
            if let Some(left_out) = quiet::admits("handshake") {
                tracing::info!(%error, left_out, "a TLS handshake failed");
            }
        }
        Err(_) => {
            if let Some(left_out) = quiet::admits("handshake") {
                tracing::info!(left_out, "a TLS handshake took too long");
            }
        }
    }
}

/// The place was given away before the whole request had arrived.
#[derive(Debug, thiserror::Error)]
#[error("the connection's place was given away")]
struct GivenAway;

async fn connection<S>(stream: S, transport: Transport, peer: Option<Peer>, service: Service, seat: Arc<Seat>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Service { router, limits, state, closing, places: _ } = service;
    let _counted = state.as_ref().map(|state| state.metrics().connection());
    let hangup = Hangup::default();
    let (theirs, place) = (hangup.clone(), Arc::clone(&seat));
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let extensions = request.extensions_mut();
        extensions.insert(transport);
        extensions.insert(theirs.clone());
        if let Some(peer) = &peer {
            extensions.insert(peer.clone());
        }
        if place.is_reserved() {
            extensions.insert(Crowded);
        }
        let (router, place) = (router.clone(), Arc::clone(&place));
        let asked = place.ask();
        let request = request.map(|body| Body::new(Arriving::new(body, Arc::clone(&place))));
        let answer = async move {
            if !asked {
                return Err(GivenAway);
            }
            // Made before the work begins, so that the place is free again also when that is called off.
            let whole = Whole(place);
            let answer: Result<Response, Infallible> = router.oneshot(request).await;
            match answer {
                Ok(answer) => Ok(answer.map(|body| Watched { body, _whole: whole })),
                Err(never) => match never {},
            }
        };
        Box::pin(answer)
    });
    let stall = Duration::from_secs(limits.stream_stall_seconds.into());
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.header_seconds.into()))
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_MAX);
    let wire = Wire::new(stream, Arc::clone(&seat), stall);
    let mut served = builder.serve_connection(TokioIo::new(wire), service);
    // Goes before it, however this ends: a body that is cut off must not look like one that is whole.
    let _over = Over(Arc::clone(&seat));
    let mut draining = false;
    let result = loop {
        tokio::select! {
            result = poll_fn(|context| served.poll_without_shutdown(context)) => break result,
            () = hangup.wanted() => return,
            () = seat.given_away() => return,
            () = closed(closing.clone()), if !draining => {
                Pin::new(&mut served).graceful_shutdown();
                draining = true;
            }
        }
    };
    seat.closing();
    let wire = served.into_parts().io.into_inner();
    let last = result.as_ref().err().and_then(|error| last_word(error, &wire));
    if let Err(error) = result {
        // Slow heads, resets and the like: the peer's business.
        tracing::debug!(%error, "connection ended early");
    }
    tokio::select! {
        () = part(wire, last, state.as_ref()) => {}
        () = seat.given_away() => {}
    }
}

/// What the other end is told when its request could not be read.
fn last_word(error: &hyper::Error, wire: &Wire<impl Sized>) -> Option<Problem> {
    let problem = |code, detail: String| Some(Problem::new(code, detail));
    let malformed = "this is no HTTP/1.1 request";
    if error.is_timeout() {
        let detail = "the request's head was not complete in time".to_owned();
        return wire.in_head().then(|| Problem::new(ProblemCode::RequestTimeout, detail));
    }
    match wire.refused_with() {
        Some(431) => problem(
            ProblemCode::HeadersTooLarge,
            format!("a request's head has at most {HEAD_MAX} bytes and {HEADERS_MAX} headers"),
        ),
        Some(414) => {
            problem(ProblemCode::UriTooLong, format!("a request's head has at most {HEAD_MAX} bytes"))
        }
        Some(_) => problem(ProblemCode::MalformedRequest, malformed.to_owned()),
        // HTTP/2 without TLS, or a head that breaks off while the other end still listens.
        None if error.is_parse() || (error.is_incomplete_message() && wire.in_head()) => {
            problem(ProblemCode::MalformedRequest, malformed.to_owned())
        }
        None => None,
    }
}

/// Writes the last answer, and closes so that it is read: a socket that is closed with unread bytes is reset,
/// and what was written is lost.
async fn part<S>(wire: Wire<S>, last: Option<Problem>, state: Option<&AppState>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ended = wire.has_ended();
    let mut socket = wire.into_inner();
    let goodbye = async {
        let said = async {
            if let Some(problem) = last {
                let text = middleware::unread(state, &problem).await;
                socket.write_all(&text).await?;
            }
            socket.shutdown().await
        };
        if !matches!(tokio::time::timeout(LAST_WORD, said).await, Ok(Ok(()))) || ended {
            return;
        }
        let (mut scrap, mut left) = (vec![0; 16 << 10], LAST_BYTES);
        while let Ok(Ok(read)) = tokio::time::timeout(LAST_WORD, socket.read(&mut scrap)).await {
            left = left.saturating_sub(read);
            if read == 0 || left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, goodbye).await;
}

/// Tells the place when the answer is complete, or nobody makes it any more.
struct Whole(Arc<Seat>);

impl Drop for Whole {
    fn drop(&mut self) {
        self.0.answer_made();
    }
}

/// Tells the place that the connection is at its end.
struct Over(Arc<Seat>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The body of a request. It tells the place when all of it has arrived, and counts as complete only if the
/// place is still there then.
struct Arriving {
    body: Incoming,
    seat: Arc<Seat>,
}

impl Arriving {
    fn new(body: Incoming, seat: Arc<Seat>) -> Self {
        if body.is_end_stream() {
            // Given away meanwhile it is not looked at anyhow.
            seat.arrived();
        }
        Self { body, seat }
    }
}

impl hyper::body::Body for Arriving {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        let whole = frame.is_none() || self.body.is_end_stream();
        std::task::Poll::Ready(match frame {
            Some(Err(error)) => Some(Err(error.into())),
            _ if whole && !self.seat.arrived() => Some(Err(GivenAway.into())),
            frame => frame.map(|frame| frame.map_err(Into::into)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer. It tells the place how far writing has got.
struct Watched {
    body: Body,
    _whole: Whole,
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
        let task = tokio::spawn(run(listener, Service { router, limits, places: 16, state: None, closing }));
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
