//! How much memory the kernel would give this process now, by everything that bounds it.
//!
//! Owns: reading the host's figures, the commit limit and the control groups of either version, up to their
//! root; which of them is the narrowest. Must not know: what has been promised to whom. Reads files of a
//! tree, so that a test can bring one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Backing;
use crate::addr::PAGE_2M;

/// What a control group of version 1 says that has no limit; everything from here on is none.
const UNLIMITED: u64 = 1 << 62;

/// A limit on the memory that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// What the host can give without swapping.
    Host,
    /// What may be committed where the kernel does not overcommit (`vm.overcommit_memory` 2).
    Commit,
    /// A control group: this process's, or one above it.
    Group {
        /// The group, as `/proc/PID/cgroup` names it.
        group: Arc<str>,
        /// The group's file that has the limit.
        file: &'static str,
    },
    /// Reserved huge pages that nobody has.
    HugePages,
    /// What the process may map.
    AddressSpace,
}

impl Bound {
    /// A word for programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Commit => "commit_limit",
            Self::Group { .. } => "control_group",
            Self::HugePages => "huge_pages",
            Self::AddressSpace => "address_space",
        }
    }

    /// What makes room under it.
    pub const fn way_on(&self) -> &'static str {
        match self {
            Self::Host => "stop or migrate a guest, or use a host with more memory",
            Self::Commit => "stop or migrate a guest, or raise vm.overcommit_ratio",
            Self::Group { .. } => "stop or migrate a guest, or raise that limit",
            Self::HugePages => "raise vm.nr_hugepages, or define the guest with another backing",
            Self::AddressSpace => {
                "stop or migrate a guest, or raise the daemon's address space limit (ulimit -v)"
            }
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the memory of this host that can be had without swapping"),
            Self::Commit => f.write_str("the commit limit of this host (vm.overcommit_memory is 2)"),
            // Whoever may make groups may call them anything.
            Self::Group { group, file } => write!(f, "{file} of the control group {}", group.escape_debug()),
            Self::HugePages => {
                f.write_str("the free reserved huge pages of 2 MiB of this host (vm.nr_hugepages)")
            }
            Self::AddressSpace => f.write_str("the address space that the daemon may have"),
        }
    }
}

/// What one bound leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that it leaves.
    pub bytes: u64,
    /// Bytes that it would leave if nothing were used.
    pub whole: u64,
    /// Whose bound it is.
    pub bound: Bound,
}

/// A version of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Names of a kind of limit's files, by version.
#[derive(Clone, Copy, Debug)]
struct Files {
    limits: &'static [&'static str],
    usage: &'static str,
}

const V1_USAGE: &str = "memory.usage_in_bytes";
const MEMORY: [(Version, Files); 2] = [
    (Version::Two, Files { limits: &["memory.max", "memory.high"], usage: "memory.current" }),
    (Version::One, Files { limits: &["memory.limit_in_bytes"], usage: V1_USAGE }),
];
const HUGE: [(Version, Files); 4] = [
    (Version::Two, Files { limits: &["hugetlb.2MB.max"], usage: "hugetlb.2MB.current" }),
    (Version::Two, Files { limits: &["hugetlb.2MB.rsvd.max"], usage: "hugetlb.2MB.rsvd.current" }),
    (Version::One, Files { limits: &["hugetlb.2MB.limit_in_bytes"], usage: "hugetlb.2MB.usage_in_bytes" }),
    (
        Version::One,
        Files { limits: &["hugetlb.2MB.rsvd.limit_in_bytes"], usage: "hugetlb.2MB.rsvd.usage_in_bytes" },
    ),
];

/// Where the kernel's files are: `/`, or a copy of them.
#[derive(Clone, Debug)]
pub(super) struct Tree(PathBuf);

impl Tree {
    /// The files of this host.
    pub fn host() -> Self {
        Self(PathBuf::from("/"))
    }

    /// The limits of a machine whose files are below `root`.
    #[cfg(test)]
    pub fn below(root: &Path) -> Self {
        Self(root.to_owned())
    }

    fn read(&self, path: &Path) -> Option<String> {
        std::fs::read_to_string(self.0.join(path.strip_prefix("/").unwrap_or(path))).ok()
    }

    fn number(&self, path: &Path) -> Option<u64> {
        let text = self.read(path)?;
        // `max` is no number, and no limit.
        text.trim().parse().ok()
    }

