//! What a guest's helper declares of its address space, and what hosts say of a guest's RAM.
//!
//! A declaration that a plan accepts leads only to the helper's own block; nothing lies on anything else,
//! within what the host can address; and every page of RAM has one name, by which it is found again. A
//! refusal says what is wrong. A layout that is read is one that can be made.

use mirrorvm::addr::{Gpa, PAGE_SIZE};
use mirrorvm::address_space::{
    BlockSpec, Confidentiality, Declaration, GuestLayout, HelperPlacement, HostLimits, MailboxSize,
    MirrorPlan, PlanRequest, Refusal, Shift, SlotBacking, Strategy, Tuple, plan, reference_declaration,
};
use mirrorvm_abi::header::Header;

use crate::{Bytes, Seed, image};

const MAILBOX: MailboxSize = MailboxSize { workers: 2, slots: 4 };
/// Bytes of the guest's RAM, in one block at 0 and one that is not plugged.
const RAM: u64 = 8 << 20;

fn header() -> Header {
    let mut file = image::head(8, 2, 1, 4);
    file.resize(11 * 4096, 0);
    Header::parse(&file).unwrap()
}

fn layout() -> GuestLayout {
    let block = |name: &str, size_bytes, gpa: Option<u64>| BlockSpec {
        name: name.into(),
        size_bytes,
        gpa: gpa.map(Gpa::new),
    };
    let bare = GuestLayout::assign(&[block("ram0", RAM, Some(0)), block("dimm", 2 << 20, None)]).unwrap();
    let size = HelperPlacement::block_size(&header(), &bare).unwrap();
    bare.with_helper(size, true).unwrap()
}

/// What the host is (3 bytes), how many tuples are said to follow (2), then tuples as words; or, when the
/// first byte says so, a layout as JSON.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let first = bytes.u8();
    if first == 0xff {
        return read_layout(bytes.0);
    }
    let limits = HostLimits {
        max_phys_bits: 36 + bytes.u8() % 17,
        c_bit: None,
        phys_bit_reduction: bytes.u8() % 3,
        slot_budget: if first & 2 == 0 { 32_764 } else { 12 },
        gib_pages: first & 4 != 0,
    };
    let (more, count) = (first & 8 != 0, u64::from(bytes.u16()));
    let words: Vec<u64> = bytes.0.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    // Most of the time it says what it has.
    let count = if more { count } else { words.len() as u64 / 3 };
    let declaration = match Declaration::from_words(count, &words) {
        Ok(declaration) => declaration,
        Err(refusal) => {
            assert!(count > Declaration::MAX as u64 || count * 3 != words.len() as u64, "{refusal:?}");
            return;
        }
    };
    assert_eq!(declaration.words(), words);
    let (layout, header) = (layout(), header());
    let mut request = PlanRequest::new(&layout, &header, &limits, Strategy::Declared, MAILBOX);
    request.declaration = Some(&declaration);
    request.read_only_text = first & 16 != 0;
    match plan(&request) {
        Ok(planned) => accepted(&planned, &layout, &limits, &declaration),
        Err(refusals) => refused(&refusals, &declaration),
    }
    // The others take no notice of what is declared.
    request.strategy = Strategy::Shifted { shift: Shift::FourGib };
    request.confidentiality = Confidentiality::None;
    let with = plan(&request);
    request.declaration = None;
    assert_eq!(with, plan(&request));
}

fn refused(refusals: &[Refusal], declaration: &Declaration) {
    assert!(!refusals.is_empty());
    for refusal in refusals {
        assert!(!refusal.to_string().is_empty());
        assert!(refusal.index.is_none_or(|index| index < declaration.tuples().len().max(64)), "{refusal:?}");
    }
}

