//! The peer protocol's messages. Versioned, bounded, and untrusted when they arrive.
//!
//! Frames are [`crate::transport::Link`]'s; `kind` tells the message. Control messages are JSON with unknown
//! fields refused; page data is binary.

use crate::codes::AnyCode;
use mirrorvm_abi::evidence::{EVIDENCE_BYTES, REPORT_BYTES};
use mirrorvm_abi::mailbox::{BATCH_MAX, PAYLOAD_BYTES};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{MigrationFault, StreamTransport};
use crate::addr::{PAGE_SIZE, PageRange, RamAddr};
use crate::address_space::{GuestLayout, Strategy};
use crate::guest::{CarriedReadiness, Labels};
use crate::memory::Secret;
use crate::pages::PageSet;
use crate::transport::Link;

/// Versions of this protocol that this build speaks, oldest first.
///
/// The newest that both ends speak is used, and is bound into the helpers' transcript. Version 1 had shared
/// pages on the streams and every stream inside TLS; version 2 said nothing of boot files, labels and the
/// time of definition, and knew no COMMITTING; version 3 had the source's own types in PREPARE, of which an
/// older destination lost what it did not know, and a transcript without them; version 4 had records of one
/// page each, no suites, a transcript without PREPARED, and nonces alone, so that keys came from the guest's
/// secret and what anybody on the way could read. They are not spoken any more.
/// Version 6 has the audit after START and evidence of the destination; with a host that speaks version 5
/// there is neither.
pub const PROTOCOL_VERSIONS: [u32; 2] = [5, 6];
/// The version that brought audits.
pub const AUDITS_SINCE: u32 = 6;
/// The version that brought evidence of the destination.
pub const EVIDENCE_SINCE: u32 = 6;
/// Longest control message: a layout of 32,768 blocks fits.
pub const MESSAGE_MAX: u32 = 16 << 20;
/// Longest data frame: a full batch with its header.
pub const DATA_MAX: u32 = (PAYLOAD_BYTES + DATA_HEADER_BYTES) as u32;
/// Longest state: QEMU's is a few hundred KiB.
pub const STATE_MAX: u32 = 80 << 20;
/// Longest message that says why a peer gives up; it may come in place of any other, however short that would
/// be.
pub const REASON_MAX: u32 = 64 << 10;
/// Bytes before a data frame's records: epoch, count.
pub const DATA_HEADER_BYTES: usize = 8;
/// Bytes of a shared page in a data frame: its number, its content.
pub const SHARED_PAGE_BYTES: usize = 8 + 4096;

/// What a frame is.
pub mod kind {
    /// First message of every link, JSON.
    pub const HELLO: u8 = 1;
    /// Its answer, JSON.
    pub const HELLO_ACK: u8 = 2;
    /// What is coming, JSON.
    pub const PREPARE: u8 = 3;
    /// The destination is ready, JSON.
    pub const PREPARED: u8 = 4;
    /// No, and why, JSON. Legal as an answer to anything.
    pub const REFUSED: u8 = 5;
    /// Sealed pages: data header, one group.
    pub const RECORDS: u8 = 6;
    /// Pages that the guest shares: data header, numbered pages. On the control link alone.
    pub const SHARED: u8 = 7;
    /// A stream has sent all of its epoch.
    pub const EPOCH_END: u8 = 8;
    /// An epoch begins: its number.
    pub const EPOCH_BEGIN: u8 = 9;
    /// The helper's token for the epoch.
    pub const EPOCH_TOKEN: u8 = 10;
    /// The epoch is complete at the destination.
    pub const EPOCH_ACK: u8 = 11;
    /// vCPU and device state: length of the JSON part, JSON, console, machine.
    pub const STATE: u8 = 12;
    /// The helper's START token.
    pub const START: u8 = 13;
    /// The guest is the destination's: COMMIT token, JSON.
    pub const COMMITTED: u8 = 14;
    /// It never will: ABORT token, JSON.
    pub const ABORTED: u8 = 15;
    /// What became of a session, JSON.
    pub const OUTCOME: u8 = 16;
    /// What the host can do, JSON.
    pub const ABILITIES: u8 = 17;
    /// COMMIT is minted, and the destination's store does not take it yet; COMMITTED follows when it does.
    /// Said again and again, so that the source knows that somebody is there. Why, JSON.
    pub const COMMITTING: u8 = 18;
    /// After START: digests of pages, sealed: one group.
    pub const DIGESTS: u8 = 23;
    /// There are no more digests, or none any more, JSON.
    pub const DIGESTS_END: u8 = 24;
    /// What the audit found, JSON. Instead of more digests also where the destination ends it.
    pub const AUDITED: u8 = 25;
    /// Where guests are, JSON: a [`Holding`](super::Holding) for each that was asked for.
    pub const FOUND: u8 = 22;
    /// What would come, JSON: as [`PREPARE`], without secrets.
    pub const CHECK: u8 = 20;
    /// What speaks against it, JSON.
    pub const CHECKED: u8 = 21;
}

