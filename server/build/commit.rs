//! Which commit a daemon is built from.
//!
//! Owns: asking git, and being told instead. Must not know: how a build script talks to cargo.
//!
//! Git is asked for what is handed out alone, a release build: a debug build would have to be linked anew
//! after every commit. It is not needed: a build without it says `unknown`, and `MIRRORVM_COMMIT` tells one
//! that has the sources and not their history.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What a build says that was told no commit and found none.
pub const UNKNOWN: &str = "unknown";
/// What follows the commit where files were changed since.
pub const MODIFIED: &str = "-modified";

/// A commit, and the files that tell when it is another one.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub commit: String,
    pub watch: Vec<PathBuf>,
}

/// The commit in `text`, which somebody gave: the object's name in full, maybe with `-modified`.
///
/// # Errors
/// What it should be.
pub fn given(text: &str) -> Result<String, String> {
    let hex = text.strip_suffix(MODIFIED).unwrap_or(text);
    let digits = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if text.is_empty() || text == UNKNOWN {
        Ok(UNKNOWN.to_owned())
    } else if digits && [40, 64].contains(&hex.len()) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "MIRRORVM_COMMIT is {text:?}, which is not a commit in full, in small hexadecimal digits, maybe with {MODIFIED}"
        ))
    }
}

/// The commit of the tree at `root`, if git is there and the tree is its own. One that merely lies within
/// another repository has no commit.
pub fn found(root: &Path) -> Option<Found> {
    let ask = |arguments: &[&str]| {
        // What the caller's repository is has no say in which one this tree is of.
        let output = Command::new("git")
            .current_dir(root)
            .args(arguments)
            .env_remove("GIT_DIR")
            .env_remove("GIT_WORK_TREE")
            .env_remove("GIT_INDEX_FILE")
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let top = ask(&["rev-parse", "--show-toplevel"])?;
    if std::fs::canonicalize(top).ok()? != std::fs::canonicalize(root).ok()? {
        return None;
    }
    let mut commit = given(&ask(&["rev-parse", "HEAD"])?).ok()?;
    if !ask(&["status", "--porcelain", "--untracked-files=no"])?.is_empty() {
        commit.push_str(MODIFIED);
    }
    // `logs/HEAD` grows with every commit and checkout; the others are for repositories that keep none.
    let mut names = vec!["HEAD".to_owned(), "logs/HEAD".to_owned(), "packed-refs".to_owned()];
    names.extend(ask(&["symbolic-ref", "--quiet", "HEAD"]));
    let path = |name: &String| {
        let path = root.join(ask(&["rev-parse", "--git-path", name])?);
        // One that is not there would have cargo ask every time.
        path.is_file().then_some(path)
    };
    Some(Found { commit, watch: names.iter().filter_map(path).collect() })
}
