//! The source's course: prepare, rounds, hand-over.

mod precopy;
mod prepare;
mod round;
mod switchover;

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::address_space::GuestLayout;
use crate::guest::{DirtyRanges, Labels, Machine, MachineError, ProtectionLevel};
use crate::migration::audit::{self, Held};
use crate::migration::control::Control;
use crate::migration::finder::Finder;
use crate::migration::peer::{PeerAddress, Spoken, open_control};
use crate::migration::pump::{Limiter, Stream};
use crate::migration::rounds::{Convergence, Fixed};
use crate::migration::wire::{self, AuditWish, Purpose};
use crate::migration::{
    Audit, AuditMode, MigrationFault, MigrationMode, MigrationState, NotRun, StreamTransport, Suite,
};
use crate::mirror::Mirror;
use crate::pages::PageSet;
use crate::transport::{Identity, Link};

pub(crate) use switchover::hear;

/// Durable notes of a source.
pub trait Journal {
    /// The guest is held from now on. Shown before START leaves; need not be durable.
    fn held(&self);

    /// The guest was held for too long and runs on here, until it is held again.
    fn runs_on(&self);

    /// START is about to go out. Durable when this returns, in the records of guest and migration together:
    /// after a crash the migration is in doubt, not failed.
    ///
    /// # Errors
    /// Nothing was noted; START is not sent.
    fn start_sent(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// The guest's labels as they travel. Whoever would change them from now on is refused until the
    /// migration's end.
    ///
    /// # Errors
    /// Nobody can say.
    fn last_labels(&self) -> Result<Labels, Box<dyn std::error::Error + Send + Sync>>;
}

/// A guest that is to leave, as far as the engine has to know it.
#[derive(Clone, Copy, Debug)]
pub struct Departure<'a> {
    /// Its id, the same at both hosts.
    pub guest: Uuid,
    /// What the destination's host has to know to make a place for it; nobody between reads it.
    pub definition: &'a str,
    /// Its RAM.
    pub layout: &'a GuestLayout,
    /// What the hardware gives it.
    pub protection: ProtectionLevel,
}

/// How a guest is to be moved. What may change while it moves is [`Control`]'s.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// In rounds or in one go.
    pub mode: MigrationMode,
    /// Streams, and workers of the mirror; see [`STREAMS`](super::terms::STREAMS).
    pub streams: u16,
    /// How they cross.
    pub stream_transport: StreamTransport,
    /// By what pages and tokens are sealed; the mirror's helper has it.
    pub suite: Suite,
    /// Whether both ends digest every page of RAM at the pause point.
    pub verify: bool,
    /// When the destination compares what it opened with what lies here.
    pub audit: AuditMode,
}

/// What a source needs.
pub struct Outgoing<'a> {
    /// SHA-256 of the helper image that the mirror runs.
    pub helper_measurement: [u8; 32],
    /// The migration's id.
    pub id: Uuid,
    /// The guest.
    pub departure: Departure<'a>,
    /// How it moves.
    pub terms: Terms,
    /// Where to.
    pub peer: PeerAddress,
    /// Who we are.
    pub identity: &'a Identity,
    /// What we are called.
    pub host: &'a str,
    /// The handle.
    pub control: &'a Control,
    /// Durable notes.
    pub journal: &'a dyn Journal,
}

/// What is still to be done when the destination has the guest.
#[derive(Debug)]
pub enum Sequel {
    /// Nothing: the audit, if one was asked for, has ended, and [`Control`] knows how.
    Nothing,
    /// The audit: the destination waits for digests on this link. Machine and mirror stay as they are until
    /// [`Sequel::audit`] has ended.
    Audit(Box<Link>),
}

impl Sequel {
    /// Carries the audit out; blocks until its end. It ends when `held` is given up, and after the limit that
    /// `control` has at the time. `None`: there is none.
    pub fn audit(self, held: &Held, shared: &PageSet, control: &Control) -> Option<Audit> {
        let Self::Audit(mut link) = self else { return None };
        let begun = Instant::now();
        let left = || audit_left(control, begun);
        let audit = audit::show(&mut link, held, shared, left, control.patience());
        let _ = link.close();
        Some(audit)
    }
}

