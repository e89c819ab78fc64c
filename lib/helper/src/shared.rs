//! What the workers of one mirror share: the session and the streams.
//!
//! Lock order: streams by index, then the session. A batch holds its own stream's lock; a control operation
//! takes all of them without waiting, so it is refused while a batch runs.

use mirrorvm_abi::{layout::WORKERS_MAX, record::Direction};
use ring::digest;
use spin::Mutex;

use crate::agreement::Ephemeral;
use crate::audit::Audit;
use crate::digest::PageDigester;
use crate::op_state::{DestinationOp, SourceOp};
use crate::seal::Sealer;

/// State that outlives a request. One per mirror; zeroed memory until [`Shared::new`] is in place.
pub struct Shared {
    pub(crate) session: Mutex<Session>,
    pub(crate) streams: [Mutex<Stream>; WORKERS_MAX as usize],
}

impl Shared {
    /// No session, no keys.
    pub const fn new() -> Self {
        Self {
            session: Mutex::new(Session::new()),
            streams: [const { Mutex::new(Stream { open: None }) }; WORKERS_MAX as usize],
        }
    }
}

/// What somebody has who copied the memory of a helper between two requests. A host can do that and put it
/// back, whatever the protection; this is how a machine or a test plays such a host. No helper uses it.
pub struct MemoryCopy {
    session: Session,
    streams: [Stream; WORKERS_MAX as usize],
}

impl Shared {
    /// Copies it. Waits for requests that are under way.
    pub fn copy(&self) -> MemoryCopy {
        let streams = self.streams.each_ref().map(|stream| stream.lock().clone());
        MemoryCopy { session: self.session.lock().clone(), streams }
    }

    /// Puts what was copied into its place, as if nothing had happened since.
    pub fn put_back(&self, copy: &MemoryCopy) {
        for (stream, then) in self.streams.iter().zip(&copy.streams) {
            *stream.lock() = then.clone();
        }
        *self.session.lock() = copy.session.clone();
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self::new()
    }
}

/// Which end of a session this helper is, and where that end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source(SourceOp),
    Destination(DestinationOp),
}

#[derive(Clone)]
pub(crate) struct Session {
    pub role: Role,
    /// Drawn by `Hello`, spent by `Begin`.
    pub ephemeral: Option<Ephemeral>,
    /// Tokens, forward and backward.
    pub control: Option<Control>,
    pub epoch: u32,
    /// Different pages so far.
    pub pages: u64,
    /// What arrived at the destination as vCPU and device state.
    pub state_digest: [u8; 32],
    /// What compares RAM after START, where that was agreed on.
    pub audit: Option<Audit>,
}

#[derive(Clone)]
pub(crate) struct Control {
    pub forward: Sealer,
    pub backward: Sealer,
    pub streams: u16,
    /// Zero pages may travel as such.
    pub elide_zero: bool,
    /// RAM was all zero when the session began.
    pub fresh: bool,
}

impl Session {
    const fn new() -> Self {
        Self {
            role: Role::Source(SourceOp::Running),
            ephemeral: None,
            control: None,
            epoch: 0,
            pages: 0,
            state_digest: [0; 32],
            audit: None,
        }
    }
}

#[derive(Clone)]
pub(crate) struct Stream {
    pub open: Option<OpenStream>,
}

/// A stream of an open session.
#[derive(Clone)]
pub(crate) struct OpenStream {
    pub sealer: Sealer,
    /// Pages sealed or opened.
    pub records: u64,
    /// Over the tags of the stream's pages, in order.
    pub tags: digest::Context,
    /// Digests pages as they are sealed, when there is room to keep that.
    pub digester: Option<PageDigester>,
}

/// Both ends compute this over all streams: pages and the digests of their tags.
pub(crate) fn exported_digest<'a>(streams: impl Iterator<Item = &'a OpenStream>) -> (u64, [u8; 32]) {
    let mut all = digest::Context::new(&digest::SHA256);
    let mut records = 0u64;
    for s in streams {
        records = records.wrapping_add(s.records);
        all.update(&s.records.to_le_bytes());
        all.update(s.tags.clone().finish().as_ref());
    }
    let mut out = [0; 32];
    out.copy_from_slice(all.finish().as_ref());
    (records, out)
}

/// The direction that a role's pages travel is forward for both; kept here so that nobody spells it twice.
pub(crate) const PAGES: Direction = Direction::Forward;
