//! Owns finding out whether the kernel killed a process for want of memory: by what it counts for the
//! process's cgroup. Must not know what is done about it.
//!
//! The count is the cgroup's, not the process's: of two processes of one cgroup that end by `SIGKILL`, one
//! for want of memory and one by somebody's hand, the second is taken for another of the first kind, unless
//! it started later.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Longest of the kernel's files that are read here.
const BYTES_MAX: usize = 4096;

/// Whether kills for want of memory can be told apart from others on a host, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OomKills {
    /// By `memory.oom_control` of cgroup version 1.
    CgroupV1,
    /// By `memory.events` of cgroup version 2.
    CgroupV2,
    /// They cannot.
    Unknown,
}

impl OomKills {
    /// Its name in the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CgroupV1 => "cgroup_v1",
            Self::CgroupV2 => "cgroup_v2",
            Self::Unknown => "unknown",
        }
    }

    /// What holds for processes that this one starts.
    #[must_use]
    pub fn here() -> Self {
        Kills::of(std::process::id()).map_or(Self::Unknown, |kills| kills.by)
    }
}

/// What the kernel counts for a process's cgroup.
pub(super) struct Kills {
    by: OomKills,
    file: File,
    before: u64,
}

impl Kills {
    /// Begins to look; `None` where nothing is counted, or it cannot be seen.
    pub fn of(pid: u32) -> Option<Self> {
        let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let (by, path) = place(&cgroups, &mounts)?;
        let file = File::open(path).ok()?;
        let before = count(&file)?;
        Some(Self { by, file, before })
    }

    /// Whether one was killed since; `None`: the cgroup is gone, or is not told of any more.
    pub fn grew(&self) -> Option<bool> {
        count(&self.file).map(|now| now > self.before)
    }
}

fn count(file: &File) -> Option<u64> {
    let mut text = [0; BYTES_MAX];
    let bytes = file.read_at(&mut text, 0).ok()?;
    counted(std::str::from_utf8(text.get(..bytes)?).ok()?)
}

/// The count in either version's file.
fn counted(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// The file of a process's cgroup that has the count.
fn place(cgroups: &str, mounts: &str) -> Option<(OomKills, PathBuf)> {
    let mut second = None;
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if controllers.split(',').any(|c| c == "memory") {
            return directory(path, mounts, true).map(|d| (OomKills::CgroupV1, d.join("memory.oom_control")));
        }
        if number == "0" && controllers.is_empty() {
            second = Some(path);
        }
    }
    directory(second?, mounts, false).map(|d| (OomKills::CgroupV2, d.join("memory.events")))
}

/// Where a cgroup is seen.
fn directory(path: &str, mounts: &str, first_version: bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let is_it = if first_version {
            kind == "cgroup" && options.split(',').any(|o| o == "memory")
        } else {
            kind == "cgroup2"
        };
        if !is_it {
            return None;
        }
        let below = Path::new(path).strip_prefix(root).ok()?;
        // One that is above what is seen here has dots in its path.
        let plain = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        plain.then(|| Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      36 32 0:33 /outer /sys/fs/cgroup/memory rw,nosuid shared:1 - cgroup cgroup rw,memory\n\
                      37 32 0:34 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn found(cgroups: &str, mounts: &str) -> Option<(OomKills, String)> {
        place(cgroups, mounts).map(|(by, path)| (by, path.display().to_string()))
    }

    #[test]
    fn a_process_s_count_is_found_in_either_version() {
        assert_eq!(
            found("0::/system.slice/mirrorvmd.service\n", V2),
            Some((OomKills::CgroupV2, "/sys/fs/cgroup/system.slice/mirrorvmd.service/memory.events".into()))
        );
        assert_eq!(found("0::/\n", V2), Some((OomKills::CgroupV2, "/sys/fs/cgroup/memory.events".into())));
        assert_eq!(
            found("4:memory:/outer/a:b\n2:cpu:/\n0::/x\n", V1),
            Some((OomKills::CgroupV1, "/sys/fs/cgroup/memory/a:b/memory.oom_control".into()))
        );
        for (cgroups, mounts) in [
            ("4:memory:/elsewhere\n0::/x\n", V1),
            ("4:memory:/outer/../..\n", V1),
            ("0::/../x\n", V2),
            ("0::/x\n", ""),
            ("2:cpu:/\n", V1),
            ("", V2),
            ("nonsense", "nonsense - - - nonsense"),
        ] {
            assert_eq!(found(cgroups, mounts), None, "{cgroups:?}");
        }
    }

    #[test]
    fn the_count_is_read_from_either_version_s_file() {
        assert_eq!(counted("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(counted("low 0\nhigh 0\nmax 7\noom 1\noom_kill 12\noom_group_kill 0\n"), Some(12));
        assert_eq!(counted("oom_kill_disable 0\nunder_oom 0\n"), None);
        assert_eq!(counted("oom_kill x\n"), None);
    }
}
