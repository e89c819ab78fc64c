//! Opening a host: state directory, identity, database, what an earlier daemon left, the peer listener.

use crate::codes::Code;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use uuid::Uuid;

use super::guests::task;
use super::inner::Inner;
use super::machines;
use super::migrations::entry::MigrationEntry;
use super::migrations::{confirm, incoming, journal, run};
use super::stored::{self, HostId, KnownIdentity, PageSecret};
use super::{
    Audit, Fault, GuestAudit, GuestRecord, GuestState, Host, MigrationDirection, MigrationRecord,
    MigrationState, NotRun, PeerRecord,
};
use crate::boot_files::{DirectoryError, ImageDirectories};
use crate::guest::{Drivers, MachineError};
use crate::hypervisor::kvm::KvmHost;
use crate::memory::{Budget, Secret};
use crate::migration::hand_over::{FoundGuest, FoundMigration, found_guest, found_migration, is_unconfirmed};
use crate::store::ledger::{EVENTS_KEPT, Log};
use crate::store::state_files::{Doubt, UNCONFIRMED, Unconfirmed};
use crate::store::{Batch, Kind, Ledger, Store, StoreError};
use crate::transport::{
    Advertised, Identity, IdentityError, ListenerError, ListenerLimits, PeerIdentity, PeerListener,
    Unconnectable, check_listenable,
};

/// How a host is opened.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// Directory of the database, keys and sockets; made with mode 0700.
    pub state_dir: PathBuf,
    /// Name; `None`: the kernel's node name.
    pub name: Option<String>,
    /// Where peers connect; `None`: no incoming migrations. Port 0 picks one.
    pub peer_listen: Option<SocketAddr>,
    /// What peers are told to connect to; `None`: where the listener is, unless that is "all addresses".
    pub advertise: Option<Advertised>,
    /// How many events are kept; `None`: [`EVENTS_KEPT`](crate::store::ledger::EVENTS_KEPT).
    pub events_kept: Option<u64>,
    /// Directories that files named by definitions of guests may come from; none: no definition may name a
    /// file.
    pub image_directories: Vec<PathBuf>,
    /// Directories whose files are guests' to write: their disks.
    pub volume_directories: Vec<PathBuf>,
    /// What runs guests: by default the stock drivers.
    pub drivers: Drivers,
    /// Bytes of memory that guests leave to this process and the rest of the host; `None`: a part of what
    /// there is. Of hosts of one process the last one's counts.
    pub memory_reserve: Option<u64>,
}