    /// What each bound leaves for such memory, by now. A bound that cannot be read is none.
    pub fn rooms(&self, backing: Backing) -> Vec<Room> {
        let meminfo = self.read(Path::new("/proc/meminfo")).unwrap_or_default();
        match backing {
            Backing::Hugetlb => {
                let bytes = self.free_huge(&meminfo);
                let free = Room { bytes, whole: bytes, bound: Bound::HugePages };
                std::iter::once(free).chain(self.groups("hugetlb", &HUGE)).collect()
            }
            Backing::Anonymous | Backing::Memfd => {
                let whole = field(&meminfo, "MemTotal").unwrap_or(0);
                let host = field(&meminfo, "MemAvailable");
                let host = host.map(|bytes| Room { bytes, whole, bound: Bound::Host });
                host.into_iter().chain(self.commit(&meminfo)).chain(self.groups("memory", &MEMORY)).collect()
            }
        }
    }

    fn commit(&self, meminfo: &str) -> Option<Room> {
        (self.number(Path::new("/proc/sys/vm/overcommit_memory")) == Some(2)).then_some(())?;
        let whole = field(meminfo, "CommitLimit")?;
        let bytes = whole.saturating_sub(field(meminfo, "Committed_AS")?);
        Some(Room { bytes, whole, bound: Bound::Commit })
    }

    /// What this process may map beyond what it has mapped (`ulimit -v`); zero when that is not to be known.
    pub fn mappable(&self) -> u64 {
        let limits = self.read(Path::new("/proc/self/limits")).unwrap_or_default();
        let line = limits.lines().find_map(|l| l.strip_prefix("Max address space"));
        let limit = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        let status = self.read(Path::new("/proc/self/status")).unwrap_or_default();
        limit.unwrap_or(0).saturating_sub(field(&status, "VmSize").unwrap_or(0))
    }

    /// Bytes of reserved 2 MiB pages that nobody has taken or been promised, and of those that the kernel
    /// makes on demand.
    fn free_huge(&self, meminfo: &str) -> u64 {
        let dir = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB");
        let count = |file: &str| self.number(&dir.join(file));
        if let Some(free) = count("free_hugepages") {
            let left = free.saturating_sub(count("resv_hugepages").unwrap_or(0));
            let made = count("nr_overcommit_hugepages").unwrap_or(0);
            let more = made.saturating_sub(count("surplus_hugepages").unwrap_or(0));
            return left.saturating_add(more).saturating_mul(PAGE_2M);
        }
        // Sizes other than the default one are not in this file.
        if field(meminfo, "Hugepagesize") != Some(PAGE_2M) {
            return 0;
        }
        let count = |name: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|l| l.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        count("HugePages_Free").saturating_sub(count("HugePages_Rsvd")).saturating_mul(PAGE_2M)
    }

    /// What the groups with a controller leave: this process's, and every one above it.
    fn groups(&self, controller: &str, kinds: &[(Version, Files)]) -> Vec<Room> {
        let mounts = self.read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
        let member = self.read(Path::new("/proc/self/cgroup")).unwrap_or_default();
        let mut rooms = Vec::new();
        for Place { version, mount, group, name } in places(&mounts, &member, controller) {
            let names = Path::new(&name).ancestors().map(|n| Arc::from(n.to_string_lossy()));
            // A name may be shorter than the way to its files, or longer: then its last one stands for the
            // rest.
            let names = names.chain(std::iter::repeat(Arc::from("/")));
            let dirs = group.ancestors().take_while(|dir| dir.starts_with(&mount));
            for (dir, name) in dirs.zip(names) {
                let files = kinds.iter().filter(|(v, _)| *v == version).map(|(_, files)| files);
                rooms.extend(files.filter_map(|files| self.group(dir, files, &name)));
            }
        }
        rooms
    }

