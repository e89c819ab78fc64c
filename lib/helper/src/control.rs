//! Control operations: sessions, epochs, tokens. They need every worker between batches.

use mirrorvm_abi::{
    config::PROTECTION_NONE,
    evidence::{EVIDENCE_BYTES, Release},
    layout::WORKERS_MAX,
    mailbox::{PAYLOAD_AT, Submission, slot_at},
    op::{BEGIN_BYTES, Begin, GREETING_BYTES, Greeting, Op, START_BYTES, Start, Status},
    record::{
        AUDIT_STREAM, CONTROL_STREAM, Direction, HEADER_BYTES, Header, Kind, LISTED_BYTES, RANDOM_BYTES,
        TAG_BYTES, TOKEN_BODY_BYTES, TOKEN_BYTES, Token,
    },
};
use ring::digest;
use spin::MutexGuard;
use zeroize::{Zeroizing, zeroize_stack};

use crate::agreement::Ephemeral;
use crate::audit::Audit;
use crate::digest::PageDigester;
use crate::evidence;
use crate::keys::KeySchedule;
use crate::op_state::{DestinationEvent, DestinationOp, SourceEvent, SourceOp};
use crate::seal::Sealer;
use crate::shared::{Control, OpenStream, PAGES, Role, Session, Stream, exported_digest};
use crate::worker::Outcome;
use crate::{Env, PageMaps, Region, Worker};

/// A destination that has taken its guest over.
const COMMITTED: Role = Role::Destination(DestinationOp::LiveImport);

/// Stack that is wiped behind the making of keys: several times what it takes.
const WORKED_BYTES: usize = 32 << 10;

/// Bytes of parameters with evidence behind them.
const WITH_EVIDENCE: usize = BEGIN_BYTES + EVIDENCE_BYTES;

type Guards<'a> = [Option<MutexGuard<'a, Stream>>; WORKERS_MAX as usize];

