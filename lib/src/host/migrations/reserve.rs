//! Disk space that is set aside for the last records of a hand-over, so that a disk that fills up meanwhile
//! does not leave two hosts in doubt over a guest.
//!
//! Owns: the directory of the reserves, and the form of a record in one. Must not know: what the record says.
//!
//! A reserve is a file with blocks of its own. A record that the database does not take is written into these
//! very blocks: that needs no room, and nobody else can have used it up. Files that a daemon left behind are
//! removed by the next one: those without a record before it opens the database, those with one when the
//! database has it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ring::digest::{SHA256, digest};
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::private_files::{PrivateDir, PrivateFileError};

const DIRECTORY: &str = "reserve";
/// What a record has beside the documents that exist when the space is set aside: a token, events.
const FIXED: u64 = 64 << 10;
/// What a migration's record may grow to by its last word: rounds, workers.
const GROWTH: u64 = 1 << 20;
/// Beside a reserve, what has to be there for the records of the beginning.
const SPARE: u64 = 256 << 10;
/// The longest that is read back.
const LONGEST: u64 = 64 << 20;
/// Before a record: what it is, its length, its digest.
const MAGIC: [u8; 8] = *b"mvm-end1";
const HEADER: usize = MAGIC.len() + 8 + 32;

/// Space set aside until it is released, or dropped without a record in it.
#[derive(Debug)]
pub(in crate::host) struct Reserve {
    dir: Arc<PrivateDir>,
    name: String,
    file: File,
    bytes: u64,
    /// Whether a record is in it that is nowhere else.
    kept: AtomicBool,
}

impl Reserve {
    /// Sets space aside for the records of `session`, of which those that exist take `document_bytes` as
    /// JSON.
    ///
    /// # Errors
    /// When there is none; nothing is left behind.
    pub fn take(state_dir: &Path, session: Uuid, document_bytes: usize) -> io::Result<Self> {
        Self::with(state_dir, session, FIXED + GROWTH + 2 * document_bytes as u64)
    }

    /// Whether a reserve could be taken now, and what is stored after that had room, too. Keeps nothing.
    ///
    /// # Errors
    /// When not.
    pub fn try_out(state_dir: &Path, session: Uuid, document_bytes: usize) -> io::Result<()> {
        Self::with(state_dir, session, FIXED + GROWTH + SPARE + 4 * document_bytes as u64).map(drop)
    }

    fn with(state_dir: &Path, session: Uuid, bytes: u64) -> io::Result<Self> {
        let dir = Arc::new(PrivateDir::open_or_create(&state_dir.join(DIRECTORY)).map_err(to_io)?);
        // Of its own for each attempt, also where one process is both ends.
        let name = dir.temporary_name(&session.simple().to_string());
        dir.create(&name, &[]).map_err(to_io)?;
        let made = dir.open_file(&name, OFlags::RDWR).map_err(to_io).and_then(|file| {
            fill(&file, bytes)?;
            Ok(file)
        });
        match made {
            Ok(file) => Ok(Self { dir, name, file, bytes, kept: AtomicBool::new(false) }),
            Err(error) => {
                let _ = dir.remove_if_present(&name);
                Err(error)
            }
        }
    }

    /// Writes a record into the space; durable when this returns.
    ///
    /// # Errors
    /// It is not, or not for certain.
    pub fn keep(&self, record: &[u8]) -> io::Result<()> {
        if (HEADER + record.len()) as u64 > self.bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = Vec::with_capacity(HEADER + record.len());
        bytes.extend(MAGIC);
        bytes.extend((record.len() as u64).to_le_bytes());
        bytes.extend(digest(&SHA256, record).as_ref());
        bytes.extend(record);
        // From here on it may be on disk, whatever the system says.
        self.kept.store(true, Ordering::SeqCst);
        self.file.write_all_at(&bytes, 0).and_then(|()| self.file.sync_all())
    }

    /// Gives the space back. No effect when it was given already.
    pub fn release(&self) {
        self.kept.store(false, Ordering::SeqCst);
        if let Err(error) = self.dir.remove_if_present(&self.name) {
            tracing::warn!(%error, "disk space set aside for a hand-over could not be released");
        }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::SeqCst) {
            self.release();
        }
    }
}

fn fill(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => Ok(()),
        // A file system without the call: bytes that were written have their blocks.
        Err(Errno::OPNOTSUPP) => {
            let mut file = file;
            io::copy(&mut io::Read::take(io::repeat(0x55), bytes), &mut file)?;
            file.sync_all()
        }
        Err(errno) => Err(errno.into()),
    }
}

/// A record that an earlier daemon left in its space.
#[derive(Debug)]
pub(in crate::host) struct Kept {
    dir: Arc<PrivateDir>,
    name: String,
    record: Vec<u8>,
}

impl Kept {
    /// What was kept.
    pub fn record(&self) -> &[u8] {
        &self.record
    }

    /// The record is in the database, or of no use.
    pub fn remove(self) {
        if let Err(error) = self.dir.remove_if_present(&self.name) {
            tracing::warn!(%error, "disk space of an earlier daemon's hand-over is still set aside");
        }
    }
}

