//! Checks of what callers ask for. Pure: every problem found, none fixed.

use crate::codes::Capability;
use uuid::Uuid;

use super::{FieldError, GuestSpec, HostError, Labels, MigrationSpec, MirrorSpec, PeerSpec, bounds};
use crate::addr::PAGE_2M;
use crate::address_space::{BlockSpec, GuestLayout, HELPER_BLOCK, LayoutError, VMSA_BLOCK};
use crate::guest::drivers::{Drivers, UnknownDriver};
use crate::memory::Backing;
use crate::mirror::{FIFO_PRIORITIES, NICE, Placement, Scheduler};
use crate::transport::{PeerIdentity, Unconnectable, check_reachable};

/// What is wrong with the parts of a definition that could be read, where others could not: a caller gets all
/// at once.
pub fn parts_of_guest(
    name: Option<&str>,
    labels: Option<&Labels>,
    blocks: Option<&[BlockSpec]>,
    backing: Option<Backing>,
) -> Vec<FieldError> {
    let mut errors = parts(name, labels);
    if let Some(blocks) = blocks {
        let _ = memory(blocks, backing, &mut errors);
    }
    errors
}

/// The same of a peer.
pub fn parts_of_peer(name: Option<&str>, labels: Option<&Labels>, identity: Option<&str>) -> Vec<FieldError> {
    let mut errors = parts(name, labels);
    if let Some(identity) = identity {
        let _ = check_identity(identity, &mut errors);
    }
    errors
}

fn parts(name: Option<&str>, labels: Option<&Labels>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if let Some(name) = name {
        check_name(name, &mut errors);
    }
    if let Some(labels) = labels {
        check_labels(labels, &mut errors);
    }
    errors
}

/// A guest's definition; gives its layout without the helper's block.
pub(super) fn guest(drivers: &Drivers, spec: &GuestSpec) -> Result<GuestLayout, HostError> {
    let missing = |e: UnknownDriver| HostError::lacks(Capability::Driver, e.to_string());
    let driver = drivers.of(&spec.driver).map_err(missing)?;
    let mut errors = parts(Some(&spec.name), Some(&spec.labels));
    let layout = memory(&spec.blocks, spec.backing, &mut errors);
    driver.check(&spec.definition(), &mut errors);
    match layout {
        Some(layout) if errors.is_empty() => Ok(layout),
        _ => Err(HostError::Invalid(errors)),
    }
}

/// A guest's RAM; `None` with at least one error.
fn memory(
    blocks: &[BlockSpec],
    backing: Option<Backing>,
    errors: &mut Vec<FieldError>,
) -> Option<GuestLayout> {
    if backing == Some(Backing::Hugetlb) {
        for (i, block) in blocks.iter().enumerate().filter(|(_, b)| !b.size_bytes.is_multiple_of(PAGE_2M)) {
            let detail = format!("{} is not a multiple of 2 MiB, which hugetlb needs", block.size_bytes);
            errors.push(FieldError::new(format!("/memory/blocks/{i}/size_bytes"), "misaligned", detail));
        }
    }
    // The names of blocks that are added to the guest's own.
    for (i, block) in
        blocks.iter().enumerate().filter(|(_, b)| [HELPER_BLOCK, VMSA_BLOCK].contains(&b.name.as_str()))
    {
        let detail = format!("{} is the name of a block that is not the guest's own", block.name);
        errors.push(FieldError::new(format!("/memory/blocks/{i}/name"), "duplicate_name", detail));
    }
    GuestLayout::assign(blocks).map_err(|list| errors.extend(list.iter().map(block_error))).ok()
}

