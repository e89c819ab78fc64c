//! What a host may ask of a helper, and how the helper answers.

use crate::record::{CHUNK_PAGES, CHUNKS_MAX, Suite};
use crate::{u16_at, u32_at, u64_at};

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $n:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name { $($(#[$vdoc])* $variant = $n,)* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The value with number `n`, if there is one.
            pub const fn from_u32(n: u32) -> Option<Self> {
                match n { $($n => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

numbered! {
    /// A request. In a slot's payload go [`Begin`] for `Begin`, with evidence of the destination behind it
    /// for a source ([`crate::evidence`]), [`Start`] for `Start`, 32 bytes of digest for `State`, one sealed
    /// token for the `*Token` ones, [`Scan`] for `Scan`; the answers of `Hello` (a [`Greeting`]), `EndEpoch`,
    /// `Start`, `Commit` and `Abort` (one sealed token each) come back there.
    Op {
        /// Draws a nonce and an ephemeral key pair for a new session, and answers with the nonce and the
        /// public key. Legal when no session is open.
        Hello = 1,
        /// Opens a session with what the peer's `Hello` answered. Keys are derived; nonce and ephemeral key
        /// are spent and wiped, also when it is refused.
        Begin = 2,
        /// Source: seals pages.
        Export = 3,
        /// Destination: opens a group into RAM.
        Import = 4,
        /// Source: ends the epoch; answers with its token.
        EndEpoch = 5,
        /// Destination: checks an epoch token against what arrived.
        EpochToken = 6,
        /// Source: the guest is paused; only the last epoch may follow.
        Pause = 7,
        /// Source: answers with the START token, once. From then on the guest may not run here again
        /// without the destination's ABORT token.
        Start = 8,
        /// Destination: checks the START token.
        StartToken = 9,
        /// Destination: takes the guest over; answers with the COMMIT token. No ABORT can follow.
        Commit = 10,
        /// Destination: gives up for good; answers with the ABORT token. Nothing else can follow.
        Abort = 11,
        /// Source, after START: checks the ABORT token; the guest may run here again.
        AbortToken = 12,
        /// Source, after START: checks the COMMIT token; the session is done.
        CommitToken = 13,
        /// Source, before START: drops the session and its keys.
        Cancel = 14,
        /// Destination: the digest of the vCPU and device state that arrived; no more pages follow.
        State = 15,
        /// Source: tells which pages of a range differ from what was last exported in this session. Changes
        /// nothing; a page that is found goes out by the next export. Legal where pages may be exported and
        /// the helper has room for digests; answers with a bitmap, [`Scan::bitmap_bytes`] long.
        Scan = 16,
        /// Source, after START: seals the digests of the pages of some chunks, whose numbers ascend over all
        /// such requests. The slot's list has the numbers, `count` of them, and behind them from
        /// [`AUDIT_BITS_AT`] on a bit for each page that the host wants left out. Answers with the group.
        Digests = 17,
        /// Destination, after START: compares a group of digests with those of what it opened. The bits of
        /// pages that its own host wants left out lie where they do for `Digests`.
        Compare = 18,
        /// Destination, after START: ends the audit; answers with a [`Verdict`] when all pages that crossed
        /// sealed were looked at.
        Verdict = 19,
    }
}

numbered! {
    /// The outcome of a request. Failures of decryption are one status on purpose: which check failed is
    /// nobody's business.
    Status {
        /// Done.
        Ok = 0,
        /// No such operation.
        UnknownOp = 1,
        /// Not legal in the session's present state.
        WrongState = 2,
        /// Slot, count, length or parameters out of range.
        BadRequest = 3,
        /// A page that is not guest RAM, or is the helper's own.
        PageRefused = 4,
        /// A page was exported or imported already in this epoch.
        PageRepeated = 5,
        /// A group or a piece of it does not open, or is not the one expected next. The session is over.
        Unsealed = 6,
        /// Totals or digests of a token differ from what was seen. The session is over.
        Incomplete = 7,
        /// Another worker is in the middle of a batch; control operations need them idle.
        Busy = 8,
        /// The guest's secret has not been delivered.
        NoSecret = 9,
        /// A counter is used up. The session is over.
        Exhausted = 10,
        /// The guest's policy forbids it.
        PolicyForbids = 11,
        /// The processor gives no random numbers, or none that look like any. Nothing was sealed.
        NoEntropy = 12,
        /// The peer's public key is one with which anybody knows the shared secret (RFC 7748, section 6.1).
        KeyRefused = 13,
        /// Source: the guest's owner demands evidence of the destination, and there is none or it does not
        /// do. One status for all that can be wrong with it. No key was made, and no page can leave.
        EvidenceRefused = 14,
    }
}

/// Bytes of an encoded [`Greeting`].
pub const GREETING_BYTES: usize = 64;

/// What a helper answers to [`Op::Hello`], for the other one's [`Op::Begin`]. Fresh for every session, and no
/// secret.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// A nonce.
    pub nonce: [u8; 32],
    /// Public half of an ephemeral X25519 key (RFC 7748), of which the helper alone has the other half.
    pub public_key: [u8; 32],
}

impl Greeting {
    /// Writes the greeting.
    pub fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut b = [0; GREETING_BYTES];
        b[..32].copy_from_slice(&self.nonce);
        b[32..].copy_from_slice(&self.public_key);
        b
    }

    /// Reads a greeting. Any bytes are one; whether the key is good for anything the helper finds out.
    pub fn decode(b: &[u8; GREETING_BYTES]) -> Self {
        let mut greeting = Self::default();
        greeting.nonce.copy_from_slice(&b[..32]);
        greeting.public_key.copy_from_slice(&b[32..]);
        greeting
    }
}

/// Bytes of an encoded [`Begin`].
pub const BEGIN_BYTES: usize = 56 + GREETING_BYTES;

/// Parameters of [`Op::Begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Whether this side exports.
    pub source: bool,
    /// Source: zero pages may be sent as such, which tells the hosts where they are.
    pub elide_zero: bool,
    /// Destination: RAM is all zero now, so that a page that arrives as zero and is new needs no write.
    pub fresh: bool,
    /// Source: keeps a digest of every page that it exports, where there is room for them, so that
    /// [`Op::Scan`] is legal.
    pub digests: bool,
    /// An audit follows START: the destination keeps a digest of every page that it opens, for which it needs
    /// room, under a key of the session.
    pub audit: bool,
    /// By what everything is sealed.
    pub suite: Suite,
    /// Streams, 1 to the number of workers. Stream `i` is worker `i`'s.
    pub streams: u16,
    /// The migration's id.
    pub session: [u8; 16],
    /// Digest of what both hosts agreed on: layout, image, protocol. Different ends derive different keys.
    pub transcript: [u8; 32],
    /// What the other helper answered to [`Op::Hello`].
    pub peer: Greeting,
}

impl Begin {
    /// Writes the parameters.
    pub fn encode(&self) -> [u8; BEGIN_BYTES] {
        let mut b = [0; BEGIN_BYTES];
        b[0..2].copy_from_slice(&self.streams.to_le_bytes());
        b[2] = u8::from(self.source)
            | u8::from(self.elide_zero) << 1
            | u8::from(self.fresh) << 2
            | u8::from(self.digests) << 3
            | u8::from(self.audit) << 4;
        b[3] = self.suite as u8;
        b[8..24].copy_from_slice(&self.session);
        b[24..56].copy_from_slice(&self.transcript);
        b[56..].copy_from_slice(&self.peer.encode());
        b
    }

    /// Reads parameters; `None` for another length, unknown role or suite, or set reserved bytes.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; BEGIN_BYTES] = b.try_into().ok()?;
        if b[2] > 31 || u32_at(b, 4) != 0 {
            return None;
        }
        let mut begin = Self {
            source: b[2] & 1 != 0,
            elide_zero: b[2] & 2 != 0,
            fresh: b[2] & 4 != 0,
            digests: b[2] & 8 != 0,
            audit: b[2] & 16 != 0,
            suite: Suite::from_u8(b[3])?,
            streams: u16_at(b, 0),
            session: [0; 16],
            transcript: [0; 32],
            peer: Greeting::decode(b.last_chunk()?),
        };
        begin.session.copy_from_slice(&b[8..24]);
        begin.transcript.copy_from_slice(&b[24..56]);
        Some(begin)
    }
}

/// Bytes of an encoded [`Start`].
pub const START_BYTES: usize = 40;

/// Parameters of [`Op::Start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// SHA-256 of the vCPU and device state.
    pub state: [u8; 32],
    /// Pages that never were private in this session and went unsealed. With the sealed ones they must make
    /// up all of RAM, or the export is not complete.
    pub shared_pages: u64,
}

impl Start {
    /// Writes the parameters.
    pub fn encode(&self) -> [u8; START_BYTES] {
        let mut b = [0; START_BYTES];
        b[..32].copy_from_slice(&self.state);
        b[32..].copy_from_slice(&self.shared_pages.to_le_bytes());
        b
    }

    /// Reads the parameters.
    pub fn decode(b: &[u8; START_BYTES]) -> Self {
        let mut state = [0; 32];
        state.copy_from_slice(&b[..32]);
        Self { state, shared_pages: u64_at(b, 32) }
    }
}

/// Offset in a slot's list of the bits of pages that are left out of an audit, [`CHUNK_BITS_BYTES`] a chunk,
/// in the order of the chunks.
pub const AUDIT_BITS_AT: usize = CHUNKS_MAX * 8;
/// Bytes of a chunk's bits: bit `i` (of byte `i / 8`, lowest first) is that of the chunk's page `i`.
pub const CHUNK_BITS_BYTES: usize = (CHUNK_PAGES / 8) as usize;
const _: () = assert!(AUDIT_BITS_AT + CHUNKS_MAX * CHUNK_BITS_BYTES <= crate::mailbox::PAYLOAD_AT);
const _: () = assert!(CHUNKS_MAX <= crate::mailbox::BATCH_MAX);

/// Pages that a verdict names at most.
pub const NAMED_MAX: usize = 8;
/// Bytes of an encoded [`Verdict`].
pub const VERDICT_BYTES: usize = 24 + 8 * NAMED_MAX;

/// What an audit found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Pages whose digests were compared.
    pub compared: u64,
    /// Pages that crossed sealed and were left out, by the destination's host.
    pub left_out: u64,
    /// Pages that are not what the source has, or that one host left out and the other did not.
    pub differing: u64,
    /// The first of them, as the helper calls them; the rest of the array is zero.
    pub first: [u64; NAMED_MAX],
}

