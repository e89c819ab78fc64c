//! Pause, the last round, the state, START, and the token that decides.

use std::time::{Duration, Instant};

use mirrorvm_abi::op::Start;

use super::{Course, Ends, Sequel, SourceEnd, Switched, audit_left};
use crate::addr::{PAGE_SIZE, RamAddr};
use crate::guest::ProtectionLevel;
use crate::migration::audit::{self, Waiting};
use crate::migration::finder::Finder;
use crate::migration::hand_over::{Belief, HandOverOutcome, Heard, Source, SourceEvent, Witness, believe};
use crate::migration::pump::Stream;
use crate::migration::rounds::Bound;
use crate::migration::transcript::sha256;
use crate::migration::wire::{self, AuditWish, Settled, StateHead, kind};
use crate::migration::{Audit, AuditState, MigrationFault, MigrationState, NotRun};
use crate::mirror::{LaneError, Mirror};
use crate::pages::PageSet;
use crate::transport::Link;

/// Most runs of shared pages that travel with a guest's state: a few MiB of message.
const SHARED_RUNS_MAX: usize = 1 << 18;

impl Course<'_, '_> {
    /// Pause, the last pages, the state, START. With a `bound` that the pause turns out not to keep to, the
    /// guest goes on here instead, and what is left has to be sent by another round. Why in this order:
    /// docs/rounds.md.
    pub(super) fn switchover(
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
        self.hand_over(link, &start)?;
        Ok(Switched::Over)
    }

    /// START, step by step as [`Source`] says. When this fails nobody has seen START, and the guest stays
    /// here.
    fn hand_over(&mut self, link: &mut Link, start: &Start) -> Result<(), MigrationFault> {
        let control = self.out.control;
        let (mut source, mut token, mut fault) = (Source::Here, None, MigrationFault::Canceled);
        loop {
            let event = match source {
                Source::Here if control.pass_point_of_no_return() => SourceEvent::Passed,
                Source::Here => {
                    fault = control.called_off().unwrap_or(fault);
                    SourceEvent::Failed
                }
                Source::Noting => match self.out.journal.start_sent() {
                    Ok(()) => SourceEvent::Noted,
                    Err(error) => {
                        fault = MigrationFault::Journal(error);
                        SourceEvent::NotNoted
                    }
                },
                Source::Minting => match self.mirror.start(start) {
                    Ok(minted) => {
                        token = Some(minted);
                        SourceEvent::Minted
                    }
                    Err(error) => {
                        fault = error.into();
                        SourceEvent::NotMinted
                    }
                },
                Source::Sending => {
                    control.enter(MigrationState::Finishing);
                    // Whatever this gives, START may have arrived: from here on only a token tells.
                    if let Some(token) = &token
                        && let Err(error) = link.send(kind::START, token)
                    {
                        tracing::warn!(%error, "START may not have arrived");
                    }
                    SourceEvent::Sent
                }
                Source::Waiting => return Ok(()),
                Source::Back | Source::Gone => return Err(fault),
            };
            source = source.step(event);
        }
    }

