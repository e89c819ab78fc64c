//! Searches for bytes that break what `mirrorvm_fuzz::record` promises.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorvm_fuzz::record::run(data));