impl<E: Env> Worker<'_, E> {
    pub(crate) fn control(&mut self, op: Op, request: &Submission) -> Outcome {
        let shared = self.shared;
        let mut guards: Guards<'_> = [const { None }; WORKERS_MAX as usize];
        for (guard, stream) in guards.iter_mut().zip(&shared.streams) {
            match stream.try_lock() {
                Some(g) => *guard = Some(g),
                None => return Outcome::refused(Status::Busy),
            }
        }
        let mut session = shared.session.lock();
        let at = slot_at(request.slot) + PAYLOAD_AT;
        let result = match op {
            Op::Hello => self.hello(&mut session, at),
            Op::Begin => {
                let begun = self.begin(&mut session, &mut guards, request, at);
                // Spent however it ended, and wiped where it lies: whoever begins again needs a new Hello,
                // and so gets other keys.
                session.ephemeral = None;
                begun
            }
            Op::Pause => source_step(&mut session, SourceEvent::Pause).map(|()| 0),
            Op::Cancel => source_step(&mut session, SourceEvent::Cancel).map(|()| {
                close(&mut session, &mut guards);
                0
            }),
            Op::EndEpoch => self.end_epoch(&mut session, &guards, at),
            Op::Start => self.start(&mut session, &guards, request, at),
            Op::State => self.state(&mut session, request, at),
            Op::Commit => self.commit(&mut session, &mut guards, at),
            Op::Abort => self.abort(&mut session, at),
            Op::EpochToken | Op::StartToken | Op::AbortToken | Op::CommitToken => {
                self.token(op, &mut session, &mut guards, request, at)
            }
            Op::Export | Op::Import | Op::Scan | Op::Digests | Op::Compare | Op::Verdict => {
                Err(Status::UnknownOp)
            }
        };
        // What keys were made from is wiped where it lay; the stack has what was worked on.
        if matches!(op, Op::Hello | Op::Begin) {
            zeroize_stack::<WORKED_BYTES>();
        }
        match result {
            Ok(len) => Outcome::ok(0, len),
            Err(status) => Outcome::refused(status),
        }
    }

    #[inline(never)]
    fn hello(&mut self, session: &mut Session, at: usize) -> Result<u32, Status> {
        let idle =
            matches!(session.role, Role::Source(SourceOp::Running) | Role::Destination(DestinationOp::Idle));
        if !(idle && session.control.is_none() || session.role == COMMITTED) {
            return Err(Status::WrongState);
        }
        // The secret first: what was drawn last is kept, to be compared with what is drawn next.
        let secret: Zeroizing<[u8; 32]> = Zeroizing::new(self.scratch.drawn.draw(&mut self.env)?);
        let nonce = self.scratch.drawn.draw(&mut self.env)?;
        let greeting = session.ephemeral.insert(Ephemeral::new(nonce, *secret)).greeting();
        self.env.write_mailbox(Region(at), &greeting.encode());
        Ok(GREETING_BYTES as u32)
    }

    #[inline(never)]
    fn begin(
        &mut self,
        session: &mut Session,
        guards: &mut Guards<'_>,
        request: &Submission,
        at: usize,
    ) -> Result<u32, Status> {
        let begin = self.begin_parameters(request, at)?;
        if !self.config.may_leave() {
            return Err(Status::PolicyForbids);
        }
        // Encrypted RAM is not zero before it is written, and which pages are zero is nobody's business.
        if self.config.protection != PROTECTION_NONE && (begin.fresh || begin.elide_zero) {
            return Err(Status::PolicyForbids);
        }
        if begin.audit && !begin.source && self.digests.is_empty() {
            return Err(Status::BadRequest);
        }
        let role = match (session.role, begin.source) {
            (Role::Source(op), true) => {
                Role::Source(op.step(SourceEvent::Begin).map_err(|_| Status::WrongState)?)
            }
            (Role::Source(SourceOp::Running), false) => Role::Destination(DestinationOp::MemoryImport),
            // The guest came here and was committed: it runs here, and may leave again through this helper,
            // which an SEV-ES guest has no other of.
            (COMMITTED, true) => {
                Role::Source(SourceOp::Running.step(SourceEvent::Begin).map_err(|_| Status::WrongState)?)
            }
            (Role::Source(_), false) | (Role::Destination(_), _) => return Err(Status::WrongState),
        };
        let secret = Zeroizing::new(self.env.secret().ok_or(Status::NoSecret)?);
        let ephemeral = session.ephemeral.as_ref().ok_or(Status::WrongState)?;
        let own = ephemeral.greeting();
        if begin.source {
            self.release(&own, &begin, request, at)?;
        }
        let shared = ephemeral.agree(&begin.peer).ok_or(Status::KeyRefused)?;
        let (source, destination) = if begin.source { (own, begin.peer) } else { (begin.peer, own) };
        let schedule = KeySchedule::new(
            (&*secret, &shared),
            (&source, &destination),
            begin.session,
            begin.transcript,
            begin.suite,
        );
        let sealer = |d, s| schedule.sealer(d, s).ok_or(Status::Exhausted);
        let control = Control {
            forward: sealer(Direction::Forward, CONTROL_STREAM)?,
            backward: sealer(Direction::Backward, CONTROL_STREAM)?,
            streams: begin.streams,
            elide_zero: begin.elide_zero,
            fresh: begin.fresh,
        };
        let audit_key = if begin.audit { Some(schedule.audit().ok_or(Status::Exhausted)?) } else { None };
        // A source's digests tell it what changed and are nobody else's; a destination's are the audit's.
        let key = match (begin.source, &audit_key) {
            (true, _) => self.digest_key(begin.digests)?,
            (false, Some(key)) => Some(Zeroizing::new(**key)),
            (false, None) => None,
        };
        // None first, and not as a value that may be one: the room of one that is none would take along what
        // lay where it was made, which is the secret of the stream before.
        close_streams(guards);
        for (i, stream) in (0..begin.streams).zip(guards.iter_mut().flatten()) {
            let tags = digest::Context::new(&digest::SHA256);
            let digester = key.as_ref().map(|key| PageDigester::new(key));
            stream.open = Some(OpenStream { sealer: sealer(PAGES, i)?, records: 0, tags, digester });
        }
        session.audit = None;
        if let Some(key) = audit_key {
            session.audit = Some(Audit::new(key, sealer(PAGES, AUDIT_STREAM)?));
        }
        self.maps.clear();
        // Member by member, for the same reason.
        session.role = role;
        session.control = Some(control);
        session.epoch = 1;
        session.pages = 0;
        session.state_digest = [0; 32];
        Ok(0)
    }

    /// A fresh key for page digests when they are wanted, `None` where they have no place. Not derived from
    /// the guest's secret: at some levels of protection that is known to others.
    fn digest_key(&mut self, wanted: bool) -> Result<Option<Zeroizing<[u8; 32]>>, Status> {
        if !wanted || self.digests.is_empty() {
            return Ok(None);
        }
        self.scratch.drawn.draw(&mut self.env).map(|key| Some(Zeroizing::new(key)))
    }

    fn begin_parameters(&mut self, request: &Submission, at: usize) -> Result<Begin, Status> {
        let len = request.len as usize;
        if len != BEGIN_BYTES && len != WITH_EVIDENCE {
            return Err(Status::BadRequest);
        }
        let mut raw = [0; BEGIN_BYTES];
        self.env.read_mailbox(Region(at), &mut raw);
        Begin::decode(&raw)
            .filter(|b| b.streams >= 1 && u32::from(b.streams) <= self.config.workers)
            .filter(|b| b.source || len == BEGIN_BYTES)
            .ok_or(Status::BadRequest)
    }

    /// Source: whether the guest's owner lets pages go where these parameters lead. Before any key is made.
    #[inline(never)]
    fn release(
        &mut self,
        own: &Greeting,
        begin: &Begin,
        request: &Submission,
        at: usize,
    ) -> Result<(), Status> {
        // A demand that cannot be read is one that nothing meets.
        let release = Release::decode(&self.env.release()).ok_or(Status::EvidenceRefused)?;
        if !release.is_demanded() {
            return Ok(());
        }
        if request.len as usize != WITH_EVIDENCE {
            return Err(Status::EvidenceRefused);
        }
        let mut evidence = [0; EVIDENCE_BYTES];
        self.env.read_mailbox(Region(at + BEGIN_BYTES), &mut evidence);
        let nonce = evidence::mnonce(&begin.peer, own, &begin.session);
        evidence::check(&release, &evidence, &nonce, self.config.policy).map_err(|_| Status::EvidenceRefused)
    }

    /// Source: a token with the totals so far; the next epoch begins.
    fn end_epoch(&mut self, session: &mut Session, guards: &Guards<'_>, at: usize) -> Result<u32, Status> {
        if !matches!(session.role, Role::Source(op) if op.may_export()) {
            return Err(Status::WrongState);
        }
        let next = session.epoch.checked_add(1).ok_or(Status::Exhausted)?;
        let token = totals(session, guards);
        let random = self.random()?;
        let len = self.seal_token(session, Kind::Epoch, &token, at, random)?;
        session.epoch = next;
        self.maps.clear_epoch();
        Ok(len)
    }

    /// Source: START. Every page on the allow-list must have left at least once; for those that only ever
    /// went unsealed the host answers.
    fn start(
        &mut self,
        session: &mut Session,
        guards: &Guards<'_>,
        request: &Submission,
        at: usize,
    ) -> Result<u32, Status> {
        let Role::Source(op) = session.role else { return Err(Status::WrongState) };
        let next = op.step(SourceEvent::Start).map_err(|_| Status::WrongState)?;
        if request.len as usize != START_BYTES {
            return Err(Status::BadRequest);
        }
        let mut raw = [0; START_BYTES];
        self.env.read_mailbox(Region(at), &mut raw);
        let start = Start::decode(&raw);
        let token = Token { state: start.state, ..totals(session, guards) };
        if token.pages.checked_add(start.shared_pages) != Some(self.maps.allowed_pages()) {
            return Err(Status::Incomplete);
        }
        // Nothing that can fail comes behind the step.
        let random = self.random()?;
        // The state changes first: whatever happens to the token, it is minted at most once.
        session.role = Role::Source(next);
        self.seal_token(session, Kind::Start, &token, at, random)
    }

    fn state(&mut self, session: &mut Session, request: &Submission, at: usize) -> Result<u32, Status> {
        let digest = self.read_digest(request, at)?;
        destination_step(session, DestinationEvent::State)?;
        session.state_digest = digest;
        Ok(0)
    }

    fn commit(&mut self, session: &mut Session, guards: &mut Guards<'_>, at: usize) -> Result<u32, Status> {
        let random = self.random()?;
        destination_step(session, DestinationEvent::Commit)?;
        let token = Token { state: session.state_digest, ..Token::default() };
        let len = self.seal_token(session, Kind::Commit, &token, at, random)?;
        // This helper may stay for as long as the guest does: what opens its pages goes now.
        close_streams(guards);
        Ok(len)
    }

    fn abort(&mut self, session: &mut Session, at: usize) -> Result<u32, Status> {
        let random = self.random()?;
        destination_step(session, DestinationEvent::Fail)?;
        session.audit = None;
        self.seal_token(session, Kind::Abort, &Token::default(), at, random)
    }

    fn token(
        &mut self,
        op: Op,
        session: &mut Session,
        guards: &mut Guards<'_>,
        request: &Submission,
        at: usize,
    ) -> Result<u32, Status> {
        let legal = match (op, session.role) {
            (Op::EpochToken, Role::Destination(d)) => d == DestinationOp::MemoryImport,
            (Op::StartToken, Role::Destination(d)) => d == DestinationOp::StateImport,
            // Before START only where memory was put back: then, too, the token decides.
            (Op::AbortToken | Op::CommitToken, Role::Source(s)) => {
                s.may_export() || s == SourceOp::PostExport
            }
            _ => false,
        };
        if !legal {
            return Err(Status::WrongState);
        }
        let kind = match op {
            Op::EpochToken => Kind::Epoch,
            Op::StartToken => Kind::Start,
            Op::AbortToken => Kind::Abort,
            _ => Kind::Commit,
        };
        let opened = self.open_token(session, kind, request, at);
        // A bad forward token ends the import. A bad answer to START changes nothing: the host may have made
        // it up, and the real one is still to come.
        let Some(token) = opened else {
            let _ = destination_step(session, DestinationEvent::Fail);
            return Err(Status::Unsealed);
        };
        match op {
            Op::EpochToken => epoch_token(session, guards, &token, &self.maps),
            Op::StartToken => start_token(session, guards, &token),
            Op::AbortToken => source_step(session, SourceEvent::AbortToken).map(|()| close(session, guards)),
            _ => source_step(session, SourceEvent::CommitToken),
        }
        .map(|()| 0)
    }

    fn read_digest(&mut self, request: &Submission, at: usize) -> Result<[u8; 32], Status> {
        if request.len != 32 {
            return Err(Status::BadRequest);
        }
        let mut digest = [0; 32];
        self.env.read_mailbox(Region(at), &mut digest);
        Ok(digest)
    }

    fn seal_token(
        &mut self,
        session: &mut Session,
        kind: Kind,
        token: &Token,
        at: usize,
        random: [u8; RANDOM_BYTES],
    ) -> Result<u32, Status> {
        let epoch = session.epoch;
        let control = session.control.as_mut().ok_or(Status::WrongState)?;
        let group = sealer_of(control, kind).next(kind, epoch, 1, random).map_err(|_| Status::Exhausted)?;
        let mut body = token.encode();
        let tag = group.seal(0, NOT_LISTED, &mut body).map_err(|_| Status::Exhausted)?;
        self.env.write_mailbox(Region(at), group.header());
        self.env.write_mailbox(Region(at + HEADER_BYTES), &body);
        self.env.write_mailbox(Region(at + HEADER_BYTES + TOKEN_BODY_BYTES), &tag);
        Ok(TOKEN_BYTES as u32)
    }

    fn open_token(
        &mut self,
        session: &mut Session,
        kind: Kind,
        request: &Submission,
        at: usize,
    ) -> Option<Token> {
        if request.len as usize != TOKEN_BYTES {
            return None;
        }
        let epoch = session.epoch;
        let control = session.control.as_mut()?;
        let sealer = sealer_of(control, kind);
        let mut raw = [0; HEADER_BYTES];
        let mut sealed = [0; TOKEN_BODY_BYTES + TAG_BYTES];
        self.env.read_mailbox(Region(at), &mut raw);
        self.env.read_mailbox(Region(at + HEADER_BYTES), &mut sealed);
        let right_epoch = |h: &Header| h.epoch == epoch || matches!(kind, Kind::Commit | Kind::Abort);
        let header = Header::decode(&raw).filter(|h| h.kind == kind && right_epoch(h))?;
        // Of answers there is at most one kind in a session, and a host may have asked for it twice: any
        // sequence will do.
        let answer = matches!(kind, Kind::Commit | Kind::Abort);
        let expected = if answer { sealer.is_of(&header) } else { sealer.expects(&header) };
        if !expected || !sealer.group(&header)?.open(0, NOT_LISTED, &mut sealed) {
            return None;
        }
        if !answer {
            sealer.opened();
        }
        sealed.first_chunk().map(Token::decode)
    }
}