    /// What one group leaves, if it has a limit.
    fn group(&self, dir: &Path, files: &Files, name: &Arc<str>) -> Option<Room> {
        let limit = |file: &&'static str| self.number(&dir.join(file)).map(|bytes| (bytes, *file));
        let limits = files.limits.iter().filter_map(limit);
        // Of groups that this process cannot see, version 1 tells here.
        let above =
            (files.usage == V1_USAGE).then(|| self.statistic(dir, "hierarchical_memory_limit")).flatten();
        let limits = limits.chain(above.map(|bytes| (bytes, "hierarchical_memory_limit")));
        let (whole, file) = limits.filter(|(bytes, _)| *bytes < UNLIMITED).min_by_key(|(bytes, _)| *bytes)?;
        let used = self.number(&dir.join(files.usage)).unwrap_or(0);
        let reclaimable = if files.usage.starts_with("memory.") { self.reclaimable(dir) } else { 0 };
        let bytes = whole.saturating_sub(used.saturating_sub(reclaimable));
        Some(Room { bytes, whole, bound: Bound::Group { group: Arc::clone(name), file } })
    }

    /// What a group holds that the kernel takes back when it is short: page cache. Memory files are no part
    /// of it. What of it the daemon itself needs again at once, its program for one, is in what is left to
    /// it.
    fn reclaimable(&self, dir: &Path) -> u64 {
        // Version 1 has sums over the groups below under names of their own.
        let sum = |name: &str| {
            let total = self.statistic(dir, &format!("total_{name}"));
            total.or_else(|| self.statistic(dir, name)).unwrap_or(0)
        };
        sum("inactive_file").saturating_add(sum("active_file"))
    }

    fn statistic(&self, dir: &Path, name: &str) -> Option<u64> {
        let text = self.read(&dir.join("memory.stat"))?;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse::<u64>().ok())
    }
}

/// The process's group of one hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    version: Version,
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// Where the group's files are.
    group: PathBuf,
    /// What the kernel calls the group.
    name: String,
}

/// Where the groups of a controller are mounted, and this process's group there.
fn places(mounts: &str, member: &str, controller: &str) -> Vec<Place> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let (head, tail): (Vec<&str>, Vec<&str>) = (head.split(' ').collect(), tail.split(' ').collect());
        let (Some(root), Some(mount), Some(kind)) = (head.get(3), head.get(4), tail.first()) else {
            continue;
        };
        let named = |options: &str| options.split(',').any(|o| o == controller);
        let version = match *kind {
            "cgroup2" => Version::Two,
            "cgroup" if tail.get(2).is_some_and(|options| named(options)) => Version::One,
            _ => continue,
        };
        let Some(path) = member.lines().find_map(|l| {
            let (controllers, path) = l.split_once(':')?.1.split_once(':')?;
            let ours = match version {
                Version::Two => controllers.is_empty(),
                Version::One => named(controllers),
            };
            ours.then_some(path)
        }) else {
            continue;
        };
        let (root, mount) = (unescaped(root), PathBuf::from(unescaped(mount)));
        // A mount may show a part of the tree; a group outside of it is not to be seen, and its mount is the
        // nearest.
        let below = Path::new(path).strip_prefix(&root).ok();
        let below = below.filter(|p| p.components().all(|c| matches!(c, std::path::Component::Normal(_))));
        let group = below.map_or_else(|| mount.clone(), |below| mount.join(below));
        found.push(Place { version, mount, group, name: path.to_owned() });
    }
    found
}

/// A path of `mountinfo`: blanks and the like are octal there.
fn unescaped(text: &str) -> String {
    let mut plain = text.to_owned();
    for (code, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(code, character);
    }
    plain
}

