#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| skate_core::parsers::records(bytes));
