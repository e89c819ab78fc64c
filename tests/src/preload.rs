//! A library that daemons are started with, which moves their wall clock and lets their syncs fail.
//!
//! Owns: building it, the pages that it goes by. Must not know: daemons.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;

/// The library.
pub struct Preload {
    library: PathBuf,
    dir: tempfile::TempDir,
}

impl Preload {
    /// Builds it; says loudly when it cannot be.
    pub fn build() -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("mirrorvm-preload").tempdir().unwrap();
        let source = crate::repository().join("tests/src/campaign/shim.c");
        let library = dir.path().join("shim.so");
        let built =
            Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        if built.is_ok_and(|s| s.success()) {
            return Some(Self { library, dir });
        }
        println!("SKIPPED (no cc): faults of clocks and syncs");
        None
    }

    /// A page for one daemon.
    pub fn page(&self, name: &str) -> Page {
        let page = self.dir.path().join(format!("page-{name}"));
        std::fs::write(&page, [0; 24]).unwrap();
        Page(page)
    }

    /// What a daemon that goes by `page` has in its environment.
    pub fn environment(&self, page: &Page) -> [(&'static str, String); 2] {
        let text = |path: &PathBuf| path.display().to_string();
        [("LD_PRELOAD", text(&self.library)), ("MIRRORVM_CAMPAIGN_PAGE", text(&page.0))]
    }
}

/// What one daemon's library goes by.
pub struct Page(PathBuf);

impl Page {
    /// Sets the daemon's wall clock so far ahead of the machine's.
    pub fn set_clock(&self, seconds: i64) {
        self.set(0, seconds);
    }

    /// Lets its syncs fail, or not.
    pub fn fail_syncs(&self, fail: bool) {
        self.set(1, fail.into());
    }

    /// Syncs that failed so far.
    pub fn failed_syncs(&self) -> i64 {
        let mut bytes = [0; 8];
        File::open(&self.0).unwrap().read_exact_at(&mut bytes, 16).unwrap();
        i64::from_ne_bytes(bytes)
    }

    fn set(&self, word: u64, value: i64) {
        let file = File::options().write(true).open(&self.0).unwrap();
        file.write_all_at(&value.to_ne_bytes(), word * 8).unwrap();
    }
}
