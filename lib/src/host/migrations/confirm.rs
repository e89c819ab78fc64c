//! Guests of a host whose state is older than what others may know: a backup was put back, or somebody went
//! on with what was left.
//!
//! Owns: who is asked, and what the answers mean. Must not know: how the state came to be old, how a peer is
//! reached.
//!
//! A guest of such a host may have gone to a peer in the time that the host does not remember. Before it is
//! started here, every known peer says whether it has it: one that does has it for good, and when none does
//! it is this host's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::host::guests::command::Command;
use crate::host::inner::Inner;
use crate::host::{GuestState, MigrationDirection, MigrationRecord, MigrationState, PeerSpec};
use crate::migration::find;
use crate::migration::hand_over::{Place, place};
use crate::migration::wire::{FIND_MAX, Holding};
use crate::transport::PeerIdentity;

/// What becomes of a guest after a round of questions.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    /// It is this host's.
    Ours,
    /// It went to the peer of this name.
    Theirs(String),
    /// Somebody has not said; each with what is missing.
    Wait(Vec<String>),
}

/// What one known peer said of one guest.
#[derive(Clone, Debug)]
struct Answer {
    peer: String,
    identity: String,
    /// `None`: nothing.
    said: Option<Holding>,
}

/// From what each known peer said. Where one passed the guest on, the host that it went to has to be asked,
/// too: of one that is not known here nobody can say whether it has it.
fn decide(answers: &[Answer]) -> Decision {
    if let Some(theirs) = answers.iter().find(|a| a.said == Some(Holding::Here)) {
        return Decision::Theirs(theirs.peer.clone());
    }
    let asked = |identity: &str| answers.iter().any(|a| a.identity == identity);
    let missing = |a: &Answer| match &a.said {
        Some(Holding::Here | Holding::NotHere) => None,
        Some(Holding::WentTo { identity }) if asked(identity) => None,
        Some(Holding::WentTo { identity }) if identity.is_empty() => {
            Some(format!("{} sent it on, to a host that it does not know any more", a.peer))
        }
        Some(Holding::WentTo { identity }) => {
            Some(format!("{} sent it on to the host with identity {identity}, which is no peer here", a.peer))
        }
        Some(Holding::Undecided) => Some(format!("{} does not know yet whether it has it", a.peer)),
        None => Some(format!("{} does not answer", a.peer)),
    };
    let missing: Vec<String> = answers.iter().filter_map(missing).collect();
    if missing.is_empty() { Decision::Ours } else { Decision::Wait(missing) }
}

/// What this host says of a guest to the peer that asks.
pub(in crate::host) fn holding(inner: &Inner, guest: Uuid, asker: &str) -> Holding {
    let last = || {
        let all = inner.migration_entries().into_iter().map(|m| m.record());
        last_success(all.filter(|m| m.guest == guest))
    };
    let went_to = |peer: &str, last: Option<&MigrationRecord>| {
        let noted = last.filter(|m| m.direction == MigrationDirection::Outgoing && m.peer == peer);
        let noted = noted.map(|m| m.peer_identity.clone()).filter(|identity| !identity.is_empty());
        // A name may be another host's by now; it is what there is of a guest that a peer said it has.
        let named = || inner.peers().values().find(|p| p.spec.name == peer).map(|p| p.spec.identity.clone());
        match noted.or_else(named) {
            Some(identity) if identity == asker => Holding::NotHere,
            // Empty where an earlier build noted nothing, of a host that is no peer any more: nobody's.
            identity => Holding::WentTo { identity: identity.unwrap_or_default() },
        }
    };
    if let Some(record) = inner.guests().get(&guest).map(|g| g.record()) {
        // From START on the record still says that the guest is held here, and it may be the destination's.
        // By the migration of this very record: it may have ended since, and the guest have gone.
        let past = |m| inner.migration_entry(m).is_none_or(|entry| entry.control.is_past());
        let leaving = record.migration.is_some_and(past);
        return match place(record.state, record.unconfirmed, record.moved_to.is_some(), leaving) {
            Place::Undecided => Holding::Undecided,
            Place::Elsewhere => went_to(record.moved_to.as_deref().unwrap_or_default(), last().as_ref()),
            Place::Here => Holding::Here,
        };
    }
    match last() {
        None => Holding::NotHere,
        Some(m) => match m.direction {
            // One that came and was deleted here: whoever sent it does not have it any more.
            MigrationDirection::Incoming => Holding::Here,
            MigrationDirection::Outgoing => went_to(&m.peer, Some(&m)),
        },
    }
}

