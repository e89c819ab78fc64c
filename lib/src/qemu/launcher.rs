//! Owns the process that starts QEMUs for a daemon which has given up what that takes: both ends of the
//! conversation. Must not know how either of the two came to be, or what else they may do.
//!
//! The daemon sends what a QEMU is to be, never a command line: the launcher makes that, from the QEMU that
//! *it* finds, after the same checks as a daemon that starts its QEMUs itself, and for one of the users that
//! it was started with. A daemon that was taken over can so start what it could start before, and nothing
//! else.
//!
//! ```text
//! daemon                          launcher
//!   Wanted, its descriptors  ->     one of them is the QEMU's own socket, the leash:
//!   <- Started {pid} | Not {why}
//!   <- Ended {code, signal}         when it has ended, however
//!   any byte, or the end     ->     kills it
//! ```
//!
//! The launcher ends when the daemon does, and every QEMU with it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::accel::{Accel, KvmAccess, kvm_access};
use super::command::{Arriving, QemuSpec, RunAs, Timeouts, qemu_binary};
use super::machine::{CloudInit, Machine, Passed};
use super::start::{Order, pidfds};
use super::user::QemuUsers;

/// Longest message. A kernel's command line takes at most six bytes for each of its own, a definition a few
/// hundred for each device.
///
/// cloud-init's documents do not go along: they are in one of the descriptors.
const MESSAGE_MAX: usize = 128 << 10;
/// Descriptors that go with every wish: RAM, console, standard error, leash, control socket. Then come those
/// of the machine.
const FIXED: usize = 5;
/// Longest answer.
const WORD_MAX: usize = 16 << 10;
/// All of them at most: the kernel passes up to 253 at once.
const DESCRIPTORS_MAX: usize = 96;
/// QEMUs of one launcher at once. Each takes a thread.
const PROCESSES_MAX: usize = 4096;

/// A QEMU that a daemon wants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    accel: Accel,
    machine: Machine,
    vcpus: u32,
    memory_bytes: u64,
    append: String,
    id: Uuid,
    kernel: bool,
    initrd: bool,
    run_as: Option<RunAs>,
    arriving: Option<Arriving>,
}

/// What became of a wish.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Word {
    /// It runs.
    Started { pid: u32 },
    /// It does not: the system's error number, and what failed.
    Not { errno: Option<i32>, why: String },
    /// It has ended.
    Ended { code: Option<i32>, signal: Option<i32> },
}

/// The daemon's end: starts QEMUs by the launcher. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Launcher(Arc<OwnedFd>);

/// One QEMU's own socket, from the daemon's side.
#[derive(Clone, Debug)]
pub(super) struct Leash(Arc<OwnedFd>);

/// Makes the socket between a daemon and its launcher: the daemon's end, and the one that the launcher
/// [serves](serve).
///
/// # Errors
/// The system's.
pub fn launcher_pair() -> io::Result<(Launcher, OwnedFd)> {
    let (ours, theirs) = pair()?;
    Ok((Launcher(Arc::new(ours)), theirs))
}

/// Messages that stay whole, and an end that is noticed.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

impl Launcher {
    /// Starts a QEMU; gives its id and its leash, for whoever kills it and for whoever waits for it.
    pub(super) fn start(&self, order: Order) -> io::Result<(u32, Leash, Leash)> {
        let Order { spec, qmp, console, words } = order;
        let QemuSpec {
            accel, machine, vcpus, memory_bytes, append, id, run_as, arriving, ram, passed, ..
        } = spec;
        let (kernel, initrd) = (passed.kernel.is_some(), passed.initrd.is_some());
        let wanted = Wanted {
            accel,
            machine: told(machine),
            vcpus,
            memory_bytes,
            append,
            id,
            kernel,
            initrd,
            run_as,
            arriving,
        };
        let (ours, theirs) = pair()?;
        let all: Vec<OwnedFd> =
            [ram, console, words, theirs, qmp].into_iter().chain(passed.into_list()).collect();
        let fds: Vec<BorrowedFd<'_>> = all.iter().map(AsFd::as_fd).collect();
        let message = serde_json::to_vec(&wanted)?;
        if message.len() > MESSAGE_MAX || fds.len() > DESCRIPTORS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too much is said of one QEMU"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(96))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        again(|| sendmsg(&*self.0, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL))
            .map_err(|_| gone())?;
        drop(all);
        let leash = Leash(Arc::new(ours));
        match leash.hear()? {
            Some(Word::Started { pid }) => Ok((pid, leash.clone(), leash)),
            Some(Word::Not { errno: Some(errno), .. }) => Err(io::Error::from_raw_os_error(errno)),
            Some(Word::Not { errno: None, why }) => Err(io::Error::other(why)),
            Some(Word::Ended { .. }) | None => Err(gone()),
        }
    }
}

