//! Seccomp: which system calls a thread may make, by what it is there for.
//!
//! Owns: the lists, and having the kernel hold threads to them. Must not know: what the calls are made for.
//!
//! Every thread has the daemon's own list, because it inherits it; threads with a narrow task take a shorter
//! one on top when they start ([`mirrorvm::threads`]). A call that is on none of its lists ends the process:
//! code of somebody else's runs in it then, and an error would be one more try to that code. Guests end with
//! it; the database and the hand-over's tokens say what became of them, as after every crash. What is no sign
//! of that gets an error instead:
//!
//! - calls that are newer than these lists: `ENOSYS`, which the C library takes for an older kernel;
//! - `clone3`, likewise, whose flags a filter cannot see: the C library makes its threads by `clone` then;
//! - a socket of the family `AF_NETLINK`, which the resolver tries: `EAFNOSUPPORT`;
//! - files that a thread with a narrow task would open, such as for the backtrace of a panic: `EACCES`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use libc as c;
use mirrorvm::threads::{self, Role};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::{Confine, Force};

/// Calls of a program that computes, has threads and time, and writes its log.
const EVERYBODY: &[i64] = &[
    c::SYS_brk,
    c::SYS_clock_getres,
    c::SYS_clock_gettime,
    c::SYS_clock_nanosleep,
    c::SYS_close,
    // Dropping what the runtime watched.
    c::SYS_epoll_ctl,
    c::SYS_exit,
    c::SYS_exit_group,
    c::SYS_fcntl,
    c::SYS_fstat,
    c::SYS_futex,
    c::SYS_getcpu,
    c::SYS_getpid,
    c::SYS_getrandom,
    c::SYS_getrusage,
    c::SYS_gettid,
    c::SYS_gettimeofday,
    c::SYS_madvise,
    c::SYS_membarrier,
    c::SYS_mlock,
    c::SYS_mremap,
    c::SYS_munlock,
    c::SYS_munmap,
    c::SYS_nanosleep,
    c::SYS_poll,
    c::SYS_ppoll,
    c::SYS_read,
    c::SYS_restart_syscall,
    c::SYS_rseq,
    c::SYS_rt_sigaction,
    c::SYS_rt_sigprocmask,
    c::SYS_rt_sigreturn,
    c::SYS_sched_getaffinity,
    c::SYS_sched_yield,
    c::SYS_set_robust_list,
    // Whoever calls a migration off ends its connections.
    c::SYS_shutdown,
    c::SYS_sigaltstack,
    c::SYS_tgkill,
    c::SYS_time,
    c::SYS_write,
    c::SYS_writev,
];

/// What it takes to carry pages over a connection, with memory and a place on the processors.
const CARRYING: &[i64] = &[
    c::SYS_fallocate,
    c::SYS_getpeername,
    c::SYS_getpriority,
    c::SYS_getsockname,
    c::SYS_getsockopt,
    c::SYS_readv,
    c::SYS_recvfrom,
    c::SYS_recvmsg,
    c::SYS_sched_getparam,
    c::SYS_sched_getscheduler,
    c::SYS_sched_setaffinity,
    c::SYS_sched_setscheduler,
    c::SYS_sendmsg,
    c::SYS_sendto,
    c::SYS_setpriority,
    c::SYS_setsockopt,
];

/// What SQLite and files beside a database take, beside what [names](NAMING) them.
const STORING: &[i64] = &[
    c::SYS_fallocate,
    c::SYS_fchmod,
    c::SYS_fchown,
    c::SYS_fdatasync,
    c::SYS_flock,
    c::SYS_fstatfs,
    c::SYS_fsync,
    c::SYS_ftruncate,
    c::SYS_getdents64,
    c::SYS_getegid,
    c::SYS_geteuid,
    c::SYS_getgid,
    c::SYS_getuid,
    c::SYS_lseek,
    c::SYS_pread64,
    c::SYS_preadv,
    c::SYS_pwrite64,
    c::SYS_pwritev,
    c::SYS_statfs,
];

