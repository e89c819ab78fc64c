//! A response body that is written as its reader takes it, and is cut when the reader does not.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Frame;
use tokio::sync::{Notify, mpsc};

use super::quiet;

/// How many chunks fit between writer and reader.
const CHUNKS: usize = 64;

/// Ends the connection that a request came over; set on every request by the accept loop.
#[derive(Clone, Debug, Default)]
pub struct Hangup(Arc<Notify>);

impl Hangup {
    /// Ends the connection, whatever is still to be written.
    pub fn now(&self) {
        self.0.notify_one();
    }

    /// Returns when the connection is to end.
    pub async fn wanted(&self) {
        self.0.notified().await;
    }
}

/// The reader has gone, or takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The writer's end of a body that is sent in chunks.
#[derive(Debug)]
pub struct Chunks {
    sender: mpsc::Sender<Bytes>,
    stall: Duration,
    hangup: Option<Hangup>,
}

impl Chunks {
    /// Writes a chunk. Waits for a reader that is behind, but not for longer than it may take nothing.
    ///
    /// # Errors
    /// [`Gone`]; a reader that took nothing has lost its connection.
    pub async fn send(&self, chunk: Bytes) -> Result<(), Gone> {
        match tokio::time::timeout(self.stall, self.sender.send(chunk)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Gone),
            Err(_) => {
                if let Some(left_out) = quiet::admits("stalled_reader") {
                    tracing::info!(left_out, "a reader of events takes nothing and is disconnected");
                }
                if let Some(hangup) = &self.hangup {
                    hangup.now();
                }
                Err(Gone)
            }
        }
    }

    /// Returns when the reader is gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// The reader's end, which is a body.
#[derive(Debug)]
pub struct ChunkBody(mpsc::Receiver<Bytes>);

impl hyper::body::Body for ChunkBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|c| Ok(Frame::data(c))))
    }
}

/// Makes a body and its writer. The reader may take nothing for `stall`.
pub fn channel(stall: Duration, hangup: Option<Hangup>) -> (Arc<Chunks>, ChunkBody) {
    let (sender, receiver) = mpsc::channel(CHUNKS);
    (Arc::new(Chunks { sender, stall, hangup }), ChunkBody(receiver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_hung_up_on() {
        let hangup = Hangup::default();
        let (writer, body) = channel(Duration::from_millis(50), Some(hangup.clone()));
        let mut sent = 0;
        while writer.send(Bytes::from_static(b"x")).await.is_ok() {
            sent += 1;
            assert!(sent < 10_000);
        }
        assert_eq!(sent, CHUNKS, "nothing is left out before the end");
        hangup.wanted().await;
        drop(body);
        assert_eq!(writer.send(Bytes::new()).await, Err(Gone));
        writer.closed().await;
    }
}
