//! The README's first session, as somebody pastes it into a shell.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write as _;
use std::process::{Command, Stdio};

use mirrorvm_tests::{daemon_binary, kvm, repository};

fn session() -> String {
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("## A first session").unwrap();
    let (_, rest) = rest.split_once("```sh\n").unwrap();
    let (block, _) = rest.split_once("```").unwrap();
    // What was built for the tests is taken.
    let built = daemon_binary().display().to_string();
    let block = block.strip_prefix("cargo build --release\n").unwrap();
    let with_it = block.replacen("target/release/mirrorvmd", &built, 1);
    assert_ne!(block, with_it);
    with_it
}

/// Numbers of all processes that have `text` on their command lines.
fn running(text: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let named = processes.filter(|p| {
        let line = std::fs::read(p.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    });
    named.map(|p| p.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_first_session_survives_being_pasted_as_one_block_and_once_more() {
    let has = |tool| Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !kvm() {
        return;
    }
    if !has("curl") || !has("jq") {
        println!("SKIPPED (no curl or jq): the README's session, pasted");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut shell = Command::new("bash")
        .current_dir(repository())
        // For mktemp: what is left behind is seen.
        .env("TMPDIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut typed = shell.stdin.take().unwrap();
    let block = session();
    let writer = std::thread::spawn(move || typed.write_all(format!("{block}{block}").as_bytes()).unwrap());
    let output = shell.wait_with_output().unwrap();
    writer.join().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (said, wrong) = (text(output.stdout), text(output.stderr));
    let times = |what: &str| said.matches(what).count();
    assert!(wrong.is_empty(), "{wrong}");
    // The migration's, and its progress's.
    assert_eq!(times("\"state\": \"succeeded\""), 4, "{said}");
    // The console at the source, and at the destination, each time.
    assert!(times("errors 0") >= 4, "{said}");
    assert_eq!(times("\"code\": \"guest_moved\""), 2, "{said}");
    // The refusal at the end is the only one.
    assert_eq!(times("/v1/problems/"), 2, "{said}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(running(dir.path().to_str().unwrap()), [""; 0], "daemons that were left behind");
}
