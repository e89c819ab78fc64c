//! Copies of files that nobody can change any more, and their digests.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use ring::digest;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};

use super::directories::{FileRefusal, ImageFile};

/// What a file is read in.
const CHUNK: usize = 256 << 10;
/// A copy that cannot be written, grown, shrunk or unsealed.
const SEALED: SealFlags =
    SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// What is known of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootFile {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 of them.
    pub sha256: [u8; 32],
}

impl std::fmt::Display for BootFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, sha256:", self.bytes)?;
        self.sha256.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A copy of a file in memory that nobody can change, not even its owner.
#[derive(Debug)]
pub struct SealedFile {
    fd: OwnedFd,
    facts: BootFile,
}

impl SealedFile {
    /// What it holds.
    pub const fn facts(&self) -> BootFile {
        self.facts
    }

    /// Sealed memory that holds `content`, which is not empty.
    ///
    /// # Errors
    /// The system's.
    pub fn holding(name: &str, content: &[u8]) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut file = File::from(fd);
        file.write_all(content)?;
        fcntl_add_seals(&file, SEALED)?;
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest::digest(&digest::SHA256, content).as_ref());
        let facts = BootFile { bytes: content.len() as u64, sha256 };
        Ok(Self { fd: file.into(), facts })
    }

    /// The copy itself.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl ImageFile {
    /// Reads the whole file for its digest.
    ///
    /// # Errors
    /// [`FileRefusal::TooLarge`], [`FileRefusal::Unreadable`], [`FileRefusal::Empty`].
    pub fn facts(self, limit: u64) -> Result<BootFile, FileRefusal> {
        read(self, limit, |_| Ok(()))
    }

    /// Copies the whole file into sealed memory called `name`. The digest is of what was copied.
    ///
    /// # Errors
    /// As [`ImageFile::facts`].
    pub fn copy(self, name: &str, limit: u64) -> Result<SealedFile, FileRefusal> {
        let no_memory = |error: io::Error| {
            tracing::warn!(%error, "a file of a guest cannot be copied into memory");
            FileRefusal::Unreadable
        };
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| no_memory(e.into()))?;
        let mut copy = File::from(fd);
        let facts = read(self, limit, |bytes| copy.write_all(bytes).map_err(no_memory))?;
        fcntl_add_seals(&copy, SEALED).map_err(|e| no_memory(e.into()))?;
        Ok(SealedFile { fd: copy.into(), facts })
    }
}

/// Whether memory is a copy as [`ImageFile::copy`] makes it.
pub(crate) fn is_sealed(fd: &OwnedFd) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALED)) && fstat(fd).is_ok_and(|s| s.st_size > 0)
}

/// Hands over what is in the file piece by piece; never more than `limit` bytes, however it grows meanwhile.
fn read(
    image: ImageFile,
    limit: u64,
    mut take: impl FnMut(&[u8]) -> Result<(), FileRefusal>,
) -> Result<BootFile, FileRefusal> {
    let ImageFile { mut file, bytes: expected } = image;
    if expected > limit {
        return Err(FileRefusal::TooLarge { bytes: expected, limit });
    }
    let mut sum = digest::Context::new(&digest::SHA256);
    let (mut chunk, mut bytes) = (vec![0; CHUNK], 0u64);
    loop {
        let count = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::warn!(%error, "a file of a guest cannot be read");
                return Err(FileRefusal::Unreadable);
            }
        };
        bytes += count as u64;
        if bytes > limit {
            return Err(FileRefusal::TooLarge { bytes, limit });
        }
        let piece = chunk.get(..count).unwrap_or_default();
        sum.update(piece);
        take(piece)?;
    }
    if bytes == 0 {
        return Err(FileRefusal::Empty);
    }
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(sum.finish().as_ref());
    Ok(BootFile { bytes, sha256 })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

    use super::*;
    use crate::boot_files::ImageDirectories;

    fn image(content: &[u8]) -> (tempfile::TempDir, ImageDirectories) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), content).unwrap();
        // Nobody but its owner reads it.
        let owner = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(dir.path().join("image"), owner).unwrap();
        let listed = ImageDirectories::open(&[dir.path().to_owned()], &[]).unwrap();
        (dir, listed)
    }

    #[test]
    fn a_copy_is_equal_and_nobody_can_change_it() {
        let content = vec![7; CHUNK * 2 + 5];
        let (dir, listed) = image(&content);
        let open = || listed.file(&dir.path().join("image")).unwrap();
        let facts = open().facts(1 << 30).unwrap();
        let copy = open().copy("image", 1 << 30).unwrap();
        assert_eq!((copy.facts(), facts.bytes), (facts, content.len() as u64));
        assert_eq!(facts.sha256, *digest::digest(&digest::SHA256, &content).as_ref());
        assert!(is_sealed(&copy.fd));
        let copy = File::from(copy.into_fd());
        let mut back = vec![0; content.len()];
        copy.read_exact_at(&mut back, 0).unwrap();
        assert!(back == content);
        assert!(
            copy.write_at(b"x", 0).is_err() && copy.set_len(1).is_err() && copy.set_len(1 << 20).is_err()
        );
    }

    #[test]
    fn a_file_beyond_its_bound_is_refused_before_it_is_read_and_while_it_grows() {
        let (dir, listed) = image(&[1; 100]);
        let open = || listed.file(&dir.path().join("image")).unwrap();
        assert_eq!(open().facts(99), Err(FileRefusal::TooLarge { bytes: 100, limit: 99 }));
        assert_eq!(open().facts(100).unwrap().bytes, 100);
        let grows = open();
        std::fs::write(dir.path().join("image"), [2; 300]).unwrap();
        assert_eq!(grows.facts(200), Err(FileRefusal::TooLarge { bytes: 300, limit: 200 }));
        std::fs::write(dir.path().join("image"), [1; 100]).unwrap();
        let shrinks = open();
        std::fs::write(dir.path().join("image"), []).unwrap();
        assert_eq!(shrinks.facts(200), Err(FileRefusal::Empty));
    }

    #[test]
    fn what_happens_to_the_name_after_the_look_does_not_matter() {
        let (dir, listed) = image(b"first");
        let path = dir.path().join("image");
        let open = listed.file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert_eq!(open.facts(100).unwrap().sha256, *digest::digest(&digest::SHA256, b"first").as_ref());
    }
}
