//! Sealed batches on the wire: exports and imports through mirrors.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mirrorvm::address_space::Addressing;
use mirrorvm::host::{ExportSpec, GuestState, ImportReport, ImportStep, SealedBatch, bounds};
use mirrorvm::mirror::{GREETING_BYTES, Greeting};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::Preview;
use super::decode::{Decode, Errors, Fields, Node, one_of};
use crate::problem::MAX_SAFE_INTEGER;

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RamRange {
    /// RAM address of the first byte: a multiple of 4096.
    #[schema(example = 1048576, multiple_of = 4096, maximum = 9007199254740991u64)]
    pub ram_addr: u64,
    /// Length in bytes: a multiple of 4096.
    #[schema(example = 65536, multiple_of = 4096, minimum = 4096, maximum = 1048576)]
    pub size_bytes: u64,
}

impl Decode for RamRange {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let ram_addr = f.int("ram_addr", 0..=MAX_SAFE_INTEGER);
        let size_bytes = f.int("size_bytes", bounds::BATCH_RANGE_BYTES);
        f.done()?;
        Some(Self { ram_addr: ram_addr?, size_bytes: size_bytes? })
    }
}

/// Which pages to seal, and for which import.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MirrorExportCreate)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "import": "01941f29-7c00-7000-8000-000000000001",
    "nonce": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\
              8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    "ranges": [{"ram_addr": 1048576, "size_bytes": 65536}]
}))]
pub struct ExportBody {
    /// Id of the import, as `POST …/imports` of the importing mirror gave it.
    pub import: Uuid,
    /// The nonce that the import answered with: 128 hexadecimal digits.
    pub nonce: String,
    /// Which RAM to seal: separate ranges of at most 1 MiB together. An empty list only ends the session.
    #[schema(max_items = 256)]
    pub ranges: Vec<RamRange>,
    /// Whether this is the last batch of the session.
    #[serde(default)]
    #[schema(default = true)]
    pub last: bool,
}

impl Decode for ExportBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let import = f.required("import");
        let nonce: Option<Hex<GREETING_BYTES>> = f.required("nonce");
        let ranges: Option<Vec<RamRange>> = f.required("ranges");
        let last = f.or("last", true);
        f.done()?;
        Some(Self { import: import?, nonce: hex(&nonce?.0), ranges: ranges?, last: last? })
    }
}

impl From<ExportBody> for ExportSpec {
    fn from(body: ExportBody) -> Self {
        Self {
            import: body.import,
            importer: unhex(&body.nonce).map_or_else(Greeting::default, |b| Greeting::decode(&b)),
            ranges: body.ranges.iter().map(|r| (r.ram_addr, r.size_bytes)).collect(),
            last: body.last,
        }
    }
}

/// Pages of RAM, sealed by a helper for one import. The batch opens in that import only, only once, and only
/// after the batches before it.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = SealedBatch)]
#[serde(deny_unknown_fields)]
pub struct BatchBody {
    /// Id of the import that the batch is sealed for.
    pub import: Uuid,
    /// Number of the batch within its import, from 1.
    #[schema(minimum = 1, maximum = 4294967295u64)]
    pub epoch: u32,
    /// The exporting helper's nonce and its ephemeral public key: 128 hexadecimal digits, to be handed on as
    /// they are.
    #[schema(example = "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752\
                   de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")]
    pub nonce: String,
    /// Which addresses its records use: `ram_addr` or `gpa`, by the exporting mirror's strategy.
    pub addressing: AddressingBody,
    /// Number of pages in the batch.
    #[schema(minimum = 0, maximum = 256, example = 1)]
    pub pages: u32,
    /// Sealed records, one for each page, in base64.
    #[schema(format = "byte", max_length = 1419264, example = "AAAQAAAAAAABAAAAAAAAAA==")]
    pub records: String,
    /// The exporting helper's token, in base64. It proves that no record is missing and none was added.
    #[schema(format = "byte", max_length = 256, example = "AQAAAAAAAABTVEFSVA==")]
    pub token: String,
    /// Whether the batch is the last of its session.
    pub last: bool,
    /// State of the guest during the export. The pages of a `paused` guest are all from one moment; those of
    /// a `running` guest are each as they were when they were read.
    #[schema(example = "paused")]
    pub guest_state: String,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, read_only)]
    pub preview: Option<Preview>,
}

/// The addresses that sealed records use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = PageAddressing)]
#[serde(rename_all = "snake_case")]
pub enum AddressingBody {
    /// The place of the page in the guest's RAM.
    RamAddr,
    /// The address at which the guest sees the page.
    Gpa,
}

impl Decode for AddressingBody {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("ram_addr", Self::RamAddr), ("gpa", Self::Gpa)])
    }
}

impl From<SealedBatch> for BatchBody {
    fn from(batch: SealedBatch) -> Self {
        Self {
            import: batch.import,
            epoch: batch.epoch,
            nonce: hex(&batch.exporter.encode()),
            addressing: match batch.addressing {
                Addressing::RamAddr => AddressingBody::RamAddr,
                Addressing::Gpa => AddressingBody::Gpa,
            },
            pages: batch.pages,
            records: STANDARD.encode(&batch.records),
            token: STANDARD.encode(batch.token),
            last: batch.last,
            guest_state: batch.guest_state.name().to_owned(),
            preview: None,
        }
    }
}

