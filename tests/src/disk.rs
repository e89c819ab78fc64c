//! File systems of their own for state directories, which can be filled.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system, unmounted in the end.
#[derive(Default)]
pub struct SmallDisk {
    at: Option<PathBuf>,
}

impl SmallDisk {
    /// Mounts one of `kib` KiB at `at`, which it makes.
    ///
    /// # Panics
    /// When that does not work.
    pub fn mount(&mut self, at: &Path, kib: u32) {
        std::fs::create_dir(at).unwrap();
        let options = format!("size={kib}k,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        assert!(mounted.unwrap().success(), "tmpfs cannot be mounted at {}", at.display());
        self.at = Some(at.to_owned());
    }

    fn filler(&self) -> PathBuf {
        self.at.as_ref().unwrap().join("filler")
    }

    /// Takes all the room there is but `left` bytes.
    ///
    /// # Panics
    /// When the file system is not mounted.
    pub fn fill(&self, left: u64) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        let block = [0x5a; 4096];
        while file.write_all(&block).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len - left).unwrap();
    }

    /// Gives it back.
    ///
    /// # Panics
    /// When it was not taken.
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(at) = &self.at {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
    }
}

/// Whether file systems can be mounted here; says so loudly when not, in a line that the test runner counts.
pub fn mounts() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED (not root: no file system can be mounted): this test ran nothing");
    }
    root
}
