//! Landlock: which files the daemon reaches, and which ports it listens on.
//!
//! Owns: the list of these, and having the kernel hold the daemon to it. Must not know: who asks for a file.
//!
//! Owner and mode of a file count as before; this is a second no, which root does not pass either. Not all is
//! the kernel's to refuse here: looking at names (stat), connecting to a Unix socket, descriptors that were
//! open before.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

use super::{Force, Needs};

/// The interface that the rules are written against: what it does not know is not restricted. Older kernels
/// do as much of it as they can.
const KNOWN: ABI = ABI::V6;

/// What the resolver of names, the C library and clocks read. A file that is replaced later is another file:
/// of the resolver's configuration that is said when a name is to be resolved.
const SYSTEM_FILES: [&str; 13] = [
    "/etc/gai.conf",
    "/etc/group",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/dev/urandom",
    "/dev/zero",
];
/// Directories that are read. In `/proc`, what is another process's alone is refused by Landlock anyway.
const SYSTEM_DIRECTORIES: [&str; 9] = [
    "/proc",
    "/sys",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/run/systemd/resolve",
    "/nix/store",
];
/// Devices that are used.
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/sev", "/dev/null"];

fn read() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

/// What a directory of the daemon's own takes: everything but programs and devices.
fn own() -> BitFlags<AccessFs> {
    read()
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer
}

/// What a socket and the lock beside it take.
fn sockets() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
}

/// Restricts the calling thread to what is needed. Gives what came of it, and the kernel's version of the
/// interface.
pub(super) fn restrict(needs: &Needs) -> (Force, Option<i32>) {
    match try_restrict(needs) {
        Ok(status) => status,
        Err(error) => (Force::Unavailable(format!("Landlock's rules are not taken: {error}")), None),
    }
}

fn try_restrict(needs: &Needs) -> Result<(Force, Option<i32>), RulesetError> {
    // A service manager that is spoken to by a name without a file lives outside.
    let abstract_manager =
        std::env::var_os("NOTIFY_SOCKET").is_some_and(|s| s.as_encoded_bytes().starts_with(b"@"));
    let scope = if abstract_manager { Scope::Signal.into() } else { Scope::from_all(KNOWN) };
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::BindTcp)?
        .scope(scope)?
        .create()?;
    for path in &needs.own_directories {
        rules = beneath(rules, path, own())?;
    }
    for path in &needs.socket_directories {
        rules = beneath(rules, path, sockets())?;
    }
    let system = SYSTEM_FILES.iter().chain(&SYSTEM_DIRECTORIES).map(PathBuf::from);
    for path in needs.read.iter().cloned().chain(system).chain(resolver_directory()) {
        rules = beneath(rules, &path, read())?;
    }
    for device in DEVICES {
        let used = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        rules = beneath(rules, Path::new(device), used)?;
    }
    for address in &needs.addresses {
        rules = rules.add_rule(NetPort::new(address.port(), AccessNet::BindTcp))?;
    }
    let status = rules.restrict_self()?;
    Ok(match (status.landlock, status.ruleset) {
        (LandlockStatus::NotEnabled, _) => {
            let why = "this kernel has Landlock and was started without it (the parameter `lsm=`)";
            (Force::Unavailable(why.into()), None)
        }
        (LandlockStatus::NotImplemented, _) => {
            (Force::Unavailable("this kernel was built without Landlock".into()), None)
        }
        (LandlockStatus::Available { effective_abi, kernel_abi }, ruleset) => {
            let abi = kernel_abi.unwrap_or(effective_abi as i32);
            let force = match ruleset {
                RulesetStatus::FullyEnforced => Force::Enforced,
                RulesetStatus::PartiallyEnforced => Force::Partial(format!(
                    "this kernel's Landlock is of version {abi}: what came later is not restricted"
                )),
                RulesetStatus::NotEnforced => Force::Unavailable("the kernel took none of the rules".into()),
            };
            (force, Some(abi))
        }
    })
}

/// Allows `access` beneath a directory, or to a file; what is not there needs no rule.
fn beneath(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(path) else { return Ok(rules) };
    // What only directories can have is left out of a file's rule.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
    rules.add_rule(PathBeneath::new(fd, access))
}

/// Where the resolver's configuration really is, when that is a directory for such things: a program that
/// replaces the file replaces it there.
fn resolver_directory() -> Option<PathBuf> {
    let file = std::fs::canonicalize("/etc/resolv.conf").ok()?;
    file.starts_with("/run").then(|| file.parent().map(PathBuf::from)).flatten()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::ErrorKind::PermissionDenied;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn beyond_what_is_needed_no_file_opens_and_no_port_does() {
        let [state, images, elsewhere] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let file = |dir: &tempfile::TempDir| dir.path().join("file");
        for dir in [&state, &images, &elsewhere] {
            std::fs::write(file(dir), "x").unwrap();
        }
        std::os::unix::fs::symlink(file(&elsewhere), images.path().join("link")).unwrap();
        let before = File::open(file(&elsewhere)).unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (ours, other) = (free(), free());
        let needs = Needs {
            own_directories: vec![state.path().to_owned()],
            socket_directories: Vec::new(),
            read: vec![images.path().to_owned()],
            addresses: vec![ours],
        };
        // Landlock holds a thread and what it starts, so that this process goes on as it was.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rustix::thread::set_no_new_privs(true).unwrap();
                let (force, abi) = restrict(&needs);
                if !matches!(force, Force::Enforced) {
                    println!("SKIPPED ({force:?}): this test ran nothing");
                    return;
                }
                assert!(abi.is_some_and(|abi| abi > 0));
                let denied = |what: std::io::Result<()>| what.is_err_and(|e| e.kind() == PermissionDenied);
                let write = |path| OpenOptions::new().write(true).open(path).map(drop);
                std::fs::write(state.path().join("new"), "x").unwrap();
                std::fs::rename(state.path().join("new"), file(&state)).unwrap();
                assert_eq!(std::fs::read(file(&images)).unwrap(), b"x");
                assert!(
                    denied(write(file(&images))) && denied(std::fs::write(images.path().join("new"), "x"))
                );
                assert!(denied(std::fs::remove_file(file(&images))));
                for beyond in
                    [file(&elsewhere), images.path().join("link"), "/etc/shadow".into(), "/root".into()]
                {
                    assert!(denied(File::open(&beyond).map(drop)), "{}", beyond.display());
                }
                // Not even what it could read may be run.
                let run = std::process::Command::new("/proc/self/exe").arg("--list").output();
                assert!(denied(run.map(drop)));
                File::open("/dev/null").unwrap();
                File::open("/proc/self/status").unwrap();
                assert!(before.metadata().is_ok(), "what was open stays");
                drop(TcpListener::bind(ours).unwrap());
                assert!(denied(TcpListener::bind(other).map(drop)));
            });
        });
        std::fs::write(file(&elsewhere), "another thread's").unwrap();
    }
}
