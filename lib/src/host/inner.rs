//! What the parts of a host share: registries, the store, hypervisors.

use crate::codes::Capability;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use uuid::Uuid;

use super::act::{self, Effect};
use super::events::{Change, EventBody, Events, ResourceKind};
use super::guests::entry::GuestEntry;
use super::images::files::Looks;
use super::lists::Selector;
use super::migrations::audits::Audits;
use super::migrations::entry::MigrationEntry;
use super::mirrors::entry::MirrorEntry;
use super::registry::{Facet, Registry};
use super::{
    Audit, DriverSpec, Fault, GuestRecord, HostError, MigrationLimits, MigrationRecord, MigrationState,
    MirrorRecord, MirrorState, PeerRecord,
};
use crate::address_space::HostLimits;
use crate::boot_files::ImageDirectories;
use crate::guest::drivers::{Driver, Drivers, Facts, MirrorsOn, NotUnderstood};
use crate::hypervisor::Hypervisor;
use crate::hypervisor::emulated::EmulatedHost;
use crate::hypervisor::kvm::KvmHost;
use crate::memory::Secret;
use crate::migration::Control;
use crate::mirror::{HelperImage, Mirror, Placement};
use crate::sev::PlatformKey;
use crate::sev::model::ModelPlatform;
use crate::store::{Batch, Kind, Ledger, Store, StoreError};
use crate::sync::{Locked, Shared};
use crate::transport::{Identity, Link, PeerIdentity};
use crate::waiting;

/// Room in the state directory below which a write for its own sake shows whether there is enough.
const SPACE_SHORT: u64 = 4 << 20;
/// Between two such looks.
const SPACE_LOOK: Duration = Duration::from_secs(1);

/// Limits assumed for plans on a host without KVM.
const NO_KVM: HostLimits = HostLimits {
    max_phys_bits: 46,
    c_bit: None,
    phys_bit_reduction: 0,
    slot_budget: 32_764,
    gib_pages: true,
};

/// Limits by hypervisor, for guests with and without a C-bit.
struct KnownLimits {
    kvm: HostLimits,
    kvm_plain: HostLimits,
    emulated: HostLimits,
    emulated_plain: HostLimits,
}

/// Whose session it is, and where its streams go: index and link.
type WaitingImport = (PeerIdentity, mpsc::SyncSender<(u16, Link)>);

pub(super) struct Inner {
    pub state_dir: PathBuf,
    pub id: Uuid,
    pub name: String,
    pub store: Store,
    pub ledger: Arc<Ledger>,
    pub events: Events,
    pub identity: Identity,
    pub kvm: Result<KvmHost, String>,
    /// The software machine: always there.
    pub emulated: EmulatedHost,
    /// What stands for the security processor.
    platform_key: Option<HostPlatformKey>,
    limits: KnownLimits,
    /// The built-in image.
    pub image: Arc<HelperImage>,
    pub runtime: tokio::runtime::Handle,
    pub page_secret: Secret<32>,
    images: Mutex<()>,
    pub image_looks: Looks,
    /// Where files that definitions name may come from.
    pub image_directories: ImageDirectories,
    /// What runs guests.
    pub drivers: Drivers,
    pub settings: RwLock<super::HostSettings>,
    /// Changes of the settings go one after the other; readers wait for none.
    pub changing_settings: Mutex<()>,
    pub outgoing_slots: Arc<tokio::sync::Semaphore>,
    guests: RwLock<Registry<GuestEntry>>,
    /// Ids and names of guests that are being stored. Locked after `guests`.
    claims: Mutex<HashMap<Uuid, String>>,
    mirrors: RwLock<Registry<MirrorEntry>>,
    migrations: Arc<RwLock<Registry<MigrationEntry>>>,
    /// The place of the migration that began last.
    last_migration: AtomicU64,
    peers: RwLock<HashMap<Uuid, PeerRecord>>,
    /// Held by whoever writes of peers, or begins a migration with one; readers of the peers wait for
    /// neither. Never taken by the ledger's own thread.
    changing_peers: RwLock<()>,
    /// Streams of imports that wait for them, by session.
    streams: Mutex<HashMap<Uuid, WaitingImport>>,
    space_looked_at: Mutex<Option<Instant>>,
    /// Imports that were given up and that the store did not take: what their sources are told while this
    /// daemon lives.
    unstored: Mutex<HashMap<Uuid, super::migrations::hand_over::HandOver>>,
    /// Told when a peer was reached or reached this host, or became known: it may say now what it was asked
    /// in vain.
    pub peer_heard: Arc<tokio::sync::Notify>,
    /// What is kept of guests that left.
    pub audits: Audits,
    changes: watch::Sender<u64>,
    stopping: AtomicBool,
}

