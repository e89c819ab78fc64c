//! What happened, in order and on disk: every change of every resource, for readers that come back.
//!
//! Owns: the form of an event, cursors, reading and filtering. Must not know: who reads, over what.
//!
//! An event is numbered when it is appended and shown when it is on disk, and no sooner than its change:
//! whoever takes [`Events::latest`], then reads the resources, then follows from there, misses nothing. The
//! event of a change that is stored is stored with it, in one transaction: who has the answer to a change
//! finds its event, whatever happens. What is not stored (mirrors, a migration's rounds) is told without
//! waiting for the disk, so a crash can lose such events of its last moments; `host.started` is then the sign
//! to look at the resources again. Nothing is lost in an orderly end.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tokio::sync::watch;
use uuid::Uuid;

use super::mentions::Mentions;
use super::{GuestRecord, HostError, Labels, MigrationRecord, MigrationState, MirrorRecord, PeerRecord};
use crate::named::named;
use crate::store::form;
use crate::store::ledger::{Bounds, Entry, Log, Look, LookError, SCAN_MAX};
use crate::store::{Batch, Ledger};
use crate::sync::Locked;

/// Kinds of resources that events tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResourceKind {
    /// This host.
    Host,
    /// A known peer.
    PeerHost,
    /// A guest.
    Guest,
    /// A mirror.
    Mirror,
    /// A migration.
    Migration,
    /// A helper image.
    HelperImage,
}

impl ResourceKind {
    /// The API's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::PeerHost => "peer_host",
            Self::Guest => "guest",
            Self::Mirror => "mirror",
            Self::Migration => "migration",
            Self::HelperImage => "helper_image",
        }
    }
}

named! {
    /// What happened to a resource.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Change {
        /// It is there.
        Created = "created",
        /// Something of it changed, its state did not.
        Updated = "updated",
        /// Its state changed.
        StateChanged = "state_changed",
        /// It is gone.
        Deleted = "deleted",
        /// A round of a migration is over.
        RoundFinished = "round_finished",
        /// Pages of a guest that came or went are not what its source had.
        AuditMismatch = "audit_mismatch",
        /// The host was opened.
        Started = "started",
        /// The host is about to end.
        Stopping = "stopping",
    }
}

/// What an event tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventBody {
    /// Kind of the resource.
    pub resource: ResourceKind,
    /// What happened to it.
    pub change: Change,
    /// Its id.
    pub id: Uuid,
    /// Its name, where it has one.
    pub name: Option<String>,
    /// Its generation after the change.
    pub generation: u64,
    /// Its labels; of a mirror or migration, its guest's.
    pub labels: Labels,
    /// More, by kind: `state`, `previous_state`, `guest`, ...
    pub data: Map<String, Value>,
}

impl EventBody {
    /// A change of a resource without more to say.
    pub fn new(resource: ResourceKind, change: Change, id: Uuid, generation: u64) -> Self {
        Self { resource, change, id, name: None, generation, labels: Labels::new(), data: Map::new() }
    }

    /// The type, `<resource>.<change>`.
    pub fn kind(&self) -> String {
        format!("{}.{}", self.resource.name(), self.change.name())
    }

    /// Whom it tells of: the resource by id and by name, and the guest that it belongs to, by both.
    pub fn tells_of(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let guest = |key: &str| self.data.get(key).and_then(Value::as_str);
        let texts = [self.name.as_deref(), guest("guest"), guest("guest_name")];
        texts.into_iter().flatten().map(Cow::Borrowed).chain([Cow::Owned(self.id.to_string())])
    }

    /// Whether it tells of one of these.
    pub fn is_of(&self, whom: &[String]) -> bool {
        self.tells_of().any(|of| whom.iter().any(|who| *who == of))
    }

    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.data.insert(name.to_owned(), value.into());
        self
    }
}

/// An event's place in this host's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventCursor {
    /// Made with the database.
    pub epoch: String,
    /// Counts from 1; 0 is before the first.
    pub seq: u64,
}

impl fmt::Display for EventCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

/// The text is no cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoCursor;

impl FromStr for EventCursor {
    type Err = NoCursor;

    fn from_str(text: &str) -> Result<Self, NoCursor> {
        let (epoch, seq) = text.split_once('-').ok_or(NoCursor)?;
        let hex = epoch.len() == 16 && epoch.bytes().all(|b| b.is_ascii_hexdigit());
        let digits = (1..=16).contains(&seq.len()) && seq.bytes().all(|b| b.is_ascii_digit());
        let seq = seq.parse().ok().filter(|s| *s < 1 << 53);
        match seq {
            Some(seq) if hex && digits => Ok(Self { epoch: epoch.to_ascii_lowercase(), seq }),
            _ => Err(NoCursor),
        }
    }
}

