//! What memory has been promised, and whether there is room for more.
//!
//! Owns: the book of every piece of guest memory that this process has mapped or is about to, and the one
//! place where a check and a claim are one step. Must not know: guests, mappings' content.
//!
//! The kernel promises everybody everything and kills when they come for it: a guest has its memory when it
//! touches it, long after its start was acknowledged. So a start is measured against what the kernel could
//! give *and* what it has been asked to give already: of every claim, the part that nobody has touched yet.
//! What has been touched is in the kernel's own figures.
//!
//! The book is the process's: two hosts of one process share it. Two daemons of one machine know nothing of
//! each other but what they have touched; a control group for each keeps them apart. Memory that a device
//! takes away (a poisoned page) still is a `SIGBUS`, which nothing here catches: a handler could only invent
//! content. What the kernel could not give is refused before it is mapped, files cannot shrink, and huge
//! pages are reserved.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::Backing;
use super::limits::{Bound, Room, Tree};
use crate::sync::Locked;

/// The least and the most that is left under a bound for the daemon itself (heaps, stacks, connections, page
/// tables) and for the rest of the host, unless the configuration says how much.
const RESERVE: (u64, u64) = (32 << 20, 1 << 30);
/// In between it is this part of what the bound is about.
const RESERVE_PART: u64 = 64;
/// A mirror may take of the reserve all but this part: without one no guest can leave, and leaving is what
/// makes room.
const LAST_RESERVE_PART: u64 = 4;
/// No figure of the configuration.
const UNSET: u64 = u64::MAX;
/// Claims below this are written down without a look at the host: the look costs more than they do.
const SMALL: u64 = 64 << 10;

/// There is not that much memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} of memory are needed and {} can be given: {bound} bounds it, with what guests were promised and have not touched \
     yet taken off; {}",
    mib(*.bytes), mib(*.available), .bound.way_on()
)]
pub struct Shortage {
    /// How many bytes were asked for.
    pub bytes: u64,
    /// Bytes that could be given.
    pub available: u64,
    /// Which limit is too low.
    pub bound: Bound,
}

fn mib(bytes: u64) -> String {
    let mib = 1 << 20;
    if bytes.is_multiple_of(mib) {
        format!("{} MiB", bytes / mib)
    } else {
        format!("{}.{} MiB", bytes / mib, bytes % mib * 10 / mib)
    }
}

/// Whom memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// For the RAM of a guest.
    Guest,
    /// What a guest needs to leave.
    Mirror,
}

/// What is to be left under a bound.
fn reserve(whole: u64, configured: Option<u64>, bound: &Bound, purpose: Purpose) -> u64 {
    let bytes = match bound {
        // They are of no use to anybody but guests.
        Bound::HugePages => 0,
        // With the huge pages of the control group's limit it is the same.
        Bound::Group { file, .. } if file.starts_with("hugetlb.") => 0,
        Bound::Host | Bound::Commit | Bound::Group { .. } | Bound::AddressSpace => {
            configured.unwrap_or_else(|| (whole / RESERVE_PART).clamp(RESERVE.0, RESERVE.1))
        }
    };
    match purpose {
        Purpose::Guest => bytes,
        Purpose::Mirror => bytes / LAST_RESERVE_PART,
    }
}

/// Whether `bytes` fit under a bound beside what is still to come and what is to be left.
fn fits(bytes: u64, room: &Room, to_come: u64, reserve: u64) -> Result<(), Shortage> {
    let available = room.bytes.saturating_sub(to_come).saturating_sub(reserve);
    if bytes <= available {
        return Ok(());
    }
    Err(Shortage { bytes, available, bound: room.bound.clone() })
}

/// How to find out what of a claim has been touched.
#[derive(Debug)]
pub(super) enum Touched {
    /// Nothing is mapped yet.
    Nothing,
    /// A memory file: the kernel counts its pages.
    File(Arc<File>),
    /// Anonymous memory of this process: first byte and length. Its claim goes before the memory does.
    Anonymous(usize, usize),
    /// Memory that another process has for itself: its id.
    Process(u32),
}

