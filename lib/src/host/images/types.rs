//! A helper image as values: what is kept of one, what its header says, what may be wrong with its file.

use jiff::Timestamp;
use mirrorvm_abi::header::HeaderError;
use uuid::Uuid;

use crate::host::HostError;
use crate::mirror::HelperImage;

/// The id of the image that belongs to the build: the same everywhere.
pub const BUILT_IN_ID: Uuid = Uuid::from_u128(0x0000_0000_0000_8000_8000_0000_0000_0001);

/// A helper image as the host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    /// UUIDv7; of the built-in image [`BUILT_IN_ID`].
    pub id: Uuid,
    /// Name, unique among images.
    pub name: String,
    /// Goes up with every change.
    pub generation: u64,
    /// What its content says; `None` before it has any.
    pub content: Option<ImageFacts>,
    /// What is wrong with its file, as of this look.
    pub fault: Option<ImageFault>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What is wrong with the file of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageFault {
    /// There is none.
    #[error("its file is missing")]
    Missing,
    /// It holds something else.
    #[error("its file is not what was uploaded")]
    Changed,
    /// It cannot be read, or others could have written it.
    #[error("its file cannot be read")]
    Unreadable,
}

/// What an image's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Bytes of the file.
    pub size_bytes: u64,
    /// SHA-256 of the file.
    pub measurement: [u8; 32],
    /// Oldest helper ABI that it speaks.
    pub abi_min: u32,
    /// Newest.
    pub abi_max: u32,
}

impl ImageFacts {
    pub(in crate::host) fn of(image: &HelperImage) -> Self {
        Self {
            size_bytes: image.bytes().len() as u64,
            measurement: image.measurement(),
            abi_min: image.header().abi_min,
            abi_max: image.header().abi_max,
        }
    }
}

/// Why content was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It is no helper image.
    #[error("the header is not a helper image's")]
    Header(#[source] HeaderError),
    /// Anything else.
    #[error(transparent)]
    Host(#[from] HostError),
}