/// A figure of `meminfo` in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Files as a kernel shows them.
    pub fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let tree = Tree::below(dir.path());
        (dir, tree)
    }

    fn least(rooms: &[Room]) -> (u64, Bound) {
        let least = rooms.iter().min_by_key(|r| r.bytes).unwrap();
        (least.bytes / MIB, least.bound.clone())
    }

    fn group(group: &str, file: &'static str) -> Bound {
        Bound::Group { group: group.into(), file }
    }

    const MEMINFO: &str = "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\nCommitLimit:  2097152 kB\n\
                           Committed_AS:  1048576 kB\nHugePages_Total:  100\nHugePages_Free:  60\n\
                           HugePages_Rsvd:  20\nHugepagesize:  2048 kB\n";
    const V2: &str = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n";

    #[test]
    fn without_groups_the_host_is_the_bound() {
        let (_dir, tree) = tree(&[("proc/meminfo", MEMINFO)]);
        assert_eq!(
            tree.rooms(Backing::Memfd),
            [Room { bytes: 4096 * MIB, whole: 8192 * MIB, bound: Bound::Host }]
        );
        assert_eq!(least(&tree.rooms(Backing::Hugetlb)), (80, Bound::HugePages));
        assert_eq!(Tree::below(Path::new("/nowhere")).rooms(Backing::Memfd), []);
    }

    #[test]
    fn a_kernel_that_does_not_overcommit_has_a_bound_more() {
        let files = [("proc/meminfo", MEMINFO), ("proc/sys/vm/overcommit_memory", "2\n")];
        assert_eq!(least(&tree(&files).1.rooms(Backing::Anonymous)), (1024, Bound::Commit));
        let files = [("proc/meminfo", MEMINFO), ("proc/sys/vm/overcommit_memory", "0\n")];
        assert_eq!(least(&tree(&files).1.rooms(Backing::Anonymous)), (4096, Bound::Host));
    }

    #[test]
    fn the_narrowest_group_of_version_2_counts_wherever_it_is() {
        let file = |name: &str| format!("sys/fs/cgroup/system.slice/mirrorvmd.service/{name}");
        let above = |name: &str| format!("sys/fs/cgroup/system.slice/{name}");
        let member = ("proc/self/cgroup".to_owned(), "0::/system.slice/mirrorvmd.service\n");
        let base = |more: Vec<(String, &'static str)>| {
            let mut files = vec![
                ("proc/meminfo".to_owned(), MEMINFO),
                ("proc/self/mountinfo".to_owned(), V2),
                member.clone(),
            ];
            files.extend(more);
            let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), *t)).collect();
            least(&tree(&files).1.rooms(Backing::Memfd))
        };
        let own = |file| group("/system.slice/mirrorvmd.service", file);
        let none = vec![
            (file("memory.max"), "max\n"),
            (file("memory.high"), "max\n"),
            (file("memory.current"), "1\n"),
        ];
        assert_eq!(base(none), (4096, Bound::Host));
        let max = vec![(file("memory.max"), "335544320\n"), (file("memory.current"), "104857600\n")];
        assert_eq!(base(max.clone()), (220, own("memory.max")));
        let mut cache = max.clone();
        cache.push((
            file("memory.stat"),
            "anon 9\ninactive_file 41943040\nactive_file 20971520\nshmem 99999999\n",
        ));
        assert_eq!(base(cache), (280, own("memory.max")));
        let mut high = max.clone();
        high.push((file("memory.high"), "209715200\n"));
        assert_eq!(base(high), (100, own("memory.high")));
        let mut slice = max;
        slice.extend([(above("memory.max"), "419430400\n"), (above("memory.current"), "314572800\n")]);
        assert_eq!(base(slice), (100, group("/system.slice", "memory.max")));
    }

    #[test]
    fn groups_of_version_1_count_too_and_their_largest_number_is_no_limit() {
        let dir = "sys/fs/cgroup/memory/a b/c";
        let files = |limit: &'static str, above: &'static str| {
            let files = [
                ("proc/meminfo", MEMINFO),
                ("proc/self/mountinfo", V1),
                ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/a b/c\n0::/\n"),
                (&format!("{dir}/memory.limit_in_bytes"), limit),
                (&format!("{dir}/memory.usage_in_bytes"), "73400320"),
                (&format!("{dir}/memory.stat"), "inactive_file 1\ntotal_inactive_file 20971520\n"),
                ("sys/fs/cgroup/memory/a b/memory.limit_in_bytes", above),
                ("sys/fs/cgroup/memory/a b/memory.usage_in_bytes", "0"),
            ];
            least(&tree(&files).1.rooms(Backing::Memfd))
        };
        let max = "9223372036854771712";
        assert_eq!(files(max, max), (4096, Bound::Host));
        let file = "memory.limit_in_bytes";
        assert_eq!(files("335544320", max), (270, group("/a b/c", file)));
        assert_eq!(files("335544320", "209715200"), (200, group("/a b", file)));
    }

    #[test]
    fn groups_bound_huge_pages_too() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/g\n"),
            ("sys/fs/cgroup/g/hugetlb.2MB.max", "41943040\n"),
            ("sys/fs/cgroup/g/hugetlb.2MB.current", "0\n"),
            ("sys/fs/cgroup/g/hugetlb.2MB.rsvd.max", "25165824\n"),
            ("sys/fs/cgroup/g/hugetlb.2MB.rsvd.current", "4194304\n"),
        ];
        let bound = group("/g", "hugetlb.2MB.rsvd.max");
        assert_eq!(least(&tree(&files).1.rooms(Backing::Hugetlb)), (20, bound));
    }

    #[test]
    fn a_mount_that_shows_a_part_of_the_tree_is_followed_as_far_as_it_shows() {
        let found = |root: &str, member: &str| {
            let mounts = format!("30 23 0:27 {root} /sys/fs/c\\040g rw shared:9 - cgroup2 none rw\n");
            places(&mounts, member, "memory").pop().map(|place| place.group)
        };
        assert_eq!(found("/docker/x", "0::/docker/x/y"), Some("/sys/fs/c g/y".into()));
        assert_eq!(found("/docker/x", "0::/docker/x"), Some("/sys/fs/c g".into()));
        assert_eq!(found("/docker/x", "0::/elsewhere"), Some("/sys/fs/c g".into()));
        assert_eq!(found("/", "0::/../../x"), Some("/sys/fs/c g".into()), "outside the namespace");
        assert_eq!(found("/", "4:memory:/x"), None);
        assert_eq!(places("nonsense\n1 2 3 - cgroup2\n", "0::/", "memory"), []);
    }

    #[test]
    fn both_versions_count_where_both_are_mounted() {
        let mounts =
            format!("{V1}{V2}").replace("/sys/fs/cgroup rw,nosuid", "/sys/fs/cgroup/unified rw,nosuid");
        let rooms = |hybrid: &str| {
            let files = [
                ("proc/meminfo", MEMINFO),
                ("proc/self/mountinfo", mounts.as_str()),
                ("proc/self/cgroup", "4:memory:/m\n0::/u\n"),
                ("sys/fs/cgroup/memory/m/memory.limit_in_bytes", "335544320"),
                ("sys/fs/cgroup/memory/m/memory.usage_in_bytes", "104857600"),
                ("sys/fs/cgroup/unified/u/memory.max", hybrid),
            ];
            least(&tree(&files).1.rooms(Backing::Anonymous))
        };
        assert_eq!(rooms("max"), (220, group("/m", "memory.limit_in_bytes")));
        assert_eq!(rooms("104857600"), (100, group("/u", "memory.max")));
        assert_eq!(
            rooms("garbage"),
            (220, group("/m", "memory.limit_in_bytes")),
            "what cannot be read is no limit"
        );
    }

    #[test]
    fn a_limit_above_what_a_container_can_see_is_told_by_version_1() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/mountinfo", &V1.replace("0:32 / ", "0:32 /docker/x ")),
            ("proc/self/cgroup", "4:memory:/docker/x\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "104857600"),
            ("sys/fs/cgroup/memory/memory.stat", "cache 1\nhierarchical_memory_limit 314572800\n"),
        ];
        let bound = group("/docker/x", "hierarchical_memory_limit");
        assert_eq!(least(&tree(&files).1.rooms(Backing::Memfd)), (200, bound));
    }

    #[test]
    fn huge_pages_of_2_mib_are_found_where_the_default_is_another_size() {
        let dir = "sys/kernel/mm/hugepages/hugepages-2048kB";
        let meminfo = MEMINFO.replace("2048 kB", "1048576 kB");
        let names = ["free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"];
        let free = |counts: [&str; 4]| {
            let files: Vec<_> = names.iter().map(|n| format!("{dir}/{n}")).collect();
            let mut files: Vec<_> = files.iter().map(String::as_str).zip(counts).collect();
            files.push(("proc/meminfo", meminfo.as_str()));
            least(&tree(&files).1.rooms(Backing::Hugetlb)).0
        };
        assert_eq!(free(["10", "3", "0", "0"]), 14);
        assert_eq!(free(["10", "3", "8", "2"]), 26, "the kernel makes six more when they are mapped");
        assert_eq!(least(&tree(&[("proc/meminfo", &meminfo)]).1.rooms(Backing::Hugetlb)).0, 0);
    }

    #[test]
    fn this_host_s_own_figures_are_read() {
        let rooms = Tree::host().rooms(Backing::Memfd);
        assert!(rooms.iter().any(|r| r.bound == Bound::Host && r.bytes > MIB), "{rooms:?}");
    }
}
