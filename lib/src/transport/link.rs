//! One authenticated connection to a peer, as frames.
//!
//! Owns: frames over a TLS session, their deadlines, admission. Must not know: what a frame's kind means.
//!
//! A link is used by one thread at a time and blocks. It is half-duplex by convention: two ends that both
//! send more than the sockets buffer, and neither receives, wait for each other until a deadline ends it.
//! After any error except [`Waiting::FrameStart`] the link is broken and says so.
//!
//! Time: a frame that has begun must be whole after [`Deadlines::frame`], counted while we are inside the
//! link's calls, bytes trickling in or not; what the caller does between pieces of a payload does not count
//! against the peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, ServerConfig};

use super::frame::{FrameHeader, HEADER_LEN, KIND_ADMITTED};
use super::identity::{Identity, PeerIdentity};
use super::link_error::{LinkError, link_error, not_admitted};
use super::places::Place;
use super::records::make_room;
use super::session::{Session, SessionError};
use super::socket::{LinkCanceller, Socket, SocketError, Waiting};
use super::tls::{self, CertRefusal};
use crate::memory::Span;

/// Bytes of a message that room is made for at a time: a peer that announces much and sends little costs as
/// much.
const PIECE: usize = 64 << 10;
/// The same for a message's beginning.
const FIRST_PIECE: usize = 4 << 10;

/// How long each step may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// For TCP to connect.
    pub connect: Duration,
    /// For the TLS handshake and the server's admission together.
    pub handshake: Duration,
    /// For one frame to be sent, or to be received once it has begun.
    pub frame: Duration,
    /// For the next frame to begin; `None` waits for ever (the kernel's keepalive still finds a dead peer).
    pub idle: Option<Duration>,
}

impl Default for Deadlines {
    /// Ten seconds to connect, ten for the handshake, thirty for a frame, no bound on silence.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            frame: Duration::from_secs(30),
            idle: None,
        }
    }
}

/// Totals of one link since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Ciphertext bytes received, handshake included.
    pub wire_in: u64,
    /// Ciphertext bytes sent, handshake included.
    pub wire_out: u64,
    /// Whole frames begun by the peer.
    pub frames_in: u64,
    /// How many frames were sent.
    pub frames_out: u64,
}

