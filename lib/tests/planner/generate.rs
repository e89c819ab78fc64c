//! Cases: layouts, hosts, strategies and declarations, from ordinary to hostile.

use mirrorvm::addr::{Gpa, MirrorGpa, PAGE_2M, PAGE_SIZE, PageRange, RamAddr};
use mirrorvm::address_space::{
    BlockRole, BlockSpec, Confidentiality, Declaration, FOUR_GIB, GuestLayout, HELPER_BLOCK, HelperPlacement,
    HostLimits, MailboxSize, Plug, PspVia, RamBlock, Shift, Strategy as Kind, Tuple, reference_declaration,
};
use mirrorvm::pages::PageSet;
use mirrorvm_abi::{header::Header, layout as abi};
use proptest::prelude::*;

use crate::GIB;

/// One question to the planner.
#[derive(Clone, Debug)]
pub struct Case {
    pub layout: GuestLayout,
    /// The helper's block was sized by `HelperPlacement::block_size`.
    pub sized: bool,
    pub header: Header,
    pub limits: HostLimits,
    pub strategy: Kind,
    pub mailbox: MailboxSize,
    pub declaration: Option<Declaration>,
    pub shared: Option<PageSet>,
    pub confidentiality: Confidentiality,
    pub read_only_text: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Place {
    Unplugged,
    Low,
    Straddling,
    High,
    /// Above a hole, up to further than the helper's maps may reach.
    Far(u64),
    /// The middle third, below or above 4 GiB.
    Part(bool),
    /// First and last third, the wrong way round.
    Halves,
}

#[derive(Clone, Copy, Debug)]
enum HelperBlock {
    None,
    Sized(HelperPlug),
    /// This many pages smaller than it has to be.
    Short(u64),
}

/// Where the guest sees the helper's block.
#[derive(Clone, Copy, Debug)]
enum HelperPlug {
    No,
    Whole,
    /// In two parts cut at this share of it (of 100), the second at an address of its own or right behind the
    /// first.
    Cut(u64, bool),
    /// All but a part that starts at this share of it.
    Hole(u64),
}

pub fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (1u64..70).prop_map(|p| p * PAGE_SIZE),
        2 => (1u64..9).prop_map(|n| n * PAGE_2M),
        2 => (1u64..9, 1u64..512).prop_map(|(n, p)| n * PAGE_2M + p * PAGE_SIZE),
        2 => (1u64..6).prop_map(|n| n * GIB),
        1 => (1u64..6, 1u64..600).prop_map(|(n, p)| n * GIB + p * PAGE_SIZE),
    ]
}

pub fn places() -> impl Strategy<Value = Place> {
    prop_oneof![
        1 => Just(Place::Unplugged),
        3 => Just(Place::Low),
        2 => Just(Place::Straddling),
        3 => Just(Place::High),
        1 => (1u64..24).prop_map(Place::Far),
        1 => any::<bool>().prop_map(Place::Part),
        1 => Just(Place::Halves),
    ]
}

fn helpers() -> impl Strategy<Value = HelperBlock> {
    let plug = prop_oneof![
        2 => Just(HelperPlug::No),
        8 => Just(HelperPlug::Whole),
        2 => (0u64..100, any::<bool>()).prop_map(|(at, apart)| HelperPlug::Cut(at, apart)),
        1 => (0u64..100).prop_map(HelperPlug::Hole),
    ];
    prop_oneof![
        1 => Just(HelperBlock::None),
        16 => plug.prop_map(HelperBlock::Sized),
        1 => (1u64..60).prop_map(HelperBlock::Short),
    ]
}

