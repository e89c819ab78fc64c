//! The program: everything is in the library beside it.

use std::alloc::System;
use std::process::ExitCode;

use zeroizing_alloc::ZeroAlloc;

/// Wipes what is freed, whoever had it: TLS, JSON and HTTP copy secrets to places that we cannot reach.
#[global_allocator]
static HEAP: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    mirrorvmd::Daemon::builder().build().main()
}
