//! Searches for bytes that break what `mirrorvm_fuzz::receive` promises.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorvm_fuzz::receive::run(data));