/// First message of a link. What a later version adds to it is not looked at: it comes before a version is
/// agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions that the caller speaks.
    pub protocol_versions: Vec<u32>,
    /// The caller's name, for people.
    pub host: String,
    /// What the link is for.
    pub purpose: Purpose,
}

/// What a link is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Purpose {
    /// Control of a new migration.
    Migrate {},
    /// A stream of a migration that is prepared.
    Stream {
        /// The migration.
        session: Uuid,
        /// Which stream.
        index: u16,
    },
    /// What became of a migration.
    Resolve {
        /// The migration.
        session: Uuid,
    },
    /// Whether the host has these guests, at most [`FIND_MAX`]. A build that does not know the question ends
    /// the link.
    Find {
        /// Their ids.
        guests: Vec<Uuid>,
    },
    /// What the host can do. A build that does not know the question ends the link.
    Ask {},
    /// Whether a migration would be let in. A build that does not know the question ends the link.
    Check {},
    /// Something that this build does not know. Refused with code `purpose_unknown`.
    #[serde(other)]
    Unknown,
}

/// Guests that one question names at most.
pub const FIND_MAX: usize = 200;

/// Whether a host has a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holding {
    /// It has it, or had it last.
    Here,
    /// It does not know yet.
    Undecided,
    /// It does not have it, and was not the last to have it as far as it knows, or sent it to the host that
    /// asks.
    NotHere,
    /// It sent it to a third host.
    WentTo {
        /// That host's identity; empty where it cannot be told any more.
        identity: String,
    },
}

/// What a host says that it can do, as far as it matters to a host that would send it a guest. What a later
/// build says beyond this is not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// Drivers that work there.
    pub drivers: Vec<String>,
    /// Strategies that its build executes.
    pub strategies: Vec<String>,
    /// Oldest and newest ABI of helpers that it runs.
    pub helper_abi: (u32, u32),
    /// SHA-256 of its built-in helper image.
    pub helper_measurement: [u8; 32],
    /// Suites that this image has.
    pub suites: Vec<String>,
    /// Versions of this protocol that it speaks.
    pub protocol_versions: Vec<u32>,
    /// Physical address bits of its guests.
    pub max_phys_bits: u8,
    /// Position of its C-bit; `None` without SEV.
    pub c_bit: Option<u8>,
    /// Physical address bits lost to memory encryption.
    pub phys_bit_reduction: u8,
    /// Memory slots that one VM may have.
    pub slot_budget: u32,
    /// Codes of what it lacks.
    pub missing: Vec<String>,
}

/// Longest message with [`Abilities`].
pub const ABILITIES_MAX: u32 = 16 << 10;

impl Abilities {
    /// Reads a peer's word; what it says is bounded and printable then, and nothing more.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(payload: &[u8]) -> Result<Self, MigrationFault> {
        let said: Self = parse(payload)?;
        let name = |n: &String| {
            let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
            (1..=64).contains(&n.len()) && n.bytes().all(legal)
        };
        let names = [&said.drivers, &said.strategies, &said.suites, &said.missing];
        if names.iter().any(|list| list.len() > 32 || !list.iter().all(name))
            || said.protocol_versions.len() > 32
            || said.helper_abi.0 > said.helper_abi.1
            || said.max_phys_bits > 64
            || said.c_bit.is_some_and(|c| c > 63)
            || said.phys_bit_reduction > 64
        {
            return Err(MigrationFault::Protocol("abilities that cannot be"));
        }
        Ok(said)
    }
}

/// Answer to [`Hello`]. What a later version adds to it is not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// The version that both use.
    pub protocol: u32,
    /// Versions that the answerer speaks, from version 5 on. Said so that both ends bind them: what somebody
    /// took out of either list then shows.
    pub protocol_versions: Option<Vec<u32>>,
    /// The answerer's name.
    pub host: String,
}

