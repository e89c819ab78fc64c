//! Sealed records: what travels from helper to helper. Hosts carry them and may read the headers.
//!
//! A record is a header of 32 bytes, the ciphertext, and a tag of 16 bytes (AES-256-GCM). The associated data
//! of the seal is [`Binding::aad`]: protocol label, session, direction and the whole header, so that kind,
//! stream, epoch, sequence and RAM page are all bound. The nonce is stream and sequence; keys differ by
//! direction, stream and session, so that a nonce never meets one key twice.

use crate::{PAGE_BYTES, u16_at, u32_at, u64_at};

/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 32;
/// Bytes of a record's tag.
pub const TAG_BYTES: usize = 16;
/// Bytes of a sealed page.
pub const SEALED_PAGE_BYTES: usize = HEADER_BYTES + PAGE_BYTES + TAG_BYTES;
/// Bytes of a sealed zero page.
pub const SEALED_ZERO_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// Bytes of what a token seals.
pub const TOKEN_BODY_BYTES: usize = 96;
/// Bytes of a sealed token.
pub const TOKEN_BYTES: usize = HEADER_BYTES + TOKEN_BODY_BYTES + TAG_BYTES;
/// Version of the record format.
pub const RECORD_VERSION: u8 = 1;
/// The stream number of tokens.
pub const CONTROL_STREAM: u16 = 0xffff;
/// Bytes of associated data.
pub const AAD_BYTES: usize = 8 + 16 + 8 + HEADER_BYTES;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A page of RAM.
    Page = 1,
    /// End of an epoch, with totals.
    Epoch = 2,
    /// START: end of the export.
    Start = 3,
    /// COMMIT: the destination runs the guest.
    Commit = 4,
    /// ABORT: the destination never will.
    Abort = 5,
    /// A page of RAM that is all zero; no body. Tells whoever carries it that the page is zero, so only
    /// used where a session allows it.
    ZeroPage = 6,
}

impl Kind {
    /// Bytes of ciphertext of a record of this kind.
    pub const fn body_bytes(self) -> usize {
        match self {
            Self::Page => PAGE_BYTES,
            Self::ZeroPage => 0,
            Self::Epoch | Self::Start | Self::Commit | Self::Abort => TOKEN_BODY_BYTES,
        }
    }

    /// The kind with number `n`, if there is one.
    pub const fn from_u8(n: u8) -> Option<Self> {
        match n {
            1 => Some(Self::Page),
            2 => Some(Self::Epoch),
            3 => Some(Self::Start),
            4 => Some(Self::Commit),
            5 => Some(Self::Abort),
            6 => Some(Self::ZeroPage),
            _ => None,
        }
    }
}

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// The stream, or [`CONTROL_STREAM`].
    pub stream: u16,
    /// The epoch, counted from 1.
    pub epoch: u32,
    /// Counts the records of a stream from 0.
    pub sequence: u64,
    /// The page of RAM; 0 for tokens.
    pub page: u64,
    /// Bytes of ciphertext.
    pub len: u32,
}

impl Header {
    /// Writes the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[0] = self.kind as u8;
        b[1] = RECORD_VERSION;
        b[2..4].copy_from_slice(&self.stream.to_le_bytes());
        b[4..8].copy_from_slice(&self.epoch.to_le_bytes());
        b[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        b[16..24].copy_from_slice(&self.page.to_le_bytes());
        b[24..28].copy_from_slice(&self.len.to_le_bytes());
        b
    }

    /// Reads a header; `None` for an unknown kind or version, a length that is not the kind's, or reserved
    /// bits that are set.
    pub fn decode(b: &[u8; HEADER_BYTES]) -> Option<Self> {
        let kind = Kind::from_u8(b[0])?;
        let header = Self {
            kind,
            stream: u16_at(b, 2),
            epoch: u32_at(b, 4),
            sequence: u64_at(b, 8),
            page: u64_at(b, 16),
            len: u32_at(b, 24),
        };
        let good = b[1] == RECORD_VERSION && header.len as usize == kind.body_bytes() && u32_at(b, 28) == 0;
        good.then_some(header)
    }

    /// The AEAD nonce. Unique under its key because the sequence never repeats in a stream.
    pub fn nonce(&self) -> [u8; 12] {
        let mut n = [0; 12];
        n[2..4].copy_from_slice(&self.stream.to_le_bytes());
        n[4..12].copy_from_slice(&self.sequence.to_le_bytes());
        n
    }
}

/// Which way a record travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Source to destination.
    Forward = 0,
    /// Destination to source.
    Backward = 1,
}

/// What is bound to every record of one direction of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The migration's id.
    pub session: [u8; 16],
    /// Which way.
    pub direction: Direction,
}

impl Binding {
    /// The associated data for a record with this `header`.
    pub fn aad(&self, header: &[u8; HEADER_BYTES]) -> [u8; AAD_BYTES] {
        let mut a = [0; AAD_BYTES];
        a[..8].copy_from_slice(b"mvm-rec1");
        a[8..24].copy_from_slice(&self.session);
        a[24] = self.direction as u8;
        a[32..].copy_from_slice(header);
        a
    }
}

/// What a token says: totals since the session began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Token {
    /// Page records of all streams so far.
    pub records: u64,
    /// Different pages so far.
    pub pages: u64,
    /// Digest over the tags of all page records so far.
    pub exported: [u8; 32],
    /// Digest of vCPU and device state, in START and COMMIT.
    pub state: [u8; 32],
}

impl Token {
    /// Writes the body.
    pub fn encode(&self) -> [u8; TOKEN_BODY_BYTES] {
        let mut b = [0; TOKEN_BODY_BYTES];
        b[0..8].copy_from_slice(&self.records.to_le_bytes());
        b[8..16].copy_from_slice(&self.pages.to_le_bytes());
        b[16..48].copy_from_slice(&self.exported);
        b[48..80].copy_from_slice(&self.state);
        b
    }

    /// Reads a body.
    pub fn decode(b: &[u8; TOKEN_BODY_BYTES]) -> Self {
        let mut t = Self { records: u64_at(b, 0), pages: u64_at(b, 8), exported: [0; 32], state: [0; 32] };
        t.exported.copy_from_slice(&b[16..48]);
        t.state.copy_from_slice(&b[48..80]);
        t
    }
}
