//! Sealed groups: what travels from helper to helper. Hosts carry them and may read headers and lists.
//!
//! A request gives one group:
//!
//! ```text
//! header (48)   kind, version, suite, 0 | stream, count | epoch, 0 | sequence | 24 random bytes
//! list          only of pages and digests: `count` words of 8 bytes, page number and whether it is zero
//! pieces        for each page its ciphertext (none for a zero page) and a tag of 16 bytes; for a token one
//! ```
//!
//! A group of digests looks like one of pages. A piece is a chunk: the digests of [`CHUNK_PAGES`] pages in a
//! row, zero for each that is left out; its word in the list has the chunk's number, which is that of its
//! first page divided by as many.
//!
//! Each group has a key of its own: HKDF-Expand (SHA-256) of its stream's secret with [`GROUP_LABEL`] and the
//! whole header, so that a header of which one bit is another opens nothing. The random bytes are fresh from
//! the processor and nothing that memory held, which is why a helper whose memory is put back to what it was
//! still never uses a key twice; within the group the nonce of a piece is its index ([`piece_nonce`]). The
//! associated data of a piece are its index and its word of the list ([`piece_aad`]). Session, transcript,
//! direction and stream are what the stream's secret comes from. There is no length: it follows from the
//! list, of which each word is bound to its piece, so that a group that was cut off or padded is not as long
//! as it says.

use crate::{PAGE_BYTES, u16_at, u32_at, u64_at};

/// Bytes of a group's header.
pub const HEADER_BYTES: usize = 48;
/// Bytes of a page's word in the list.
pub const LISTED_BYTES: usize = 8;
/// Bytes of a piece's tag.
pub const TAG_BYTES: usize = 16;
/// Random bytes of a group.
pub const RANDOM_BYTES: usize = 24;
/// Most pages of a group.
pub const GROUP_MAX: usize = 512;
/// Bytes of what a token seals.
pub const TOKEN_BODY_BYTES: usize = 96;
/// Bytes of a sealed token: a group of one piece without a list.
pub const TOKEN_BYTES: usize = HEADER_BYTES + TOKEN_BODY_BYTES + TAG_BYTES;
/// Version of the format.
pub const RECORD_VERSION: u8 = 2;
/// The stream number of tokens.
pub const CONTROL_STREAM: u16 = 0xffff;
/// The stream number of the audit's digests.
pub const AUDIT_STREAM: u16 = 0xfffe;
/// Pages whose digests fill one piece of a group of digests.
pub const CHUNK_PAGES: u64 = (PAGE_BYTES / DIGEST_BYTES) as u64;
/// Bytes of a page's digest.
pub const DIGEST_BYTES: usize = crate::layout::DIGEST_BYTES as usize;
/// Most pieces of a group of digests: 32 MiB of RAM, some milliseconds of work.
pub const CHUNKS_MAX: usize = 32;
/// What a stream's secret is expanded with, followed by the group's header, to the key of a group.
pub const GROUP_LABEL: &[u8] = b"mirrorvm group key v2";
/// Bytes of a piece's associated data.
pub const AAD_BYTES: usize = 16;

/// What a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Pages of RAM.
    Pages = 1,
    /// End of an epoch, with totals.
    Epoch = 2,
    /// START: end of the export.
    Start = 3,
    /// COMMIT: the destination runs the guest.
    Commit = 4,
    /// ABORT: the destination never will.
    Abort = 5,
    /// Digests of pages, for the audit after START.
    Digests = 6,
}

impl Kind {
    /// The kind with number `n`, if there is one.
    pub const fn from_u8(n: u8) -> Option<Self> {
        match n {
            1 => Some(Self::Pages),
            2 => Some(Self::Epoch),
            3 => Some(Self::Start),
            4 => Some(Self::Commit),
            5 => Some(Self::Abort),
            6 => Some(Self::Digests),
            _ => None,
        }
    }
}

/// By what pieces are sealed; one suite for all of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Suite {
    /// AES-256-GCM. The fastest; relies on no nonce meeting a key twice, which fresh random bytes for every
    /// request see to.
    Aes256Gcm = 1,
    /// AES-256-GCM-SIV (RFC 8452). Slower; a nonce that meets its key twice tells only whether the two pages
    /// were the same.
    Aes256GcmSiv = 2,
}

impl Suite {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Aes256Gcm, Self::Aes256GcmSiv];

    /// The suite with number `n`, if there is one.
    pub const fn from_u8(n: u8) -> Option<Self> {
        match n {
            1 => Some(Self::Aes256Gcm),
            2 => Some(Self::Aes256GcmSiv),
            _ => None,
        }
    }

    /// Its bit in an image header's word of suites.
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

/// A group's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// How it is sealed.
    pub suite: Suite,
    /// The stream, or [`CONTROL_STREAM`].
    pub stream: u16,
    /// Pieces: pages, 1 to [`GROUP_MAX`]; chunks of digests, 1 to [`CHUNKS_MAX`]; 1 for tokens.
    pub count: u16,
    /// The epoch, counted from 1.
    pub epoch: u32,
    /// Counts the groups of a stream from 0.
    pub sequence: u64,
    /// Fresh for every group.
    pub random: [u8; RANDOM_BYTES],
}