impl Inner {
    pub fn new(
        state_dir: PathBuf,
        id: Uuid,
        name: String,
        (store, ledger, page_secret): (Store, Ledger, Secret<32>),
        identity: Identity,
        kvm: Result<KvmHost, String>,
        (image_directories, drivers): (ImageDirectories, Drivers),
    ) -> Self {
        let emulated = EmulatedHost::new(ModelPlatform::new());
        let kvm_limits = kvm.as_ref().map_or(NO_KVM, Hypervisor::limits);
        let plain = |limits: HostLimits| HostLimits { c_bit: None, ..limits };
        let limits = KnownLimits {
            kvm: kvm_limits,
            kvm_plain: plain(kvm_limits),
            emulated: emulated.limits(),
            emulated_plain: plain(emulated.limits()),
        };
        let platform_key = platform_key(kvm.as_ref().ok(), &emulated);
        let ledger = Arc::new(ledger);
        Self {
            state_dir,
            id,
            name,
            store,
            events: Events::new(Arc::clone(&ledger)),
            ledger,
            identity,
            kvm,
            image_directories,
            drivers,
            platform_key,
            emulated,
            limits,
            image: Arc::new(HelperImage::built_in()),
            runtime: tokio::runtime::Handle::current(),
            page_secret,
            images: Mutex::default(),
            image_looks: Looks::default(),
            settings: RwLock::default(),
            changing_settings: Mutex::default(),
            outgoing_slots: Arc::new(tokio::sync::Semaphore::new(4)),
            guests: RwLock::default(),
            claims: Mutex::default(),
            mirrors: RwLock::default(),
            migrations: Arc::default(),
            last_migration: AtomicU64::new(0),
            peers: RwLock::default(),
            changing_peers: RwLock::default(),
            streams: Mutex::default(),
            space_looked_at: Mutex::default(),
            unstored: Mutex::default(),
            audits: Audits::default(),
            changes: watch::Sender::new(1),
            peer_heard: Arc::default(),
            stopping: AtomicBool::new(false),
        }
    }

    pub fn limits(&self) -> HostLimits {
        self.limits.kvm
    }

    /// Limits for a guest of this driver: a guest that is not encrypted has no C-bit, whatever the processor
    /// has.
    pub fn limits_of(&self, driver: &DriverSpec) -> &HostLimits {
        let on = self.drivers.of(driver).map_or(MirrorsOn::Kvm, Driver::mirrors_on);
        match (on, self.facts(driver).sev.is_some()) {
            (MirrorsOn::Software, true) => &self.limits.emulated,
            (MirrorsOn::Software, false) => &self.limits.emulated_plain,
            (MirrorsOn::Kvm, true) => &self.limits.kvm,
            (MirrorsOn::Kvm, false) => &self.limits.kvm_plain,
        }
    }

    /// The driver of a definition.
    pub fn driver(&self, spec: &DriverSpec) -> Result<&dyn Driver, HostError> {
        let missing =
            |e: crate::guest::drivers::UnknownDriver| HostError::lacks(Capability::Driver, e.to_string());
        self.drivers.of(spec).map_err(missing)
    }

    /// What a definition's driver says of the guest.
    pub fn facts(&self, spec: &DriverSpec) -> Facts {
        self.drivers.facts(spec)
    }

    /// Whether this host makes mirrors of the driver's guests, encrypted as they are.
    pub fn check_driver(&self, driver: &DriverSpec) -> Result<(), HostError> {
        let hypervisor = self.hypervisor(driver)?;
        if self.facts(driver).sev.is_some() && hypervisor.sev().is_none() {
            return Err(no_sev(hypervisor));
        }
        Ok(())
    }

