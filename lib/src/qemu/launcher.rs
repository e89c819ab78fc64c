//! Owns the process that starts QEMUs for a daemon which has given up what that takes: both ends of the
//! conversation. Must not know how either of the two came to be, or what else they may do.
//!
//! The daemon sends what a QEMU is to be, never a command line: that is made from the QEMU that is found
//! *here*, after the same checks as by a daemon that starts its QEMUs itself, and for one of the users that
//! the launcher was started with. A daemon that was taken over can so start what it could start before, and
//! nothing else. QEMU's parent is not the launcher but a [keeper](super::keeper), one for each, which has the
//! wish as it came and tells the daemon what becomes of it.
//!
//! The launcher has one thread and ends when the daemon does. Keepers that it started go on without it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::accel::{KvmAccess, kvm_access};
use super::command::RunAs;
use super::start::pidfd;
use super::user::QemuUsers;
use super::wire::{self, Order, Wish, Word, next_wish, pair, tell};

/// Keepers of one launcher at once.
const KEEPERS_MAX: usize = 4096;

/// The daemon's end: starts QEMUs by the launcher. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Launcher(Arc<OwnedFd>);

/// Makes the socket between a daemon and its launcher: the daemon's end, and the one that the launcher
/// [serves](serve).
///
/// # Errors
/// The system's.
pub fn launcher_pair() -> io::Result<(Launcher, OwnedFd)> {
    let (ours, theirs) = pair()?;
    Ok((Launcher(Arc::new(ours)), theirs))
}

impl Launcher {
    /// Wishes for a QEMU; what becomes of it is told over the leash's other end.
    pub(super) fn start(&self, order: Order, leash: &OwnedFd) -> io::Result<()> {
        wire::wish(&self.0, order, leash).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => error,
            _ => gone(),
        })
    }
}

/// Why nothing is started any more.
pub(super) fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        "the launcher, which starts QEMUs for this daemon, has ended: restart the daemon",
    )
}

/// A keeper that was started, and what is readable when it has ended.
type Keeper = (Child, OwnedFd);

/// Serves a daemon at the other end of `socket` until it is gone: has QEMUs started by keepers, as one of
/// `users` each, or as this process's own user where there are none. `start_keeper` starts a process that
/// [keeps](super::keep) what it is told of over its standard input, the socket given.
///
/// # Errors
/// The socket is none of [`launcher_pair`]'s.
pub fn serve(
    socket: &OwnedFd,
    users: Option<QemuUsers>,
    mut start_keeper: impl FnMut(OwnedFd) -> io::Result<Child>,
) -> io::Result<()> {
    let mut keepers: Vec<Keeper> = Vec::new();
    loop {
        let mut wanted = vec![PollFd::new(socket, PollFlags::IN)];
        wanted.extend(keepers.iter().map(|(_, ended)| PollFd::new(ended, PollFlags::IN)));
        match poll(&mut wanted, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let asked = wanted.first().is_some_and(|fd| !fd.revents().is_empty());
        drop(wanted);
        keepers.retain_mut(|(keeper, _)| !matches!(keeper.try_wait(), Ok(Some(_)) | Err(_)));
        if !asked {
            continue;
        }
        let (leash, order) = match next_wish(socket)? {
            Wish::Gone => return Ok(()),
            // Without its leash there is nobody to tell; closing what came was the answer.
            Wish::Nonsense => continue,
            Wish::Of(leash, order) => (leash, order),
        };
        let kept = order.and_then(|order| {
            check_user(order.spec.run_as, users)?;
            if keepers.len() >= KEEPERS_MAX {
                return Err(refused("too many QEMUs run"));
            }
            keep(order, &leash, &mut start_keeper)
        });
        match kept {
            Ok(keeper) => keepers.push(keeper),
            Err(error) => tell(&leash, &Word::not(&error)),
        }
    }
}

fn keep(
    order: Order,
    leash: &OwnedFd,
    start_keeper: impl FnOnce(OwnedFd) -> io::Result<Child>,
) -> io::Result<Keeper> {
    let (ours, theirs) = pair()?;
    let mut keeper = start_keeper(theirs)?;
    let told = pidfd(&keeper).and_then(|ended| wire::wish(&ours, order, leash).map(|()| ended));
    match told {
        Ok(ended) => Ok((keeper, ended)),
        Err(error) => {
            let _ = (keeper.kill(), keeper.wait());
            Err(error)
        }
    }
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}

/// Whether a QEMU may run as that user.
fn check_user(run_as: Option<RunAs>, users: Option<QemuUsers>) -> io::Result<()> {
    let allowed = match (run_as, users) {
        (None, None) => true,
        (Some(RunAs { uid, gid, kvm_group }), Some(users)) => {
            let device = match kvm_access(true) {
                KvmAccess::Group(group) => Some(group),
                KvmAccess::Open | KvmAccess::Closed => None,
            };
            users.has(uid, gid) && (kvm_group.is_none() || kvm_group == device)
        }
        (Some(_), None) | (None, Some(_)) => false,
    };
    if allowed {
        return Ok(());
    }
    Err(refused(match run_as {
        Some(RunAs { uid, gid, .. }) => format!("QEMU may not run as user {uid} of group {gid}"),
        None => "QEMU may not run as the launcher's own user".to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::net::{SendFlags, send};

    use super::*;

    fn run_as(uid: u32, gid: u32, kvm_group: Option<u32>) -> Option<RunAs> {
        Some(RunAs { uid, gid, kvm_group })
    }

    #[test]
    fn a_launcher_starts_nothing_as_a_user_that_is_not_qemu_s() {
        let users: QemuUsers = "65520-65533".parse().unwrap();
        check_user(run_as(65_520, 65_520, None), Some(users)).unwrap();
        for (wanted, users) in [
            (run_as(0, 0, None), Some(users)),
            (run_as(65_520, 0, None), Some(users)),
            (run_as(65_519, 65_519, None), Some(users)),
            (run_as(65_534, 65_534, None), Some(users)),
            (run_as(65_520, 65_520, Some(0)), Some(users)),
            (run_as(65_520, 65_520, Some(42)), Some(users)),
            (None, Some(users)),
            (run_as(65_520, 65_520, None), None),
        ] {
            let error = check_user(wanted, users).unwrap_err();
            assert!(error.to_string().contains("may not run as"), "{wanted:?} {users:?}: {error}");
        }
    }

    #[test]
    fn nonsense_starts_no_keeper_and_the_launcher_serves_on_until_the_daemon_is_gone() {
        let (launcher, theirs) = launcher_pair().unwrap();
        let started = std::thread::spawn(move || {
            let mut started = 0;
            let start = |socket: OwnedFd| {
                started += 1;
                Command::new("true").stdin(Stdio::from(socket)).spawn()
            };
            serve(&theirs, None, start).unwrap();
            started
        });
        for said in [&b"{}"[..], b"\xff", b"{\"program\":\"/bin/sh\"}"] {
            send(&*launcher.0, said, SendFlags::NOSIGNAL).unwrap();
        }
        drop(launcher);
        assert_eq!(started.join().unwrap(), 0);
    }
}