/// The one that succeeded last: by the order in which they began, since a guest has one at a time, and never
/// by their dates.
fn last_success(all: impl Iterator<Item = MigrationRecord>) -> Option<MigrationRecord> {
    all.filter(|m| m.state == MigrationState::Succeeded).max_by_key(|m| m.order)
}

/// Asks every known peer about every guest that is unconfirmed, until none is: more and more rarely, and at
/// once when a peer is heard of.
pub(in crate::host) async fn ask_around(inner: Arc<Inner>) {
    let heard = Arc::clone(&inner.peer_heard);
    let weak = Arc::downgrade(&inner);
    drop(inner);
    let mut patience = PATIENCE_LEAST;
    // A host that is closed meanwhile is not kept open.
    while let Some(inner) = weak.upgrade().filter(|i| !i.is_stopping()) {
        if !inner.guests().values().any(|g| g.record().unconfirmed) {
            return;
        }
        ask_once(&inner).await;
        drop(inner);
        // Never more often than this, however often peers are heard of.
        tokio::time::sleep(PATIENCE_LEAST).await;
        tokio::select! {
            () = tokio::time::sleep(patience) => {}
            () = heard.notified() => {}
        }
        patience = (patience * 2).min(PATIENCE_MOST);
    }
}

const PATIENCE_LEAST: Duration = Duration::from_millis(200);
const PATIENCE_MOST: Duration = Duration::from_secs(10);

async fn ask_once(inner: &Arc<Inner>) {
    let guests: Vec<Uuid> = {
        let all = inner.guests();
        // What a hand-over in doubt comes to is found out by itself; the guest is asked about afterwards.
        let open =
            all.values().map(|g| g.record()).filter(|r| r.unconfirmed && r.state != GuestState::InDoubt);
        open.map(|r| r.id).collect()
    };
    let answers = ask_each(inner, &guests).await;
    for guest in guests {
        let said = |s: &Option<Said>| s.as_ref().and_then(|s| s.get(&guest).cloned());
        let of_guest: Vec<_> = answers
            .iter()
            .map(|(peer, s)| Answer {
                peer: peer.name.clone(),
                identity: peer.identity.clone(),
                said: said(s),
            })
            .collect();
        let Some(entry) = inner.guests().get(&guest).cloned() else { continue };
        let moved_to = match decide(&of_guest) {
            Decision::Ours => None,
            Decision::Theirs(peer) => Some(peer),
            Decision::Wait(missing) => {
                let text = missing.join("; ");
                if entry.wait_for(missing) {
                    tracing::info!(%guest, missing = text, "a guest stays unconfirmed");
                    inner.changed();
                }
                continue;
            }
        };
        tracing::info!(%guest, moved_to, "a guest is confirmed: the known peers were asked");
        let (done, told) = tokio::sync::oneshot::channel();
        if entry.tell(Command::Confirmed { moved_to, done }).await {
            let _ = told.await;
        }
    }
}

type Said = HashMap<Uuid, Holding>;

async fn ask_each(inner: &Arc<Inner>, guests: &[Uuid]) -> Vec<(PeerSpec, Option<Said>)> {
    let peers: Vec<_> = inner.peers().values().map(|p| p.spec.clone()).collect();
    let asking: Vec<_> = peers
        .into_iter()
        .map(|peer| {
            let (inner, guests, of) = (Arc::clone(inner), guests.to_vec(), peer.clone());
            (peer, tokio::task::spawn_blocking(move || ask(&inner, &of, &guests)))
        })
        .collect();
    let mut all = Vec::new();
    for (peer, said) in asking {
        // One whose thread failed has not answered.
        all.push((peer, said.await.ok().flatten()));
    }
    all
}

fn ask(inner: &Inner, peer: &PeerSpec, guests: &[Uuid]) -> Option<Said> {
    let identity = peer.identity.parse::<PeerIdentity>().ok()?;
    let at = (peer.address.clone(), identity);
    let mut said = Said::new();
    for some in guests.chunks(FIND_MAX) {
        match find(&at, &inner.identity, &inner.name, some) {
            Ok(found) => said.extend(some.iter().copied().zip(found)),
            Err(fault) => {
                tracing::debug!(peer = peer.name, fault = %crate::chain::chain(&fault), "a peer does not say which guests it has");
                return None;
            }
        }
    }
    Some(said)
}

