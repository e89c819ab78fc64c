//! Helper images on the wire.

use jiff::Timestamp;
use mirrorvm::host::{BUILT_IN_ID, ImageFacts, ImageRecord};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::decode::{Decode, Errors, Fields, Node};
use super::{Fault, Preview, sha256_text};

/// What a helper image is to be called; its content follows with `PUT …/content`.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "helper-2"}))]
pub struct HelperImageCreate {
    /// Name, unique among helper images; not shaped like a UUID.
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

/// A helper image.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImage {
    /// UUIDv7; the built-in image has the same id everywhere.
    pub id: Uuid,
    /// Name, unique among helper images.
    #[schema(example = "built-in")]
    pub name: String,
    /// Whether it belongs to this build of the daemon: the one that mirrors run.
    pub built_in: bool,
    /// `empty` until it has its content, then `ready`; `failed` while its file is not what was uploaded.
    #[schema(example = "ready")]
    pub state: &'static str,
    /// Goes up with every change; the ETag in quotes.
    #[schema(example = 1)]
    pub generation: u64,
    /// What its content says of itself; null while it is empty.
    pub content: Option<HelperImageContent>,
    /// Why it cannot be used; the same content once more puts it right.
    pub error: Option<Fault>,
    /// When it was made; of the built-in image the beginning of 1970.
    pub created_at: Timestamp,
    /// In answers to `dry_run` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub preview: Option<Preview>,
}

/// What a helper image says of itself.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImageContent {
    /// Bytes of the file.
    #[schema(example = 65536)]
    pub size_bytes: u64,
    /// SHA-256 of the file.
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    pub measurement: String,
    /// Oldest helper ABI that it speaks.
    #[schema(example = 1)]
    pub abi_min: u32,
    /// Newest helper ABI that it speaks.
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
            error: r.fault.map(|fault| Fault { code: fault.code().to_owned(), detail: fault.to_string() }),
            created_at: r.created_at,
            preview: None,
        }
    }
}

/// One page of helper images.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HelperImageList {
    /// Images by creation.
    pub items: Vec<HelperImage>,
    /// Gives the next page; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_page_token: Option<String>,
}