/// An authenticated, framed, blocking connection. Dropping it cuts the connection, which the peer sees as
/// [`LinkError::Truncated`]; [`Link::close`] ends it properly.
pub struct Link {
    session: Session,
    peer: PeerIdentity,
    deadlines: Deadlines,
    limit: Option<Instant>,
    header: [u8; HEADER_LEN],
    header_len: usize,
    /// Payload bytes of the current frame not handed out yet.
    left: u32,
    /// Time the current frame may still take; armed when its first byte is here.
    budget: Option<Duration>,
    /// Pages on their way into TLS.
    buffer: Vec<u8>,
    frames_in: u64,
    frames_out: u64,
    broken: bool,
    /// On the accepting end: where the link is counted, as long as it is there.
    place: Option<Place>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Link {
    /// Connects to `addr` as `identity` and returns when a peer that proved to be `expected` has admitted us.
    pub fn connect(
        addr: SocketAddr,
        identity: &Identity,
        expected: &PeerIdentity,
        deadlines: Deadlines,
    ) -> Result<Self, LinkError> {
        Self::connect_cancellable(addr, identity, expected, deadlines, |_| {})
    }

    /// As [`Link::connect`]; `begun` gets the canceller before anything is waited for, so that a connection
    /// that is never answered and a handshake that does not come to its end can be cancelled, too.
    pub fn connect_cancellable(
        addr: SocketAddr,
        identity: &Identity,
        expected: &PeerIdentity,
        deadlines: Deadlines,
        begun: impl FnOnce(LinkCanceller),
    ) -> Result<Self, LinkError> {
        let by = Instant::now() + deadlines.connect;
        let socket = Socket::connect(addr, by, begun).map_err(|error| match error {
            SocketError::Cancelled => LinkError::Cancelled,
            SocketError::Deadline => LinkError::Connect { addr, source: std::io::ErrorKind::TimedOut.into() },
            SocketError::Io(source) => LinkError::Connect { addr, source },
        })?;
        let connection = tls::client(tls::provider(), identity, *expected).map_err(LinkError::Tls)?;
        Self::start_client(Session::client(socket, connection), deadlines).map_err(|error| match error {
            LinkError::PeerRefused(CertRefusal::WrongPeer { expected, presented })
                if presented == *identity.pin() =>
            {
                LinkError::PeerRefused(CertRefusal::Oneself { own: presented, expected })
            }
            // It saw our certificate, which is well-formed, and has nobody of its key.
            LinkError::RefusedByPeer { alert: Some(AlertDescription::CertificateUnknown) } => {
                LinkError::Unknown { own: *identity.pin() }
            }
            other => other,
        })
    }

    /// The client's part once the session exists.
    pub(super) fn start_client(session: Session, deadlines: Deadlines) -> Result<Self, LinkError> {
        let by = Instant::now() + deadlines.handshake;
        let mut link = Self::start(session, deadlines, by).map_err(not_admitted)?;
        link.limit = Some(by);
        match link.recv_any(0) {
            Ok(Some(FrameHeader { kind: KIND_ADMITTED, .. })) => {}
            Ok(Some(_)) => return Err(LinkError::WrongProtocol),
            Ok(None) => return Err(LinkError::RefusedByPeer { alert: None }),
            Err(error) => return Err(not_admitted(error)),
        }
        link.limit = None;
        link.frames_in = 0;
        Ok(link)
    }

    /// The accepting end up to, and not including, the admission of an authenticated peer.
    pub(super) fn accept(
        socket: Socket,
        config: Arc<ServerConfig>,
        deadlines: Deadlines,
    ) -> Result<Self, LinkError> {
        let by = Instant::now() + deadlines.handshake;
        let connection = tls::server(config).map_err(LinkError::Tls)?;
        Self::start(Session::server(socket, connection), deadlines, by)
    }

    /// Ties the link to where it is counted.
    pub(super) fn counted(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Tells the client that it is in.
    pub(super) fn admit(&mut self) -> Result<(), LinkError> {
        self.transmit(KIND_ADMITTED, &[])?;
        self.frames_out = 0;
        Ok(())
    }

    fn start(mut session: Session, deadlines: Deadlines, by: Instant) -> Result<Self, LinkError> {
        session.handshake(by).map_err(|error| link_error(error, Waiting::Handshake))?;
        let facts = session.facts();
        if facts.alpn_protocol() != Some(tls::ALPN) {
            return Err(LinkError::WrongProtocol);
        }
        let certificate = facts.peer_certificates().and_then(<[_]>::first);
        let peer = tls::identity_of(certificate.map_or(&[], |der| der)).map_err(LinkError::PeerRefused)?;
        Ok(Self {
            session,
            peer,
            deadlines,
            limit: None,
            header: [0; HEADER_LEN],
            header_len: 0,
            left: 0,
            budget: None,
            buffer: Vec::new(),
            frames_in: 0,
            frames_out: 0,
            broken: false,
            place: None,
        })
    }

    /// Who the peer is; it has proven to hold that key.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// A handle that ends this link's blocking calls from any thread.
    pub fn canceller(&self) -> LinkCanceller {
        self.session.canceller()
    }

    /// Whether the peer has ended its side of the connection or the link was cancelled, without waiting or
    /// reading. For somebody who waits elsewhere for what would come of this peer.
    pub fn ended(&self) -> bool {
        self.session.ended()
    }

    /// Sets a point in time that no call outlives, on top of [`Deadlines`]; `None` removes it.
    pub fn set_deadline(&mut self, at: Option<Instant>) {
        self.limit = at;
    }

    /// Sets how long a frame may take, and the next one may be waited for, from the next call on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.deadlines.frame = patience;
        self.deadlines.idle = Some(patience);
    }

    /// Waits until there is something to receive, be it the peer's end, or until `until`; says which. The
    /// next frame's time does not begin before.
    ///
    /// # Errors
    /// [`LinkError::Broken`] after an earlier error.
    pub fn await_input(&mut self, until: Instant) -> Result<bool, LinkError> {
        self.check()?;
        Ok(self.header_len > 0 || self.left > 0 || self.session.has_input() || self.session.readable(until))
    }

    /// The totals so far.
    pub fn counters(&self) -> LinkCounters {
        let (wire_in, wire_out) = self.session.wire_bytes();
        LinkCounters { wire_in, wire_out, frames_in: self.frames_in, frames_out: self.frames_out }
    }

    /// Sends one frame. `kind` 0 is reserved.
    pub fn send(&mut self, kind: u8, payload: &[u8]) -> Result<(), LinkError> {
        self.send_parts(kind, &[payload])
    }

    /// Sends one frame whose payload is all `parts` in order, none of them copied together first. Best
    /// throughput with few, long parts.
    pub fn send_parts(&mut self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        if kind == KIND_ADMITTED {
            return Err(LinkError::Misuse("frame kind 0 is reserved"));
        }
        self.transmit(kind, parts)
    }

    /// From here on frames cross without TLS, both ways: see the module. Both ends call it at the same frame
    /// boundary, with nothing under way.
    ///
    /// # Errors
    /// [`LinkError::Misuse`] when the peer's bytes are here already; the link is as before.
    pub fn leave_tls(&mut self) -> Result<(), LinkError> {
        self.check()?;
        let idle = self.left == 0 && self.header_len == 0;
        if !idle || !self.session.leave_tls() {
            return Err(LinkError::Misuse("frames are under way"));
        }
        Ok(())
    }

    /// Sends one frame whose payload is `head` and `span`; without TLS the span goes to the socket as it
    /// lies.
    pub fn send_span(&mut self, kind: u8, head: &[u8], span: &dyn Span) -> Result<(), LinkError> {
        if kind == KIND_ADMITTED {
            return Err(LinkError::Misuse("frame kind 0 is reserved"));
        }
        if !self.session.is_bare() {
            // Out of the shared memory first: TLS must seal one version of it.
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(span.len(), 0);
            span.copy_out(0, &mut buffer);
            let sent = self.transmit(kind, &[head, &buffer]);
            self.buffer = buffer;
            return sent;
        }
        self.check()?;
        let Some(len) = u32::try_from(span.len()).ok().and_then(|l| l.checked_add(head.len() as u32)) else {
            return Err(LinkError::Misuse("payload longer than a frame can declare"));
        };
        let header = FrameHeader { kind, len }.encode();
        let by = self.by(Instant::now(), Some(self.deadlines.frame));
        let head = [header.as_slice(), head].concat();
        let sent = self.session.write(&[&head], by).and_then(|()| self.session.write_span(span, by));
        sent.map_err(|error| self.fail(error, Waiting::Send, 0))?;
        self.frames_out += 1;
        Ok(())
    }

    /// Fills `span` with the next bytes of the current frame's payload, as
    /// [`read_payload`](Self::read_payload).
    pub fn read_span(&mut self, span: &dyn Span) -> Result<(), LinkError> {
        if !self.session.is_bare() {
            let mut buffer = std::mem::take(&mut self.buffer);
            let mut at = 0;
            let read = loop {
                let piece = (span.len() - at).min(PIECE);
                if buffer.len() < piece {
                    buffer.resize(piece, 0);
                }
                let read = self.read_payload(&mut buffer[..piece]);
                if read.is_err() {
                    break read;
                }
                span.copy_in(at, &buffer[..piece]);
                at += piece;
                if at == span.len() {
                    break Ok(());
                }
            };
            self.buffer = buffer;
            return read;
        }
        self.check()?;
        let Some(after) = u32::try_from(span.len()).ok().and_then(|len| self.left.checked_sub(len)) else {
            return Err(LinkError::Misuse("more payload asked for than the frame has"));
        };
        let started = Instant::now();
        let by = self.by(started, Some(self.budget.unwrap_or(self.deadlines.frame)));
        match self.session.read_span(span, by) {
            Ok(count) if count == span.len() => {}
            Ok(count) => {
                let missing = self.left - count as u32;
                return Err(self.fail(SessionError::Truncated, Waiting::Frame, missing));
            }
            Err(error) => return Err(self.fail(error, Waiting::Frame, self.left)),
        }
        self.left = after;
        self.spend(started);
        if after == 0 {
            self.budget = None;
        }
        Ok(())
    }

    /// Waits for a frame of at most `max_len` payload bytes and reads it whole into `buffer`, which ends up
    /// holding exactly the payload; gives the kind. `None`: the peer has closed the link properly.
    pub fn recv_into(&mut self, max_len: u32, buffer: &mut Vec<u8>) -> Result<Option<u8>, LinkError> {
        let Some(header) = self.recv_header(max_len)? else {
            buffer.clear();
            return Ok(None);
        };
        self.gather(buffer)?;
        Ok(Some(header.kind))
    }

    /// Reads the current frame's payload into `buffer`, for which room is made as the bytes come.
    fn gather(&mut self, buffer: &mut Vec<u8>) -> Result<(), LinkError> {
        buffer.clear();
        let len = self.left as usize;
        while buffer.len() < len {
            let at = buffer.len();
            let to = len.min(at + at.clamp(FIRST_PIECE, PIECE));
            if self.place.as_ref().is_some_and(|place| !place.hold(to as u64)) {
                self.broken = true;
                return Err(LinkError::NoRoom);
            }
            if buffer.capacity() < to {
                make_room(buffer, to.max(2 * at).min(len) - at);
            }
            buffer.resize(to, 0);
            self.read_payload(&mut buffer[at..])?;
        }
        Ok(())
    }

    /// Waits for a frame of at most `max_len` payload bytes and reads its header only. Its payload must be
    /// taken with [`read_payload`](Self::read_payload) before the next frame. `None`: the peer has closed the
    /// link properly.
    pub fn recv_header(&mut self, max_len: u32) -> Result<Option<FrameHeader>, LinkError> {
        match self.recv_any(max_len)? {
            Some(FrameHeader { kind: KIND_ADMITTED, .. }) => {
                self.broken = true;
                Err(LinkError::WrongProtocol)
            }
            header => Ok(header),
        }
    }

    /// Fills `into` with the next bytes of the current frame's payload, which has
    /// [`payload_left`](Self::payload_left) of them.
    pub fn read_payload(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        self.check()?;
        let Some(after) = u32::try_from(into.len()).ok().and_then(|len| self.left.checked_sub(len)) else {
            return Err(LinkError::Misuse("more payload asked for than the frame has"));
        };
        let started = Instant::now();
        let by = self.by(started, Some(self.budget.unwrap_or(self.deadlines.frame)));
        let mut filled = 0;
        while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let missing = self.left - filled as u32;
            match self.session.read(rest, by) {
                Ok(0) => return Err(self.fail(SessionError::Truncated, Waiting::Frame, missing)),
                Ok(count) => filled += count,
                Err(error) => return Err(self.fail(error, Waiting::Frame, missing)),
            }
        }
        self.left = after;
        self.spend(started);
        if after == 0 {
            self.budget = None;
        }
        Ok(())
    }

