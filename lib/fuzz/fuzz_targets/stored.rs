//! Searches for bytes that break what `mirrorvm_fuzz::stored` promises.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorvm_fuzz::stored::run(data));
