//! The MMU against the project's other reader of page tables, and against tables that make no sense.

use proptest::prelude::*;

use super::mmu::{Access, Fault, Mmu};
use super::slots::Slots;
use super::*;
use crate::addr::{HelperVa, MirrorGpa, PAGE_SIZE};
use crate::address_space::{self as space, Access as Rights, PageTables, WalkError, walk};
use crate::hypervisor::{Exit, Slot, SlotId};
use crate::memory::{Mapping, View};
use crate::sev::model::MemoryKey;
use std::sync::RwLock;

/// Pages of physical memory: two slots with a hole between them.
const PAGES: u64 = 16;
const HOLE: std::ops::Range<u64> = 10..12;

struct Machine {
    memory: Arc<Mapping>,
    slots: RwLock<Slots>,
}

impl Machine {
    fn new() -> Self {
        let memory = Mapping::memfd("mmu", PAGES * PAGE_SIZE).unwrap();
        let mut slots = Slots::default();
        for (id, pages) in [(0, 0..HOLE.start), (1, HOLE.end..PAGES)] {
            slots.set(SlotId(id), slot(&memory, pages), 8).unwrap();
        }
        Self { memory, slots: RwLock::new(slots) }
    }

    fn mmu(&self, cr3: u64, user: bool, key: Option<Arc<MemoryKey>>) -> Mmu<'_> {
        Mmu { slots: &self.slots, limits: &LIMITS, key, cr3, user }
    }

    fn entry(&self, at: MirrorGpa) -> Option<u64> {
        let page = at.get() / PAGE_SIZE;
        (page < PAGES && !HOLE.contains(&page)).then(|| {
            let mut bytes = [0; 8];
            self.memory.read(at.get(), &mut bytes);
            u64::from_le_bytes(bytes)
        })
    }
}

fn slot(memory: &Arc<Mapping>, pages: std::ops::Range<u64>) -> Slot {
    Slot {
        gpa: pages.start * PAGE_SIZE,
        len: (pages.end - pages.start) * PAGE_SIZE,
        memory: Arc::clone(memory),
        offset: pages.start * PAGE_SIZE,
        view: View::Guest,
        dirty_log: false,
        read_only: false,
    }
}

/// What the MMU must say of an access, by the other reader.
fn expected(machine: &Machine, cr3: u64, va: HelperVa, access: Access) -> Result<(MirrorGpa, bool), Fault> {
    let c_bit = LIMITS.c_bit_mask();
    let root = MirrorGpa::new(cr3);
    let found = walk(va, root, c_bit, LIMITS.phys_limit(), |at| machine.entry(at));
    let t = found.map_err(|_| Fault::Exception)?;
    let allowed = match access {
        Access::Read => true,
        Access::Write => t.access == Rights::ReadWrite,
        Access::Fetch => t.access == Rights::ReadExecute,
    };
    if !allowed {
        return Err(Fault::Exception);
    }
    Ok((t.gpa, t.encrypted || access == Access::Fetch))
}

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];

