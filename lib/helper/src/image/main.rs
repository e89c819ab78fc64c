//! The bare-metal program: entered on a mirror vCPU in 64-bit mode at CPL 3, on page tables that the plan
//! made.
//!
//! No interrupts, no kernel, no heap. It owns the image header and the few instructions that the library
//! cannot express; everything else is `mirrorvm_helper`. Built by mirrorvm's build script with its own linker
//! script into a flat, reproducible image.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "UNSAFETY: bare metal: fixed addresses of the ABI's layout, I/O ports, rdrand"
)]

mod bare;
mod libc;

use core::sync::atomic::{AtomicU64, Ordering};

use mirrorvm_abi::record::Suite;
use mirrorvm_abi::{config, header, layout, mailbox};
use mirrorvm_helper::{Digests, PageMaps, Scratch, Shared, Worker};

use bare::Bare;

unsafe extern "C" {
    static __image_base: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __data_end: u8;
    static __bss_end: u8;
}

/// The header as bytes of the image; `mirrorvm_abi::header::Header::parse` is its reader.
#[repr(C)]
struct RawHeader {
    guid: [u8; 16],
    version: u32,
    bytes: u32,
    abi_min: u32,
    abi_max: u32,
    layout_hash: u64,
    base: *const u8,
    entry: extern "C" fn(u64) -> !,
    text_end: *const u8,
    rodata_end: *const u8,
    data_end: *const u8,
    bss_end: *const u8,
    suites: u64,
}

// SAFETY: the pointers are link-time addresses that nobody dereferences.
unsafe impl Sync for RawHeader {}

const _: () = assert!(size_of::<RawHeader>() == header::HEADER_BYTES);

#[unsafe(link_section = ".header")]
#[used]
static HEADER: RawHeader = RawHeader {
    guid: header::GUID,
    version: header::HEADER_VERSION,
    bytes: header::HEADER_BYTES as u32,
    abi_min: mirrorvm_abi::ABI_VERSION,
    abi_max: mirrorvm_abi::ABI_VERSION,
    layout_hash: layout::LAYOUT_HASH,
    base: &raw const __image_base,
    entry: start,
    text_end: &raw const __text_end,
    rodata_end: &raw const __rodata_end,
    data_end: &raw const __data_end,
    bss_end: &raw const __bss_end,
    suites: Suite::Aes256Gcm.bit() | Suite::Aes256GcmSiv.bit(),
};

static SHARED: Shared = Shared::new();

/// Entry of worker `index`: `rsp` is the end of the worker's area, 8 below a multiple of 16.
extern "C" fn start(index: u64) -> ! {
    if index == 0 {
        // A second mirror of an encrypted guest finds what the first one left: its host could not write these
        // pages.
        bare::clear(&raw const __data_end as u64, &raw const __bss_end as u64);
    }
    let Some(config) = bare::config() else { bare::fatal(mailbox::Fatal::BadConfig) };
    if index >= u64::from(config.workers) {
        bare::fatal(mailbox::Fatal::BadConfig);
    }
    let first = layout::CONFIG_VA + config::FIXED_BYTES as u64;
    // SAFETY: the loader mapped the configuration pages read-only and `Config::decode` bounded the count of
    // ranges to what fits them; nobody writes them after the first instruction.
    let allowed = unsafe {
        core::slice::from_raw_parts(first as *const [u8; config::RANGE_BYTES], config.ranges as usize)
    };
    let words = config.pages.div_ceil(64) as usize * 2;
    // SAFETY: the plan maps two words for every 64 pages at MAPS_VA, writable and private to the helper; all
    // accesses go through these atomics.
    let words = unsafe { core::slice::from_raw_parts(layout::MAPS_VA as *const AtomicU64, words) };
    let maps = PageMaps::new(allowed, words);
    let digests = config.digests as usize * Digests::WORDS;
    // SAFETY: the configuration says so only when the plan maps that many words at DIGESTS_VA, writable and
    // private to the helper; all accesses go through these atomics.
    let digests = unsafe { core::slice::from_raw_parts(layout::DIGESTS_VA as *const AtomicU64, digests) };
    // The scratch lives at the low end of the worker's area, the stack comes down from the high end.
    let area = layout::WORKER_VA + index * layout::WORKER_STRIDE;
    // SAFETY: the plan maps WORKER_BYTES there for this worker alone; zeroed memory is a valid Scratch and
    // the area is far larger than scratch and stack together.
    let scratch = unsafe { &mut *(area as *mut Scratch) };
    core::sync::atomic::fence(Ordering::SeqCst);
    let env = Bare::new(&config, index);
    let worker = Worker::new(env, &SHARED, maps, scratch, config, index as u32);
    bare::fatal(worker.with_digests(Digests::new(digests)).run())
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    bare::fatal(mailbox::Fatal::Panic)
}
