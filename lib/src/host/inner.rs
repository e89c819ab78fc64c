//! What the parts of a host share: registries, the store, KVM, and the making of machines and mirrors.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};

use jiff::Timestamp;
use tokio::sync::watch;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::entries::{GuestEntry, MigrationEntry, MirrorEntry};
use super::events::{Change, Events};
use super::guest_task::Command;
use super::{
    AccelChoice, DriverSpec, Fault, Fill, GuestRecord, HostError, MigrationRecord, MirrorRecord, MirrorState,
    PeerRecord,
};
use crate::address_space::{
    self, GuestLayout, HelperPlacement, HostLimits, MailboxSize, MirrorPlan, Strategy,
};
use crate::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec};
use crate::guest::qemu::{QEMU_RESERVED, QemuMachine, QemuMachineSpec};
use crate::guest::{Machine, MachineError};
use crate::hypervisor::Hypervisor;
use crate::hypervisor::kvm::KvmHost;
use crate::memory::{GuestRam, MemoryError};
use crate::mirror::{HelperImage, Mirror, MirrorError};
use crate::qemu;
use crate::store::{Kind, Ledger, Store};
use crate::transport::{Identity, Link, PeerIdentity};

/// Slots of a worker: the helper seals one batch, one is being sent, and there is room.
const SLOTS: u32 = 4;
/// Limits assumed for plans on a host without KVM.
const NO_KVM: HostLimits = HostLimits {
    max_phys_bits: 46,
    c_bit: None,
    phys_bit_reduction: 0,
    slot_budget: 32_764,
    gib_pages: true,
};

/// Whose session it is, and where its streams go: index and link.
type WaitingImport = (PeerIdentity, mpsc::Sender<(u16, Link)>);

pub(super) struct Inner {
    pub state_dir: PathBuf,
    pub id: Uuid,
    pub name: String,
    pub store: Store,
    pub ledger: Arc<Ledger>,
    pub events: Events,
    pub identity: Identity,
    pub kvm: Result<KvmHost, String>,
    pub image: HelperImage,
    pub runtime: tokio::runtime::Handle,
    pub page_secret: [u8; 32],
    images: Mutex<()>,
    pub settings: RwLock<super::HostSettings>,
    pub outgoing_slots: Arc<tokio::sync::Semaphore>,
    guests: RwLock<HashMap<Uuid, Arc<GuestEntry>>>,
    mirrors: RwLock<HashMap<Uuid, Arc<MirrorEntry>>>,
    migrations: RwLock<HashMap<Uuid, Arc<MigrationEntry>>>,
    peers: RwLock<HashMap<Uuid, PeerRecord>>,
    /// Streams of imports that wait for them, by session.
    streams: Mutex<HashMap<Uuid, WaitingImport>>,
    changes: watch::Sender<u64>,
    stopping: AtomicBool,
}

/// What a machine that waits for its memory must be told.
pub(super) struct IncomingMachine<'a> {
    pub secret: Zeroizing<[u8; 32]>,
    pub machine_type: Option<&'a str>,
}

impl Inner {
    pub fn new(
        state_dir: PathBuf,
        id: Uuid,
        name: String,
        (store, ledger): (Store, Ledger),
        identity: Identity,
        kvm: Result<KvmHost, String>,
    ) -> Self {
        let ledger = Arc::new(ledger);
        let page_secret = page_secret(&store);
        Self {
            state_dir,
            id,
            name,
            store,
            events: Events::new(Arc::clone(&ledger)),
            ledger,
            identity,
            kvm,
            image: HelperImage::built_in(),
            runtime: tokio::runtime::Handle::current(),
            page_secret,
            images: Mutex::default(),
            settings: RwLock::default(),
            outgoing_slots: Arc::new(tokio::sync::Semaphore::new(4)),
            guests: RwLock::default(),
            mirrors: RwLock::default(),
            migrations: RwLock::default(),
            peers: RwLock::default(),
            streams: Mutex::default(),
            changes: watch::Sender::new(1),
            stopping: AtomicBool::new(false),
        }
    }

