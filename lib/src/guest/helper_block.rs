//! Filling the memory that a helper runs from.

use mirrorvm_abi::{
    config::SECRET_MAGIC,
    evidence::{RELEASE_AT, Release, SECRET_SPAN},
    header::Header,
};

use super::MachineError;
use crate::address_space::{HelperPlacement, HelperSet};
use crate::memory::{GuestRam, Mapping};

/// What lies in the secret page: magic, secret, and what the guest's owner demands before pages leave.
pub fn secret_span(secret: &[u8; 32], release: &Release) -> zeroize::Zeroizing<[u8; SECRET_SPAN]> {
    let mut span = zeroize::Zeroizing::new([0; SECRET_SPAN]);
    span[..8].copy_from_slice(&SECRET_MAGIC.to_le_bytes());
    span[8..RELEASE_AT].copy_from_slice(secret);
    span[RELEASE_AT..].copy_from_slice(&release.encode());
    span
}

/// SHA-256 of a part of a helper's memory.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    out
}

/// Where a helper's parts lie in the block of a guest with this RAM; which strategy's set it names does not
/// matter here.
///
/// # Errors
/// An image that cannot be used, or a block that it does not fit.
pub fn placement(ram: &GuestRam, image: &[u8]) -> Result<HelperPlacement, MachineError> {
    let header = Header::parse(image).map_err(MachineError::HelperImage)?;
    let layout = ram.layout();
    let block = layout.helper().ok_or(MachineError::NothingPlugged)?;
    HelperPlacement::new(&header, &layout, HelperSet::Shifted)
        .filter(|p| p.block_len() <= block.size)
        .ok_or(MachineError::TooSmall { have: block.size, need: header.footprint() })
}

/// Loads the helper's image and the guest's migration secret into the helper's block: a part of the guest's
/// launch. Configuration and page tables come with a mirror, whose strategy decides them.
///
/// # Errors
/// As [`placement`].
pub fn load(ram: &GuestRam, image: &[u8], secret: Option<&[u8; 32]>) -> Result<(), MachineError> {
    let placement = placement(ram, image)?;
    let layout = ram.layout();
    let block = layout.helper().ok_or(MachineError::NothingPlugged)?;
    let memory = ram.mapping(block).ok_or(MachineError::NothingPlugged)?;
    fill(memory, image, &placement, secret, &[]);
    Ok(())
}

/// Writes a helper's image, secret and `contents` (offset, bytes) into `memory`, which is zero elsewhere.
///
/// # Panics
/// When they leave the memory: the caller has checked the placement against it.
pub fn fill(
    memory: &Mapping,
    image: &[u8],
    placement: &HelperPlacement,
    secret: Option<&[u8; 32]>,
    contents: &[(u64, Vec<u8>)],
) {
    memory.write(0, image);
    if let Some(secret) = secret {
        // Without encryption the host has the secret and the pages, and nothing could be demanded of another.
        memory.write(placement.secret_at, secret_span(secret, &Release::NOT_DEMANDED).as_slice());
    }
    for (at, bytes) in contents {
        memory.write(*at, bytes);
    }
}