#[cfg(test)]
mod tests {
    use crate::address_space::Strategy;
    use crate::guest::driver::Parameters;
    use crate::host::{DriverSpec, GuestSpec, Labels, Suite};

    use super::*;

    /// The decision where peers `p0`, `p1`, ... of the identities `i0`, `i1`, ... said so.
    fn of(all: &[Option<Holding>]) -> Decision {
        let answer = |(n, said): (usize, &Option<Holding>)| Answer {
            peer: format!("p{n}"),
            identity: format!("i{n}"),
            said: said.clone(),
        };
        decide(&all.iter().enumerate().map(answer).collect::<Vec<_>>())
    }

    /// Who keeps a guest from being anybody's, each with the end of what is said of it.
    fn missing<'a>(all: &[Option<Holding>]) -> Vec<(&'a str, &'a str)> {
        const WORDS: [&str; 4] = [
            "does not answer",
            "does not know yet",
            "does not know any more",
            "identity i7, which is no peer here",
        ];
        let Decision::Wait(list) = of(all) else { return Vec::new() };
        let known = |text: &String| {
            let who = ["p0", "p1", "p2"].into_iter().find(|p| text.starts_with(p)).unwrap();
            (who, WORDS.into_iter().find(|w| text.contains(w)).unwrap())
        };
        list.iter().map(known).collect()
    }

    #[test]
    fn a_guest_is_ours_when_every_peer_says_so_and_a_peers_when_that_one_does() {
        use Holding::{Here, NotHere, Undecided};
        assert_eq!(of(&[]), Decision::Ours);
        assert_eq!(of(&[Some(NotHere), Some(NotHere)]), Decision::Ours);
        for (silent, why) in [(None, "does not answer"), (Some(Undecided), "does not know yet")] {
            assert_eq!(missing(std::slice::from_ref(&silent)), [("p0", why)]);
            assert_eq!(missing(&[Some(NotHere), silent.clone()]), [("p1", why)]);
            assert_eq!(of(&[silent, Some(Here)]), Decision::Theirs("p1".into()));
        }
    }

    #[test]
    fn where_a_guest_was_passed_on_the_host_that_it_went_to_decides() {
        use Holding::{Here, NotHere};
        let on = |identity: &str| Some(Holding::WentTo { identity: identity.into() });
        assert_eq!(of(&[on("i1"), Some(NotHere)]), Decision::Ours);
        assert_eq!(of(&[on("i1"), Some(Here)]), Decision::Theirs("p1".into()));
        assert_eq!(of(&[on("i1"), on("i2"), Some(Here)]), Decision::Theirs("p2".into()));
        assert_eq!(missing(&[on("i1"), None]), [("p1", "does not answer")]);
        assert_eq!(missing(&[on(""), Some(NotHere)]), [("p0", "does not know any more")]);
        assert_eq!(missing(&[on("i7"), Some(NotHere)]), [("p0", "identity i7, which is no peer here")]);
    }

    #[test]
    fn which_migration_was_a_guests_last_is_told_by_their_order_and_not_by_their_dates() {
        let success = |order: u64, direction: MigrationDirection, year: i16| {
            let date = format!("{year}-01-01T00:00:00Z").parse().unwrap();
            let id = Uuid::from_u128(u128::from(year.unsigned_abs()));
            let guest = GuestSpec {
                name: "g".into(),
                driver: DriverSpec::new("other", Parameters::new()),
                blocks: Vec::new(),
                backing: None,
                labels: Labels::new(),
            };
            let begun = MigrationRecord::begun(
                id,
                direction,
                (Uuid::nil(), &guest),
                "b",
                String::new(),
                (Strategy::Declared, Suite::Aes256Gcm),
            );
            MigrationRecord {
                order,
                state: MigrationState::Succeeded,
                created_at: date,
                started_at: Some(date),
                finished_at: Some(date),
                ..begun
            }
        };
        use MigrationDirection::{Incoming, Outgoing};
        // It came in 2030, as the clock was then, left in 2026 and did not get away a third time.
        let failed = MigrationRecord { state: MigrationState::Failed, ..success(9, Outgoing, 2040) };
        let all = [success(4, Incoming, 2030), failed, success(7, Outgoing, 2026)];
        for all in [all.to_vec(), all.iter().rev().cloned().collect()] {
            let last = last_success(all.into_iter()).unwrap();
            assert_eq!((last.order, last.direction), (7, Outgoing));
        }
        assert!(last_success(std::iter::empty()).is_none());
    }
}
