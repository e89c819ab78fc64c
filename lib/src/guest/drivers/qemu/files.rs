//! Files of the host that a guest of the driver is made from.
//!
//! Owns: which there are, looking at them when a guest is defined, and opening them when it is started. Must
//! not know: what QEMU does with them.
//!
//! What a guest boots from is copied and pinned by digest; disks and firmware variables are opened, and
//! handed to QEMU alone: whoever keeps a descriptor keeps the lock on the image.

use std::borrow::Cow;
use std::path::Path;

use uuid::Uuid;

use super::definition::QemuGuest;
use super::seed::seed;
use crate::boot_files::{BootFile, BootFiles, FileRefusal, ImageDirectories, SealedFile};
use crate::guest::MachineError;
use crate::qemu::machine::{Disk, DiskFiles, Firmware, Passed};
use crate::reading::FieldError;

/// A kernel is loaded above this; an initial RAM disk is, too.
const BELOW_KERNEL: u64 = 1 << 20;
/// At the end of the guest's memory QEMU keeps this much for ACPI's tables.
const TABLES: u64 = 160 << 10;
/// Firmware and its variables lie below 4 GiB together.
const FIRMWARE_MAX: u64 = 16 << 20;

/// What a definition's files hold that the guest boots from. Its disks are looked at, too.
pub(super) fn looked_at(
    guest: &QemuGuest,
    images: &ImageDirectories,
    room: u64,
) -> Result<Option<BootFiles>, Vec<FieldError>> {
    let mut errors = Vec::new();
    let facts = |path: &str, room| images.file(Path::new(path))?.facts(room);
    let mut note = |at: String, refusal: FileRefusal| {
        errors.push(FieldError::new(format!("/driver/{at}"), refusal.code(), refusal.to_string()));
    };
    let mut boot = BootFiles { kernel: None, initrd: None, firmware: None };
    let noted = |result: Option<Result<BootFile, FileRefusal>>,
                 at: &str,
                 note: &mut dyn FnMut(String, FileRefusal)| {
        result.and_then(|r| r.map_err(|refusal| note(at.to_owned(), refusal)).ok())
    };
    boot.kernel = noted(guest.kernel.as_deref().map(|path| facts(path, room)), "kernel", &mut note);
    // Both have to lie in the guest's memory at once, beside what is QEMU's there.
    let kept = boot.kernel.map_or(0, |k| k.bytes).saturating_add(BELOW_KERNEL + TABLES);
    let left = room.saturating_sub(kept);
    boot.initrd = noted(guest.initrd.as_deref().map(|path| facts(path, left)), "initrd", &mut note);
    if let Some(firmware) = &guest.machine.firmware {
        boot.firmware = noted(Some(facts(&firmware.code, FIRMWARE_MAX)), "firmware/code", &mut note);
        if let Err((at, refusal)) = nvram_there(firmware, images) {
            note(at.to_owned(), refusal);
        }
    }
    for (i, disk) in guest.machine.disks.iter().enumerate() {
        if let Err((field, refusal)) = disk_files(disk, images) {
            note(format!("disks/{i}/{field}"), refusal);
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let reads = boot.kernel.is_some() || boot.firmware.is_some();
    Ok(reads.then_some(boot))
}

/// Whether a guest's variables are there, or can be made.
fn nvram_there(firmware: &Firmware, images: &ImageDirectories) -> Result<(), (&'static str, FileRefusal)> {
    match (images.volume(Path::new(&firmware.nvram)), &firmware.template) {
        (Ok(_), _) => Ok(()),
        (Err(FileRefusal::Missing), Some(template)) => {
            images.file(Path::new(template)).map(drop).map_err(|refusal| ("firmware/template", refusal))
        }
        (Err(refusal), _) => Err(("firmware/nvram", refusal)),
    }
}

fn disk_files(disk: &Disk, images: &ImageDirectories) -> Result<DiskFiles, (&'static str, FileRefusal)> {
    let mut files = DiskFiles::default();
    let at = |field| move |refusal| (field, refusal);
    if let Some(path) = &disk.path {
        if disk.is_written() {
            let volume = images.volume(Path::new(path)).map_err(at("path"))?;
            (files.write, files.read) = (Some(volume.write), Some(volume.read));
        } else {
            files.read = Some(images.file(Path::new(path)).map_err(at("path"))?.into_fd());
        }
    }
    if let Some(backing) = &disk.backing {
        files.backing = Some(images.file(Path::new(&backing.path)).map_err(at("backing/path"))?.into_fd());
    }
    Ok(files)
}

/// A guest that is to be made from its files.
pub(super) struct Making<'a> {
    pub guest: &'a QemuGuest,
    pub id: Uuid,
    pub name: &'a str,
    pub images: &'a ImageDirectories,
    /// What the files held when the guest was defined.
    pub pinned: Option<&'a BootFiles>,
    /// Bytes of the guest's memory.
    pub room: u64,
    /// Whether it boots: a guest that arrives has its variables.
    pub boots: bool,
}

impl Making<'_> {
    /// Opens or copies everything that the machine is made from. What it boots from must hold what it held
    /// when the guest was defined.
    pub fn files(&self) -> Result<Passed, MachineError> {
        let Self { guest, pinned, .. } = *self;
        let of = |pinned: fn(&BootFiles) -> Option<BootFile>| self.pinned.and_then(pinned);
        let kernel = self.copy("kernel", guest.kernel.as_deref(), of(|b| b.kernel), self.room)?;
        let initrd = self.copy("initrd", guest.initrd.as_deref(), of(|b| b.initrd), self.room)?;
        let firmware = guest.machine.firmware.as_ref();
        let code = firmware.map(|f| f.code.as_str());
        let code = self.copy("firmware/code", code, pinned.and_then(|b| b.firmware), FIRMWARE_MAX)?;
        let nvram = firmware.map(|f| self.nvram(f)).transpose()?;
        let disks = guest.machine.disks.iter().enumerate().map(|(i, disk)| {
            disk_files(disk, self.images).map_err(|(field, refusal)| MachineError::BootFile {
                field: Cow::Owned(format!("disks/{i}/{field}")),
                refusal,
            })
        });
        let disks = disks.collect::<Result<_, _>>()?;
        let seed = guest.machine.cloud_init.as_ref().map(|c| seed(c, self.id, self.name)).transpose();
        let seed = seed.map_err(MachineError::Thread)?.map(SealedFile::into_fd);
        Ok(Passed { kernel, initrd, code, nvram, disks, seed, agent: None })
    }

    fn copy(
        &self,
        field: &'static str,
        path: Option<&str>,
        pinned: Option<BootFile>,
        room: u64,
    ) -> Result<Option<std::os::fd::OwnedFd>, MachineError> {
        let Some(path) = path else { return Ok(None) };
        let copied = self.images.file(Path::new(path)).and_then(|file| file.copy(field, room));
        let copied = copied.map_err(|refusal| MachineError::BootFile { field: field.into(), refusal })?;
        match pinned {
            Some(pinned) if pinned != copied.facts() => Err(MachineError::BootFileChanged { field }),
            Some(_) | None => Ok(Some(copied.into_fd())),
        }
    }

    fn nvram(&self, firmware: &Firmware) -> Result<DiskFiles, MachineError> {
        let failed =
            |field: &'static str| move |refusal| MachineError::BootFile { field: field.into(), refusal };
        let path = Path::new(&firmware.nvram);
        let found = match (self.images.volume(path), &firmware.template) {
            (Err(FileRefusal::Missing), Some(template)) if self.boots => {
                let template = self.images.file(Path::new(template)).map_err(failed("firmware/template"))?;
                self.images.make_volume(path, &template).map_err(failed("firmware/nvram"))?;
                self.images.volume(path)
            }
            (found, _) => found,
        };
        let found = found.map_err(failed("firmware/nvram"))?;
        Ok(DiskFiles { write: Some(found.write), read: Some(found.read), backing: None })
    }
}
