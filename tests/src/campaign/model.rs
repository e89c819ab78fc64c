//! What must be true, by what was asked for and what was answered.
//!
//! Owns: guests as their owner believes them to be. Must not know: daemons.

use std::collections::BTreeMap;

/// What a guest does, as far as answers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It never ran, or was stopped.
    Stopped,
    /// Starting was acknowledged and its end not seen yet.
    Started,
    /// It was seen to run.
    Runs,
    /// Pausing was acknowledged.
    Paused,
    /// An answer is missing, or it ran on a host whose daemon was ended.
    Unknown,
}

/// Whether there is a guest, as far as answers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// Made, and that was acknowledged.
    Yes,
    /// An answer is missing.
    Maybe,
    /// Deleted, and that was acknowledged.
    No,
}

/// One guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its id once known.
    pub id: Option<String>,
    /// Whether there is one.
    pub there: There,
    /// What it does.
    pub doing: Doing,
    /// The label that was acknowledged last.
    pub label: Option<String>,
    /// Labels since that were sent and not answered.
    pub labels_maybe: Vec<String>,
}

/// A change that was acknowledged: which host answered which request how.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    /// `x-request-id` of the answer.
    pub request: String,
    /// Its status.
    pub status: u16,
    /// What it was, for people.
    pub what: String,
}

/// Everything.
#[derive(Debug, Default)]
pub struct Model {
    /// By name; names are never used twice.
    pub guests: BTreeMap<String, Guest>,
    /// Acknowledged changes of each host that the audit log has not been asked for yet.
    pub acknowledged: [Vec<Acknowledged>; 2],
    /// Tokens of each host that were acknowledged: made, and not withdrawn.
    pub tokens: [Vec<String>; 2],
}

impl Model {
    /// Names of guests that may be there.
    pub fn alive(&self) -> Vec<String> {
        self.guests.iter().filter(|(_, g)| g.there != There::No).map(|(n, _)| n.clone()).collect()
    }

    /// A daemon ended: nobody knows what became of what it was doing.
    pub fn ended(&mut self) {
        for guest in self.guests.values_mut().filter(|g| g.doing != Doing::Stopped) {
            guest.doing = Doing::Unknown;
        }
    }
}
