//! Which commit a build says that it is of.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

#[path = "../build/commit.rs"]
mod commit;

use std::path::Path;
use std::process::{Command, Stdio};

use commit::{MODIFIED, UNKNOWN, found, given};

fn git(at: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(at)
        .args(["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .stderr(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "git {arguments:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_commit_that_is_told_is_one_in_full_or_none() {
    let full = "0123456789abcdef0123456789abcdef01234567";
    assert_eq!(given(full).unwrap(), full);
    assert_eq!(given(&format!("{full}{MODIFIED}")).unwrap(), format!("{full}{MODIFIED}"));
    assert_eq!((given("").unwrap(), given(UNKNOWN).unwrap()), (UNKNOWN.to_owned(), UNKNOWN.to_owned()));
    for bad in ["0123456", "HEAD", "-modified", &full.to_uppercase(), &format!("{full}\n")] {
        assert!(given(bad).unwrap_err().contains("MIRRORVM_COMMIT"), "{bad}");
    }
}

#[test]
fn a_tree_is_of_its_own_commit_and_says_when_it_was_changed_since() {
    if Command::new("git").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED (no git): the commit of a tree");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(found(dir.path()), None, "no repository");
    git(dir.path(), &["init", "--quiet"]);
    std::fs::write(dir.path().join("f"), "1").unwrap();
    std::fs::create_dir(dir.path().join("below")).unwrap();
    git(dir.path(), &["add", "f"]);
    git(dir.path(), &["commit", "--quiet", "-m", "one"]);
    let head = git(dir.path(), &["rev-parse", "HEAD"]);
    let of_tree = found(dir.path()).unwrap();
    assert_eq!(of_tree.commit, head);
    assert!(of_tree.watch.iter().any(|f| f.ends_with("logs/HEAD")), "{of_tree:?}");
    // What is unpacked there has nothing to do with that repository.
    assert_eq!(found(&dir.path().join("below")), None);
    std::fs::write(dir.path().join("f"), "2").unwrap();
    assert_eq!(found(dir.path()).unwrap().commit, format!("{head}{MODIFIED}"));
    // What watches is another after the next commit: cargo looks at the times of these files.
    let before = of_tree.watch.iter().map(|f| std::fs::read(f).unwrap()).collect::<Vec<_>>();
    git(dir.path(), &["commit", "--quiet", "-am", "two"]);
    let after = of_tree.watch.iter().map(|f| std::fs::read(f).unwrap()).collect::<Vec<_>>();
    assert_ne!(before, after);
    assert_ne!(found(dir.path()).unwrap().commit, head);
}
