//! The destination's course: admit, import, commit or abort.

use crate::codes::PeerRefusal;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use mirrorvm_abi::op::{Begin, Greeting};
use mirrorvm_abi::record::TOKEN_BYTES;
use zeroize::Zeroizing;

use super::audit::{self, Held, Kept, Waiting as AuditWaiting};
use super::evidence;
use super::hand_over::{Destination, DestinationEvent};
use super::landing::Ground;
use super::peer::{Agreed, Spoken};
use super::records::Mask;
use super::sink::{Received, Sink, receive_shared};
use super::terms::{AUDIT_TIMEOUT_MS, Suite, suite_names};
use super::threads::{all, side_by_side};
use super::transcript::{sha256, transcript};
use super::wire::{self, AuditWish, Prepare, Prepared, Refused, STATE_MAX, Settled, StateHead, kind};
use super::{Audit, AuditState, Control, MigrationFault, MigrationState, NotRun, Round, StreamTransport};
use crate::addr::PAGE_SIZE;
use crate::guest::{Labels, Machine, MachineError};
use crate::mirror::{Mirror, SealedToken};
use crate::pages::PageSet;
use crate::threads::{self, Role};
use crate::transport::{Link, LinkError, LogBudget, Waiting};

/// What a destination made for a guest that arrives.
pub struct Arrival {
    /// Its machine, paused.
    pub machine: Box<dyn Machine>,
    /// Whether its memory reads as zero. Encrypted RAM does not before it is written.
    pub fresh: bool,
    /// Its mirror.
    pub mirror: Mirror,
    /// The handle.
    pub control: Arc<Control>,
    /// Streams as they connect: index and link.
    pub streams: mpsc::Receiver<(u16, Link)>,
}

/// A guest that was committed here.
pub struct Arrived {
    /// Its machine.
    pub machine: Box<dyn Machine>,
    /// Its mirror; the session is over. `None`: the audit has it.
    pub mirror: Option<Mirror>,
    /// Whether it was paused at the source, and is here.
    pub paused: bool,
    /// Of every page at the pause point, when verification was asked for.
    pub digests: Option<Vec<[u8; 16]>>,
    /// Why it does not run although it should.
    pub fault: Option<MigrationFault>,
    /// The audit that follows, for as long as the host keeps what is held for it.
    pub audit: Option<Arc<Held>>,
}

/// The store did not take something.
#[derive(Debug, thiserror::Error)]
pub enum NotStored {
    /// It may take it later: nothing was noted.
    #[error("the host's store refuses")]
    Yet(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The host goes: nothing was noted, and nothing will be.
    #[error("the host shuts down")]
    Ever,
}

/// The host as a destination sees it. Everything that must be durable is, when a call returns.
pub trait Receiver {
    /// Makes a place for the guest, or says why not; then nothing is left behind.
    ///
    /// # Errors
    /// A refusal for the peer.
    fn admit(&self, prepare: &Prepare, peer: &str) -> Result<Arrival, Refused>;