    /// Whether this host starts guests of the driver, encrypted as they are.
    pub fn check_starts(&self, spec: &DriverSpec) -> Result<(), HostError> {
        let driver = self.driver(spec)?;
        // Of a definition that was stored by a build with more to its driver.
        if let Err(not @ NotUnderstood::Unknown { .. }) = self.drivers.understood(spec) {
            return Err(HostError::lacks(Capability::Driver, not.to_string()));
        }
        let hypervisor = self.hypervisor_of(driver);
        let missing = |m: super::MissingCapability| HostError::lacks(m.what, m.why);
        driver.works(hypervisor).map_err(missing)?;
        match hypervisor {
            Ok(hypervisor) if self.facts(spec).sev.is_some() && hypervisor.sev().is_none() => {
                Err(no_sev(hypervisor))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// What runs a guest's mirrors.
    pub fn hypervisor(&self, spec: &DriverSpec) -> Result<&dyn Hypervisor, HostError> {
        let missing = |why: &str| HostError::lacks(Capability::Kvm, why);
        self.hypervisor_of(self.driver(spec)?).map_err(missing)
    }

    /// What stands for the security processor; `None` where it cannot be learnt.
    pub const fn platform_key(&self) -> Option<HostPlatformKey> {
        self.platform_key
    }

    /// What runs the mirrors of a driver's guests, or why there is none.
    pub fn hypervisor_of(&self, driver: &dyn Driver) -> Result<&dyn Hypervisor, &str> {
        match driver.mirrors_on() {
            MirrorsOn::Software => Ok(&self.emulated),
            MirrorsOn::Kvm => self.kvm.as_ref().map(|kvm| kvm as &dyn Hypervisor).map_err(String::as_str),
        }
    }

    /// Whether the state directory has so little room that the next write may not fit, looked at once a
    /// second.
    pub fn is_short_of_space(&self) -> bool {
        let mut looked = self.space_looked_at.locked();
        if looked.is_some_and(|at| at.elapsed() < SPACE_LOOK) {
            return false;
        }
        *looked = Some(Instant::now());
        rustix::fs::statvfs(&self.state_dir)
            .is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) < SPACE_SHORT)
    }

    pub fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub fn stop_accepting(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub fn check_running(&self) -> Result<(), HostError> {
        if self.is_stopping() { Err(HostError::ShuttingDown) } else { Ok(()) }
    }

    // Guests.

    pub fn guests(&self) -> RwLockReadGuard<'_, Registry<GuestEntry>> {
        self.guests.to_read()
    }

    pub fn guests_mut(&self) -> RwLockWriteGuard<'_, Registry<GuestEntry>> {
        self.guests.to_write()
    }

    /// Whether a new guest may have this name, and this id.
    pub fn check_guest_free(&self, id: Option<Uuid>, name: &str) -> Result<(), HostError> {
        let (guests, claims) = (self.guests(), self.claims());
        if id.is_some_and(|id| guests.contains_key(&id) || claims.contains_key(&id)) {
            return Err(HostError::IdTaken { kind: ResourceKind::Guest });
        }
        if guests.named(name).is_some() || claims.values().any(|n| n == name) {
            return Err(HostError::NameTaken { kind: ResourceKind::Guest, name: name.to_owned() });
        }
        Ok(())
    }

    /// Keeps id and name for a guest that is being stored, until the claim is dropped. By then the guest is
    /// there, or will never be.
    pub fn claim_guest(self: &Arc<Self>, id: Uuid, name: &str) -> Result<GuestClaim, HostError> {
        let guests = self.guests();
        let mut claims = self.claims();
        if guests.contains_key(&id) || claims.contains_key(&id) {
            return Err(HostError::IdTaken { kind: ResourceKind::Guest });
        }
        if guests.named(name).is_some() || claims.values().any(|n| n == name) {
            return Err(HostError::NameTaken { kind: ResourceKind::Guest, name: name.to_owned() });
        }
        claims.insert(id, name.to_owned());
        Ok(GuestClaim { inner: Arc::clone(self), id })
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<Uuid, String>> {
        self.claims.locked()
    }

    /// A guest by id or name.
    pub fn find_guest(&self, key: &str) -> Result<Arc<GuestEntry>, HostError> {
        let guests = self.guests();
        let by_id = Uuid::try_parse(key).ok().and_then(|id| guests.get(&id));
        by_id
            .or_else(|| guests.named(key))
            .cloned()
            .ok_or_else(|| HostError::missing(ResourceKind::Guest, key))
    }

    /// A guest goes: its record and the event of that, in one transaction; then it is not here any more.
    /// Nothing has changed when the store refuses.
    pub fn delete_guest(self: &Arc<Self>, record: &GuestRecord) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        batch.delete(Kind::Guest, record.id);
        EventBody::guest(record, None, Change::Deleted).write(&mut batch);
        let riding = act::along(&Effect::Gone(ResourceKind::Guest, record.id), &mut batch);
        let (inner, id) = (Arc::clone(self), record.id);
        self.ledger.commit_blocking(batch, move || {
            inner.guests_mut().remove(&id);
            riding.arrived();
        })?;
        self.changed();
        Ok(())
    }

