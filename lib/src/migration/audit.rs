//! The audit after START, between two hosts: digests of the source's RAM cross to the destination, whose
//! helper compares them with those of what it opened.
//!
//! Owns: the messages, how long an audit may take, and giving one up without waiting for it. Must not know:
//! what a digest is (`lib/helper/src/audit.rs`), who keeps the guest's memory meanwhile, what a verdict leads
//! to.
//!
//! Nothing here decides whose the guest is: that was decided by tokens, or, before COMMIT, still is.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::wire::{self, Audited, DigestsEnd, kind};
use super::{Audit, AuditState, MigrationFault, NotRun};
use crate::addr::RamPage;
use crate::guest::Machine;
use crate::mirror::{AuditScope, DIGESTS_MAX, LaneError, Mirror, Verdict};
use crate::pages::PageSet;
use crate::sync::{Locked, WaitLocked};
use crate::transport::Link;

/// How often a wait looks whether it is still worth it.
const LOOK: Duration = Duration::from_millis(50);
/// How long the last message may take, and an answer that somebody who gives up may have sent.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What an audit keeps while the guest is another host's, or runs already.
pub struct Kept {
    /// At the source: the machine whose RAM stands still.
    pub machine: Option<Box<dyn Machine>>,
    /// The mirror whose helper has the session.
    pub mirror: Mirror,
}

/// Mirror and RAM of an audit that goes on beside everything else. Whoever needs them takes them away, and
/// waits for no more than the request that the helper is at.
pub struct Held {
    inside: Mutex<Inside>,
    freed: Condvar,
    /// What the machine claimed.
    bytes: u64,
}

struct Inside {
    kept: Option<Kept>,
    over: Option<NotRun>,
    /// Somebody took it away to free it, and has not done so yet.
    going: bool,
}

impl Held {
    /// Held until the audit ends or is given up; `bytes` of memory are what the machine claimed, with those
    /// of its program.
    pub fn new(kept: Kept, bytes: u64) -> Self {
        let inside = Inside { kept: Some(kept), over: None, going: false };
        Self { inside: Mutex::new(inside), freed: Condvar::new(), bytes }
    }

    /// Looks at the mirror, unless it was taken away.
    pub fn look<T>(&self, act: impl FnOnce(&Mirror) -> T) -> Option<T> {
        self.inside.locked().kept.as_ref().map(|kept| act(&kept.mirror))
    }

    /// Bytes of memory that are not free yet, and will be.
    pub fn bytes(&self) -> u64 {
        let inside = self.inside.locked();
        if inside.kept.is_some() || inside.going { self.bytes } else { 0 }
    }

    /// Takes away what is held. An audit that has not come to its end ends as `why`.
    pub fn give_up(&self, why: NotRun) -> Option<Kept> {
        let mut inside = self.inside.locked();
        inside.over.get_or_insert(why);
        inside.kept.take()
    }

    /// The same, and lets go of it. Its memory is free when this returns, whoever is just freeing it.
    pub fn free(&self, why: NotRun) {
        let mut inside = self.inside.locked();
        inside.over.get_or_insert(why);
        let Some(kept) = inside.kept.take() else {
            while inside.going {
                inside = self.freed.wait_locked(inside);
            }
            return;
        };
        inside.going = true;
        drop(inside);
        // Not under the lock: machines end their threads and programs first.
        drop(kept);
        self.inside.locked().going = false;
        self.freed.notify_all();
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}

/// How an audit gets at its mirror.
pub(super) trait Through {
    /// Does one thing with it; not when it was taken away.
    fn reach<T>(&mut self, act: impl FnOnce(&mut Mirror) -> T) -> Result<T, NotRun>;

    /// Why the audit is of no more use, if it is.
    fn over(&self) -> Option<NotRun>;
}

impl Through for &Held {
    fn reach<T>(&mut self, act: impl FnOnce(&mut Mirror) -> T) -> Result<T, NotRun> {
        let mut inside = self.inside.locked();
        let over = inside.over.unwrap_or(NotRun::MemoryNeeded);
        inside.kept.as_mut().map(|kept| act(&mut kept.mirror)).ok_or(over)
    }

    fn over(&self) -> Option<NotRun> {
        self.inside.locked().over
    }
}

/// The mirror of a migration that waits for its audit; `over` says when that is of no more use.
pub(super) struct Waiting<'a, F> {
    pub mirror: &'a mut Mirror,
    pub over: F,
}

