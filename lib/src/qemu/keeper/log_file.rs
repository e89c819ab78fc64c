//! Owns a file that grows by what somebody not trusted writes, and never beyond a bound. Must not know what
//! is written.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, fstat, openat, renameat};

/// Bytes after which a file is set aside, in the place of the one that was set aside before.
const BYTES_MAX: u64 = 1 << 20;

/// A file of mode 0600 in a guest's directory. What cannot be written is lost, and holds nobody up.
pub(super) struct LogFile {
    place: Option<(OwnedFd, &'static str)>,
    file: Option<File>,
    bytes: u64,
}

impl LogFile {
    /// Opens or makes it; without a directory it takes everything and keeps nothing.
    pub fn open(directory: Option<&OwnedFd>, name: &'static str) -> Self {
        let place = directory.and_then(|d| d.try_clone().ok()).map(|d| (d, name));
        let mut log = Self { place, file: None, bytes: 0 };
        log.reopen();
        log
    }

    fn reopen(&mut self) {
        self.file = self.place.as_ref().and_then(|(directory, name)| {
            let flags = OFlags::WRONLY
                | OFlags::CREATE
                | OFlags::APPEND
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC;
            openat(directory, *name, flags, Mode::RUSR | Mode::WUSR).ok().map(File::from)
        });
        let bytes = self.file.as_ref().and_then(|file| fstat(file).ok()).map(|stat| stat.st_size);
        self.bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
    }

    /// Adds to it.
    pub fn append(&mut self, bytes: &[u8]) {
        let more = bytes.len() as u64;
        if self.bytes > 0 && self.bytes.saturating_add(more) > BYTES_MAX {
            self.file = None;
            if let Some((directory, name)) = &self.place {
                let _ = renameat(directory, *name, directory, format!("{name}.1"));
            }
            self.reopen();
        }
        // One that could be neither set aside nor opened anew takes no more.
        if let Some(file) = &mut self.file
            && self.bytes < BYTES_MAX
        {
            let _ = file.write_all(bytes);
            self.bytes = self.bytes.saturating_add(more);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn a_log_is_bounded_and_has_one_generation_before() {
        let dir = tempfile::tempdir().unwrap();
        let directory = OwnedFd::from(File::open(dir.path()).unwrap());
        let mut log = LogFile::open(Some(&directory), "console.log");
        let piece = [b'x'; 4096];
        for _ in 0..(3 * BYTES_MAX / 4096 + 10) {
            log.append(&piece);
        }
        let meta = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap();
        assert_eq!((meta("console.log").len(), meta("console.log.1").len()), (10 * 4096, BYTES_MAX));
        assert_eq!(meta("console.log").mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        // The next one goes on where this one ended.
        LogFile::open(Some(&directory), "console.log").append(b"more");
        assert_eq!(meta("console.log").len(), 10 * 4096 + 4);
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let directory = OwnedFd::from(File::open(dir.path()).unwrap());
        std::fs::write(dir.path().join("victim"), "intact").unwrap();
        symlink("victim", dir.path().join("qemu.log")).unwrap();
        LogFile::open(Some(&directory), "qemu.log").append(b"words");
        assert_eq!(std::fs::read(dir.path().join("victim")).unwrap(), b"intact");
        LogFile::open(None, "qemu.log").append(b"words");
    }
}
