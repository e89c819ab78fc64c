//! One TLS session over one socket: bytes in, bytes out.
//!
//! Owns: driving rustls, the ciphertext buffers, what is left of a decrypted record. Must not know: frames,
//! identities' policy.
//!
//! rustls' unbuffered interface, because its buffered one reads 4 KiB per system call: here a system call
//! moves up to [`READ_CHUNK`] or [`WRITE_CHUNK`] bytes, and a record's plaintext goes to the caller's memory
//! in one copy.
//!
//! Every call to rustls passes all the ciphertext there is: it keeps offsets into that between calls.

use std::time::{Duration, Instant};

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::EncryptError;
use rustls::{CommonState, Error};
use zeroize::Zeroize as _;

use super::records::{Outgoing, Plain, Put, Step, Traffic, advance};
use super::socket::{LinkCanceller, Socket, SocketError};
use crate::memory::Span;

/// Ciphertext buffer at first; it grows when bytes fill it, so that a peer pays for its room by sending.
const FIRST_BUFFER: usize = 2 << 10;
/// Ciphertext buffer before the peer is known, at most. More than any handshake flight of ours, and all that
/// a stranger can make us hold.
const HANDSHAKE_BUFFER: usize = 32 << 10;
/// Ciphertext buffer afterwards, at most; what one read asks for where much comes.
const READ_CHUNK: usize = 256 << 10;
/// Plaintext encrypted before a write.
const WRITE_CHUNK: usize = 256 << 10;
/// Largest plaintext of a TLS record (RFC 8446 section 5.1).
const RECORD: usize = 16 << 10;
/// Room beyond the plaintext: 22 bytes per record (header, type, tag), a key update now and then.
const OVERHEAD: usize = 32 * (WRITE_CHUNK / RECORD + 1) + 1024;

/// How long a failed session stays to let its last word arrive.
const LAST_WORD: Duration = Duration::from_millis(500);
/// Bytes kept of what something says that is no TLS.
const FOREIGN: usize = 256;

/// Why a session cannot go on.
#[derive(Debug)]
pub(super) enum SessionError {
    Socket(SocketError),
    Tls(Error),
    /// The peer's bytes ended without its `close_notify`.
    Truncated,
    /// The first bytes are no TLS record: these.
    Foreign(Vec<u8>),
}

impl From<SocketError> for SessionError {
    fn from(error: SocketError) -> Self {
        Self::Socket(error)
    }
}

enum Tls {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// Ciphertext received and not used up: `bytes[start..end]`.
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes that the buffer may grow to.
    most: usize,
}

impl Incoming {
    const fn upto(most: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, end: 0, most }
    }

    /// Makes room behind what is there; false when there cannot be more.
    fn make_room(&mut self) -> bool {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            self.grow();
        }
        self.end < self.bytes.len()
    }

    fn grow(&mut self) {
        // What this leaves behind, when it moves, is ciphertext and zeros.
        let twice = (self.bytes.len() * 2).max(FIRST_BUFFER).min(self.most);
        self.bytes.resize(twice.max(self.bytes.len()), 0);
    }
}

/// One TLS session; see the module.
pub(super) struct Session {
    socket: Socket,
    tls: Tls,
    incoming: Incoming,
    outgoing: Outgoing,
    plain: Plain,
    /// Plaintext that does not fill a record yet; empty between calls, kept for its memory.
    gathered: Vec<u8>,
    peer_closed: bool,
    /// Whether bytes cross as they are, see [`Session::leave_tls`].
    bare: bool,
    wire_in: u64,
    wire_out: u64,
}

impl Session {
    pub(super) fn client(socket: Socket, connection: UnbufferedClientConnection) -> Self {
        Self::new(socket, Tls::Client(connection))
    }

    pub(super) fn server(socket: Socket, connection: UnbufferedServerConnection) -> Self {
        Self::new(socket, Tls::Server(connection))
    }

