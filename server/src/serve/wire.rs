//! What is between a socket and the HTTP parser: the exact bound of a head, readers that take nothing, and
//! the parser's own empty answers, which are kept back for a problem to be written in their stead.
//!
//! Owns: bytes in and out of one connection. Must not know: requests.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::shares::Seat;
use crate::http::middleware::HEAD_MAX;

/// How many bytes are kept of an answer that is held back. Its first line is enough.
const KEPT_MAX: usize = 64;

/// A connection, with a count of what its request's head may still have.
pub(super) struct Wire<S> {
    io: S,
    seat: Arc<Seat>,
    /// How many bytes the head may still have.
    head_left: usize,
    held_back: Vec<u8>,
    ended: bool,
    stall: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Wire<S> {
    /// Wraps `io`. An end that takes nothing for `stall` loses the connection.
    pub(super) fn new(io: S, seat: Arc<Seat>, stall: Duration) -> Self {
        Self { io, seat, head_left: HEAD_MAX, held_back: Vec::new(), ended: false, stall, stalled: None }
    }

    /// Gives back the socket.
    pub(super) fn into_inner(self) -> S {
        self.io
    }

    /// Status of the answer that the parser gave on its own, if it did.
    pub(super) fn refused_with(&self) -> Option<u16> {
        let line = std::str::from_utf8(&self.held_back).ok()?;
        line.split(' ').nth(1)?.parse().ok()
    }

    /// Whether part of a head has arrived.
    pub(super) fn in_head(&self) -> bool {
        self.head_left < HEAD_MAX
    }

    /// Whether the other end has closed its side.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Keeps back whatever is not an answer to a request.
    fn hold_back(&mut self, bytes: &[u8]) {
        let more = bytes.len().min(KEPT_MAX.saturating_sub(self.held_back.len()));
        self.held_back.extend_from_slice(&bytes[..more]);
    }

    fn progress<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        self.seat.unread();
        let stall = self.stall;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep(stall)));
        match timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let room = buffer.remaining();
        if this.seat.is_asked() {
            let before = buffer.filled().len();
            let result = Pin::new(&mut this.io).poll_read(context, buffer);
            if matches!(result, Poll::Ready(Ok(()))) && room > 0 && buffer.filled().len() == before {
                this.ended = true;
            }
            return result;
        }
        // A head that is as long as it may be and not complete: the parser has refused it by now.
        let room = room.min(this.head_left);
        if room == 0 && buffer.remaining() > 0 {
            return Poll::Ready(Err(io::Error::other("a head beyond its bound")));
        }
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
        std::task::ready!(Pin::new(&mut this.io).poll_read(context, &mut part))?;
        let read = part.filled().len();
        buffer.advance(read);
        this.head_left -= read;
        this.ended = read == 0 && room > 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.seat.is_asked() {
            this.hold_back(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        let result = Pin::new(&mut this.io).poll_write(context, bytes);
        this.progress(context, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.seat.is_asked() {
            slices.iter().for_each(|s| this.hold_back(s));
            return Poll::Ready(Ok(slices.iter().map(|s| s.len()).sum()));
        }
        let result = Pin::new(&mut this.io).poll_write_vectored(context, slices);
        this.progress(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_flush(context);
        let result = this.progress(context, result);
        if matches!(result, Poll::Ready(Ok(()))) && this.seat.flushed() {
            this.head_left = HEAD_MAX;
        }
        result
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_shutdown(context);
        this.progress(context, result)
    }
}
