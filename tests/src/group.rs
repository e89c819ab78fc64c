//! A memory control group of its own around a process, where one can be made.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A control group with a memory limit; the group goes when this does, its processes move to the one above.
#[derive(Debug)]
pub struct MemoryGroup {
    dir: PathBuf,
    limit: &'static str,
}

impl MemoryGroup {
    /// One of `bytes`; `None`, said loudly in a line that the test runner counts, where nobody may make one.
    pub fn new(bytes: u64) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("mirrorvm-t{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        for (root, file) in hierarchies() {
            let group = Self { dir: root.join(&name), limit: file };
            if fs::create_dir(&group.dir).is_ok() && group.set(bytes).is_ok() {
                return Some(group);
            }
        }
        println!("SKIPPED (no memory control group can be made): this test ran nothing");
        None
    }

    fn set(&self, bytes: u64) -> std::io::Result<()> {
        fs::write(self.dir.join(self.limit), bytes.to_string())
    }

    /// The file that has the limit.
    pub const fn limit_file(&self) -> &'static str {
        self.limit
    }

    /// Puts a daemon into it, with the process that starts QEMUs for it; what they start later is in it, too.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn take(&self, pid: u32) {
        for pid in crate::launcher(pid).into_iter().chain([pid]) {
            fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    /// The most bytes that were ever used in it; zero where the kernel does not say.
    pub fn peak(&self) -> u64 {
        let read = |file| fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok();
        ["memory.peak", "memory.max_usage_in_bytes"].into_iter().find_map(read).unwrap_or(0)
    }

    /// Other bytes.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn resize(&self, bytes: u64) {
        self.set(bytes).unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let left = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        if let Some(above) = self.dir.parent() {
            for pid in left.lines() {
                let _ = fs::write(above.join("cgroup.procs"), pid);
            }
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Where groups that bound memory are, and what their limits are called: roots of either version.
fn hierarchies() -> Vec<(PathBuf, &'static str)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let (Some(mount), kind) = (head.split(' ').nth(4), tail.split(' ').collect::<Vec<_>>()) else {
            continue;
        };
        let mount = Path::new(mount);
        let named = |text: &str| text.split([',', ' ', '\n']).any(|word| word == "memory");
        match kind.as_slice() {
            ["cgroup2", ..] => {
                // Groups have the controller when the one above passes it on.
                let passed = fs::read_to_string(mount.join("cgroup.subtree_control"));
                if passed.is_ok_and(|text| named(&text)) {
                    found.push((mount.to_owned(), "memory.max"));
                }
            }
            ["cgroup", _, options] if named(options) => {
                found.push((mount.to_owned(), "memory.limit_in_bytes"))
            }
            _ => {}
        }
    }
    found
}
