//! Owns the file that tells of a keeper and its QEMU while both live. Must not know who reads it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use serde::Serialize;

use crate::qemu::child::RECORD;
use crate::qemu::wire::Process;

const UNFINISHED: &str = "keeper.json.new";

/// What the file says.
#[derive(Serialize)]
struct Told {
    guest: String,
    memory_bytes: u64,
    keeper: Process,
    qemu: Process,
}

/// The file, where there is one.
pub(super) struct Record(Option<OwnedFd>);

impl Record {
    /// Writes it, whole or not at all. A guest does not end for want of it.
    pub fn write(
        directory: Option<OwnedFd>,
        guest: Option<String>,
        keeper: Process,
        qemu: Process,
        memory_bytes: u64,
    ) -> Self {
        let written = directory.as_ref().zip(guest).map(|(directory, guest)| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // Of a keeper that was killed while it wrote.
            let _ = unlinkat(directory, UNFINISHED, AtFlags::empty());
            let file = openat(directory, UNFINISHED, flags, Mode::RUSR | Mode::WUSR)?;
            let text = serde_json::to_vec(&Told { guest, memory_bytes, keeper, qemu })?;
            File::from(file).write_all(&text)?;
            renameat(directory, UNFINISHED, directory, RECORD)?;
            std::io::Result::Ok(())
        });
        if let (Some(Err(_)), Some(directory)) = (written, &directory) {
            let _ = unlinkat(directory, UNFINISHED, AtFlags::empty());
        }
        Self(directory)
    }

    /// Takes it away.
    pub fn remove(&self) {
        if let Some(directory) = &self.0 {
            let _ = unlinkat(directory, RECORD, AtFlags::empty());
        }
    }
}