    /// The labels that the guest had when it left, which may be others than its definition's. Durable when
    /// this returns.
    ///
    /// # Errors
    /// They cannot be, or were not noted.
    fn labels(
        &self,
        session: uuid::Uuid,
        labels: Labels,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// COMMIT is minted and nobody has seen it; `paused` as the guest will be. Durable when this returns,
    /// together with the records of guest and migration; only then may the token leave, and after it the
    /// guest run.
    ///
    /// # Errors
    /// Nothing was noted: the guest does not run, the token goes nowhere. May be called again.
    fn commit(&self, session: uuid::Uuid, token: &SealedToken, paused: bool) -> Result<(), NotStored>;

    /// The guest is this host's, and runs if it should.
    fn arrived(&self, session: uuid::Uuid, arrived: Arrived);

    /// The audit that followed has ended.
    fn audited(&self, session: uuid::Uuid, guest: uuid::Uuid, audit: Audit, held: &Arc<Held>);

    /// The import is over; the machine is gone. With a token: ABORT was minted.
    fn aborted(&self, session: uuid::Uuid, token: Option<&SealedToken>, fault: &MigrationFault);
}

/// Serves one incoming migration on its control link, from Prepare to the end.
pub fn serve_import(spoken: Spoken, peer: &str, host: &dyn Receiver) {
    let Spoken { mut link, agreed } = spoken;
    let (prepare, message) = match read_prepare(&mut link, kind::PREPARE) {
        Ok(p) => p,
        Err(fault) => {
            static UNPREPARED: LogBudget = LogBudget::new();
            if let Some(unlogged) = UNPREPARED.take() {
                let fault = crate::chain::chain(&fault);
                tracing::warn!(peer, unlogged, fault, "an incoming migration was not prepared");
            }
            return;
        }
    };
    let arrival = match host.admit(&prepare, peer) {
        Ok(a) => a,
        Err(refused) => {
            static REFUSED: LogBudget = LogBudget::new();
            if let Some(unlogged) = REFUSED.take() {
                tracing::info!(
                    peer,
                    unlogged,
                    code = refused.code.as_str(),
                    "an incoming migration is refused"
                );
            }
            // The close matters: the refusal must arrive before the connection goes.
            if wire::send(&mut link, kind::REFUSED, &refused).is_ok() {
                let _ = link.close();
            }
            return;
        }
    };
    let Arrival { machine, fresh, mirror, control, streams } = arrival;
    let stall = Duration::from_millis(prepare.stall_timeout_ms.clamp(1_000, 600_000));
    // Calling it off ends the streams; this link is looked after by who reads it, so that the source can be
    // told.
    let mut import = Import {
        link,
        prepare,
        agreed,
        message,
        fresh,
        host,
        machine,
        mirror,
        control,
        streams,
        stall,
        verify_us: 0,
        digests: None,
        shared: PageSet::new(),
    };
    match import.up_to_start() {
        Ok(()) => import.commit(),
        Err(fault) => import.abort(fault),
    }
}

/// Answers one look at a migration that was not begun: what speaks against it. Nothing is kept of it.
pub fn serve_check(mut link: Link, peer: &str, against: impl FnOnce(&Prepare) -> Vec<Refused>) {
    let prepare = match read_prepare(&mut link, kind::CHECK) {
        Ok((p, _)) => p,
        Err(fault) => {
            static UNCLEAR: LogBudget = LogBudget::new();
            if let Some(unlogged) = UNCLEAR.take() {
                let fault = crate::chain::chain(&fault);
                tracing::info!(peer, unlogged, fault, "a look at a migration was not understood");
            }
            return;
        }
    };
    let verdict = wire::Verdict { against: against(&prepare) };
    link.set_deadline(Some(Instant::now() + Duration::from_secs(10)));
    if wire::send(&mut link, kind::CHECKED, &verdict).is_ok() {
        let _ = link.close();
    }
}

/// What would come, and the message that said so.
fn read_prepare(link: &mut Link, kind: u8) -> Result<(Prepare, Zeroizing<Vec<u8>>), MigrationFault> {
    link.set_deadline(Some(Instant::now() + Duration::from_secs(10)));
    let (_, payload) = wire::expect(link, &[kind], wire::MESSAGE_MAX)?;
    link.set_deadline(None);
    Ok((wire::parse(&payload)?, payload))
}

/// How often a wait looks whether it is still worth it.
const LOOK: Duration = Duration::from_millis(50);
/// How long a source that is told of the end may take to end its side.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Waits between attempts to store COMMIT, from and to; a source is told in between that it is being tried.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

struct Import<'a> {
    link: Link,
    prepare: Prepare,
    agreed: Agreed,
    /// PREPARE as it came; empty once keys were derived.
    message: Zeroizing<Vec<u8>>,
    fresh: bool,
    host: &'a dyn Receiver,
    machine: Box<dyn Machine>,
    mirror: Mirror,
    control: Arc<Control>,
    streams: mpsc::Receiver<(u16, Link)>,
    stall: Duration,
    verify_us: u64,
    digests: Option<Vec<[u8; 16]>>,
    /// What the guest shared when it left.
    shared: PageSet,
}

impl Import<'_> {
    /// Until START has been checked; then the guest is complete here and not committed.
    fn up_to_start(&mut self) -> Result<(), MigrationFault> {
        let suite = Suite::named(&self.prepare.suite);
        let suite = suite.filter(|suite| self.mirror.helper_header().has(suite.of_records()));
        let suite = suite.ok_or(MigrationFault::Protocol("a suite that was not admitted"))?;
        if self.prepare.audit.is_some() && !self.mirror.plan().has_digests() {
            return Err(MigrationFault::AuditNotRun { why: NotRun::NoRoom });
        }
        let own = self.mirror.hello()?;
        let Greeting { nonce, public_key } = own;
        let source = Greeting { nonce: self.prepare.nonce, public_key: self.prepare.public_key };
        let prepared = wire::written(&Prepared {
            evidence: evidence::of_destination(
                self.machine.as_ref(),
                &self.agreed,
                (&own, &source),
                self.prepare.session.as_bytes(),
            ),
            nonce,
            public_key,
            suites: suite_names(&Suite::of_helper(self.mirror.helper_header())),
        })?;
        self.link.send(kind::PREPARED, &prepared)?;
        let transcript = transcript(&self.agreed, &self.message, &prepared);
        self.message = Zeroizing::default();
        self.mirror.begin(&Begin {
            source: false,
            elide_zero: false,
            // What a driver brought may be anything.
            fresh: self.fresh && self.machine.ram().was_zero(),
            digests: false,
            audit: self.prepare.audit.is_some(),
            suite: suite.of_records(),
            streams: self.prepare.streams,
            session: *self.prepare.session.as_bytes(),
            transcript,
            peer: source,
        })?;
        let mut sinks = self.await_streams()?;
        // Streams that come now are nobody's: their links end here.
        self.streams = mpsc::sync_channel(0).1;
        self.control.update(|l| {
            l.state = MigrationState::Precopy;
            l.progress.total_bytes = self.prepare.layout.ram_bytes();
        });
        loop {
            self.await_frame()?;
            let kinds = [kind::EPOCH_BEGIN, kind::STATE];
            let (kind, payload) = wire::expect(&mut self.link, &kinds, STATE_MAX)?;
            if kind == kind::STATE {
                self.control.enter(MigrationState::Switchover);
                self.take_state(&payload)?;
                break;
            }
            let epoch = payload.as_slice().try_into().map(u32::from_le_bytes);
            self.epoch(epoch.map_err(|_| MigrationFault::Protocol("an epoch without number"))?, &mut sinks)?;
        }
        self.await_frame()?;
        let (_, payload) = wire::expect(&mut self.link, &[kind::START], 4096)?;
        self.mirror.check_start(&token(&payload)?)?;
        if self.prepare.audit == Some(AuditWish::BeforeCommit) {
            self.audit_before_commit()?;
        }
        // Whether it is still there to be committed: from COMMIT on it is this host's, alive or not.
        self.check()
    }

