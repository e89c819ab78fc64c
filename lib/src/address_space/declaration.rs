//! What a helper declares under the `declared` strategy: which of the guest's pages it runs from, and where
//! the mirror shall see them.
//!
//! A declaration comes from the guest (untrusted by the host) through the host (untrusted by the guest): here
//! it is only bounded; `declared` checks every tuple against the layout and the limits.

use mirrorvm_abi::{header::Header, layout as abi};
use serde::{Deserialize, Serialize};

use super::{GuestLayout, HelperPlacement, HelperSet, HostLimits, RamBlock, Refusal, RefusalCode};
use crate::addr::{Gpa, MirrorGpa, PAGE_2M, PAGE_SIZE, RamAddr, align_up};

/// One piece of the helper's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuple {
    /// Where the guest sees it.
    pub guest: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where the mirror is to see it.
    pub mirror: MirrorGpa,
}

/// A list of at most [`Declaration::MAX`] tuples. Nothing else about them is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Tuple>", into = "Vec<Tuple>")]
pub struct Declaration {
    tuples: Vec<Tuple>,
}

impl Declaration {
    /// Most tuples. A helper has seven parts; this leaves room for one that is scattered page by page.
    pub const MAX: usize = 4096;
    /// 64-bit words of one tuple as a guest writes it: guest address, bytes, mirror address.
    pub const TUPLE_WORDS: usize = 3;

    /// A declaration of these tuples.
    ///
    /// # Errors
    /// [`RefusalCode::DeclarationCount`] for more than [`Declaration::MAX`].
    pub fn new(tuples: Vec<Tuple>) -> Result<Self, Refusal> {
        check_count(tuples.len() as u64)?;
        Ok(Self { tuples })
    }

    /// A declaration as a guest wrote it: `count` says how many tuples, `words` are what was read of them.
    ///
    /// # Errors
    /// [`RefusalCode::DeclarationCount`] when the count is above [`Declaration::MAX`] or is not what the
    /// words hold; nothing is allocated then.
    pub fn from_words(count: u64, words: &[u64]) -> Result<Self, Refusal> {
        check_count(count)?;
        let (tuples, rest) = words.as_chunks::<{ Self::TUPLE_WORDS }>();
        if tuples.len() as u64 != count || !rest.is_empty() {
            let refusal = Refusal::new(RefusalCode::DeclarationCount, "tuples", count);
            return Err(refusal.bound(tuples.len() as u64));
        }
        let tuple = |[guest, len, mirror]: &[u64; 3]| Tuple {
            guest: Gpa::new(*guest),
            len: *len,
            mirror: MirrorGpa::new(*mirror),
        };
        Ok(Self { tuples: tuples.iter().map(tuple).collect() })
    }

    /// The declaration as a guest writes it, see [`Declaration::TUPLE_WORDS`].
    pub fn words(&self) -> Vec<u64> {
        self.tuples.iter().flat_map(|t| [t.guest.get(), t.len, t.mirror.get()]).collect()
    }

    /// The tuples, in the order in which they were declared.
    pub fn tuples(&self) -> &[Tuple] {
        &self.tuples
    }
}

fn check_count(count: u64) -> Result<(), Refusal> {
    let bound = Declaration::MAX as u64;
    if count <= bound {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::DeclarationCount, "tuples", count).bound(bound))
}

impl TryFrom<Vec<Tuple>> for Declaration {
    type Error = Refusal;

    fn try_from(tuples: Vec<Tuple>) -> Result<Self, Refusal> {
        Self::new(tuples)
    }
}

impl From<Declaration> for Vec<Tuple> {
    fn from(declaration: Declaration) -> Self {
        declaration.tuples
    }
}

/// What the reference guest declares: the helper in pieces that are not contiguous (code, data, secret with
/// TSS, stacks, maps, configuration with tables, page digests where there is room for them), out of order and
/// with gaps between them in the mirror.
/// `None` when the helper's block is missing, too small or not wholly plugged at the places that matter.
pub fn reference_declaration(
    layout: &GuestLayout,
    header: &Header,
    limits: &HostLimits,
) -> Option<Declaration> {
    let p = HelperPlacement::new(header, layout, HelperSet::Declared)?;
    let block = layout.helper().filter(|b| p.block_len() <= b.size)?;
    let p = p.in_block(layout, block.size);
    let text = header.text_end.checked_sub(header.base)?;
    let parts = [
        (0, text),
        (text, p.secret_at - text),
        (p.secret_at, p.workers_at - p.secret_at),
        (p.workers_at, u64::from(abi::WORKERS_MAX) * abi::WORKER_BYTES),
        (p.maps_at, p.maps_len),
        (p.config_at, (p.config_pages + p.table_pages) * PAGE_SIZE),
    ];
    // Half-way up to the RAM window, last part first and every gap of another size. 2 MiB pages still fit the
    // maps: each part keeps its offset within 2 MiB.
    let mut at = limits.max_phys_shift() / 2;
    let mut tuples = Vec::new();
    for (n, (offset, len)) in (1u64..).zip(parts.into_iter().rev()).filter(|(_, (_, len))| *len > 0) {
        at = align_up(at, PAGE_2M)?.checked_add(offset % PAGE_2M)?;
        tuples.extend(part(layout, block, (offset, len), at)?);
        at = at.checked_add(len)?.checked_add(n * PAGE_2M)?;
    }
    // A helper does without digests where they are not plugged.
    let digests = (p.digests_at, p.digests_len);
    let last = align_up(at, PAGE_2M).and_then(|at| part(layout, block, digests, at));
    tuples.extend(last.into_iter().flatten());
    Declaration::new(tuples).ok()
}

/// The tuples of a part of the helper's block (offset, bytes), which the mirror sees from `at` on. `None`
/// when it is not plugged. A block that is plugged in parts makes more tuples.
fn part(layout: &GuestLayout, block: &RamBlock, (offset, len): (u64, u64), at: u64) -> Option<Vec<Tuple>> {
    let ram = block.ram_addr.get().checked_add(offset)?;
    let (mut tuples, mut done) = (Vec::new(), 0);
    while done < len {
        let offset = offset + done;
        let plug = block.plugs.iter().find(|p| offset >= p.offset && offset - p.offset < p.len)?;
        let step = (len - done).min(plug.len - (offset - plug.offset));
        let guest = layout.ram_to_gpa(RamAddr::new(ram.checked_add(done)?))?;
        tuples.push(Tuple { guest, len: step, mirror: MirrorGpa::new(at.checked_add(done)?) });
        done += step;
    }
    Some(tuples)
}