    /// Writes what has happened; what the store does not take now is owed to it.
    fn owe(&self, batch: Batch, what: &str) {
        if let Err(error) = self.ledger.owe_blocking(batch, || {}) {
            tracing::error!(%error, "{what} is not stored yet");
        }
    }

    // Mirrors.

    pub fn mirror_entry(&self, id: Uuid) -> Option<Arc<MirrorEntry>> {
        self.mirrors.to_read().get(&id).cloned()
    }

    pub fn mirrors(&self) -> RwLockReadGuard<'_, Registry<MirrorEntry>> {
        self.mirrors.to_read()
    }

    /// All by creation.
    pub fn mirror_entries(&self) -> Vec<Arc<MirrorEntry>> {
        self.mirrors().values().cloned().collect()
    }

    /// Shows a mirror to others, under an id that no other has.
    pub fn register_mirror(
        &self,
        guest: &GuestRecord,
        mirror: &Mirror,
        busy: bool,
        id: Option<Uuid>,
        placement: Placement,
    ) -> Result<Arc<MirrorEntry>, HostError> {
        let record = MirrorRecord {
            id: id.unwrap_or_else(Uuid::now_v7),
            guest: guest.id,
            strategy: mirror.plan().strategy,
            state: if busy { MirrorState::Busy } else { MirrorState::Ready },
            generation: 1,
            plan: Arc::clone(mirror.plan()),
            workers: Vec::new(),
            placement,
            helper_measurement: mirror.helper_measurement(),
            error: None,
            created_at: Timestamp::now(),
            ready_after_us: mirror.ready_after().as_micros() as u64,
        };
        let entry = Arc::new(MirrorEntry::new(record, mirror.watch()));
        {
            let mut mirrors = self.mirrors.to_write();
            if mirrors.contains_key(&entry.id) {
                return Err(HostError::IdTaken { kind: ResourceKind::Mirror });
            }
            mirrors.insert(Arc::clone(&entry));
        }
        self.tell_mirror(&entry, Change::Created);
        self.changed();
        Ok(entry)
    }

    pub fn tell_mirror(&self, entry: &MirrorEntry, change: Change) {
        self.events.mirror(&entry.record(), self.labels_of(entry.guest), change);
    }

    pub fn labels_of(&self, guest: Uuid) -> super::Labels {
        self.guests().get(&guest).map(|g| g.labels()).unwrap_or_default()
    }

    /// What belongs to the guests here that meet a condition; `None`: to so many that looking through all is
    /// no dearer.
    pub fn of_guests_with(&self, label: &Selector) -> Option<Vec<Facet>> {
        const MOST: usize = 64;
        let (guests, label) = (self.guests(), Facet::from(label));
        (guests.count(&label) <= MOST).then(|| guests.having(&label).map(|g| Facet::Guest(g.id)).collect())
    }

    pub fn set_mirror_state(&self, id: Uuid, state: MirrorState, error: Option<Fault>) {
        if let Some(entry) = self.mirror_entry(id) {
            entry.set_state(state, error);
            self.tell_mirror(&entry, Change::StateChanged);
            self.changed();
        }
    }

    pub fn forget_mirror(&self, id: Uuid) {
        let gone = self.mirrors.to_write().remove(&id);
        if let Some(gone) = gone {
            self.tell_mirror(&gone, Change::Deleted);
        }
        self.changed();
    }

    // Migrations.

    pub fn migration_entry(&self, id: Uuid) -> Option<Arc<MigrationEntry>> {
        self.migrations.to_read().get(&id).cloned()
    }

    pub fn migrations(&self) -> RwLockReadGuard<'_, Registry<MigrationEntry>> {
        self.migrations.to_read()
    }

    /// All by creation.
    pub fn migration_entries(&self) -> Vec<Arc<MigrationEntry>> {
        self.migrations().values().cloned().collect()
    }

    /// Adds a migration that an earlier daemon stored.
    pub fn restore_migration(&self, entry: &Arc<MigrationEntry>) {
        self.last_migration.fetch_max(entry.record().order, Ordering::SeqCst);
        entry.list();
        entry.join(&self.migrations);
        self.changed();
    }

    /// Adds a new migration under an id that no other has, and stores it with the event of it and what `and`
    /// puts beside it; all or nothing.
    pub fn begin_migration(
        &self,
        entry: &Arc<MigrationEntry>,
        and: impl FnOnce(&mut Batch) -> Result<(), StoreError>,
    ) -> Result<(), HostError> {
        // In place before it is stored: of two that come with one id, one is refused and stores nothing.
        if !entry.join(&self.migrations) {
            return Err(HostError::IdTaken { kind: ResourceKind::Migration });
        }
        entry.put_in_order(self.last_migration.fetch_add(1, Ordering::SeqCst) + 1);
        let stored = self.store_new_migration(entry, and);
        if let Err(error) = stored {
            self.migrations.to_write().remove(&entry.id);
            return Err(HostError::storage("storing the migration", error));
        }
        self.changed();
        Ok(())
    }

    fn store_new_migration(
        &self,
        entry: &Arc<MigrationEntry>,
        and: impl FnOnce(&mut Batch) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let record = entry.record();
        let mut batch = Batch::new();
        batch.put(Kind::Migration, record.id, None, &record)?;
        and(&mut batch)?;
        EventBody::migration(&record, self.labels_of(record.guest), Change::Created).write(&mut batch);
        let riding = act::along(&Effect::Migration(&record), &mut batch);
        let listed = Arc::clone(entry);
        self.ledger.commit_blocking(batch, move || {
            listed.list();
            riding.arrived();
        })
    }

    /// A handle on a migration whose changes this host's watchers see.
    pub fn new_control(
        self: &Arc<Self>,
        id: Uuid,
        state: MigrationState,
        limits: MigrationLimits,
    ) -> Control {
        let weak = Arc::downgrade(self);
        let changed = move || {
            if let Some(inner) = weak.upgrade() {
                inner.migration_changed(id);
            }
        };
        Control::new(state, limits, Box::new(changed))
    }

    /// Something of a migration changed: tells what is worth an event.
    pub fn migration_changed(&self, id: Uuid) {
        if let Some(entry) = self.migration_entry(id) {
            // Found as what it is before anybody is told.
            entry.refresh();
            entry.tell(|record, change| {
                self.events.migration(record, self.labels_of(record.guest), change);
            });
        }
        self.changed();
    }

    /// Stores a migration's record; nothing is stored when the store refuses.
    pub fn store_migration(&self, record: &MigrationRecord) -> Result<(), HostError> {
        let failed = |e| HostError::storage("storing the migration", e);
        let mut batch = Batch::new();
        batch.put(Kind::Migration, record.id, None, record).map_err(failed)?;
        let riding = act::along(&Effect::Migration(record), &mut batch);
        self.ledger.commit_blocking(batch, || riding.arrived()).map_err(failed)
    }

    /// Changes a migration's record to what has happened, and tells of it. What the store does not take now
    /// is owed to it.
    pub fn migration_happened(&self, entry: &Arc<MigrationEntry>, change: impl FnOnce(&mut MigrationRecord)) {
        entry.alone(|| {
            let record = entry.change(change);
            let mut batch = Batch::new();
            if let Err(error) = batch.put(Kind::Migration, record.id, None, &record) {
                tracing::error!(%error, "a migration's record cannot be written");
            }
            let labels = self.labels_of(record.guest);
            entry.tell(|record, change| {
                EventBody::migration(record, labels.clone(), change).write(&mut batch)
            });
            self.owe(batch, "what became of a migration");
        });
        self.changed();
    }

    /// Notes the end of an audit in its migration's record, unless that was forgotten meanwhile.
    pub fn audited(&self, entry: &Arc<MigrationEntry>, audit: Audit) {
        entry.alone(|| {
            if self.migration_entry(entry.id).is_none() {
                return;
            }
            let record = entry.change(|r| r.audit = Some(audit));
            let mut batch = Batch::new();
            match batch.put(Kind::Migration, record.id, None, &record) {
                Ok(_) => self.owe(batch, "what an audit found"),
                Err(error) => tracing::error!(%error, "a migration's record cannot be written"),
            }
        });
        self.changed();
    }

    /// Forgets a migration's record and tells of it; it is still here when the store refuses.
    pub fn forget_migration(self: &Arc<Self>, record: &MigrationRecord) -> Result<(), HostError> {
        let mut batch = Batch::new();
        batch.delete(Kind::Migration, record.id);
        EventBody::migration(record, self.labels_of(record.guest), Change::Deleted).write(&mut batch);
        let riding = act::along(&Effect::Gone(ResourceKind::Migration, record.id), &mut batch);
        let (inner, id) = (Arc::clone(self), record.id);
        let stored = self.ledger.commit_blocking(batch, move || {
            inner.migrations.to_write().remove(&id);
            riding.arrived();
        });
        stored.map_err(|e| HostError::storage("deleting the migration", e))?;
        self.changed();
        Ok(())
    }

    // Peers.

    pub fn peers(&self) -> RwLockReadGuard<'_, HashMap<Uuid, PeerRecord>> {
        self.peers.to_read()
    }

    /// Does something while no peer comes, changes or goes, but maybe others that want the same.
    pub fn while_peers_stay<T>(&self, act: impl FnOnce() -> T) -> T {
        waiting::with_thread(|| {
            let _stay = self.changing_peers.to_read();
            act()
        })
    }

    /// Does something that makes a peer come, change or go, while nobody else does and no migration begins.
    pub fn change_peers<T>(&self, act: impl FnOnce() -> T) -> T {
        waiting::with_thread(|| {
            let _alone = self.changing_peers.to_write();
            act()
        })
    }

    /// Held by nobody who waits for the disk: the ledger's thread takes it.
    pub fn peers_mut(&self) -> RwLockWriteGuard<'_, HashMap<Uuid, PeerRecord>> {
        self.peers.to_write()
    }

    /// A peer came, changed or went: stored with the event of that, then shown.
    pub fn store_peer(self: &Arc<Self>, record: &PeerRecord, change: Change) -> Result<(), HostError> {
        let failed = |e| HostError::storage("storing the peer", e);
        let mut batch = Batch::new();
        let riding = if change == Change::Deleted {
            batch.delete(Kind::Peer, record.id);
            act::along(&Effect::Gone(ResourceKind::PeerHost, record.id), &mut batch)
        } else {
            batch.put(Kind::Peer, record.id, Some(&record.spec.name), record).map_err(failed)?;
            act::along(&Effect::Peer(record), &mut batch)
        };
        EventBody::peer(record, change).write(&mut batch);
        let (inner, record) = (Arc::clone(self), record.clone());
        let shown = move || {
            if change == Change::Deleted {
                inner.peers_mut().remove(&record.id);
            } else {
                inner.peers_mut().insert(record.id, record);
            }
            riding.arrived();
        };
        self.ledger.commit_blocking(batch, shown).map_err(failed)
    }

    pub fn find_peer(&self, key: &str) -> Result<PeerRecord, HostError> {
        let peers = self.peers();
        let by_id = Uuid::try_parse(key).ok().and_then(|id| peers.get(&id));
        by_id
            .or_else(|| peers.values().find(|p| p.spec.name == key))
            .cloned()
            .ok_or_else(|| HostError::missing(ResourceKind::PeerHost, key))
    }

    /// Sessions that wait for their streams.
    pub fn streams(&self) -> MutexGuard<'_, HashMap<Uuid, WaitingImport>> {
        self.streams.locked()
    }

    /// Ends of imports that could not be stored.
    pub fn unstored(&self) -> MutexGuard<'_, HashMap<Uuid, super::migrations::hand_over::HandOver>> {
        self.unstored.locked()
    }

    /// Changes of helper images go one after the other.
    pub fn images_lock(&self) -> MutexGuard<'_, ()> {
        waiting::with_thread(|| self.images.locked())
    }
}