    fn new(socket: Socket, tls: Tls) -> Self {
        Self {
            socket,
            tls,
            incoming: Incoming::upto(HANDSHAKE_BUFFER),
            outgoing: Outgoing::default(),
            plain: Plain::default(),
            gathered: Vec::new(),
            peer_closed: false,
            bare: false,
            wire_in: 0,
            wire_out: 0,
        }
    }

    pub(super) fn canceller(&self) -> LinkCanceller {
        self.socket.canceller()
    }

    pub(super) fn ended(&self) -> bool {
        self.socket.ended()
    }

    /// Ciphertext bytes (received, sent), handshake included.
    pub(super) fn wire_bytes(&self) -> (u64, u64) {
        (self.wire_in, self.wire_out)
    }

    /// Facts of the finished handshake.
    pub(super) fn facts(&self) -> &CommonState {
        match &self.tls {
            Tls::Client(connection) => connection,
            Tls::Server(connection) => connection,
        }
    }

    /// Whether bytes of the peer are here that nobody has been given.
    pub(super) fn has_input(&self) -> bool {
        self.incoming.start != self.incoming.end || !self.plain.bytes.is_empty()
    }

    /// Waits until the socket has something to read, an end or an error among it, or until `until`; says
    /// which.
    pub(super) fn readable(&self, until: Instant) -> bool {
        self.socket.readable(until)
    }

    /// Runs the handshake to its end. On failure the peer has been told why, as far as TLS has words for it.
    pub(super) fn handshake(&mut self, deadline: Instant) -> Result<(), SessionError> {
        let deadline = Some(deadline);
        loop {
            match self.step(&mut []) {
                Ok(Step::Encoded) => {}
                Ok(Step::Transmit) => self.flush(deadline)?,
                Ok(Step::Handshaking) => {
                    let first = self.wire_in == 0;
                    self.fill(deadline)?;
                    if first {
                        self.expect_tls()?;
                    }
                }
                Ok(Step::Ready) => break,
                Ok(Step::PeerClosed | Step::Closed) => return Err(SessionError::Truncated),
                // Data behind the handshake is kept for the first read.
                Ok(Step::Plain(_)) => {}
                Err(error) => {
                    self.say_why(deadline);
                    return Err(error);
                }
            }
        }
        self.flush(deadline)?;
        self.incoming.most = READ_CHUNK;
        Ok(())
    }

    /// Looks whether the first bytes that came can be TLS at all: a record's type, and a version that begins
    /// with 3.
    fn expect_tls(&self) -> Result<(), SessionError> {
        let Incoming { bytes, start, end, .. } = &self.incoming;
        match &bytes[*start..*end] {
            [20..=23] | [20..=23, 3, ..] | [] => Ok(()),
            foreign => Err(SessionError::Foreign(foreign[..foreign.len().min(FOREIGN)].to_vec())),
        }
    }

    /// From here on bytes cross as they are. Nothing of the peer's may be on its way: false, and nothing
    /// changes, when something is.
    pub(super) fn leave_tls(&mut self) -> bool {
        if self.has_input() || self.peer_closed || self.outgoing.len != 0 {
            return false;
        }
        self.bare = true;
        self.incoming = Incoming::upto(0);
        self.outgoing = Outgoing::default();
        true
    }

    pub(super) const fn is_bare(&self) -> bool {
        self.bare
    }

    /// Bare: writes all of `span`, straight from its memory.
    pub(super) fn write_span(
        &mut self,
        span: &dyn Span,
        deadline: Option<Instant>,
    ) -> Result<(), SessionError> {
        self.socket.write_span(span, deadline)?;
        self.wire_out += span.len() as u64;
        Ok(())
    }

    /// Bare: fills `span`, straight into its memory; gives the bytes that came before the peer's end.
    pub(super) fn read_span(
        &mut self,
        span: &dyn Span,
        deadline: Option<Instant>,
    ) -> Result<usize, SessionError> {
        let count = self.socket.read_span(span, deadline)?;
        self.wire_in += count as u64;
        Ok(count)
    }