/// The word of the list that a token does not have.
const NOT_LISTED: [u8; LISTED_BYTES] = [0; LISTED_BYTES];

/// By what tokens of this kind are sealed and opened.
const fn sealer_of(control: &mut Control, kind: Kind) -> &mut Sealer {
    match kind {
        Kind::Commit | Kind::Abort => &mut control.backward,
        Kind::Epoch | Kind::Start | Kind::Pages | Kind::Digests => &mut control.forward,
    }
}

fn source_step(session: &mut Session, event: SourceEvent) -> Result<(), Status> {
    let Role::Source(op) = session.role else { return Err(Status::WrongState) };
    session.role = Role::Source(op.step(event).map_err(|_| Status::WrongState)?);
    Ok(())
}

fn destination_step(session: &mut Session, event: DestinationEvent) -> Result<(), Status> {
    let Role::Destination(op) = session.role else { return Err(Status::WrongState) };
    session.role = Role::Destination(op.step(event).map_err(|_| Status::WrongState)?);
    Ok(())
}

/// Totals of the session so far, the same at both ends when every record has arrived.
fn totals(session: &Session, guards: &Guards<'_>) -> Token {
    let streams = session.control.as_ref().map_or(0, |c| usize::from(c.streams));
    let open = guards.iter().take(streams).flatten().filter_map(|g| g.open.as_ref());
    let (records, exported) = exported_digest(open);
    Token { records, pages: session.pages, exported, state: [0; 32] }
}

fn epoch_token(
    session: &mut Session,
    guards: &Guards<'_>,
    token: &Token,
    maps: &PageMaps<'_>,
) -> Result<(), Status> {
    let next = session.epoch.checked_add(1);
    let (true, Some(next)) = (*token == totals(session, guards), next) else {
        let _ = destination_step(session, DestinationEvent::Fail);
        return Err(Status::Incomplete);
    };
    session.epoch = next;
    maps.clear_epoch();
    Ok(())
}

fn start_token(session: &mut Session, guards: &Guards<'_>, token: &Token) -> Result<(), Status> {
    let expected = Token { state: session.state_digest, ..totals(session, guards) };
    if *token == expected {
        return destination_step(session, DestinationEvent::StartToken);
    }
    let _ = destination_step(session, DestinationEvent::Fail);
    Err(Status::Incomplete)
}

/// Drops a session with its keys; the role stays what the step made it.
fn close(session: &mut Session, guards: &mut Guards<'_>) {
    session.control = None;
    session.ephemeral = None;
    session.audit = None;
    close_streams(guards);
}

/// Drops what seals and opens pages.
fn close_streams(guards: &mut Guards<'_>) {
    guards.iter_mut().flatten().for_each(|g| g.open = None);
}
