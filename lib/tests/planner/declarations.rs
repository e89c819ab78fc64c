//! Declarations: what a hostile helper could write, refused by name and index; and what the reference guest
//! declares.

use mirrorvm::addr::{Gpa, MirrorGpa, PAGE_2M, PAGE_SIZE};
use mirrorvm::address_space::{
    Declaration, FOUR_GIB, GuestLayout, HELPER_BLOCK, HelperPlacement, HelperSet, HostLimits, MirrorPlan,
    PlanRequest, Plug, Purpose, Refusal, RefusalCode as C, Strategy as Kind, Tuple, plan,
    reference_declaration,
};
use proptest::prelude::*;

use crate::GIB;
use crate::by_name::{LIMITS, MAILBOX, Short, guest, image, short, with_helper};

/// What `declared` shifts the window by on the hosts of these tests.
const WINDOW: u64 = 1 << 45;

fn declare(
    layout: &GuestLayout,
    limits: &HostLimits,
    tuples: Vec<Tuple>,
) -> Result<MirrorPlan, Vec<Refusal>> {
    let (h, declaration) = (image(), Declaration::new(tuples).unwrap());
    let mut request = PlanRequest::new(layout, &h, limits, Kind::Declared, MAILBOX);
    request.declaration = Some(&declaration);
    plan(&request)
}

fn refused(layout: &GuestLayout, limits: &HostLimits, tuples: Vec<Tuple>) -> Vec<Short> {
    declare(layout, limits, tuples).map_or_else(|r| short(&r), |_| Vec::new())
}

fn reference(layout: &GuestLayout) -> Vec<Tuple> {
    reference_declaration(layout, &image(), &LIMITS).unwrap().tuples().to_vec()
}

/// The reference declaration with a change to its third tuple.
fn with(change: impl FnOnce(&mut Tuple)) -> Vec<Short> {
    let layout = with_helper(&guest(64 << 20));
    let mut tuples = reference(&layout);
    change(&mut tuples[2]);
    refused(&layout, &LIMITS, tuples)
}

#[test]
fn the_reference_guest_declares_pieces_that_are_scattered() {
    let layout = with_helper(&guest(64 << 20));
    let tuples = reference(&layout);
    assert_eq!(tuples.len(), 6);
    let by_guest = |a: &&Tuple, b: &&Tuple| a.guest.cmp(&b.guest);
    assert!(!tuples.is_sorted_by(|a, b| a.guest < b.guest), "out of order");
    let mut sorted: Vec<&Tuple> = tuples.iter().collect();
    sorted.sort_by(by_guest);
    assert!(sorted.windows(2).all(|p| p[0].mirror > p[1].mirror), "and the other way round in the mirror");
    let mut ends: Vec<(u64, u64)> = tuples.iter().map(|t| (t.mirror.get(), t.mirror.get() + t.len)).collect();
    ends.sort_unstable();
    let gaps: Vec<u64> = ends.windows(2).map(|p| p[1].0 - p[0].1).collect();
    assert!(gaps.iter().all(|g| *g >= PAGE_2M), "{gaps:x?}");
    let plan = declare(&layout, &LIMITS, tuples).unwrap();
    // Code, data, secret with TSS, stacks, maps, set; five of them would do, one is never contiguous with
    // another.
    assert_eq!(plan.helper.len(), 6);
    assert_eq!(plan.slots.iter().filter(|s| s.purpose == Purpose::DeclaredPiece).count(), 6);
    // Nothing but what was declared: the sets of the other strategies are out of reach.
    let p = HelperPlacement::new(&image(), &layout, HelperSet::Shifted).unwrap();
    assert_eq!(plan.helper_at(p.config_at), None);
    assert!(plan.helper_at(plan.placement.tables_at).is_some());
}

