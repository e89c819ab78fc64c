//! The disk from which cloud-init reads (NoCloud): a FAT file system called `cidata`.
//!
//! Owns: its content, the same bytes for the same definition on every host. Must not know: how it is
//! attached.

use std::io::{self, Cursor, Write as _};

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use uuid::Uuid;

use crate::boot_files::SealedFile;
use crate::qemu::machine::CloudInit;

/// Bytes of the disk: room for three documents of 64 KiB.
const SIZE: usize = 1 << 20;

/// The disk of a guest.
pub(super) fn seed(given: &CloudInit, id: Uuid, name: &str) -> io::Result<SealedFile> {
    SealedFile::holding("cloud-init", &image(given, id, name)?)
}

fn image(given: &CloudInit, id: Uuid, name: &str) -> io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; SIZE]);
    let options =
        FormatVolumeOptions::new().fat_type(FatType::Fat12).volume_label(*b"cidata     ").volume_id(0);
    format_volume(&mut disk, options)?;
    // The crate is built without a clock: files of one definition are the same at every host.
    let files = FileSystem::new(&mut disk, FsOptions::new())?;
    let meta =
        given.meta_data.clone().unwrap_or_else(|| format!("instance-id: {id}\nlocal-hostname: {name}\n"));
    let documents = [
        ("meta-data", Some(&meta)),
        ("user-data", Some(&given.user_data)),
        ("network-config", given.network_config.as_ref()),
    ];
    for (file, text) in documents {
        if let Some(text) = text {
            files.root_dir().create_file(file)?.write_all(text.as_bytes())?;
        }
    }
    files.unmount()?;
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn cloud_init_finds_its_documents_by_label_and_name_and_they_are_the_same_everywhere() {
        let given = CloudInit {
            user_data: "#cloud-config\nhostname: g1\n".into(),
            meta_data: None,
            network_config: Some("version: 2\n".into()),
        };
        let id = Uuid::from_u128(7);
        let image = image(&given, id, "g1").unwrap();
        assert_eq!(image, super::image(&given, id, "g1").unwrap());
        let files = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(String::from_utf8_lossy(files.volume_label_as_bytes()).trim_end(), "cidata");
        let text = |name: &str| {
            let mut text = String::new();
            files.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(text("user-data"), given.user_data);
        assert_eq!(text("network-config"), "version: 2\n");
        assert_eq!(text("meta-data"), format!("instance-id: {id}\nlocal-hostname: g1\n"));
        let long = CloudInit {
            user_data: "x".repeat(64 << 10),
            meta_data: Some("y".repeat(64 << 10)),
            network_config: Some("z".repeat(64 << 10)),
        };
        assert_eq!(super::image(&long, id, "g1").unwrap().len(), SIZE);
    }
}
