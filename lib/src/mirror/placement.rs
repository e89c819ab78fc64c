//! Where threads run, and how the kernel shares processors among them.
//!
//! Owns: processors and scheduling class of threads of this process, by thread id or for the caller's own.
//! Must not know: what the threads do.

use std::io;
use std::num::NonZero;

use rustix::process::{getpid, getpriority_process, setpriority_process};
use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};

/// The nice values that there are, see sched(7).
pub const NICE: std::ops::RangeInclusive<i8> = -20..=19;
/// Priorities of `fifo`, sched(7).
pub const FIFO_PRIORITIES: std::ops::RangeInclusive<u8> = 1..=99;

/// How the kernel schedules a thread, sched(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// `SCHED_OTHER`, the kernel's default.
    Other {
        /// -20 (most of a processor) to 19.
        nice: i8,
    },
    /// `SCHED_BATCH`: for work that nobody waits for.
    Batch {
        /// -20 (most of a processor) to 19.
        nice: i8,
    },
    /// `SCHED_IDLE`: what is left over.
    Idle,
    /// `SCHED_FIFO`: before all others, until it sleeps.
    Fifo {
        /// 1 to 99 (first of all).
        priority: u8,
    },
}

/// Where a mirror's threads run. The default: as the daemon itself does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Logical processors of the host; none: those of the daemon.
    pub cpus: Vec<u32>,
    /// How they are scheduled; `None`: as the daemon.
    pub scheduler: Option<Scheduler>,
}

/// Why threads are not where they should be.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// There is no such processor, or it is not online.
    #[error("none of the processors named is one that this process may use")]
    NoSuchCpu,
    /// The daemon lacks a capability or a limit (`RLIMIT_NICE`, `RLIMIT_RTPRIO`).
    #[error(
        "the kernel does not let this daemon schedule its threads so: it needs CAP_SYS_NICE, or higher RLIMIT_NICE and \
         RLIMIT_RTPRIO (systemd: LimitNICE=, LimitRTPRIO=)"
    )]
    Forbidden,
    /// The kernel refused for another reason.
    #[error("the kernel refuses")]
    Kernel(#[source] io::Error),
}

impl Placement {
    /// Places the calling thread.
    ///
    /// # Errors
    /// [`PlacementError`]; the thread may be placed in part.
    pub fn apply_to_current_thread(&self) -> Result<(), PlacementError> {
        self.place(gettid())
    }

    /// Places a thread of this process, by its kernel id. One that has ended meanwhile needs no place.
    ///
    /// # Errors
    /// [`PlacementError`]; the thread may be placed in part.
    pub fn apply_to(&self, tid: u32) -> Result<(), PlacementError> {
        let tid = i32::try_from(tid).ok().and_then(Pid::from_raw);
        match tid.map(|tid| self.place(tid)) {
            Some(Err(PlacementError::Kernel(e))) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Some(done) => done,
            None => Ok(()),
        }
    }

    /// The class is first: it is what can be forbidden.
    fn place(&self, tid: Pid) -> Result<(), PlacementError> {
        let scheduler = match self.scheduler {
            Some(chosen) => chosen,
            None => Scheduler::Other { nice: own_nice()? },
        };
        schedule(tid, scheduler)?;
        let mut set = CpuSet::new();
        for cpu in &self.cpus {
            if *cpu as usize >= CpuSet::MAX_CPU {
                return Err(PlacementError::NoSuchCpu);
            }
            set.set(*cpu as usize);
        }
        if self.cpus.is_empty() {
            // The main thread is where the service manager put the daemon.
            set = sched_getaffinity(Some(getpid())).map_err(kernel)?;
        }
        sched_setaffinity(Some(tid), &set).map_err(kernel)
    }
}

/// The daemon's own: its main thread is never placed.
fn own_nice() -> Result<i8, PlacementError> {
    let nice = getpriority_process(Some(getpid())).map_err(kernel)?;
    Ok(i8::try_from(nice).unwrap_or(0))
}

fn schedule(tid: Pid, scheduler: Scheduler) -> Result<(), PlacementError> {
    let (policy, priority, nice) = match scheduler {
        Scheduler::Other { nice } => (libc::SCHED_OTHER, 0, Some(nice)),
        Scheduler::Batch { nice } => (libc::SCHED_BATCH, 0, Some(nice)),
        Scheduler::Idle => (libc::SCHED_IDLE, 0, None),
        Scheduler::Fifo { priority } => (libc::SCHED_FIFO, i32::from(priority), None),
    };
    set_class(tid, policy, priority)?;
    // Of one thread: to Linux, the "process" of setpriority(2) is a thread.
    nice.map_or(Ok(()), |nice| setpriority_process(Some(tid), i32::from(nice)).map_err(kernel))
}