    pub fn limits(&self) -> HostLimits {
        self.kvm.as_ref().map_or(NO_KVM, Hypervisor::limits)
    }

    pub fn need_kvm(&self) -> Result<&KvmHost, HostError> {
        self.kvm.as_ref().map_err(|why| HostError::CapabilityMissing { what: "kvm", why: why.clone() })
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

    pub fn guests(&self) -> RwLockReadGuard<'_, HashMap<Uuid, Arc<GuestEntry>>> {
        self.guests.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn guests_mut(&self) -> RwLockWriteGuard<'_, HashMap<Uuid, Arc<GuestEntry>>> {
        self.guests.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest by id or name.
    pub fn find_guest(&self, key: &str) -> Result<Arc<GuestEntry>, HostError> {
        let guests = self.guests();
        let by_id = Uuid::try_parse(key).ok().and_then(|id| guests.get(&id));
        by_id
            .or_else(|| guests.values().find(|g| g.is_named(key)))
            .cloned()
            .ok_or_else(|| HostError::NotFound { kind: "guest", key: key.chars().take(80).collect() })
    }

    pub fn forget_guest(&self, id: Uuid) {
        if let Err(error) = self.store.delete(Kind::Guest, id) {
            tracing::error!(%error, "a guest's record could not be deleted");
        }
        let gone = self.guests_mut().remove(&id);
        if let Some(gone) = gone {
            self.events.guest(&gone.record(), None, Change::Deleted);
        }
        self.changed();
    }

    // Mirrors.

    pub fn mirror_entry(&self, id: Uuid) -> Option<Arc<MirrorEntry>> {
        self.mirrors.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub fn mirror_entries(&self) -> Vec<Arc<MirrorEntry>> {
        self.mirrors.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub fn register_mirror(
        &self,
        guest: &GuestRecord,
        mirror: &Mirror,
        busy: bool,
        id: Option<Uuid>,
    ) -> Arc<MirrorEntry> {
        let record = MirrorRecord {
            id: id.unwrap_or_else(Uuid::now_v7),
            guest: guest.id,
            strategy: mirror.plan().strategy,
            state: if busy { MirrorState::Busy } else { MirrorState::Ready },
            generation: 1,
            plan: Arc::clone(mirror.plan()),
            workers: Vec::new(),
            cpus: Vec::new(),
            helper_measurement: self.image.measurement(),
            error: None,
            created_at: Timestamp::now(),
            ready_after_us: mirror.ready_after().as_micros() as u64,
        };
        let entry = Arc::new(MirrorEntry::new(record, mirror.watch()));
        self.mirrors.write().unwrap_or_else(PoisonError::into_inner).insert(entry.id, Arc::clone(&entry));
        self.tell_mirror(&entry, Change::Created);
        self.changed();
        entry
    }

    pub fn tell_mirror(&self, entry: &MirrorEntry, change: Change) {
        self.events.mirror(&entry.record(), self.labels_of(entry.guest), change);
    }

    fn labels_of(&self, guest: Uuid) -> super::Labels {
        self.guests().get(&guest).map(|g| g.record().spec.labels).unwrap_or_default()
    }

    pub fn set_mirror_state(&self, id: Uuid, state: MirrorState, error: Option<Fault>) {
        if let Some(entry) = self.mirror_entry(id) {
            entry.set_state(state, error);
            self.tell_mirror(&entry, Change::StateChanged);
            self.changed();
        }
    }

    pub fn forget_mirror(&self, id: Uuid) {
        let gone = self.mirrors.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(gone) = gone {
            self.tell_mirror(&gone, Change::Deleted);
        }
        self.changed();
    }

    // Migrations.

    pub fn migration_entry(&self, id: Uuid) -> Option<Arc<MigrationEntry>> {
        self.migrations.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub fn migration_entries(&self) -> Vec<Arc<MigrationEntry>> {
        self.migrations.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Adds a migration that was stored.
    pub fn add_migration(&self, entry: Arc<MigrationEntry>, is_new: bool) {
        if is_new {
            let record = entry.record();
            self.events.migration(&record, self.labels_of(record.guest), Change::Created);
        }
        self.migrations.write().unwrap_or_else(PoisonError::into_inner).insert(entry.id, entry);
        self.changed();
    }

    /// Something of a migration changed: tells what is worth an event.
    pub fn migration_changed(&self, id: Uuid) {
        if let Some(entry) = self.migration_entry(id) {
            entry.tell(|record, change| {
                self.events.migration(record, self.labels_of(record.guest), change);
            });
        }
        self.changed();
    }

    pub fn store_migration(&self, record: &MigrationRecord) -> Result<(), HostError> {
        self.store
            .put(Kind::Migration, record.id, None, record)
            .map_err(|e| HostError::internal("storing the migration", e))
    }

    pub fn forget_migration(&self, id: Uuid) {
        let gone = self.migrations.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(gone) = gone {
            let record = gone.record();
            self.events.migration(&record, self.labels_of(record.guest), Change::Deleted);
        }
        self.changed();
    }

    // Peers.

    pub fn peers(&self) -> RwLockReadGuard<'_, HashMap<Uuid, PeerRecord>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn peers_mut(&self) -> RwLockWriteGuard<'_, HashMap<Uuid, PeerRecord>> {
        self.peers.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn find_peer(&self, key: &str) -> Result<PeerRecord, HostError> {
        let peers = self.peers();
        let by_id = Uuid::try_parse(key).ok().and_then(|id| peers.get(&id));
        by_id
            .or_else(|| peers.values().find(|p| p.spec.name == key))
            .cloned()
            .ok_or_else(|| HostError::NotFound { kind: "host", key: key.chars().take(80).collect() })
    }

    /// Sessions that wait for their streams.
    pub fn streams(&self) -> MutexGuard<'_, HashMap<Uuid, WaitingImport>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes of helper images go one after the other.
    pub fn images_lock(&self) -> MutexGuard<'_, ()> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Making things.

    /// A guest's layout with the helper's block.
    pub fn layout_for(&self, driver: &DriverSpec, bare: &GuestLayout) -> Result<GuestLayout, HostError> {
        let size = HelperPlacement::block_size(self.image.header(), bare)
            .ok_or(HostError::NoResources { what: "helper memory", source: None })?;
        let layout = match driver {
            DriverSpec::Embedded { .. } => bare.with_helper(size, true),
            DriverSpec::Qemu { .. } => {
                let from = bare.ram_end().checked_add(QEMU_RESERVED).unwrap_or(bare.ram_end());
                bare.with_helper_after(from, size, false)
            }
        };
        layout.map_err(|mut e| HostError::internal("placing the helper's block", e.swap_remove(0)))
    }

    /// A machine for a guest, paused: booted afresh, or (`incoming`) waiting for memory and state.
    pub fn make_machine(
        &self,
        record: &GuestRecord,
        entry: &GuestEntry,
        incoming: Option<IncomingMachine<'_>>,
    ) -> Result<(Box<dyn Machine>, GuestLayout), MachineError> {
        let ram = GuestRam::allocate(Arc::new(record.layout.clone()))?;
        let boot = incoming.is_none();
        let machine_type = incoming.as_ref().and_then(|i| i.machine_type).map(str::to_owned);
        let secret = match incoming {
            Some(i) => i.secret,
            None => fresh_secret()?,
        };
        match &record.spec.driver {
            DriverSpec::Embedded { vcpus, workload } => {
                let kvm =
                    self.kvm.as_ref().map_err(|_| MachineError::Unsupported { what: "run without KVM" })?;
                let spec = EmbeddedSpec {
                    vcpus: *vcpus,
                    fill: workload.fill == Fill::Random,
                    working_set: workload.working_set_bytes,
                    dirty_bytes_per_second: workload.dirty_bytes_per_second,
                };
                let sender = entry.sender();
                let on_end = Arc::new(move |end| {
                    // Full queue or gone guest: the owner looks after its machine by itself, too.
                    let _ = sender.try_send(Command::Ended(end));
                });
                let name: String = record.spec.name.chars().take(8).collect();
                let helper_image = self.image.bytes();
                let setup = EmbeddedSetup { name: &name, ram, helper_image, secret, boot, on_end };
                let machine = Embedded::new(kvm, &spec, setup)?;
                Ok((Box::new(machine), record.layout.clone()))
            }
            DriverSpec::Qemu { vcpus, kernel, initrd, append, accel } => {
                let spec = QemuMachineSpec {
                    binary: qemu_binary().ok_or(MachineError::Unsupported { what: "find QEMU" })?,
                    machine_type: machine_type.unwrap_or_else(|| "pc".into()),
                    accel: choose_accel(*accel),
                    vcpus: *vcpus,
                    kernel: kernel.clone(),
                    initrd: initrd.clone(),
                    append: append.clone(),
                    run_dir: self.run_dir(record.id)?,
                    incoming: !boot,
                };
                let mut machine = QemuMachine::launch(&spec, ram, secret)?;
                let layout = if boot { machine.true_layout(&record.layout)? } else { record.layout.clone() };
                Ok((Box::new(machine), layout))
            }
        }
    }

    /// A mirror of a machine.
    pub fn make_mirror(
        &self,
        record: &GuestRecord,
        machine: &dyn Machine,
        strategy: Strategy,
        workers: u32,
    ) -> Result<Mirror, HostError> {
        let kvm = self.need_kvm()?;
        let plan = self.plan(&record.layout, strategy, workers, None)?;
        let name: String = record.spec.name.chars().take(8).collect();
        let secret = machine.migration_secret();
        Mirror::launch(kvm, &name, Arc::new(plan), machine.ram(), &self.image, secret).map_err(|e| match e {
            MirrorError::Memory(MemoryError::NotEnough { .. }) => {
                HostError::NoResources { what: "memory", source: Some(Box::new(e)) }
            }
            e => HostError::internal("making the mirror", e),
        })
    }

    /// Plans an address space.
    pub fn plan(
        &self,
        layout: &GuestLayout,
        strategy: Strategy,
        workers: u32,
        limits: Option<HostLimits>,
    ) -> Result<MirrorPlan, HostError> {
        let limits = limits.unwrap_or_else(|| self.limits());
        let size = MailboxSize { workers, slots: SLOTS };
        address_space::plan(layout, self.image.header(), &limits, strategy, size)
            .map_err(HostError::PlanRefused)
    }

    /// A private directory for a guest's process.
    fn run_dir(&self, guest: Uuid) -> Result<PathBuf, MachineError> {
        let dir = self.state_dir.join("run").join(guest.simple().to_string());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(MachineError::Thread)?;
        Ok(dir)
    }
}

/// The database's secret, made when there is none. Without storage a fresh one: what it marked is then refused.
fn page_secret(store: &Store) -> [u8; 32] {
    if let Ok(Some(stored)) = store.meta_get::<[u8; 32]>("page_secret") {
        return stored;
    }
    let fresh = fresh_secret().map_or_else(|_| [0; 32], |s| *s);
    if let Err(error) = store.meta_put("page_secret", &fresh) {
        tracing::error!(%error, "the secret of page tokens could not be stored");
    }
    fresh
}

/// 32 random bytes.
fn fresh_secret() -> Result<Zeroizing<[u8; 32]>, MachineError> {
    use ring::rand::SecureRandom;
    let mut secret = Zeroizing::new([0; 32]);
    ring::rand::SystemRandom::new()
        .fill(secret.as_mut())
        .map_err(|_| MachineError::Unsupported { what: "get random numbers" })?;
    Ok(secret)
}

/// Where QEMU is, when it is.
pub(super) fn qemu_binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|p| p.is_file())
}

fn choose_accel(choice: AccelChoice) -> qemu::Accel {
    match choice {
        AccelChoice::Auto => qemu::pick_accel().0,
        AccelChoice::Kvm => qemu::Accel::Kvm,
        AccelChoice::Tcg => qemu::Accel::Tcg,
    }
}
