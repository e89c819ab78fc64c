//! The threads that streams and scans run on.
//!
//! Owns: their names and their ends. Must not know: what they do.

use super::MigrationFault;
use crate::mirror::{MirrorError, Placement};
use crate::threads::{self, Role};

/// Runs `body` on each of `parts` at once, on threads named `name` and a number, where `placement` wants
/// them, and gives what came of each, in order. A thread that cannot be placed works where it is: the
/// mirror's own threads were placed before, and told of a refusal.
pub(super) fn side_by_side<P: Send, R: Send>(
    name: &str,
    placement: &Placement,
    parts: impl Iterator<Item = P>,
    body: impl Fn(P) -> Result<R, MigrationFault> + Sync,
) -> Vec<Result<R, MigrationFault>> {
    let body = &body;
    std::thread::scope(|scope| {
        let spawn = |(index, part)| {
            std::thread::Builder::new().name(format!("{name}{index}")).spawn_scoped(scope, move || {
                threads::begin(Role::Pages);
                if *placement != Placement::default()
                    && let Err(error) = placement.apply_to_current_thread()
                {
                    tracing::debug!(%error, "a stream's thread stays where it is");
                }
                body(part)
            })
        };
        let threads: Vec<_> = parts.enumerate().map(spawn).collect();
        let panicked = || Err(MigrationFault::Protocol("a stream's thread panicked"));
        threads
            .into_iter()
            .map(|thread| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| panicked()),
                Err(error) => Err(MirrorError::Thread(error).into()),
            })
            .collect()
    })
}

/// The first failure that is not only another stream's: one that stopped because another failed says
/// `PeerGone`.
pub(super) fn all<R>(results: Vec<Result<R, MigrationFault>>) -> Result<Vec<R>, MigrationFault> {
    let (mut done, mut soft, mut hard) = (Vec::new(), None, None);
    for result in results {
        match result {
            Ok(r) => done.push(r),
            Err(fault @ MigrationFault::PeerGone) => soft = soft.or(Some(fault)),
            Err(fault) => hard = hard.or(Some(fault)),
        }
    }
    hard.or(soft).map_or(Ok(done), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_have_names_and_give_their_results_in_order() {
        let names = side_by_side("out", &Placement::default(), 0..3, |part| {
            Ok((part, std::thread::current().name().unwrap_or_default().to_owned()))
        });
        let names: Vec<_> = all(names).unwrap();
        assert_eq!(names, [(0, "out0".to_owned()), (1, "out1".to_owned()), (2, "out2".to_owned())]);
    }

    #[test]
    fn the_real_reason_comes_first() {
        let results = side_by_side("t", &Placement::default(), 0..3, |part| match part {
            0 => Err(MigrationFault::PeerGone),
            1 => Ok(()),
            _ => Err(MigrationFault::Canceled),
        });
        assert!(matches!(all(results), Err(MigrationFault::Canceled)));
        let soft = side_by_side("t", &Placement::default(), 0..2, |_| Err::<(), _>(MigrationFault::PeerGone));
        assert!(matches!(all(soft), Err(MigrationFault::PeerGone)));
    }
}
