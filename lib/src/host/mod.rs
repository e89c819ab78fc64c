//! A host: everything one daemon manages. The library's front door.
//!
//! Owns: registries of guests, mirrors, migrations and peers, their durable records, and who may do what
//! when. Must not know: HTTP, JSON bodies, users. Each guest has one owning task; each migration one thread.

mod act;
pub mod bounds;
mod capabilities;
mod changes;
mod error;
pub mod events;
mod expected;
mod guests;
mod images;
mod inner;
mod machines;
mod migrations;
mod mirrors;
mod open;
mod settings;
mod state_files;
mod types;
mod validate;

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;
use uuid::Uuid;

use crate::addr::{Gpa, RamAddr};
use crate::address_space::{MirrorPlan, Plug, Strategy};
use crate::guest::{EncryptionStatus, MachineEnd, MachineError, PlugError, StatusError, StatusExtent};
use crate::memory::MemoryError;
use crate::mirror::PlacementError;
use crate::private_files::{PrivateDir, PrivateFileError};
use crate::store::{Ledger, Trouble};
use crate::transport::{Advertised, PeerListener};

pub use act::{Act, Along, Effect, Riding};
pub use changes::MigrationPreview;
pub use error::{FieldError, HostError};
pub use expected::Expected;
pub use images::files::ImageFault;
pub use images::{BUILT_IN_ID, ContentError, ImageFacts, ImageRecord};
pub use machines::PlanOptions;
pub use migrations::checks::{Estimate, Finding, GuestStats, MigrationCheck, PeerAnswer, PeerSilence};
pub use migrations::resolution::{REASON_MAX, is_reason};
pub use migrations::tickets::{TICKET_MAX, Ticket, TicketSpec};
pub use mirrors::batches::{BatchRefusal, ExportSpec, ImportReport, ImportStep, SealedBatch};
pub use open::{HostConfig, OpenError, accept_identity};
pub use settings::HostSettings;
pub use state_files::{StateRestored, accept_state, backup_state, check_state, restore_state};
pub use types::*;
pub use validate::{NAME_RULE, is_name};

use events::{Change, Events};
use guests::task::Command;
use inner::Inner;

/// What is done to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAction {
    /// `stopped` to `running`.
    Start,
    /// `running` to `paused`.
    Pause,
    /// `paused` to `running`.
    Resume,
    /// To `stopped`; memory is gone.
    Stop,
    /// Makes an unconfirmed guest this host's, whatever its peers would have said.
    Confirm,
}

/// Handle to a host; cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
    listener: Arc<Mutex<Option<PeerListener>>>,
    advertise: Option<Advertised>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

impl Host {
    /// Ends what runs: migrations before START are called off, guests are stopped, peers are cut.
    pub async fn shutdown(&self) {
        self.inner.stop_accepting();
        self.inner.events.host(self.inner.id, &self.inner.name, Change::Stopping);
        for m in self.inner.migration_entries() {
            let _ = m.control.cancel();
        }
        // Those that wait in the queue look again.
        self.inner.changed();
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = tokio::task::spawn_blocking(move || drop(listener)).await;
        let all: Vec<_> = self.inner.guests().values().cloned().collect();
        for guest in all {
            // A migration may have the machine for a moment longer: it gives it back before it ends.
            while guest.record().migration.is_some() && guest.record().state != GuestState::InDoubt {
                let mut changes = self.inner.changes();
                let waited =
                    tokio::time::timeout(std::time::Duration::from_secs(10), changes.changed()).await;
                if waited.is_err() {
                    break;
                }
            }
            let (done, gone) = tokio::sync::oneshot::channel();
            if guest.tell(Command::Shutdown(done)).await {
                let _ = gone.await;
            }
        }
        self.inner.ledger.flush().await;
    }

    /// Defines a guest.
    ///
    /// # Errors
    /// Values that cannot be, a name that is taken, storage.
    pub async fn define_guest(&self, spec: GuestSpec) -> Result<GuestRecord, HostError> {
        self.define_guest_as(None, spec).await
    }