    /// Without a verdict that nothing differs the guest must not run here.
    fn audit_before_commit(&mut self) -> Result<(), MigrationFault> {
        self.control.update(|l| l.audit = Some(Audit::new(AuditState::Pending)));
        let (control, machine) = (&self.control, &self.machine);
        let over = || {
            let ended = control.called_off().is_some() || machine.ended().is_some();
            ended.then_some(NotRun::GuestStopped)
        };
        let through = AuditWaiting { mirror: &mut self.mirror, over };
        let audit = audit::judge(&mut self.link, through, &self.shared, audit_ends_by(), self.stall);
        self.control.update(|l| l.audit = Some(audit.clone()));
        match audit.state {
            AuditState::Proven => Ok(()),
            AuditState::Mismatch { pages, .. } => Err(MigrationFault::AuditMismatch { pages }),
            AuditState::NotRun { why } => Err(MigrationFault::AuditNotRun { why }),
            AuditState::Pending => Err(MigrationFault::AuditNotRun { why: NotRun::PeerLost }),
        }
    }

    fn await_streams(&self) -> Result<Vec<Sink>, MigrationFault> {
        let wanted = usize::from(self.prepare.streams);
        let mut places: Vec<Option<Sink>> = (0..wanted).map(|_| None).collect();
        let by = Instant::now() + self.stall;
        while places.iter().any(Option::is_none) {
            let left = by.saturating_duration_since(Instant::now());
            let (index, link) = match self.streams.recv_timeout(left.min(LOOK)) {
                Ok(stream) => stream,
                // A source that gave up brings no streams; it does so by closing the link that is not read
                // here.
                Err(RecvTimeoutError::Timeout) if !left.is_zero() && !self.link.ended() => {
                    self.check()?;
                    continue;
                }
                Err(_) => return Err(MigrationFault::PeerGone),
            };
            self.control.register(link.canceller());
            match places.get_mut(usize::from(index)) {
                Some(place @ None) => *place = Some(self.sink(index, link)?),
                Some(Some(_)) | None => {
                    return Err(MigrationFault::Protocol("a stream that was not expected"));
                }
            }
        }
        Ok(places.into_iter().flatten().collect())
    }