/// Keeps id and name of a guest that is being stored.
pub(super) struct GuestClaim {
    inner: Arc<Inner>,
    id: Uuid,
}

impl Drop for GuestClaim {
    fn drop(&mut self) {
        self.inner.claims().remove(&self.id);
    }
}

/// The key that stands for a host's security processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPlatformKey {
    /// Whether it is the model's, which anybody has.
    pub modelled: bool,
    /// The key.
    pub key: PlatformKey,
}

/// The key of the real processor, or, where there is none, of the model.
fn platform_key(kvm: Option<&KvmHost>, emulated: &EmulatedHost) -> Option<HostPlatformKey> {
    let platform = kvm.and_then(Hypervisor::sev).or_else(|| emulated.sev())?;
    let endorsed = platform.endorsement();
    let endorsed = endorsed.inspect_err(|error| {
        tracing::warn!(error = %crate::chain::chain(error), "the security processor shows no certificates");
    });
    Some(HostPlatformKey { modelled: platform.is_modelled(), key: endorsed.ok()?.chip })
}

pub(super) fn no_sev(hypervisor: &dyn Hypervisor) -> HostError {
    let why = format!("{} has no SEV here; capabilities.missing tells why", hypervisor.name());
    HostError::lacks(Capability::Sev, why)
}