fn shifts() -> impl Strategy<Value = Shift> {
    let explicit = prop_oneof![
        4 => (0u64..1 << 16).prop_map(|n| FOUR_GIB + n * PAGE_2M),
        1 => (0u32..20).prop_map(|n| FOUR_GIB << n),
        1 => any::<u64>(),
        1 => (0u64..FOUR_GIB / PAGE_2M).prop_map(|n| n * PAGE_2M),
        1 => (1u64..PAGE_2M).prop_map(|n| FOUR_GIB + n),
        1 => (0u64..1 << 13).prop_map(|n| (u64::MAX - n * PAGE_2M) & !(PAGE_2M - 1)),
        1 => (0u64..1 << 10, prop_oneof![Just(46), Just(47), Just(51), Just(63)])
            .prop_map(|(n, bit)| (1u64 << bit) + n * PAGE_2M),
        1 => prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1u64 << 63), Just(FOUR_GIB - PAGE_2M)],
    ];
    prop_oneof![
        3 => Just(Shift::FourGib),
        2 => Just(Shift::MaxPhys),
        4 => explicit.prop_map(|bytes| Shift::Explicit { bytes }),
    ]
}

fn strategies() -> impl Strategy<Value = Kind> {
    prop_oneof![
        2 => shifts().prop_map(|shift| Kind::Shifted { shift }),
        2 => Just(Kind::IdentityCbit),
        3 => Just(Kind::Declared),
        1 => Just(Kind::PspCopied { via: PspVia::LaunchUpdate }),
        1 => Just(Kind::PspCopied { via: PspVia::SendReceive }),
    ]
}

fn limits() -> impl Strategy<Value = HostLimits> {
    let c_bit = prop_oneof![Just(None), Just(Some(47)), Just(Some(51))];
    let reduction = prop_oneof![Just(0u8), Just(1), Just(5)];
    let budget = prop_oneof![1 => 0u32..12, 6 => Just(32_764)];
    let bits = prop_oneof![1 => 36u8..=52, 2 => 44u8..=52];
    (bits, c_bit, reduction, budget, any::<bool>()).prop_map(|(bits, c_bit, reduction, slots, gib_pages)| {
        HostLimits {
            max_phys_bits: bits,
            c_bit,
            phys_bit_reduction: reduction,
            slot_budget: slots,
            gib_pages,
        }
    })
}

fn confidentialities() -> impl Strategy<Value = Confidentiality> {
    prop_oneof![
        4 => Just(Confidentiality::None),
        4 => Just(Confidentiality::Sev),
        2 => Just(Confidentiality::SevEs),
        1 => Just(Confidentiality::SevSnp),
    ]
}

fn headers() -> impl Strategy<Value = Header> {
    (1u64..40, 0u64..20, 0u64..5, 0u64..300)
        .prop_map(|(text, rodata, data, bss)| header(text, rodata, data, bss))
}

pub fn header(text: u64, rodata: u64, data: u64, bss: u64) -> Header {
    let text_end = abi::IMAGE_VA + text * PAGE_SIZE;
    let rodata_end = text_end + rodata * PAGE_SIZE;
    let data_end = rodata_end + data * PAGE_SIZE;
    Header {
        abi_min: mirrorvm_abi::ABI_VERSION,
        abi_max: mirrorvm_abi::ABI_VERSION,
        layout_hash: abi::LAYOUT_HASH,
        base: abi::IMAGE_VA,
        entry: abi::IMAGE_VA + 96,
        text_end,
        rodata_end,
        data_end,
        bss_end: data_end + bss * PAGE_SIZE,
        suites: mirrorvm_abi::record::Suite::Aes256Gcm.bit(),
    }
}

/// Numbers that a hostile helper would try.
fn hostile() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(0),
        Just(1),
        Just(PAGE_SIZE),
        Just(FOUR_GIB),
        Just(u64::MAX),
        Just(u64::MAX - PAGE_SIZE + 1),
        (30u32..64).prop_map(|bit| 1u64 << bit),
        (30u32..64).prop_map(|bit| (1u64 << bit) - PAGE_SIZE),
        (0u64..1 << 24).prop_map(|page| page * PAGE_SIZE),
        (0u64..FOUR_GIB),
    ]
}

