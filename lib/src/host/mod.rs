//! A host: everything one daemon manages. The library's front door.
//!
//! Owns: registries of guests, mirrors, migrations and peers, their durable records, and who may do what
//! when. Must not know: HTTP, JSON bodies, users. Each guest has one owning task; each migration one thread.

mod act;
mod ask;
pub mod bounds;
mod capabilities;
mod codes;
mod error;
pub mod events;
mod expected;
mod faults;
mod guests;
mod images;
mod inner;
pub mod lists;
mod machines;
mod mentions;
mod migrations;
mod mirrors;
mod open;
mod peers;
mod registry;
mod settings;
mod state_files;
mod stored;
mod subject;
mod validate;

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::private_files::{PrivateDir, PrivateFileError};
use crate::store::Ledger;
use crate::sync::Locked;
use crate::transport::{Advertised, PeerListener};

pub use act::{Act, Along, Effect, Riding};
pub use ask::Ask;
pub use capabilities::{Capabilities, HostInfo};
pub use error::{FieldError, HostError};
pub use events::ResourceKind;
pub use expected::Expected;
pub use faults::Fault;
pub use guests::types::*;
pub use images::types::*;
pub use inner::HostPlatformKey;
pub use machines::PlanOptions;
pub use migrations::checks::{Estimate, MigrationCheck};
pub use migrations::findings::Finding;
pub use migrations::resolution::{REASON_MAX, is_reason};
pub use migrations::ticket::{TICKET_MAX, Ticket, TicketSpec};
pub use migrations::types::*;
pub use mirrors::batches::{BatchRefusal, ExportSpec, ImportReport, ImportStep, SealedBatch};
pub use mirrors::types::*;
pub use open::{HostConfig, OpenError, accept_identity, node_name};
pub use peers::probe::{PeerAnswer, PeerSilence};
pub use peers::types::*;
pub use settings::HostSettings;
pub use state_files::{StateRestored, accept_state, backup_state, check_state, restore_state};
pub use stored::renew;
pub use subject::Subject;
pub use validate::{NAME_RULE, is_name, parts_of_guest, parts_of_peer, parts_of_placement};

use events::{Change, Events};
use guests::command::Command;
use inner::Inner;

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
        self.inner.audits.give_up(NotRun::ShuttingDown, |_| true);
        // Those that wait in the queue look again.
        self.inner.changed();
        let listener = self.listener.locked().take();
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

    /// What a look at a list gives, and the event from which on whoever follows learns of everything that
    /// changes it. That is from before the look: what comes in between is told again rather than never.
    pub fn listed<T>(&self, look: impl FnOnce(&Self) -> T) -> (T, events::EventCursor) {
        let latest = self.inner.events.latest();
        (look(self), latest)
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
}