#[test]
fn a_helper_that_is_plugged_in_parts_is_declared_in_parts() {
    let layout = with_helper(&guest(64 << 20));
    let size = layout.helper().unwrap().size;
    let p = HelperPlacement::new(&image(), &layout, HelperSet::Declared).unwrap();
    let cut = p.workers_at + PAGE_SIZE;
    let part = |offset: u64, gpa: u64, len: u64| Plug { offset, gpa: Gpa::new(gpa), len };
    let parts = vec![part(0, 2 * GIB, cut), part(cut, GIB, size - cut)];
    let torn = layout.with_plugs(HELPER_BLOCK, parts).unwrap();
    let tuples = reference(&torn);
    assert_eq!(tuples.len(), 7);
    let plan = declare(&torn, &LIMITS, tuples).unwrap();
    assert_eq!(plan.helper.len(), 6, "the stacks are one piece again in the mirror");
    // One tuple over two parts that follow each other for the guest: two slots, one piece.
    let parts = vec![part(0, GIB, cut), part(cut, GIB + cut, size - cut)];
    let seam = layout.with_plugs(HELPER_BLOCK, parts).unwrap();
    let whole = Tuple { guest: Gpa::new(GIB), len: size, mirror: MirrorGpa::new(FOUR_GIB) };
    let plan = declare(&seam, &LIMITS, vec![whole]).unwrap();
    assert_eq!(plan.slots.iter().filter(|s| s.purpose == Purpose::DeclaredPiece).count(), 2);
    assert_eq!(plan.helper.len(), 1);
    // The other way round for the guest: two pieces.
    let parts = vec![part(0, GIB + (size - cut), cut), part(cut, GIB, size - cut)];
    let swapped = layout.with_plugs(HELPER_BLOCK, parts).unwrap();
    let plan = declare(&swapped, &LIMITS, vec![whole]).unwrap();
    assert_eq!(plan.helper_at(0).unwrap().get(), FOUR_GIB + size - cut);
    assert_eq!(plan.helper_at(cut).unwrap().get(), FOUR_GIB);
}

#[test]
fn nothing_declared() {
    let layout = with_helper(&guest(64 << 20));
    let h = image();
    let request = PlanRequest::new(&layout, &h, &LIMITS, Kind::Declared, MAILBOX);
    assert_eq!(short(&plan(&request).unwrap_err()), [(C::NoDeclaration, None, 0, None)]);
    assert_eq!(refused(&layout, &LIMITS, Vec::new()), [(C::DeclarationIncomplete, None, 0, None)]);
    let size = layout.helper().unwrap().size;
    let hidden = guest(64 << 20).with_helper(size, false).unwrap();
    assert_eq!(reference_declaration(&hidden, &h, &LIMITS), None);
    let refused = refused(&hidden, &LIMITS, Vec::new());
    assert_eq!(refused, [(C::HelperUnplugged, None, 0, None)]);
}

#[test]
fn numbers_that_cannot_be() {
    let layout = with_helper(&guest(64 << 20));
    let t = reference(&layout)[2];
    let (guest, mirror) = (t.guest.get(), t.mirror.get());
    assert_eq!(with(|_| ()), []);
    assert_eq!(with(|t| t.len = 0), [(C::TupleZero, Some(2), 0, None)]);
    let odd = Some(PAGE_SIZE);
    assert_eq!(with(|t| t.len -= 8), [(C::TupleUnaligned, Some(2), t.len - 8, odd)]);
    assert_eq!(with(|t| t.guest = Gpa::new(guest + 8)), [(C::TupleUnaligned, Some(2), guest + 8, odd)]);
    assert_eq!(
        with(|t| t.mirror = MirrorGpa::new(mirror + 1)),
        [(C::TupleUnaligned, Some(2), mirror + 1, odd)]
    );
    let top = u64::MAX - PAGE_SIZE + 1;
    // A guest address that wraps wraps; a mirror address does and lies in the window, too.
    assert_eq!(with(|t| t.guest = Gpa::new(top)), [(C::Wraps, Some(2), top, None)]);
    let wraps = with(|t| t.mirror = MirrorGpa::new(top));
    assert_eq!(wraps, [(C::Wraps, Some(2), top, None), (C::TupleInWindow, Some(2), u64::MAX, Some(WINDOW))]);
    let limit = 1u64 << 46;
    let end = limit + t.len;
    assert_eq!(with(|t| t.guest = Gpa::new(limit)), [(C::AboveMaxPhys, Some(2), end, Some(limit))]);
    let above = with(|t| t.mirror = MirrorGpa::new(limit));
    assert_eq!(
        above,
        [(C::AboveMaxPhys, Some(2), end, Some(limit)), (C::TupleInWindow, Some(2), end, Some(WINDOW))]
    );
    // In the window, and across its start by a page.
    let at = WINDOW - t.len;
    assert_eq!(with(|t| t.mirror = MirrorGpa::new(at)), []);
    let across = with(|t| t.mirror = MirrorGpa::new(at + PAGE_SIZE));
    assert_eq!(across, [(C::TupleInWindow, Some(2), WINDOW + PAGE_SIZE, Some(WINDOW))]);
    // With the C-bit among the usable ones, which no host has that reduces them.
    let limits = HostLimits { max_phys_bits: 46, c_bit: Some(44), ..LIMITS };
    let mut tuples = reference(&layout);
    tuples.iter_mut().for_each(|t| t.mirror = MirrorGpa::new(t.mirror.get() - (1 << 44) + (1 << 40)));
    assert_eq!(refused(&layout, &limits, tuples.clone()), []);
    tuples[2].mirror = MirrorGpa::new(1 << 44);
    tuples[4].guest = Gpa::new(tuples[4].guest.get() | 1 << 44);
    let c = Some(1u64 << 44);
    let guest = tuples[4].guest.get();
    assert_eq!(
        refused(&layout, &limits, tuples),
        [(C::CBitInAddress, Some(2), 1 << 44, c), (C::CBitInAddress, Some(4), guest, c)]
    );
}