/// What happens to one field, or to the list; the number picks a tuple.
#[derive(Clone, Copy, Debug)]
enum Twist {
    Guest(usize, u64),
    Len(usize, u64),
    Mirror(usize, u64),
    /// Bits flipped, so that one rule alone breaks.
    Flip(usize, u8, u8),
    /// Again, with the mirror address moved.
    Duplicate(usize, u64),
    Swap(usize, usize),
    Drop(usize),
    /// In two, both right.
    Split(usize, u64),
    /// The mirror addresses of all moved.
    MoveAll(u64),
    /// A page longer than it should be.
    Grow(usize),
    /// Onto RAM of the guest, by index of block.
    OntoRam(usize, usize),
    /// Where another tuple is in the mirror.
    Onto(usize, usize),
}

fn twists() -> impl Strategy<Value = Twist> {
    let n = 0usize..8;
    prop_oneof![
        1 => (n.clone(), hostile()).prop_map(|(i, v)| Twist::Guest(i, v)),
        1 => (n.clone(), hostile()).prop_map(|(i, v)| Twist::Len(i, v)),
        1 => (n.clone(), hostile()).prop_map(|(i, v)| Twist::Mirror(i, v)),
        1 => (n.clone(), 0u8..3, 0u8..64).prop_map(|(i, field, bit)| Twist::Flip(i, field, bit)),
        1 => (n.clone(), hostile()).prop_map(|(i, by)| Twist::Duplicate(i, by)),
        3 => (n.clone(), n.clone()).prop_map(|(i, j)| Twist::Swap(i, j)),
        1 => n.clone().prop_map(Twist::Drop),
        4 => (n.clone(), any::<u64>()).prop_map(|(i, at)| Twist::Split(i, at)),
        1 => hostile().prop_map(Twist::MoveAll),
        1 => n.clone().prop_map(Twist::Grow),
        1 => (n.clone(), n.clone()).prop_map(|(i, b)| Twist::OntoRam(i, b)),
        1 => (n.clone(), n).prop_map(|(i, j)| Twist::Onto(i, j)),
    ]
}

#[derive(Clone, Debug)]
enum Declares {
    Nothing,
    Reference(Vec<Twist>),
    Random(Vec<(u64, u64, u64)>),
}

fn declares() -> impl Strategy<Value = Declares> {
    let twisted = prop::collection::vec(twists(), 1..4);
    let random = prop::collection::vec((hostile(), hostile(), hostile()), 0..6);
    prop_oneof![
        1 => Just(Declares::Nothing),
        4 => Just(Declares::Reference(Vec::new())),
        8 => twisted.prop_map(Declares::Reference),
        1 => random.prop_map(Declares::Random),
    ]
}

fn declaration(
    how: Declares,
    layout: &GuestLayout,
    header: &Header,
    limits: &HostLimits,
) -> Option<Declaration> {
    let twists = match how {
        Declares::Nothing => return None,
        Declares::Random(list) => {
            let tuple =
                |(guest, len, mirror)| Tuple { guest: Gpa::new(guest), len, mirror: MirrorGpa::new(mirror) };
            return Declaration::new(list.into_iter().map(tuple).collect()).ok();
        }
        Declares::Reference(twists) => twists,
    };
    let mut tuples =
        reference_declaration(layout, header, limits).map(|d| d.tuples().to_vec()).unwrap_or_default();
    for twist in twists {
        let Some(count) = Some(tuples.len()).filter(|n| *n > 0) else { break };
        let moved = |m: MirrorGpa, by: u64| MirrorGpa::new(m.get().wrapping_add(by & !(PAGE_SIZE - 1)));
        match twist {
            Twist::Guest(i, v) => tuples[i % count].guest = Gpa::new(v),
            Twist::Len(i, v) => tuples[i % count].len = v,
            Twist::Mirror(i, v) => tuples[i % count].mirror = MirrorGpa::new(v),
            Twist::Flip(i, field, bit) => {
                let t = &mut tuples[i % count];
                match field {
                    0 => t.guest = Gpa::new(t.guest.get() ^ 1 << bit),
                    1 => t.len ^= 1 << bit,
                    _ => t.mirror = MirrorGpa::new(t.mirror.get() ^ 1 << bit),
                }
            }
            Twist::Duplicate(i, by) => {
                let t = tuples[i % count];
                tuples.push(Tuple { mirror: moved(t.mirror, by), ..t });
            }
            Twist::Swap(i, j) => tuples.swap(i % count, j % count),
            Twist::Drop(i) => drop(tuples.remove(i % count)),
            Twist::Split(i, at) => {
                let t = tuples[i % count];
                let first = at % (t.len / PAGE_SIZE).max(1) * PAGE_SIZE;
                if first > 0 {
                    tuples[i % count].len = first;
                    tuples.push(Tuple {
                        guest: Gpa::new(t.guest.get().wrapping_add(first)),
                        len: t.len - first,
                        mirror: moved(t.mirror, first),
                    });
                }
            }
            Twist::MoveAll(by) => tuples.iter_mut().for_each(|t| t.mirror = moved(t.mirror, by)),
            Twist::Grow(i) => tuples[i % count].len = tuples[i % count].len.wrapping_add(PAGE_SIZE),
            Twist::OntoRam(i, b) => {
                let parts = layout.plugged();
                tuples[i % count].guest = parts[b % parts.len()].1.gpa;
            }
            Twist::Onto(i, j) => tuples[i % count].mirror = tuples[j % count].mirror,
        }
    }
    Declaration::new(tuples).ok()
}