/// Bytes of anonymous memory of this process that it has for itself, in any of `spans`, by its `smaps`. The
/// page of zeros that is shown where something was read and nothing written is none of them.
///
/// The kernel makes one piece of what lies side by side, and tells of whole pieces; what may lie outside the
/// spans is taken for touched there.
fn anonymous_in(smaps: &str, spans: &[(usize, usize)]) -> u64 {
    let (mut total, mut outside) = (0u64, None);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Anonymous:") {
            let kib = kib.trim().strip_suffix("kB").and_then(|n| n.trim().parse::<u64>().ok());
            if let Some(outside) = outside.take() {
                total = total.saturating_add(kib.unwrap_or(0).saturating_mul(1024).saturating_sub(outside));
            }
            continue;
        }
        let ends = line.split(' ').next().and_then(|w| w.split_once('-'));
        let hex = |text: &str| usize::from_str_radix(text, 16).ok();
        if let Some((from, to)) = ends.and_then(|(from, to)| Some((hex(from)?, hex(to)?))) {
            let inside =
                |(at, len): &(usize, usize)| at.saturating_add(*len).min(to).saturating_sub(from.max(*at));
            let inside: usize = spans.iter().map(inside).sum();
            outside = (inside > 0).then(|| to.saturating_sub(from).saturating_sub(inside) as u64);
        }
    }
    total
}

/// Bytes that a process has for itself alone.
fn own_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    backing: Backing,
    touched: Touched,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    list: BTreeMap<u64, Entry>,
}

impl Entries {
    fn add(&mut self, bytes: u64, backing: Backing) -> u64 {
        self.next += 1;
        self.list.insert(self.next, Entry { bytes, backing, touched: Touched::Nothing });
        self.next
    }

    /// Claims that a bound counts, when memory of a kind is wanted.
    fn counted(&self, bound: &Bound, wanted: Backing) -> impl Iterator<Item = &Entry> {
        let counts = move |e: &&Entry| match (bound, wanted) {
            // What is mapped privately has been committed with its mapping already.
            (Bound::Commit, _) => e.backing == Backing::Memfd || matches!(e.touched, Touched::Nothing),
            // Reserved as soon as it is mapped.
            (Bound::HugePages, _) => e.backing == Backing::Hugetlb && matches!(e.touched, Touched::Nothing),
            (Bound::AddressSpace, _) => matches!(e.touched, Touched::Nothing),
            (Bound::Group { .. } | Bound::Host, Backing::Hugetlb) => e.backing == Backing::Hugetlb,
            (Bound::Group { .. } | Bound::Host, Backing::Anonymous | Backing::Memfd) => {
                e.backing != Backing::Hugetlb
            }
        };
        self.list.values().filter(counts)
    }

    /// Their bytes, as if nobody had touched any: cheap, and on the safe side.
    fn promised(&self, bound: &Bound, wanted: Backing) -> u64 {
        self.counted(bound, wanted).map(|e| e.bytes).fold(0, u64::saturating_add)
    }

    /// Of those bytes what is still to come.
    fn to_come(&self, bound: &Bound, wanted: Backing) -> u64 {
        let (mut left, mut anonymous, mut spans) = (0u64, 0u64, Vec::new());
        for entry in self.counted(bound, wanted) {
            let touched = match &entry.touched {
                Touched::Nothing => 0,
                Touched::File(file) => {
                    rustix::fs::fstat(file).map_or(0, |s| u64::try_from(s.st_blocks).unwrap_or(0) * 512)
                }
                Touched::Anonymous(at, len) => {
                    spans.push((*at, *len));
                    anonymous = anonymous.saturating_add(entry.bytes);
                    continue;
                }
                Touched::Process(pid) => own_bytes(*pid),
            };
            left = left.saturating_add(entry.bytes.saturating_sub(touched));
        }
        if !spans.is_empty() {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            left = left.saturating_add(anonymous.saturating_sub(anonymous_in(&smaps, &spans)));
        }
        left
    }
}

/// A book of promises.
#[derive(Clone, Debug)]
pub struct Budget {
    tree: Tree,
    entries: Arc<Mutex<Entries>>,
    /// Bytes to be left under every bound, if the configuration says how many.
    reserve: Arc<AtomicU64>,
}

/// A promise of memory, good as long as it is held.
#[derive(Debug)]
pub struct Claim {
    entries: Arc<Mutex<Entries>>,
    id: u64,
}