#[expect(
    unsafe_code,
    reason = "UNSAFETY: sched_setscheduler(2) reads a struct, and no crate we use wraps it"
)]
fn set_class(tid: Pid, policy: i32, priority: i32) -> Result<(), PlacementError> {
    let parameters = libc::sched_param { sched_priority: priority };
    let tid: NonZero<i32> = tid.as_raw_nonzero();
    // SAFETY: the kernel reads `parameters`, which lives until after the call, and writes nothing of ours.
    let result = unsafe { libc::sched_setscheduler(tid.get(), policy, &raw const parameters) };
    if result < 0 { Err(refused(io::Error::last_os_error())) } else { Ok(()) }
}

fn kernel(error: rustix::io::Errno) -> PlacementError {
    refused(error.into())
}

fn refused(error: io::Error) -> PlacementError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => PlacementError::Forbidden,
        Some(libc::EINVAL) => PlacementError::NoSuchCpu,
        _ => PlacementError::Kernel(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Class, nice value and processors of a thread, as /proc has them: not by the calls under test.
    fn seen(tid: u32) -> (i32, i32, String) {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
        // Fields after the name, which may hold anything: state is the third of proc_pid_stat(5).
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let field = |n: usize| fields[n - 3].parse::<i32>().unwrap();
        let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
        let cpus = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap();
        (field(41), field(19), cpus.trim().to_owned())
    }

    fn on_a_thread(test: impl FnOnce(u32) + Send + 'static) {
        std::thread::spawn(move || test(gettid().as_raw_nonzero().get().unsigned_abs())).join().unwrap();
    }

    #[test]
    fn a_thread_runs_where_and_how_it_was_told_and_back() {
        let first = sched_getaffinity(Some(getpid())).map(|s| (0..CpuSet::MAX_CPU).find(|c| s.is_set(*c)));
        let first = first.unwrap().unwrap() as u32;
        on_a_thread(move |tid| {
            let before = seen(tid);
            let placed = Placement { cpus: vec![first], scheduler: Some(Scheduler::Batch { nice: 19 }) };
            placed.apply_to_current_thread().unwrap();
            assert_eq!(seen(tid), (libc::SCHED_BATCH, 19, first.to_string()));
            // By id, from another thread.
            let idle = Placement { cpus: vec![], scheduler: Some(Scheduler::Idle) };
            std::thread::spawn(move || idle.apply_to(tid)).join().unwrap().unwrap();
            assert_eq!((seen(tid).0, seen(tid).2), (libc::SCHED_IDLE, before.2.clone()));
            match Placement::default().apply_to_current_thread() {
                Ok(()) => assert_eq!(seen(tid), before),
                // Without CAP_SYS_NICE nobody gets back up.
                Err(e) => assert!(matches!(e, PlacementError::Forbidden), "{e:?}"),
            }
        });
    }

    #[test]
    fn refusals_are_typed() {
        on_a_thread(|tid| {
            let cpus = |cpus| Placement { cpus, scheduler: None };
            let none = cpus(vec![CpuSet::MAX_CPU as u32]).apply_to_current_thread();
            assert!(matches!(none, Err(PlacementError::NoSuchCpu)), "{none:?}");
            let offline = cpus(vec![CpuSet::MAX_CPU as u32 - 1]).apply_to_current_thread();
            assert!(matches!(offline, Err(PlacementError::NoSuchCpu)), "{offline:?}");
            let first = Scheduler::Fifo { priority: 1 };
            match (Placement { cpus: vec![], scheduler: Some(first) }).apply_to_current_thread() {
                Ok(()) => assert_eq!(seen(tid).0, libc::SCHED_FIFO),
                Err(e) => assert!(matches!(e, PlacementError::Forbidden), "{e:?}"),
            }
        });
        // Gone threads need no place.
        let gone = std::thread::spawn(|| gettid().as_raw_nonzero().get().unsigned_abs()).join().unwrap();
        Placement::default().apply_to(gone).unwrap();
    }
}