    /// Decrypts at least one byte into `into` (not empty); 0 means that the peer has closed the session
    /// properly.
    pub(super) fn read(&mut self, into: &mut [u8], deadline: Option<Instant>) -> Result<usize, SessionError> {
        loop {
            if let Some(count) = self.read_once(into, deadline)? {
                return Ok(count);
            }
        }
    }

    /// Like [`read`](Self::read), but waits for the network at most once: `None` if that brought ciphertext
    /// and nothing has been decrypted yet.
    pub(super) fn read_once(
        &mut self,
        into: &mut [u8],
        deadline: Option<Instant>,
    ) -> Result<Option<usize>, SessionError> {
        if self.bare {
            let count = self.socket.read(into, deadline)?;
            self.wire_in += count as u64;
            return Ok(Some(count));
        }
        let kept = self.plain.take(into);
        if kept > 0 {
            return Ok(Some(kept));
        }
        while !self.peer_closed {
            match self.step(into)? {
                Step::Plain(count) => return Ok(Some(count)),
                Step::Encoded => {}
                Step::Transmit => self.flush(deadline)?,
                Step::Ready | Step::Handshaking => return self.fill(deadline).map(|()| None),
                Step::PeerClosed | Step::Closed => self.peer_closed = true,
            }
        }
        Ok(Some(0))
    }

    /// Encrypts and writes all of `parts`.
    pub(super) fn write(&mut self, parts: &[&[u8]], deadline: Option<Instant>) -> Result<(), SessionError> {
        if self.bare {
            for part in parts {
                self.socket.write_all(part, deadline)?;
                self.wire_out += part.len() as u64;
            }
            return Ok(());
        }
        let mut gathered = std::mem::take(&mut self.gathered);
        // Messages have secrets in them: room for all of it at once, since growing would leave a copy, and
        // nothing stays until the next message, which may be a shorter one.
        gathered.reserve_exact(parts.iter().map(|part| part.len()).sum::<usize>().min(RECORD));
        let written = self.write_records(parts, &mut gathered, deadline);
        gathered.zeroize();
        self.gathered = gathered;
        written?;
        self.flush(deadline)
    }

