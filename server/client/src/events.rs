//! The event stream.
//!
//! Owns: reading it on, and the place to continue after. Must not know: what events mean.

use std::fmt;
use std::time::Duration;

use hyper::header::CONTENT_TYPE;

use crate::connection::{Bits, Connection};
use crate::error::ClientError;
use crate::limits::Limits;
use crate::request::Request;
use crate::sse::{Event, Parser};

/// Events as they come. Bookmarks and the daemon's farewell (`closing`) are events, too.
///
/// A stream ends with its daemon, or with an error. To go on, open another with `after` and
/// [`last_id`](Events::last_id): nothing is left out, and nothing comes twice.
pub struct Events {
    bits: Bits,
    parser: Parser,
    silence: Duration,
    most: u64,
    last_id: Option<String>,
}

impl Events {
    pub(crate) async fn open(
        connection: Connection,
        stream: &Request,
        limits: &Limits,
    ) -> Result<Self, ClientError> {
        let most = stream.bound().unwrap_or(limits.body);
        let bits = match connection.follow(stream).await? {
            Ok(bits) => bits,
            Err(refusal) => return Err(refusal.accepted().map_or_else(|e| e, |r| r.odd("no event stream"))),
        };
        let kind = bits.head.header(CONTENT_TYPE.as_str()).unwrap_or_default();
        if !kind.starts_with("text/event-stream") {
            return Err(bits.head.odd("no event stream"));
        }
        let parser = Parser::new(usize::try_from(most).unwrap_or(usize::MAX));
        Ok(Self { bits, parser, silence: limits.silence, most, last_id: None })
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// The stream broke, an event has no end, or nothing came for too long, not even a bookmark.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.parser.next() {
                self.last_id.clone_from(&event.id);
                return Ok(Some(event));
            }
            let Some(bytes) = self.bits.next(self.silence).await? else { return Ok(None) };
            if self.parser.take(&bytes).is_err() {
                return Err(self.bits.too_large(self.most));
            }
        }
    }

    /// Id of the newest event that was given: what to continue after.
    pub fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("last_id", &self.last_id).finish_non_exhaustive()
    }
}