impl Header {
    /// Writes the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[0] = self.kind as u8;
        b[1] = RECORD_VERSION;
        b[2] = self.suite as u8;
        b[4..6].copy_from_slice(&self.stream.to_le_bytes());
        b[6..8].copy_from_slice(&self.count.to_le_bytes());
        b[8..12].copy_from_slice(&self.epoch.to_le_bytes());
        b[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        b[24..].copy_from_slice(&self.random);
        b
    }

    /// Reads a header; `None` for an unknown kind, version or suite, a count that the kind does not have, or
    /// reserved bits that are set.
    pub fn decode(b: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut header = Self {
            kind: Kind::from_u8(b[0])?,
            suite: Suite::from_u8(b[2])?,
            stream: u16_at(b, 4),
            count: u16_at(b, 6),
            epoch: u32_at(b, 8),
            sequence: u64_at(b, 16),
            random: [0; RANDOM_BYTES],
        };
        header.random.copy_from_slice(&b[24..]);
        let most = match header.kind {
            Kind::Pages => GROUP_MAX,
            Kind::Digests => CHUNKS_MAX,
            Kind::Epoch | Kind::Start | Kind::Commit | Kind::Abort => 1,
        };
        let good = b[1] == RECORD_VERSION
            && b[3] == 0
            && u32_at(b, 12) == 0
            && (1..=most).contains(&usize::from(header.count));
        good.then_some(header)
    }
}

/// A page's word in the list of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The page of RAM.
    pub page: u64,
    /// Whether it is all zero, and has no ciphertext. Tells whoever carries it that the page is zero, so only
    /// used where a session allows it.
    pub zero: bool,
}

/// Set for a zero page.
const ZERO: u64 = 1 << 63;
/// Page numbers are below this: more than any guest has addresses.
const PAGES_END: u64 = 1 << 56;

impl Listed {
    /// Writes the word.
    pub const fn encode(&self) -> [u8; LISTED_BYTES] {
        (self.page | if self.zero { ZERO } else { 0 }).to_le_bytes()
    }

    /// Reads a word; `None` when reserved bits are set.
    pub const fn decode(b: [u8; LISTED_BYTES]) -> Option<Self> {
        let word = u64::from_le_bytes(b);
        let listed = Self { page: word & !ZERO, zero: word & ZERO != 0 };
        if listed.page < PAGES_END { Some(listed) } else { None }
    }

    /// Bytes of its ciphertext.
    pub const fn body_bytes(&self) -> usize {
        if self.zero { 0 } else { PAGE_BYTES }
    }
}

/// Bytes of a group of pages before its first piece.
pub const fn front_bytes(count: usize) -> usize {
    HEADER_BYTES + count * LISTED_BYTES
}

/// Bytes of a group of `count` pages of which none is zero.
pub const fn group_bytes(count: usize) -> usize {
    front_bytes(count) + count * (PAGE_BYTES + TAG_BYTES)
}

/// What a group of pages begins with: header and list, every word of which makes sense.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    /// The header.
    pub header: Header,
    list: &'a [[u8; LISTED_BYTES]],
}

impl<'a> Front<'a> {
    /// Reads the beginning of `bytes`, which may be anybody's; `None` when no whole front of a group of pages
    /// is there.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        Self::read_kind(bytes, Kind::Pages)
    }

    /// The same of a group of digests, whose list has chunks in ascending order and nothing that is zero.
    pub fn read_digests(bytes: &'a [u8]) -> Option<Self> {
        let front = Self::read_kind(bytes, Kind::Digests)?;
        let ascending = front.list.windows(2).all(|w| u64::from_le_bytes(w[0]) < u64::from_le_bytes(w[1]));
        (ascending && front.pages().all(|chunk| !chunk.zero)).then_some(front)
    }

    fn read_kind(bytes: &'a [u8], kind: Kind) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::decode(head).filter(|h| h.kind == kind)?;
        let list = rest.as_chunks().0.get(..usize::from(header.count))?;
        let sound = list.iter().all(|word| Listed::decode(*word).is_some());
        sound.then_some(Self { header, list })
    }

    /// The pages, in order.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = Listed> + use<'a> {
        // Every word was looked at by `read`.
        self.list.iter().map(|word| Listed::decode(*word).unwrap_or(Listed { page: u64::MAX, zero: true }))
    }

    /// Bytes of the front.
    pub const fn bytes(&self) -> usize {
        front_bytes(self.list.len())
    }

    /// Bytes of the whole group.
    pub fn group_bytes(&self) -> usize {
        self.bytes() + self.pages().map(|listed| listed.body_bytes() + TAG_BYTES).sum::<usize>()
    }
}

/// The nonce of piece `index` under its group's key.
pub fn piece_nonce(index: usize) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&(index as u64).to_le_bytes());
    nonce
}

/// The associated data of piece `index` with this word of the list; that of a token is zero.
pub fn piece_aad(index: usize, listed: [u8; LISTED_BYTES]) -> [u8; AAD_BYTES] {
    let mut aad = [0; AAD_BYTES];
    aad[..8].copy_from_slice(&(index as u64).to_le_bytes());
    aad[8..].copy_from_slice(&listed);
    aad
}

/// Which way a group travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Source to destination.
    Forward = 0,
    /// Destination to source.
    Backward = 1,
}

/// What a token says: totals since the session began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Token {
    /// Pages sealed on all streams so far, each as often as it was.
    pub records: u64,
    /// Different pages so far.
    pub pages: u64,
    /// Digest over the tags of all pages so far.
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