    /// Payload bytes of the current frame not read yet.
    pub fn payload_left(&self) -> u32 {
        self.left
    }

    /// Says that nothing more will be sent, then reads and drops what the peer still sends until it ends its
    /// side, or until `by`. For a last word to a peer that is in the midst of sending: a connection that is
    /// closed with bytes unread is reset, and the reset may overtake the word.
    pub fn close_after_peer(mut self, by: Instant) {
        self.limit = Some(by);
        if self.check().is_err() || self.session.close(Some(by)).is_err() {
            return;
        }
        let mut scrap = [0; 4096];
        while Instant::now() < by {
            let got = if self.left > 0 {
                let len = scrap.len().min(self.left as usize);
                self.read_payload(&mut scrap[..len]).is_ok()
            } else {
                matches!(self.recv_any(u32::MAX), Ok(Some(_)))
            };
            if !got {
                return;
            }
        }
    }

    /// Ends the link properly: what was sent arrives, and the peer then sees the end. Bytes of the peer that
    /// we have not received are lost, and may take unread frames of ours with them: close after the peer's
    /// last answer.
    pub fn close(mut self) -> Result<(), LinkError> {
        self.check()?;
        let by = self.by(Instant::now(), Some(self.deadlines.frame));
        self.session.close(by).map_err(|error| self.fail(error, Waiting::Send, 0))
    }