/// An event on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place.
    pub cursor: EventCursor,
    /// When it happened.
    pub at: Timestamp,
    /// What it tells.
    pub body: EventBody,
}

/// Some events, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventPage {
    /// Those that were wanted.
    pub events: Vec<Event>,
    /// Where to go on: beyond events that were not wanted, too.
    pub next: EventCursor,
    /// Whether more follow already.
    pub more: bool,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// What follows the cursor is not kept any more, or the cursor is of another history.
    #[error("events {oldest} to {latest} are kept")]
    Expired {
        /// The oldest place that can be continued from.
        oldest: EventCursor,
        /// The newest event.
        latest: EventCursor,
    },
    /// Storage.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Events behind a reader so few that it is no dearer to look through them than to know which tell of whom.
const NEAR: u64 = 1000;

/// The host's events.
#[derive(Clone, Debug)]
pub struct Events {
    ledger: Arc<Ledger>,
    mentions: Arc<Mutex<Mentions>>,
}

impl Events {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        Self { ledger, mentions: Arc::default() }
    }

    /// Tells of something that has no record on disk. Does not wait for the disk: events are written in the
    /// order of this, by the ledger's one thread. Who must know that they are written waits for an entry of
    /// his own, or for [`Ledger::flush`].
    pub fn emit(&self, body: &EventBody) {
        match form::write(body) {
            Ok(text) => self.ledger.append(Log::Event, text),
            Err(error) => tracing::error!(%error, "an event cannot be written"),
        }
    }

    /// The newest event on disk. What it and those before it tell can be read in the resources.
    pub fn latest(&self) -> EventCursor {
        self.cursor(*self.ledger.watch(Log::Event).borrow())
    }

    /// Changes when events come.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.ledger.watch(Log::Event)
    }

    /// Up to `limit` wanted events of the resources `of` (by id or name, or of those of a guest; empty: of
    /// any) that follow `after` (`None`: from the oldest that is kept).
    ///
    /// # Errors
    /// [`EventsError::Expired`], storage.
    pub fn page(
        &self,
        after: Option<&EventCursor>,
        limit: usize,
        of: &[String],
        mut wanted: impl FnMut(&EventBody) -> bool,
    ) -> Result<EventPage, EventsError> {
        let broken = |e| EventsError::Host(HostError::storage("reading events", e));
        let bounds = self.ledger.bounds(Log::Event).map_err(broken)?;
        let start = bounds.oldest.saturating_sub(1);
        let expired = |oldest: u64, latest: u64| EventsError::Expired {
            oldest: self.cursor(oldest),
            latest: self.cursor(latest),
        };
        let seq = match after {
            Some(after) if after.epoch != self.ledger.epoch() => return Err(expired(start, bounds.latest)),
            Some(after) => after.seq,
            None => start,
        };
        let mut bodies = Vec::new();
        let fits = |entry: &Entry| {
            // One that cannot be read is of a later version: nothing this one could tell.
            let body = entry.read::<EventBody>(Log::Event).ok();
            let body = body.filter(|b| (of.is_empty() || b.is_of(of)) && wanted(b));
            let fits = body.is_some();
            bodies.extend(body);
            fits
        };
        let look = if of.is_empty() || seq + NEAR >= bounds.latest {
            self.ledger.look(Log::Event, seq, limit, fits)
        } else {
            self.look_by_mentions(seq, limit, of, fits)
        };
        match look {
            Ok(look) => {
                let both = look.entries.into_iter().zip(bodies);
                let events =
                    both.map(|(e, body)| Event { cursor: self.cursor(e.seq), at: e.at, body }).collect();
                Ok(EventPage { events, next: self.cursor(look.seen), more: look.more })
            }
            Err(LookError::Expired(b)) => Err(expired(b.oldest.saturating_sub(1), b.latest)),
            Err(LookError::Store(e)) => Err(broken(e)),
        }
    }

    /// As [`Ledger::look`], of events that tell of one of `of`.
    fn look_by_mentions(
        &self,
        after: u64,
        limit: usize,
        of: &[String],
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Look, LookError> {
        let bounds = self.ledger.bounds_after(Log::Event, after)?;
        let (found, seen) = {
            let mut mentions = self.mentions.locked();
            self.learn(&mut mentions, bounds)?;
            (mentions.of(of, after, SCAN_MAX), mentions.seen())
        };
        // Where there may be more of them than are looked at, it goes on after the last of these.
        let seen = if found.len() < SCAN_MAX { seen } else { found[SCAN_MAX - 1] };
        let mut look = Look { entries: Vec::new(), seen, more: false };
        for seq in found {
            let Some(entry) = self.ledger.event(seq)? else { continue };
            if wanted(&entry) {
                look.entries.push(entry);
            }
            if look.entries.len() >= limit {
                look.seen = seq;
                break;
            }
        }
        // What went meanwhile may have been one of them.
        let bounds = self.ledger.bounds_after(Log::Event, after)?;
        look.more = look.seen < bounds.latest;
        Ok(look)
    }

    /// Learns what the events up to the latest tell of whom.
    fn learn(&self, mentions: &mut Mentions, bounds: Bounds) -> Result<(), LookError> {
        mentions.forget_before(bounds.oldest);
        while mentions.seen() < bounds.latest {
            let from = mentions.seen().max(bounds.oldest - 1);
            let look = self.ledger.look(Log::Event, from, 1, |entry: &Entry| {
                if let Ok(body) = entry.read::<EventBody>(Log::Event) {
                    mentions.note(entry.seq, body.tells_of());
                }
                false
            })?;
            // Where there is nothing, nobody is told of.
            mentions.saw(if look.more { look.seen } else { bounds.latest });
        }
        Ok(())
    }

    fn cursor(&self, seq: u64) -> EventCursor {
        EventCursor { epoch: self.ledger.epoch().to_owned(), seq }
    }

    pub(super) fn host(&self, id: Uuid, name: &str, change: Change) {
        self.emit(&EventBody {
            name: Some(name.into()),
            ..EventBody::new(ResourceKind::Host, change, id, 1)
        });
    }

    /// As [`EventBody::guest`].
    pub(super) fn guest(&self, record: &GuestRecord, before: Option<&GuestRecord>, change: Change) {
        self.emit(&EventBody::guest(record, before, change));
    }

    pub(super) fn mirror(&self, record: &MirrorRecord, labels: Labels, change: Change) {
        let body = EventBody::new(ResourceKind::Mirror, change, record.id, record.generation)
            .with("state", record.state.name())
            .with("guest", record.guest.to_string());
        self.emit(&EventBody { labels, ..body });
    }

    pub(super) fn migration(&self, record: &MigrationRecord, labels: Labels, change: Change) {
        self.emit(&EventBody::migration(record, labels, change));
    }
}