    fn sink(&self, index: u16, mut link: Link) -> Result<Sink, MigrationFault> {
        let mask = match self.prepare.stream_transport {
            StreamTransport::Sealed => {
                link.leave_tls()?;
                Some(Mask::new(&self.prepare.mask, index))
            }
            StreamTransport::Tls => None,
        };
        Ok(Sink::new(link, mask))
    }

    fn epoch(&mut self, epoch: u32, sinks: &mut [Sink]) -> Result<(), MigrationFault> {
        let begun = Instant::now();
        let got = self.receive_all(epoch, sinks)?;
        let (shared, payload) = self.shared_pages(epoch)?;
        self.mirror.check_epoch(&token(&payload)?)?;
        self.link.send(kind::EPOCH_ACK, &[])?;
        let bytes = (got.sealed - got.zero + shared) * PAGE_SIZE;
        self.control.update(|l| {
            let p = &mut l.progress;
            p.iteration = epoch;
            p.processed_bytes += bytes;
            p.pages_sealed += got.sealed;
            p.pages_shared += shared;
            p.pages_zero += got.zero;
            l.push_round(Round {
                number: epoch,
                pages_sealed: got.sealed,
                pages_shared: shared,
                pages_zero: got.zero,
                bytes,
                duration_us: begun.elapsed().as_micros() as u64,
                dirtied_pages: 0,
                paused: false,
            });
        });
        Ok(())
    }

    /// What comes on the control link after the streams' part: shared pages, then the token, which is given.
    fn shared_pages(&mut self, epoch: u32) -> Result<(u64, Vec<u8>), MigrationFault> {
        let mut pages = 0;
        loop {
            self.await_frame()?;
            let header = self.link.recv_header(wire::DATA_MAX)?.ok_or(MigrationFault::PeerGone)?;
            match header.kind {
                kind::SHARED => {
                    pages += receive_shared(&mut self.link, self.machine.ram(), header.len, epoch)?;
                }
                kind::EPOCH_TOKEN => {
                    let mut token = [0; TOKEN_BYTES];
                    if header.len as usize != token.len() {
                        return Err(MigrationFault::Protocol("a token of another length"));
                    }
                    self.link.read_payload(&mut token)?;
                    return Ok((pages, token.to_vec()));
                }
                _ => return Err(MigrationFault::Protocol("a message that does not belong here")),
            }
        }
    }

    fn receive_all(&mut self, epoch: u32, sinks: &mut [Sink]) -> Result<Received, MigrationFault> {
        let stall = self.stall;
        let plan = Arc::clone(self.mirror.plan());
        let placement = self.mirror.placement();
        // Later epochs bring pages that are there.
        let ground = (epoch == 1).then(|| Ground::new(self.machine.ram(), &plan, !self.prepare.elide_zero));
        let parts = sinks.iter_mut().zip(self.mirror.lanes());
        let got = std::thread::scope(|scope| {
            let ahead = ground.as_ref().map(|ground| {
                let body = || {
                    threads::begin(Role::Pages);
                    ground.prepare_ahead()
                };
                std::thread::Builder::new().name("ahead".into()).spawn_scoped(scope, body)
            });
            let receive = |(sink, lane): (&mut Sink, _)| sink.receive(lane, ground.as_ref(), epoch, stall);
            let got = side_by_side("in", &placement, parts, receive);
            if let Some(ground) = &ground {
                ground.finish();
            }
            if let Some(Err(error)) = ahead {
                // Streams do without it.
                tracing::debug!(%error, "no thread works ahead");
            }
            got
        });
        let mut total = Received::default();
        for part in all(got)? {
            total.sealed += part.sealed;
            total.zero += part.zero;
        }
        Ok(total)
    }