    /// One guest, by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn guest(&self, key: &str) -> Result<GuestRecord, HostError> {
        self.inner.find_guest(key).map(|g| g.record())
    }

    /// All guests by creation.
    pub fn guests(&self) -> Vec<Arc<GuestRecord>> {
        let mut list: Vec<_> = self.inner.guests().values().map(|g| g.shown()).collect();
        list.sort_by_key(|r| (r.created_at, r.id));
        list
    }

    /// Asks for an action; returns as soon as it is accepted (the state says how it goes on). Idempotent in
    /// effect: starting a running guest returns it as it is.
    ///
    /// # Errors
    /// A state in which the action makes no sense, a migration that has the guest, a host without KVM or
    /// QEMU.
    pub async fn guest_action(&self, key: &str, action: GuestAction) -> Result<GuestRecord, HostError> {
        self.guest_action_at(key, action, Expected::any()).await
    }

    fn check_driver(&self, driver: &DriverSpec) -> Result<(), HostError> {
        match driver {
            DriverSpec::Embedded { .. } | DriverSpec::Emulated { .. } => self.inner.check_driver(driver),
            DriverSpec::Qemu { .. } if inner::qemu_binary().is_none() => {
                let why = "qemu-system-x86_64 is not on the PATH".to_owned();
                Err(HostError::CapabilityMissing { what: "qemu", why })
            }
            DriverSpec::Qemu { .. } => Ok(()),
        }
    }

    /// Undefines a stopped or failed guest.
    ///
    /// # Errors
    /// Another state, or a migration that has it.
    pub async fn delete_guest(&self, key: &str) -> Result<(), HostError> {
        self.delete_guest_at(key, Expected::any()).await
    }

    /// Console output from `offset` (`None`: the oldest kept), at most `max` bytes.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn console(&self, key: &str, offset: Option<u64>, max: usize) -> Result<ConsoleChunk, HostError> {
        Ok(self.inner.find_guest(key)?.console(offset, max))
    }

    /// RAM blocks with their encryption status.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn ram_blocks(&self, key: &str) -> Result<Vec<RamBlockInfo>, HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        let live = matches!(record.state, GuestState::Running | GuestState::Paused | GuestState::InDoubt);
        let shared = guest.encryption().filter(|_| live).map(|e| e.shared());
        let backings = guest.backings().filter(|_| live);
        let blocks = record.layout.blocks().iter().enumerate().map(|(i, block)| {
            let backing = backings.as_ref().and_then(|b| b.get(i).copied());
            let backing = backing.unwrap_or_else(|| machines::backing_of(&record));
            let range = block.ram_range();
            let shared_pages =
                shared.as_ref().map(|s| s.iter().filter(|p| range.contains(p.get() * 4096)).count() as u64);
            let shared_bytes = shared_pages.map_or(0, |n| n * 4096);
            RamBlockInfo {
                block: block.clone(),
                backing,
                page_size: backing.page_size(),
                private_bytes: if live { block.size - shared_bytes } else { 0 },
                shared_bytes,
                unknown_bytes: if live { 0 } else { block.size },
            }
        });
        Ok(blocks.collect())
    }

    /// Plans an address space; changes nothing.
    ///
    /// # Errors
    /// Every refusal.
    pub fn plan(
        &self,
        key: &str,
        strategy: Strategy,
        workers: u32,
        options: &PlanOptions,
    ) -> Result<MirrorPlan, HostError> {
        let guest = self.inner.find_guest(key)?;
        validate::mirror(&MirrorSpec {
            guest: String::new(),
            strategy,
            workers,
            options: MirrorOptions::default(),
        })?;
        self.inner.plan(&guest, strategy, workers, options)
    }

    /// Gives an unplugged RAM block an address, while the guest runs or is paused.
    ///
    /// # Errors
    /// No such guest or block, another state, [`HostError::PlugRefused`]; a migration that has the guest.
    pub async fn plug(&self, key: &str, block: &str, gpa: Gpa) -> Result<RamBlockInfo, HostError> {
        self.replug(key, block, Some(gpa)).await
    }

    /// Takes a RAM block's address away when the guest has let go of it; its content and encryption status
    /// stay.
    ///
    /// # Errors
    /// As [`Host::plug`].
    pub async fn unplug(&self, key: &str, block: &str) -> Result<RamBlockInfo, HostError> {
        self.replug(key, block, None).await
    }

    /// What a block would be like when it is plugged at `gpa`, or unplugged; changes nothing. Whether the
    /// guest lets go of it only the guest can tell.
    ///
    /// # Errors
    /// As [`Host::plug`].
    pub fn preview_replug(&self, key: &str, name: &str, gpa: Option<Gpa>) -> Result<RamBlockInfo, HostError> {
        let record = self.guest(key)?;
        let missing = || HostError::NotFound { kind: "RAM block", key: name.chars().take(80).collect() };
        let block = record.layout.block(name).ok_or_else(missing)?;
        let plugs = gpa.map(|gpa| Plug { offset: 0, gpa, len: block.size }).into_iter().collect();
        if let (Some(gpa), [p, ..]) = (gpa, block.plugs.as_slice())
            && p.gpa != gpa
        {
            return Err(HostError::PlugRefused(PlugError::Elsewhere { gpa: p.gpa }));
        }
        let layout = record.layout.with_plugs(name, plugs);
        let layout = layout.map_err(|mut e| HostError::PlugRefused(PlugError::Layout(e.swap_remove(0))))?;
        let mut info =
            self.ram_blocks(key)?.into_iter().find(|b| b.block.name == name).ok_or_else(missing)?;
        info.block = layout.block(name).ok_or_else(missing)?.clone();
        Ok(info)
    }

    async fn replug(&self, key: &str, block: &str, gpa: Option<Gpa>) -> Result<RamBlockInfo, HostError> {
        let guest = self.inner.find_guest(key)?;
        let name = block.to_owned();
        guest.ask(|reply| Command::Replug { block: name, gpa, reply }).await?;
        self.ram_block(key, block)
    }

    /// Runs of pages with one encryption status, by `RamAddr` from `from` on, unplugged RAM included, at most
    /// `max`; `None` while the guest has no machine and nothing is known.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn encryption_extents(
        &self,
        key: &str,
        from: RamAddr,
        max: usize,
    ) -> Result<Option<Vec<StatusExtent>>, HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        let live = matches!(record.state, GuestState::Running | GuestState::Paused | GuestState::InDoubt);
        Ok(guest.encryption().filter(|_| live).map(|e| e.extents(&record.layout, from, max)))
    }

    /// Takes a report of page status as a guest makes it: what a KVM_HC_MAP_GPA_RANGE would say. All or
    /// nothing.
    ///
    /// # Errors
    /// A guest without machine, a range that is not all its RAM, a migration that has the guest.
    pub fn report_encryption(
        &self,
        key: &str,
        gpa: Gpa,
        pages: u64,
        private: bool,
        dry_run: bool,
    ) -> Result<(), HostError> {
        let guest = self.inner.find_guest(key)?;
        let record = guest.record();
        if let Some(migration) = record.migration {
            return Err(HostError::GuestMigrating { migration });
        }
        let status =
            guest.encryption().filter(|_| matches!(record.state, GuestState::Running | GuestState::Paused));
        let status = status.ok_or(HostError::WrongState {
            kind: "guest",
            current: record.state.name(),
            allowed: &["running", "paused"],
        })?;
        let bad =
            |e: StatusError| HostError::Invalid(vec![FieldError::new("/gpa", "not_ram", e.to_string())]);
        if dry_run {
            return EncryptionStatus::default().report(&record.layout, gpa, pages, private).map_err(bad);
        }
        status.report(&record.layout, gpa, pages, private).map_err(bad)?;
        self.inner.changed();
        Ok(())
    }

    /// Makes a mirror of a running or paused guest; returns when the helper is ready.
    ///
    /// # Errors
    /// A guest that does not run, has a mirror already or is migrating; refusals; KVM.
    pub async fn create_mirror(&self, spec: MirrorSpec) -> Result<MirrorRecord, HostError> {
        self.create_mirror_as(None, spec).await
    }

    /// One mirror.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn mirror(&self, id: Uuid) -> Result<MirrorRecord, HostError> {
        let missing = || HostError::NotFound { kind: "mirror", key: id.to_string() };
        self.inner.mirror_entry(id).map(|m| m.record()).ok_or_else(missing)
    }

    /// All mirrors by creation.
    pub fn mirrors(&self) -> Vec<MirrorRecord> {
        let mut list: Vec<_> = self.inner.mirror_entries().iter().map(|m| m.record()).collect();
        list.sort_by_key(|r| r.id);
        list
    }

    /// Removes a mirror that no migration has.
    ///
    /// # Errors
    /// No such mirror, or in use.
    pub async fn delete_mirror(&self, id: Uuid) -> Result<(), HostError> {
        self.delete_mirror_at(id, Expected::any()).await
    }

    /// Starts a migration; returns when it is recorded.
    ///
    /// # Errors
    /// Values that cannot be, unknown guest or peer, a state that does not allow it, refusals of the planner.
    pub async fn create_migration(&self, spec: MigrationSpec) -> Result<MigrationRecord, HostError> {
        self.create_migration_as(None, spec).await
    }

    /// One migration.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn migration(&self, id: Uuid) -> Result<MigrationRecord, HostError> {
        self.migration_entry(id).map(|m| m.record())
    }

    /// All migrations by creation.
    pub fn migrations(&self) -> Vec<MigrationRecord> {
        let mut list: Vec<_> = self.inner.migration_entries().iter().map(|m| m.record()).collect();
        list.sort_by_key(|r| (r.created_at, r.id));
        list
    }

    /// Asks for cancellation; the outcome is in the record's state. Ended already: the record as it is.
    ///
    /// # Errors
    /// [`HostError::PastPointOfNoReturn`] once START may have gone out.
    pub async fn cancel_migration(&self, id: Uuid) -> Result<MigrationRecord, HostError> {
        self.cancel(id, &Expected::any())
    }

    fn cancel(&self, id: Uuid, expected: &Expected) -> Result<MigrationRecord, HostError> {
        let entry = self.migration_entry(id)?;
        let asked = entry.hold(|record| {
            expected.check("migration", record.generation)?;
            if record.state.is_terminal() {
                return Ok(false);
            }
            entry.control.cancel().map(|()| true).map_err(|_| HostError::PastPointOfNoReturn)
        })?;
        if !asked {
            return Ok(entry.record());
        }
        // Asked for is asked for, whatever the disk takes: the record says so when it next gets there.
        let record = entry.change(|r| {
            r.cancel_requested_at.get_or_insert(Timestamp::now());
        });
        self.inner.changed();
        Ok(record)
    }

    /// Forgets a migration that has ended.
    ///
    /// # Errors
    /// It has not.
    pub async fn delete_migration(&self, id: Uuid) -> Result<(), HostError> {
        self.delete_migration_at(id, &Expected::any()).await
    }

    /// Digests of every page at the pause point, of a migration with `verify`.
    ///
    /// # Errors
    /// [`HostError::NotFound`] without.
    pub fn page_digests(&self, id: Uuid) -> Result<Arc<PageDigests>, HostError> {
        let missing = || HostError::NotFound { kind: "page digests of migration", key: id.to_string() };
        self.migration_entry(id)?.page_digests().ok_or_else(missing)
    }

    /// Adds a peer.
    ///
    /// # Errors
    /// Values that cannot be, a name that is taken, storage.
    pub async fn add_peer(&self, spec: PeerSpec) -> Result<PeerRecord, HostError> {
        self.add_peer_as(None, spec).await
    }

    /// One peer by id or name.
    ///
    /// # Errors
    /// [`HostError::NotFound`].
    pub fn peer(&self, key: &str) -> Result<PeerRecord, HostError> {
        self.inner.find_peer(key)
    }

    /// All peers by creation.
    pub fn peers(&self) -> Vec<PeerRecord> {
        let mut list: Vec<_> = self.inner.peers().values().cloned().collect();
        list.sort_by_key(|p| p.id);
        list
    }

    /// Forgets a peer that no active migration uses.
    ///
    /// # Errors
    /// No such peer, or in use.
    pub async fn delete_peer(&self, key: &str) -> Result<(), HostError> {
        self.delete_peer_at(key, &Expected::any(), true).await.map(|_| ())
    }

    /// What happened here.
    pub fn events(&self) -> &Events {
        &self.inner.events
    }

    /// Logs and keyed records beside the resources, for those who serve this host.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.inner.ledger
    }

    /// Puts a file that the daemon's user alone may read into the state directory, in place of one of that
    /// name.
    ///
    /// # Errors
    /// [`PrivateFileError`]: the directory is not the daemon's own any more, or the system refuses.
    pub fn replace_private_file(&self, name: &str, bytes: &[u8]) -> Result<(), PrivateFileError> {
        PrivateDir::open(&self.inner.state_dir)?.replace(name, bytes)
    }

    /// Removes a file of [`Host::replace_private_file`], content with there being none.
    ///
    /// # Errors
    /// [`PrivateFileError`].
    pub fn remove_private_file(&self, name: &str) -> Result<(), PrivateFileError> {
        PrivateDir::open(&self.inner.state_dir)?.remove_if_present(name)
    }

    /// A number that goes up with every change of any resource; for long polls.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes()
    }

    fn migration_entry(&self, id: Uuid) -> Result<Arc<migrations::entry::MigrationEntry>, HostError> {
        let missing = || HostError::NotFound { kind: "migration", key: id.to_string() };
        self.inner.migration_entry(id).ok_or_else(missing)
    }
}

