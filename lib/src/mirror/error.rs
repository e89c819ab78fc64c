//! Why a mirror could not be made, or its helper did not do as asked.

use mirrorvm_abi::{mailbox::Fatal, op::Status};

use crate::hypervisor::HypervisorError;
use crate::memory::MemoryError;
use crate::sev::{NotSent, SevError};

/// A helper's refusal in words.
pub(super) const fn reason(status: Status) -> &'static str {
    match status {
        Status::Ok => "it is done",
        Status::UnknownOp => "it has no such operation",
        Status::WrongState => "this is not the session's turn for it",
        Status::BadRequest => "a slot, count, length or parameter is out of range",
        Status::PageRefused => "a page is not guest RAM, or is the helper's own",
        Status::PageRepeated => "a page was there already in this epoch",
        Status::Unsealed => "a group does not open, or is not the next one",
        Status::Incomplete => "a token's totals or digests differ from what was seen",
        Status::Busy => "another worker is in the middle of a batch",
        Status::NoSecret => "the guest's secret was not delivered",
        Status::Exhausted => "a counter is used up",
        Status::PolicyForbids => "the guest's policy forbids it",
        Status::NoEntropy => "the processor gives no random numbers",
        Status::KeyRefused => "the peer's public key is one that gives nothing to agree on",
        Status::EvidenceRefused => "the evidence of the destination is missing or does not do",
    }
}

const fn last_words(fatal: Fatal) -> &'static str {
    match fatal {
        Fatal::Panic => "its code panicked",
        Fatal::BadConfig => "its configuration is of another ABI",
        Fatal::BadCursor => "the host's submission cursor is impossible",
        Fatal::NoEntropy => "the processor gives no random numbers",
    }
}

/// Why a mirror could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The hypervisor failed.
    #[error("the hypervisor refused")]
    Hypervisor(#[from] HypervisorError),
    /// Memory for the mailbox.
    #[error("memory for the mailbox could not be had")]
    Memory(#[from] MemoryError),
    /// The plan is for another guest's RAM.
    #[error("the plan does not fit the guest's RAM")]
    PlanMismatch,
    /// The SEV firmware or kernel refused.
    #[error("SEV refused")]
    Sev(#[from] SevError),
    /// The hypervisor has no SEV, the guest has.
    #[error("this hypervisor has no SEV")]
    NoSev,
    /// The guest's policy lacks NODBG.
    #[error("the guest's policy lacks NODBG: its host could read the guest through a mirror (DBG_DECRYPT)")]
    Debuggable,
    /// SEV-ES, and the guest's launch has ended.
    #[error(
        "the vCPUs of an SEV-ES guest's mirror are measured with the guest's launch, which has ended: the mirror is \
         made with the guest"
    )]
    AfterLaunch,
    /// The guest was launched without what this plan needs in the helper's memory, which no host can write
    /// any more.
    #[error("the guest was not launched with what this plan needs at offset {offset:#x} of its helper block")]
    NotLaunched {
        /// Offset in the helper's block.
        offset: u64,
    },
    /// The helper's private memory is not registered through the guest.
    #[error("unpinned encrypted memory: the helper's private memory is not registered through the guest")]
    Unpinned,
    /// This way of `psp-copied` is closed.
    #[error("psp-copied cannot go this way: {0}")]
    Via(NotSent),
    /// A thread could not be started.
    #[error("a worker thread could not be started")]
    Thread(#[source] std::io::Error),
    /// The helper did not get ready.
    #[error("the helper did not get ready")]
    NotReady(#[source] LaneError),
}

/// Why a worker does not run any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerEnd {
    /// The helper stopped itself.
    #[error("the helper stopped itself: {}", last_words(*.0))]
    Fatal(Fatal),
    /// The vCPU left in a way that a helper never does.
    #[error("the mirror vCPU left unexpectedly: {0}")]
    Exit(&'static str),
    /// The mirror was taken apart.
    #[error("the mirror is gone")]
    Gone,
}

/// Why a request to the helper failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// The helper refused a request.
    #[error("the helper refuses: {} (at {index})", reason(*status))]
    Refused {
        /// The helper's reason.
        status: Status,
        /// Index of the offending page or record.
        index: u32,
    },
    /// The helper answered something that no helper answers.
    #[error("the helper broke the protocol: {0}")]
    Broken(&'static str),
    /// No answer in time.
    #[error("the helper did not answer in time")]
    Timeout,
    /// The worker is gone.
    #[error("the worker has ended")]
    Ended(#[source] WorkerEnd),
    /// Every slot is in use.
    #[error("no slot is free")]
    NoSlot,
}
