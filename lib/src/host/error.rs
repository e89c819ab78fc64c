//! Why a request to a host did not work. One variant per kind of answer; `codes` has the codes of each.

use uuid::Uuid;

use super::images::types::ImageFault;
use super::{ResourceKind, Subject};
use crate::address_space::Refusal;
use crate::codes::Capability;
use crate::guest::PlugError;
use crate::memory::{MemoryError, Shortage};
pub use crate::reading::FieldError;
use crate::store::{StoreError, Trouble};

/// Why a request did not work. `Display` is fit for the caller: no paths, no addresses, no secrets.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such resource.
    #[error("there is no {kind} {key:?}")]
    NotFound {
        /// What it would be.
        kind: Subject,
        /// The id or name that was asked for.
        key: String,
    },
    /// The name is taken.
    #[error("the {kind} name {name:?} is taken")]
    NameTaken {
        /// What has a name.
        kind: ResourceKind,
        /// The name.
        name: String,
    },
    /// Values that cannot be.
    #[error("{}", FieldError::list(.0))]
    Invalid(Vec<FieldError>),
    /// The action does not fit the resource's state.
    #[error("the {kind} is {current}; this needs {}", allowed.join(" or "))]
    WrongState {
        /// What has a state.
        kind: Subject,
        /// Its state.
        current: &'static str,
        /// States in which the action works.
        allowed: &'static [&'static str],
    },
    /// A migration has the guest.
    #[error("migration {migration} has the guest")]
    GuestMigrating {
        /// Which.
        migration: Uuid,
    },
    /// The host's state may be older than what its peers know of the guest.
    #[error(
        "the guest is unconfirmed: the host's state was put back from a backup or had lost something, and not all known peers \
         have said that they do not have the guest{}",
        missing.iter().map(|m| format!("; {m}")).collect::<String>()
    )]
    GuestUnconfirmed {
        /// What is missing, as of the last time that the peers were asked.
        missing: Vec<String>,
    },
    /// The resource is not at the generation that the caller expects.
    #[error("the {kind} is at generation {generation}")]
    GenerationMismatch {
        /// What has a generation.
        kind: ResourceKind,
        /// Where it is.
        generation: u64,
    },
    /// The host takes nothing new.
    #[error("the host is in maintenance")]
    Maintenance,
    /// Another resource has the id that the caller chose.
    #[error("there is another {kind} with this id")]
    IdTaken {
        /// What has an id.
        kind: ResourceKind,
    },
    /// The guest was handed over to another host.
    #[error("the guest was handed over to {peer}")]
    GuestMoved {
        /// Where it runs.
        peer: String,
    },
    /// Something else uses the resource.
    #[error("{user} uses the {kind}")]
    InUse {
        /// What is used.
        kind: ResourceKind,
        /// Who uses it.
        user: String,
    },
    /// No guest of the driver can start in RAM that is laid out as the definition has it.
    #[error("the guest cannot start in its RAM: {why}")]
    LayoutUnusable {
        /// What is wrong with it, with the numbers.
        why: String,
    },
    /// The migration cannot be called off any more.
    #[error("START has gone out; the destination may already run the guest")]
    PastPointOfNoReturn,
    /// A migration to the host that the guest is on.
    #[error("the destination is this host itself, under another name or address")]
    DestinationIsSelf,
    /// The destination would not let the migration in.
    #[error("the destination refuses: {}", .0.iter().map(|f| f.detail.as_str()).collect::<Vec<_>>().join("; "))]
    DestinationRefuses(Vec<super::Finding>),
    /// The destination does not answer as it should.
    #[error("{}: {}", .0.code, .0.detail)]
    PeerSilent(super::PeerSilence),
    /// The planner refuses.
    #[error("the address space cannot be laid out: {} refusals", .0.len())]
    PlanRefused(Vec<Refusal>),
    /// The guest's policy forbids it.
    #[error("the guest's policy forbids it: {why}")]
    PolicyForbids {
        /// Which bit, and why it matters.
        why: String,
    },
    /// The mirror of an SEV-ES guest comes with the guest's launch.
    #[error(
        "the mirror of an SEV-ES guest is made with the guest, because its vCPUs are measured before the launch ends: \
         name the one that is wanted in driver.sev.mirror and start the guest anew"
    )]
    MirrorAtLaunch,
    /// An encrypted guest was launched without what this plan needs in its helper's memory.
    #[error(
        "the guest was not launched with the helper's page tables of this plan, and no host can write them now"
    )]
    NotLaunched {
        /// Offset in the helper's block.
        offset: u64,
    },
    /// An encrypted guest has the helper that it was launched with, and no other.
    #[error(
        "the guest was launched and measured with the built-in helper image; no host can load another now"
    )]
    ImageNotLaunched,
    /// What a helper image's file holds is not what was uploaded.
    #[error(
        "the helper image {name:?} cannot be used: {fault}; PUT the same content again, or delete the image and upload another"
    )]
    ImageFailed {
        /// The image's name.
        name: String,
        /// What is wrong.
        fault: ImageFault,
    },
    /// An importing helper does not take a sealed batch; the import is over.
    #[error("the helper does not take the batch; the import is over")]
    BatchRefused(super::BatchRefusal),
    /// The guest does not say that it can be migrated.
    #[error("the guest is not ready to be migrated: {why}")]
    GuestNotReady {
        /// Why, by its MSR.
        why: &'static str,
    },
    /// A RAM block could not be plugged or unplugged.
    #[error("the RAM block cannot be plugged or unplugged")]
    PlugRefused(#[source] PlugError),
    /// This host cannot do it.
    #[error("this host lacks {what}: {why}")]
    CapabilityMissing {
        /// What is missing.
        what: Capability,
        /// Why.
        why: String,
    },
    /// There is not that much memory. Nothing was changed.
    #[error(transparent)]
    NoMemory(#[from] Shortage),
    /// The host has run out of something.
    #[error("the host has not enough {what}")]
    NoResources {
        /// `migration slots`, `helper memory`, ...
        what: &'static str,
        /// What happened.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The host shuts down.
    #[error("the host shuts down")]
    ShuttingDown,
    /// The database does not take what is to be stored. Nothing was changed.
    #[error("{what}: {}", trouble_text(*trouble))]
    Storage {
        /// What was tried.
        what: &'static str,
        /// What kind of trouble it is.
        trouble: Trouble,
        /// What happened.
        #[source]
        source: StoreError,
    },
    /// The change was made, and the database does not take the record of it yet.
    #[error("the change was made; its record is kept in memory and written as soon as the database takes it: {}",
        trouble_text(*trouble))]
    Owed {
        /// What kind of trouble it is.
        trouble: Trouble,
        /// What happened.
        #[source]
        source: StoreError,
    },
    /// A fault of the host: KVM, a bug. The chain is for the log.
    #[error("{what} failed")]
    Internal {
        /// What was tried.
        what: &'static str,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What is the matter, and what to do.
const fn trouble_text(trouble: Trouble) -> &'static str {
    match trouble {
        Trouble::Full => {
            "no space is left for the host's database; free some in the file system of the state directory"
        }
        Trouble::Busy => "another process keeps the host's database locked; end it, or wait until it is done",
        Trouble::Failed => {
            "the host's database cannot be read or written; look at the disk of the state directory"
        }
    }
}

/// How much of a name that nothing has is said again: callers may send long ones.
const KEY_SHOWN: usize = 80;

impl HostError {
    /// There is no such thing.
    pub fn missing(kind: impl Into<Subject>, key: impl AsRef<str>) -> Self {
        Self::NotFound { kind: kind.into(), key: key.as_ref().chars().take(KEY_SHOWN).collect() }
    }

    /// This host lacks something.
    pub fn lacks(what: impl Into<Capability>, why: impl Into<String>) -> Self {
        Self::CapabilityMissing { what: what.into(), why: why.into() }
    }

    /// What storing something came to.
    pub fn storage(what: &'static str, source: StoreError) -> Self {
        match source.trouble() {
            Some(trouble) => Self::Storage { what, trouble, source },
            None => Self::internal(what, source),
        }
    }

    /// What storing something that has happened came to.
    pub fn owed(source: StoreError) -> Self {
        match source.trouble() {
            Some(trouble) => Self::Owed { trouble, source },
            None => Self::internal("storing what happened", source),
        }
    }

    /// Why there is no memory for something.
    pub fn memory(what: &'static str, source: MemoryError) -> Self {
        match source {
            MemoryError::NotEnough(shortage) => Self::NoMemory(shortage),
            source @ (MemoryError::Size { .. } | MemoryError::System { .. } | MemoryError::Map { .. }) => {
                Self::internal(what, source)
            }
        }
    }

    /// Wraps a fault of the host.
    pub fn internal(what: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal { what, source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_cannot_be_are_named_with_their_fields() {
        let error = |n: usize| FieldError::new(format!("/f{n}"), "out_of_range", format!("{n} is too much"));
        let text = |errors: Vec<FieldError>| HostError::Invalid(errors).to_string();
        assert_eq!(text(vec![error(1)]), "/f1: 1 is too much");
        assert_eq!(text(vec![error(1), error(2)]), "/f1: 1 is too much; /f2: 2 is too much");
        assert!(text((0..20).map(error).collect()).ends_with("/f7: 7 is too much; and 12 more"));
        assert_eq!(text(vec![FieldError::new("", "x", "the whole")]), "the whole");
    }
}
