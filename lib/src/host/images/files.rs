//! The files of uploaded helper images: whether each is what was uploaded, and how they go into a backup and
//! come back.
//!
//! Owns: their names, reading with a check against the record, writing. Must not know: what an image is run
//! for, who asks.
//!
//! A record says what its file measures. Whoever reads the file goes by that: a file that is gone or holds
//! something else is named, and never run.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Mutex;

use mirrorvm_abi::header::FILE_MAX;
use rustix::fs::OFlags;
use uuid::Uuid;

use crate::codes::Code;
use crate::host::images::types::{ImageFacts, ImageFault, ImageRecord};
use crate::mirror::HelperImage;
use crate::private_files::{PrivateDir, PrivateFileError};
use crate::store::state_files::Rider;
use crate::sync::Locked;

const DIRECTORY: &str = "helper-images";
/// What images are found by in a backup, before their ids.
const RIDER: &str = "helper-image/";

impl ImageFault {
    /// Stable code.
    pub const fn code(self) -> Code {
        match self {
            Self::Missing => Code::ContentMissing,
            Self::Changed => Code::ContentChanged,
            Self::Unreadable => Code::ContentUnreadable,
        }
    }

    fn of(error: &PrivateFileError) -> Self {
        match error {
            PrivateFileError::Missing { .. } => Self::Missing,
            PrivateFileError::TooLong { .. } | PrivateFileError::WrongType { .. } => Self::Changed,
            PrivateFileError::SymbolicLink { .. }
            | PrivateFileError::WrongOwner { .. }
            | PrivateFileError::TooOpen { .. }
            | PrivateFileError::HardLinked { .. }
            | PrivateFileError::Exists { .. }
            | PrivateFileError::Locked { .. }
            | PrivateFileError::Io { .. } => Self::Unreadable,
        }
    }
}

fn name_of(id: Uuid) -> String {
    format!("{}.bin", id.simple())
}

fn logged(id: Uuid, error: &PrivateFileError) -> ImageFault {
    tracing::warn!(image = %id, error = %crate::chain::chain(error), "the file of a helper image cannot be used");
    ImageFault::of(error)
}

/// The image of which `content` was noted.
///
/// # Errors
/// Its file is not that.
pub(in crate::host) fn read(
    state_dir: &Path,
    id: Uuid,
    content: &ImageFacts,
) -> Result<HelperImage, ImageFault> {
    let dir = PrivateDir::open(&state_dir.join(DIRECTORY)).map_err(|e| logged(id, &e))?;
    let bytes = dir.read(&name_of(id), FILE_MAX as u64).map_err(|e| logged(id, &e))?;
    let image = HelperImage::parse(bytes.to_vec()).map_err(|_| ImageFault::Changed)?;
    // What was measured is what is run: a file that changed behind the daemon's back is not.
    if ImageFacts::of(&image) == *content { Ok(image) } else { Err(ImageFault::Changed) }
}

/// Puts an image's file there, whatever was there before.
pub(in crate::host) fn write(state_dir: &Path, id: Uuid, bytes: &[u8]) -> Result<(), PrivateFileError> {
    PrivateDir::open_or_create(&state_dir.join(DIRECTORY))?.replace(&name_of(id), bytes)
}

