//! Descriptors: as many as the system lets this process have, and never all of them for connections.
//!
//! Owns: the process's limit of open files, and what of it connections may use. Must not know: listeners.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::shares::RESERVED;

/// Raises the limit of open files as far as possible. Many programs are started with 1024 for the sake of
/// `select`(2), which neither this one nor QEMU uses.
pub(super) fn lift() {
    let limit = getrlimit(Resource::Nofile);
    let lifted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, lifted)
    {
        tracing::warn!(%error, "the limit of open files cannot be lifted");
    }
}

/// The limit as it is; `None`: any number.
pub(super) fn limit() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// How many places each of `listeners` gets, of the `wanted` ones, so that connections leave a quarter of the
/// descriptors for guests, migrations and the database.
pub(super) fn places(wanted: u32, listeners: usize, descriptors: Option<u64>) -> usize {
    let wanted = wanted as usize;
    let Some(descriptors) = descriptors else { return wanted };
    let of_all = usize::try_from(descriptors / 4 * 3).unwrap_or(usize::MAX);
    let of_each = (of_all / listeners.max(1)).saturating_sub(RESERVED);
    wanted.min(of_each.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_everything_else() {
        assert_eq!(places(512, 3, None), 512);
        assert_eq!(places(512, 3, Some(1 << 20)), 512);
        assert_eq!(places(512, 3, Some(1024)), 240);
        assert_eq!(places(512, 3, Some(16)), 1);
        for listeners in 1..10 {
            let all = listeners * (places(100_000, listeners, Some(4096)) + RESERVED);
            assert!(all <= 4096 * 3 / 4, "{listeners}: {all}");
        }
    }
}