/// Records that an earlier daemon left.
pub(in crate::host) fn left(state_dir: &Path) -> Vec<Kept> {
    all(state_dir)
        .into_iter()
        .filter_map(|(dir, name)| Some(Kept { record: read(&dir, &name)?, dir, name }))
        .collect()
}

/// Removes what an earlier daemon left without a record in it.
pub(in crate::host) fn clear(state_dir: &Path) {
    for (dir, name) in all(state_dir) {
        if read(&dir, &name).is_none()
            && let Err(error) = dir.remove_if_present(&name)
        {
            tracing::warn!(%error, "disk space of an earlier daemon's hand-over is still set aside");
        }
    }
}

fn all(state_dir: &Path) -> Vec<(Arc<PrivateDir>, String)> {
    let at = state_dir.join(DIRECTORY);
    let opened =
        PrivateDir::open(&at).map_err(to_io).and_then(|dir| Ok((Arc::new(dir), std::fs::read_dir(&at)?)));
    match opened {
        Ok((dir, names)) => {
            let names = names.flatten().filter_map(|entry| entry.file_name().into_string().ok());
            names.map(|name| (Arc::clone(&dir), name)).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "disk space of an earlier daemon's hand-overs is still set aside");
            Vec::new()
        }
    }
}

/// A whole record; none where nothing was written, or not all of it.
fn read(dir: &PrivateDir, name: &str) -> Option<Vec<u8>> {
    let mut file = dir.open_file(name, OFlags::RDONLY).ok()?;
    let mut header = [0; HEADER];
    file.read_exact(&mut header).ok()?;
    let (magic, rest) = header.split_first_chunk::<8>()?;
    let (len, sum) = rest.split_first_chunk::<8>()?;
    let len = u64::from_le_bytes(*len);
    if *magic != MAGIC || len > LONGEST {
        return None;
    }
    let mut record = Vec::new();
    file.take(len).read_to_end(&mut record).ok()?;
    (record.len() as u64 == len && digest(&SHA256, &record).as_ref() == sum).then_some(record)
}

fn to_io(error: PrivateFileError) -> io::Error {
    match error {
        PrivateFileError::Io { source, .. } => source,
        PrivateFileError::Missing { .. } => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]
mod tests {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};

    use super::*;

    fn state_dir() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::DirBuilder::new().mode(0o700).create(&state).unwrap();
        (dir, state)
    }

    fn files(state: &Path) -> Vec<std::fs::Metadata> {
        let all = std::fs::read_dir(state.join(DIRECTORY)).unwrap();
        all.map(|e| e.unwrap().metadata().unwrap()).collect()
    }

    #[test]
    fn a_reserve_has_its_blocks_until_it_is_released_or_dropped() {
        let (_dir, state) = state_dir();
        let session = Uuid::now_v7();
        let first = Reserve::take(&state, session, 100_000).unwrap();
        let second = Reserve::take(&state, session, 0).unwrap();
        let held = files(&state);
        assert_eq!(held.len(), 2);
        for file in &held {
            assert!(file.blocks() * 512 >= FIXED + GROWTH, "{file:?}");
            assert_eq!(file.mode() & 0o777, 0o600);
        }
        first.release();
        first.release();
        assert_eq!(files(&state).len(), 1);
        drop((first, second));
        assert!(files(&state).is_empty());
    }

    #[test]
    fn to_try_a_reserve_out_keeps_nothing() {
        let (_dir, state) = state_dir();
        Reserve::try_out(&state, Uuid::now_v7(), 100_000).unwrap();
        assert!(files(&state).is_empty());
        assert!(Reserve::try_out(&state.join("nowhere"), Uuid::now_v7(), 0).is_err());
    }

    #[test]
    fn what_an_earlier_daemon_left_is_removed_at_the_start() {
        let (_dir, state) = state_dir();
        clear(&state);
        std::mem::forget(Reserve::take(&state, Uuid::now_v7(), 0).unwrap());
        assert_eq!(files(&state).len(), 1);
        clear(&state);
        assert!(files(&state).is_empty());
    }

    #[test]
    fn a_record_is_found_whole_by_the_next_daemon_or_not_at_all() {
        let (_dir, state) = state_dir();
        let space = Reserve::take(&state, Uuid::now_v7(), 0).unwrap();
        space.keep(b"what became of it").unwrap();
        let before = files(&state)[0].blocks();
        // A daemon that goes leaves it; one that comes does not clear it away.
        drop(space);
        clear(&state);
        let kept = left(&state);
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].record(), b"what became of it");
        assert_eq!(files(&state)[0].blocks(), before, "the record took room of its own");
        let at = state.join(DIRECTORY).join(&kept[0].name);
        let mut torn = std::fs::read(&at).unwrap();
        torn[HEADER + 3] ^= 1;
        std::fs::write(&at, torn).unwrap();
        assert!(left(&state).is_empty());
        clear(&state);
        assert!(files(&state).is_empty());
    }

    #[test]
    fn a_record_that_is_longer_than_its_space_is_refused() {
        let (_dir, state) = state_dir();
        let space = Reserve::take(&state, Uuid::now_v7(), 0).unwrap();
        let long = "x".repeat((FIXED + GROWTH) as usize);
        assert_eq!(space.keep(long.as_bytes()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        drop(space);
        assert!(files(&state).is_empty());
    }
}
