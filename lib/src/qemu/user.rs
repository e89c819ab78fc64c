//! Owns whom QEMU processes run as: users without privileges, one for each guest where there are enough of
//! them. Must not know how a process is started.
//!
//! A guest that took over its QEMU has what that process has. With a user of its own it reaches neither the
//! daemon's files nor, through `/proc`, the memory of another guest's QEMU.

use crate::sync::Locked;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::thread::{CapabilitySet, capabilities};

/// Ids that neither Debian nor systemd gives to anybody: 65520 to 65533 are unused
/// (<https://systemd.io/UIDS-GIDS/>).
const DEFAULT: (u32, u32) = (65_520, 65_533);
/// Users that a range may have.
const RANGE_MAX: u32 = 65_536;

/// Users that QEMU processes of a daemon of root's run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuUsers {
    first: u32,
    last: u32,
    /// `None`: the group with the user's number.
    gid: Option<u32>,
}

impl QemuUsers {
    /// The first and the last of them.
    pub const fn range(self) -> (u32, u32) {
        (self.first, self.last)
    }
}

impl QemuUsers {
    /// Whether a process of this user and group is one of theirs.
    pub(super) fn has(self, uid: u32, gid: u32) -> bool {
        (self.first..=self.last).contains(&uid) && gid == self.gid.unwrap_or(uid)
    }
}

impl Default for QemuUsers {
    fn default() -> Self {
        Self { first: DEFAULT.0, last: DEFAULT.1, gid: None }
    }
}

impl fmt::Display for QemuUsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// Whether this process may give processes that it starts other users, and end them then.
#[must_use]
pub fn may_change_users() -> bool {
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::KILL;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// A text that names no users for QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoQemuUsers {
    /// Neither a name, nor a number, nor two numbers.
    #[error("neither a user's name in /etc/passwd, nor a user id, nor FIRST-LAST")]
    Unknown,
    /// Root, or in root's group.
    #[error("QEMU must not run as root or in root's group")]
    Root,
    /// The first is after the last, or there are too many, or the last is no user's.
    #[error("not a range of 1 to 65536 user ids below 4294967294")]
    Range,
}

impl FromStr for QemuUsers {
    type Err = NoQemuUsers;

    /// A number, a range `FIRST-LAST` of which each guest gets one, or a name in `/etc/passwd`.
    fn from_str(text: &str) -> Result<Self, NoQemuUsers> {
        let number = |t: &str| t.bytes().all(|b| b.is_ascii_digit()).then(|| t.parse::<u32>().ok()).flatten();
        let (first, last, gid) = if let Some(id) = number(text) {
            (id, id, None)
        } else if let Some((first, last)) =
            text.split_once('-').and_then(|(a, b)| Some((number(a)?, number(b)?)))
        {
            (first, last, None)
        } else {
            let table = std::fs::read_to_string("/etc/passwd").map_err(|_| NoQemuUsers::Unknown)?;
            let (uid, gid) = named(&table, text).ok_or(NoQemuUsers::Unknown)?;
            (uid, uid, Some(gid))
        };
        if first == 0 || gid == Some(0) {
            return Err(NoQemuUsers::Root);
        }
        // The last number means "no change" to the kernel; the one before is nobody's.
        if first > last || last - first >= RANGE_MAX || last >= u32::MAX - 1 {
            return Err(NoQemuUsers::Range);
        }
        Ok(Self { first, last, gid })
    }
}

/// User and group of a name in a table of users.
fn named(table: &str, name: &str) -> Option<(u32, u32)> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name || name.is_empty() {
            return None;
        }
        let (_, uid, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some((uid.parse().ok()?, gid.parse().ok()?))
    })
}

/// Gives each QEMU its user.
#[derive(Clone, Debug)]
pub struct UserPool {
    users: QemuUsers,
    /// Where to look first: two daemons of one host do not begin with the same.
    offset: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

/// A QEMU's user; free again when this is dropped.
#[derive(Debug)]
pub struct UserLease {
    /// User id of the QEMU process.
    pub uid: u32,
    /// Group id of the QEMU process.
    pub gid: u32,
    taken: Option<Arc<Mutex<BTreeSet<u32>>>>,
}

impl UserPool {
    /// A pool of these users.
    pub fn new(users: QemuUsers, offset: u32) -> Self {
        Self { users, offset, taken: Arc::default() }
    }