pub fn cases() -> impl Strategy<Value = Case> {
    let blocks = prop::collection::vec((sizes(), 0u64..3, places()), 1..7);
    let mailbox = (1u32..=16, 1u32..=16).prop_map(|(workers, slots)| MailboxSize { workers, slots });
    let guest = (blocks, prop_oneof![2 => Just(0u32), 1 => 1u32..20], helpers(), headers());
    let host = (limits(), confidentialities(), prop_oneof![3 => Just(false), 1 => Just(true)]);
    // Which unplugged ranges are shared: none known, all, or all but one page.
    let shared = prop_oneof![Just(None), Just(Some(None)), any::<u64>().prop_map(|n| Some(Some(n)))];
    (guest, host, strategies(), mailbox, declares(), shared).prop_map(
        |((blocks, vcpus, helper, header), host, strategy, mailbox, declares, shared)| {
            let (limits, confidentiality, read_only_text) = host;
            let mut bare =
                GuestLayout::from_blocks(blocks_of(&blocks)).expect("the generator makes good layouts");
            if vcpus > 0 {
                bare = bare.with_save_areas(vcpus).unwrap();
            }
            let (layout, sized) = place_helper(&bare, helper, &header);
            Case {
                sized,
                declaration: declaration(declares, &layout, &header, &limits),
                shared: shared.map(|but| shared_pages(&layout, but)),
                layout,
                header,
                limits,
                strategy,
                mailbox,
                confidentiality,
                read_only_text,
            }
        },
    )
}

fn place_helper(bare: &GuestLayout, helper: HelperBlock, header: &Header) -> (GuestLayout, bool) {
    let size = HelperPlacement::block_size(header, bare).unwrap();
    let plug = match helper {
        HelperBlock::None => return (bare.clone(), false),
        HelperBlock::Short(pages) => {
            let needed =
                HelperPlacement::new(header, bare, mirrorvm::address_space::HelperSet::Declared).unwrap();
            return (bare.with_helper(needed.block_len() - pages * PAGE_SIZE, true).unwrap(), false);
        }
        HelperBlock::Sized(plug) => plug,
    };
    let layout = bare.with_helper(size, !matches!(plug, HelperPlug::No)).unwrap();
    let Some(gpa) = layout.helper().unwrap().gpa() else { return (layout, true) };
    let part = |offset: u64, gpa: u64, len: u64| Plug { offset, gpa: Gpa::new(gpa), len };
    let at = |share: u64| (size / PAGE_SIZE * share / 100).max(1) * PAGE_SIZE;
    let plugs = match plug {
        HelperPlug::No | HelperPlug::Whole => return (layout, true),
        HelperPlug::Cut(share, apart) => {
            // Far above everything that the generator places, but not above all page maps.
            let second = if apart { highest(&layout) + PAGE_2M } else { gpa.get() + at(share) };
            vec![part(0, gpa.get(), at(share)), part(at(share), second, size - at(share))]
        }
        HelperPlug::Hole(share) => {
            let (hole, end) = (at(share), (at(share) + 3 * PAGE_SIZE).min(size));
            let mut plugs = vec![part(0, gpa.get(), hole)];
            if end < size {
                plugs.push(part(end, gpa.get() + end, size - end));
            }
            plugs
        }
    };
    (layout.with_plugs(HELPER_BLOCK, plugs).unwrap(), true)
}