    fn transmit(&mut self, kind: u8, parts: &[&[u8]]) -> Result<(), LinkError> {
        self.check()?;
        let total = parts.iter().try_fold(0u32, |sum, part| sum.checked_add(u32::try_from(part.len()).ok()?));
        let Some(len) = total else {
            return Err(LinkError::Misuse("payload longer than a frame can declare"));
        };
        let header = FrameHeader { kind, len }.encode();
        let by = self.by(Instant::now(), Some(self.deadlines.frame));
        let sent = match parts {
            // The common shapes without an allocation per frame.
            [] => self.session.write(&[&header], by),
            [one] => self.session.write(&[&header, one], by),
            [one, two] => self.session.write(&[&header, one, two], by),
            many => {
                let mut all = Vec::with_capacity(many.len() + 1);
                all.push(header.as_slice());
                all.extend_from_slice(many);
                self.session.write(&all, by)
            }
        };
        sent.map_err(|error| self.fail(error, Waiting::Send, 0))?;
        self.frames_out += 1;
        Ok(())
    }

    fn recv_any(&mut self, max_len: u32) -> Result<Option<FrameHeader>, LinkError> {
        self.check()?;
        if self.left > 0 {
            return Err(LinkError::Misuse("payload of the current frame not read"));
        }
        // Whoever asks for the next message is done with the last one.
        if let Some(place) = &self.place {
            place.hold(0);
        }
        while self.header_len < HEADER_LEN {
            // The frame's clock starts with its first byte, be it only of a TLS record not whole yet.
            let begun = self.header_len > 0 || self.session.has_input();
            if begun && self.budget.is_none() {
                self.budget = Some(self.deadlines.frame);
            }
            let started = Instant::now();
            let by = self.by(started, if begun { self.budget } else { self.deadlines.idle });
            let waiting = if begun { Waiting::Frame } else { Waiting::FrameStart };
            let missing = (HEADER_LEN - self.header_len) as u32;
            match self.session.read_once(&mut self.header[self.header_len..], by) {
                Ok(None) => {}
                Ok(Some(0)) if self.header_len == 0 => return Ok(None),
                Ok(Some(0)) => return Err(self.fail(SessionError::Truncated, waiting, missing)),
                Ok(Some(count)) => self.header_len += count,
                Err(error) => {
                    let missing = if self.header_len == 0 { 0 } else { missing };
                    return Err(self.fail(error, waiting, missing));
                }
            }
            if begun {
                self.spend(started);
            }
        }
        self.header_len = 0;
        match FrameHeader::decode(self.header, max_len) {
            Ok(header) => {
                self.left = header.len;
                self.frames_in += 1;
                if header.len == 0 {
                    self.budget = None;
                }
                Ok(Some(header))
            }
            Err(refusal) => {
                self.broken = true;
                Err(LinkError::BadFrame(refusal))
            }
        }
    }

