//! Files of the host that a guest's definition names: a kernel, an initial RAM disk.
//!
//! Owns: from which directories such a file may come, opening it there and nowhere else, its digest, and the
//! sealed copy that a guest's process gets instead of the name. Must not know: drivers, requests, records.
//!
//! Whoever defines guests can read back what their guests are booted with: a name that the daemon opened for
//! them would be a way to read every file that the daemon can read. So the administrator says which
//! directories hold images, the kernel keeps every step of the look-up beneath them, and nothing opens the
//! name a second time: what was looked at is what is copied.

mod directories;
mod sealed;

pub use directories::{DirectoryError, FileRefusal, ImageDirectories, ImageFile, VolumeFile};
pub(crate) use sealed::is_sealed;
pub use sealed::{BootFile, SealedFile};

/// What a guest boots from, as it was when the guest was defined: it is started with these bytes and no
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel, of a guest that is not booted from a disk.
    pub kernel: Option<BootFile>,
    /// The initial RAM disk, if there is one.
    pub initrd: Option<BootFile>,
    /// The firmware's code, where it is not QEMU's own.
    pub firmware: Option<BootFile>,
}

impl BootFiles {
    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        let Self { kernel, initrd, firmware } = self;
        [kernel, initrd, firmware].into_iter().flatten().map(|file| file.bytes).fold(0, u64::saturating_add)
    }

    /// The first of a definition's fields whose file holds something else in `other`, with both contents.
    pub fn first_difference(
        &self,
        other: &Self,
    ) -> Option<(&'static str, Option<BootFile>, Option<BootFile>)> {
        let fields = [
            ("kernel", self.kernel, other.kernel),
            ("initrd", self.initrd, other.initrd),
            ("firmware/code", self.firmware, other.firmware),
        ];
        fields.into_iter().find(|(_, ours, theirs)| ours != theirs)
    }
}