impl Verdict {
    /// Writes the verdict.
    pub fn encode(&self) -> [u8; VERDICT_BYTES] {
        let mut b = [0; VERDICT_BYTES];
        let words = [self.compared, self.left_out, self.differing];
        for (to, word) in b.chunks_exact_mut(8).zip(words.iter().chain(&self.first)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        b
    }

    /// Reads a verdict. Any bytes are one.
    pub fn decode(b: &[u8; VERDICT_BYTES]) -> Self {
        let mut first = [0; NAMED_MAX];
        for (i, page) in first.iter_mut().enumerate() {
            *page = u64_at(b, 24 + 8 * i);
        }
        Self { compared: u64_at(b, 0), left_out: u64_at(b, 8), differing: u64_at(b, 16), first }
    }
}

/// Bytes of an encoded [`Scan`].
pub const SCAN_BYTES: usize = 16;
/// Most pages of one scan: 64 MiB of RAM, some milliseconds of work, 2 KiB of answer.
pub const SCAN_MAX: u32 = 1 << 14;

/// Parameters of [`Op::Scan`]: pages as the helper calls them. In the answer, bit `i` (of byte `i / 8`,
/// lowest first) stands for page `first + i`: set when it was not exported in this session or differs from
/// what was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The first page.
    pub first: u64,
    /// Pages, 1 to [`SCAN_MAX`].
    pub count: u32,
}

impl Scan {
    /// Bytes of the answer: one bit a page, in whole words of 64.
    pub const fn bitmap_bytes(&self) -> usize {
        self.count.div_ceil(64) as usize * 8
    }

    /// Writes the parameters.
    pub fn encode(&self) -> [u8; SCAN_BYTES] {
        let mut b = [0; SCAN_BYTES];
        b[..8].copy_from_slice(&self.first.to_le_bytes());
        b[8..12].copy_from_slice(&self.count.to_le_bytes());
        b
    }

    /// Reads the parameters; `None` for counts out of bounds, ranges that wrap, or set reserved bytes.
    pub fn decode(b: &[u8; SCAN_BYTES]) -> Option<Self> {
        let scan = Self { first: u64_at(b, 0), count: u32_at(b, 8) };
        let sane = (1..=SCAN_MAX).contains(&scan.count)
            && scan.first.checked_add(scan.count as u64).is_some()
            && u32_at(b, 12) == 0;
        sane.then_some(scan)
    }
}
