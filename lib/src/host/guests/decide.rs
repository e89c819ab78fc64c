//! What a guest's owner decides before it acts; a dry run ends here.
//!
//! Owns: in which state which request makes sense, and what refuses it. Pure: no machine, no disk.

use uuid::Uuid;

use crate::addr::Gpa;
use crate::address_space::{GuestLayout, Plug};
use crate::guest::PlugError;
use crate::guest::lifecycle::Event;
use crate::host::{GuestAction, GuestRecord, GuestState, HostError, ResourceKind, Subject};
use crate::migration::hand_over::{Bar, bar};

/// What a decision goes by.
#[derive(Clone, Copy)]
pub(in crate::host) struct Standing<'a> {
    pub record: &'a GuestRecord,
    /// Where the guest is in its life; the record may tell of it a moment later.
    pub state: GuestState,
    /// The migration that has the guest.
    pub lent: Option<Uuid>,
}

/// What an action comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::host) enum Course {
    /// The guest is there already: idempotent in effect, it is left alone.
    Stays,
    /// It is this host's from now on.
    Confirm,
    /// It goes on to `next`, and when that is over, is in `goal`.
    Turn { next: GuestState, goal: GuestState },
}

impl Standing<'_> {
    /// Whether no migration has the guest.
    pub fn is_free(&self) -> Result<(), HostError> {
        match self.lent {
            Some(migration) => Err(HostError::GuestMigrating { migration }),
            None => Ok(()),
        }
    }

    fn must_be(&self, allowed: &'static [&'static str]) -> Result<(), HostError> {
        let current = self.state.name();
        if allowed.contains(&current) {
            return Ok(());
        }
        Err(HostError::WrongState { kind: ResourceKind::Guest.into(), current, allowed })
    }

    /// Whether it has a machine that is not with a migration.
    pub fn is_live(&self) -> Result<(), HostError> {
        self.must_be(&["running", "paused"])
    }

    /// What an action comes to; `unconfirmed` says why a guest that is not confirmed does not run.
    pub fn act(
        &self,
        action: GuestAction,
        unconfirmed: impl FnOnce() -> HostError,
    ) -> Result<Course, HostError> {
        self.is_free()?;
        let (goal, event) = match action {
            GuestAction::Confirm if self.record.unconfirmed => return Ok(Course::Confirm),
            GuestAction::Confirm => return Ok(Course::Stays),
            GuestAction::Start => (GuestState::Running, Event::Start),
            GuestAction::Pause => (GuestState::Paused, Event::Pause),
            GuestAction::Resume => (GuestState::Running, Event::Resume),
            GuestAction::Stop => (GuestState::Stopped, Event::Stop),
        };
        if self.state == goal || (action == GuestAction::Start && self.state == GuestState::Starting) {
            return Ok(Course::Stays);
        }
        let moved_to = self.record.moved_to.as_ref();
        match bar(event, moved_to.is_some(), self.record.unconfirmed) {
            Some(Bar::Left) => {
                return Err(HostError::GuestMoved { peer: moved_to.cloned().unwrap_or_default() });
            }
            Some(Bar::Unconfirmed) => return Err(unconfirmed()),
            None => {}
        }
        match self.state.step(event) {
            Ok(next) => Ok(Course::Turn { next, goal }),
            Err(_) => Err(wrong_state(self.state, action)),
        }
    }

    /// Whether the definition may go.
    pub fn undefine(&self) -> Result<(), HostError> {
        self.is_free()?;
        self.must_be(&["stopped", "failed"])
    }

    /// Whether the guest's labels are this host's to change. They travel with the guest: after they were
    /// sent, and before they are here, there is nobody to whom a change could be acknowledged.
    pub fn relabel(&self, labels_sent: bool) -> Result<(), HostError> {
        let elsewhere = matches!(self.state, GuestState::InDoubt | GuestState::Incoming);
        match self.record.migration.filter(|_| labels_sent || elsewhere) {
            Some(migration) => Err(HostError::GuestMigrating { migration }),
            None => Ok(()),
        }
    }

    /// Whether a block can be plugged or unplugged now; `mirror` is one that shows what was plugged when it
    /// was made.
    pub fn replug(&self, block: &str, mirror: Option<Uuid>) -> Result<(), HostError> {
        self.is_free()?;
        // What is not there is not there in any state.
        self.record.layout.block(block).ok_or_else(|| no_block(block))?;
        if let Some(mirror) = mirror {
            return Err(HostError::InUse { kind: ResourceKind::Guest, user: format!("mirror {mirror}") });
        }
        self.is_live()
    }

    /// The guest's layout with a block plugged at an address, or unplugged (`None`). Whether the guest lets
    /// go of a block only the guest can tell.
    pub fn replugged(&self, block: &str, gpa: Option<Gpa>) -> Result<GuestLayout, HostError> {
        let now = self.record.layout.block(block).ok_or_else(|| no_block(block))?;
        if let (Some(gpa), [there, ..]) = (gpa, now.plugs.as_slice())
            && there.gpa != gpa
        {
            return Err(HostError::PlugRefused(PlugError::Elsewhere { gpa: there.gpa }));
        }
        let plugs = gpa.map(|gpa| Plug { offset: 0, gpa, len: now.size }).into_iter().collect();
        let layout = self.record.layout.with_plugs(block, plugs);
        layout.map_err(|mut e| HostError::PlugRefused(PlugError::Layout(e.swap_remove(0))))
    }
}