impl Budget {
    /// The book of this process.
    pub fn of_this_process() -> &'static Self {
        static BOOK: OnceLock<Budget> = OnceLock::new();
        BOOK.get_or_init(|| Self::on(Tree::host()))
    }

    fn on(tree: Tree) -> Self {
        Self { tree, entries: Arc::default(), reserve: Arc::new(AtomicU64::new(UNSET)) }
    }

    /// Leaves `bytes` of memory to the daemon itself and to the rest of the host, in the place of a part of
    /// what there is.
    pub fn keep_back(&self, bytes: u64) {
        self.reserve.store(bytes, Ordering::Relaxed);
    }

    /// Claims memory of a kind: looks whether there is room for it beside what others were promised and
    /// writes it down, in one step.
    ///
    /// # Errors
    /// [`Shortage`]; nothing is claimed then.
    pub fn claim(&self, bytes: u64, backing: Backing, purpose: Purpose) -> Result<Claim, Shortage> {
        let mut entries = locked(&self.entries);
        if bytes >= SMALL {
            self.check(&entries, bytes, backing, purpose)?;
        }
        let id = entries.add(bytes, backing);
        Ok(Claim { entries: Arc::clone(&self.entries), id })
    }

    /// Whether [`Budget::claim`] would work now; claims nothing.
    ///
    /// # Errors
    /// As there.
    pub fn has_room(&self, bytes: u64, backing: Backing, purpose: Purpose) -> Result<(), Shortage> {
        self.check(&locked(&self.entries), bytes, backing, purpose)
    }

    fn check(
        &self,
        entries: &Entries,
        bytes: u64,
        backing: Backing,
        purpose: Purpose,
    ) -> Result<(), Shortage> {
        let configured = Some(self.reserve.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNSET);
        let left_free = |room: &Room| reserve(room.whole, configured, &room.bound, purpose);
        for room in self.tree.rooms(backing) {
            if fits(bytes, &room, entries.promised(&room.bound, backing), left_free(&room)).is_ok() {
                continue;
            }
            // What is touched after this look and before the next is counted twice: on the safe side.
            let to_come = entries.to_come(&room.bound, backing);
            let again = self.tree.rooms(backing).into_iter().find(|r| r.bound == room.bound);
            let room = again.unwrap_or(room);
            fits(bytes, &room, to_come, left_free(&room))?;
        }
        Ok(())
    }
}

impl Claim {
    /// Takes a part of the claim off as a claim of its own, at most all of it, for memory of that kind.
    pub(super) fn split(&self, bytes: u64) -> Self {
        let mut entries = locked(&self.entries);
        let (taken, backing) = match entries.list.get_mut(&self.id) {
            Some(entry) => {
                let taken = bytes.min(entry.bytes);
                entry.bytes -= taken;
                (taken, entry.backing)
            }
            None => (0, Backing::Memfd),
        };
        let id = entries.add(taken, backing);
        Self { entries: Arc::clone(&self.entries), id }
    }

    /// Says how to see what of it has been touched.
    pub(super) fn watch(&self, touched: Touched) {
        if let Some(entry) = locked(&self.entries).list.get_mut(&self.id) {
            if let Touched::Anonymous(..) = touched {
                entry.backing = Backing::Anonymous;
            }
            entry.touched = touched;
        }
    }

    /// So much of it has been touched and stays so: it is in the kernel's figures, and whoever is asked what
    /// of the rest was touched does not count it.
    pub fn was_taken(&self, bytes: u64) {
        if let Some(entry) = locked(&self.entries).list.get_mut(&self.id) {
            entry.bytes = entry.bytes.saturating_sub(bytes);
        }
    }

    /// The claim is for what a process has for itself.
    pub fn of_process(&self, pid: u32) {
        self.watch(Touched::Process(pid));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        locked(&self.entries).list.remove(&self.id);
    }
}