/// Entries that lead somewhere most of the time.
fn entry() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![8 => Just(0x67u64), 2 => any::<u64>().prop_map(|f| f & 0x7f)];
    let odd = prop_oneof![
        12 => Just(0u64),
        2 => Just(1 << 63),
        2 => Just(LIMITS.c_bit_mask()),
        1 => Just(1 << 7),
        1 => (48u32..52).prop_map(|b| 1 << b),
        1 => Just(1 << 12 | 1 << 7),
    ];
    prop_oneof![
        9 => (0..PAGES, flags, odd).prop_map(|(page, flags, odd)| page << 12 | flags | odd),
        1 => any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn agrees_with_the_other_reader_on_tables_that_anybody_may_have_written(
        entries in prop::collection::vec(entry(), 16),
        picks in prop::collection::vec(0usize..4096, 16),
        vas in prop::collection::vec(any::<[u16; 5]>(), 12),
    ) {
        let machine = Machine::new();
        // Every index of a page has one of few entries, so that walks go deep.
        for at in (0..PAGES * PAGE_SIZE).step_by(8) {
            let entry = entries[picks[(at / 8 % 16) as usize] % entries.len()];
            machine.memory.write(at, &entry.to_le_bytes());
        }
        for va in vas {
            let index = |i: usize| u64::from(va[i] & 0x1ff) << (12 + 9 * i);
            let va = HelperVa::new((index(0) | index(1) | index(2) | index(3) | u64::from(va[4] & 0xfff)) & ((1 << 47) - 1));
            for access in ACCESSES {
                let slots = machine.slots.read().unwrap();
                let mmu = machine.mmu(3 << 12, true, None);
                let found = mmu.walk(&slots, va, access).map(|t| (t.gpa, t.encrypted));
                let both = walk(va, MirrorGpa::new(3 << 12), LIMITS.c_bit_mask(), LIMITS.phys_limit(), |at| machine.entry(at));
                if let Err(WalkError::WriteExecute(_)) = both {
                    // No plan has such a page; a processor takes it.
                    prop_assert!(found.is_ok());
                } else {
                    prop_assert_eq!(found, expected(&machine, 3 << 12, va, access), "{} {:?}", va, access);
                }
                // CPL 0 may do whatever CPL 3 may.
                if let Ok(found) = found {
                    let found0 = machine.mmu(3 << 12, false, None).walk(&slots, va, access);
                    prop_assert_eq!(found0.map(|t| (t.gpa, t.encrypted)), Ok(found));
                }
            }
        }
    }

    #[test]
    fn no_table_and_no_span_makes_it_panic(
        words in prop::collection::vec(any::<u64>(), 64),
        cr3: u64,
        va: u64,
        len in 0usize..10_000,
        key in any::<Option<[u8; 32]>>(),
        user: bool,
    ) {
        let machine = Machine::new();
        for (at, word) in (0..PAGES * PAGE_SIZE).step_by(8).zip(words.iter().cycle()) {
            machine.memory.write(at, &word.to_le_bytes());
        }
        let key = key.map(|k| Arc::new(MemoryKey::new(&k)));
        for cr3 in [cr3, cr3 % (PAGES * PAGE_SIZE)] {
            let mmu = machine.mmu(cr3, user, key.clone());
            for va in [va, va >> 17, u64::MAX - va % 4096].map(HelperVa::new) {
                let mut buffer = vec![0; len];
                let _ = (mmu.read(va, &mut buffer), mmu.fetch(va, &mut buffer), mmu.write(va, &buffer));
                let _ = (mmu.load(va), mmu.store(va, 1), mmu.probe(va, len, Access::Write));
            }
        }
    }

    #[test]
    fn built_tables_are_read_as_they_were_meant(
        maps in prop::collection::vec((0u64..40, 0..PAGES, 1u64..4, 0u8..3, any::<bool>()), 1..6),
        offset in 0u64..PAGE_SIZE,
    ) {
        let c_bit = LIMITS.c_bit_mask();
        let mut list: Vec<space::Mapping> = Vec::new();
        for (va, page, pages, access, encrypted) in maps {
            let access = [Rights::Read, Rights::ReadWrite, Rights::ReadExecute][usize::from(access)];
            // Targets may lie beyond memory: a walk does not care.
            list.push(space::Mapping {
                va: HelperVa::new(va * 4 * PAGE_SIZE),
                gpa: MirrorGpa::new(page * PAGE_SIZE),
                len: pages * PAGE_SIZE,
                access,
                encrypted,
            });
        }
        let Ok(tables) = PageTables::build(&list, MirrorGpa::new(0), c_bit, false, 9) else { return Ok(()) };
        let machine = Machine::new();
        let key = Arc::new(MemoryKey::new(&[5; 32]));
        key.write(&machine.memory, 0, &tables.bytes());
        let mmu = machine.mmu(tables.root().get() | c_bit, true, Some(key));
        let slots = machine.slots.read().unwrap();
        for m in &list {
            for page in 0..m.len / PAGE_SIZE {
                let at = page * PAGE_SIZE + offset;
                let va = HelperVa::new(m.va.get() + at);
                for access in ACCESSES {
                    let allowed = match access {
                        Access::Read => true,
                        Access::Write => m.access == Rights::ReadWrite,
                        Access::Fetch => m.access == Rights::ReadExecute,
                    };
                    let found = mmu.walk(&slots, va, access).map(|t| (t.gpa.get(), t.encrypted));
                    let right = (m.gpa.get() + at, m.encrypted || access == Access::Fetch);
                    prop_assert_eq!(found, if allowed { Ok(right) } else { Err(Fault::Exception) });
                }
            }
        }
    }

    #[test]
    fn the_dirty_log_is_what_was_written(writes in prop::collection::vec((0u64..40_000, 1usize..9000), 0..12)) {
        // One to one from 1 GiB on, over a memory of its own.
        let list = [space::Mapping {
            va: HelperVa::new(1 << 30),
            gpa: MirrorGpa::new(0),
            len: HOLE.start * PAGE_SIZE,
            access: Rights::ReadWrite,
            encrypted: false,
        }];
        let tables = PageTables::build(&list, MirrorGpa::new(HOLE.end << 12), 0, false, 4).unwrap();
        let machine = Machine::new();
        machine.memory.write(HOLE.end << 12, &tables.bytes());
        let logged = Slot { dirty_log: true, ..slot(&machine.memory, 0..HOLE.start) };
        machine.slots.write().unwrap().set(SlotId(0), logged, 8).unwrap();
        let mmu = machine.mmu(tables.root().get(), true, None);
        let mut naive = 0u64;
        for (at, len) in writes {
            let done = mmu.write(HelperVa::new((1 << 30) + at), &vec![1; len]);
            let last = (at + len as u64 - 1) / PAGE_SIZE;
            prop_assert_eq!(done.is_ok(), last < HOLE.start);
            (at / PAGE_SIZE..=last.min(HOLE.start - 1)).for_each(|p| naive |= 1 << p);
        }
        let mut slots = machine.slots.write().unwrap();
        prop_assert_eq!(slots.take_log(SlotId(0)).unwrap(), [naive]);
        prop_assert_eq!(slots.take_log(SlotId(0)).unwrap(), [0]);
        prop_assert!(slots.take_log(SlotId(1)).is_err());
    }

    #[test]
    fn overlapping_slots_are_refused_and_nothing_else(
        spans in prop::collection::vec((0u64..12, 1u64..5, any::<bool>()), 1..10),
    ) {
        let memory = Mapping::memfd("slots", 32 * PAGE_SIZE).unwrap();
        let (mut slots, mut naive) = (Slots::default(), Vec::<(u32, std::ops::Range<u64>)>::new());
        for ((from, pages, remove), id) in spans.into_iter().zip(0..) {
            if remove && let Some((id, _)) = naive.pop() {
                slots.remove(SlotId(id)).unwrap();
            }
            let free = naive.iter().all(|(_, r)| r.end <= from || from + pages <= r.start);
            let set = slots.set(SlotId(id), slot(&memory, from..from + pages), 100);
            prop_assert_eq!(set.is_ok(), free);
            if free {
                naive.push((id, from..from + pages));
            }
            for page in 0..20 {
                let there = naive.iter().any(|(_, r)| r.contains(&page));
                let found = slots.locate(MirrorGpa::new(page * PAGE_SIZE + 7));
                prop_assert_eq!(found.map(|b| b.offset), there.then_some(page * PAGE_SIZE + 7));
            }
        }
    }
}

#[test]
fn faults_leave_to_the_host_as_on_kvm() {
    assert_eq!(Exit::from(Fault::Exception), Exit::Shutdown);
    let gpa = MirrorGpa::new(0x1234);
    let mmio = Exit::Mmio { gpa: 0x1234, write: true };
    assert_eq!(Exit::from(Fault::NoMemory { gpa, write: true }), mmio);
}

#[test]
fn the_host_itself_has_no_ambiguous_address() {
    assert!(LIMITS.c_bit_mask() >= LIMITS.phys_limit());
    let host = EmulatedHost::without_sev();
    assert_eq!((host.limits().c_bit, host.limits().phys_limit()), (None, 1 << 48));
    assert!(host.sev().is_none() && host.create_vm().unwrap().sev().is_none());
}