/// A batch as it arrived, decoded.
struct Batch(SealedBatch);

impl Decode for Batch {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let import = f.required("import");
        let epoch = f.int("epoch", 1..=u64::from(u32::MAX));
        let nonce: Option<Hex<GREETING_BYTES>> = f.required("nonce");
        let addressing = f.required("addressing");
        let pages = f.int("pages", bounds::BATCH_PAGES);
        let records: Option<Base64> = f.required("records");
        let token: Option<Base64> = f.required("token");
        let last = f.required("last");
        // What the exporting end noted for people.
        let _: Option<String> = f.required("guest_state");
        f.done()?;
        // Another length is no token; the helper says so.
        let mut sealed = [0; mirrorvm::mirror::TOKEN_BYTES];
        if let Ok(token) = <[u8; mirrorvm::mirror::TOKEN_BYTES]>::try_from(token?.0) {
            sealed = token;
        }
        Some(Self(SealedBatch {
            import: import?,
            epoch: epoch?,
            exporter: Greeting::decode(&nonce?.0),
            addressing: match addressing? {
                AddressingBody::RamAddr => Addressing::RamAddr,
                AddressingBody::Gpa => Addressing::Gpa,
            },
            pages: pages?,
            records: records?.0,
            token: sealed,
            last: last?,
            guest_state: GuestState::Paused,
        }))
    }
}

/// One step of an import.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = MirrorImportCreate, example = json!({"kind": "open"}))]
#[serde(tag = "kind", rename_all = "snake_case")]
#[expect(
    clippy::large_enum_variant,
    reason = "documents a union that `ImportRequest` decodes; none is ever made"
)]
pub enum ImportBody {
    /// Opens an import: the helper draws a nonce and an ephemeral key for the exporter.
    #[schema(title = "ImportOpen")]
    Open {},
    /// Opens a sealed batch and writes its pages.
    #[schema(title = "ImportBatch")]
    Batch {
        /// The batch, as `POST …/exports` gave it.
        batch: BatchBody,
    },
    /// Gives the import up.
    #[schema(title = "ImportClose")]
    Close {
        /// Id of the import.
        import: Uuid,
    },
}

/// One step of an import, decoded.
#[derive(Clone, Debug)]
pub struct ImportRequest(pub ImportStep);

impl Decode for ImportRequest {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        Some(Self(match f.kind(&["open", "batch", "close"])? {
            "open" => {
                f.done()?;
                ImportStep::Open
            }
            "batch" => {
                let batch: Option<Batch> = f.required("batch");
                f.done()?;
                ImportStep::Batch(Box::new(batch?.0))
            }
            _ => {
                let import = f.required("import");
                f.done()?;
                ImportStep::Close(import?)
            }
        }))
    }
}

/// Where an import stands.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MirrorImport {
    /// Id of the import.
    pub import: Uuid,
    /// `open` (no batch has arrived yet), `receiving`, or `closed`. A closed import takes no more batches.
    #[schema(example = "open")]
    pub state: &'static str,
    /// The importing helper's nonce and its ephemeral public key, to be given to exporters as they are: 128
    /// hexadecimal digits. Null once batches have arrived.
    pub nonce: Option<String>,
    /// What became of the pages of this batch, as runs by RAM address.
    pub pages: Vec<ImportedRange>,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// A run of pages of a batch.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ImportedRange {
    /// RAM address of the first byte.
    #[schema(example = 1048576)]
    pub ram_addr: u64,
    /// Length in bytes.
    #[schema(example = 65536)]
    pub size_bytes: u64,
    /// Always `written`. A batch that is refused is answered with `batch_refused` instead, which says which
    /// page failed and how many pages had been written.
    #[schema(example = "written")]
    pub status: &'static str,
}

impl From<ImportReport> for MirrorImport {
    fn from(report: ImportReport) -> Self {
        let run = |(ram_addr, size_bytes)| ImportedRange { ram_addr, size_bytes, status: "written" };
        Self {
            import: report.import,
            state: report.state,
            nonce: report.importer.map(|greeting| hex(&greeting.encode())),
            pages: report.written.into_iter().map(run).collect(),
            preview: None,
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
struct Hex<const N: usize>([u8; N]);

impl<const N: usize> Decode for Hex<N> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let bytes = unhex(&text);
        if bytes.is_none() {
            node.invalid(errors, "this is not as many hex digits as it should be");
        }
        bytes.map(Self)
    }
}

/// Bytes in base64, with padding.
pub(super) struct Base64(pub Vec<u8>);

impl Decode for Base64 {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let bytes = STANDARD.decode(text).ok();
        if bytes.is_none() {
            node.invalid(errors, "this is not base64 with padding (RFC 4648, section 4)");
        }
        bytes.map(Self)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}
