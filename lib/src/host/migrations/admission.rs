//! Whether a guest that another host would send may come in.
//!
//! Owns: everything that speaks against an import before anything is made for it, each reason by itself, and
//! how a peer hears of it. PREPARE goes by this and so does a look at a migration that was not begun: what
//! one of them lets in the other does. Must not know: how the place is taken, how the guest arrives.

use crate::codes::PeerRefusal;
use std::sync::Arc;

use uuid::Uuid;

use crate::address_space::GuestLayout;
use crate::boot_files::{BootFile, BootFiles};
use crate::guest::drivers::CannotReceive;
use crate::host::inner::Inner;
use crate::host::migrations::definition::{Definition, Unread};
use crate::host::migrations::journal::{hand_over, storing};
use crate::host::migrations::refusals::{
    machine_refusal, no_leave, no_room, not_stored, refuse, refused_by, ticket_unread,
};
use crate::host::migrations::reserve::Reserve;
use crate::host::registry::Registry;
use crate::host::{GuestRecord, GuestState, HostError, bounds, validate};
use crate::migration::hand_over::{is_new_session, makes_way};
use crate::migration::wire::{Prepare, Refused};
use crate::migration::{Suite, suite_names};
use crate::mirror::HelperImage;
use crate::store::form;
use crate::transport::PeerIdentity;

/// Who comes, and with what.
#[derive(Clone, Copy)]
pub(in crate::host) struct Arriving<'a> {
    pub inner: &'a Arc<Inner>,
    pub identity: &'a PeerIdentity,
    pub prepare: &'a Prepare,
    pub definition: &'a Definition,
}