fn block_error(e: &LayoutError) -> FieldError {
    let at = |index: &usize, field: &str| format!("/memory/blocks/{index}/{field}");
    let detail = std::error::Error::source(e).map_or_else(|| e.to_string(), |s| format!("{e}: {s}"));
    match e {
        LayoutError::Empty | LayoutError::TooMany { .. } => {
            FieldError::new("/memory/blocks", "out_of_range", detail)
        }
        LayoutError::Name { index, .. } => FieldError::new(at(index, "name"), "invalid_name", detail),
        LayoutError::DuplicateName { index, .. } => {
            FieldError::new(at(index, "name"), "duplicate_name", detail)
        }
        LayoutError::Range { index, field, source } => {
            let code = match source {
                crate::addr::RangeError::ZeroLength => "zero",
                crate::addr::RangeError::Unaligned { .. } => "unaligned",
                crate::addr::RangeError::Wraps { .. } => "out_of_range",
            };
            FieldError::new(at(index, field), code, detail)
        }
        LayoutError::TooLarge { index } => FieldError::new(at(index, "size_bytes"), "out_of_range", detail),
        LayoutError::Overlap { index, .. } => FieldError::new(at(index, "gpa"), "overlap", detail),
    }
}

/// What a caller wants of a mirror.
pub(super) fn mirror(spec: &MirrorSpec) -> Result<(), HostError> {
    let mut errors = parts_of_placement("/placement", &spec.options.placement);
    FieldError::check_bound("/workers", spec.workers.into(), &bounds::WORKERS, &mut errors);
    if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
}

/// What is wrong with where the threads of a mirror are to run, by pointers that begin with `at`.
pub fn parts_of_placement(at: &str, placement: &Placement) -> Vec<FieldError> {
    let there = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32;
    let bad = |(i, cpu): (usize, &u32)| {
        let detail = format!("{cpu} is not between 0 and {}: this host has {there} processors", there - 1);
        (*cpu >= there).then(|| FieldError::new(format!("{at}/cpus/{i}"), "out_of_range", detail))
    };
    let most = bounds::CPUS.end();
    let listed = placement.cpus.iter().take(*most as usize).enumerate();
    let mut errors: Vec<FieldError> = listed.filter_map(bad).collect();
    if !bounds::CPUS.contains(&(placement.cpus.len() as u64)) {
        let detail = format!("{} processors are listed, and there are at most {most}", placement.cpus.len());
        errors.push(FieldError::new(format!("{at}/cpus"), "out_of_range", detail));
    }
    let wrong = match placement.scheduler {
        Some(Scheduler::Other { nice } | Scheduler::Batch { nice }) if !NICE.contains(&nice) => {
            Some(("nice", format!("{nice} is not between {} and {}", NICE.start(), NICE.end())))
        }
        Some(Scheduler::Fifo { priority }) if !FIFO_PRIORITIES.contains(&priority) => {
            let (low, high) = (FIFO_PRIORITIES.start(), FIFO_PRIORITIES.end());
            Some(("priority", format!("{priority} is not between {low} and {high}")))
        }
        _ => None,
    };
    if let Some((field, detail)) = wrong {
        errors.push(FieldError::new(format!("{at}/scheduler/{field}"), "out_of_range", detail));
    }
    errors
}

/// What a caller wants of a migration.
pub(super) fn migration(spec: &MigrationSpec) -> Result<(), HostError> {
    let mut errors = Vec::new();
    let limits = &spec.limits;
    FieldError::check_bound("/streams", spec.streams.into(), &bounds::STREAMS, &mut errors);
    FieldError::check_bound("/limits/downtime_ms", limits.downtime_ms, &bounds::DOWNTIME_MS, &mut errors);
    FieldError::check_bound("/limits/timeout_ms", limits.timeout_ms, &bounds::TIMEOUT_MS, &mut errors);
    FieldError::check_bound(
        "/limits/stall_timeout_ms",
        limits.stall_timeout_ms,
        &bounds::STALL_TIMEOUT_MS,
        &mut errors,
    );
    FieldError::check_bound(
        "/limits/audit_timeout_ms",
        limits.audit_timeout_ms,
        &bounds::AUDIT_TIMEOUT_MS,
        &mut errors,
    );
    if let Some(bandwidth) = limits.bandwidth_bytes_per_second {
        FieldError::check_bound(
            "/limits/bandwidth_bytes_per_second",
            bandwidth,
            &bounds::BANDWIDTH,
            &mut errors,
        );
    }
    errors.extend(parts_of_placement("/mirror/placement", &spec.template.placement));
    if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
}

