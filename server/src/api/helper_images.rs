//! Helper images on the wire.

use jiff::Timestamp;
use mirrorvm::host::{BUILT_IN_ID, ImageFacts, ImageRecord};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node};
use super::{Fault, Preview, sha256_text};

/// A new helper image, still without content: that follows with `PUT …/content`.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "helper-2"}))]
pub struct HelperImageCreate {
    /// Name of the image, unique among helper images. It must not look like a UUID.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", example = "helper-2")]
    pub name: String,
}

impl Decode for HelperImageCreate {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut f = Fields::open(node, errors)?;
        let name = f.required("name");
        f.done()?;
        Some(Self { name: name? })
    }
}

/// A migration helper that mirrors can run.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImage {
    /// Id, a UUIDv7. The built-in image has the same id on every host.
    pub id: Uuid,
    /// Name of the image, unique among helper images.
    #[schema(example = "built-in")]
    pub name: String,
    /// Whether this is the image that the daemon was built with, which mirrors run unless they are told
    /// otherwise.
    pub built_in: bool,
    /// `empty` until the content is uploaded, then `ready`; `failed` while its file does not hold what was
    /// uploaded.
    #[schema(example = "ready")]
    pub state: &'static str,
    /// Rises with every change. The `ETag` header has it in quotes.
    #[schema(example = 1)]
    pub generation: u64,
    /// What the content says about itself. Null while the image is empty.
    pub content: Option<HelperImageContent>,
    /// Why the image cannot be used. Uploading the same content again puts it right.
    pub error: Option<Fault>,
    /// When the image was made. For the built-in image: the beginning of 1970.
    #[serde(serialize_with = "super::time::to_ms")]
    pub created_at: Timestamp,
    /// Only in the answer to a `dry_run`: what else the request would have led to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What the content of a helper image says about itself.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImageContent {
    /// Size of the file in bytes.
    #[schema(example = 65536)]
    pub size_bytes: u64,
    /// SHA-256 of the file, which is the image's measurement.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub measurement: String,
    /// Oldest helper ABI version that it speaks.
    #[schema(example = 1)]
    pub abi_min: u32,
    /// Newest helper ABI version that it speaks.
    #[schema(example = 1)]
    pub abi_max: u32,
}

impl From<ImageFacts> for HelperImageContent {
    fn from(f: ImageFacts) -> Self {
        Self {
            size_bytes: f.size_bytes,
            measurement: sha256_text(&f.measurement),
            abi_min: f.abi_min,
            abi_max: f.abi_max,
        }
    }
}

impl From<ImageRecord> for HelperImage {
    fn from(r: ImageRecord) -> Self {
        Self {
            id: r.id,
            name: r.name,
            built_in: r.id == BUILT_IN_ID,
            state: match (&r.content, r.fault) {
                (None, _) => "empty",
                (Some(_), None) => "ready",
                (Some(_), Some(_)) => "failed",
            },
            generation: r.generation,
            content: r.content.map(HelperImageContent::from),
            error: r.fault.map(|fault| Fault::new(fault.code().into(), fault.to_string())),
            created_at: r.created_at,
            preview: None,
        }
    }
}

/// One page of a list of helper images.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImageList {
    /// Images, in the order in which they were made unless asked for otherwise.
    pub items: Vec<HelperImage>,
    /// Send it as `page_token` for the next page. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
    /// Follow `/v1/events` after it to learn what changes from here on: everything before it is in the list
    /// already. Of a list in several pages, that of the first counts.
    #[schema(example = "8f1c0a7d5be2460c-42")]
    pub events_cursor: String,
}