/// What is coming.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    /// The migration's id, and the helpers' session.
    #[zeroize(skip)]
    pub session: Uuid,
    /// The guest's id.
    #[zeroize(skip)]
    pub guest: Uuid,
    /// What it is: a document of its host, which the destination's host reads and nobody between. Its digest
    /// goes into the transcript.
    #[zeroize(skip)]
    pub definition: String,
    /// Its RAM.
    #[zeroize(skip)]
    pub layout: GuestLayout,
    /// Layout of the mirrors.
    #[zeroize(skip)]
    pub strategy: Strategy,
    /// Streams.
    pub streams: u16,
    /// How they cross.
    #[zeroize(skip)]
    pub stream_transport: StreamTransport,
    /// By what the helpers seal: one of the suites below. A name, because a later build may have others.
    #[zeroize(skip)]
    pub suite: String,
    /// Suites that the source's helper has.
    #[zeroize(skip)]
    pub suites: Vec<String>,
    /// Key of the mask over what their groups begin with; see `records`.
    #[zeroize(skip)]
    pub mask: Secret<32>,
    /// The source helper's image, which the destination's must equal.
    pub helper_measurement: [u8; 32],
    /// The source helper's nonce.
    pub nonce: [u8; 32],
    /// The source helper's ephemeral public key.
    pub public_key: [u8; 32],
    /// The guest's migration secret. At protection level `none` the hosts hold it; it travels under TLS.
    #[zeroize(skip)]
    pub secret: Secret<32>,
    /// What the guest says of being migrated, and what its helper declared.
    #[zeroize(skip)]
    pub readiness: CarriedReadiness,
    /// Whether the guest is paused at the source and stays so at the destination.
    pub paused: bool,
    /// Whether zero pages travel as such.
    pub elide_zero: bool,
    /// Whether to digest every page at the pause point.
    pub verify: bool,
    /// Longest silence, milliseconds.
    pub stall_timeout_ms: u64,
    /// Whether an audit follows START, and when; absent before version 6.
    #[zeroize(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditWish>,
}

/// When an audit takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditWish {
    /// When the guest runs at the destination.
    After,
    /// Before COMMIT: without a verdict that nothing differs there is none.
    BeforeCommit,
}

/// The end of the source's digests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DigestsEnd {
    /// Why they are not complete: a name of [`NotRun`](super::NotRun); null: they are.
    pub why: Option<String>,
}

/// What an audit found, as its destination knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audited {
    /// Pages that were compared.
    pub compared: u64,
    /// Pages that were left out.
    pub left_out: u64,
    /// Pages that differ.
    pub differing: u64,
    /// The first of them, by their numbers in RAM.
    pub first: Vec<u64>,
    /// Why there is no verdict: a name of [`NotRun`](super::NotRun); null: there is one.
    pub why: Option<String>,
}

/// Longest message about an audit.
pub const AUDITED_MAX: u32 = 4096;

/// The destination is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepared {
    /// The destination helper's nonce.
    pub nonce: [u8; 32],
    /// The destination helper's ephemeral public key.
    pub public_key: [u8; 32],
    /// Suites that the destination's helper has. Nobody chooses by them any more; they are in the transcript.
    pub suites: Vec<String>,
    /// What shows the source's helper where its pages would go; absent before version 6, and where the guest
    /// is not encrypted or its platform attests to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// Evidence of a destination, as the firmware encodes it. Its host hands it on; only the source's helper
/// judges it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// The attestation report about the guest that waits for pages.
    pub report: Vec<u8>,
    /// The certificate of the PEK that signed it.
    pub certificate: Vec<u8>,
}

impl std::fmt::Debug for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Evidence({} and {} bytes)", self.report.len(), self.certificate.len())
    }
}

impl Evidence {
    /// As a helper takes it.
    ///
    /// # Errors
    /// Parts of a length that they never have.
    pub fn bytes(&self) -> Result<Box<[u8; EVIDENCE_BYTES]>, MigrationFault> {
        if self.report.len() != REPORT_BYTES {
            return Err(MigrationFault::Protocol("an attestation report of another length"));
        }
        let both = [&self.report[..], &self.certificate].concat().into_boxed_slice();
        both.try_into().map_err(|_| MigrationFault::Protocol("a platform's certificate of another length"))
    }
}

/// Longest answer to PREPARE.
pub const PREPARED_MAX: u32 = 64 << 10;

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Stable code. Another build may have some that this one does not know.
    pub code: AnyCode,
    /// A sentence.
    pub detail: String,
}