impl<F: Fn() -> Option<NotRun>> Through for Waiting<'_, F> {
    fn reach<T>(&mut self, act: impl FnOnce(&mut Mirror) -> T) -> Result<T, NotRun> {
        Ok(act(self.mirror))
    }

    fn over(&self) -> Option<NotRun> {
        (self.over)()
    }
}

/// The source's part: digests all that it has, and hears what came of it. `left` is how long it may still
/// take, `stall` how long the peer may be silent.
pub(super) fn show(
    link: &mut Link,
    mut through: impl Through,
    shared: &PageSet,
    left: impl Fn() -> Duration,
    stall: Duration,
) -> Audit {
    let before = through.reach(|mirror| mirror.cpu_us()).unwrap_or(0);
    let shown = Showing { link: &mut *link, through: &mut through, left: &left, stall }.run(shared);
    let cpu_us = through.reach(|mirror| mirror.cpu_us()).map_or(0, |now| now.saturating_sub(before));
    let audit = match shown {
        Ok(audit) => audit,
        Err(why) => {
            link.set_deadline(Some(Instant::now() + LAST_WORD));
            let end = DigestsEnd { why: Some(why.name().to_owned()) };
            let _ = wire::send(link, kind::DIGESTS_END, &end);
            Audit::not_run(why)
        }
    };
    Audit { cpu_us, ..audit }
}

struct Showing<'a, T, L> {
    link: &'a mut Link,
    through: &'a mut T,
    left: &'a L,
    stall: Duration,
}

impl<T: Through, L: Fn() -> Duration> Showing<'_, T, L> {
    fn run(&mut self, shared: &PageSet) -> Result<Audit, NotRun> {
        let scope = self.through.reach(|mirror| AuditScope::of(mirror.plan(), shared))?;
        for chunks in scope.groups() {
            self.check()?;
            let group = self.through.reach(|mirror| mirror.seal_digests(&scope, chunks))?;
            let group = group.map_err(|error| failed(&error))?;
            self.check()?;
            self.link.set_deadline(Some(Instant::now() + self.stall));
            if self.link.send(kind::DIGESTS, &group).is_err() {
                // A destination that gives up says why before it ends the link.
                self.link.set_deadline(Some(Instant::now() + LAST_WORD));
                return self.answer();
            }
        }
        self.link.set_deadline(Some(Instant::now() + self.stall));
        wire::send(self.link, kind::DIGESTS_END, &DigestsEnd { why: None }).map_err(|_| NotRun::PeerLost)?;
        self.link.set_deadline(None);
        let by = Instant::now() + self.stall;
        while !self.link.await_input(Instant::now() + LOOK).map_err(|_| NotRun::PeerLost)? {
            self.check()?;
            if Instant::now() >= by {
                return Err(NotRun::PeerLost);
            }
        }
        self.link.set_deadline(Some(by));
        self.answer()
    }

    fn answer(&mut self) -> Result<Audit, NotRun> {
        let answer = wire::expect(self.link, &[kind::AUDITED], wire::AUDITED_MAX);
        let audited: Audited = answer.and_then(|(_, payload)| wire::parse(&payload)).map_err(lost)?;
        audited.audit()
    }

    fn check(&self) -> Result<(), NotRun> {
        match self.through.over() {
            Some(why) => Err(why),
            None if (self.left)().is_zero() => Err(NotRun::Timeout),
            None => Ok(()),
        }
    }
}

/// The destination's part: has what comes compared, and says what came of it. It ends by `by`, and when the
/// peer is silent for `stall`.
pub(super) fn judge(
    link: &mut Link,
    mut through: impl Through,
    shared: &PageSet,
    by: Instant,
    stall: Duration,
) -> Audit {
    let before = through.reach(|mirror| mirror.cpu_us()).unwrap_or(0);
    let judged = judged(link, &mut through, shared, by, stall);
    let cpu_us = through.reach(|mirror| mirror.cpu_us()).map_or(0, |now| now.saturating_sub(before));
    let audited = match judged {
        Ok(audited) => audited,
        Err(why) => Audited {
            compared: 0,
            left_out: 0,
            differing: 0,
            first: Vec::new(),
            why: Some(why.name().to_owned()),
        },
    };
    link.set_deadline(Some(Instant::now() + LAST_WORD));
    if let Err(fault) = wire::send(link, kind::AUDITED, &audited) {
        tracing::debug!(fault = %crate::chain::chain(&fault), "the source does not hear what its audit found");
    }
    Audit { cpu_us, ..audited.audit().unwrap_or_else(Audit::not_run) }
}

