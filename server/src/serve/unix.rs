//! The Unix socket: made with mode 0600 from its first moment, and never in place of something else.
//!
//! A lock file beside the socket says whose it is. Only its holder removes a stale socket, so two daemons
//! that start at once cannot take each other's away.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind as bind_to, listen, socket_with,
};
use tokio::net::UnixListener;

const BACKLOG: i32 = 1024;

/// Why a socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something else than a socket has the name.
    #[error("there is something else at this path")]
    NotASocket,
    /// Another daemon serves the socket.
    #[error("another process serves it")]
    Busy,
    /// The system refused an operation.
    #[error("{what}")]
    Io {
        /// The operation that was tried.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io { what, source }
}

/// Holds the socket's lock, and removes the socket when it is dropped.
#[derive(Debug)]
pub(super) struct SocketGuard {
    path: PathBuf,
    inode: Option<(u64, u64)>,
    _lock: File,
}

impl SocketGuard {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        // Only our own: somebody may have put another one there by hand.
        if self.inode.is_some() && inode(&self.path) == self.inode {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Binds a Unix socket at `path`, in place of one that a dead daemon left.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketGuard), SocketError> {
    let lock = lock(path)?;
    clear(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| failed("cannot make a socket")(e.into()))?;
    // On Linux the file gets the socket's mode (net/unix/af_unix.c, unix_bind_bsd): set before, so that there
    // is no moment in which others may connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| failed("cannot set the socket's mode")(e.into()))?;
    let address = SocketAddrUnix::new(path)
        .map_err(|e| failed("the path of a socket has at most 107 bytes; this one has more")(e.into()))?;
    bind_to(&socket, &address).map_err(|e| failed("cannot bind")(e.into()))?;
    listen(&socket, BACKLOG).map_err(|e| failed("cannot listen")(e.into()))?;
    let listener = UnixListener::from_std(StdListener::from(socket)).map_err(failed("cannot listen"))?;
    Ok((listener, SocketGuard { path: path.to_owned(), inode: inode(path), _lock: lock }))
}

fn lock(path: &Path) -> Result<File, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(PathBuf::from(name))
        .map_err(failed("cannot open the lock file beside it"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SocketError::Busy),
        Err(e) => Err(failed("cannot lock the lock file beside it")(e.into())),
    }
}

/// Removes a stale socket; refuses everything else that is there.
fn clear(path: &Path) -> Result<(), SocketError> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("cannot look at the path")(e)),
    };
    if !found.file_type().is_socket() {
        return Err(SocketError::NotASocket);
    }
    match StdStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("cannot remove the stale socket"))
        }
        Ok(_) => Err(SocketError::Busy),
        // Such as a full backlog: somebody is there.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(SocketError::Busy),
        Err(e) => Err(failed("cannot tell whether the socket is alive")(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_goes_away_with_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, guard) = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(SocketError::Busy)));
        drop((listener, guard));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(StdListener::bind(&path).unwrap());
        assert!(path.exists());
        bind(&path).unwrap();

        let live = dir.path().join("live");
        let _listener = StdListener::bind(&live).unwrap();
        assert!(matches!(bind(&live), Err(SocketError::Busy)));

        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(bind(&link), Err(SocketError::NotASocket)));
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::NotASocket)));
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }
}
