//! Adding RAM to a guest that is stopped: its definition with one block more.
//!
//! Owns: which guests may have one more, and what their definition and layout are then. Must not know: who
//! asks, what a machine does with it.

use std::sync::Arc;

use crate::address_space::{BlockRole, BlockSpec, GuestLayout};
use crate::host::guests::task::Command;
use crate::host::inner::Inner;
use crate::host::machines;
use crate::host::{
    DriverSpec, Expected, FieldError, GuestRecord, GuestState, Host, HostError, RamBlockInfo, validate,
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
        expected: Expected,
    ) -> Result<(RamBlockInfo, GuestRecord), HostError> {
        self.inner.check_running()?;
        let name = block.name.clone();
        let guest = self.inner.find_guest(key)?;
        let record = guest.ask(|reply| Command::AddBlock(block, expected, reply)).await?;
        described(record, &name)
    }

    /// The block that [`Host::add_ram_block`] would add, with the guest as it would be; adds none.
    ///
    /// # Errors
    /// As there.
    pub fn preview_ram_block(
        &self,
        key: &str,
        block: BlockSpec,
        expected: &Expected,
    ) -> Result<(RamBlockInfo, GuestRecord), HostError> {
        self.inner.check_running()?;
        let record = self.guest(key)?;
        expected.check("guest", record.generation)?;
        let name = block.name.clone();
        described(with_block(&self.inner, &record, block)?, &name)
    }

    /// One RAM block of a guest.
    ///
    /// # Errors
    /// [`HostError::NotFound`] for the guest or the block.
    pub fn ram_block(&self, key: &str, name: &str) -> Result<RamBlockInfo, HostError> {
        let missing = || HostError::NotFound { kind: "RAM block", key: name.chars().take(80).collect() };
        self.ram_blocks(key)?.into_iter().find(|b| b.block.name == name).ok_or_else(missing)
    }
}

/// A block of a guest without a machine.
fn described(record: GuestRecord, name: &str) -> Result<(RamBlockInfo, GuestRecord), HostError> {
    let missing = || HostError::NotFound { kind: "RAM block", key: name.chars().take(80).collect() };
    let block = record.layout.block(name).ok_or_else(missing)?.clone();
    let backing = machines::backing_of(&record);
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
            kind: "guest",
            current: record.state.name(),
            allowed: &["stopped"],
        });
    }
    if let Some(peer) = &record.moved_to {
        return Err(HostError::GuestMoved { peer: peer.clone() });
    }
    if matches!(record.spec.driver, DriverSpec::Qemu { .. }) {
        let why = "a qemu guest has its RAM in one block, from its definition".to_owned();
        return Err(HostError::CapabilityMissing { what: "adding RAM blocks", why });
    }
    let mut changed = record.clone();
    changed.spec.blocks.push(block);
    let bare = validate::guest(&changed.spec).map_err(|e| of_block(e, record.spec.blocks.len()))?;
    let fresh = inner.layout_for(&changed.spec.driver, &bare)?;
    changed.layout = plugged_as(fresh, &record.layout)?;
    Ok(changed)
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