/// Everything that speaks against a migration, by its destination's word; nothing: it would be let in now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// Each reason by itself. PREPARE would be refused with the first one's code.
    pub against: Vec<Refused>,
}

/// Longest message with a [`Verdict`].
pub const VERDICT_MAX: u32 = 64 << 10;
/// Reasons of a verdict that are listened to.
const REASONS_MAX: usize = 64;

impl Verdict {
    /// Reads a peer's word; what it says is bounded and printable then, and nothing more.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(payload: &[u8]) -> Result<Self, MigrationFault> {
        let said: Self = parse(payload)?;
        Ok(Self { against: said.against.into_iter().take(REASONS_MAX).map(Refused::bounded).collect() })
    }
}

/// The JSON part of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateHead {
    /// Offset after the console's newest byte.
    pub console_end: u64,
    /// Bytes of console that follow.
    pub console_bytes: u32,
    /// Bytes of machine state that follow the console.
    pub machine_bytes: u32,
    /// Runs of pages that the guest shares: first page, pages.
    pub shared: Vec<(u64, u64)>,
    /// The guest's labels as they are now. They do not change any more before the migration's end.
    pub labels: Labels,
}

impl StateHead {
    /// The three parts of a state message: head, console, machine.
    ///
    /// # Errors
    /// When it is none, or its parts do not fill it.
    pub fn split(payload: &[u8]) -> Result<(Self, &[u8], &[u8]), MigrationFault> {
        let short = MigrationFault::Protocol("a state message of another length");
        let Some((len, rest)) = payload.split_first_chunk::<4>() else { return Err(short) };
        let len = u32::from_le_bytes(*len) as usize;
        if len > rest.len() {
            return Err(short);
        }
        let (head, rest) = rest.split_at(len);
        let head: Self = parse(head)?;
        let (console, machine) = (head.console_bytes as usize, head.machine_bytes as usize);
        if console.checked_add(machine) != Some(rest.len()) {
            return Err(short);
        }
        let (console, machine) = rest.split_at(console);
        Ok((head, console, machine))
    }

    /// The pages that the guest shares, of a guest whose RAM ends at `ram_end`.
    ///
    /// # Errors
    /// When a run is empty, wraps, or leaves RAM.
    pub fn shared_pages(&self, ram_end: RamAddr) -> Result<PageSet, MigrationFault> {
        let mut shared = PageSet::new();
        for (first, count) in &self.shared {
            let range = first
                .checked_mul(PAGE_SIZE)
                .zip(count.checked_mul(PAGE_SIZE))
                .and_then(|(at, len)| PageRange::new(at, len).ok())
                .filter(|r| r.end() <= ram_end.get());
            shared.insert_range(range.ok_or(MigrationFault::Protocol("shared pages outside RAM"))?);
        }
        Ok(shared)
    }
}

/// How the import ended: a token and what went with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settled {
    /// COMMIT or ABORT token.
    pub token: Vec<u8>,
    /// Microseconds of the pause that went into digests.
    pub verify_us: u64,
    /// Why, for ABORT.
    pub reason: Option<Refused>,
}

/// What became of a session, as its destination knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// Still going on; ask again.
    Pending {},
    /// The guest runs, or ran, there.
    Committed {
        /// COMMIT token.
        token: Vec<u8>,
    },
    /// It never will.
    Aborted {
        /// ABORT token.
        token: Vec<u8>,
    },
    /// By the destination's journal COMMIT was never minted, and the import is gone with its keys. A
    /// statement of the host, not of the helper: good enough where hosts are trusted (level `none`), and only
    /// there.
    NeverCommitted {},
}

/// Sends a JSON message.
///
/// # Errors
/// The link's.
pub fn send<T: Serialize>(link: &mut Link, kind: u8, message: &T) -> Result<(), MigrationFault> {
    Ok(link.send(kind, &written(message)?)?)
}

/// Counts what is written.
struct Counter(usize);

impl std::io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A JSON message's bytes, which are wiped when they go.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn written<T: Serialize>(message: &T) -> Result<Zeroizing<Vec<u8>>, MigrationFault> {
    let unsendable = |_| MigrationFault::Protocol("unsendable message");
    // Room for all of it at once: growing would leave copies of a secret behind that nobody wipes.
    let mut length = Counter(0);
    serde_json::to_writer(&mut length, message).map_err(unsendable)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(length.0));
    serde_json::to_writer(&mut *bytes, message).map_err(unsendable)?;
    Ok(bytes)
}