/// What waiting on a QEMU takes.
const KEEPING: &[i64] = &[c::SYS_recvfrom, c::SYS_recvmsg, c::SYS_sendmsg, c::SYS_sendto, c::SYS_socketpair];

/// What else the daemon does: it listens, connects, makes memory, and has a runtime.
const SERVING: &[i64] = &[
    c::SYS_accept,
    c::SYS_accept4,
    c::SYS_bind,
    c::SYS_connect,
    c::SYS_copy_file_range,
    c::SYS_dup,
    c::SYS_dup3,
    c::SYS_epoll_create1,
    c::SYS_epoll_pwait,
    c::SYS_epoll_pwait2,
    c::SYS_epoll_wait,
    c::SYS_eventfd2,
    c::SYS_fadvise64,
    c::SYS_fchmodat,
    c::SYS_getppid,
    c::SYS_listen,
    c::SYS_memfd_create,
    c::SYS_mincore,
    c::SYS_mlock2,
    c::SYS_msync,
    c::SYS_pipe2,
    c::SYS_preadv2,
    c::SYS_pwritev2,
    c::SYS_recvmmsg,
    // A thread takes its own, shorter list with it.
    c::SYS_seccomp,
    c::SYS_sendfile,
    c::SYS_sendmmsg,
    c::SYS_set_tid_address,
    c::SYS_sysinfo,
    c::SYS_timerfd_create,
    c::SYS_timerfd_settime,
    c::SYS_umask,
    c::SYS_uname,
    c::SYS_utimensat,
];

/// Calls that open or name files: threads without files are refused them.
const NAMING: &[i64] = &[
    c::SYS_access,
    c::SYS_faccessat,
    c::SYS_faccessat2,
    c::SYS_getcwd,
    c::SYS_lstat,
    c::SYS_mkdir,
    c::SYS_mkdirat,
    c::SYS_newfstatat,
    c::SYS_open,
    c::SYS_openat,
    c::SYS_openat2,
    c::SYS_readlink,
    c::SYS_readlinkat,
    c::SYS_rename,
    c::SYS_renameat,
    c::SYS_renameat2,
    c::SYS_rmdir,
    c::SYS_stat,
    c::SYS_statx,
    c::SYS_unlink,
    c::SYS_unlinkat,
];

/// Numbers of calls that came with Linux 5.17 or will come: whoever tries one has a way without it.
const NEWER: std::ops::Range<i64> = 450..560;

/// Gives the vector that a program started with: rustix asks for the size of a page. Linux 6.4.
const PR_GET_AUXV: i32 = 0x4155_5856;

/// Commands of KVM (`KVMIO`) and of the SEV device: the second byte of an ioctl says whose it is.
const KVM: u64 = 0xae00;
const SEV: u64 = 0x5300;
/// Commands of sockets. The C library asks which interface an address is of before it sorts what a name has;
/// those that change an interface take a capability, which is given up.
const SOCKET: u64 = 0x8900;
const WHOSE: u64 = 0xff00;

/// What a thread may do beyond plain calls, by their arguments.
#[derive(Clone, Copy)]
struct Also {
    /// Whose commands to devices.
    ioctl: &'static [(u64, u64)],
    /// Whether it starts threads.
    threads: bool,
    /// Whether it makes sockets.
    sockets: bool,
    /// Whether it maps programs' code: the C library loads what its configuration of names asks for.
    code: bool,
}

/// Mask and value of the commands of the daemon's own.
const IOCTLS: &[(u64, u64)] = &[
    (WHOSE, KVM),
    (WHOSE, SEV),
    (WHOSE, SOCKET),
    (u64::MAX, c::FIONBIO),
    (u64::MAX, c::FIONREAD),
    (u64::MAX, c::FIOCLEX),
    // Whether stderr is a terminal.
    (u64::MAX, c::TCGETS),
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Made<T> = Result<T, BackendError>;

/// One argument's low 32 bits, under a mask, have a value.
fn argument(index: u8, mask: u64, value: u64) -> Made<SeccompCondition> {
    let mask = mask & u64::from(u32::MAX);
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value & mask)
}

fn when(conditions: Vec<SeccompCondition>) -> Made<SeccompRule> {
    SeccompRule::new(conditions)
}

