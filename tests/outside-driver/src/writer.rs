//! The guest: a thread that writes one page after the other while it is let.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::guest::Console;
use mirrorvm::memory::GuestRam;
use mirrorvm::pages::PageSet;

/// Pages between two lines on the console.
const LINE: u64 = 64;

#[derive(Default)]
struct State {
    /// Pages written so far: the guest's only register.
    written: u64,
    running: bool,
    ending: bool,
    /// What was written since it was last taken; `None`: not logged.
    log: Option<PageSet>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread and what it shares with its machine. A page is written while the state is held: whoever holds
/// it sees a guest that stands still.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A page as the guest writes it the `n`th time that it writes any.
fn content(n: u64) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0; PAGE_SIZE as usize];
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes());
    }
    page
}

/// The guest's pages, in the order of RAM.
pub fn pages(ram: &GuestRam) -> Vec<RamPage> {
    let layout = ram.layout();
    let of = |b: &mirrorvm::address_space::RamBlock| {
        let first = b.ram_addr.page().get();
        (first..first + b.size / PAGE_SIZE).map(RamPage::new)
    };
    layout.ram().flat_map(of).collect()
}

impl Writer {
    /// A guest that stands still.
    pub fn new(ram: GuestRam, console: Arc<Console>, pages_per_second: u64) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let pause = Duration::from_secs(1) / u32::try_from(pages_per_second).unwrap_or(1).max(1);
        let name = "outside guest".to_owned();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let pages = pages(&ram);
            let mut state = theirs.state();
            while !state.ending {
                if !state.running {
                    state = theirs.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                // Every seventh page is left as it is, so that not all of RAM is ever written.
                let at = pages[(state.written * 7 % pages.len() as u64) as usize];
                let _ = ram.write_page(at, &content(state.written));
                state.written += 1;
                if let Some(log) = &mut state.log {
                    log.insert(at);
                }
                if state.written.is_multiple_of(LINE) {
                    console.append(format!("written {}\n", state.written).as_bytes());
                }
                let wait = theirs.changed.wait_timeout(state, pause);
                state = wait.unwrap_or_else(PoisonError::into_inner).0;
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn run(&self, running: bool) {
        self.shared.state().running = running;
        self.shared.changed.notify_all();
    }

    pub fn written(&self) -> u64 {
        self.shared.state().written
    }

    pub fn set_written(&self, written: u64) {
        self.shared.state().written = written;
    }

    pub fn log(&self, on: bool) {
        self.shared.state().log = on.then(PageSet::default);
    }

    /// What was written since the last time; `None`: it is not logged.
    pub fn take_log(&self) -> Option<PageSet> {
        self.shared.state().log.as_mut().map(std::mem::take)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.state().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