fn accepted(planned: &MirrorPlan, layout: &GuestLayout, limits: &HostLimits, declaration: &Declaration) {
    let end = u128::from(limits.phys_limit());
    let mut slots: Vec<(u128, u128)> = planned
        .slots
        .iter()
        .map(|s| (s.gpa.get().into(), u128::from(s.gpa.get()) + u128::from(s.len)))
        .collect();
    slots.sort_unstable();
    assert!(slots.iter().all(|(from, to)| from < to && *to <= end && from % 4096 == 0), "{slots:x?}");
    assert!(slots.windows(2).all(|pair| pair[0].1 <= pair[1].0), "slots over each other: {slots:x?}");
    assert!(planned.slots.len() <= limits.slot_budget as usize);
    let block = layout.helper().unwrap();
    let helper = block.gpa().unwrap().get()..block.gpa().unwrap().get() + block.size;
    for Tuple { guest, len, mirror } in declaration.tuples() {
        let inside = helper.contains(&guest.get()) && guest.get() + len <= helper.end;
        assert!(*len > 0 && inside, "{guest} +{len:x} is not the helper's");
        let offset = guest.get() - helper.start;
        assert_eq!(planned.helper_at(offset), Some(*mirror), "declared at {mirror}");
    }
    // RAM of the guest is in slots of RAM alone, the helper's block in none of the window.
    let guest_end = layout.guest_end().get();
    for slot in &planned.slots {
        if let SlotBacking::Ram { ram_addr } = slot.backing {
            let whole = ram_addr.get() + slot.len <= guest_end || ram_addr.get() >= block.ram_addr.get();
            assert!(whole, "a slot of RAM and the helper's block at once: {slot:?}");
        }
    }
    let mut pages = 0;
    for range in &planned.allowed {
        for page in [range.start() / PAGE_SIZE, range.end() / PAGE_SIZE - 1] {
            let ram = planned.ram_page(page).expect("a page that is allowed is one of RAM");
            assert_eq!(planned.helper_page(ram), Some(page));
            assert!(ram.get() * PAGE_SIZE < guest_end, "the helper may touch itself");
        }
        pages += range.pages();
    }
    assert!(pages == planned.allowed_pages() && pages * PAGE_SIZE <= layout.ram_bytes());
}

fn read_layout(json: &[u8]) {
    let Ok(layout) = serde_json::from_slice::<GuestLayout>(json) else { return };
    let again = GuestLayout::from_blocks(layout.blocks().to_vec());
    assert_eq!(again.as_ref(), Ok(&layout), "what is read can be made");
    let written = serde_json::to_vec(&layout).unwrap();
    assert_eq!(serde_json::from_slice::<GuestLayout>(&written).unwrap(), layout);
    // An address leads to RAM and back.
    for (block, plug) in layout.plugged() {
        for gpa in [plug.gpa.get(), plug.gpa.get() + plug.len - 1] {
            let ram = layout.gpa_to_ram(Gpa::new(gpa)).expect("it is plugged");
            assert!(block.ram_range().contains(ram.get()));
            assert_eq!(layout.ram_to_gpa(ram), Some(Gpa::new(gpa)));
        }
    }
}

/// The reference helper's declaration and changes of it; layouts.
pub fn seeds() -> Vec<Seed> {
    let (layout, header) = (layout(), header());
    let limits = HostLimits {
        max_phys_bits: 46,
        c_bit: None,
        phys_bit_reduction: 0,
        slot_budget: 32_764,
        gib_pages: false,
    };
    let reference = reference_declaration(&layout, &header, &limits).unwrap().words();
    let asked = |flags: u8, count: u16, words: &[u64]| {
        let mut bytes = vec![flags, 10, 0];
        bytes.extend(count.to_le_bytes());
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    };
    let mut all: Vec<Seed> = vec![
        ("reference".into(), asked(0, 0, &reference)),
        ("reference-read-only".into(), asked(16, 0, &reference)),
        ("few-slots".into(), asked(2, 0, &reference)),
        ("nothing".into(), asked(0, 0, &[])),
        ("another-count".into(), asked(8, 7, &reference)),
        ("half".into(), asked(0, 0, &reference[..9])),
        ("twice".into(), asked(0, 0, &[&reference[..], &reference[..3]].concat())),
        (
            "turned-round".into(),
            asked(0, 0, &reference.chunks(3).rev().flatten().copied().collect::<Vec<_>>()),
        ),
        ("narrow-host".into(), [&[0, 0, 2, 0, 0][..], &asked(0, 0, &reference)[5..]].concat()),
    ];
    for word in 0..6 {
        for (name, value) in [("zero", 0), ("top", u64::MAX - 4095), ("odd", 1), ("all", u64::MAX)] {
            let mut words = reference.clone();
            words[word] = value;
            all.push((format!("word-{word}-{name}"), asked(0, 0, &words)));
        }
    }
    for (name, layout) in [
        ("layout", layout.clone()),
        ("layout-bare", GuestLayout::from_blocks(layout.blocks()[..2].to_vec()).unwrap()),
    ] {
        all.push((name.into(), [&[0xff][..], &serde_json::to_vec(&layout).unwrap()].concat()));
    }
    let torn = br#"[{"name":"a","ram_addr":0,"size":8192,"role":"ram","plugs":[{"offset":0,"gpa":4096,"len":4096},{"offset":4096,"gpa":4096,"len":4096}]}]"#;
    all.push(("layout-over-itself".into(), [&[0xff][..], torn].concat()));
    all
}
