//! The bytes below HTTP: an open connection of whatever kind.
//!
//! Owns: opening it within the deadline, and what a refused write means. Must not know: HTTP.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::endpoint::Endpoint;
use crate::error::{Awaited, ClientError};
use crate::settings::Settings;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// An open connection.
///
/// A daemon may refuse a request by its head, answer, and close before it has read the body. Then writes fail
/// while the answer lies in the receive buffer; so what the other side does not take any more is dropped, and
/// reading tells how it ended.
pub(crate) struct Wire {
    stream: Stream,
    /// The other side takes nothing any more.
    deaf: bool,
}

impl Wire {
    /// Opens a connection.
    pub(crate) async fn open(to: &Settings) -> Result<Self, ClientError> {
        let limit = to.limits.connect;
        let late = ClientError::Late { endpoint: to.endpoint.clone(), awaited: Awaited::Connection, limit };
        let stream = tokio::time::timeout(limit, connect(to)).await.unwrap_or(Err(late))?;
        Ok(Self { stream, deaf: false })
    }

    /// Says that nothing follows, and waits until the other side has closed, for `patience` at most.
    pub(crate) async fn close(mut self, patience: Duration) {
        let gone = async {
            let _ = self.shutdown().await;
            let mut rest = [0; 4096];
            while self.read(&mut rest).await.is_ok_and(|n| n > 0) {}
        };
        let _ = tokio::time::timeout(patience, gone).await;
    }

    fn inner(&mut self) -> Pin<&mut dyn Duplex> {
        match &mut self.stream {
            Stream::Unix(stream) => Pin::new(stream),
            Stream::Tcp(stream) => Pin::new(stream),
            Stream::Tls(stream) => Pin::new(&mut **stream),
        }
    }

    /// What a write came to, when `all` bytes were to be written.
    fn written(&mut self, all: usize, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Err(error)) if is_closed(&error) => {
                self.deaf = true;
                Poll::Ready(Ok(all))
            }
            other => other,
        }
    }
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

async fn connect(to: &Settings) -> Result<Stream, ClientError> {
    let failed = |source| ClientError::Connect { endpoint: to.endpoint.clone(), source };
    match &to.endpoint {
        Endpoint::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix).map_err(failed),
        Endpoint::Tcp(address) => {
            let stream = TcpStream::connect(address).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            Ok(Stream::Tcp(stream))
        }
        Endpoint::Tls { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            let refused = |source| ClientError::Tls { endpoint: to.endpoint.clone(), source };
            // Settings of a TLS endpoint have it.
            let (connector, name) =
                to.tls.as_ref().ok_or_else(|| refused(io::ErrorKind::Unsupported.into()))?;
            let stream = connector.connect(name.clone(), stream).await.map_err(refused)?;
            Ok(Stream::Tls(Box::new(stream)))
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner().poll_read(cx, to)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Ready(Ok(bytes.len()));
        }
        let result = self.inner().poll_write(cx, bytes);
        self.written(bytes.len(), result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Ready(Ok(()));
        }
        let result = self.inner().poll_flush(cx).map_ok(|()| 0);
        self.written(0, result).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = pieces.iter().map(|piece| piece.len()).sum();
        if self.deaf {
            return Poll::Ready(Ok(all));
        }
        let result = self.inner().poll_write_vectored(cx, pieces);
        self.written(all, result)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
