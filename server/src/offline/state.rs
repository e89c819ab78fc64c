//! `mirrorvmd state`: whether a host's state is whole, a copy of it, and the ways on when it is not.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;

use mirrorvm::host;
use mirrorvm::store::state_files::Facts;

use crate::out::out;

/// Says whether everything in a state directory is what was acknowledged.
///
/// # Errors
/// What is wrong.
pub fn check(state_dir: &Path) -> Result<(), Box<dyn Error>> {
    let facts = host::check_state(state_dir)?;
    let when = if facts.live { ", and a daemon has it open" } else { "" };
    say(&format!("whole: {}{when}", told(&facts)))
}

/// Copies a host's state into a new file.
///
/// # Errors
/// A state that is not whole, a file that cannot be made.
pub fn backup(state_dir: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    let facts = host::backup_state(state_dir, to)?;
    say(&format!("{}: {}", to.display(), told(&facts)))
}

/// Puts such a file in the place of a host's state.
///
/// # Errors
/// A running daemon, a file that is not a whole backup.
pub fn restore(from: &Path, state_dir: &Path) -> Result<(), Box<dyn Error>> {
    let entry = super::entry("state_restore", &format!("restored {}", from.display()));
    let restored = host::restore_state(from, state_dir, &entry)?;
    let mut err = std::io::stderr();
    if let Some(replaced) = restored.replaced {
        writeln!(err, "mirrorvmd: the database that was there is {} now", replaced.display())?;
    }
    if restored.key {
        writeln!(err, "mirrorvmd: the host's key was missing and comes from the backup")?;
    }
    if let Some(incomplete) = restored.incomplete {
        writeln!(err, "mirrorvmd: {incomplete}")?;
    }
    writeln!(err, "mirrorvmd: {UNCONFIRMED}")?;
    say(&format!("restored: {}", told(&restored.facts)))
}

/// Goes on with what is there of a host's state.
///
/// # Errors
/// A running daemon, files that cannot be read as a database at all.
pub fn accept(state_dir: &Path) -> Result<(), Box<dyn Error>> {
    let accepted =
        host::accept_state(state_dir, |wrong| super::entry("state_accept", &format!("accepted: {wrong}")))?;
    let Some(wrong) = accepted.finding else {
        return say(&format!("nothing is wrong: {}", told(&accepted.facts)));
    };
    let mut err = std::io::stderr();
    writeln!(err, "mirrorvmd: {wrong}")?;
    if let Some(replaced) = accepted.replaced {
        writeln!(err, "mirrorvmd: what was left of it is {} now", replaced.display())?;
    }
    writeln!(err, "mirrorvmd: {UNCONFIRMED}")?;
    say(&format!("accepted: {}", told(&accepted.facts)))
}

const UNCONFIRMED: &str = "every guest is unconfirmed: it starts when all known peers have said that they do not have it, or \
                           when an administrator confirms it";

fn told(facts: &Facts) -> String {
    format!("{} records after {} changes", facts.records, facts.changes)
}

fn say(line: &str) -> Result<(), Box<dyn Error>> {
    Ok(writeln!(out(), "{line}")?)
}
