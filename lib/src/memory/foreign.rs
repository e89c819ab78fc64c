//! Memory files that others bring: whether a guest's RAM can lie on one.
//!
//! Owns: what is asked of such a file before it is mapped. Must not know: guests, who brings it.
//!
//! A file that shrinks under a mapping ends this process at its next touch (`SIGBUS`), and a file that two
//! blocks share makes a page of one a page of the other. Both are ruled out here; whoever has the file may
//! still write its pages, as a guest may, and is met as one: by volatile copies.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;

use super::{Backing, MemoryError};
use crate::addr::PAGE_2M;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS: u64 = 0x9584_58f6;

/// Why a file cannot be a guest's RAM.
#[derive(Debug, thiserror::Error)]
pub enum BadFile {
    /// It is no memory file, and so cannot be kept from shrinking.
    #[error("the descriptor is none of memfd_create")]
    NoMemory,
    /// It has another size than the block.
    #[error("the file has {found} bytes and the block {wanted}; ftruncate it before it is sealed")]
    Size {
        /// The block's.
        wanted: u64,
        /// The file's.
        found: u64,
    },
    /// It may still shrink or grow, and cannot be kept from it any more.
    #[error(
        "the file can change its size and is sealed against further seals; add F_SEAL_SHRINK and F_SEAL_GROW, or make it \
         with MFD_ALLOW_SEALING"
    )]
    NotSealed,
    /// It is not open for reading and writing, or is sealed against being written.
    #[error(
        "the file cannot be mapped for writing: open it O_RDWR, without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE"
    )]
    ReadOnly,
    /// It lies on huge pages of another size than 2 MiB.
    #[error("the file lies on huge pages of {page} bytes; only those of {PAGE_2M} can be used")]
    HugePages {
        /// Bytes of one.
        page: u64,
    },
    /// Another block lies on the same file.
    #[error("the file is also that of block {other:?}")]
    Shared {
        /// That block.
        other: String,
    },
    /// The system says nothing of it.
    #[error("{what} failed")]
    System {
        /// The call.
        what: &'static str,
        /// How.
        #[source]
        source: Errno,
    },
}

/// Why RAM cannot be made of the files that were brought.
#[derive(Debug, thiserror::Error)]
pub enum ForeignRamError {
    /// There is not one for each of the guest's own blocks.
    #[error("{given} files are brought for {wanted} RAM blocks")]
    Count {
        /// The guest's own blocks.
        wanted: usize,
        /// Files.
        given: usize,
    },
    /// One of them cannot be used.
    #[error("RAM block {block:?}: {fault}")]
    File {
        /// The block that it was for.
        block: String,
        /// Why not.
        fault: BadFile,
    },
    /// The memory that is to lie beside them, or mapping them.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A file that was found fit.
pub(super) struct Fit {
    pub file: File,
    pub backing: Backing,
    /// Device and inode: which file it is.
    pub identity: (u64, u64),
}

/// Looks whether a block of `bytes` can lie on a file, and keeps the file from changing its size.
pub(super) fn fit(fd: OwnedFd, bytes: u64) -> Result<Fit, BadFile> {
    let system = |what| move |source| BadFile::System { what, source };
    let seals = match rustix::fs::fcntl_get_seals(&fd) {
        Ok(seals) => seals,
        Err(Errno::INVAL) => return Err(BadFile::NoMemory),
        Err(source) => return Err(BadFile::System { what: "fcntl(F_GET_SEALS)", source }),
    };
    let access = rustix::fs::fcntl_getfl(&fd).map_err(system("fcntl(F_GETFL)"))? & OFlags::RWMODE;
    if access != OFlags::RDWR || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(BadFile::ReadOnly);
    }
    let fixed = SealFlags::SHRINK | SealFlags::GROW;
    // Before its size is believed.
    if !seals.contains(fixed) && rustix::fs::fcntl_add_seals(&fd, fixed).is_err() {
        return Err(BadFile::NotSealed);
    }
    let file = File::from(fd);
    let meta = file.metadata().map_err(|e| BadFile::System {
        what: "fstat",
        source: Errno::from_io_error(&e).unwrap_or(Errno::IO),
    })?;
    if meta.len() != bytes {
        return Err(BadFile::Size { wanted: bytes, found: meta.len() });
    }
    let on = rustix::fs::fstatfs(&file).map_err(system("fstatfs"))?;
    let backing = if on.f_type as u64 == HUGETLBFS { Backing::Hugetlb } else { Backing::Memfd };
    let page = on.f_bsize as u64;
    if backing == Backing::Hugetlb && page != PAGE_2M {
        return Err(BadFile::HugePages { page });
    }
    Ok(Fit { file, backing, identity: (meta.dev(), meta.ino()) })
}
