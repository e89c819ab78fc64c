//! Owns what daemon, launcher and keepers say to one another, and the sockets that they say it over. Must not
//! know what any of them does about it.
//!
//! ```text
//! daemon                     launcher                       keeper
//!   Wanted, descriptors  ->    checks it, starts a keeper:
//!                              Wanted, descriptors      ->    starts QEMU
//!   <- Started | Not           (one of the descriptors is the keeper's own socket, the leash)
//!   <- Ended                                                  when it has ended, however
//!   any byte             ->                                   kills it
//!   the end              ->                                   the daemon is gone
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::accel::Accel;
use super::command::{GuestFiles, QemuSpec, RunAs, Timeouts, qemu_binary};

/// Longest wish.
pub(super) const MESSAGE_MAX: usize = 128 << 10;
/// Longest word. What is told of standard error takes at most six bytes for each of its own.
const WORD_MAX: usize = 32 << 10;
/// Descriptors that may go with a wish, all in all.
const DESCRIPTORS_MAX: usize = 64;

/// A QEMU that a daemon wants. Its descriptors come in this order: RAM, leash, console, control socket; the
/// guest's directory if `guest` is told; kernel; then any number more, of which the first is the initial RAM
/// disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    accel: Accel,
    machine: String,
    cpu: String,
    vcpus: u32,
    memory_bytes: u64,
    append: String,
    run_as: Option<RunAs>,
    incoming: bool,
    /// The guest's id.
    guest: Option<String>,
}

/// A process: its number, and when it started, in clock ticks after the host's start. Both together are no
/// other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Process {
    pub pid: u32,
    pub started: u64,
}

/// How a QEMU ended, as its keeper tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ended {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub oom_killed: Option<bool>,
    /// The end of its standard error.
    pub words: String,
}

/// What a daemon is told of a wish.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Word {
    /// It runs.
    Started { qemu: Process, keeper: Process },
    /// It does not: the system's error number, and what failed.
    Not { errno: Option<i32>, why: String },
    /// It has ended.
    Ended(Ended),
}

impl Word {
    pub fn not(error: &io::Error) -> Self {
        Self::Not { errno: error.raw_os_error(), why: error.to_string() }
    }
}

/// A QEMU to be started: what it is, and its ends of what it has with the daemon.
#[derive(Debug)]
pub(super) struct Order {
    /// What it is to be.
    pub spec: QemuSpec,
    /// Its end of the control socket.
    pub qmp: OwnedFd,
    /// The keeper's end of what the guest's serial port says and is told.
    pub console: OwnedFd,
}

/// What came over a socket on which QEMUs are wished for.
pub(super) enum Wish {
    /// There is nobody at the other end.
    Gone,
    /// Nothing that could be answered: there is no leash. What came was closed.
    Nonsense,
    /// A wish, or what is wrong with it, and the leash to tell that.
    Of(OwnedFd, io::Result<Order>),
}

/// Messages that stay whole, and an end that is noticed.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn read<T: DeserializeOwned>(message: &[u8]) -> io::Result<T> {
    serde_json::from_slice(message).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Hands an order on, and closes what went with it here.
pub(super) fn wish(socket: &OwnedFd, order: Order, leash: &OwnedFd) -> io::Result<()> {
    let Order { spec, qmp, console } = order;
    let QemuSpec {
        accel,
        machine,
        cpu,
        vcpus,
        memory_bytes,
        append,
        run_as,
        incoming,
        files,
        ram,
        kernel,
        initrd,
        ..
    } = spec;
    let (guest, directory) = files.map(|f| (f.guest, f.directory)).unzip();
    let wanted = Wanted { accel, machine, cpu, vcpus, memory_bytes, append, run_as, incoming, guest };
    let mut fds = vec![ram.as_fd(), leash.as_fd(), console.as_fd(), qmp.as_fd()];
    fds.extend(directory.iter().map(AsFd::as_fd));
    fds.push(kernel.as_fd());
    fds.extend(initrd.iter().map(AsFd::as_fd));
    send_with(socket, &serde_json::to_vec(&wanted)?, &fds)
}