#[test]
fn somebody_else_s_memory() {
    let layout = with_helper(&guest(64 << 20));
    let helper = layout.helper().unwrap();
    let (start, end) = (helper.gpa().unwrap().get(), helper.gpa().unwrap().get() + helper.size);
    let t = reference(&layout)[2];
    assert_eq!(with(|t| t.guest = Gpa::new(0)), [(C::TupleNotHelper, Some(2), 0, None)]);
    let hole = 2 * GIB;
    assert_eq!(with(|t| t.guest = Gpa::new(hole)), [(C::TupleNotRam, Some(2), hole, None)]);
    // The helper's last page, and on.
    assert_eq!(with(|t| t.guest = Gpa::new(end - PAGE_SIZE)), [(C::TupleNotRam, Some(2), end, None)]);
    // A page below its start, and so onto the tuples that are there.
    let below = with(|t| t.guest = Gpa::new(start - PAGE_SIZE));
    assert_eq!(below.iter().filter(|r| r.0 == C::TupleOverlap).count(), 3);
    assert_eq!(below.last(), Some(&(C::TupleNotRam, Some(2), start - PAGE_SIZE, None)));
    // Across the end of RAM into a hole: the first page that is not the helper's decides.
    let ram = 64u64 << 20;
    assert_eq!(
        with(|t| t.guest = Gpa::new(ram - PAGE_SIZE)),
        [(C::TupleNotHelper, Some(2), ram - PAGE_SIZE, None)]
    );
    assert!(t.len > PAGE_SIZE);
}

#[test]
fn the_same_twice() {
    let layout = with_helper(&guest(64 << 20));
    let tuples = reference(&layout);
    let t = tuples[2];
    // The same pages at another place: reachable twice.
    let mut again = tuples.clone();
    again.push(Tuple { mirror: MirrorGpa::new(GIB), ..t });
    let guest_end = Some(t.guest.get() + t.len);
    assert_eq!(refused(&layout, &LIMITS, again), [(C::TupleOverlap, Some(6), t.guest.get(), guest_end)]);
    // One page of it.
    let mut last = tuples.clone();
    let page = Gpa::new(t.guest.get() + t.len - PAGE_SIZE);
    last.insert(0, Tuple { guest: page, len: PAGE_SIZE, mirror: MirrorGpa::new(GIB) });
    assert_eq!(refused(&layout, &LIMITS, last), [(C::TupleOverlap, Some(0), page.get(), guest_end)]);
    // Two pieces at one place of the mirror: the later by address is named.
    let mut onto = tuples.clone();
    onto[4].mirror = MirrorGpa::new(t.mirror.get() + PAGE_SIZE);
    let at = t.mirror.get() + PAGE_SIZE;
    assert_eq!(
        refused(&layout, &LIMITS, onto),
        [(C::TupleOverlap, Some(4), at, Some(t.mirror.get() + t.len))]
    );
    // Both at once, as a plain duplicate.
    let mut both = tuples;
    both.push(t);
    let mirror_end = Some(t.mirror.get() + t.len);
    assert_eq!(
        refused(&layout, &LIMITS, both),
        [
            (C::TupleOverlap, Some(6), t.guest.get(), guest_end),
            (C::TupleOverlap, Some(6), t.mirror.get(), mirror_end)
        ]
    );
}