/// What a caller says of a peer.
pub(super) fn peer(spec: &PeerSpec) -> Result<PeerIdentity, HostError> {
    let mut errors = parts(Some(&spec.name), Some(&spec.labels));
    let identity = check_identity(&spec.identity, &mut errors);
    let at = spec.address.address();
    let usable = at.map_or_else(|| spec.address.check_connectable(), |at| check_reachable(&at));
    if let Err(why) = usable {
        let code = if why == Unconnectable::Port { "out_of_range" } else { "unusable_address" };
        errors.push(FieldError::new("/address", code, format!("{} {why}", spec.address)));
    }
    match identity {
        Some(identity) if errors.is_empty() => Ok(identity),
        _ => Err(HostError::Invalid(errors)),
    }
}

fn check_identity(text: &str, errors: &mut Vec<FieldError>) -> Option<PeerIdentity> {
    let identity = text.parse().ok();
    if identity.is_none() {
        let detail = format!(
            "{} is not sha256: and 64 hexadecimal digits; the other daemon's /v1/host shows its identity",
            shown(text)
        );
        errors.push(FieldError::new("/identity", "invalid_identity", detail));
    }
    identity
}

/// What a name may be, for people.
pub const NAME_RULE: &str =
    "1 to 64 characters of [A-Za-z0-9._-], the first alphanumeric, not shaped like a UUID";

/// Whether guests, hosts and images may have this name.
pub fn is_name(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=64).contains(&name.len())
        && name.bytes().all(legal)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && Uuid::try_parse(name).is_err()
}

fn check_name(name: &str, errors: &mut Vec<FieldError>) {
    if !is_name(name) {
        let detail = format!("{} is no name: {NAME_RULE}", shown(name));
        errors.push(FieldError::new("/name", "invalid_name", detail));
    }
}

/// A name by itself.
pub(super) fn name(name: &str) -> Result<(), HostError> {
    let mut errors = Vec::new();
    check_name(name, &mut errors);
    if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
}

/// Labels of a resource.
pub(super) fn labels(labels: &Labels) -> Result<(), HostError> {
    let mut errors = Vec::new();
    check_labels(labels, &mut errors);
    if errors.is_empty() { Ok(()) } else { Err(HostError::Invalid(errors)) }
}

fn check_labels(labels: &Labels, errors: &mut Vec<FieldError>) {
    let most = bounds::LABELS.end();
    if !bounds::LABELS.contains(&(labels.len() as u64)) {
        let detail = format!("{} labels are given, and there are at most {most}", labels.len());
        errors.push(FieldError::new("/labels", "out_of_range", detail));
    }
    let control = |text: &str| text.chars().any(char::is_control);
    for (key, value) in labels.iter().take(*most as usize) {
        if !bounds::LABEL_KEY_BYTES.contains(&(key.len() as u64)) || control(key) || key.contains('=') {
            let detail = format!(
                "{} is no key of a label: {} to {} bytes without '=' and control characters",
                shown(key),
                bounds::LABEL_KEY_BYTES.start(),
                bounds::LABEL_KEY_BYTES.end()
            );
            errors.push(FieldError::new("/labels", "out_of_range", detail));
        }
        if !bounds::LABEL_VALUE_BYTES.contains(&(value.len() as u64)) || control(value) {
            let detail = format!(
                "{} is no value of a label: at most {} bytes without control characters",
                shown(value),
                bounds::LABEL_VALUE_BYTES.end()
            );
            errors.push(FieldError::new("/labels", "out_of_range", detail));
        }
    }
}

/// A value as a message shows it: quoted, and cut where it gets long.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(64).collect();
    if cut.len() < text.len() { format!("{cut:?}... ({} bytes)", text.len()) } else { format!("{cut:?}") }
}