/// How long an audit may still take that began then.
fn audit_left(control: &Control, begun: Instant) -> Duration {
    Duration::from_millis(control.limits().audit_timeout_ms).saturating_sub(begun.elapsed())
}

/// How it ended. The machine is paused in all but `NotMoved { resumed: true, .. }`.
#[derive(Debug)]
pub enum SourceEnd {
    /// The destination has the guest. Digests when verification was asked for.
    Succeeded {
        /// Of every page at the pause point.
        digests: Option<Vec<[u8; 16]>>,
        /// The audit that follows.
        sequel: Sequel,
    },
    /// The guest stays here, as it was; the destination has nothing.
    NotMoved {
        /// Why.
        fault: MigrationFault,
        /// Whether it runs again. One that ran before and does not now has ended, or cannot be resumed.
        resumed: bool,
    },
    /// START went out and no token came back.
    InDoubt {
        /// What happened to the link.
        fault: MigrationFault,
    },
}

/// Moves a guest. Blocks until the end. `was_running`: the guest is resumed when it is not moved.
pub fn run_source(
    out: &Outgoing<'_>,
    machine: &mut dyn Machine,
    mirror: &mut Mirror,
    was_running: bool,
) -> SourceEnd {
    let mut course = Course {
        out,
        machine,
        mirror,
        was_running,
        begun: Instant::now(),
        paused_at: None,
        session: false,
        audit: Err(None),
    };
    match course.up_to_start() {
        Ok((link, streams)) => course.finish(link, streams),
        Err(fault) => {
            let ended = || course.machine.ended().map(|end| MachineError::Ended(end).into());
            let fault = out.control.called_off().or_else(ended).unwrap_or(fault);
            course.back_out(fault)
        }
    }
}

struct Course<'a, 'b> {
    out: &'a Outgoing<'a>,
    machine: &'b mut dyn Machine,
    mirror: &'b mut Mirror,
    was_running: bool,
    begun: Instant,
    paused_at: Option<Instant>,
    /// Whether the helper has a session that must be cancelled.
    session: bool,
    /// When there will be an audit; or why there is none that was asked for.
    audit: Result<AuditWish, Option<NotRun>>,
}

/// What has been sent so far.
struct Sent {
    epoch: u32,
    /// Pages that went sealed at least once.
    ever_sealed: PageSet,
    /// Pages that went as they are at least once.
    ever_shared: PageSet,
    /// What the guest shared when the last round began.
    status: Option<PageSet>,
    limiter: Limiter,
    /// Where pages are taken off the dirty log one batch after the other.
    dirty: Option<DirtyRanges>,
}

/// The links of a migration, and what went over them.
struct Ends {
    link: Link,
    streams: Vec<Stream>,
    sent: Sent,
}

/// How a switchover went.
enum Switched {
    /// START is on its way.
    Over,
    /// The pause would have been too long: the guest goes on here. Stopping and saving took so long.
    Back { leave: Duration },
}

impl Course<'_, '_> {
    /// Everything that can be called off: preparation, rounds, pause, last round, state. Ends with START on
    /// its way.
    fn up_to_start(&mut self) -> Result<(Link, Vec<Stream>), MigrationFault> {
        let control = self.out.control;
        control.enter(MigrationState::Preparing);
        let Spoken { mut link, agreed } = self.call()?;
        let streams = match self.prepare(&mut link, &agreed) {
            Ok(streams) => streams,
            Err(fault) => return Err(reason(&mut link, fault)),
        };
        control.update(|l| {
            l.progress.total_bytes = self.machine.ram().layout().ram_bytes();
            l.progress.setup_ms = self.begun.elapsed().as_millis() as u64;
        });
        let sent = Sent {
            epoch: 1,
            ever_sealed: PageSet::new(),
            ever_shared: PageSet::new(),
            status: None,
            limiter: Limiter::new(),
            dirty: None,
        };
        let mut left = PageSet::new();
        for block in self.machine.ram().layout().ram() {
            left.insert_range(block.ram_range());
        }
        // Shared pages that the helper cannot reach go as they are; private ones were refused by the planner.
        let live = self.out.terms.mode == MigrationMode::Precopy && self.was_running;
        let mut finder = if live { Finder::choose(self.machine, self.mirror) } else { None };
        let mut ends = Ends { link, streams, sent };
        let moved = match &mut finder {
            Some(finder) => self.live(&mut ends, left, finder),
            None => self.switchover(&mut ends, &mut left, None, None).map(|_| ()),
        };
        match moved {
            Ok(()) => Ok((ends.link, ends.streams)),
            Err(fault) => Err(reason(&mut ends.link, fault)),
        }
    }

