//! The workload as a bare-metal program: entered per vCPU in 64-bit mode at CPL 3 with `rdi` = vCPU index;
//! and the firmware, a few instructions at CPL 0 that declare the helper.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "UNSAFETY: bare metal: fixed addresses of the boot contract, I/O ports")]

use core::arch::{asm, global_asm};
use core::convert::Infallible;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mirrorvm_workload::{
    BOOT_BYTES, BOOT_VA, Boot, Cpu, DECLARATION_AT, DECLARATION_MAX, DECLARATION_VA, FIRMWARE_AGAIN,
    MSR_KVM_MIGRATION_CONTROL, Memory, PAGE, PORT_FIRMWARE, PORT_POWER_OFF, Pattern, RAM_VA, SHARED_VA, Step,
};

type Page = [u64; PAGE / 8];

// The first bytes of the image: the linker script puts them at IMAGE_VA, and the firmware a page further.
global_asm!(
    ".pushsection .text.start, \"ax\"",
    ".global start",
    "start:",
    "jmp {run}",
    ".popsection",
    run = sym run,
);

// Integer instructions only, no stack: a KVM without hardware virtualization interprets what runs at CPL 0.
// The count is declared as it stands, whatever it is; of the tuples no more are copied than there is room
// for.
global_asm!(
    ".pushsection .text.firmware, \"ax\"",
    "movabs rsi, {declaration}",
    "movabs rdi, {shared}",
    "mov rcx, [rsi]",
    "mov [rdi], rcx",
    "cmp rcx, {most}",
    "jbe 2f",
    "mov ecx, {most}",
    "2:",
    "lea rcx, [rcx + 2*rcx]",
    "3:",
    "test rcx, rcx",
    "je 4f",
    "add rsi, 8",
    "add rdi, 8",
    "mov rax, [rsi]",
    "mov [rdi], rax",
    "dec rcx",
    "jmp 3b",
    "4:",
    "mov edx, {port}",
    "in eax, dx",
    "cmp eax, {again}",
    "je 4b",
    "mov ecx, {msr}",
    "xor edx, edx",
    "wrmsr",
    "jmp 4b",
    ".popsection",
    declaration = const DECLARATION_VA,
    shared = const SHARED_VA + DECLARATION_AT as u64,
    most = const DECLARATION_MAX,
    port = const PORT_FIRMWARE,
    // As a sign-extended immediate: all ones.
    again = const FIRMWARE_AGAIN as i32,
    msr = const MSR_KVM_MIGRATION_CONTROL,
);

extern "C" fn run(index: u64) -> ! {
    // SAFETY: the host mapped the boot page read-only before the first instruction.
    let Some(boot) = Boot::decode(unsafe { &*(BOOT_VA as *const [u8; BOOT_BYTES]) }) else { power_off() };
    let (mut cpu, mut memory) = (Cpu::new(index), Bare);
    loop {
        let Ok(step) = cpu.step(&mut memory, &boot);
        match step {
            Step::More => {}
            Step::In(port) => cpu.answer(read_port(port)),
            Step::Out(port, value) => write_port(port, value),
        }
    }
}

/// Memory at the fixed addresses of the boot contract, reached without a copy.
struct Bare;

impl Memory for Bare {
    type Fault = Infallible;

    fn load(&mut self, at: usize) -> Result<u64, Infallible> {
        Ok(shared(at).load(Relaxed))
    }

    fn store(&mut self, at: usize, value: u64) -> Result<(), Infallible> {
        shared(at).store(value, Relaxed);
        Ok(())
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Infallible> {
        for (i, byte) in bytes.iter().enumerate() {
            let to = (SHARED_VA + (at + i) as u64) as *mut u8;
            // SAFETY: inside the shared pages, which are mapped writable.
            unsafe { to.write_volatile(*byte) };
        }
        Ok(())
    }

    fn matches(&mut self, page: u64, content: Pattern) -> Result<bool, Infallible> {
        Ok(content.matches(ram(page)))
    }

    fn fill(&mut self, page: u64, content: Pattern) -> Result<(), Infallible> {
        content.fill(ram(page));
        Ok(())
    }
}

fn shared(at: usize) -> &'static AtomicU64 {
    // SAFETY: an aligned word of the shared pages; host and guest both access it as an atomic.
    unsafe { &*((SHARED_VA + at as u64) as *const AtomicU64) }
}

fn ram(page: u64) -> &'static mut Page {
    // SAFETY: the program stays inside the RAM that the boot page names; a page belongs to one vCPU.
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
