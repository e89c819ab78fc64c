//! The source's course: prepare, rounds, hand-over.

use std::time::{Duration, Instant};

use mirrorvm_abi::op::{Begin, Start};
use mirrorvm_abi::record::TOKEN_BYTES;
use ring::rand::{SecureRandom, SystemRandom};
use uuid::Uuid;

use super::control::Control;
use super::finder::Finder;
use super::peer::{PeerAddress, Spoken, open_control};
use super::pump::{Limiter, Load, Stream, Work, send_shared};
use super::records::Mask;
use super::rounds::{Bound, Convergence, Decision, Fixed, Observation, ends_at};
use super::threads::{all, side_by_side};
use super::transcript::{sha256, transcript};
use super::wire::{self, Prepare, Prepared, Purpose, Settled, StateHead, kind};
use super::{MigrationFault, MigrationLimits, MigrationMode, MigrationState, Round, StreamTransport};
use crate::addr::{PAGE_SIZE, RamAddr};
use crate::address_space::GuestLayout;
use crate::guest::{DirtyRanges, Labels, Machine, MachineError, ProtectionLevel};
use crate::mirror::Mirror;
use crate::pages::PageSet;
use crate::transport::{Identity, Link};

/// Most runs of shared pages that travel with a guest's state: a few MiB of message.
const SHARED_RUNS_MAX: usize = 1 << 18;

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
    /// Whether both ends digest every page of RAM at the pause point.
    pub verify: bool,
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

