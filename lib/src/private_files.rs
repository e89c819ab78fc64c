//! Files that only this daemon's user may touch: keys, the database, its lock.
//!
//! Owns: the checks on the state directory and on files in it (owner, mode, symbolic and hard links), and
//! creating a file whole or not at all. Must not know: what the files hold.
//!
//! Not trusted: whoever else has an account on the host. A directory is opened once without following a link
//! in its last component and checked through its descriptor; everything after that goes through the
//! descriptor, so that a path swapped during start does not matter. Components above it are the
//! administrator's business.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

/// Bits of a mode that give anything to group or others.
const OTHERS: u32 = 0o077;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Why a private directory or file was not used.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The last component is a symbolic link.
    #[error("{path} is a symbolic link")]
    SymbolicLink {
        /// The path as given.
        path: PathBuf,
    },
    /// Neither a regular file nor (where one was wanted) a directory.
    #[error("{path} is not of the expected file type")]
    WrongType {
        /// The path as given.
        path: PathBuf,
    },
    /// Owned by a user other than the one this process runs as.
    #[error("{path} belongs to user {owner}, this process runs as {expected}")]
    WrongOwner {
        /// The path as given.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// The effective user id of this process.
        expected: u32,
    },
    /// Group or others have access.
    #[error("{path} has mode {mode:04o}, group and others must have no access")]
    TooOpen {
        /// The path as given.
        path: PathBuf,
        /// Permission bits as found.
        mode: u32,
    },
    /// The file has more than one name.
    #[error("{path} has {links} hard links, expected one")]
    HardLinked {
        /// The path as given.
        path: PathBuf,
        /// Number of names.
        links: u64,
    },
    /// A file of that name exists already.
    #[error("{path} exists already")]
    Exists {
        /// The path as given.
        path: PathBuf,
    },
    /// There is no file of that name.
    #[error("{path} does not exist")]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// The file is longer than its kind may be.
    #[error("{path} is longer than {max} bytes")]
    TooLong {
        /// The path as given.
        path: PathBuf,
        /// The bound in bytes.
        max: u64,
    },
    /// Another process holds the lock.
    #[error("{path} is locked by another process")]
    Locked {
        /// The path as given.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path as given.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// A directory that passed the checks, held open.
#[derive(Debug)]
pub(crate) struct PrivateDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl PrivateDir {
    /// Opens `path`, creating the last component with mode 0700 if it is missing, and checks it.
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, PrivateFileError> {
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => Self::open(path),
            // A read-only parent is no obstacle where the directory exists.
            Err(errno) => Self::open(path).map_err(|error| match error {
                PrivateFileError::Missing { path } => io_error("create", path, errno),
                other => other,
            }),
        }
    }

    /// Opens and checks an existing directory.
    pub(crate) fn open(path: &Path) -> Result<Self, PrivateFileError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| open_error(path, errno))?;
        let dir = Self { fd, path: path.to_owned() };
        let stat = rustix::fs::fstat(&dir.fd).map_err(|errno| io_error("inspect", path.to_owned(), errno))?;
        check_owner_and_mode(path, stat.st_uid, stat.st_mode)?;
        Ok(dir)
    }

    /// Full path of the entry `name`.
    pub(crate) fn entry(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether the directory has an entry `name` of whatever type.
    pub(crate) fn contains(&self, name: &str) -> Result<bool, PrivateFileError> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(io_error("inspect", self.entry(name), errno)),
        }
    }

    /// Opens an existing private file after all checks; `access` is what to do with it.
    pub(crate) fn open_file(&self, name: &str, access: OFlags) -> Result<File, PrivateFileError> {
        let path = self.entry(name);
        // NONBLOCK: a FIFO planted under this name must not hold us; regular files ignore it.
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&self.fd, name, flags, PRIVATE_FILE)
            .map_err(|errno| open_error(&path, errno))?;
        let file = File::from(fd);
        let meta = file.metadata().map_err(|source| PrivateFileError::Io {
            operation: "inspect",
            path: path.clone(),
            source,
        })?;
        if !meta.is_file() {
            return Err(PrivateFileError::WrongType { path });
        }
        check_owner_and_mode(&path, meta.uid(), meta.mode())?;
        if meta.nlink() != 1 {
            return Err(PrivateFileError::HardLinked { path, links: meta.nlink() });
        }
        Ok(file)
    }

    /// Reads a private file of at most `max` bytes; the copy in memory is zeroized when dropped.
    pub(crate) fn read(&self, name: &str, max: u64) -> Result<Zeroizing<Vec<u8>>, PrivateFileError> {
        let file = self.open_file(name, OFlags::RDONLY)?;
        // Full capacity at once: growing would leave unwiped copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(max as usize + 1));
        file.take(max + 1).read_to_end(&mut bytes).map_err(|source| PrivateFileError::Io {
            operation: "read",
            path: self.entry(name),
            source,
        })?;
        if bytes.len() as u64 > max {
            return Err(PrivateFileError::TooLong { path: self.entry(name), max });
        }
        Ok(bytes)
    }

    /// Creates `name` with mode 0600 and `bytes`, durable on return, whole or not at all; never replaces a
    /// file.
    pub(crate) fn create(&self, name: &str, bytes: &[u8]) -> Result<(), PrivateFileError> {
        self.by_way_of_another(name, bytes, |temporary| self.publish(temporary, name))
    }

    /// Puts `bytes` at `name` with mode 0600, durable on return, in place of whatever file has that name: a
    /// symbolic link is replaced, never followed. Who reads meanwhile sees what was there before, or all of
    /// what is new.
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), PrivateFileError> {
        self.by_way_of_another(name, bytes, |temporary| {
            rustix::fs::renameat(&self.fd, temporary, &self.fd, name)
                .and_then(|()| rustix::fs::fsync(&self.fd))
                .map_err(|errno| io_error("replace", self.entry(name), errno))
        })
    }

    /// Writes `bytes` to a file of another name in this directory, and lets `take_its_place` rename it.
    fn by_way_of_another(
        &self,
        name: &str,
        bytes: &[u8],
        take_its_place: impl FnOnce(&str) -> Result<(), PrivateFileError>,
    ) -> Result<(), PrivateFileError> {
        let temporary = self.temporary_name(name);
        let fail = |operation, source| PrivateFileError::Io { operation, path: self.entry(name), source };
        let written = (|| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&self.fd, &*temporary, flags, PRIVATE_FILE)
                .map_err(|errno| fail("create", errno.into()))?;
            let mut file = File::from(fd);
            file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|source| fail("write", source))?;
            take_its_place(&temporary)
        })();
        if written.is_err() {
            self.remove_if_present(&temporary)?;
        }
        written
    }

    /// A name in this directory that no other call of this process or another uses.
    pub(crate) fn temporary_name(&self, name: &str) -> String {
        format!(".{name}.{}.new", uuid::Uuid::new_v4().simple())
    }

    /// Renames `temporary` to `name` unless `name` exists, and makes the rename durable.
    pub(crate) fn publish(&self, temporary: &str, name: &str) -> Result<(), PrivateFileError> {
        match rustix::fs::renameat_with(&self.fd, temporary, &self.fd, name, RenameFlags::NOREPLACE) {
            Ok(()) => rustix::fs::fsync(&self.fd).map_err(|errno| io_error("sync", self.path.clone(), errno)),
            Err(Errno::EXIST) => Err(PrivateFileError::Exists { path: self.entry(name) }),
            Err(errno) => Err(io_error("rename", self.entry(name), errno)),
        }
    }

    /// Removes an entry, content with there being none.
    pub(crate) fn remove_if_present(&self, name: &str) -> Result<(), PrivateFileError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(io_error("remove", self.entry(name), errno)),
        }
    }

    /// Takes an exclusive lock on the file `name` (created if missing); released when dropped, or by the
    /// kernel when the process dies in whatever way.
    pub(crate) fn lock(&self, name: &str) -> Result<FileLock, PrivateFileError> {
        let file = self.open_file(name, OFlags::RDWR | OFlags::CREATE)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(FileLock(file)),
            Err(Errno::WOULDBLOCK) => Err(PrivateFileError::Locked { path: self.entry(name) }),
            Err(errno) => Err(io_error("lock", self.entry(name), errno)),
        }
    }
}

