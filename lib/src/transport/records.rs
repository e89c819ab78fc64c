//! One step of rustls' unbuffered state machine, for either end.
//!
//! Owns: what each of its states asks for, and the buffers that it fills. Must not know: sockets, deadlines.

use rustls::Error;
use rustls::client::ClientConnectionData;
use rustls::server::ServerConnectionData;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use zeroize::Zeroize as _;

/// Most that rustls may want to send on its own in one go (its flight of handshake messages).
const MAX_OWN: usize = 64 << 10;
/// What it mostly comes to.
const USUAL_OWN: usize = 1 << 10;

/// Decrypted bytes nobody has asked for yet: `bytes[taken..]`.
#[derive(Default)]
pub(super) struct Plain {
    pub(super) bytes: Vec<u8>,
    taken: usize,
}

impl Plain {
    fn put(&mut self, more: &[u8]) {
        make_room(&mut self.bytes, more.len());
        self.bytes.extend_from_slice(more);
    }

    pub(super) fn take(&mut self, into: &mut [u8]) -> usize {
        let ready = self.bytes.get(self.taken..).unwrap_or_default();
        let count = ready.len().min(into.len());
        into[..count].copy_from_slice(&ready[..count]);
        // Nobody else is to find it: messages have secrets in them.
        self.bytes[self.taken..self.taken + count].fill(0);
        self.taken += count;
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        }
        count
    }
}

/// Makes room in `bytes` for `more` of them. Where they have to move, what they leave is wiped.
pub(super) fn make_room(bytes: &mut Vec<u8>, more: usize) {
    let needed = bytes.len() + more;
    if bytes.capacity() < needed {
        let mut wider = Vec::with_capacity(needed);
        wider.extend_from_slice(bytes);
        bytes.zeroize();
        *bytes = wider;
    }
}

/// Ciphertext to be sent: `bytes[..len]`. The rest is room, kept initialized so that it is zeroed only once.
#[derive(Default)]
pub(super) struct Outgoing {
    pub(super) bytes: Vec<u8>,
    pub(super) len: usize,
}

impl Outgoing {
    /// Lets `put` write ciphertext into `room` bytes behind what is there.
    pub(super) fn append<E>(
        &mut self,
        room: usize,
        put: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let end = self.len + room;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.len += put(&mut self.bytes[self.len..end])?;
        Ok(())
    }
}

/// What rustls came to when given all the ciphertext.
pub(super) enum Step {
    /// This many decrypted bytes are in the caller's buffer (the rest is in `Plain`).
    Plain(usize),
    /// Something of its own is in the outgoing buffer.
    Encoded,
    /// The outgoing buffer is to be written now.
    Transmit,
    /// It needs more ciphertext; data may be sent.
    Ready,
    /// It needs more ciphertext; the handshake goes on.
    Handshaking,
    /// The peer has sent its `close_notify`.
    PeerClosed,
    /// Both ends have; nothing can be sent any more.
    Closed,
}

/// What to do when rustls is ready to encrypt.
pub(super) type Put<'a> = &'a mut dyn FnMut(&mut dyn Traffic, &mut Outgoing) -> Result<(), Error>;

/// [`WriteTraffic`] of either end.
pub(super) trait Traffic {
    fn encrypt(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, EncryptError>;
    fn queue_close_notify(&mut self, out: &mut [u8]) -> Result<usize, EncryptError>;
}

macro_rules! traffic {
    ($data:ty) => {
        impl Traffic for WriteTraffic<'_, $data> {
            fn encrypt(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, EncryptError> {
                WriteTraffic::encrypt(self, plain, out)
            }

            fn queue_close_notify(&mut self, out: &mut [u8]) -> Result<usize, EncryptError> {
                WriteTraffic::queue_close_notify(self, out)
            }
        }
    };
}
traffic!(ClientConnectionData);
traffic!(ServerConnectionData);

/// Carries out what one status asks for. Returns the ciphertext bytes used up, also on error.
pub(super) fn advance<'c, D>(
    status: UnbufferedStatus<'c, '_, D>,
    into: &mut [u8],
    plain: &mut Plain,
    outgoing: &mut Outgoing,
    put: Option<Put<'_>>,
) -> (usize, Result<Step, Error>)
where
    WriteTraffic<'c, D>: Traffic,
{
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut placed = 0;
            let mut failed = None;
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        let room = into.get_mut(placed..).unwrap_or_default();
                        let direct = record.payload.len().min(room.len());
                        room[..direct].copy_from_slice(&record.payload[..direct]);
                        placed += direct;
                        plain.put(&record.payload[direct..]);
                    }
                    Err(error) => failed = Some(error),
                }
            }
            failed.map_or(Ok(Step::Plain(placed)), Err)
        }
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let encoded = match outgoing.append(USUAL_OWN, |out| data.encode(out)) {
                Err(EncodeError::InsufficientSize(more)) if more.required_size <= MAX_OWN => {
                    outgoing.append(more.required_size, |out| data.encode(out))
                }
                encoded => encoded,
            };
            match encoded {
                Ok(()) => Ok(Step::Encoded),
                Err(EncodeError::InsufficientSize(_) | EncodeError::AlreadyEncoded) => {
                    Err(Error::EncryptError)
                }
            }
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // Nothing else is done before the buffer is written, or the session ends.
            data.done();
            Ok(Step::Transmit)
        }
        Ok(ConnectionState::WriteTraffic(mut traffic)) => match put {
            Some(put) => put(&mut traffic, outgoing).map(|()| Step::Ready),
            None => Ok(Step::Ready),
        },
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Handshaking),
        Ok(ConnectionState::PeerClosed) => Ok(Step::PeerClosed),
        Ok(ConnectionState::Closed) => Ok(Step::Closed),
        // Early data is off on both ends; whatever a newer rustls adds is unknown to us.
        Ok(_) => Err(Error::General("unexpected TLS state".into())),
    };
    (discard, step)
}