/// Everything that a thread may call.
fn allowed(lists: &[&[i64]], also: Also) -> Made<Rules> {
    let mut rules: Rules = lists.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    let bits = |flags: i32| flags as u32 as u64;
    // Memory is for data or for code, and never becomes code.
    let code = bits(c::PROT_EXEC);
    let mapped = if also.code { bits(c::PROT_EXEC | c::PROT_WRITE) } else { code };
    let not = |index, mask: u64, forbidden: u64| -> Made<Vec<SeccompRule>> {
        // The bits under the mask have any value but the forbidden one.
        let values = (0..=mask).filter(|value| value & !mask == 0 && *value != forbidden);
        values.map(|value| when(vec![argument(index, mask, value)?])).collect()
    };
    rules.insert(c::SYS_mmap, not(2, mapped, mapped)?);
    rules.insert(c::SYS_mprotect, not(2, code, code)?);
    let prctl = [c::PR_SET_NAME, c::PR_GET_NAME, c::PR_SET_VMA, c::PR_SET_NO_NEW_PRIVS, PR_GET_AUXV];
    let named = |option: i32| when(vec![argument(0, u64::MAX, bits(option))?]);
    rules.insert(c::SYS_prctl, prctl.into_iter().map(named).collect::<Made<_>>()?);
    // Limits are asked for, of this process, and not set.
    rules.insert(
        c::SYS_prlimit64,
        vec![when(vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?])?],
    );
    if !also.ioctl.is_empty() {
        let command = |(mask, value): &(u64, u64)| when(vec![argument(1, *mask, *value)?]);
        rules.insert(c::SYS_ioctl, also.ioctl.iter().map(command).collect::<Made<_>>()?);
    }
    if also.threads {
        // A thread of this process, never another process.
        let thread = bits(c::CLONE_VM | c::CLONE_THREAD | c::CLONE_SIGHAND);
        rules.insert(c::SYS_clone, vec![when(vec![argument(0, thread, thread)?])?]);
        rules.insert(c::SYS_clone3, Vec::new());
    }
    if also.sockets {
        let families = [c::AF_UNIX, c::AF_INET, c::AF_INET6, c::AF_NETLINK];
        let family = |family| when(vec![argument(0, u64::MAX, bits(family))?]);
        rules.insert(c::SYS_socket, families.into_iter().map(family).collect::<Made<_>>()?);
        rules.insert(c::SYS_socketpair, vec![when(vec![argument(0, u64::MAX, bits(c::AF_UNIX))?])?]);
    }
    // They get their errors from another filter.
    rules.extend(NEWER.map(|call| (call, Vec::new())));
    Ok(rules)
}

fn program(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> Made<BpfProgram> {
    SeccompFilter::new(rules, otherwise, then, TargetArch::x86_64)?.try_into()
}

/// Filters that answer certain calls with an error and let all others to the lists.
fn refusals(calls: impl IntoIterator<Item = i64>, errno: i32) -> Made<BpfProgram> {
    let rules = calls.into_iter().map(|call| (call, Vec::new())).collect();
    program(rules, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()))
}

/// The daemon's own filters.
fn of_everybody(otherwise: SeccompAction) -> Made<Vec<BpfProgram>> {
    let lists = [EVERYBODY, CARRYING, STORING, NAMING, SERVING];
    let all = allowed(&lists, Also { ioctl: IOCTLS, threads: true, sockets: true, code: true })?;
    let netlink = when(vec![argument(0, u64::MAX, c::AF_NETLINK as u64)?])?;
    let netlink = program(
        Rules::from([(c::SYS_socket, vec![netlink])]),
        SeccompAction::Allow,
        SeccompAction::Errno(c::EAFNOSUPPORT.unsigned_abs()),
    )?;
    Ok(vec![
        refusals(NEWER.chain([c::SYS_clone3]), c::ENOSYS)?,
        netlink,
        program(all, otherwise, SeccompAction::Allow)?,
    ])
}