    fn check(&self) -> Result<(), LinkError> {
        if self.broken { Err(LinkError::Broken) } else { Ok(()) }
    }

    /// The earlier of the caller's limit and `allowed` from now.
    fn by(&self, now: Instant, allowed: Option<Duration>) -> Option<Instant> {
        let own = allowed.and_then(|allowed| now.checked_add(allowed));
        match (own, self.limit) {
            (Some(own), Some(limit)) => Some(own.min(limit)),
            (own, limit) => own.or(limit),
        }
    }

    /// Books the time since `started` to the current frame.
    fn spend(&mut self, started: Instant) {
        let left = self.budget.unwrap_or(self.deadlines.frame);
        self.budget = Some(left.saturating_sub(started.elapsed()));
    }

    fn fail(&mut self, error: SessionError, waiting: Waiting, missing: u32) -> LinkError {
        let harmless =
            matches!((&error, waiting), (SessionError::Socket(SocketError::Deadline), Waiting::FrameStart));
        if let SessionError::Tls(_) = error {
            self.session.say_why(Some(Instant::now()));
        }
        self.broken |= !harmless;
        match error {
            SessionError::Truncated => LinkError::Truncated { missing },
            error => link_error(error, waiting),
        }
    }
}

/// A whole frame in the link's own buffer.
#[cfg(test)]
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What kind of message the sender calls it.
    pub kind: u8,
    /// The bytes of the message.
    pub payload: &'a [u8],
}

#[cfg(test)]
impl Link {
    /// Waits for a frame of at most `max_len` payload bytes and reads it whole into the link's own buffer.
    /// `None`: the peer has closed the link properly.
    pub fn recv(&mut self, max_len: u32) -> Result<Option<Frame<'_>>, LinkError> {
        let Some(FrameHeader { kind, .. }) = self.recv_header(max_len)? else {
            return Ok(None);
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let read = self.gather(&mut buffer);
        self.buffer = buffer;
        read.map(|()| Some(Frame { kind, payload: &self.buffer }))
    }

    /// Sends plaintext as it is, to be a peer that keeps no rules.
    pub(super) fn send_raw(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.session.write(&[bytes], None).map_err(|error| link_error(error, Waiting::Send))
    }

    /// Sends bytes outside the TLS session, as somebody on the path could.
    pub(super) fn send_ciphertext(&mut self, bytes: &[u8]) {
        self.session.write_unencrypted(bytes);
    }

    pub(super) fn set_frame_time(&mut self, frame: Duration) {
        self.deadlines.frame = frame;
    }

    pub(super) fn buffer_capacity(&self) -> usize {
        self.buffer.capacity()
    }
}
