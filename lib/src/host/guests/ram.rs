//! Adding RAM to a guest that is stopped: its definition with one block more.
//!
//! Owns: which guests may have one more, and what their definition and layout are then. Must not know: who
//! asks, what a machine does with it.

use std::sync::Arc;

use crate::addr::{Gpa, RamAddr};
use crate::address_space::{BlockRole, BlockSpec, GuestLayout};
use crate::codes::{Capability, Code};
use crate::guest::{EncryptionStatus, StatusError, StatusExtent};
use crate::host::guests::command::Command;
use crate::host::guests::decide::no_block;
use crate::host::inner::Inner;
use crate::host::{
    Ask, FieldError, GuestRecord, GuestSpec, GuestState, Host, HostError, RamBlockInfo, ResourceKind,
    validate,
};

impl Host {
    /// Adds a RAM block to a stopped guest; it is part of the definition from then on, on disk before this
    /// returns. Gives the block with the guest as it is then.
    ///
    /// # Errors
    /// No such guest, another state, a migration that has it, a driver that has its RAM in one piece
    /// ([`HostError::CapabilityMissing`]), [`HostError::GuestMoved`], a block that cannot be
    /// ([`HostError::Invalid`], with pointers into the block), [`HostError::GenerationMismatch`].
    pub async fn add_ram_block(
        &self,
        key: &str,
        block: BlockSpec,
        ask: &Ask,
    ) -> Result<(RamBlockInfo, GuestRecord), HostError> {
        self.inner.check_running()?;
        let name = block.name.clone();
        let guest = self.inner.find_guest(key)?;
        let record = guest.ask(|reply| Command::AddBlock(block, ask.clone(), reply)).await?;
        described(&self.inner, record, &name)
    }

    /// RAM blocks with their encryption status.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn ram_blocks(&self, key: &str) -> Result<Vec<RamBlockInfo>, HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        let live = matches!(record.state, GuestState::Running | GuestState::Paused | GuestState::InDoubt);
        let shared = guest.encryption().filter(|_| live).map(|e| e.shared());
        let backings = guest.backings().filter(|_| live);
        let blocks = record.layout.blocks().iter().enumerate().map(|(i, block)| {
            let backing = backings.as_ref().and_then(|b| b.get(i).copied());
            let backing = backing.unwrap_or_else(|| self.inner.backing_of(&record));
            let range = block.ram_range();
            let shared_pages =
                shared.as_ref().map(|s| s.iter().filter(|p| range.contains(p.get() * 4096)).count() as u64);
            let shared_bytes = shared_pages.map_or(0, |n| n * 4096);
            RamBlockInfo {
                block: block.clone(),
                backing,
                page_size: backing.page_size(),
                private_bytes: if live { block.size - shared_bytes } else { 0 },
                shared_bytes,
                unknown_bytes: if live { 0 } else { block.size },
            }
        });
        Ok(blocks.collect())
    }

    /// Gives a RAM block the address `gpa`, or (`None`) takes its address away when the guest has let go of
    /// it; its content and encryption status stay. Whether the guest lets go of it only the guest can tell:
    /// a dry run does not ask it.
    ///
    /// # Errors
    /// No such guest or block, a guest that neither runs nor is paused, [`HostError::PlugRefused`]; a mirror
    /// or a migration that has the guest.
    pub async fn plug(
        &self,
        key: &str,
        block: &str,
        gpa: Option<Gpa>,
        ask: &Ask,
    ) -> Result<RamBlockInfo, HostError> {
        let guest = self.inner.find_guest(key)?;
        let name = block.to_owned();
        let layout = guest.ask(|reply| Command::Replug { block: name, gpa, ask: ask.clone(), reply }).await?;
        let mut info = self.ram_block(key, block)?;
        info.block = layout.block(block).ok_or_else(|| no_block(block))?.clone();
        Ok(info)
    }

    /// Runs of pages with one encryption status, by `RamAddr` from `from` on, unplugged RAM included, at most
    /// `max`; `None` while the guest has no machine and nothing is known.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn encryption_extents(
        &self,
        key: &str,
        from: RamAddr,
        max: usize,
    ) -> Result<Option<Vec<StatusExtent>>, HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        let live = matches!(record.state, GuestState::Running | GuestState::Paused | GuestState::InDoubt);
        Ok(guest.encryption().filter(|_| live).map(|e| e.extents(&record.layout, from, max)))
    }

    /// Takes a report of page status as a guest makes it: what a KVM_HC_MAP_GPA_RANGE would say. All or
    /// nothing.
    ///
    /// # Errors
    /// A guest without machine, a range that is not all its RAM, a migration that has the guest.
    pub fn report_encryption(
        &self,
        key: &str,
        gpa: Gpa,
        pages: u64,
        private: bool,
        ask: &Ask,
    ) -> Result<(), HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        if let Some(migration) = record.migration {
            return Err(HostError::GuestMigrating { migration });
        }
        let status =
            guest.encryption().filter(|_| matches!(record.state, GuestState::Running | GuestState::Paused));
        let status = status.ok_or(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: record.state.name(),
            allowed: &["running", "paused"],
        })?;
        let bad =
            |e: StatusError| HostError::Invalid(vec![FieldError::new("/gpa", "not_ram", e.to_string())]);
        if ask.dry_run {
            return EncryptionStatus::default().report(&record.layout, gpa, pages, private).map_err(bad);
        }
        status.report(&record.layout, gpa, pages, private).map_err(bad)?;
        self.inner.changed();
        Ok(())
    }

    /// One RAM block of a guest.
    ///
    /// # Errors
    /// [`HostError::NotFound`] for the guest or the block.
    pub fn ram_block(&self, key: &str, name: &str) -> Result<RamBlockInfo, HostError> {
        self.ram_blocks(key)?.into_iter().find(|b| b.block.name == name).ok_or_else(|| no_block(name))
    }
}