/// How it ended. The machine is paused in all but `NotMoved { resumed: true, .. }`.
#[derive(Debug)]
pub enum SourceEnd {
    /// The destination has the guest. Digests when verification was asked for.
    Succeeded {
        /// Of every page at the pause point.
        digests: Option<Vec<[u8; 16]>>,
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
    let mut course =
        Course { out, machine, mirror, was_running, begun: Instant::now(), paused_at: None, session: false };
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
}

/// Pages that are in one of two sets alone.
fn differing(a: &PageSet, b: &PageSet) -> u64 {
    let both = a.clone().take(b).len();
    a.len() + b.len() - 2 * both
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

/// How long rounds that would only cost are put off.
const REST: Duration = Duration::from_millis(500);

impl Course<'_, '_> {
    /// Everything that can be called off: preparation, rounds, pause, last round, state. Ends with START on
    /// its way.
    fn up_to_start(&mut self) -> Result<(Link, Vec<Stream>), MigrationFault> {
        let control = self.out.control;
        control.enter(MigrationState::Preparing);
        let Spoken { mut link, protocol } = self.call()?;
        let streams = match self.prepare(&mut link, protocol) {
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

    fn prepare(&mut self, link: &mut Link, protocol: u32) -> Result<Vec<Stream>, MigrationFault> {
        let out = self.out;
        let stall = out.control.patience();
        let watched = Some(out.control);
        let nonce = self.mirror.hello()?;
        let prepare = Prepare {
            session: out.id,
            guest: out.departure.guest,
            definition: out.departure.definition.to_owned(),
            layout: out.departure.layout.clone(),
            strategy: self.mirror.plan().strategy,
            streams: out.terms.streams,
            stream_transport: out.terms.stream_transport,
            mask: fresh_key()?,
            helper_measurement: out.helper_measurement,
            nonce,
            secret: *self.machine.migration_secret(),
            paused: !self.was_running,
            // At level `none` the hosts can see which pages are zero anyway; at others it is nobody's
            // business.
            elide_zero: out.departure.protection == ProtectionLevel::None,
            readiness: self.machine.migration_control().carry(),
            verify: out.terms.verify,
            stall_timeout_ms: out.control.limits().stall_timeout_ms,
        };
        let message = wire::written(&prepare)?;
        link.send(kind::PREPARE, &message)?;
        let transcript = transcript(protocol, &message);
        drop(message);
        let (_, payload) = wire::expect(link, &[kind::PREPARED], 64 << 10)?;
        let prepared: Prepared = wire::parse(&payload)?;
        self.mirror.begin(&Begin {
            source: true,
            elide_zero: prepare.elide_zero,
            fresh: false,
            // Only where somebody will ask: they cost an export a quarter of its speed and more.
            digests: out.terms.mode == MigrationMode::Precopy && !self.machine.can_log_dirty(),
            streams: out.terms.streams,
            session: *out.id.as_bytes(),
            peer_nonce: prepared.nonce,
            transcript,
        })?;
        self.session = true;
        let mut streams = Vec::new();
        for index in 0..out.terms.streams {
            let purpose = Purpose::Stream { session: out.id, index };
            let mut link = open_control(&out.peer, out.identity, out.host, purpose, stall, watched)?.link;
            let mask = match out.terms.stream_transport {
                StreamTransport::Sealed => {
                    link.leave_tls()?;
                    Some(Mask::new(&prepare.mask, index))
                }
                StreamTransport::Tls => None,
            };
            streams.push(Stream::new(link, mask));
        }
        Ok(streams)
    }

    /// Rounds while the guest runs, until what is left fits the downtime limit, or must go anyway. Gives what
    /// the pause has to keep to.
    fn precopy(
        &mut self,
        ends: &mut Ends,
        left: &mut PageSet,
        finder: &Finder,
        begun: Instant,
        course: &mut Convergence,
    ) -> Result<Option<Bound>, MigrationFault> {
        let control = self.out.control;
        control.enter(MigrationState::Precopy);
        loop {
            self.check()?;
            let (mut round, settled) = self.round(ends, left, Some(begun))?;
            course.settled(settled);
            let duration = Duration::from_micros(round.duration_us);
            let mut seen = Observation {
                moved_pages: round.pages_sealed + round.pages_shared,
                duration,
                look: Duration::ZERO,
                dirty_pages: left.len(),
                written_pages: 0,
                elapsed: begun.elapsed(),
                asked: control.wants_switchover(),
            };
            // What is left already may be the verdict: no scan of all RAM beyond the deadline then.
            let mut already = *course;
            if finder.is_slow()
                && let Decision::NotConverging { pages_per_second, .. } =
                    already.decide(&seen, &control.limits())
            {
                return Err(self.not_converging(pages_per_second));
            }
            let (streams, epoch) = (ends.streams.len(), ends.sent.epoch);
            let look = finder.look(self.machine, self.mirror, streams, epoch, control, left)?;
            seen.look = look.took;
            seen.dirty_pages = left.len();
            seen.written_pages = look.written_pages;
            seen.elapsed = begun.elapsed();
            seen.asked = control.wants_switchover();
            round.dirtied_pages = seen.written_pages;
            let limits = control.limits();
            let decision = course.decide(&seen, &limits);
            let floor = course.floor(seen.look);
            control.update(|l| {
                l.progress.dirty_pages_per_second = course.dirty_rate();
                l.progress.downtime_floor_ms = Some(whole_ms(floor));
                if let Decision::Round { expected, .. } | Decision::Switchover { expected, .. } = decision {
                    l.progress.expected_downtime_ms = Some(whole_ms(expected));
                }
                l.push_round(round);
            });
            match decision {
                Decision::Round { throttle_percent, .. } => self.throttle(throttle_percent)?,
                Decision::Switchover { bound, .. } => return Ok(bound),
                Decision::NotConverging { pages_per_second, .. } => {
                    return Err(self.not_converging(pages_per_second));
                }
            }
            if course.may_rest(&seen, &limits) {
                self.rest(begun, &limits);
            }
        }
    }

    /// A verdict with what was seen last.
    fn not_converging(&self, pages_per_second: u64) -> MigrationFault {
        let (p, limit) = (self.out.control.live().progress, self.out.control.limits().downtime_ms);
        MigrationFault::NotConverging {
            dirty_pages_per_second: p.dirty_pages_per_second,
            pages_per_second,
            floor_ms: p.downtime_floor_ms.filter(|floor| *floor > limit),
        }
    }

    /// Waits where rounds would only cost, until something changes: at most half a second.
    fn rest(&self, begun: Instant, limits: &MigrationLimits) {
        let control = self.out.control;
        let by = Instant::now() + REST;
        let by = ends_at(begun, limits).map_or(by, |at| at.min(by));
        let changed = || {
            control.is_cancelled()
                || control.wants_switchover()
                || control.limits() != *limits
                || self.machine.ended().is_some()
        };
        while Instant::now() < by && !changed() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationFault> {
        // Such limits are refused before the start; those of a record from before that was so change nothing
        // here.
        if percent > 0 && !self.machine.can_throttle() {
            return Ok(());
        }
        if self.out.control.live().progress.throttle_percent != percent {
            self.machine.throttle(percent)?;
            self.out.control.update(|l| l.progress.throttle_percent = percent);
        }
        Ok(())
    }

    /// Pause, the last pages, the state, START. With a `bound` that the pause turns out not to keep to, the
    /// guest goes on here instead, and what is left has to be sent by another round. Why in this order:
    /// docs/rounds.md.
    fn switchover(
        &mut self,
        ends: &mut Ends,
        left: &mut PageSet,
        finder: Option<&Finder>,
        bound: Option<Bound>,
    ) -> Result<Switched, MigrationFault> {
        self.check()?;
        let control = self.out.control;
        control.enter(MigrationState::Switchover);
        let paused_at = Instant::now();
        self.paused_at = Some(paused_at);
        self.machine.pause()?;
        self.out.journal.held();
        // Saving may touch memory (drivers say so), hence before the last look at the dirty log.
        let state = self.machine.save_state()?;
        let leave = paused_at.elapsed();
        if let Some(finder) = finder {
            let (streams, epoch) = (ends.streams.len(), ends.sent.epoch);
            finder.look(self.machine, self.mirror, streams, epoch, control, left)?;
        }
        // Marks stay: nothing is written any more, and if the guest goes on after all they are found once
        // more.
        ends.sent.dirty = None;
        // Registers are written to the save areas when the vCPUs stop: whatever went before, they go again,
        // last.
        if let Some(areas) = self.machine.ram().layout().save_areas() {
            left.insert_range(areas.ram_range());
        }
        // A switchover that was asked for meanwhile takes what it takes.
        let holds =
            |pages| bound.is_none_or(|b| b.holds(paused_at.elapsed(), pages)) || control.wants_switchover();
        if !holds(left.len()) {
            return self.go_on(leave);
        }
        let (round, _) = self.round(ends, left, None)?;
        control.update(|l| l.push_round(round));
        if !holds(0) {
            return self.go_on(leave);
        }
        if let Some(finder) = finder {
            finder.end(self.machine)?;
        }
        // From here on the guest does not run again without the helper's leave.
        self.mirror.paused()?;
        let link = &mut ends.link;
        let state_digest = self.send_state(link, &state)?;
        // What the helper may export, less what it did: the rest went as shared pages.
        let allowed: u64 = self.mirror.plan().allowed_pages();
        let start = Start { state: state_digest, shared_pages: allowed - ends.sent.ever_sealed.len() };
        self.check()?;
        if !control.pass_point_of_no_return() {
            return Err(control.called_off().unwrap_or(MigrationFault::Canceled));
        }
        self.out.journal.start_sent().map_err(MigrationFault::Journal)?;
        let token = self.mirror.start(&start)?;
        control.enter(MigrationState::Finishing);
        // Whatever this gives, START may have arrived: from here on only a token tells.
        if let Err(error) = link.send(kind::START, &token) {
            tracing::warn!(%error, "START may not have arrived");
        }
        Ok(Switched::Over)
    }

    /// A pause is broken off: the guest runs again.
    fn go_on(&mut self, leave: Duration) -> Result<Switched, MigrationFault> {
        self.machine.resume()?;
        self.out.journal.runs_on();
        self.paused_at = None;
        Ok(Switched::Back { leave })
    }

    /// One epoch over all streams: sends `left`, and leaves in it what there was no time for. With `since`,
    /// when pages began to move, the guest runs and limits may cut it; without it is the last, and takes the
    /// time that it takes. Also gives how long it was from the last page to the destination's word.
    fn round(
        &mut self,
        ends: &mut Ends,
        left: &mut PageSet,
        since: Option<Instant>,
    ) -> Result<(Round, Duration), MigrationFault> {
        let Ends { link, streams, sent } = ends;
        let begun = Instant::now();
        let status = self.machine.encryption().shared();
        let (mut sealed, mut shared) = split(left, &status);
        let changed = sent.status.as_ref().map_or(0, |before| differing(before, &status));
        let shared_bytes = status.len() * PAGE_SIZE;
        sent.status = Some(status);
        let control = self.out.control;
        control.update(|l| {
            l.progress.shared_bytes = Some(shared_bytes);
            l.progress.status_changes += changed;
            l.progress.iteration = sent.epoch;
            l.progress.remaining_bytes = left.len() * PAGE_SIZE;
        });
        let plan = std::sync::Arc::clone(self.mirror.plan());
        let work = Work::new(Load {
            epoch: sent.epoch,
            sealed: &sealed,
            shared: &shared,
            ram: self.machine.ram(),
            plan: &plan,
            dirty: sent.dirty.as_ref(),
            control,
            limiter: &sent.limiter,
            streams: streams.len(),
            since,
        });
        link.set_patience(work.patience());
        let epoch = sent.epoch;
        let crossed = cross(link, self.mirror, streams, &work, epoch);
        let (unsent, settled) = match crossed {
            Ok(crossed) => crossed,
            // Whoever is not heard at the deadline is not waited for.
            Err(MigrationFault::PeerLost(_) | MigrationFault::PeerGone) if work.is_over() => {
                let pages = work.counts.bytes() / PAGE_SIZE;
                return Err(self.not_converging(per_second(pages, begun.elapsed())));
            }
            Err(fault) => return Err(fault),
        };
        let (duration, bytes) = (begun.elapsed(), work.counts.bytes());
        let count = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        let round = Round {
            number: sent.epoch,
            pages_sealed: count(&work.counts.sealed),
            pages_shared: count(&work.counts.shared),
            pages_zero: count(&work.counts.zero),
            bytes,
            duration_us: duration.as_micros() as u64,
            dirtied_pages: 0,
            paused: since.is_none(),
        };
        let before = *work.before();
        let untaken = work.untaken();
        left.clone_from(&untaken);
        left.union(&unsent);
        sealed.take(&untaken);
        shared.take(&unsent);
        sent.epoch += 1;
        sent.ever_sealed.union(&sealed);
        sent.ever_shared.union(&shared);
        control.update(|l| {
            let p = &mut l.progress;
            p.processed_bytes = before.processed_bytes + bytes;
            p.pages_sealed = before.pages_sealed + round.pages_sealed;
            p.pages_shared = before.pages_shared + round.pages_shared;
            p.pages_zero = before.pages_zero + round.pages_zero;
            p.remaining_bytes = 0;
            p.remaining_ms = None;
            if bytes >= 1 << 20 {
                p.throughput_bytes_per_second = per_second(bytes, duration);
            }
            let total = if since.is_none() { &mut p.downtime_bytes } else { &mut p.precopy_bytes };
            *total += bytes;
            p.elapsed_ms = self.begun.elapsed().as_millis() as u64;
        });
        Ok((round, settled))
    }

    fn send_state(&mut self, link: &mut Link, state: &[u8]) -> Result<[u8; 32], MigrationFault> {
        let (console_end, console) = self.machine.console().carry();
        let head = StateHead {
            console_end,
            console_bytes: console.len() as u32,
            machine_bytes: u32::try_from(state.len())
                .map_err(|_| MigrationFault::Protocol("state too large"))?,
            shared: self.shared_runs()?,
            labels: self.out.journal.last_labels().map_err(MigrationFault::Journal)?,
        };
        let head = serde_json::to_vec(&head).map_err(|_| MigrationFault::Protocol("unsendable state"))?;
        let len = (head.len() as u32).to_le_bytes();
        link.send_parts(kind::STATE, &[&len, &head, &console, state])?;
        Ok(sha256(state))
    }

    /// Which pages the guest shares, as runs. A guest may make them as many as it likes; what goes on the
    /// wire is bounded.
    fn shared_runs(&self) -> Result<Vec<(u64, u64)>, MigrationFault> {
        let layout = self.machine.ram().layout();
        let extents = self.machine.encryption().extents(&layout, RamAddr::new(0), 2 * SHARED_RUNS_MAX + 1);
        let shared =
            extents.iter().filter(|e| e.shared).map(|e| (e.range.start() / PAGE_SIZE, e.range.pages()));
        let runs: Vec<_> = shared.collect();
        if runs.len() > SHARED_RUNS_MAX { Err(MigrationFault::Fragmented) } else { Ok(runs) }
    }

    /// After START: the answer decides, and only the answer.
    fn finish(&mut self, mut link: Link, streams: Vec<Stream>) -> SourceEnd {
        let settled = self.await_token(&mut link);
        let waited = self.paused_at.map(|t| t.elapsed());
        let ended = match settled {
            Ok((kind::COMMITTED, settled, token)) => match self.mirror.check_commit(&token) {
                Ok(()) => {
                    self.note_downtime(waited, settled.verify_us);
                    let wanted = self.out.terms.verify;
                    let digests = if wanted { self.machine.page_digests() } else { None };
                    SourceEnd::Succeeded { digests }
                }
                Err(e) => SourceEnd::InDoubt { fault: e.into() },
            },
            Ok((_, settled, token)) => match self.mirror.check_abort(&token) {
                Ok(()) => {
                    self.session = false;
                    let fault = settled.reason.map_or(MigrationFault::PeerGone, MigrationFault::from);
                    self.back_out(fault)
                }
                Err(e) => SourceEnd::InDoubt { fault: e.into() },
            },
            Err(fault) => SourceEnd::InDoubt { fault },
        };
        for stream in streams {
            let _ = stream.link.close();
        }
        let _ = link.close();
        ended
    }

    fn await_token(&mut self, link: &mut Link) -> Result<(u8, Settled, [u8; TOKEN_BYTES]), MigrationFault> {
        let kinds = [kind::COMMITTED, kind::ABORTED, kind::COMMITTING];
        let (kind, payload) = loop {
            let (kind, payload) = wire::expect(link, &kinds, wire::REASON_MAX)?;
            if kind != kind::COMMITTING {
                break (kind, payload);
            }
            // Somebody is there and tries: silence begins anew, and whoever looks here sees what is waited
            // for.
            if !self.out.control.live().committing {
                let why: MigrationFault = wire::parse::<wire::Refused>(&payload)?.into();
                tracing::warn!(migration = %self.out.id, fault = %why, "the destination cannot store COMMIT yet");
                self.out.control.update(|l| l.committing = true);
            }
        };
        self.out.control.update(|l| l.committing = false);
        let settled: Settled = wire::parse(&payload)?;
        let token = settled
            .token
            .as_slice()
            .try_into()
            .map_err(|_| MigrationFault::Protocol("a token of another length"))?;
        Ok((kind, settled, token))
    }

    fn note_downtime(&self, waited: Option<Duration>, verify_us: u64) {
        let Some(waited) = waited else { return };
        self.out.control.update(|l| {
            let verify = (verify_us as f64 / 1e3).min(waited.as_secs_f64() * 1e3);
            let to_the_microsecond = |ms: f64| (ms * 1e3).round() / 1e3;
            l.progress.downtime_ms = Some(to_the_microsecond(waited.as_secs_f64() * 1e3 - verify));
            // A pause that was had can be had.
            let had = waited.as_millis() as u64 + 1;
            l.progress.downtime_floor_ms = l.progress.downtime_floor_ms.map(|floor| floor.min(had));
            l.progress.verify_ms = self.out.terms.verify.then_some(to_the_microsecond(verify));
            l.progress.elapsed_ms = self.begun.elapsed().as_millis() as u64;
        });
    }

    /// Before START, or after ABORT: the guest goes on here.
    fn back_out(&mut self, fault: MigrationFault) -> SourceEnd {
        if self.session
            && let Err(error) = self.mirror.cancel()
        {
            tracing::warn!(%error, "the helper's session could not be cancelled");
        }
        if let Err(error) = self.throttle(0) {
            tracing::warn!(fault = %error.chain(), "the guest stays throttled");
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

/// All of an epoch's messages. Gives the shared pages that there was no time for, and how long it was from
/// the last page to the destination's word.
fn cross(
    link: &mut Link,
    mirror: &mut Mirror,
    streams: &mut [Stream],
    work: &Work<'_>,
    epoch: u32,
) -> Result<(PageSet, Duration), MigrationFault> {
    link.send(kind::EPOCH_BEGIN, &epoch.to_le_bytes())?;
    pump_all(mirror, streams, work)?;
    let unsent = send_shared(link, work)?;
    let sent_all = Instant::now();
    let token = mirror.end_epoch()?;
    link.set_patience(work.patience());
    link.send(kind::EPOCH_TOKEN, &token)?;
    wire::expect(link, &[kind::EPOCH_ACK], 64)?;
    Ok((unsent, sent_all.elapsed()))
}

/// Every stream sends its part, each on its own thread; the first error counts.
fn pump_all(mirror: &mut Mirror, streams: &mut [Stream], work: &Work<'_>) -> Result<(), MigrationFault> {
    let placement = mirror.placement();
    let parts = streams.iter_mut().zip(mirror.lanes());
    all(side_by_side("out", &placement, parts, |(stream, lane)| stream.send(lane, work))).map(|_| ())
}

/// The pages of `left` that go sealed, and those that the guest shares.
fn split(left: &PageSet, shared: &PageSet) -> (PageSet, PageSet) {
    let mut sealed = left.clone();
    let plain = sealed.take(shared);
    (sealed, plain)
}

/// A key that nothing else has.
fn fresh_key() -> Result<[u8; 32], MigrationFault> {
    let mut key = [0; 32];
    SystemRandom::new()
        .fill(&mut key)
        .map_err(|_| MigrationFault::Protocol("the system has no randomness"))?;
    Ok(key)
}

/// Milliseconds, none of them lost: a limit of as many is enough.
fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn per_second(n: u64, duration: Duration) -> u64 {
    (n as f64 / duration.as_secs_f64().max(1e-6)) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::RamPage;

    proptest! {
        #[test]
        fn what_differs_is_what_is_in_one_alone(
            a in prop::collection::btree_set(0u64..300, 0..200), b in prop::collection::btree_set(0u64..900, 0..200),
        ) {
            let set = |pages: &std::collections::BTreeSet<u64>| {
                let mut set = PageSet::new();
                for page in pages {
                    set.insert(RamPage::new(*page));
                }
                set
            };
            prop_assert_eq!(differing(&set(&a), &set(&b)), a.symmetric_difference(&b).count() as u64);
        }
    }
}
