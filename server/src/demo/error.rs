//! Why a demo did not come to its end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use mirrorvm_client::{ClientError, Problem};
use serde_json::Value;

/// Why a demo did not come to its end. For people: it says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub(super) enum DemoError {
    #[error(
        "this host has no usable /dev/kvm, and the driver asked for needs it. What to do: take --driver emulated, which \
         needs no KVM; or load the module of your processor (modprobe kvm_amd or kvm_intel), in a container pass the \
         device (--device /dev/kvm), in a VM switch nested virtualization on"
    )]
    NoKvm(#[source] io::Error),
    #[error(
        "/dev/kvm does not open for this user. What to do: {fix}; or run as root; --driver emulated needs no KVM"
    )]
    KvmDenied {
        fix: String,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Options(&'static str),
    #[error(
        "the driver qemu boots a Linux guest and needs --kernel PATH and --initrd PATH. What to do: \
         tests/guest/build-linux-guest OUT makes both, then give --kernel OUT/vmlinuz --initrd OUT/initrd.gz"
    )]
    NoLinuxGuest,
    #[error("{option} {} cannot be read", path.display())]
    GuestFile {
        option: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot set up the demo")]
    Runtime(#[source] io::Error),
    #[error("cannot write to stdout")]
    Stdout(#[source] io::Error),
    #[error("cannot start the daemon {name}")]
    Spawn {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the daemon {name} did not become ready; its log is above")]
    NotReady { name: &'static str },
    #[error("the temporary directory cannot be removed")]
    Leftover(#[source] io::Error),
    #[error("{what}")]
    Request {
        what: &'static str,
        #[source]
        source: ClientError,
    },
    #[error("an answer of the API lacks {field}")]
    Answer { field: &'static str },
    #[error("the daemon does not do {strategy} with this driver; {what}")]
    Refused {
        what: &'static str,
        strategy: String,
        #[source]
        source: Impossible,
    },
    #[error("this host cannot run the driver {driver}: {why}. What to do: {fix}")]
    Driver { driver: &'static str, why: String, fix: String },
    #[error("the guest failed: {0}")]
    Guest(String),
    #[error("{what} did not happen within {} seconds", limit.as_secs())]
    TooLate { what: &'static str, limit: Duration },
    #[error("the migration ended as {state}: {reason}")]
    Migration { state: String, reason: String },
    #[error("not everything that should have arrived did verify")]
    NotVerified,
}

impl DemoError {
    /// Whether the daemons' logs may say more: something broke there, rather than being refused.
    pub(super) fn logs_may_help(&self) -> bool {
        match self {
            Self::NotReady { .. }
            | Self::Answer { .. }
            | Self::Guest(_)
            | Self::TooLate { .. }
            | Self::Migration { .. } => true,
            Self::Request { source, .. } => source.problem().is_none_or(|p| p.code == "internal"),
            Self::NoKvm(_)
            | Self::KvmDenied { .. }
            | Self::NoLinuxGuest
            | Self::GuestFile { .. }
            | Self::Runtime(_)
            | Self::Stdout(_)
            | Self::Spawn { .. }
            | Self::Leftover(_)
            | Self::Options(_)
            | Self::Refused { .. }
            | Self::Driver { .. }
            | Self::NotVerified => false,
        }
    }
}

/// What a daemon says to something that it does not do at all, here or with these values, as opposed to not
/// now.
#[derive(Debug, thiserror::Error)]
#[error("{reason} ({status} {code})")]
pub(super) struct Impossible {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) reason: String,
}

impl Impossible {
    /// The problem as one, when it is one.
    pub(super) fn of(problem: &Problem) -> Option<Self> {
        let is_impossible = matches!(problem.status, 422 | 501) || problem.code == "policy_forbids";
        is_impossible.then(|| Self {
            status: problem.status,
            code: problem.code.clone(),
            reason: problem.sentence(),
        })
    }
}

/// Names what a request was for.
pub(super) fn doing(what: &'static str) -> impl FnOnce(ClientError) -> DemoError {
    move |source| DemoError::Request { what, source }
}

/// A migration that came to a bad end.
pub(super) fn failed(migration: &Value) -> DemoError {
    DemoError::Migration {
        state: migration["state"].as_str().unwrap_or("unknown").to_owned(),
        reason: migration["error"]["detail"].as_str().unwrap_or("no reason is given").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_differs_from_what_cannot_be_now() {
        let of = |status: u16, code: &str| {
            Impossible::of(&Problem { status, code: code.into(), ..Problem::default() })
        };
        for (status, code) in [(422, "plan_refused"), (501, "capability_missing"), (409, "policy_forbids")] {
            assert_eq!(of(status, code).unwrap().to_string(), format!(" ({status} {code})"));
        }
        for (status, code) in [(409, "in_use"), (500, "internal"), (503, "no_resources")] {
            assert!(of(status, code).is_none(), "{code}");
        }
    }
}