/// A lock held; see [`PrivateDir::lock`].
#[derive(Debug)]
pub(crate) struct FileLock(File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing would not do: a process that another thread has just forked shares the lock until it calls
        // exec.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

fn check_owner_and_mode(path: &Path, owner: u32, mode: u32) -> Result<(), PrivateFileError> {
    let expected = rustix::process::geteuid().as_raw();
    if owner != expected {
        return Err(PrivateFileError::WrongOwner { path: path.to_owned(), owner, expected });
    }
    if mode & OTHERS != 0 {
        return Err(PrivateFileError::TooOpen { path: path.to_owned(), mode: mode & 0o7777 });
    }
    Ok(())
}

fn open_error(path: &Path, errno: Errno) -> PrivateFileError {
    let path = path.to_owned();
    match errno {
        Errno::LOOP => PrivateFileError::SymbolicLink { path },
        // O_DIRECTORY|O_NOFOLLOW on a symbolic link says ENOTDIR, not ELOOP (open(2)).
        Errno::NOTDIR if path.is_symlink() => PrivateFileError::SymbolicLink { path },
        Errno::NOTDIR | Errno::ISDIR | Errno::NXIO => PrivateFileError::WrongType { path },
        Errno::NOENT => PrivateFileError::Missing { path },
        _ => io_error("open", path, errno),
    }
}

fn io_error(operation: &'static str, path: PathBuf, errno: Errno) -> PrivateFileError {
    PrivateFileError::Io { operation, path, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_file_takes_the_place_of_a_link_and_not_of_what_the_link_leads_to() {
        let root = tempfile::tempdir().unwrap();
        let (victim, dir) = (root.path().join("victim"), root.path().join("state"));
        std::fs::write(&victim, "theirs").unwrap();
        let opened = PrivateDir::open_or_create(&dir).unwrap();
        symlink(&victim, dir.join("f")).unwrap();
        for bytes in [&b"one"[..], b"two"] {
            opened.replace("f", bytes).unwrap();
            assert_eq!(opened.read("f", 16).unwrap().as_slice(), bytes);
        }
        assert_eq!(std::fs::read(&victim).unwrap(), b"theirs");
        let found = std::fs::symlink_metadata(dir.join("f")).unwrap();
        assert!(found.is_file() && found.permissions().mode() & 0o777 == 0o600, "{found:?}");
        // What cannot be replaced stays, and nothing is left beside it.
        std::fs::create_dir(dir.join("d")).unwrap();
        assert!(matches!(opened.replace("d", b"x"), Err(PrivateFileError::Io { operation: "replace", .. })));
        let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["d", "f"]);
    }
}
