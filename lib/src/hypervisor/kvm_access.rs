//! Who may open `/dev/kvm`, and what to do for whoever may not.
//!
//! Owns: reading the device's group and mode, and turning them into advice. Must not know: what the device is
//! for.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// The device.
const DEVICE: &str = "/dev/kvm";

/// What there is to know of a device that does not open.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    /// Its mode, permission bits alone.
    mode: u32,
    /// Its group, by name or, if that has none, by number; `None` is root's.
    group: Option<String>,
    /// The user that this process runs as, likewise.
    user: String,
    /// Whether the group has that user already, which this process began without.
    member: bool,
}

/// What to do where `/dev/kvm` is there and not for this process; `None` where it opens, or is not there.
pub fn kvm_denied_fix() -> Option<String> {
    denied_fix(Path::new(DEVICE))
}

fn denied_fix(device: &Path) -> Option<String> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(device);
    opened.err().filter(|e| e.kind() == ErrorKind::PermissionDenied)?;
    let metadata = std::fs::metadata(device).ok()?;
    // What the system's other sources of names know is known by number.
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (groups, users) = (read("/etc/group"), read("/etc/passwd"));
    let uid = rustix::process::geteuid().as_raw();
    let user = entry(&users, uid).map_or_else(|| uid.to_string(), |fields| fields[0].to_owned());
    let entry = entry(&groups, metadata.gid());
    let members = entry.as_ref().and_then(|fields| fields.get(3)).map_or("", |list| *list);
    let member = members.split(',').any(|name| name == user);
    let group = entry.map_or_else(|| metadata.gid().to_string(), |fields| fields[0].to_owned());
    let group = (metadata.gid() != 0).then_some(group);
    Some(fix(&Facts { mode: metadata.mode() & 0o777, group, user, member }))
}

/// The line of a file like `/etc/group` with this number.
fn entry(text: &str, number: u32) -> Option<Vec<&str>> {
    let lines = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.into_iter().find(|fields| fields.len() > 3 && fields[2].parse() == Ok(number))
}

fn fix(facts: &Facts) -> String {
    let Facts { mode, group, user, member } = facts;
    match group.as_ref().filter(|_| mode & 0o060 == 0o060) {
        Some(group) if *member => format!(
            "{DEVICE} is for the group `{group}`, which has the user {user} since before this process began: log in again, or \
             restart the service"
        ),
        Some(group) => format!(
            "{DEVICE} is for the group `{group}`: usermod -aG {group} {user}, then log in again, or restart the service"
        ),
        None => format!(
            "{DEVICE} has mode {mode:04o} and no group to join: give it one, as Debian does (chgrp kvm {DEVICE}; chmod 0660 \
             {DEVICE}), then usermod -aG kvm {user} and log in again"
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn facts(mode: u32, group: Option<&str>, member: bool) -> Facts {
        Facts { mode, group: group.map(str::to_owned), user: "ann".into(), member }
    }

    #[test]
    fn a_user_is_told_the_group_that_the_device_has() {
        let text = fix(&facts(0o660, Some("virt"), false));
        assert!(text.contains("usermod -aG virt ann"), "{text}");
        let text = fix(&facts(0o660, Some("virt"), true));
        assert!(
            text.contains("virt") && text.contains("log in again") && !text.contains("usermod"),
            "{text}"
        );
        for closed in [facts(0o660, None, false), facts(0o600, Some("virt"), false)] {
            let text = fix(&closed);
            assert!(text.contains("chgrp kvm") && text.contains("usermod -aG kvm ann"), "{text}");
        }
    }

    #[test]
    fn groups_and_users_are_read_by_number() {
        let text = "root:x:0:\nkvm:x:104:ann,bob\nshort:x\nx:x:y:\n";
        assert_eq!(entry(text, 104), Some(vec!["kvm", "x", "104", "ann,bob"]));
        assert_eq!(entry(text, 105), None);
    }

    #[test]
    fn what_opens_and_what_is_not_there_needs_no_advice() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kvm");
        assert_eq!(denied_fix(&file), None);
        std::fs::write(&file, "").unwrap();
        assert_eq!(denied_fix(&file), None);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o060)).unwrap();
        if rustix::process::geteuid().is_root() {
            println!("for root every file opens: its advice is looked at by itself");
        } else {
            assert!(denied_fix(&file).unwrap().contains("usermod"));
        }
    }
}