fn highest(layout: &GuestLayout) -> u64 {
    layout.plugged().last().map_or(0, |(_, p)| p.gpa.get() + p.len).max(FOUR_GIB + GIB)
}

/// Every unplugged page of RAM, all but the one that a number picks.
fn shared_pages(layout: &GuestLayout, but: Option<u64>) -> PageSet {
    let mut set = PageSet::new();
    for b in layout.ram().filter(|b| b.role == BlockRole::Ram) {
        let mut at = 0;
        for (start, end) in b.plugs.iter().map(|p| (p.offset, p.offset + p.len)).chain([(b.size, b.size)]) {
            if start > at {
                set.insert_range(PageRange::new(b.ram_addr.get() + at, start - at).unwrap());
            }
            at = end;
        }
    }
    if let (Some(n), true) = (but, !set.is_empty()) {
        let page = set.iter().nth((n % set.len()) as usize).unwrap();
        set.remove(page);
    }
    set
}

/// Blocks one after the other in `RamAddr`, plugged where there is room.
pub fn blocks_of(wanted: &[(u64, u64, Place)]) -> Vec<RamBlock> {
    let (mut ram, mut low, mut high, mut low_end) = (0u64, 0u64, FOUR_GIB, FOUR_GIB);
    let mut list = Vec::new();
    for (index, &(size, gap, place)) in wanted.iter().enumerate() {
        let ram_addr = match gap {
            0 => ram.next_multiple_of(PAGE_2M),
            1 => ram,
            _ => ram + 3 * PAGE_SIZE,
        };
        ram = ram_addr + size;
        let third = size / 3 / PAGE_SIZE * PAGE_SIZE;
        let mut at = |len: u64, below: bool| {
            if below && low + len <= low_end {
                low += len + PAGE_SIZE;
                return Gpa::new(low - len - PAGE_SIZE);
            }
            high += len + PAGE_2M;
            Gpa::new(high - len - PAGE_2M)
        };
        let whole = |gpa| vec![Plug { offset: 0, gpa, len: size }];
        let plugs = match place {
            Place::Low => whole(at(size, true)),
            Place::High => whole(at(size, false)),
            Place::Far(hole) => {
                high += hole * GIB + size;
                whole(Gpa::new(high - size))
            }
            Place::Part(below) if third > 0 => {
                vec![Plug { offset: third, gpa: at(third, below), len: third }]
            }
            Place::Halves if third > 0 => {
                let last = Plug { offset: size - third, gpa: at(third, true), len: third };
                vec![Plug { offset: 0, gpa: at(third, true), len: third }, last]
            }
            // Once, and only while nothing lies there.
            Place::Straddling
                if high == FOUR_GIB && size > PAGE_SIZE && size / 2 <= FOUR_GIB.saturating_sub(low) =>
            {
                let start = FOUR_GIB - size / 2 / PAGE_SIZE * PAGE_SIZE;
                (low_end, high) = (start, start + size);
                whole(Gpa::new(start))
            }
            Place::Unplugged | Place::Part(_) | Place::Halves | Place::Straddling => Vec::new(),
        };
        list.push(RamBlock {
            name: format!("b{index}"),
            ram_addr: RamAddr::new(ram_addr),
            size,
            role: BlockRole::Ram,
            plugs,
        });
    }
    list
}

pub fn spec(name: &str, size_bytes: u64, gpa: Option<u64>) -> BlockSpec {
    BlockSpec { name: name.into(), size_bytes, gpa: gpa.map(Gpa::new) }
}
