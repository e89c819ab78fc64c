//! File systems of their own for state directories, which can be filled.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system, unmounted in the end.
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Mounts one of `kib` KiB at `at`, which it makes.
    ///
    /// # Panics
    /// When that does not work.
    pub fn mount(at: &Path, kib: u32) -> Self {
        std::fs::create_dir(at).unwrap();
        let options = format!("size={kib}k,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        assert!(mounted.unwrap().success(), "tmpfs cannot be mounted at {}", at.display());
        Self { at: at.to_owned() }
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    /// Takes all the room there is but `left` bytes, or what there was if that is less.
    ///
    /// # Panics
    /// When no file can be made in it.
    pub fn fill(&self, left: u64) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        let block = [0x5a; 4096];
        while file.write_all(&block).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(left)).unwrap();
    }

    /// Gives it back, if it was taken.
    ///
    /// # Panics
    /// When that does not work.
    pub fn free(&self) {
        match std::fs::remove_file(self.filler()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("{}: {e}", self.at.display()),
            _ => {}
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Whether file systems can be mounted here.
pub fn can_mount() -> bool {
    rustix::process::geteuid().is_root()
}

/// The same; says so loudly when not, in a line that the test runner counts.
pub fn mounts() -> bool {
    if !can_mount() {
        println!("SKIPPED (not root: no file system can be mounted): this test ran nothing");
    }
    can_mount()
}