#[test]
fn parts_that_are_missing() {
    let layout = with_helper(&guest(64 << 20));
    let p = HelperPlacement::new(&image(), &layout, HelperSet::Declared).unwrap();
    let text = 8 * PAGE_SIZE;
    // In the order of the reference: set, maps, stacks, secret, data, code.
    let missing = [p.config_at, p.maps_at, p.workers_at, p.secret_at, text, 0];
    for (index, offset) in missing.into_iter().enumerate() {
        let mut tuples = reference(&layout);
        tuples.remove(index);
        assert_eq!(refused(&layout, &LIMITS, tuples), [(C::DeclarationIncomplete, None, offset, None)]);
    }
    // The last page of the maps.
    let mut tuples = reference(&layout);
    tuples[1].len -= PAGE_SIZE;
    let last = p.maps_at + p.maps_len - PAGE_SIZE;
    assert_eq!(refused(&layout, &LIMITS, tuples), [(C::DeclarationIncomplete, None, last, None)]);
    // Workers that are not configured need no stack.
    let mut tuples = reference(&layout);
    tuples[2].len = u64::from(MAILBOX.workers) * mirrorvm_abi::layout::WORKER_BYTES;
    assert_eq!(refused(&layout, &LIMITS, tuples.clone()), []);
    tuples[2].len -= PAGE_SIZE;
    let last = p.workers_at + u64::from(MAILBOX.workers) * mirrorvm_abi::layout::WORKER_BYTES - PAGE_SIZE;
    assert_eq!(refused(&layout, &LIMITS, tuples), [(C::DeclarationIncomplete, None, last, None)]);
    // Tables in two pieces; in two tuples that follow each other they are one.
    let mut tuples = reference(&layout);
    let (set, first) = (tuples[0], p.config_pages * PAGE_SIZE + 5 * PAGE_SIZE);
    tuples[0].len = first;
    let rest = Tuple {
        guest: Gpa::new(set.guest.get() + first),
        len: set.len - first,
        mirror: MirrorGpa::new(set.mirror.get() + first),
    };
    tuples.push(rest);
    assert_eq!(refused(&layout, &LIMITS, tuples.clone()), []);
    tuples[6].mirror = MirrorGpa::new(GIB);
    let pages = Some(p.table_pages);
    assert_eq!(refused(&layout, &LIMITS, tuples), [(C::TablesNotContiguous, None, 5, pages)]);
}

#[test]
fn more_tuples_than_there_may_be() {
    let layout = with_helper(&guest(64 << 20));
    let t = reference(&layout)[0];
    let max = Declaration::MAX as u64;
    let count = |count: u64, bound: u64| Refusal::new(C::DeclarationCount, "tuples", count).bound(bound);
    assert_eq!(Declaration::new(vec![t; Declaration::MAX + 1]), Err(count(max + 1, max)));
    let many = vec![t; 4000];
    // Window, mailbox and the tuples; nothing is said of the tuples themselves.
    let few = HostLimits { slot_budget: 4001, ..LIMITS };
    assert_eq!(refused(&layout, &few, many), [(C::SlotBudget, None, 4002, Some(4001))]);

    assert_eq!(Declaration::from_words(max + 1, &[]), Err(count(max + 1, max)));
    assert_eq!(Declaration::from_words(u64::MAX, &[]), Err(count(u64::MAX, max)));
    assert_eq!(Declaration::from_words(2, &[1, 2, 3]), Err(count(2, 1)));
    assert_eq!(Declaration::from_words(1, &[1, 2, 3, 4]), Err(count(1, 1)));
    assert_eq!(Declaration::from_words(0, &[1]), Err(count(0, 0)));
    assert_eq!(Declaration::from_words(0, &[]), Ok(Declaration::default()));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn words_round_trip(words in prop::collection::vec(any::<u64>(), 0..40)) {
        let words = &words[..words.len() / 3 * 3];
        let declaration = Declaration::from_words(words.len() as u64 / 3, words).unwrap();
        prop_assert_eq!(declaration.words(), words);
        let json = serde_json::to_string(&declaration).unwrap();
        prop_assert_eq!(serde_json::from_str::<Declaration>(&json).unwrap(), declaration);
    }
}

#[test]
fn a_list_that_is_too_long_is_not_read_from_json_either() {
    let one = r#"{"guest":0,"len":4096,"mirror":0}"#;
    let list = |n: usize| format!("[{}]", vec![one; n].join(","));
    assert!(serde_json::from_str::<Declaration>(&list(Declaration::MAX)).is_ok());
    assert!(serde_json::from_str::<Declaration>(&list(Declaration::MAX + 1)).is_err());
    assert!(serde_json::from_str::<Declaration>(r#"[{"guest":0,"len":1,"mirror":0,"more":1}]"#).is_err());
}
