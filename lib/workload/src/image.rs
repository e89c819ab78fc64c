//! The workload as a bare-metal program: entered per vCPU in 64-bit mode at CPL 3 with `rdi` = vCPU index.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "UNSAFETY: bare metal: fixed addresses of the boot contract, I/O ports")]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mirrorvm_workload::{
    BOOT_BYTES, BOOT_VA, Boot, CONSOLE_AT, CONSOLE_BYTES, MAP_RANGE_AT, PAGE, PORT_CONSOLE, PORT_MAP_RANGE,
    PORT_POWER_OFF, PORT_TICK, Pattern, RAM_VA, SHARED_PAGES, SHARED_VA, STATS_BYTES, share,
};

type Page = [u64; PAGE / 8];

#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.start")]
extern "C" fn start(index: u64) -> ! {
    // SAFETY: the host mapped the boot page read-only before the first instruction.
    let boot = Boot::decode(unsafe { &*(BOOT_VA as *const [u8; BOOT_BYTES]) });
    if boot.vcpus == 0 || index >= boot.vcpus {
        power_off();
    }
    let mut guest = Guest { boot, index, shown: 0 };
    if index == 0 {
        guest.share_pages();
        guest.line(&["mirrorvm workload: filling RAM"], &[]);
    }
    guest.fill();
    guest.work()
}

struct Guest {
    boot: Boot,
    index: u64,
    shown: u64,
}

impl Guest {
    /// Tells the host that the shared pages are no secret.
    fn share_pages(&self) {
        for (i, value) in [self.boot.shared_gpa, SHARED_PAGES, 0].into_iter().enumerate() {
            shared(MAP_RANGE_AT / 8 + i).store(value, Relaxed);
        }
        if read_port(PORT_MAP_RANGE) != 0 {
            self.line(&["the host refuses to share pages"], &[]);
        }
    }

    fn fill(&self) {
        self.fill_piece(self.boot.free_from, self.boot.free_to, self.boot.working_set);
        for (at, len) in self.boot.more {
            self.fill_piece(at, at + len, 0);
        }
        self.stat(3).store(1, Relaxed);
    }

    /// Fills a piece of RAM; the first `always` pages in any case, since the work begins with checking them.
    fn fill_piece(&self, from: u64, to: u64, always: u64) {
        let pages = (to - from) / PAGE as u64;
        let wanted = if self.boot.fill != 0 { pages } else { always.min(pages) };
        let (first, last) = share(wanted, self.index, self.boot.vcpus);
        for page in (from / PAGE as u64 + first)..(from / PAGE as u64 + last) {
            Pattern::new(page, 0).fill(ram(page));
        }
    }

    fn work(&mut self) -> ! {
        let base = self.boot.free_from / PAGE as u64;
        let (first, last) = share(self.boot.working_set, self.index, self.boot.vcpus);
        let rate = self.boot.pages_per_tick_q16 * (last - first) / self.boot.working_set.max(1);
        let (mut next, mut generation, mut due) = (first, 0, 0u64);
        loop {
            let ticks = u64::from(read_port(PORT_TICK));
            self.add(0, ticks);
            // A guest that was held does not catch up for ever: one second's work at most.
            due = (due + rate * ticks).min((rate * 100).max(1 << 16));
            while due >= 1 << 16 && first < last {
                due -= 1 << 16;
                let page = ram(base + next);
                if !Pattern::new(base + next, generation).matches(page) {
                    self.add(2, 1);
                }
                Pattern::new(base + next, generation + 1).fill(page);
                self.add(1, 1);
                next += 1;
                if next == last {
                    next = first;
                    generation += 1;
                }
            }
            if self.index == 0 {
                self.report();
            }
        }
    }

    /// A line ten times a second.
    fn report(&mut self) {
        let ticks = self.stat(0).load(Relaxed);
        if ticks / 10 == self.shown {
            return;
        }
        self.shown = ticks / 10;
        let sum = |field| (0..self.boot.vcpus).map(|v| stat_of(v, field).load(Relaxed)).sum::<u64>();
        self.line(&["tick ", " pages ", " errors "], &[ticks, sum(1), sum(2)]);
    }

    /// Prints words and numbers in turn, then a new line.
    fn line(&self, words: &[&str], numbers: &[u64]) {
        let mut line = Line { at: 0 };
        for (i, word) in words.iter().enumerate() {
            word.bytes().for_each(|b| line.put(b));
            if let Some(n) = numbers.get(i) {
                line.number(*n);
            }
        }
        line.put(b'\n');
        write_port(PORT_CONSOLE, line.at as u32);
    }

    fn stat(&self, field: u64) -> &'static AtomicU64 {
        stat_of(self.index, field)
    }

    fn add(&self, field: u64, n: u64) {
        let stat = self.stat(field);
        stat.store(stat.load(Relaxed) + n, Relaxed);
    }
}

struct Line {
    at: usize,
}

impl Line {
    fn put(&mut self, byte: u8) {
        if self.at < CONSOLE_BYTES {
            let to = (SHARED_VA + (CONSOLE_AT + self.at) as u64) as *mut u8;
            // SAFETY: inside the shared pages, which are mapped writable.
            unsafe { to.write_volatile(byte) };
            self.at += 1;
        }
    }

    fn number(&mut self, n: u64) {
        if n >= 10 {
            self.number(n / 10);
        }
        self.put(b'0' + (n % 10) as u8);
    }
}

fn stat_of(vcpu: u64, field: u64) -> &'static AtomicU64 {
    shared(vcpu as usize * STATS_BYTES / 8 + field as usize)
}

fn shared(word: usize) -> &'static AtomicU64 {
    // SAFETY: an aligned word of the shared pages; host and guest both access it as an atomic.
    unsafe { &*((SHARED_VA as *const AtomicU64).add(word)) }
}

fn ram(page: u64) -> &'static mut Page {
    // SAFETY: callers stay inside the RAM that the boot page names as free; a page belongs to one vCPU.
    unsafe { &mut *((RAM_VA + page * PAGE as u64) as *mut Page) }
}

fn read_port(port: u16) -> u32 {
    let value;
    // SAFETY: IOPL 3; the host answers. It may have written memory before it does, so no `nomem`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

fn write_port(port: u16, value: u32) {
    // SAFETY: as in `read_port`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

fn power_off() -> ! {
    loop {
        write_port(PORT_POWER_OFF, 0);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    power_off()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the C contract of memset.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value as u8,
             options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the C contract of memcpy.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
             options(nostack, preserves_flags));
    }
    to
}
