//! Searches for bytes that break what `mirrorvm_fuzz::database` promises.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorvm_fuzz::database::run(data));
