//! A helper image on disk: what is known of it; its content is a file.

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::images::types::{ImageFacts, ImageRecord};
use crate::store::form::{form, unchanged};

form! {
    ImageForm of ImageRecord, version 5 by unchanged {
        id: Uuid,
        name: String,
        generation: u64,
        content: Option<ImageFacts>,
        created_at: Timestamp,
    } live { fault }
}

form! {
    ImageFactsForm of ImageFacts {
        size_bytes: u64,
        measurement: [u8; 32],
        abi_min: u32,
        abi_max: u32,
    }
}
