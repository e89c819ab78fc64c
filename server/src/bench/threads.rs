//! What this process's threads compute and fault, by what `/proc/self/task` says.
//!
//! Owns: parsing of `stat`, a sampler that also keeps what threads had computed shortly before they ended.
//! Must not know: what threads do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::BenchError;

/// A thread as the kernel accounts it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Thread {
    /// At most 15 bytes.
    pub name: String,
    /// Seconds in user mode; of a vCPU's thread also in the guest.
    pub user: f64,
    /// Seconds in the kernel.
    pub system: f64,
    /// Page faults that needed no disk.
    pub faults: u64,
    /// When it began, in ticks since boot.
    pub began: u64,
}

/// Helpers' threads are called `mir` and their number.
pub(super) fn is_helper(thread: &Thread) -> bool {
    thread.name.strip_prefix("mir").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Parses one line of `/proc/*/stat` (proc_pid_stat(5)); the name may hold spaces and parentheses.
fn parse(line: &str, ticks_per_second: f64) -> Option<Thread> {
    let (open, close) = (line.find('(')?, line.rfind(')')?);
    let fields: Vec<_> = line.get(close + 1..)?.split_whitespace().collect();
    // The first of these is field 3 of the manual.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Thread {
        name: line.get(open + 1..close)?.to_owned(),
        faults: number(10)?,
        user: number(14)? as f64 / ticks_per_second,
        system: number(15)? as f64 / ticks_per_second,
        began: number(22)?,
    })
}

/// Every thread that there is now, by its id.
fn look() -> BTreeMap<u32, Thread> {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return BTreeMap::new() };
    tasks
        .flatten()
        .filter_map(|task| {
            let line = std::fs::read_to_string(task.path().join("stat")).ok()?;
            Some((task.file_name().to_str()?.parse().ok()?, parse(&line, ticks)?))
        })
        .collect()
}

/// Looks at all threads again and again.
pub(super) struct Sampler {
    before: BTreeMap<u32, Thread>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<BTreeMap<u32, Thread>>,
}

/// Between two looks: what a thread did after the last is lost.
const EVERY: Duration = Duration::from_millis(5);

impl Sampler {
    pub fn start() -> Result<Self, BenchError> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let before = look();
        let mut seen = before.clone();
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(move || {
            while !told.load(Ordering::Relaxed) {
                seen.extend(look());
                std::thread::sleep(EVERY);
            }
            seen.extend(look());
            seen
        })?;
        Ok(Self { before, stop, thread })
    }

    /// What every thread did since the start, oldest thread first.
    pub fn finish(self) -> Result<Vec<Thread>, BenchError> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.thread.join().map_err(|_| "the sampler panicked")?;
        let mut threads: Vec<_> = seen
            .into_iter()
            .map(|(tid, mut t)| {
                // A number that was given to another thread meanwhile is another thread's.
                if let Some(b) = self.before.get(&tid).filter(|b| b.began == t.began) {
                    t.user -= b.user;
                    t.system -= b.system;
                    t.faults -= b.faults.min(t.faults);
                }
                (t.began, tid, t)
            })
            .collect();
        threads.sort_by_key(|(began, tid, _)| (*began, *tid));
        Ok(threads.into_iter().map(|(_, _, t)| t).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_stat() {
        let line = "7 (a (b) c) S 1 2 3 4 5 6 111 8 9 10 250 50 1 1 20 0 9 0 4242 1 1 1";
        let t = parse(line, 100.0).unwrap();
        assert_eq!((t.name.as_str(), t.faults, t.began), ("a (b) c", 111, 4242));
        assert!((t.user - 2.5).abs() < 1e-9 && (t.system - 0.5).abs() < 1e-9);
        assert_eq!(parse("7 (x) S 1 2", 100.0), None);
        assert_eq!(parse("nonsense", 100.0), None);
    }

    #[test]
    fn a_thread_that_ended_is_still_known() {
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let work = std::thread::Builder::new().name("bench-worker".into());
        // It has its name when its closure runs.
        let (ready, named) = std::sync::mpsc::channel();
        let handle = work.spawn(move || ready.send(()).map(|()| gone.recv().is_err())).unwrap();
        named.recv().unwrap();
        let sampler = Sampler::start().unwrap();
        drop(go);
        assert!(handle.join().unwrap().unwrap());
        let threads = sampler.finish().unwrap();
        assert!(threads.iter().any(|t| t.name == "bench-worker"), "{threads:?}");
    }
}