fn locked(entries: &Mutex<Entries>) -> MutexGuard<'_, Entries> {
    // Insertions and removals are whole, so a panic elsewhere leaves nothing half done.
    entries.locked()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::limits::tests::tree;

    const MIB: u64 = 1 << 20;

    fn budget(available_mib: u64) -> (tempfile::TempDir, Budget) {
        let meminfo = format!(
            "MemTotal: 1048576 kB\nMemAvailable: {} kB\nHugepagesize: 2048 kB\nHugePages_Free: 8\n",
            available_mib * 1024
        );
        let (dir, tree) = tree(&[("proc/meminfo", &meminfo)]);
        (dir, Budget::on(tree))
    }

    #[test]
    fn what_was_promised_is_not_promised_again_until_it_is_given_back() {
        let (_dir, budget) = budget(432);
        let first = budget.claim(300 * MIB, Backing::Memfd, Purpose::Guest).unwrap();
        let refused = budget.claim(200 * MIB, Backing::Anonymous, Purpose::Guest).unwrap_err();
        assert_eq!(refused, Shortage { bytes: 200 * MIB, available: 100 * MIB, bound: Bound::Host });
        let text = refused.to_string();
        assert!(text.contains("200 MiB") && text.contains("100 MiB") && text.contains("this host"), "{text}");
        assert_eq!(budget.has_room(100 * MIB, Backing::Memfd, Purpose::Guest), Ok(()));
        assert!(
            budget.has_room(100 * MIB + 1, Backing::Memfd, Purpose::Guest).is_err(),
            "the daemon keeps some for itself"
        );
        drop(first);
        assert!(budget.claim(400 * MIB, Backing::Memfd, Purpose::Guest).is_ok());
    }

    #[test]
    fn what_was_touched_is_in_the_host_s_figures_and_counted_once() {
        let (_dir, budget) = budget(144);
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(fd));
        file.set_len(100 * MIB).unwrap();
        let claim = budget.claim(100 * MIB, Backing::Memfd, Purpose::Guest).unwrap();
        claim.watch(Touched::File(Arc::clone(&file)));
        assert!(budget.has_room(20 * MIB, Backing::Memfd, Purpose::Guest).is_err());
        // The tree's figure stays: as if others had given back what this takes.
        for at in (0..60 * MIB).step_by(4096) {
            file.write_all_at(&[1], at).unwrap();
        }
        assert_eq!(budget.has_room(72 * MIB, Backing::Memfd, Purpose::Guest), Ok(()));
        assert!(budget.has_room(73 * MIB, Backing::Memfd, Purpose::Guest).is_err());
        drop(claim);
    }

    #[test]
    fn what_was_taken_for_good_is_no_promise_any_more() {
        let (_dir, budget) = budget(144);
        let claim = budget.claim(100 * MIB, Backing::Anonymous, Purpose::Guest).unwrap();
        assert!(budget.has_room(20 * MIB, Backing::Memfd, Purpose::Guest).is_err());
        claim.was_taken(60 * MIB);
        assert_eq!(budget.has_room(72 * MIB, Backing::Memfd, Purpose::Guest), Ok(()));
        assert!(budget.has_room(73 * MIB, Backing::Memfd, Purpose::Guest).is_err());
        claim.was_taken(u64::MAX);
        assert_eq!(budget.has_room(112 * MIB, Backing::Memfd, Purpose::Guest), Ok(()));
    }

    #[test]
    fn touched_anonymous_memory_is_seen_and_what_was_only_read_is_not() {
        let mapping = crate::memory::Mapping::anonymous(8 << 20).unwrap();
        let at = usize::try_from(mapping.host_address(crate::memory::View::Guest)).unwrap();
        let touched =
            || anonymous_in(&std::fs::read_to_string("/proc/self/smaps").unwrap(), &[(at, 8 << 20)]);
        // The kernel may show neighbours as one piece: only what must be in the span is counted.
        let before = touched();
        let mut byte = [0];
        mapping.read(6 << 20, &mut byte);
        assert_eq!(touched(), before);
        for page in 0..8 << 8 {
            mapping.write(page << 12, &[1]);
        }
        assert!(touched() <= 8 << 20);
        assert!(own_bytes(std::process::id()) > 1 << 20);
        assert_eq!(own_bytes(u32::MAX), 0);
    }

    #[test]
    fn of_a_piece_that_is_larger_than_the_claims_the_rest_is_taken_for_touched() {
        let smaps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize: 4096 kB\nAnonymous:      3072 kB\n\
                     VmFlags: rd wr\n7f0000500000-7f0000600000 rw-p 00000000 00:00 0 [heap]\nAnonymous: 1024 kB\n";
        let at = 0x7f00_0000_0000usize;
        assert_eq!(anonymous_in(smaps, &[(at, 4 << 20)]), 3 << 20);
        assert_eq!(anonymous_in(smaps, &[(at, 2 << 20), (at + (2 << 20), 2 << 20)]), 3 << 20, "side by side");
        assert_eq!(anonymous_in(smaps, &[(at, 2 << 20)]), 1 << 20);
        assert_eq!(anonymous_in(smaps, &[(at, 1 << 20)]), 0);
        assert_eq!(anonymous_in(smaps, &[(0x1000, 4 << 20)]), 0);
        assert_eq!(anonymous_in("nonsense-7f\nAnonymous: x kB\n", &[(at, 4 << 20)]), 0);
    }

    #[test]
    fn a_mirror_may_take_of_what_guests_have_to_leave() {
        let (_dir, budget) = budget(432);
        let _full = budget.claim(400 * MIB, Backing::Memfd, Purpose::Guest).unwrap();
        assert!(budget.claim(MIB, Backing::Anonymous, Purpose::Guest).is_err());
        assert!(budget.claim(25 * MIB, Backing::Anonymous, Purpose::Mirror).is_err());
        assert!(budget.claim(24 * MIB, Backing::Anonymous, Purpose::Mirror).is_ok());
    }

    #[test]
    fn what_is_left_to_the_host_is_a_part_of_it_or_what_the_administrator_says() {
        let gib = 1 << 30;
        let host = |whole, configured| reserve(whole, configured, &Bound::Host, Purpose::Guest);
        assert_eq!([host(gib, None), host(16 * gib, None), host(1 << 40, None)], [32 * MIB, 256 * MIB, gib]);
        assert_eq!([host(gib, Some(0)), host(gib, Some(5 * gib))], [0, 5 * gib]);
        assert_eq!(reserve(gib, Some(gib), &Bound::HugePages, Purpose::Guest), 0);
        let (_dir, budget) = budget(432);
        budget.keep_back(200 * MIB);
        assert!(budget.has_room(233 * MIB, Backing::Memfd, Purpose::Guest).is_err());
        assert_eq!(budget.has_room(232 * MIB, Backing::Memfd, Purpose::Guest), Ok(()));
    }

    #[test]
    fn huge_pages_are_counted_apart() {
        let (_dir, budget) = budget(432);
        let _all = budget.claim(400 * MIB, Backing::Memfd, Purpose::Guest).unwrap();
        let first = budget.claim(10 * MIB, Backing::Hugetlb, Purpose::Guest).unwrap();
        let refused = budget.claim(8 * MIB, Backing::Hugetlb, Purpose::Guest).unwrap_err();
        assert!(refused.to_string().contains("vm.nr_hugepages"), "{refused}");
        assert_eq!((refused.available, refused.bound), (6 * MIB, Bound::HugePages));
        drop(first);
        assert!(budget.claim(16 * MIB, Backing::Hugetlb, Purpose::Guest).is_ok());
    }

    #[test]
    fn of_many_that_claim_at_once_only_as_many_get_it_as_there_is_room_for() {
        let (_dir, budget) = budget(432);
        let won: Vec<Claim> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..16)
                .map(|_| s.spawn(|| budget.claim(100 * MIB, Backing::Memfd, Purpose::Guest).ok()))
                .collect();
            threads.into_iter().filter_map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(won.len(), 4);
    }

    proptest! {
        /// Whatever is claimed and given back in whatever order: what is promised never exceeds what there
        /// is, and a claim is refused only when it would.
        #[test]
        fn no_more_is_promised_than_there_is_and_nothing_is_refused_that_fits(
            steps in proptest::collection::vec((1u64..300, any::<bool>()), 1..40),
        ) {
            let (_dir, budget) = budget(432);
            let mut held: Vec<(u64, Claim)> = Vec::new();
            for (mib, give_back) in steps {
                if give_back && !held.is_empty() {
                    held.swap_remove(usize::try_from(mib).unwrap() % held.len());
                    continue;
                }
                let promised: u64 = held.iter().map(|(m, _)| m).sum();
                match budget.claim(mib * MIB, Backing::Memfd, Purpose::Guest) {
                    Ok(claim) => {
                        prop_assert!(promised + mib <= 400);
                        held.push((mib, claim));
                    }
                    Err(short) => {
                        prop_assert!(promised + mib > 400);
                        prop_assert_eq!(short.available, (400 - promised) * MIB);
                    }
                }
            }
        }

        #[test]
        fn a_split_neither_makes_nor_loses_a_byte(total in 1u64..400, cuts in proptest::collection::vec(0u64..200, 0..6)) {
            let (_dir, budget) = budget(432);
            let whole = budget.claim(total * MIB, Backing::Memfd, Purpose::Guest).unwrap();
            let parts: Vec<Claim> = cuts.iter().map(|c| whole.split(c * MIB)).collect();
            let held = |b: &Budget| locked(&b.entries).list.values().map(|e| e.bytes).sum::<u64>();
            prop_assert_eq!(held(&budget), total * MIB);
            drop((whole, parts));
            prop_assert_eq!(held(&budget), 0);
        }
    }
}
