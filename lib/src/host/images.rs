//! Helper images that were uploaded, beside the built-in one.
//!
//! Owns: their records and files. A record is made first and gets its content once; content that does not pass the
//! header's checks is never written. Mirrors run the built-in image: which of the others a mirror may run is for the
//! pair of hosts to agree on, and no protocol says it yet.

use jiff::Timestamp;
use mirrorvm_abi::header::HeaderError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::events::{Change, EventBody, ResourceKind};
use super::{Host, HostError, validate};
use crate::mirror::HelperImage;
use crate::private_files::PrivateDir;
use crate::store::Kind;

/// Images that a host keeps at most.
const IMAGES_MAX: usize = 16;
/// The id of the image that belongs to the build: the same everywhere.
pub const BUILT_IN_ID: Uuid = Uuid::from_u128(0x0000_0000_0000_8000_8000_0000_0000_0001);

/// A helper image as the host knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// UUIDv7; of the built-in image [`BUILT_IN_ID`].
    pub id: Uuid,
    /// Name, unique among images.
    pub name: String,
    /// Goes up with every change.
    pub generation: u64,
    /// What its content says; `None` before it has any.
    pub content: Option<ImageFacts>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What an image's header says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

fn facts(image: &HelperImage) -> ImageFacts {
    ImageFacts {
        size_bytes: image.bytes().len() as u64,
        measurement: image.measurement(),
        abi_min: image.header().abi_min,
        abi_max: image.header().abi_max,
    }
}

impl Host {
    /// Every image, the built-in one first.
    ///
    /// # Errors
    /// Storage.
    pub fn images(&self) -> Result<Vec<ImageRecord>, HostError> {
        let stored = self.inner.store.list::<ImageRecord>(Kind::HelperImage);
        let stored = stored.map_err(|e| HostError::internal("listing helper images", e))?;
        Ok(std::iter::once(self.built_in()).chain(stored.into_iter().map(|(_, r)| r)).collect())
    }

    fn built_in(&self) -> ImageRecord {
        ImageRecord {
            id: BUILT_IN_ID,
            name: "built-in".into(),
            generation: 1,
            content: Some(facts(&self.inner.image)),
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    /// One image by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`], storage.
    pub fn image(&self, key: &str) -> Result<ImageRecord, HostError> {
        let id = Uuid::try_parse(key).ok();
        let found = self.images()?.into_iter().find(|i| Some(i.id) == id || i.name == key);
        found.ok_or_else(|| HostError::NotFound { kind: "helper image", key: key.chars().take(80).collect() })
    }

    /// Makes a record without content, under an id of the caller's choice (`None`: a new one).
    ///
    /// # Errors
    /// A name that cannot be or is taken, too many images, storage.
    pub fn create_image(&self, id: Option<Uuid>, name: &str, act: bool) -> Result<ImageRecord, HostError> {
        self.inner.check_running()?;
        validate::name(name)?;
        let _one = self.inner.images_lock();
        let there = self.images()?;
        if id.is_some_and(|id| there.iter().any(|i| i.id == id)) {
            return Err(HostError::IdTaken { kind: "helper image" });
        }
        if there.iter().any(|i| i.name == name) {
            return Err(HostError::NameTaken { kind: "helper image", name: name.to_owned() });
        }
        if there.len() > IMAGES_MAX {
            return Err(HostError::NoResources { what: "room for helper images", source: None });
        }
        let record = ImageRecord {
            id: id.unwrap_or_else(Uuid::now_v7),
            name: name.to_owned(),
            generation: 1,
            content: None,
            created_at: Timestamp::now(),
        };
        if act {
            self.keep_image(&record, Change::Created)?;
        }
        Ok(record)
    }

    /// Gives an image its content. The same content again changes nothing.
    ///
    /// # Errors
    /// [`ContentError::Header`]; no such image, another content, the built-in image, storage.
    pub fn fill_image(&self, key: &str, bytes: Vec<u8>, act: bool) -> Result<ImageRecord, ContentError> {
        let _one = self.inner.images_lock();
        let record = self.image(key)?;
        let image = HelperImage::parse(bytes).map_err(ContentError::Header)?;
        let content = facts(&image);
        match &record.content {
            Some(there) if *there == content => return Ok(record),
            Some(_) => {
                let allowed = &["empty"];
                return Err(HostError::WrongState { kind: "helper image", current: "filled", allowed }.into());
            }
            None => {}
        }
        let record = ImageRecord { content: Some(content), generation: record.generation + 1, ..record };
        if act {
            let failed = |e| HostError::internal("storing a helper image", e);
            let dir = PrivateDir::open_or_create(&self.inner.state_dir.join("helper-images"));
            let dir = dir.map_err(failed)?;
            let name = format!("{}.bin", record.id.simple());
            let temporary = dir.temporary_name(&name);
            dir.create(&temporary, image.bytes()).map_err(failed)?;
            if let Err(e) = dir.publish(&temporary, &name) {
                let _ = dir.remove_if_present(&temporary);
                return Err(failed(e).into());
            }
            self.keep_image(&record, Change::Updated)?;
        }
        Ok(record)
    }

    /// Removes an image with its content.
    ///
    /// # Errors
    /// No such image, the built-in one, storage.
    pub fn delete_image(&self, key: &str, act: bool) -> Result<ImageRecord, HostError> {
        let _one = self.inner.images_lock();
        let record = self.image(key)?;
        if record.id == BUILT_IN_ID {
            return Err(HostError::InUse { kind: "helper image", user: "the daemon itself".into() });
        }
        if act {
            let failed = "deleting a helper image";
            self.inner
                .store
                .delete(Kind::HelperImage, record.id)
                .map_err(|e| HostError::internal(failed, e))?;
            if record.content.is_some()
                && let Ok(dir) = PrivateDir::open(&self.inner.state_dir.join("helper-images"))
            {
                dir.remove_if_present(&format!("{}.bin", record.id.simple()))
                    .map_err(|e| HostError::internal(failed, e))?;
            }
            self.tell_image(&record, Change::Deleted);
        }
        Ok(record)
    }

    fn keep_image(&self, record: &ImageRecord, change: Change) -> Result<(), HostError> {
        self.inner
            .store
            .put(Kind::HelperImage, record.id, Some(&record.name), record)
            .map_err(|e| HostError::internal("storing a helper image", e))?;
        self.tell_image(record, change);
        Ok(())
    }

    fn tell_image(&self, record: &ImageRecord, change: Change) {
        let body = EventBody::new(ResourceKind::HelperImage, change, record.id, record.generation);
        self.inner.events.emit(&EventBody { name: Some(record.name.clone()), ..body });
        self.inner.changed();
    }
}