    /// A pause is broken off: the guest runs again.
    fn go_on(&mut self, leave: Duration) -> Result<Switched, MigrationFault> {
        self.machine.resume()?;
        self.out.journal.runs_on();
        self.paused_at = None;
        Ok(Switched::Back { leave })
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
    pub(super) fn finish(&mut self, mut link: Link, streams: Vec<Stream>) -> SourceEnd {
        if self.audit == Ok(AuditWish::BeforeCommit) {
            self.audit_before_commit(&mut link);
        }
        let answer = self.await_token(&mut link);
        let waited = self.paused_at.map(|t| t.elapsed());
        let hosts_are_trusted = self.out.departure.protection == ProtectionLevel::None;
        let (event, verify_us, fault) = match answer {
            Ok((outcome, settled)) => {
                let reason = settled.reason.map_or(MigrationFault::PeerGone, MigrationFault::from);
                let heard = Heard::Token { outcome, by_hand: false };
                match hear(heard, &settled.token, self.mirror, hosts_are_trusted) {
                    Ok(Some(outcome)) => (SourceEvent::Told(outcome), settled.verify_us, reason),
                    Ok(None) => {
                        (SourceEvent::Silence, 0, MigrationFault::Protocol("a token of another length"))
                    }
                    Err(error) => (SourceEvent::Silence, 0, error.into()),
                }
            }
            Err(fault) => (SourceEvent::Silence, 0, fault),
        };
        let ended = match Source::Waiting.step(event) {
            Source::Gone => {
                self.note_downtime(waited, verify_us);
                let wanted = self.out.terms.verify;
                let digests = if wanted { self.machine.page_digests() } else { None };
                let sequel = match self.audit {
                    Ok(AuditWish::After) => {
                        self.show_audit(Audit::new(AuditState::Pending));
                        let link = Sequel::Audit(Box::new(link));
                        streams.into_iter().for_each(|stream| _ = stream.link.close());
                        return SourceEnd::Succeeded { digests, sequel: link };
                    }
                    Err(Some(why)) => {
                        self.show_audit(Audit::not_run(why));
                        Sequel::Nothing
                    }
                    Ok(AuditWish::BeforeCommit) | Err(None) => Sequel::Nothing,
                };
                SourceEnd::Succeeded { digests, sequel }
            }
            Source::Back => {
                self.session = false;
                self.back_out(fault)
            }
            Source::Here | Source::Noting | Source::Minting | Source::Sending | Source::Waiting => {
                SourceEnd::InDoubt { fault }
            }
        };
        for stream in streams {
            let _ = stream.link.close();
        }
        let _ = link.close();
        ended
    }

    /// The destination mints COMMIT only when nothing differs. Whatever comes of it here: its token decides.
    fn audit_before_commit(&mut self, link: &mut Link) {
        self.show_audit(Audit::new(AuditState::Pending));
        let (control, begun) = (self.out.control, Instant::now());
        let shared = self.machine.encryption().shared();
        let machine = &*self.machine;
        let over = || machine.ended().map(|_| NotRun::GuestStopped);
        let through = Waiting { mirror: &mut *self.mirror, over };
        let left = || audit_left(control, begun);
        let audit = audit::show(link, through, &shared, left, control.patience());
        self.show_audit(audit);
        link.set_deadline(None);
    }

    fn show_audit(&self, audit: Audit) {
        self.out.control.update(|l| l.audit = Some(audit));
    }

    fn await_token(&mut self, link: &mut Link) -> Result<(HandOverOutcome, Settled), MigrationFault> {
        let kinds = [kind::COMMITTED, kind::ABORTED, kind::COMMITTING, kind::AUDITED];
        let kinds = if self.audit == Ok(AuditWish::BeforeCommit) { &kinds[..] } else { &kinds[..3] };
        let (kind, payload) = loop {
            let (kind, payload) = wire::expect(link, kinds, wire::REASON_MAX)?;
            // Of an audit that this end gave up; the token says what became of the guest.
            if kind == kind::AUDITED {
                continue;
            }
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
        let committed = kind == kind::COMMITTED;
        let outcome = if committed { HandOverOutcome::Committed } else { HandOverOutcome::NeverCommitted };
        Ok((outcome, wire::parse(&payload)?))
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
}

/// Whose the guest is by what is heard after START, `token` included if that is one; `None`: it does not
/// tell.
///
/// # Errors
/// The helper does not take the token.
pub(crate) fn hear(
    heard: Heard,
    token: &[u8],
    mirror: &mut Mirror,
    hosts_are_trusted: bool,
) -> Result<Option<HandOverOutcome>, LaneError> {
    match believe(heard, Witness::Helper { hosts_are_trusted }) {
        Belief::Ends(outcome) => Ok(Some(outcome)),
        Belief::WhenOpened(outcome) => {
            let Ok(token) = token.try_into() else { return Ok(None) };
            match outcome {
                HandOverOutcome::Committed => mirror.check_commit(token)?,
                HandOverOutcome::NeverCommitted => mirror.check_abort(token)?,
            }
            Ok(Some(outcome))
        }
        Belief::CannotBeOpened | Belief::Stays => Ok(None),
    }
}