/// Waits for one of `kinds` of at most `max` bytes (or a refusal, which becomes an error) and gives kind and
/// payload, which is wiped when it goes.
///
/// # Errors
/// The link's, a refusal, an early end, another kind, or more bytes.
pub fn expect(link: &mut Link, kinds: &[u8], max: u32) -> Result<(u8, Zeroizing<Vec<u8>>), MigrationFault> {
    let mut payload = Zeroizing::default();
    let kind = link.recv_into(max.max(REASON_MAX), &mut payload)?.ok_or(MigrationFault::PeerGone)?;
    if kind == kind::REFUSED {
        let refused: Refused = parse(&payload)?;
        return Err(refused.into());
    }
    if kind == kind::ABORTED && !kinds.contains(&kind) {
        let settled: Settled = parse(&payload)?;
        return Err(settled.reason.map_or(MigrationFault::PeerGone, MigrationFault::from));
    }
    if !kinds.contains(&kind) {
        return Err(MigrationFault::Protocol("a message that does not belong here"));
    }
    if payload.len() > max as usize {
        return Err(MigrationFault::Protocol("a message that is too long"));
    }
    Ok((kind, payload))
}

/// Reads a JSON message.
///
/// # Errors
/// When it is none.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, MigrationFault> {
    serde_json::from_slice(payload).map_err(|error| {
        tracing::debug!(%error, "a peer's message cannot be read");
        MigrationFault::Protocol("a message that cannot be read")
    })
}

impl Refused {
    /// A peer's text is shown to people: bounded, printable.
    fn bounded(self) -> Self {
        let detail = self.detail.chars().filter(|c| !c.is_control()).take(300).collect();
        Self { code: self.code.bounded(), detail }
    }
}

impl From<Refused> for MigrationFault {
    fn from(refused: Refused) -> Self {
        let Refused { code, detail } = refused.bounded();
        Self::PeerRefused { code, detail }
    }
}

/// A data frame's header.
pub fn data_header(epoch: u32, count: u32) -> [u8; DATA_HEADER_BYTES] {
    let mut b = [0; DATA_HEADER_BYTES];
    b[..4].copy_from_slice(&epoch.to_le_bytes());
    b[4..].copy_from_slice(&count.to_le_bytes());
    b
}

/// A data frame by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFrame {
    /// The epoch that it belongs to.
    pub epoch: u32,
    /// Records, or shared pages: 1 to [`BATCH_MAX`].
    pub count: u32,
    /// Bytes that follow the header, at most [`PAYLOAD_BYTES`].
    pub bytes: usize,
}