    /// Fills records whatever the parts' sizes: short bytes are gathered, long runs are encrypted where they
    /// are.
    fn write_records(
        &mut self,
        parts: &[&[u8]],
        gathered: &mut Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<(), SessionError> {
        for part in parts {
            let mut part = *part;
            if !gathered.is_empty() {
                let (head, tail) = part.split_at(part.len().min(RECORD - gathered.len()));
                gathered.extend_from_slice(head);
                part = tail;
                if gathered.len() == RECORD {
                    self.encrypt(gathered, deadline)?;
                    gathered.clear();
                }
            }
            let (whole, tail) = part.split_at(part.len() - part.len() % RECORD);
            for chunk in whole.chunks(WRITE_CHUNK) {
                self.encrypt(chunk, deadline)?;
            }
            gathered.extend_from_slice(tail);
        }
        self.encrypt(gathered, deadline)
    }

    /// Sends `close_notify` and ends our direction.
    pub(super) fn close(&mut self, deadline: Option<Instant>) -> Result<(), SessionError> {
        if self.bare {
            self.socket.finish();
            return Ok(());
        }
        self.outgoing(OVERHEAD, deadline, |traffic, out| traffic.queue_close_notify(out))?;
        self.flush(deadline)?;
        self.socket.finish();
        Ok(())
    }

    /// After a failure of TLS: sends the alert if there is one, and lets it arrive. Closing a socket with
    /// unread bytes resets the connection, and the reset may overtake the alert; so what still comes is read
    /// and dropped, within bounds.
    pub(super) fn say_why(&mut self, deadline: Option<Instant>) {
        // rustls must not look at ciphertext again after an error (it may panic); it hands out what it wants
        // written before it does.
        while self.facts().wants_write() && matches!(self.step(&mut []), Ok(Step::Encoded | Step::Plain(_))) {
        }
        // A peer that stays is not waited for: whoever called us is to hear now what went wrong.
        let soon = Instant::now() + LAST_WORD;
        let deadline = Some(deadline.map_or(soon, |at| at.min(soon)));
        if self.flush(deadline).is_err() {
            return;
        }
        self.socket.finish();
        let mut scrap = [0; 4096];
        for _ in 0..HANDSHAKE_BUFFER / scrap.len() {
            if !matches!(self.socket.read(&mut scrap, deadline), Ok(1..)) {
                return;
            }
        }
    }

    /// Encrypts `plain` (at most [`WRITE_CHUNK`]) into the outgoing buffer, writing that first if it is full.
    fn encrypt(&mut self, plain: &[u8], deadline: Option<Instant>) -> Result<(), SessionError> {
        if plain.is_empty() {
            return Ok(());
        }
        self.outgoing(plain.len() + OVERHEAD, deadline, |traffic, out| traffic.encrypt(plain, out))
    }

    /// Lets `put` write up to `room` bytes of ciphertext.
    fn outgoing(
        &mut self,
        room: usize,
        deadline: Option<Instant>,
        mut put: impl FnMut(&mut dyn Traffic, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), SessionError> {
        if self.outgoing.len + room > WRITE_CHUNK + OVERHEAD {
            self.flush(deadline)?;
        }
        loop {
            let mut put_here = |traffic: &mut dyn Traffic, outgoing: &mut Outgoing| {
                outgoing.append(room, |out| put(traffic, out)).map_err(|_| Error::EncryptError)
            };
            match self.run(&mut [], Some(&mut put_here))? {
                Step::Ready => return Ok(()),
                Step::Plain(_) | Step::Encoded => {}
                Step::Transmit => self.flush(deadline)?,
                Step::PeerClosed => self.peer_closed = true,
                Step::Handshaking | Step::Closed => {
                    return Err(SessionError::Tls(Error::HandshakeNotComplete));
                }
            }
        }
    }

    fn flush(&mut self, deadline: Option<Instant>) -> Result<(), SessionError> {
        self.socket.write_all(&self.outgoing.bytes[..self.outgoing.len], deadline)?;
        self.wire_out += self.outgoing.len as u64;
        self.outgoing.len = 0;
        Ok(())
    }

    /// Reads more ciphertext. Only called when rustls has used up every whole record.
    fn fill(&mut self, deadline: Option<Instant>) -> Result<(), SessionError> {
        if !self.incoming.make_room() {
            // A record fits, so this is a handshake message longer than any of ours.
            return Err(SessionError::Tls(rustls::InvalidMessage::HandshakePayloadTooLarge.into()));
        }
        let incoming = &mut self.incoming;
        let count = self.socket.read(&mut incoming.bytes[incoming.end..], deadline)?;
        if count == 0 {
            return Err(SessionError::Truncated);
        }
        incoming.end += count;
        self.wire_in += count as u64;
        if incoming.end == incoming.bytes.len() {
            // There is more to come at once: the next read asks for more.
            incoming.grow();
        }
        Ok(())
    }

    fn step(&mut self, into: &mut [u8]) -> Result<Step, SessionError> {
        self.run(into, None)
    }

    fn run(&mut self, into: &mut [u8], put: Option<Put<'_>>) -> Result<Step, SessionError> {
        let Incoming { bytes, start, end, .. } = &mut self.incoming;
        let ciphertext = &mut bytes[*start..*end];
        let (outgoing, plain) = (&mut self.outgoing, &mut self.plain);
        let (discard, step) = match &mut self.tls {
            Tls::Client(connection) => {
                advance(connection.process_tls_records(ciphertext), into, plain, outgoing, put)
            }
            Tls::Server(connection) => {
                advance(connection.process_tls_records(ciphertext), into, plain, outgoing, put)
            }
        };
        // What was opened was opened where it lay, and messages have secrets in them. (The buffer lives on:
        // no compiler takes these writes for useless.)
        bytes[*start..*start + discard].fill(0);
        *start += discard;
        if start == end {
            (*start, *end) = (0, 0);
        }
        step.map_err(SessionError::Tls)
    }
}

#[cfg(test)]
impl Session {
    pub(super) fn write_unencrypted(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes, None).unwrap();
    }
}
