//! Searches for bytes that break what `mirrorvm_fuzz::course` promises.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mirrorvm_fuzz::course::run(data));