/// A block that the guest has not.
pub(in crate::host) fn no_block(name: &str) -> HostError {
    HostError::missing(Subject::RamBlock, name)
}

pub(in crate::host) fn wrong_state(state: GuestState, action: GuestAction) -> HostError {
    let allowed: &'static [&'static str] = match action {
        GuestAction::Start | GuestAction::Confirm => &["stopped"],
        GuestAction::Pause => &["running"],
        GuestAction::Resume => &["paused"],
        GuestAction::Stop => &["running", "paused", "failed"],
    };
    HostError::WrongState { kind: ResourceKind::Guest.into(), current: state.name(), allowed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::address_space::BlockSpec;
    use crate::host::{
        EmulatedDriver, Fill, GuestSpec, Labels, ProtectionLevel, WorkloadGuest, WorkloadSpec,
    };

    const MIGRATION: Uuid = Uuid::from_u128(7);
    const STATES: [GuestState; 8] = [
        GuestState::Stopped,
        GuestState::Starting,
        GuestState::Running,
        GuestState::Paused,
        GuestState::Stopping,
        GuestState::Incoming,
        GuestState::InDoubt,
        GuestState::Failed,
    ];
    const ACTIONS: [GuestAction; 5] = [
        GuestAction::Start,
        GuestAction::Pause,
        GuestAction::Resume,
        GuestAction::Stop,
        GuestAction::Confirm,
    ];

    fn guest() -> GuestRecord {
        let block =
            |name: &str, gpa| BlockSpec { name: name.into(), size_bytes: 2 << 20, gpa: Some(Gpa::new(gpa)) };
        let blocks = vec![block("ram0", 0), block("ram1", 8 << 20)];
        let workload = WorkloadSpec {
            fill: Fill::Zero,
            working_set_bytes: 0,
            dirty_bytes_per_second: 0,
            withdraws_readiness_after_ms: None,
        };
        let layout = GuestLayout::assign(&blocks).unwrap();
        let spec = GuestSpec {
            name: "g1".into(),
            driver: EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None }),
            blocks,
            backing: None,
            labels: Labels::new(),
        };
        GuestRecord::defined(Uuid::from_u128(1), spec, layout, ProtectionLevel::None, None)
    }

    fn unconfirmed() -> HostError {
        HostError::GuestUnconfirmed { missing: Vec::new() }
    }

    #[test]
    fn a_guest_that_a_migration_has_does_nothing_else_in_any_state() {
        let record = guest();
        for state in STATES {
            let lent = Standing { record: &record, state, lent: Some(MIGRATION) };
            let taken =
                |e: HostError| matches!(e, HostError::GuestMigrating { migration } if migration == MIGRATION);
            for action in ACTIONS {
                assert!(taken(lent.act(action, unconfirmed).unwrap_err()), "{action:?} {state:?}");
            }
            assert!(taken(lent.undefine().unwrap_err()));
            assert!(taken(lent.replug("ram0", None).unwrap_err()));
        }
    }

    #[test]
    fn an_action_leads_where_the_life_cycle_does_or_names_the_states_that_allow_it() {
        let record = guest();
        for state in STATES {
            for action in ACTIONS {
                match (Standing { record: &record, state, lent: None }).act(action, unconfirmed) {
                    Ok(Course::Turn { next, goal }) => assert!(next != state && goal != state),
                    Ok(Course::Stays) => {}
                    Ok(Course::Confirm) => panic!("it is confirmed"),
                    Err(HostError::WrongState { current, allowed, .. }) => {
                        assert_eq!(current, state.name());
                        assert!(!allowed.contains(&current), "{action:?} {state:?}");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        let at = |state| Standing { record: &record, state, lent: None };
        let start = at(GuestState::Stopped).act(GuestAction::Start, unconfirmed).unwrap();
        assert_eq!(start, Course::Turn { next: GuestState::Starting, goal: GuestState::Running });
        let again = at(GuestState::Starting).act(GuestAction::Start, unconfirmed).unwrap();
        assert_eq!(again, Course::Stays, "idempotent in effect");
    }

    #[test]
    fn what_left_does_not_start_and_what_is_not_confirmed_does_not_run() {
        let moved = GuestRecord { moved_to: Some("b".into()), ..guest() };
        let doubted = GuestRecord { unconfirmed: true, ..guest() };
        let stopped = |record| Standing { record, state: GuestState::Stopped, lent: None };
        let left = stopped(&moved).act(GuestAction::Start, unconfirmed);
        assert!(matches!(left, Err(HostError::GuestMoved { peer }) if peer == "b"));
        let start = stopped(&doubted).act(GuestAction::Start, unconfirmed);
        assert!(matches!(start, Err(HostError::GuestUnconfirmed { .. })));
        let paused = Standing { record: &doubted, state: GuestState::Paused, lent: None };
        let resume = paused.act(GuestAction::Resume, unconfirmed);
        assert!(matches!(resume, Err(HostError::GuestUnconfirmed { .. })));
        assert_eq!(stopped(&doubted).act(GuestAction::Confirm, unconfirmed).unwrap(), Course::Confirm);
    }

    #[test]
    fn labels_are_the_hosts_until_they_were_sent() {
        let record = GuestRecord { migration: Some(MIGRATION), ..guest() };
        let at = |state| Standing { record: &record, state, lent: Some(MIGRATION) };
        assert!(at(GuestState::Running).relabel(false).is_ok());
        assert!(at(GuestState::Running).relabel(true).is_err());
        assert!(at(GuestState::Incoming).relabel(false).is_err());
        assert!(at(GuestState::InDoubt).relabel(false).is_err());
    }

    #[test]
    fn a_block_is_plugged_at_a_free_address_and_nowhere_else() {
        let record = guest();
        let running = Standing { record: &record, state: GuestState::Running, lent: None };
        assert!(running.replug("ram1", None).is_ok());
        assert!(matches!(running.replug("ram9", None), Err(HostError::NotFound { .. })));
        let mirror = Some(Uuid::from_u128(3));
        assert!(matches!(running.replug("ram1", mirror), Err(HostError::InUse { .. })));
        let stopped = Standing { state: GuestState::Stopped, ..running };
        assert!(matches!(stopped.replug("ram1", None), Err(HostError::WrongState { .. })));

        let gone = running.replugged("ram1", None).unwrap();
        assert_eq!(gone.block("ram1").unwrap().plugs, []);
        assert_eq!(running.replugged("ram1", Some(Gpa::new(8 << 20))).unwrap(), record.layout, "where it is");
        let elsewhere = running.replugged("ram1", Some(Gpa::new(16 << 20)));
        let at = Gpa::new(8 << 20);
        assert!(matches!(elsewhere, Err(HostError::PlugRefused(PlugError::Elsewhere { gpa })) if gpa == at));
        let unplugged = GuestRecord { layout: gone, ..guest() };
        let free = Standing { record: &unplugged, ..running };
        for taken in [0, PAGE_SIZE, 1] {
            let refused = free.replugged("ram1", Some(Gpa::new(taken)));
            assert!(matches!(refused, Err(HostError::PlugRefused(PlugError::Layout(_)))), "{taken}");
        }
        assert!(free.replugged("ram1", Some(Gpa::new(16 << 20))).is_ok());
    }
}
