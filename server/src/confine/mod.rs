//! What the daemon gives up before it listens to anybody: privileges, files, system calls.
//!
//! Owns: the order of these, and what came of each. Must not know: requests, guests. `serve` alone is
//! confined; what a person runs by hand is not.
//!
//! ```text
//! core dumps off, limits of descriptors      nobody inherits them otherwise
//! the launcher starts                        it keeps what starting QEMUs takes
//! capabilities, files, system calls          on the main thread, which is the only one so far
//! the runtime starts                         every thread has what its maker has, and some have less
//! ```

mod calls;
mod capabilities;
mod files;
mod launcher;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use mirrorvm::memory::{SecretMemory, secret_memory};
use rustix::thread::set_no_new_privs;

pub use launcher::{LauncherArgs, LauncherError, serve as serve_launcher, start as start_launcher};

use crate::serve::{Listen, Options};

/// Whether the daemon confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Confine {
    /// It does, and what it may not do is refused or ends it.
    #[default]
    Enforce,
    /// System calls that it should not make are let through and noted in the kernel's audit log. Nothing else
    /// is confined: for finding out what a build on an unusual system needs.
    Log,
    /// It does not.
    None,
}

impl Confine {
    /// Its name on the command line, in the configuration and in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Log => "log",
            Self::None => "none",
        }
    }
}

/// What `confine` may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is none of enforce, log and none")]
pub struct BadConfine;

impl FromStr for Confine {
    type Err = BadConfine;

    fn from_str(text: &str) -> Result<Self, BadConfine> {
        [Self::Enforce, Self::Log, Self::None].into_iter().find(|c| c.name() == text).ok_or(BadConfine)
    }
}

/// How much of one of the means is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Force {
    /// All of it.
    Enforced,
    /// As much as this kernel knows; a sentence that says what is missing.
    Partial(String),
    /// It notes, and refuses nothing.
    Logged,
    /// None: the configuration says so.
    Off,
    /// None: a sentence with the system's reason.
    Unavailable(String),
}

/// What the daemon is confined by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// What was asked for.
    pub mode: Confine,
    /// System calls, by what a thread is for.
    pub seccomp: Force,
    /// Files and ports.
    pub landlock: Force,
    /// The version of Landlock's interface that this kernel has; `None`: it has none, or nobody asked.
    pub landlock_abi: Option<i32>,
    /// Capabilities.
    pub capabilities: Force,
    /// Names of the capabilities that were kept, such as `CAP_IPC_LOCK`.
    pub kept: Vec<&'static str>,
}

impl Confinement {
    /// A daemon that is not confined.
    pub const fn none(mode: Confine) -> Self {
        Self {
            mode,
            seccomp: Force::Off,
            landlock: Force::Off,
            landlock_abi: None,
            capabilities: Force::Off,
            kept: Vec::new(),
        }
    }

    /// What secrets lie on.
    pub fn secrets(&self) -> SecretMemory {
        secret_memory()
    }
}

/// What the daemon still needs once it is confined.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    /// The state directory, and those of Unix sockets that it makes itself.
    own_directories: Vec<PathBuf>,
    socket_directories: Vec<PathBuf>,
    /// Directories and files that are read.
    read: Vec<PathBuf>,
    /// Addresses that it listens on.
    addresses: Vec<SocketAddr>,
}

impl Needs {
    /// What these options take.
    pub fn of(options: &Options) -> Self {
        let mut needs = Self {
            own_directories: std::iter::once(&options.state_dir)
                .chain(&options.volume_directories)
                .cloned()
                .collect(),
            read: options.image_directories.clone(),
            addresses: options.peer_listen.into_iter().collect(),
            ..Self::default()
        };
        for place in options.listen.iter().chain(&options.metrics_listen) {
            match place {
                Listen::Unix(path) => {
                    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                    needs.socket_directories.push(parent.map_or_else(|| ".".into(), PathBuf::from));
                }
                Listen::Tcp(address) | Listen::Tls(address) => needs.addresses.push(*address),
                Listen::Systemd => {}
            }
        }
        if let Some(tls) = &options.tls {
            needs.read.extend([tls.certificate.clone(), tls.key.clone()]);
            needs.read.extend(tls.client_ca.clone());
        }
        needs
    }
}

/// Confines the calling thread, and all that it starts from now on. To be called while it is the only one.
///
/// What the system does not offer is said, and does not keep the daemon from running: it is one more line of
/// defence, and a host without it is still better off with the others.
pub(crate) fn apply(mode: Confine, needs: &Needs) -> Confinement {
    let mut confinement = Confinement::none(mode);
    match mode {
        Confine::None => {
            tracing::warn!("the daemon is not confined: the configuration says so (confine = \"none\")");
            return confinement;
        }
        Confine::Log => tracing::warn!(
            "the daemon is not confined: system calls that it should not make are noted in the kernel's audit log \
             (confine = \"log\")"
        ),
        Confine::Enforce => {
            (confinement.capabilities, confinement.kept) = capabilities::give_up(needs);
            (confinement.landlock, confinement.landlock_abi) = files::restrict(needs);
        }
    }
    if let Err(errno) = set_no_new_privs(true) {
        tracing::warn!(%errno, "this thread may still gain privileges by a program that has some");
    }
    // Last: everything before takes calls that are forbidden afterwards.
    confinement.seccomp = calls::filter(mode);
    for (what, force) in [
        ("seccomp", &confinement.seccomp),
        ("landlock", &confinement.landlock),
        ("capabilities", &confinement.capabilities),
    ] {
        match force {
            Force::Partial(why) | Force::Unavailable(why) => tracing::warn!(what, why, "not all is confined"),
            Force::Enforced | Force::Logged | Force::Off => {}
        }
    }
    confinement
}