/// Why threads are not where a caller wants them.
fn placement_error(e: PlacementError) -> HostError {
    match e {
        PlacementError::NoSuchCpu => {
            HostError::Invalid(vec![FieldError::new("/placement/cpus", "out_of_range", e.to_string())])
        }
        PlacementError::Forbidden => {
            HostError::CapabilityMissing { what: "scheduling of threads", why: e.to_string() }
        }
        PlacementError::Kernel(_) => HostError::internal("placing a mirror's threads", e),
    }
}

/// An error with its causes, for the log.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text.push_str(": ");
        text.push_str(&e.to_string());
        next = e.source();
    }
    text
}

/// A machine's error as a guest's record shows it.
fn machine_fault(e: &MachineError) -> Fault {
    let code = match e {
        MachineError::Memory(_) => "no_memory",
        MachineError::TooSmall { .. } | MachineError::NothingPlugged => "layout_unusable",
        MachineError::Ended(_) => "guest_ended",
        MachineError::Unsupported { .. } => "capability_missing",
        MachineError::BootFile { .. } => "boot_file_unusable",
        MachineError::BootFileChanged { .. } => "boot_file_changed",
        MachineError::NoUser => "no_resources",
        MachineError::Qemu(e) if e.is_want_of_memory() => "no_memory",
        MachineError::Qemu(_) => "qemu_failed",
        MachineError::Measurement => "launch_measurement",
        MachineError::Sev(_) => "sev_refused",
        MachineError::Plug(_)
        | MachineError::Hypervisor(_)
        | MachineError::HelperImage(_)
        | MachineError::BadState { .. }
        | MachineError::Thread(_) => "machine_failed",
    };
    let detail = match e {
        MachineError::Memory(MemoryError::NotEnough(shortage)) => shortage.to_string(),
        MachineError::Qemu(e) => format!("QEMU did not do as told: {}", e.told()),
        e => e.to_string(),
    };
    Fault { code: code.into(), detail }
}