/// Why a host could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The state directory.
    #[error("the state directory {path} cannot be made")]
    StateDir {
        /// Which.
        path: PathBuf,
        /// How.
        #[source]
        source: std::io::Error,
    },
    /// The host's name: one that was given, or the kernel's node name.
    #[error("the host cannot be named {name:?}: a name is {}; --name gives it one", super::NAME_RULE)]
    Name {
        /// The name.
        name: String,
    },
    /// The database.
    #[error("the host's database cannot be opened")]
    Store(#[from] StoreError),
    /// A directory of images.
    #[error("the directories of images cannot be used")]
    Images(#[from] DirectoryError),
    /// The keys.
    #[error("the host's identity cannot be loaded or made")]
    Identity(#[from] IdentityError),
    /// The system gives no random numbers.
    #[error("a secret of the host cannot be made")]
    Secret(#[source] MachineError),
    /// What peers are told to connect to.
    #[error("the advertised address {advertised} {why}")]
    Advertise {
        /// Which.
        advertised: Advertised,
        /// Why nobody can connect to it.
        why: Unconnectable,
    },
    /// The peer listener.
    #[error("the peer listener cannot be started")]
    Listener(#[from] ListenerError),
}

/// The kernel's name of this machine, which a host has that is given none.
pub fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

impl Host {
    /// Opens the state directory, reconciles what an earlier daemon left, listens for peers. Inside a
    /// multi-threaded tokio runtime.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(config: HostConfig) -> Result<Self, OpenError> {
        use std::os::unix::fs::DirBuilderExt;
        let name = config.name.unwrap_or_else(node_name);
        if !super::is_name(&name) {
            return Err(OpenError::Name { name });
        }
        let dir = config.state_dir;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|source| OpenError::StateDir { path: dir.clone(), source })?;
        if let Some(bytes) = config.memory_reserve {
            Budget::of_this_process().keep_back(bytes);
        }
        super::migrations::reserve::clear(&dir);
        let kept = std::slice::from_ref(&dir);
        let images =
            ImageDirectories::with_volumes(&config.image_directories, &config.volume_directories, kept)?;
        let store = Store::open(&dir.join(DATABASE), stored::renew)?;
        let ledger = Ledger::open(&store, config.events_kept.unwrap_or(EVENTS_KEPT))?;
        let identity = identity_of(&store, &dir)?;
        let id = match store.meta_get::<HostId>(HOST_ID)? {
            Some(HostId { id }) => id,
            None => {
                let id = Uuid::now_v7();
                store.meta_put(HOST_ID, &HostId { id })?;
                id
            }
        };
        let kvm = KvmHost::open().map_err(|e| crate::chain::chain(&e));
        let page_secret = page_secret(&store)?;
        let kept = (store, ledger, page_secret);
        let inner = Arc::new(Inner::new(dir, id, name, kept, identity, kvm, (images, config.drivers)));
        inner.load_settings()?;
        super::migrations::endings::recover(&inner).await?;
        reconcile(&inner)?;
        if let Err(error) = inner.look_at_images() {
            tracing::error!(error = %crate::chain::chain(&error), "the helper images cannot be looked at");
        }
        inner.events.host(inner.id, &inner.name, super::events::Change::Started);
        // Whoever is answered finds it: where a crash took events that nobody waited for, this tells him.
        inner.ledger.flush().await;
        if let Some(advertised) = &config.advertise
            // Whatever the port: the listener has one only later.
            && let Some(Err(why)) = advertised.for_port(1).address().map(|at| check_listenable(&at))
        {
            return Err(OpenError::Advertise { advertised: advertised.clone(), why });
        }
        let listener = config.peer_listen.map(|addr| listen(&inner, addr)).transpose()?;
        let host = Self { inner, listener: Arc::new(Mutex::new(listener)), advertise: config.advertise };
        if host.lacks_address() {
            tracing::warn!("the peer listener is on all addresses, and none is advertised to be registered");
        }
        Ok(host)
    }
}

/// The database in a state directory.
pub(super) const DATABASE: &str = "mirrorvm.db";
/// Key of the document with the identity that the database belongs to.
pub(super) const IDENTITY: &str = "identity";
/// Key of the one with the host's id.
pub(super) const HOST_ID: &str = "host_id";
/// Key of the one with the host's secret.
pub(super) const PAGE_SECRET: &str = "page_secret";

fn known_identity(store: &Store) -> Result<Option<PeerIdentity>, StoreError> {
    Ok(store.meta_get::<KnownIdentity>(IDENTITY)?.map(|known| known.identity))
}

/// The key that peers know this host by. It is made once, with the database: a host whose key is gone is
/// another host to its peers, and no daemon decides that by itself.
fn identity_of(store: &Store, state_dir: &Path) -> Result<Identity, OpenError> {
    let dir = state_dir.join("identity");
    let known = known_identity(store)?;
    let has_run = known.is_some() || store.meta_get::<HostId>(HOST_ID)?.is_some();
    let identity = match Identity::load(&dir) {
        Err(IdentityError::Missing) if has_run => {
            let expected =
                known.map_or_else(|| "that an earlier build did not note".to_owned(), |k| k.to_string());
            return Err(IdentityError::Lost { dir, expected }.into());
        }
        Err(IdentityError::Missing) => Identity::load_or_create(&dir)?,
        loaded => loaded?,
    };
    match known {
        Some(known) if known != *identity.pin() => {
            Err(IdentityError::Replaced { dir, expected: known, found: *identity.pin() }.into())
        }
        Some(_) => Ok(identity),
        None => {
            store.meta_put(IDENTITY, &KnownIdentity { identity: *identity.pin() })?;
            Ok(identity)
        }
    }
}

/// Makes the key in a state directory the identity of the host whose database is there, and makes one if
/// there is none. `entry` makes the audit log's entry of it, from the identity that the host had and the one
/// that it has now. No daemon may be running. Gives both; the host had none when no daemon has noted it.
///
/// # Errors
/// [`OpenError`].
pub async fn accept_identity(
    state_dir: &Path,
    entry: impl FnOnce(Option<&PeerIdentity>, &PeerIdentity) -> String,
) -> Result<(Option<PeerIdentity>, PeerIdentity), OpenError> {
    let store = Store::open(&state_dir.join(DATABASE), stored::renew)?;
    let known = known_identity(&store)?;
    let identity = Identity::load_or_create(&state_dir.join("identity"))?;
    let mut batch = Batch::new();
    let now = KnownIdentity { identity: *identity.pin() };
    batch.append(Log::Audit, entry(known.as_ref(), identity.pin())).meta_put(IDENTITY, &now)?;
    Ledger::open(&store, EVENTS_KEPT)?.commit(batch).await?;
    Ok((known, *identity.pin()))
}

fn listen(inner: &Arc<Inner>, addr: SocketAddr) -> Result<PeerListener, ListenerError> {
    let records = Arc::downgrade(inner);
    let admits = move |identity: &PeerIdentity| {
        let text = identity.to_string();
        records.upgrade().is_some_and(|i| {
            i.peers().values().any(|p| p.spec.identity == text) || i.ticket_holder(identity).is_some()
        })
    };
    let around = Arc::downgrade(inner);
    let known = move |from: std::net::IpAddr| {
        let at = |p: &PeerRecord| {
            p.spec.address.address().is_some_and(|at| at.ip().to_canonical() == from.to_canonical())
        };
        around.upgrade().is_some_and(|i| i.peers().values().any(at))
    };
    let theirs = Arc::downgrade(inner);
    let handler = move |link| {
        if let Some(inner) = theirs.upgrade() {
            incoming::serve(&inner, link);
        }
    };
    let limits = ListenerLimits::default();
    let (admits, known, handler) = (Arc::new(admits), Arc::new(known), Arc::new(handler));
    PeerListener::bind_knowing(addr, &inner.identity, admits, known, limits, handler)
}

/// The database's secret, made when there is none. A start without it would be one in which marks that were
/// given out mean nothing, or in which anybody can make them.
fn page_secret(store: &Store) -> Result<Secret<32>, OpenError> {
    if let Some(PageSecret { mut secret }) = store.meta_get(PAGE_SECRET)? {
        return Ok(Secret::moved(&mut secret));
    }
    let secret = machines::fresh_secret().map_err(OpenError::Secret)?;
    store.meta_put(PAGE_SECRET, &PageSecret { secret: *secret })?;
    Ok(secret)
}

/// Makes every record honest: machines did not survive the last daemon.
fn reconcile(inner: &Arc<Inner>) -> Result<(), StoreError> {
    for (id, peer) in inner.store.list::<PeerRecord>(Kind::Peer)? {
        inner.peers_mut().insert(id, peer);
    }
    let doubt = inner.store.meta_get::<Unconfirmed>(UNCONFIRMED)?.map(|u| u.doubt);
    if doubt.is_some() {
        journal::doubt_open(inner)?;
    }
    let migrations = inner.store.list::<MigrationRecord>(Kind::Migration)?;
    let mut found = Vec::new();
    for (_, record) in migrations {
        let came = !record.state.is_terminal() && record.direction == MigrationDirection::Incoming;
        let committed = came && journal::was_committed(inner, record.id)?;
        found.push((found_migration(record.state, committed), record));
    }
    let in_doubt = found.iter().filter(|(found, _)| *found == FoundMigration::InDoubt);
    let doubts: HashMap<Uuid, Uuid> = in_doubt.map(|(_, m)| (m.guest, m.id)).collect();
    reconcile_guests(inner, doubt.is_some(), &doubts)?;
    let mut without_place = 0;
    for (found, mut record) in found {
        // Earlier builds noted none. By their ids, which say when they began: nothing better is known of
        // them.
        if record.order == 0 {
            without_place += 1;
            record.order = without_place;
        }
        reconcile_migration(inner, record, found)?;
    }
    if let Some(doubt) = doubt {
        let why = match doubt {
            Doubt::Restored => "a backup was put back",
            Doubt::Accepted => "somebody said to go on with what was left",
        };
        tracing::warn!(why, "guests are unconfirmed: they start when all known peers were asked");
        // Every record says so from now on.
        inner.store.meta_delete(UNCONFIRMED)?;
    }
    if inner.guests().values().any(|g| g.record().unconfirmed) {
        inner.runtime.spawn(confirm::ask_around(Arc::clone(inner)));
    }
    Ok(())
}

/// Guests as they are now: stored in one go where they are not what they were, then shown, then told of.
/// `doubts`: the migrations that hold guests.
fn reconcile_guests(inner: &Arc<Inner>, doubt: bool, doubts: &HashMap<Uuid, Uuid>) -> Result<(), StoreError> {
    let mut changed = Vec::new();
    let mut gone = Vec::new();
    let mut there = Vec::new();
    for (id, before) in inner.store.list::<GuestRecord>(Kind::Guest)? {
        let committed = match before.migration {
            Some(migration) => journal::was_committed(inner, migration)?,
            None => false,
        };
        let found = found_guest(before.state, committed, doubt, doubts.contains_key(&id));
        if found == FoundGuest::NeverArrived {
            let replaced = before.migration.map(|m| journal::replaced_by(inner, m)).transpose()?;
            match replaced.flatten() {
                // What was here before a guest that never arrived.
                Some(earlier) => {
                    changed.push((None, earlier.clone()));
                    there.push((earlier, GuestState::Stopped));
                }
                None => gone.push(id),
            }
            continue;
        }
        if let Err(error) = inner.drivers.understood(&before.spec.driver) {
            let name = &before.spec.name;
            tracing::warn!(guest = %id, name, %error, "a guest is kept as it is stored, and cannot be started here");
        }
        let is_idle = before.migration.is_none();
        let (mut record, state) = reconciled_guest(before.clone(), found, doubts.get(&id).copied());
        record.unconfirmed = is_unconfirmed(record.unconfirmed, doubt, record.moved_to.is_some());
        // Most guests had no machine and are what they were. They need not be written: the next daemon comes
        // to the same generation, and what changes before is stored with a later one.
        let as_it_was = GuestRecord { generation: before.generation, ..record.clone() } == before;
        if is_idle && as_it_was {
            there.push((record, state));
            continue;
        }
        changed.push((Some(before), record.clone()));
        there.push((record, state));
    }
    inner.store.transaction(|t| {
        gone.iter().try_for_each(|id| t.delete(Kind::Guest, *id).map(|_| ()))?;
        changed.iter().try_for_each(|(_, now)| t.put(Kind::Guest, now.id, Some(&now.spec.name), now))
    })?;
    for (record, state) in there {
        let entry = task::spawn(inner, record, state);
        inner.guests_mut().insert(entry);
    }
    for (before, now) in &changed {
        if let Some(before) = before
            && (before.state != now.state || before.unconfirmed != now.unconfirmed)
        {
            inner.events.guest(now, Some(before), super::events::Change::Updated);
        }
    }
    Ok(())
}

/// `doubt`: the migration that holds it.
fn reconciled_guest(
    mut record: GuestRecord,
    found: FoundGuest,
    doubt: Option<Uuid>,
) -> (GuestRecord, GuestState) {
    let lost = matches!(
        record.state,
        GuestState::Running
            | GuestState::Paused
            | GuestState::Starting
            | GuestState::Stopping
            | GuestState::Incoming
    );
    record.audit = record.audit.map(|of| GuestAudit { audit: ended_with_the_daemon(of.audit), ..of });
    // While a migration had the guest, what was shown may be ahead of what was stored: once held, and once
    // let go again.
    record.generation += if record.migration.is_some() { 3 } else { 1 };
    match found {
        FoundGuest::Held => {
            record.state = GuestState::InDoubt;
            record.migration = doubt.or(record.migration);
        }
        FoundGuest::Stopped | FoundGuest::NeverArrived => {
            if lost {
                record.error = Some(Fault::new(
                    Code::DaemonRestarted,
                    "the daemon ended while the guest had a machine; its memory is lost",
                ));
            }
            record.state = GuestState::Stopped;
            record.migration = None;
        }
    }
    let state = record.state;
    (record, state)
}

/// An audit that was going on has lost what it compares.
fn ended_with_the_daemon(audit: Audit) -> Audit {
    if audit.is_pending() { Audit::not_run(NotRun::HostRestarted) } else { audit }
}

fn reconcile_migration(
    inner: &Arc<Inner>,
    mut record: MigrationRecord,
    found: FoundMigration,
) -> Result<(), StoreError> {
    let ended = record.audit.clone().map(ended_with_the_daemon);
    if ended != record.audit {
        record.audit = ended;
        record.generation += 1;
        inner.store.put(Kind::Migration, record.id, None, &record)?;
    }
    match found {
        FoundMigration::Ended | FoundMigration::InDoubt => {}
        FoundMigration::Moved => {
            // The guest had moved before the daemon ended.
            record.state = MigrationState::Succeeded;
            record.finished_at = Some(Timestamp::now());
            record.guest_state_after = Some(GuestState::Stopped);
            record.generation += 1;
            inner.store.put(Kind::Migration, record.id, None, &record)?;
        }
        FoundMigration::Failed => {
            record.state = MigrationState::Failed;
            record.error = Some(Fault::new(
                Code::DaemonRestarted,
                "the daemon ended before START; the guest did not move",
            ));
            record.finished_at = Some(Timestamp::now());
            record.generation += 1;
            inner.store.put(Kind::Migration, record.id, None, &record)?;
        }
    }
    let control = Arc::new(inner.new_control(record.id, record.state, super::MigrationLimits::default()));
    control.update(|l| {
        l.progress = record.progress;
        l.rounds.clone_from(&record.rounds);
        l.audit.clone_from(&record.audit);
    });
    let entry = Arc::new(MigrationEntry::new(record, control));
    inner.restore_migration(&entry);
    if found == FoundMigration::InDoubt {
        let _ = entry.control.pass_point_of_no_return();
        inner.runtime.spawn(run::settle_after_restart(Arc::clone(inner), entry));
    }
    Ok(())
}