/// A block of a guest without a machine.
fn described(
    inner: &Inner,
    record: GuestRecord,
    name: &str,
) -> Result<(RamBlockInfo, GuestRecord), HostError> {
    let block = record.layout.block(name).ok_or_else(|| no_block(name))?.clone();
    let backing = inner.backing_of(&record);
    let info = RamBlockInfo {
        backing,
        page_size: backing.page_size(),
        private_bytes: 0,
        shared_bytes: 0,
        unknown_bytes: block.size,
        block,
    };
    Ok((info, record))
}

/// The guest with `block` after its other RAM. The earlier blocks keep their RAM addresses and whether they
/// are plugged; the blocks that are not the guest's own (the helper's, save areas) may go elsewhere, which
/// nobody sees while it is stopped.
pub(in crate::host) fn with_block(
    inner: &Arc<Inner>,
    record: &GuestRecord,
    block: BlockSpec,
) -> Result<GuestRecord, HostError> {
    if let Some(migration) = record.migration {
        return Err(HostError::GuestMigrating { migration });
    }
    if record.state != GuestState::Stopped {
        return Err(HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: record.state.name(),
            allowed: &["stopped"],
        });
    }
    if let Some(peer) = &record.moved_to {
        return Err(HostError::GuestMoved { peer: peer.clone() });
    }
    let fixed = |why: &str| HostError::lacks(Capability::AddingRamBlocks, why);
    inner.driver(&record.spec.driver)?.can_add_blocks().map_err(fixed)?;
    let mut changed = record.clone();
    changed.spec.blocks.push(block);
    let bare =
        validate::guest(&inner.drivers, &changed.spec).map_err(|e| of_block(e, record.spec.blocks.len()))?;
    let fresh = inner.layout_for(&changed.spec.driver, &bare)?;
    // Page tables for a block more lie in the first.
    let spoilt = check_starts_in(inner, &changed.spec, &fresh);
    if let (Err(HostError::Invalid(errors)), Ok(())) = (spoilt, inner.check_starts_in_its_ram(record)) {
        let of_this = |e: FieldError| FieldError::new("", e.code, format!("with this block, {}", e.detail));
        return Err(HostError::Invalid(errors.into_iter().map(of_this).collect()));
    }
    changed.layout = plugged_as(fresh, &record.layout)?;
    Ok(changed)
}