impl EventBody {
    /// A guest came or went, or (`before`) is another than it was.
    pub(super) fn guest(record: &GuestRecord, before: Option<&GuestRecord>, change: Change) -> Self {
        let change = match (change, before) {
            (Change::Updated, Some(b)) if b.state != record.state => Change::StateChanged,
            (change, _) => change,
        };
        let mut body = Self::new(ResourceKind::Guest, change, record.id, record.generation)
            .with("state", record.state.name())
            .with("migration", record.migration.map(|m| m.to_string()))
            .with("moved_to", record.moved_to.clone());
        if let Some(before) = before.filter(|b| b.state != record.state) {
            body = body.with("previous_state", before.state.name());
        }
        if let Some(error) = &record.error {
            body = body.with("error", error.code.as_str());
        }
        Self { name: Some(record.spec.name.clone()), labels: record.spec.labels.clone(), ..body }
    }

    pub(super) fn migration(record: &MigrationRecord, labels: Labels, change: Change) -> Self {
        let mut body = Self::new(ResourceKind::Migration, change, record.id, record.generation)
            .with("state", record.state.name())
            .with("guest", record.guest.to_string())
            .with("guest_name", record.guest_name.clone())
            .with("peer", record.peer.clone());
        if let Some(error) = &record.error {
            body = body.with("error", error.code.as_str());
        }
        if let (Change::RoundFinished, Some(round)) = (change, record.rounds.last()) {
            body = body
                .with("round", round.number)
                .with("bytes", round.bytes)
                .with("dirtied_pages", round.dirtied_pages);
        }
        Self { labels, ..body }
    }

    pub(super) fn peer(record: &PeerRecord, change: Change) -> Self {
        let body = Self::new(ResourceKind::PeerHost, change, record.id, record.generation);
        Self { name: Some(record.spec.name.clone()), labels: record.spec.labels.clone(), ..body }
    }

    /// The pages that an audit found.
    pub(super) fn of_pages(self, migration: Uuid, pages: u64) -> Self {
        self.with("migration", migration.to_string()).with("pages", pages)
    }