impl DataFrame {
    /// Reads the header of a frame of `len` bytes, header included, that comes while `epoch` is received.
    ///
    /// # Errors
    /// Another epoch, a count or a length that no frame has.
    pub fn read(raw: &[u8; DATA_HEADER_BYTES], len: u32, epoch: u32) -> Result<Self, MigrationFault> {
        const IMPOSSIBLE: MigrationFault = MigrationFault::Protocol("a data frame with an impossible header");
        let [e0, e1, e2, e3, c0, c1, c2, c3] = *raw;
        let (theirs, count) = (u32::from_le_bytes([e0, e1, e2, e3]), u32::from_le_bytes([c0, c1, c2, c3]));
        let bytes = (len as usize).checked_sub(raw.len()).ok_or(IMPOSSIBLE)?;
        if theirs != epoch || count == 0 || count as usize > BATCH_MAX || bytes > PAYLOAD_BYTES {
            return Err(IMPOSSIBLE);
        }
        Ok(Self { epoch, count, bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that JSON and names are made of.
    const LIKELY: &[u8] = b"0123456789az-_\"[]{},:";

    fn name() -> impl proptest::strategy::Strategy<Value = String> {
        prop_oneof!["[a-z0-9_-]{60,70}", "\\PC{0,80}", Just(String::new())]
    }

    /// Lists of names, mostly legal: each of a message's limits is to be what decides often enough.
    fn names() -> impl proptest::strategy::Strategy<Value = Vec<String>> {
        prop_oneof![
            12 => proptest::collection::vec("[a-z0-9_-]{1,64}", 0..8),
            1 => proptest::collection::vec("[a-z]{1,3}", 31..35),
            1 => proptest::collection::vec(name(), 1..4),
        ]
    }

    #[test]
    fn evidence_is_of_its_length_and_an_answer_without_any_is_one_of_version_5() {
        let lengths = |report, certificate| {
            Evidence { report: vec![1; report], certificate: vec![2; certificate] }.bytes().is_ok()
        };
        assert!(lengths(208, 2084));
        for (report, certificate) in [(0, 0), (207, 2085), (208, 2083), (208, 2085), (209, 2083)] {
            assert!(!lengths(report, certificate), "{report}, {certificate}");
        }
        let bare = Prepared { nonce: [1; 32], public_key: [2; 32], suites: vec![], evidence: None };
        let text = String::from_utf8(written(&bare).unwrap().to_vec()).unwrap();
        assert!(!text.contains("evidence"), "{text}");
        assert_eq!(parse::<Prepared>(text.as_bytes()).unwrap(), bare);
        let shown = Evidence { report: vec![255; 208], certificate: vec![255; 2084] };
        let whole = written(&Prepared { evidence: Some(shown), ..bare }).unwrap();
        assert!(whole.len() < PREPARED_MAX as usize);
    }

    #[test]
    fn names_are_taken_up_to_their_limit() {
        let named = |bytes: usize| {
            let said = Abilities {
                drivers: vec!["d".repeat(bytes)],
                strategies: vec![],
                helper_abi: (3, 3),
                helper_measurement: [1; 32],
                suites: vec![],
                protocol_versions: vec![3],
                max_phys_bits: 48,
                c_bit: None,
                phys_bit_reduction: 0,
                slot_budget: 1,
                missing: vec![],
            };
            Abilities::read(&serde_json::to_vec(&said).unwrap()).is_ok()
        };
        assert_eq!([0, 1, 64, 65].map(named), [false, true, true, false]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_abilities_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Abilities::read(&bytes).is_err());
        }

        /// Near misses reach behind the JSON parser, where bytes without a plan do not come.
        #[test]
        fn a_message_that_was_tampered_with_is_abilities_within_bounds_or_refused(
            cut in any::<proptest::sample::Index>(),
            edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), 0u8..3), 0..6),
            truncate in proptest::bool::weighted(0.2),
        ) {
            let mut bytes = serde_json::to_vec(&Abilities {
                drivers: vec!["embedded".into(), "qemu".into()], strategies: vec!["shifted".into()], helper_abi: (3, 4),
                helper_measurement: [7; 32], suites: vec!["aes-256-gcm".into()], protocol_versions: vec![3], max_phys_bits: 48, c_bit: Some(47),
                phys_bit_reduction: 1, slot_budget: 509, missing: vec!["sev-snp".into()],
            }).unwrap();
            for (at, byte, how) in edits {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = byte,
                    // Keeps more of them readable.
                    1 => bytes[at] = LIKELY[usize::from(byte) % LIKELY.len()],
                    _ => bytes.insert(at, b'0' + byte % 10),
                }
            }
            if truncate {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(read) = Abilities::read(&bytes) {
                prop_assert!(read.helper_abi.0 <= read.helper_abi.1);
                prop_assert!(read.max_phys_bits <= 64 && read.c_bit.is_none_or(|c| c < 64));
                prop_assert!(read.phys_bit_reduction <= 64);
                for name in [&read.drivers, &read.strategies, &read.suites, &read.missing].into_iter().flatten() {
                    prop_assert!(!name.is_empty() && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_graphic()));
                }
            }
        }

        #[test]
        fn abilities_that_are_taken_are_within_bounds(
            drivers in names(),
            strategies in names(),
            suites in names(),
            missing in names(),
            helper_abi in (0u32..6, 0u32..6),
            max_phys_bits in 0u8..80,
            c_bit in proptest::option::of(0u8..80),
            phys_bit_reduction in 0u8..80,
            protocol_versions in proptest::collection::vec(any::<u32>(), 0..36),
        ) {
            let said = Abilities {
                drivers, strategies, suites, missing, helper_abi, max_phys_bits, c_bit, phys_bit_reduction, protocol_versions,
                helper_measurement: [1; 32], slot_budget: 1,
            };
            let legal = |n: &String| {
                (1..=64).contains(&n.len())
                    && n.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_'))
            };
            let within = [&said.drivers, &said.strategies, &said.suites, &said.missing]
                .iter()
                .all(|list| list.len() <= 32 && list.iter().all(legal))
                && said.protocol_versions.len() <= 32
                && helper_abi.0 <= helper_abi.1
                && max_phys_bits <= 64
                && c_bit.is_none_or(|c| c < 64)
                && phys_bit_reduction <= 64;
            let read = Abilities::read(&serde_json::to_vec(&said).unwrap());
            prop_assert_eq!(read.ok(), within.then_some(said));
        }
    }
}
