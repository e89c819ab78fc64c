//! Guests of a host: their records, their owners, what they boot from and their RAM.

pub(super) mod boot;
pub(super) mod ram;
pub(super) mod registry;
pub(super) mod task;