    /// Has the event written with the change that it tells of.
    pub(super) fn write(&self, batch: &mut Batch) {
        match form::write(self) {
            Ok(text) => _ = batch.append(Log::Event, text),
            Err(error) => tracing::error!(%error, "an event cannot be written"),
        }
    }
}

/// What has been told of a migration already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub state: MigrationState,
    pub rounds: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_tells_of_its_resource_and_of_the_guest_that_has_it() {
        let mut body = EventBody::new(ResourceKind::Migration, Change::StateChanged, Uuid::from_u128(7), 2)
            .with("guest", "00000000-0000-0000-0000-000000000009")
            .with("guest_name", "g1")
            .with("state", "queued");
        let of = |body: &EventBody, who: &str| body.is_of(&["nobody".to_owned(), who.to_owned()]);
        for who in ["g1", "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000009"] {
            assert!(of(&body, who), "{who}");
        }
        assert!(!of(&body, "g2") && !of(&body, "queued") && !of(&body, "m"));
        body.name = Some("m".into());
        assert!(of(&body, "m"));
    }

    /// All pages of some resources, put together.
    fn all_of(events: &Events, after: Option<EventCursor>, of: &[String], limit: usize) -> Vec<Event> {
        let (mut seen, mut after) = (Vec::new(), after);
        loop {
            let page = events.page(after.as_ref(), limit, of, |b| b.change != Change::Deleted).unwrap();
            assert!(page.events.len() <= limit);
            seen.extend(page.events);
            if !page.more {
                assert_eq!(page.next, events.latest());
                return seen;
            }
            after = Some(page.next);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_by_resource_are_those_that_a_look_through_all_finds() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let store = crate::store::Store::open(&dir.path().join("host.db"), crate::host::renew).unwrap();
        let ledger = Arc::new(Ledger::open(&store, 4 * NEAR).unwrap());
        let events = Events::new(Arc::clone(&ledger));
        let body = |n: u64| {
            let change = if n.is_multiple_of(5) { Change::Deleted } else { Change::Updated };
            let id = Uuid::from_u128(u128::from(n % 17));
            let body =
                EventBody::new(ResourceKind::Guest, change, id, n).with("guest_name", format!("g{}", n % 13));
            if n.is_multiple_of(3) { body } else { EventBody { name: Some(format!("m{}", n % 7)), ..body } }
        };
        let of: Vec<String> =
            ["g3", "m5", "00000000-0000-0000-0000-000000000011", "nobody"].map(Into::into).into();
        // Asked early, asked again when there is more, and when the oldest have gone.
        for upto in [NEAR / 2, 3 * NEAR, 3 * NEAR + 7, 9 * NEAR, 15 * NEAR] {
            for n in events.latest().seq..upto {
                events.emit(&body(n));
            }
            ledger.flush().await;
            let all: Vec<Event> = all_of(&events, None, &[], 1000);
            for limit in [7, 1000] {
                let wanted: Vec<&Event> = all.iter().filter(|e| e.body.is_of(&of)).collect();
                assert!(!wanted.is_empty());
                assert_eq!(all_of(&events, None, &of, limit).iter().collect::<Vec<_>>(), wanted);
                let after = all[all.len() / 3].cursor.clone();
                let later: Vec<&Event> = wanted.into_iter().filter(|e| e.cursor.seq > after.seq).collect();
                assert_eq!(all_of(&events, Some(after), &of, limit).iter().collect::<Vec<_>>(), later);
            }
            // Nothing of these: the reader is at the end at once.
            assert!(all_of(&events, None, &of[3..], 10).is_empty());
        }
        // By now so many are gone that nothing is noted of them any more.
        let bounds = ledger.bounds_after(Log::Event, events.latest().seq).unwrap();
        let noted = events.mentions.locked().of(&of, 0, usize::MAX);
        assert!(noted.first().is_some_and(|seq| *seq >= bounds.oldest), "{:?} {bounds:?}", noted.first());
        let gone = EventCursor { seq: NEAR, ..events.latest() };
        assert!(matches!(events.page(Some(&gone), 1, &of, |_| true), Err(EventsError::Expired { .. })));
    }

    #[test]
    fn cursors_are_read_as_they_are_written() {
        let cursor = EventCursor { epoch: "0123456789abcdef".into(), seq: 42 };
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for bad in [
            "",
            "-",
            "0123456789abcdef",
            "0123456789abcdef-",
            "0123456789abcdef--1",
            "0123456789abcdeg-1",
            "0123456789abcdef-+1",
            "0123456789abcdef-99999999999999999",
            "123-4",
        ] {
            assert_eq!(bad.parse::<EventCursor>(), Err(NoCursor), "{bad}");
        }
    }
}