/// A machine as a launcher needs to know it: what cloud-init reads it gets as a file.
fn told(machine: Machine) -> Machine {
    let none = |_| CloudInit { user_data: String::new(), meta_data: None, network_config: None };
    Machine { cloud_init: machine.cloud_init.map(none), ..machine }
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        "the launcher, which starts QEMUs for this daemon, has ended: restart the daemon",
    )
}

impl Leash {
    pub(super) fn kill(&self) {
        let _ = again(|| send(&*self.0, b"k", SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
    }

    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for the end; nothing is known of it where the launcher ended first.
    pub(super) fn end(&self) -> (Option<i32>, Option<i32>) {
        match self.hear() {
            Ok(Some(Word::Ended { code, signal })) => (code, signal),
            Ok(Some(Word::Started { .. } | Word::Not { .. }) | None) | Err(_) => (None, None),
        }
    }

    /// `None`: there is nobody at the other end.
    fn hear(&self) -> io::Result<Option<Word>> {
        let mut message = vec![0; WORD_MAX];
        let (_, bytes) = again(|| recv(&*self.0, &mut message[..], RecvFlags::empty()))?;
        if bytes == 0 { Ok(None) } else { read(message.get(..bytes).unwrap_or_default()).map(Some) }
    }
}

fn read<T: DeserializeOwned>(message: &[u8]) -> io::Result<T> {
    serde_json::from_slice(message).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Serves a daemon at the other end of `socket` until it is gone: starts QEMUs, as one of `users` each, or as
/// this process's own user where there are none.
///
/// # Errors
/// The socket is none of [`launcher_pair`]'s.
pub fn serve(socket: &OwnedFd, users: Option<QemuUsers>) -> io::Result<()> {
    let running = Arc::new(AtomicUsize::new(0));
    let mut message = vec![0; MESSAGE_MAX];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(96))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut message)];
        let received = match recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 && fds.is_empty() {
            return Ok(());
        }
        let cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        let said = message.get(..received.bytes).unwrap_or_default();
        // Without its leash there is nobody to tell; closing what came is the answer.
        let Some((leash, order)) = (if cut { None } else { order(said, fds, users) }) else { continue };
        let (running, before) = (Arc::clone(&running), running.fetch_add(1, Ordering::AcqRel));
        let order = if before < PROCESSES_MAX { order } else { Err(refused("too many QEMUs run")) };
        let told = leash.try_clone();
        let body = move || {
            keep(&leash, order);
            running.fetch_sub(1, Ordering::AcqRel);
        };
        // The forking thread lives as long as the process: the parent-death signal is that thread's.
        if let (Err(error), Ok(told)) = (std::thread::Builder::new().name("qemu".into()).spawn(body), told) {
            tell(&told, &not(&error));
        }
    }
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}

fn not(error: &io::Error) -> Word {
    Word::Not { errno: error.raw_os_error(), why: error.to_string() }
}

fn tell(leash: &OwnedFd, word: &Word) {
    if let Ok(message) = serde_json::to_vec(word) {
        // A daemon that is gone needs no word.
        let _ = again(|| send(leash, &message, SendFlags::NOSIGNAL));
    }
}