/// Removes an image's file, if it is there.
pub(in crate::host) fn remove(state_dir: &Path, id: Uuid) -> Result<(), PrivateFileError> {
    match PrivateDir::open(&state_dir.join(DIRECTORY)) {
        Ok(dir) => dir.remove_if_present(&name_of(id)),
        Err(PrivateFileError::Missing { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What was found in files when they were read last, for whoever only wants to know how the images are: good
/// for as long as the kernel says that a file is the same and untouched. Whoever runs an image reads it.
#[derive(Debug, Default)]
pub(in crate::host) struct Looks(Mutex<HashMap<Uuid, (Stamp, Option<ImageFault>)>>);

/// Inode, bytes, times of the last change of content and of anything.
type Stamp = (u64, u64, (i64, i64), (i64, i64));

impl Looks {
    /// What is wrong with an image's file.
    pub fn at(&self, state_dir: &Path, record: &ImageRecord) -> Option<ImageFault> {
        let content = record.content.as_ref()?;
        let stamp = match stamp(state_dir, record.id) {
            Ok(stamp) => stamp,
            Err(error) => return Some(ImageFault::of(&error)),
        };
        let mut looks = self.0.locked();
        if let Some((then, found)) = looks.get(&record.id)
            && *then == stamp
        {
            return *found;
        }
        let found = read(state_dir, record.id, content).err();
        looks.insert(record.id, (stamp, found));
        found
    }

    /// Nobody asks for this one any more.
    pub fn forget(&self, id: Uuid) {
        self.0.locked().remove(&id);
    }
}

fn stamp(state_dir: &Path, id: Uuid) -> Result<Stamp, PrivateFileError> {
    let dir = PrivateDir::open(&state_dir.join(DIRECTORY))?;
    let path = dir.entry(&name_of(id));
    let meta = dir.open_file(&name_of(id), OFlags::RDONLY)?.metadata();
    let meta = meta.map_err(|source| PrivateFileError::Io { operation: "inspect", path, source })?;
    Ok((meta.ino(), meta.size(), (meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())))
}

/// The files of these images for a backup, or what is wrong with them, each as people know it.
pub(in crate::host) fn riders(state_dir: &Path, records: &[ImageRecord]) -> Result<Vec<Rider>, Vec<String>> {
    let (mut riders, mut wrong) = (Vec::new(), Vec::new());
    for record in records {
        let Some(content) = &record.content else { continue };
        match read(state_dir, record.id, content) {
            Ok(image) => riders.push(Rider {
                name: format!("{RIDER}{}", record.id.simple()),
                body: image.bytes().to_vec().into(),
            }),
            Err(fault) => wrong.push(format!("helper image {:?} ({}): {fault}", record.name, record.id)),
        }
    }
    if wrong.is_empty() { Ok(riders) } else { Err(wrong) }
}

/// Puts the file of an image back that came with a backup; false: the rider is something else.
pub(in crate::host) fn put_back(state_dir: &Path, rider: &Rider) -> Result<bool, PrivateFileError> {
    let id = rider.name.strip_prefix(RIDER).and_then(|id| Uuid::try_parse(id).ok());
    match id {
        Some(id) => write(state_dir, id, &rider.body).map(|()| true),
        None => Ok(false),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]
mod tests {
    use std::os::unix::fs::DirBuilderExt as _;

    use jiff::Timestamp;

    use super::*;

    fn record(id: Uuid) -> ImageRecord {
        ImageRecord {
            id,
            name: "full".into(),
            generation: 2,
            content: Some(ImageFacts::of(&HelperImage::built_in())),
            fault: None,
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_file_that_is_not_what_was_uploaded_is_named_and_comes_back_from_a_backup() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::DirBuilder::new().mode(0o700).create(&state).unwrap();
        let (looks, full) = (Looks::default(), record(Uuid::now_v7()));
        assert_eq!(looks.at(&state, &full), Some(ImageFault::Missing));
        let built_in = HelperImage::built_in();
        let good = built_in.bytes();
        write(&state, full.id, good).unwrap();
        assert_eq!(looks.at(&state, &full), None);
        let kept = riders(&state, std::slice::from_ref(&full)).unwrap();
        assert_eq!(kept.len(), 1);
        let file = state.join(DIRECTORY).join(name_of(full.id));
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            std::fs::write(&file, &bad).unwrap();
            assert_eq!(looks.at(&state, &full), Some(ImageFault::Changed), "{at}");
            assert!(riders(&state, std::slice::from_ref(&full)).err().unwrap()[0].contains("\"full\""));
        }
        std::fs::write(&file, &good[1..]).unwrap();
        assert_eq!(looks.at(&state, &full), Some(ImageFault::Changed));
        assert!(put_back(&state, &kept[0]).unwrap());
        assert_eq!(looks.at(&state, &full), None);
        let other = Rider { name: "host-key".into(), body: Vec::new().into() };
        assert!(!put_back(&state, &other).unwrap());
        std::fs::remove_dir_all(state.join(DIRECTORY)).unwrap();
        assert_eq!(looks.at(&state, &full), Some(ImageFault::Missing));
        remove(&state, full.id).unwrap();
    }
}