    /// The users that the pool hands out.
    pub const fn users(&self) -> QemuUsers {
        self.users
    }

    /// A user that no other QEMU of this pool has; of a pool of one, that one. `None`: all are taken.
    pub fn lease(&self) -> Option<UserLease> {
        let QemuUsers { first, last, gid } = self.users;
        let gid_of = |uid| gid.unwrap_or(uid);
        if first == last {
            return Some(UserLease { uid: first, gid: gid_of(first), taken: None });
        }
        let count = last - first + 1;
        let mut taken = locked(&self.taken);
        let uid = (0..count)
            .map(|i| first + ((u64::from(self.offset) + u64::from(i)) % u64::from(count)) as u32)
            .find(|uid| !taken.contains(uid))?;
        taken.insert(uid);
        Some(UserLease { uid, gid: gid_of(uid), taken: Some(Arc::clone(&self.taken)) })
    }
}

impl Drop for UserLease {
    fn drop(&mut self) {
        if let Some(taken) = &self.taken {
            locked(taken).remove(&self.uid);
        }
    }
}

fn locked(taken: &Mutex<BTreeSet<u32>>) -> MutexGuard<'_, BTreeSet<u32>> {
    // Insertions and removals are whole, so a panic elsewhere leaves nothing half done.
    taken.locked()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_a_number_a_range_or_a_name_and_never_root() {
        assert_eq!("64055".parse(), Ok(QemuUsers { first: 64_055, last: 64_055, gid: None }));
        assert_eq!("70000-70009".parse(), Ok(QemuUsers { first: 70_000, last: 70_009, gid: None }));
        assert_eq!("65520-65533".parse(), Ok(QemuUsers::default()));
        for (bad, why) in [
            ("0", NoQemuUsers::Root),
            ("0-5", NoQemuUsers::Root),
            ("root", NoQemuUsers::Root),
            ("5-4", NoQemuUsers::Range),
            ("4294967295", NoQemuUsers::Range),
            ("1-4294967294", NoQemuUsers::Range),
            ("", NoQemuUsers::Unknown),
            ("-1", NoQemuUsers::Unknown),
            ("1-", NoQemuUsers::Unknown),
            ("+7", NoQemuUsers::Unknown),
            ("no such user", NoQemuUsers::Unknown),
        ] {
            assert_eq!(bad.parse::<QemuUsers>(), Err(why), "{bad:?}");
        }
        let table = "root:x:0:0::/root:/bin/sh\nqemu:x:64055:108::/:/bin/false\nqemu2:x:1\n";
        assert_eq!(named(table, "qemu"), Some((64_055, 108)));
        assert_eq!((named(table, "qemu2"), named(table, ""), named(table, "x")), (None, None, None));
        assert_eq!(QemuUsers::default().to_string(), "65520-65533");
    }

    #[test]
    fn each_guest_has_a_user_of_its_own_until_it_ends() {
        let pool = UserPool::new("100-102".parse().unwrap(), 7);
        let leases: Vec<UserLease> = (0..3).map(|_| pool.lease().unwrap()).collect();
        let mut ids: Vec<u32> = leases.iter().map(|l| l.uid).collect();
        assert!(leases.iter().all(|l| l.gid == l.uid));
        ids.sort_unstable();
        assert_eq!(ids, [100, 101, 102]);
        assert!(pool.lease().is_none(), "a fourth would share one");
        drop(leases);
        assert!(pool.lease().is_some());
        let one = UserPool::new("100".parse().unwrap(), 7);
        let (a, b) = (one.lease().unwrap(), one.lease().unwrap());
        assert_eq!((a.uid, b.uid), (100, 100), "somebody chose that they share it");
    }
}
