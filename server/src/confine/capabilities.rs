//! Capabilities: what root's daemon keeps of root's powers.
//!
//! Owns: which are kept and why, and giving up the others. Must not know: files, system calls.

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

use super::{Force, Needs};

/// What is kept where it is there, and what for.
const KEPT: [(CapabilitySet, &str); 2] = [
    // The PSP's pages of a guest are pinned, and secrets locked, beyond RLIMIT_MEMLOCK.
    (CapabilitySet::IPC_LOCK, "CAP_IPC_LOCK"),
    // A mirror's threads may be placed before others (`nice` below 0, `fifo`).
    (CapabilitySet::SYS_NICE, "CAP_SYS_NICE"),
];
/// The same, for a daemon that listens on a port below 1024.
const PORTS: (CapabilitySet, &str) = (CapabilitySet::NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE");
/// What starting QEMUs as other users takes, and ending them.
const LAUNCHER: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::KILL, "CAP_KILL"),
];

/// Gives up what the daemon does not need. Gives what came of it, and the names of those kept.
pub(super) fn give_up(needs: &Needs) -> (Force, Vec<&'static str>) {
    let port = needs.addresses.iter().any(|a| (1..1024).contains(&a.port()));
    let wanted: Vec<_> = KEPT.into_iter().chain(port.then_some(PORTS)).collect();
    give_up_all_but(&wanted)
}

/// The same for the process that starts QEMUs. The program that changes a QEMU's user has what it needs, too,
/// when nobody of them is root.
pub(super) fn give_up_for_launcher() -> (Force, Vec<&'static str>) {
    let done = give_up_all_but(&LAUNCHER);
    let passed_on = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let pass_on = || {
        let sets = capabilities(None)?;
        let inheritable = sets.permitted & passed_on;
        set_capabilities(None, CapabilitySets { inheritable, ..sets })?;
        inheritable.iter().try_for_each(|one| configure_capability_in_ambient_set(one, true))
    };
    if let (false, Err(errno)) = (rustix::process::geteuid().is_root(), pass_on()) {
        tracing::warn!(%errno, "QEMUs cannot be given users of their own");
    }
    done
}

fn give_up_all_but(wanted: &[(CapabilitySet, &'static str)]) -> (Force, Vec<&'static str>) {
    let union = wanted.iter().fold(CapabilitySet::empty(), |all, (one, _)| all | *one);
    match reduce(union) {
        Ok((kept, whole)) => {
            let names = wanted.iter().filter(|(one, _)| kept.contains(*one)).map(|(_, name)| *name).collect();
            let force = if whole {
                Force::Enforced
            } else {
                Force::Partial(
                    "the bounding set stays as it was, because CAP_SETPCAP is missing; programs cannot gain anything from \
                     it (no_new_privs)"
                        .into(),
                )
            };
            (force, names)
        }
        Err(errno) => (Force::Unavailable(format!("capset(2) failed: {errno}")), Vec::new()),
    }
}

/// Reduces all sets to what is wanted and there. Gives that, and whether the bounding set was reduced, too.
fn reduce(wanted: CapabilitySet) -> rustix::io::Result<(CapabilitySet, bool)> {
    let before = capabilities(None)?;
    let kept = before.permitted & wanted;
    // Kernels without ambient capabilities have none to give up.
    let _ = clear_ambient_capability_set();
    let mut whole = true;
    // While CAP_SETPCAP is still there. A number that this kernel does not know is in no set of its.
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if wanted.contains(one) {
            continue;
        }
        match remove_capability_from_bounding_set(one) {
            Err(rustix::io::Errno::INVAL) => break,
            Err(_) => whole = before.permitted.is_empty(),
            Ok(()) => {}
        }
    }
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    Ok((kept, whole))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    /// What a thread of its own has after it gave up what these addresses do not take.
    fn left(addresses: &[&str]) -> (CapabilitySet, Vec<&'static str>) {
        let addresses = addresses.iter().map(|a| a.parse::<SocketAddr>().unwrap()).collect();
        let needs = Needs { addresses, ..Needs::default() };
        // Capabilities are a thread's.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let (force, kept) = give_up(&needs);
                assert!(matches!(force, Force::Enforced | Force::Partial(_)), "{force:?}");
                let sets = capabilities(None).unwrap();
                assert_eq!((sets.permitted, sets.inheritable), (sets.effective, CapabilitySet::empty()));
                (sets.effective, kept)
            });
            thread.join().unwrap()
        })
    }

    #[test]
    fn what_is_kept_was_there_and_is_needed() {
        let had = capabilities(None).unwrap().permitted;
        let always = CapabilitySet::IPC_LOCK | CapabilitySet::SYS_NICE;
        let (kept, names) = left(&["127.0.0.1:0", "127.0.0.1:1024"]);
        assert_eq!(kept, had & always);
        assert_eq!(names.len() as u32, kept.bits().count_ones());
        let (kept, names) = left(&["127.0.0.1:443"]);
        assert_eq!(kept, had & (always | CapabilitySet::NET_BIND_SERVICE));
        assert_eq!(names.contains(&"CAP_NET_BIND_SERVICE"), had.contains(CapabilitySet::NET_BIND_SERVICE));
        assert_eq!(capabilities(None).unwrap().permitted, had, "another thread keeps its own");
    }
}