/// Whether a guest can start in the RAM of this definition, laid out as `home`. One without a plugged block
/// is taken: blocks can be added.
///
/// # Errors
/// [`HostError::Invalid`], with a pointer to the block that is too small.
pub(in crate::host) fn check_starts_in(
    inner: &Inner,
    spec: &GuestSpec,
    home: &GuestLayout,
) -> Result<(), HostError> {
    let Some(first) = spec.blocks.iter().position(|b| b.gpa.is_some()) else { return Ok(()) };
    inner.driver(&spec.driver)?.starts_in(&spec.driver, home).map_err(|e| {
        let detail = crate::host::faults::machine_fault(&e).detail;
        let detail = format!("{detail}: make it larger, or what the driver is told to do smaller");
        let at = format!("/memory/blocks/{first}/size_bytes");
        HostError::Invalid(vec![FieldError::new(at, Code::LayoutUnusable.as_str(), detail)])
    })
}

/// `layout` with the guest's own blocks plugged where `now` has them: since the definition they may have been
/// unplugged.
fn plugged_as(mut layout: GuestLayout, now: &GuestLayout) -> Result<GuestLayout, HostError> {
    for block in now.blocks().iter().filter(|b| b.role == BlockRole::Ram) {
        if layout.block(&block.name).is_none_or(|b| b.plugs == block.plugs) {
            continue;
        }
        layout = layout.with_plugs(&block.name, block.plugs.clone()).map_err(|e| {
            let detail = e.first().map_or_else(String::new, ToString::to_string);
            HostError::Invalid(vec![FieldError::new("/gpa", "overlap", detail)])
        })?;
    }
    Ok(layout)
}

/// The problems of a definition whose last block, at `index`, is the new one, where the request has them: the
/// request is that block. The others were good before, so what is wrong is wrong with it.
fn of_block(error: HostError, index: usize) -> HostError {
    let HostError::Invalid(mut errors) = error else { return error };
    let own = format!("/memory/blocks/{index}");
    for error in &mut errors {
        error.pointer = match (error.pointer.strip_prefix(&own), error.code) {
            (Some(field), _) => field.to_owned(),
            (None, "overlap") => "/gpa".to_owned(),
            // Too many of them: no field of this one.
            (None, _) => String::new(),
        };
    }
    HostError::Invalid(errors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gpa;

    fn block(name: &str, size_bytes: u64, gpa: Option<u64>) -> BlockSpec {
        BlockSpec { name: name.into(), size_bytes, gpa: gpa.map(Gpa::new) }
    }

    #[test]
    fn errors_point_into_the_block() {
        let error = |pointer: &str, code| FieldError::new(pointer, code, "why");
        let errors = vec![
            error("/memory/blocks/12/name", "invalid_name"),
            error("/memory/blocks/1/gpa", "overlap"),
            error("/memory/blocks", "out_of_range"),
        ];
        let HostError::Invalid(found) = of_block(HostError::Invalid(errors), 12) else {
            panic!("other kind")
        };
        let pointers: Vec<&str> = found.iter().map(|e| e.pointer.as_str()).collect();
        assert_eq!(pointers, ["/name", "/gpa", ""]);
    }

    #[test]
    fn what_is_unplugged_stays_so_and_keeps_its_address_free() {
        let old = [block("a", 2 << 20, Some(0)), block("b", 2 << 20, Some(4 << 20))];
        let now = GuestLayout::assign(&old).unwrap().with_plugs("b", Vec::new()).unwrap();
        let with = |new: BlockSpec| GuestLayout::assign(&[&old[..], &[new]].concat());
        let layout = plugged_as(with(block("c", 2 << 20, Some(8 << 20))).unwrap(), &now).unwrap();
        assert_eq!(layout.block("b").unwrap().plugs, []);
        assert_eq!(layout.block("b").unwrap().ram_addr, now.block("b").unwrap().ram_addr);
        assert_eq!(layout.block("c").unwrap().gpa(), Some(Gpa::new(8 << 20)));
        // Its home is taken, whether or not it is there.
        assert!(with(block("c", 2 << 20, Some(4 << 20))).is_err());
        // And so is where it is instead.
        let plug = |gpa| vec![crate::address_space::Plug { offset: 0, gpa: Gpa::new(gpa), len: 2 << 20 }];
        let elsewhere = now.with_plugs("b", plug(16 << 20)).unwrap();
        let refused = plugged_as(with(block("c", 2 << 20, Some(16 << 20))).unwrap(), &elsewhere);
        assert!(matches!(refused, Err(HostError::Invalid(e)) if e[0].pointer == "/gpa"));
    }
}