fn send_with(socket: &OwnedFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.len() > MESSAGE_MAX || fds.len() > DESCRIPTORS_MAX {
        return Err(refused("too much is said of one QEMU"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    again(|| sendmsg(socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Takes the next wish; waits for it.
pub(super) fn next_wish(socket: &OwnedFd) -> io::Result<Wish> {
    // Off the stack, and gone again while nothing is wished for.
    let mut message = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = again(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 && fds.is_empty() {
        return Ok(Wish::Gone);
    }
    let cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    let said = message.get(..received.bytes).unwrap_or_default();
    Ok(if cut { Wish::Nonsense } else { understood(said, fds) })
}

fn understood(said: &[u8], fds: Vec<OwnedFd>) -> Wish {
    let mut fds = fds.into_iter();
    let (Some(ram), Some(leash)) = (fds.next(), fds.next()) else { return Wish::Nonsense };
    let order = read::<Wanted>(said).and_then(|wanted| order(wanted, ram, fds));
    Wish::Of(leash, order)
}

fn order(wanted: Wanted, ram: OwnedFd, mut fds: impl Iterator<Item = OwnedFd>) -> io::Result<Order> {
    let mut next = || fds.next().ok_or_else(|| refused("a descriptor is missing"));
    let (console, qmp) = (next()?, next()?);
    let Wanted { accel, machine, cpu, vcpus, memory_bytes, append, run_as, incoming, guest } = wanted;
    let files = match guest {
        Some(guest) => Some(GuestFiles { guest, directory: next()? }),
        None => None,
    };
    let kernel = next()?;
    let initrd = fds.next();
    if fds.next().is_some() {
        return Err(refused("a descriptor is too many"));
    }
    let binary =
        qemu_binary().ok_or_else(|| io::Error::other("qemu-system-x86_64 is not on the PATH"))?;
    let spec = QemuSpec {
        binary,
        accel,
        machine,
        cpu,
        vcpus,
        memory_bytes,
        kernel,
        initrd,
        append,
        ram,
        run_as,
        incoming,
        files,
        timeouts: Timeouts::default(),
    };
    spec.check().map_err(|e| io::Error::other(e.to_string()))?;
    Ok(Order { spec, qmp, console })
}

/// Tells a daemon; one that is gone needs no word.
pub(super) fn tell(leash: &OwnedFd, word: &Word) {
    if let Ok(message) = serde_json::to_vec(word) {
        let _ = again(|| send(leash, &message, SendFlags::NOSIGNAL));
    }
}

/// The next word of a keeper, if there is one now. `Ok(None)`: there is nobody at the other end.
///
/// # Errors
/// `WouldBlock` when nothing has been said; what makes no sense.
pub(super) fn hear(leash: &OwnedFd) -> io::Result<Option<Word>> {
    let mut message = vec![0; WORD_MAX];
    let (_, bytes) = again(|| recv(leash, &mut message[..], RecvFlags::DONTWAIT))?;
    if bytes == 0 { Ok(None) } else { read(message.get(..bytes).unwrap_or_default()).map(Some) }
}

/// What a number's process is, now.
pub(super) fn process(pid: u32) -> io::Result<(Process, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything, blanks and brackets as well.
    let mut fields = text.rsplit(") ").next().unwrap_or_default().split(' ');
    let parent = fields.nth(1).and_then(|f| f.parse().ok());
    let started = fields.nth(17).and_then(|f| f.trim().parse().ok());
    match (parent, started) {
        (Some(parent), Some(started)) => Ok((Process { pid, started }, parent)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_start() {
        let (own, parent) = process(std::process::id()).unwrap();
        assert_eq!(parent, std::os::unix::process::parent_id());
        assert!(own.started > 0);
        assert_eq!(process(own.pid).unwrap().0, own);
        assert!(process(u32::MAX).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_answered_where_there_is_a_leash() {
        let (ours, theirs) = pair().unwrap();
        let (some, _other) = pair().unwrap();
        // Too few descriptors, no JSON, a member that there is not, too little or too much of the right kind.
        let good = serde_json::to_vec(&Wanted {
            accel: Accel::Tcg,
            machine: "pc".into(),
            cpu: "max".into(),
            vcpus: 1,
            memory_bytes: 1 << 20,
            append: String::new(),
            run_as: None,
            incoming: false,
            guest: Some("g".into()),
        })
        .unwrap();
        for (said, count, answered) in [
            (&b"{}"[..], 0, false),
            (b"{}", 1, false),
            (b"{}", 2, true),
            (b"\xff", 6, true),
            (b"{\"program\":\"/bin/sh\"}", 7, true),
            (&good, 5, true),
            (&good, 8, true),
            (&good, DESCRIPTORS_MAX, true),
        ] {
            send_with(&ours, said, &vec![some.as_fd(); count]).unwrap();
            match (next_wish(&theirs).unwrap(), answered) {
                (Wish::Nonsense, false) | (Wish::Of(_, Err(_)), true) => {}
                _ => panic!("{count} descriptors"),
            }
        }
        assert!(send_with(&ours, b"{}", &vec![some.as_fd(); DESCRIPTORS_MAX + 1]).is_err());
        assert!(send_with(&ours, &vec![b' '; MESSAGE_MAX + 1], &[]).is_err());
        send_with(&ours, &vec![b' '; MESSAGE_MAX], &[some.as_fd(), some.as_fd()]).unwrap();
        assert!(matches!(next_wish(&theirs).unwrap(), Wish::Of(_, Err(_))));
        drop(ours);
        assert!(matches!(next_wish(&theirs).unwrap(), Wish::Gone));
    }
}