impl Arriving<'_> {
    /// What the guest would boot from if it were let in now, or all that speaks against it. Makes nothing and
    /// takes nothing: whoever lets it in takes what can be taken once (id and name, memory, a ticket) by
    /// calls that look again.
    pub fn admit(&self) -> Result<Option<BootFiles>, Vec<Refused>> {
        let Self { inner, prepare, definition, .. } = *self;
        let mut against = Vec::new();
        if inner.is_stopping() {
            against.push(refuse(PeerRefusal::ShuttingDown, "the destination shuts down"));
        }
        if inner.in_maintenance() {
            against.push(refuse(PeerRefusal::Maintenance, "the destination is in maintenance"));
        }
        match has_seen(inner, prepare.session) {
            Ok(false) => {}
            Ok(true) => {
                against.push(refuse(PeerRefusal::SessionExists, "the destination has seen this session"))
            }
            Err(refusal) => against.push(refusal),
        }
        if !bounds::STREAMS.contains(&prepare.streams.into()) {
            let (low, high) = (bounds::STREAMS.start(), bounds::STREAMS.end());
            against.push(refuse(PeerRefusal::Invalid, format!("streams is not {low} to {high}")));
        }
        let image = note(&mut against, self.image());
        if let Some(image) = &image {
            let _ = note(&mut against, self.suite(image));
        }
        let boot = self.boot(&mut against);
        let fits = self.memory_layout(&mut against);
        if self.machine(&mut against)
            && fits
            && let Some(image) = image
        {
            let _ = note(&mut against, self.mirror(&image));
        }
        against.extend(taken(&inner.guests(), prepare.guest, &definition.spec.name));
        if fits && let Err(e) = inner.has_memory_for(&record_of(inner, prepare, definition, boot)) {
            against.push(refused_by(&e));
        }
        if let Err(refusal) = room_on_disk(inner, prepare) {
            against.push(refusal);
        }
        if !self.is_known() {
            match inner.has_ticket(prepare.session, self.identity) {
                Ok(true) => {}
                Ok(false) => against.push(no_leave()),
                Err(e) => against.push(ticket_unread(&e)),
            }
        }
        if against.is_empty() { Ok(boot) } else { Err(against) }
    }

    /// The image that the source's helper is: the built-in one, or one that was uploaded here, too.
    pub fn image(&self) -> Result<Arc<HelperImage>, Refused> {
        let measurement = &self.prepare.helper_measurement;
        let found = self.inner.image_measuring(measurement).map_err(|e| refused_by(&e))?;
        let image = found
            .ok_or_else(|| refuse(PeerRefusal::HelperMismatch, "the destination has no such helper image"))?;
        self.inner.check_image(&self.definition.spec.driver, &image).map_err(|e| refused_by(&e))?;
        Ok(image)
    }

    /// Whether the helper seals by what was asked for, which may be a later build's.
    fn suite(&self, image: &HelperImage) -> Result<(), Refused> {
        let (wanted, has) = (&self.prepare.suite, Suite::of_helper(image.header()));
        if has.iter().any(|suite| suite.name() == wanted) {
            return Ok(());
        }
        let wanted: String = wanted.chars().filter(|c| !c.is_control()).take(64).collect();
        let detail = format!(
            "the destination's helper does not seal by {wanted:?}, but by {}",
            suite_names(&has).join(", ")
        );
        Err(refuse(PeerRefusal::SuiteMissing, detail))
    }

    /// Whether the source needs no ticket.
    pub fn is_known(&self) -> bool {
        let text = self.identity.to_string();
        self.inner.peers().values().any(|p| p.spec.identity == text)
    }

    /// What the definition's files hold here; each that cannot be used is a reason of its own.
    fn boot(&self, against: &mut Vec<Refused>) -> Option<BootFiles> {
        match self.inner.boot_facts(&self.definition.spec) {
            Ok(boot) => {
                if let (Some(theirs), Some(ours)) = (&self.definition.boot, &boot) {
                    let _ = note(against, check_boot_files(theirs, ours));
                }
                boot
            }
            Err(HostError::Invalid(fields)) => {
                let each = |f| refused_by(&HostError::Invalid(vec![f]));
                against.extend(fields.into_iter().map(each));
                None
            }
            Err(e) => {
                against.push(refused_by(&e));
                None
            }
        }
    }

    /// Whether the definition comes to the same RAM here as there.
    fn memory_layout(&self, against: &mut Vec<Refused>) -> bool {
        let prepare = self.prepare;
        let layout = validate::guest(&self.inner.drivers, &self.definition.spec)
            .and_then(|bare| self.inner.layout_for(&self.definition.spec.driver, &bare))
            .map_err(|e| refused_by(&e));
        let Some(layout) = note(against, layout) else { return false };
        // Where QEMU has its RAM plugged is the source's to say; everything else must come out the same here.
        let plugs_aside = |l: &GuestLayout| {
            l.blocks().iter().map(|b| (b.name.clone(), b.ram_addr, b.size, b.role)).collect::<Vec<_>>()
        };
        let same = plugs_aside(&layout) == plugs_aside(&prepare.layout);
        if !same {
            let detail = "the helper's footprint differs between the hosts";
            against.push(refuse(PeerRefusal::LayoutMismatch, detail));
        }
        same
    }

    /// Whether a machine for the guest's driver can be made here.
    fn machine(&self, against: &mut Vec<Refused>) -> bool {
        let before = against.len();
        let (inner, driver) = (self.inner, &self.definition.spec.driver);
        let _ = note(against, inner.check_driver(driver).map_err(|e| refused_by(&e)));
        if let Some(sev) = inner.facts(driver).sev {
            let allowed = crate::host::migrations::policy::check_policy(sev.policy);
            let _ = note(against, allowed.map_err(|e| refused_by(&e)));
        }
        // One that is not here has been told of.
        if let Ok(here) = inner.drivers.of(driver) {
            let _ = note(against, here.can_receive(driver).map_err(|why| cannot_receive(&why)));
        }
        against.len() == before
    }

    fn mirror(&self, image: &HelperImage) -> Result<(), Refused> {
        let p = self.prepare;
        let (streams, declared) = (u32::from(p.streams), p.readiness.declaration.as_ref());
        let plan = self.inner.plan_arrival(
            &self.definition.spec.driver,
            &p.layout,
            p.strategy,
            streams,
            declared,
            image,
        );
        plan.map(|_| ()).map_err(|e| refused_by(&e))
    }
}