/// What ended a guest by itself, as its record shows it.
fn end_fault(end: &MachineEnd) -> Fault {
    let (code, detail) = match end {
        MachineEnd::PowerOff => ("guest_powered_off", "the guest switched itself off".to_owned()),
        MachineEnd::Reset => (
            "guest_reset",
            "the guest asked for a reset (a reboot, a panic that reboots, or a triple fault), and a reset ends it as long as \
             machines cannot be reset: start it again"
                .to_owned(),
        ),
        MachineEnd::Panicked => ("guest_panicked", "the guest's operating system panicked".to_owned()),
        MachineEnd::Crashed { .. } => ("guest_crashed", end.to_string()),
        MachineEnd::Exited { .. } => ("qemu_failed", end.to_string()),
    };
    Fault { code: code.into(), detail }
}

/// A host's error as a migration's record shows it.
fn host_fault(e: &HostError) -> Fault {
    let code = match e {
        HostError::NotFound { .. } => "not_found",
        HostError::DestinationIsSelf => "destination_is_self",
        HostError::DestinationRefuses(_) => "destination_refuses",
        HostError::PeerSilent(_) => "peer_failed",
        HostError::GuestMigrating { .. } => "guest_migrating",
        HostError::GuestUnconfirmed { .. } => "guest_unconfirmed",
        HostError::WrongState { .. } => "state_conflict",
        HostError::InUse { .. } => "in_use",
        HostError::PlanRefused(_) => "plan_refused",
        HostError::NoMemory(_) => "no_memory",
        HostError::NoResources { .. } => "no_resources",
        HostError::CapabilityMissing { .. } => "capability_missing",
        HostError::Invalid(_) => "invalid",
        HostError::PolicyForbids { .. } => "policy_forbids",
        HostError::MirrorAtLaunch => "mirror_at_launch",
        HostError::NotLaunched { .. } | HostError::ImageNotLaunched => "helper_not_launched",
        HostError::ImageFailed { .. } => "helper_image_failed",
        HostError::GuestNotReady { .. } => "guest_not_ready",
        HostError::PlugRefused(_)
        | HostError::BatchRefused(_)
        | HostError::NameTaken { .. }
        | HostError::GuestMoved { .. }
        | HostError::GenerationMismatch { .. }
        | HostError::IdTaken { .. }
        | HostError::Maintenance
        | HostError::PastPointOfNoReturn
        | HostError::ShuttingDown
        | HostError::Internal { .. } => "mirror_failed",
        HostError::Storage { trouble: Trouble::Full, .. }
        | HostError::Owed { trouble: Trouble::Full, .. } => "storage_full",
        HostError::Storage { trouble: Trouble::Busy, .. }
        | HostError::Owed { trouble: Trouble::Busy, .. } => "storage_busy",
        HostError::Storage { trouble: Trouble::Failed, .. }
        | HostError::Owed { trouble: Trouble::Failed, .. } => "storage_failed",
    };
    Fault { code: code.into(), detail: e.to_string() }
}
