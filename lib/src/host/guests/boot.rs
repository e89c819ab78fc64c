//! Files that a guest boots from: looked at when it is defined, copied when it is started.
//!
//! Owns: which fields name them, how large they may be, that a start uses what the definition was checked
//! with. Must not know: how a file is opened (that is [`crate::boot_files`]).

use std::path::Path;

use crate::boot_files::{BootFile, BootFiles, FileRefusal, ImageFile, SealedFile};
use crate::guest::MachineError;
use crate::host::inner::Inner;
use crate::host::{AccelChoice, DriverSpec, FieldError, GuestRecord, GuestSpec, HostError};
use crate::qemu::{self, pick_accel};

/// A kernel is loaded above this; an initial RAM disk is, too.
const BELOW_KERNEL: u64 = 1 << 20;
/// At the end of the guest's memory QEMU keeps this much for ACPI's tables.
const TABLES: u64 = 160 << 10;

impl Inner {
    /// What a definition's files hold; `None` for a driver that reads none. The files are opened here, so
    /// that a definition that is taken named files that could be read.
    pub fn boot_facts(&self, spec: &GuestSpec) -> Result<Option<BootFiles>, HostError> {
        let DriverSpec::Qemu { kernel, initrd, .. } = &spec.driver else { return Ok(None) };
        let room = room_of(spec);
        let facts = |path: &Path, room| self.image(path)?.facts(room);
        let kernel = facts(kernel, room).map_err(|refusal| ("kernel", refusal));
        // Both have to lie in the guest's memory at once, beside what is QEMU's there.
        let kept = kernel.as_ref().map_or(0, |k| k.bytes).saturating_add(BELOW_KERNEL + TABLES);
        let left = room.saturating_sub(kept);
        let initrd = initrd.as_deref().map(|path| facts(path, left)).transpose();
        match (kernel, initrd.map_err(|refusal| ("initrd", refusal))) {
            (Ok(kernel), Ok(initrd)) => Ok(Some(BootFiles { kernel, initrd })),
            (kernel, initrd) => {
                let wrong = [kernel.err(), initrd.err()].into_iter().flatten();
                let error = |(field, refusal): (&str, FileRefusal)| {
                    FieldError::new(format!("/driver/{field}"), refusal.code(), refusal.to_string())
                };
                Err(HostError::Invalid(wrong.map(error).collect()))
            }
        }
    }

    /// Sealed copies of a guest's files, which must hold what they held when the guest was defined.
    pub fn boot_copies(
        &self,
        record: &GuestRecord,
    ) -> Result<(SealedFile, Option<SealedFile>), MachineError> {
        let DriverSpec::Qemu { kernel, initrd, .. } = &record.spec.driver else {
            return Err(MachineError::Unsupported { what: "boot from files" });
        };
        let room = room_of(&record.spec);
        let copy = |field: &'static str, path: &Path, pinned: Option<BootFile>| {
            let copied = self.image(path).and_then(|file| file.copy(field, room));
            let copied = copied.map_err(|refusal| MachineError::BootFile { field, refusal })?;
            match pinned {
                Some(pinned) if pinned != copied.facts() => Err(MachineError::BootFileChanged { field }),
                Some(_) | None => Ok(copied),
            }
        };
        let kernel = copy("kernel", kernel, record.boot.map(|b| b.kernel))?;
        let pinned = record.boot.and_then(|b| b.initrd);
        let initrd = initrd.as_deref().map(|path| copy("initrd", path, pinned)).transpose()?;
        Ok((kernel, initrd))
    }

    fn image(&self, path: &Path) -> Result<ImageFile, FileRefusal> {
        self.image_directories.file(path)
    }

    /// How a QEMU of this host runs instructions.
    pub fn choose_accel(&self, choice: AccelChoice) -> qemu::Accel {
        match choice {
            AccelChoice::Auto => pick_accel(self.qemu_users.is_some()).0,
            AccelChoice::Kvm => qemu::Accel::Kvm,
            AccelChoice::Tcg => qemu::Accel::Tcg,
        }
    }
}

/// Bytes of the guest's memory: more cannot be loaded into it.
fn room_of(spec: &GuestSpec) -> u64 {
    spec.blocks.iter().map(|b| b.size_bytes).fold(0, u64::saturating_add)
}