/// The leash of a wish, and what is to be started or why not.
fn order(said: &[u8], fds: Vec<OwnedFd>, users: Option<QemuUsers>) -> Option<(OwnedFd, io::Result<Order>)> {
    if !(FIXED..=DESCRIPTORS_MAX).contains(&fds.len()) {
        return None;
    }
    let mut fds = fds.into_iter();
    let (ram, console, words, leash) = (fds.next()?, fds.next()?, fds.next()?, fds.next()?);
    let qmp = fds.next()?;
    let order = read::<Wanted>(said).and_then(|wanted| {
        check_user(wanted.run_as, users)?;
        let binary = qemu_binary().ok_or_else(|| refused("qemu-system-x86_64 is not on the PATH"))?;
        let Wanted { accel, machine, vcpus, memory_bytes, append, id, kernel, initrd, run_as, arriving } =
            wanted;
        let passed = Passed::of(&machine, kernel, initrd, fds.collect());
        let passed = passed.ok_or_else(|| refused("these are not the machine's descriptors"))?;
        let timeouts = Timeouts::default();
        let spec = QemuSpec {
            binary,
            accel,
            machine,
            vcpus,
            memory_bytes,
            append,
            id,
            ram,
            passed,
            run_as,
            arriving,
            timeouts,
        };
        spec.check().map_err(|e| refused(e.to_string()))?;
        Ok(Order { spec, qmp, console, words })
    });
    Some((leash, order))
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

/// The body of a QEMU's thread.
fn keep(leash: &OwnedFd, order: io::Result<Order>) {
    let started = order.and_then(|order| {
        let mut child = order.start()?;
        match pidfds(&child) {
            Ok((pidfd, _)) => Ok((child, pidfd)),
            Err(error) => {
                let _ = (child.kill(), child.wait());
                Err(error)
            }
        }
    });
    match started {
        Ok((child, pidfd)) => {
            tell(leash, &Word::Started { pid: child.id() });
            let (code, signal) = until_its_end(child, &pidfd, leash);
            tell(leash, &Word::Ended { code, signal });
        }
        Err(error) => tell(leash, &not(&error)),
    }
}

/// Waits for a process, and kills it when the leash says so.
fn until_its_end(mut child: Child, pidfd: &OwnedFd, leash: &OwnedFd) -> (Option<i32>, Option<i32>) {
    loop {
        let mut wanted = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(leash, PollFlags::IN)];
        let failed = !matches!(poll(&mut wanted, None), Ok(_) | Err(Errno::INTR));
        let [ended, called] = wanted.map(|fd| !fd.revents().is_empty());
        if (called || failed) && !ended {
            let _ = child.kill();
        }
        if ended || called || failed {
            let status = child.wait().ok();
            return (status.and_then(|s| s.code()), status.and_then(|s| s.signal()));
        }
    }
}

#[cfg(test)]
mod tests {
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

    /// A launcher on a thread of this process.
    fn serving() -> (Launcher, std::thread::JoinHandle<io::Result<()>>) {
        let (launcher, theirs) = launcher_pair().unwrap();
        (launcher, std::thread::spawn(move || serve(&theirs, None)))
    }

    #[test]
    fn what_makes_no_sense_is_closed_and_the_next_is_served() {
        let (launcher, thread) = serving();
        let (ours, theirs) = pair().unwrap();
        // Too few descriptors, no JSON, a member that there is not; each time the leash is closed or
        // answered.
        for (said, count) in [(&b"{}"[..], 1), (b"{}", 6), (b"\xff", 6), (b"{\"program\":\"/bin/sh\"}", 7)] {
            let (leash, its) = pair().unwrap();
            {
                let mut fds = vec![theirs.as_fd(); count];
                if let Some(place) = fds.get_mut(3) {
                    *place = its.as_fd();
                }
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(96))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
                sendmsg(&*launcher.0, &[IoSlice::new(said)], &mut control, SendFlags::NOSIGNAL).unwrap();
            }
            drop(its);
            let word = Leash(Arc::new(leash)).hear();
            match (count, &word) {
                (1, Ok(None)) | (_, Ok(Some(Word::Not { errno: None, .. }))) => {}
                _ => panic!("{said:?}: {word:?}"),
            }
        }
        drop((ours, launcher));
        thread.join().unwrap().unwrap();
    }
}