/// The guest that would come, or why this host cannot know it.
pub(super) fn definition_of(inner: &Inner, prepare: &Prepare) -> Result<Definition, Refused> {
    Definition::read(&prepare.definition, &inner.drivers).map_err(|unread| {
        let code = match unread {
            Unread::Malformed(_) | Unread::Unknown(_) => PeerRefusal::Invalid,
            Unread::Version(_) => PeerRefusal::PeerVersion,
            Unread::Driver(_) => PeerRefusal::CapabilityMissing,
        };
        refuse(code, format!("the destination: {unread}"))
    })
}

/// Who has the guest's id or name here, if that is not a guest that left earlier: such a record makes way.
pub(in crate::host) fn taken(
    guests: &Registry<crate::host::guests::entry::GuestEntry>,
    id: Uuid,
    name: &str,
) -> Vec<Refused> {
    let mut taken = Vec::new();
    let there = guests.get(&id).map(|g| g.record());
    if there.is_some_and(|o| !makes_way(o.state, o.moved_to.is_some())) {
        taken.push(refuse(PeerRefusal::GuestExists, "the destination has this guest"));
    }
    if guests.named(name).is_some_and(|g| g.id != id) {
        taken.push(refuse(PeerRefusal::NameTaken, "the destination has another guest of this name"));
    }
    taken
}

/// The record that the guest begins with here.
pub(in crate::host) fn record_of(
    inner: &Inner,
    prepare: &Prepare,
    definition: &Definition,
    boot: Option<BootFiles>,
) -> GuestRecord {
    let spec = definition.spec.clone();
    let protection = inner.facts(&spec.driver).protection;
    GuestRecord {
        state: GuestState::Incoming,
        migration: Some(prepare.session),
        created_at: definition.created_at,
        ..GuestRecord::defined(prepare.guest, spec, prepare.layout.clone(), protection, boot)
    }
}

/// The files that a guest would boot from here, the next time, hold what they hold where it comes from. For
/// its journey they do not matter; but a restart must not be the day on which it turns out to be another
/// system.
fn check_boot_files(theirs: &BootFiles, ours: &BootFiles) -> Result<(), Refused> {
    let Some((field, theirs, ours)) = theirs.first_difference(ours) else { return Ok(()) };
    let what = |file: Option<BootFile>| file.map_or_else(|| "none".to_owned(), |f| f.to_string());
    let detail = format!(
        "/driver/{field}: the file at the destination holds something else ({}) than what the guest was defined with ({}); \
         put the same file there",
        what(ours),
        what(theirs)
    );
    Err(refuse(PeerRefusal::BootFileDiffers, detail))
}

fn cannot_receive(why: &CannotReceive) -> Refused {
    match why {
        CannotReceive::Missing(detail) => refuse(PeerRefusal::CapabilityMissing, detail.clone()),
        CannotReceive::Machine(e) => machine_refusal(e),
    }
}

fn note<T>(against: &mut Vec<Refused>, found: Result<T, Refused>) -> Option<T> {
    found.map_err(|refusal| against.push(refusal)).ok()
}

/// Whether a session was here before; each is good for one import.
pub(in crate::host) fn has_seen(inner: &Inner, session: Uuid) -> Result<bool, Refused> {
    let known = hand_over(inner, session).map_err(|e| not_stored(&storing(e)))?;
    Ok(!is_new_session(known.is_some(), inner.migration_entry(session).is_some()))
}

/// Whether there is disk space for how a migration ends.
pub(in crate::host) fn room_on_disk(inner: &Inner, prepare: &Prepare) -> Result<(), Refused> {
    // Given back at once: whoever lets the guest in sets it aside again.
    let tried = Reserve::try_out(&inner.state_dir, prepare.session, document_bytes(inner, prepare));
    tried.map_err(no_room)
}

/// What the documents take that exist before the guest is let in.
pub(in crate::host) fn document_bytes(inner: &Inner, prepare: &Prepare) -> usize {
    let here = inner.guests().get(&prepare.guest).map(|g| g.record());
    prepare.definition.len() + form::length(&prepare.layout) + here.as_ref().map_or(0, form::length)
}