    /// Rounds, then the switchover; again from there when its pause would be too long.
    fn live(
        &mut self,
        ends: &mut Ends,
        mut left: PageSet,
        finder: &mut Finder,
    ) -> Result<(), MigrationFault> {
        finder.begin(self.machine)?;
        ends.sent.dirty = finder.ranges().cloned();
        let begun = Instant::now();
        let mut course = Convergence::new(Fixed::assumed(self.machine.pid().is_some()));
        loop {
            let bound = self.precopy(ends, &mut left, finder, begun, &mut course)?;
            match self.switchover(ends, &mut left, Some(finder), bound)? {
                Switched::Over => return Ok(()),
                Switched::Back { leave } => {
                    tracing::info!(
                        migration = %self.out.id,
                        leave_ms = leave.as_millis() as u64,
                        "the pause would have been longer than its limit; the guest goes on for now"
                    );
                    ends.sent.dirty = finder.ranges().cloned();
                    course.went_back(leave, begun.elapsed(), &self.out.control.limits());
                }
            }
        }
    }

    /// Opens the control link.
    fn call(&self) -> Result<Spoken, MigrationFault> {
        let out = self.out;
        let stall = out.control.patience();
        let watched = Some(out.control);
        let spoken = open_control(&out.peer, out.identity, out.host, Purpose::Migrate {}, stall, watched)?;
        // A destination that gives up says so on this link, whatever this end is at.
        out.control.watch_peer(spoken.link.canceller());
        Ok(spoken)
    }

    /// Before START, or after ABORT: the guest goes on here.
    fn back_out(&mut self, fault: MigrationFault) -> SourceEnd {
        if self.session
            && let Err(error) = self.mirror.cancel()
        {
            tracing::warn!(%error, "the helper's session could not be cancelled");
        }
        if let Err(error) = self.throttle(0) {
            tracing::warn!(fault = %crate::chain::chain(&error), "the guest stays throttled");
        }
        if let Err(error) = self.machine.log_dirty(false) {
            tracing::debug!(%error, "dirty logging could not be switched off");
        }
        resume_here(self.machine, self.was_running, fault)
    }

    fn check(&self) -> Result<(), MigrationFault> {
        if self.out.control.is_cancelled() {
            return Err(self.out.control.called_off().unwrap_or(MigrationFault::PeerGone));
        }
        self.machine.ended().map_or(Ok(()), |end| Err(MachineError::Ended(end).into()))
    }
}

/// The guest, which did not move because of `fault`, goes on here if it ran.
pub(crate) fn resume_here(machine: &mut dyn Machine, was_running: bool, fault: MigrationFault) -> SourceEnd {
    if !was_running || machine.ended().is_some() {
        return SourceEnd::NotMoved { fault, resumed: false };
    }
    match machine.resume() {
        Ok(()) => SourceEnd::NotMoved { fault, resumed: true },
        Err(error) => SourceEnd::NotMoved { fault: error.into(), resumed: false },
    }
}

/// A destination that gives up cuts the streams and says why on the control link. Whatever this end was at
/// then, that word is the reason.
fn reason(link: &mut Link, fault: MigrationFault) -> MigrationFault {
    let by_peer =
        matches!(fault, MigrationFault::PeerLost(_) | MigrationFault::PeerGone | MigrationFault::Canceled);
    if !by_peer {
        return fault;
    }
    link.set_deadline(Some(Instant::now() + Duration::from_secs(2)));
    match (wire::expect(link, &[], wire::REASON_MAX), fault) {
        (Err(said @ MigrationFault::PeerRefused { .. }), _) => said,
        // Work that was stopped because the peer had gone.
        (_, MigrationFault::Canceled) => MigrationFault::PeerGone,
        (_, fault) => fault,
    }
}

/// Milliseconds, none of them lost: a limit of as many is enough.
fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