/// What a thread with this task takes on top; nothing for one whose task is as wide as the daemon's.
fn of_role(role: Role, otherwise: SeccompAction) -> Made<Vec<BpfProgram>> {
    let none = Also { ioctl: &[], threads: false, sockets: false, code: false };
    let kvm = Also { ioctl: &[(WHOSE, KVM), (WHOSE, SEV)], ..none };
    let (lists, also): (&[&[i64]], Also) = match role {
        Role::Vcpu => (&[EVERYBODY], kvm),
        Role::Pages => (&[EVERYBODY, CARRYING], kvm),
        // What is stored is told by the thread that stored it, over links that there are.
        Role::Store => (&[EVERYBODY, STORING, NAMING, CARRYING], none),
        Role::Keeper => (&[EVERYBODY, KEEPING], none),
        Role::Link | Role::Resolver => return Ok(Vec::new()),
    };
    let mut rules = allowed(lists, also)?;
    let files = matches!(role, Role::Store);
    let mut filters = Vec::new();
    if !files {
        rules.extend(NAMING.iter().map(|call| (*call, Vec::new())));
        filters.push(refusals(NAMING.iter().copied(), c::EACCES)?);
    }
    filters.push(program(rules, otherwise, SeccompAction::Allow)?);
    Ok(filters)
}

/// What threads take, by role, once the daemon is filtered.
static ROLES: OnceLock<Vec<(Role, Vec<BpfProgram>)>> = OnceLock::new();

/// Called by every thread of the library's when it starts.
fn narrow(role: Role) {
    let filters = ROLES.get().and_then(|all| all.iter().find(|(of, _)| *of == role));
    for filter in filters.into_iter().flat_map(|(_, filters)| filters) {
        if let Err(error) = apply_filter(filter) {
            // It is still held to the daemon's own list.
            tracing::warn!(%error, role = role.name(), "a thread has no list of system calls of its own");
        }
    }
}

/// Filters the calling thread, and by it every one that starts from now on.
pub(super) fn filter(mode: Confine) -> Force {
    let otherwise = match mode {
        Confine::Enforce => SeccompAction::KillProcess,
        Confine::Log => SeccompAction::Log,
        Confine::None => return Force::Off,
    };
    match install(otherwise) {
        Ok(()) if mode == Confine::Log => Force::Logged,
        Ok(()) => Force::Enforced,
        Err(why) => Force::Unavailable(why),
    }
}