    /// All pages are here: digest them if asked, then vCPUs and devices.
    fn take_state(&mut self, payload: &[u8]) -> Result<(), MigrationFault> {
        let (head, console, state) = StateHead::split(payload)?;
        let shared = head.shared_pages(self.machine.ram().layout().ram_end())?;
        self.control.update(|l| l.progress.shared_bytes = Some(shared.len() * PAGE_SIZE));
        self.shared.clone_from(&shared);
        self.machine.encryption().replace(shared);
        if self.prepare.verify {
            let begun = Instant::now();
            self.digests = self.machine.page_digests();
            self.verify_us = begun.elapsed().as_micros() as u64;
        }
        self.machine.load_state(state)?;
        self.machine.console().adopt(head.console_end, console);
        self.mirror.state_arrived(&sha256(state))?;
        // They may have changed on the way: what was acknowledged at the source is so here, too.
        self.host.labels(self.prepare.session, head.labels).map_err(MigrationFault::Journal)
    }

    /// The guest becomes this host's: minted, noted, told, running, in this order, as [`Destination`] says.
    /// Why: docs/migration.md.
    fn commit(mut self) {
        let session = self.prepare.session;
        let mut at = Destination::Receiving.step(DestinationEvent::Started);
        let (mut token, mut told, mut fault) = (None, false, None);
        // Why the machine does not run although it should.
        let mut unwell = None;
        loop {
            let event = match (at, &token) {
                (Destination::Complete, _) if self.control.pass_point_of_no_return() => {
                    DestinationEvent::Passed
                }
                (Destination::Receiving | Destination::Complete, _) => DestinationEvent::Failed,
                (Destination::Minting, _) => match self.mirror.commit() {
                    Ok(minted) => {
                        // COMMIT is minted, so ABORT never can be: nothing from here on gives the guest up,
                        // whatever the store says.
                        self.control.enter(MigrationState::Finishing);
                        if self.prepare.audit == Some(AuditWish::After) {
                            self.control.update(|l| l.audit = Some(Audit::new(AuditState::Pending)));
                        }
                        token = Some(minted);
                        DestinationEvent::Minted
                    }
                    Err(error) => {
                        fault = Some(error.into());
                        DestinationEvent::NotMinted
                    }
                },
                (Destination::Noting, Some(token)) => self.store_commit(token),
                (Destination::Telling, Some(token)) => {
                    told = self.tell_commit(token);
                    DestinationEvent::Told
                }
                (Destination::Running, Some(_)) => {
                    let resumed = if self.prepare.paused { Ok(()) } else { self.machine.resume() };
                    unwell = resumed.err().map(MigrationFault::from);
                    DestinationEvent::Ran
                }
                (Destination::Here, Some(_)) => return self.arrived(told, unwell),
                (Destination::Left, Some(_)) => {
                    // A crash, or this, before COMMIT is durable: the token never left and the guest never
                    // ran, and the journal says so.
                    tracing::error!(%session, "the daemon goes before COMMIT could be stored: the guest was never this host's");
                    return;
                }
                (Destination::GivingUp, _)
                | (
                    Destination::Noting
                    | Destination::Telling
                    | Destination::Running
                    | Destination::Here
                    | Destination::Left,
                    None,
                ) => return self.abort(fault.unwrap_or(MigrationFault::Canceled)),
            };
            at = at.step(event);
        }
    }

    fn tell_commit(&mut self, token: &SealedToken) -> bool {
        let settled = Settled { token: token.to_vec(), verify_us: self.verify_us, reason: None };
        self.link.set_deadline(Some(Instant::now() + LAST_WORD));
        let told = wire::send(&mut self.link, kind::COMMITTED, &settled);
        if let Err(fault) = &told {
            tracing::warn!(fault = %crate::chain::chain(&fault), "COMMIT may not have arrived; the source will ask");
        }
        told.is_ok()
    }

    fn arrived(self, told: bool, fault: Option<MigrationFault>) {
        let Self { mut link, prepare, host, machine, mirror, shared, stall, digests, .. } = self;
        let (session, guest, paused) = (prepare.session, prepare.guest, prepare.paused);
        let follows = prepare.audit == Some(AuditWish::After);
        let (mirror, held) = if follows {
            (None, Some(Arc::new(Held::new(Kept { machine: None, mirror }, 0))))
        } else {
            (Some(mirror), None)
        };
        host.arrived(session, Arrived { machine, mirror, paused, digests, fault, audit: held.clone() });
        if let Some(held) = held {
            let audit = if told {
                audit::judge(&mut link, &*held, &shared, audit_ends_by(), stall)
            } else {
                Audit::not_run(NotRun::PeerLost)
            };
            let whole = !matches!(audit.state, AuditState::NotRun { .. });
            host.audited(session, guest, audit, &held);
            if told && !whole {
                // Digests may still be on their way, and with them the end would get lost.
                return link.close_after_peer(Instant::now() + LAST_WORD);
            }
        }
        if told {
            let _ = link.close();
        }
    }

