//! The machine under the helper when that is a mirror vCPU: windows at fixed addresses, a doorbell port.

use core::arch::{
    asm,
    x86_64::{_MM_HINT_T1, _mm_prefetch},
};
use core::sync::atomic::{AtomicU32, Ordering};

use mirrorvm_abi::{
    PAGE_BYTES,
    config::{Config, FIXED_BYTES, SECRET_BYTES, SECRET_MAGIC},
    evidence::{RELEASE_AT, RELEASE_BYTES},
    layout,
    mailbox::{DOORBELL_PORT, Doorbell, Fatal, worker_stride},
};
use mirrorvm_helper::{Env, Region};

/// Bytes of a cache line.
const LINE: usize = 64;

/// A worker's view of the machine.
pub struct Bare {
    mailbox: u64,
}

impl Bare {
    pub fn new(config: &Config, index: u64) -> Self {
        Self { mailbox: layout::MAILBOX_VA + index * worker_stride(config.slots) as u64 }
    }

    const fn at(&self, region: Region) -> *mut u8 {
        (self.mailbox + region.0 as u64) as *mut u8
    }
}

impl Env for Bare {
    fn load(&self, at: Region) -> u32 {
        // SAFETY: the cursor lies in this worker's mapped control page and is aligned; the host writes it
        // with atomic stores.
        unsafe { (*self.at(at).cast::<AtomicU32>()).load(Ordering::Acquire) }
    }

    fn store(&mut self, at: Region, value: u32) {
        // SAFETY: as in `load`; this worker is the only writer of its own cursors.
        unsafe { (*self.at(at).cast::<AtomicU32>()).store(value, Ordering::Release) }
    }

    fn read_mailbox(&mut self, at: Region, to: &mut [u8]) {
        // SAFETY: callers keep regions inside this worker's mapped part. The host may write at the same time:
        // `copy` is an opaque instruction, so the compiler never sees a value that changes, and `to` is ours.
        unsafe { copy(self.at(at), to.as_mut_ptr(), to.len()) }
    }

    fn write_mailbox(&mut self, at: Region, from: &[u8]) {
        // SAFETY: as in `read_mailbox`, the other way round.
        unsafe { copy(from.as_ptr(), self.at(at), from.len()) }
    }

    fn read_page(&mut self, page: u64, to: &mut [u8; PAGE_BYTES]) {
        // SAFETY: the page is on the allow-list, so the window maps it; the guest may write it meanwhile, see
        // `read_mailbox`.
        unsafe { copy(ram(page), to.as_mut_ptr(), PAGE_BYTES) }
    }

    fn prefetch_page(&self, page: u64) {
        for line in 0..PAGE_BYTES / LINE {
            // Into the second level: the first is what the page at work needs.
            // SAFETY: a hint, which reads nothing and cannot fault, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(ram(page).wrapping_add(line * LINE).cast()) }
        }
    }

    fn write_page(&mut self, page: u64, from: &[u8; PAGE_BYTES]) {
        // SAFETY: as in `read_page`.
        unsafe { copy(from.as_ptr(), ram(page), PAGE_BYTES) }
    }

    fn random(&mut self, words: &mut [u64]) -> bool {
        words.iter_mut().all(|word| rdrand().map(|v| *word = v).is_some())
    }

    fn secret(&self) -> Option<[u8; SECRET_BYTES]> {
        let page = layout::SECRET_VA as *const u8;
        let mut magic = [0; 8];
        let mut secret = [0; SECRET_BYTES];
        // SAFETY: the secret page is mapped read-only and holds at least 40 bytes.
        unsafe {
            copy(page, magic.as_mut_ptr(), 8);
            copy(page.add(8), secret.as_mut_ptr(), SECRET_BYTES);
        }
        (u64::from_le_bytes(magic) == SECRET_MAGIC).then_some(secret)
    }

    fn release(&self) -> [u8; RELEASE_BYTES] {
        let mut release = [0; RELEASE_BYTES];
        let page = layout::SECRET_VA as *const u8;
        // SAFETY: the secret page is mapped read-only, and the release part lies inside of it.
        unsafe { copy(page.add(RELEASE_AT), release.as_mut_ptr(), RELEASE_BYTES) }
        release
    }

    fn doorbell(&mut self, reason: Doorbell) {
        ring(reason as u32);
    }
}

/// The configuration that the loader wrote.
pub fn config() -> Option<Config> {
    let mut raw = [0; FIXED_BYTES];
    // SAFETY: the first configuration page is always mapped.
    unsafe { copy(layout::CONFIG_VA as *const u8, raw.as_mut_ptr(), FIXED_BYTES) };
    Config::decode(&raw)
}

/// Zeroes the image's uninitialized data, before anything there is used.
pub fn clear(from: u64, to: u64) {
    let len = to - from;
    // SAFETY: the linker's own symbols around memory that the plan maps writable; no reference into it exists
    // yet, and the other workers begin after the first.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") from => _, in("al") 0u8,
             options(nostack, preserves_flags));
    }
}

/// Stops for good with a reason.
pub fn fatal(why: Fatal) -> ! {
    loop {
        ring(Doorbell::Fatal as u32 | (why as u32) << 8);
    }
}

fn ram(page: u64) -> *mut u8 {
    (layout::WINDOW_VA + page * PAGE_BYTES as u64) as *mut u8
}

fn ring(value: u32) {
    // SAFETY: the vCPU is entered with IOPL 3; the port is the host's and the write leaves to it.
    unsafe { asm!("out dx, eax", in("dx") DOORBELL_PORT, in("eax") value, options(nostack, preserves_flags)) }
}

/// Copies through an instruction that the compiler cannot look into.
///
/// # Safety
/// Both spans are mapped for `len` bytes, `to` writable; they do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the caller; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
             options(nostack, preserves_flags));
    }
}

fn rdrand() -> Option<u64> {
    // Ten tries: what Intel and AMD both ask for before calling the source broken.
    (0..10).find_map(|_| {
        let (value, ok): (u64, u8);
        // SAFETY: every processor with SEV or AES-GCM speed worth having has RDRAND; one without faults, and
        // the host sees a dead vCPU.
        unsafe { asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
        (ok != 0).then_some(value)
    })
}