fn judged(
    link: &mut Link,
    through: &mut impl Through,
    shared: &PageSet,
    by: Instant,
    stall: Duration,
) -> Result<Audited, NotRun> {
    let scope = through.reach(|mirror| AuditScope::of(mirror.plan(), shared))?;
    loop {
        await_frame(link, through, by, stall)?;
        let kinds = [kind::DIGESTS, kind::DIGESTS_END];
        let (kind, payload) = wire::expect(link, &kinds, DIGESTS_MAX as u32).map_err(lost)?;
        if kind == kind::DIGESTS_END {
            let end: DigestsEnd = wire::parse(&payload).map_err(lost)?;
            if let Some(why) = end.why {
                return Err(reason(&why));
            }
            break;
        }
        // Chunks ascend, or the helper refuses: so there is an end to them, whoever sends them.
        let compared = through.reach(|mirror| mirror.compare_digests(&scope, &payload))?;
        compared.map_err(|error| failed(&error))?.ok_or(NotRun::PeerLost)?;
    }
    let found = through.reach(|mirror| {
        let Verdict { compared, left_out, differing, first } = mirror.verdict()?;
        let named = first.iter().take(differing.min(first.len() as u64) as usize);
        let first = named.filter_map(|page| mirror.plan().ram_page(*page)).map(RamPage::get).collect();
        Ok(Audited { compared, left_out, differing, first, why: None })
    })?;
    found.map_err(|error: LaneError| failed(&error))
}

fn await_frame(link: &mut Link, through: &impl Through, by: Instant, stall: Duration) -> Result<(), NotRun> {
    link.set_deadline(None);
    link.set_patience(stall);
    let silent = Instant::now() + stall;
    while !link.await_input(Instant::now() + LOOK).map_err(|_| NotRun::PeerLost)? {
        if let Some(why) = through.over() {
            return Err(why);
        }
        if Instant::now() >= by {
            return Err(NotRun::Timeout);
        }
        if Instant::now() >= silent {
            return Err(NotRun::PeerLost);
        }
    }
    through.over().map_or(Ok(()), Err)
}

impl Audited {
    /// What it says; the destination's word is bounded and makes sense then.
    fn audit(&self) -> Result<Audit, NotRun> {
        if let Some(why) = &self.why {
            return Err(reason(why));
        }
        let state = if self.differing == 0 {
            AuditState::Proven
        } else {
            let first = self.first.iter().copied().take(mirrorvm_abi::op::NAMED_MAX).collect();
            AuditState::Mismatch { pages: self.differing, first }
        };
        let (compared_pages, left_out_pages) = (self.compared, self.left_out);
        Ok(Audit { state, compared_pages, left_out_pages, cpu_us: 0 })
    }
}

/// The other host's reason; one that this build does not know says no more than that there is none to be had.
fn reason(name: &str) -> NotRun {
    NotRun::named(name).unwrap_or(NotRun::PeerLost)
}

fn failed(error: &LaneError) -> NotRun {
    tracing::warn!(error = %crate::chain::chain(error), "a helper does not go on with an audit");
    NotRun::HelperFailed
}

fn lost(fault: MigrationFault) -> NotRun {
    tracing::info!(fault = %crate::chain::chain(&fault), "an audit loses its peer");
    NotRun::PeerLost
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_a_destination_says_is_bounded(
            compared: u64, left_out: u64, differing in 0u64..3, first in proptest::collection::vec(any::<u64>(), 0..20),
            why in proptest::option::of("\\PC{0,20}"),
        ) {
            let said = Audited { compared, left_out, differing, first, why: why.clone() };
            match said.audit() {
                Err(_) => prop_assert!(why.is_some()),
                Ok(Audit { state: AuditState::Proven, .. }) => prop_assert_eq!(differing, 0),
                Ok(Audit { state: AuditState::Mismatch { pages, first }, .. }) => {
                    prop_assert_eq!(pages, differing);
                    prop_assert!(first.len() <= mirrorvm_abi::op::NAMED_MAX);
                }
                Ok(other) => prop_assert!(false, "{:?}", other),
            }
        }

        #[test]
        fn any_bytes_are_a_verdict_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(wire::parse::<Audited>(&bytes).is_err());
        }
    }
}