    /// Stores COMMIT, however long it takes, or until the host goes.
    fn store_commit(&mut self, token: &SealedToken) -> DestinationEvent {
        let session = self.prepare.session;
        let mut pause = RETRY.0;
        let longest = RETRY.1.min(self.stall / 4);
        let mut heard = true;
        loop {
            let error = match self.host.commit(session, token, self.prepare.paused) {
                Ok(()) => {
                    self.control.update(|l| l.committing = false);
                    return DestinationEvent::Noted;
                }
                Err(NotStored::Ever) => return DestinationEvent::Leaving,
                Err(NotStored::Yet(error)) => error,
            };
            if Destination::Noting.step(DestinationEvent::NotNoted) != Destination::Noting {
                return DestinationEvent::NotNoted;
            }
            if !self.control.live().committing {
                tracing::error!(%session, %error, "COMMIT cannot be stored yet; the guest is held at both hosts");
                self.control.update(|l| l.committing = true);
            }
            if heard {
                let detail =
                    "the destination's store does not take the hand-over yet; it tries on".to_owned();
                let word = Refused { code: PeerRefusal::Committing.into(), detail };
                self.arm();
                heard = wire::send(&mut self.link, kind::COMMITTING, &word).is_ok();
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
    }

    fn abort(mut self, fault: MigrationFault) {
        let session = self.prepare.session;
        let fault = self.why(fault);
        tracing::info!(fault = %crate::chain::chain(&fault), "an import is given up");
        let token =
            self.mirror.abort().map_err(|error| tracing::debug!(%error, "no ABORT can be minted")).ok();
        drop(self.mirror);
        drop(self.machine);
        self.host.aborted(session, token.as_ref(), &fault);
        let reason = Refused { code: fault.code(), detail: fault.told() };
        let by = Instant::now() + LAST_WORD;
        self.link.set_deadline(Some(by));
        let told = match token {
            Some(t) => {
                let settled = Settled { token: t.to_vec(), verify_us: 0, reason: Some(reason) };
                wire::send(&mut self.link, kind::ABORTED, &settled)
            }
            None => wire::send(&mut self.link, kind::REFUSED, &reason),
        };
        if told.is_ok() {
            // The source may be in the midst of an epoch.
            self.link.close_after_peer(by);
        }
    }

    /// The reason of an end that shows as another one, if there is one behind it.
    fn why(&self, fault: MigrationFault) -> MigrationFault {
        self.over().unwrap_or(fault)
    }

    /// Whether the import is still wanted here, and its machine still there.
    fn check(&self) -> Result<(), MigrationFault> {
        self.over().map_or(Ok(()), Err)
    }

    fn over(&self) -> Option<MigrationFault> {
        let ended = || self.machine.ended().map(MigrationFault::PlaceLost);
        match self.control.called_off() {
            Some(MigrationFault::Machine(MachineError::Ended(end))) => Some(MigrationFault::PlaceLost(end)),
            called_off => called_off.or_else(ended),
        }
    }

    fn arm(&mut self) {
        self.link.set_deadline(Some(Instant::now() + self.stall));
    }

    /// Waits until the source says something on the control link, ends it, or was silent for too long.
    /// Notices meanwhile when the import is called off here.
    fn await_frame(&mut self) -> Result<(), MigrationFault> {
        self.link.set_deadline(None);
        self.link.set_patience(self.stall);
        let by = Instant::now() + self.stall;
        while !self.link.await_input(Instant::now() + LOOK)? {
            self.check()?;
            if Instant::now() >= by {
                return Err(LinkError::Deadline(Waiting::FrameStart).into());
            }
        }
        self.check()
    }
}

/// The source knows the limit, which may change; this is beyond any.
fn audit_ends_by() -> Instant {
    Instant::now() + Duration::from_millis(*AUDIT_TIMEOUT_MS.end())
}

fn token(payload: &[u8]) -> Result<[u8; TOKEN_BYTES], MigrationFault> {
    payload.try_into().map_err(|_| MigrationFault::Protocol("a token of another length"))
}