fn install(otherwise: SeccompAction) -> Result<(), String> {
    let made = |e: BackendError| format!("a filter cannot be made: {e}");
    let roles = Role::ALL.iter().map(|role| Ok((*role, of_role(*role, otherwise.clone())?)));
    let roles = roles.collect::<Made<Vec<_>>>().map_err(made)?;
    for filter in of_everybody(otherwise).map_err(made)? {
        apply_filter(&filter).map_err(|e| format!("the kernel takes no filter of system calls: {e}"))?;
    }
    let _ = ROLES.set(roles);
    threads::on_start(narrow);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::ToSocketAddrs as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

    use super::*;

    /// Which call of [`forbidden`] a process of its own makes.
    const CALL: &str = "MIRRORVM_TEST_FORBIDDEN_CALL";

    fn role(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| format!("{role:?}") == name)
    }

    /// Makes a call on a thread that is filtered as one of this task; `Daemon`: as the runtime's.
    fn make(call: &str, task: &str) -> Result<(), rustix::io::Errno> {
        if let Some(role) = role(task) {
            narrow(role);
        }
        let socket = |family| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map(drop);
        match call {
            "execve" => Command::new("/bin/true")
                .status()
                .map(drop)
                .map_err(|e| rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO)),
            "chroot" => rustix::process::chroot("/"),
            "socket" => socket(AddressFamily::INET),
            "netlink" => socket(AddressFamily::NETLINK),
            "packet" => socket(AddressFamily::PACKET),
            "open" => rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).map(drop),
            // Names that there are, and one that nobody has: whatever becomes of it.
            "names" => {
                for name in ["localhost", "ip6-localhost", "name.invalid"] {
                    let _ = (name, 1).to_socket_addrs().map(Iterator::count);
                }
                let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
                rustix::net::netdevice::name_to_index(&socket, "lo").map(drop)
            }
            "sync" => rustix::fs::fsync(std::io::stderr()),
            "thread" => std::thread::Builder::new()
                .spawn(|| ())
                .map(|t| t.join().unwrap())
                .map_err(|e| rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO)),
            "getpid" => {
                let _ = rustix::process::getpid();
                Ok(())
            }
            other => panic!("no call {other}"),
        }
    }

    /// What becomes of a process that makes a call under the filters: the signal that ended it, or its
    /// answer.
    fn outcome(call: &str, task: &str) -> Result<String, i32> {
        let this = "confine::calls::tests::a_call_that_is_on_no_list_ends_the_process";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", this, "--nocapture", "--test-threads=1"])
            .env(CALL, format!("{call} {task}"))
            .output()
            .unwrap();
        match output.status.signal() {
            Some(signal) => Err(signal),
            None => {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                Ok(said.split("answer:").nth(1).expect(&said).split('.').next().unwrap().to_owned())
            }
        }
    }

    #[test]
    fn a_call_that_is_on_no_list_ends_the_process() {
        if let Ok(wanted) = std::env::var(CALL) {
            let (call, task) = wanted.split_once(' ').unwrap();
            if filter(Confine::Enforce) != Force::Enforced {
                println!("answer:no filters.");
                return;
            }
            println!("answer:{:?}.", make(call, task));
            return;
        }
        if outcome("getpid", "Daemon") == Ok("no filters".into()) {
            println!("SKIPPED (no seccomp here): this test ran nothing");
            return;
        }
        let ends = Err(c::SIGSYS);
        for (call, task, expected) in [
            ("getpid", "Daemon", Ok("Ok(())")),
            ("thread", "Daemon", Ok("Ok(())")),
            ("socket", "Daemon", Ok("Ok(())")),
            ("open", "Daemon", Ok("Ok(())")),
            ("names", "Daemon", Ok("Ok(())")),
            (
                "netlink",
                "Daemon",
                Ok("Err(Os { code: 97, kind: Uncategorized, message: \"Address family not \
                                      supported by protocol\" })"),
            ),
            ("execve", "Daemon", ends),
            ("chroot", "Daemon", ends),
            ("packet", "Daemon", ends),
            ("getpid", "Vcpu", Ok("Ok(())")),
            ("socket", "Vcpu", ends),
            ("thread", "Vcpu", ends),
            ("sync", "Vcpu", ends),
            ("socket", "Pages", ends),
            ("thread", "Pages", ends),
            ("getpid", "Store", Ok("Ok(())")),
            ("open", "Store", Ok("Ok(())")),
            ("socket", "Store", ends),
            ("thread", "Store", ends),
            ("socket", "Keeper", ends),
            ("execve", "Keeper", ends),
            ("socket", "Link", Ok("Ok(())")),
            ("execve", "Link", ends),
            ("socket", "Resolver", Ok("Ok(())")),
            ("names", "Resolver", Ok("Ok(())")),
            ("execve", "Resolver", ends),
        ] {
            assert_eq!(outcome(call, task), expected.map(str::to_owned), "{call} on a thread of {task}");
        }
        for task in ["Vcpu", "Pages", "Keeper"] {
            let answer = outcome("open", task).unwrap();
            assert!(answer.contains("code: 13"), "a file, by a thread of {task}: {answer}");
        }
    }

    #[test]
    fn a_shorter_list_has_nothing_that_the_daemon_s_own_lacks() {
        let all = allowed(
            &[EVERYBODY, CARRYING, STORING, NAMING, SERVING],
            Also { ioctl: IOCTLS, threads: true, sockets: true, code: true },
        )
        .unwrap();
        for call in EVERYBODY.iter().chain(CARRYING).chain(STORING).chain(KEEPING).chain(NAMING) {
            assert!(all.contains_key(call), "call {call}");
        }
        for never in [c::SYS_execve, c::SYS_execveat, c::SYS_fork, c::SYS_vfork, c::SYS_ptrace, c::SYS_bpf] {
            assert!(!all.contains_key(&never), "call {never}");
        }
    }
}
