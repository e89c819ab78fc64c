//! Helper images that were uploaded, beside the built-in one.
//!
//! Owns: their records. A record is made first and gets its content once; content that does not pass the
//! header's checks is never written. A mirror of a guest that is not encrypted runs whichever of them its
//! maker names; a migration's destination takes the image with the measurement of the source's.

pub(super) mod files;
pub(super) mod types;

use crate::codes::Capability;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use self::types::{BUILT_IN_ID, ContentError, ImageFacts, ImageRecord};
use crate::guest::drivers::MirrorsOn;
use crate::host::act::{self, Effect};
use crate::host::events::{Change, EventBody, ResourceKind};
use crate::host::inner::Inner;
use crate::host::{Ask, DriverSpec, FieldError, Host, HostError, validate};
use crate::mirror::HelperImage;
use crate::store::{Batch, Kind, StoreError};

/// Images that a host keeps at most.
const IMAGES_MAX: usize = 16;
impl Inner {
    /// The helper image that a caller names (`None`: the built-in one), for guests of `driver`.
    ///
    /// # Errors
    /// No such image, or none with content, or [`HostError::ImageFailed`]; one that the guest cannot have;
    /// storage.
    pub fn helper_image(
        &self,
        driver: &DriverSpec,
        key: Option<&str>,
    ) -> Result<Arc<HelperImage>, HostError> {
        let Some(key) = key else { return Ok(Arc::clone(&self.image)) };
        let record = self.image_record(key)?;
        let Some(content) = &record.content else {
            let detail = "the image has no content yet; PUT it first";
            let error = FieldError::new("/helper_image", "no_content", detail);
            return Err(HostError::Invalid(vec![error]));
        };
        let image = self.load_image(&record, content)?;
        self.check_image(driver, &image)?;
        Ok(image)
    }

    /// The image with this measurement, if there is one.
    ///
    /// # Errors
    /// [`HostError::ImageFailed`]: there is only one whose file is not what was uploaded; storage.
    pub fn image_measuring(&self, measurement: &[u8; 32]) -> Result<Option<Arc<HelperImage>>, HostError> {
        let mut failed = None;
        for record in self.image_records()? {
            let Some(content) = record.content.as_ref().filter(|c| c.measurement == *measurement) else {
                continue;
            };
            match self.load_image(&record, content) {
                Ok(image) => return Ok(Some(image)),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    /// Whether guests of `driver` can have a helper of this image.
    ///
    /// # Errors
    /// [`HostError::ImageNotLaunched`], [`HostError::CapabilityMissing`].
    pub fn check_image(&self, driver: &DriverSpec, image: &HelperImage) -> Result<(), HostError> {
        if image.measurement() == self.image.measurement() {
            return Ok(());
        }
        if self.facts(driver).sev.is_some() {
            return Err(HostError::ImageNotLaunched);
        }
        if self.driver(driver)?.mirrors_on() == MirrorsOn::Software {
            let why =
                "the software machine knows the built-in helper by its bytes and runs it natively".to_owned();
            return Err(HostError::lacks(Capability::OtherHelperImages, why));
        }
        Ok(())
    }

    fn load_image(&self, record: &ImageRecord, content: &ImageFacts) -> Result<Arc<HelperImage>, HostError> {
        if record.id == BUILT_IN_ID {
            return Ok(Arc::clone(&self.image));
        }
        let read = files::read(&self.state_dir, record.id, content);
        read.map(Arc::new).map_err(|fault| HostError::ImageFailed { name: record.name.clone(), fault })
    }

    /// Says in the log which images cannot be used.
    ///
    /// # Errors
    /// Storage.
    pub fn look_at_images(&self) -> Result<(), HostError> {
        for (record, fault) in self.image_records()?.into_iter().filter_map(|r| r.fault.map(|f| (r, f))) {
            tracing::error!(image = %record.id, name = record.name, %fault, "a helper image cannot be used");
        }
        Ok(())
    }

    fn image_records(&self) -> Result<Vec<ImageRecord>, HostError> {
        let stored = self.store.list::<ImageRecord>(Kind::HelperImage);
        let stored = stored.map_err(|e| HostError::storage("listing helper images", e))?;
        let built_in = ImageRecord {
            id: BUILT_IN_ID,
            name: "built-in".into(),
            generation: 1,
            content: Some(ImageFacts::of(&self.image)),
            fault: None,
            created_at: Timestamp::UNIX_EPOCH,
        };
        let looked = |(_, r)| ImageRecord { fault: self.image_looks.at(&self.state_dir, &r), ..r };
        Ok(std::iter::once(built_in).chain(stored.into_iter().map(looked)).collect())
    }

    fn image_record(&self, key: &str) -> Result<ImageRecord, HostError> {
        let id = Uuid::try_parse(key).ok();
        let found = self.image_records()?.into_iter().find(|i| Some(i.id) == id || i.name == key);
        found.ok_or_else(|| HostError::missing(ResourceKind::HelperImage, key))
    }
}

impl Host {
    /// Every image, the built-in one first.
    ///
    /// # Errors
    /// Storage.
    pub fn images(&self) -> Result<Vec<ImageRecord>, HostError> {
        self.inner.image_records()
    }

    /// One image by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`], storage.
    pub fn image(&self, key: &str) -> Result<ImageRecord, HostError> {
        self.inner.image_record(key)
    }

    /// Makes a record without content.
    ///
    /// # Errors
    /// A name that cannot be or is taken, too many images, storage.
    pub fn create_image(&self, name: &str, ask: &Ask) -> Result<ImageRecord, HostError> {
        self.inner.check_running()?;
        validate::name(name)?;
        let _one = self.inner.images_lock();
        let there = self.images()?;
        if ask.id.is_some_and(|id| there.iter().any(|i| i.id == id)) {
            return Err(HostError::IdTaken { kind: ResourceKind::HelperImage });
        }
        if there.iter().any(|i| i.name == name) {
            return Err(HostError::NameTaken { kind: ResourceKind::HelperImage, name: name.to_owned() });
        }
        if there.len() > IMAGES_MAX {
            return Err(HostError::NoResources { what: "room for helper images", source: None });
        }
        let record = ImageRecord {
            id: ask.id.unwrap_or_else(Uuid::now_v7),
            name: name.to_owned(),
            generation: 1,
            content: None,
            fault: None,
            created_at: Timestamp::now(),
        };
        if !ask.dry_run {
            self.keep_image(&record, Change::Created)?;
        }
        Ok(record)
    }

    /// Gives an image its content. The same content again changes nothing, unless its file is not that any
    /// more: then it puts the file right.
    ///
    /// # Errors
    /// [`ContentError::Header`]; no such image, another content, the built-in image,
    /// [`HostError::GenerationMismatch`], storage.
    pub fn fill_image(&self, key: &str, bytes: Vec<u8>, ask: &Ask) -> Result<ImageRecord, ContentError> {
        let _one = self.inner.images_lock();
        let record = self.image(key)?;
        ask.check(ResourceKind::HelperImage, record.generation)?;
        let image = HelperImage::parse(bytes).map_err(ContentError::Header)?;
        let content = ImageFacts::of(&image);
        let failed = |e| HostError::storage("storing a helper image", StoreError::of_files(e));
        let write = || files::write(&self.inner.state_dir, record.id, image.bytes()).map_err(failed);
        match &record.content {
            Some(there) if *there == content && record.fault.is_none() => return Ok(record),
            Some(there) if *there == content => {
                if !ask.dry_run {
                    write()?;
                    self.inner.changed();
                }
                return Ok(ImageRecord { fault: None, ..record });
            }
            Some(_) => {
                let allowed = &["empty"];
                return Err(HostError::WrongState {
                    kind: ResourceKind::HelperImage.into(),
                    current: "filled",
                    allowed,
                }
                .into());
            }
            None => {}
        }
        if !ask.dry_run {
            write()?;
        }
        let record = ImageRecord { content: Some(content), generation: record.generation + 1, ..record };
        if !ask.dry_run {
            let kept = self.keep_image(&record, Change::Updated);
            if kept.is_err() {
                self.remove_image_file(&record);
            }
            kept?;
        }
        Ok(record)
    }

    /// Removes an image with its content; gives it as it was.
    ///
    /// # Errors
    /// No such image, the built-in one, one in use, [`HostError::GenerationMismatch`], storage.
    pub fn delete_image(&self, key: &str, ask: &Ask) -> Result<ImageRecord, HostError> {
        let _one = self.inner.images_lock();
        let record = self.image(key)?;
        ask.check(ResourceKind::HelperImage, record.generation)?;
        if record.id == BUILT_IN_ID {
            return Err(HostError::InUse {
                kind: ResourceKind::HelperImage,
                user: "the daemon itself".into(),
            });
        }
        let measured = record.content.as_ref().map(|c| c.measurement);
        let measured = measured.filter(|m| *m != self.inner.image.measurement());
        let mirrors = self.mirrors();
        if let Some(mirror) = mirrors.iter().find(|m| measured == Some(m.helper_measurement)) {
            let user = format!("mirror {}", mirror.id);
            return Err(HostError::InUse { kind: ResourceKind::HelperImage, user });
        }
        if !ask.dry_run {
            let mut batch = Batch::new();
            batch.delete(Kind::HelperImage, record.id);
            self.image_event(&record, Change::Deleted).write(&mut batch);
            let riding = act::along(&Effect::Gone(ResourceKind::HelperImage, record.id), &mut batch);
            let stored = self.inner.ledger.commit_blocking(batch, || riding.arrived());
            stored.map_err(|e| HostError::storage("deleting a helper image", e))?;
            if record.content.is_some() {
                self.remove_image_file(&record);
            }
            self.inner.changed();
        }
        Ok(record)
    }

    fn remove_image_file(&self, record: &ImageRecord) {
        self.inner.image_looks.forget(record.id);
        if let Err(error) = files::remove(&self.inner.state_dir, record.id) {
            // The image is gone; its bytes take room until somebody removes them.
            tracing::error!(error = %crate::chain::chain(&error), image = %record.id, "a helper image's file stays");
        }
    }

    fn keep_image(&self, record: &ImageRecord, change: Change) -> Result<(), HostError> {
        let failed = |e| HostError::storage("storing a helper image", e);
        let mut batch = Batch::new();
        batch.put(Kind::HelperImage, record.id, Some(&record.name), record).map_err(failed)?;
        self.image_event(record, change).write(&mut batch);
        let riding = act::along(&Effect::Image(record), &mut batch);
        self.inner.ledger.commit_blocking(batch, || riding.arrived()).map_err(failed)?;
        self.inner.changed();
        Ok(())
    }

    fn image_event(&self, record: &ImageRecord, change: Change) -> EventBody {
        let body = EventBody::new(ResourceKind::HelperImage, change, record.id, record.generation);
        EventBody { name: Some(record.name.clone()), ..body }
    }
}
