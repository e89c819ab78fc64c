//! `mirrorvmd demo` on real KVM: what it prints, and that nothing is left of it however it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// KVM, or a loud skip; on a host that has /dev/kvm a skip is a failure.
fn kvm() -> bool {
    let path = Path::new("/dev/kvm");
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => true,
        Err(error) => {
            assert!(!path.exists(), "/dev/kvm is there but: {error}");
            println!("SKIPPED (no /dev/kvm): this test ran nothing");
            false
        }
    }
}

/// The demo with `dir` as the only place for its files.
fn demo(dir: &TempDir, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mirrorvmd"));
    command.arg("demo").args(args).env("TMPDIR", dir.path()).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Processes that have `dir` on their command line: the daemons of a demo.
fn processes(dir: &Path) -> Vec<PathBuf> {
    let needle = dir.as_os_str().as_encoded_bytes();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok).map(|e| e.path());
    all.filter(|p| {
        let line = std::fs::read(p.join("cmdline")).unwrap_or_default();
        line.windows(needle.len()).any(|w| w == needle)
    })
    .collect()
}

fn files(dir: &TempDir) -> Vec<PathBuf> {
    std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Starts a demo and waits until its migration moves pages.
#[expect(clippy::zombie_processes, reason = "the callers wait; where this panics the test process ends")]
fn in_the_middle(dir: &TempDir) -> Child {
    let mut child = demo(dir, &["--memory-mib", "512", "--json"]).spawn().unwrap();
    let mut seen = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        seen.push_str(&line);
        if line.starts_with("migration: precopy") {
            assert_eq!(processes(dir.path()).len(), 2);
            return child;
        }
    }
    panic!("no migration was seen: {seen}");
}

fn end_of(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "the demo does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn the_demo_verifies_and_says_so_in_json() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = demo(&dir, &["--json", "--memory-mib", "64"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    // The whole of stdout is one object.
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["driver"], "embedded");
    assert_eq!(said["strategy"], "shifted");
    assert_eq!(said["protection_level"], "none");
    assert_eq!(said["memory_bytes"], 64 << 20);
    assert_eq!(said["verified"], json!({"pages_compared": 16384, "mismatches": 0, "guest_continued": true}));
    assert_eq!((&said["source_state"], &said["destination_state"]), (&json!("stopped"), &json!("running")));
    let number = |field: &str| said[field].as_f64().unwrap_or_else(|| panic!("{field}: {said}"));
    let pages = number("pages_sealed") + number("pages_shared");
    assert!(pages >= 16384.0 && number("pages_shared") > 0.0, "{said}");
    assert!(number("rounds") >= 2.0, "{said}");
    assert!(number("downtime_ms") > 0.0 && number("downtime_ms") <= number("total_ms"), "{said}");
    assert!(number("throughput_bytes_per_second") > 1e6, "{said}");
    assert_eq!((files(&dir), processes(dir.path())), (vec![], vec![]));
}

#[test]
fn zero_pages_do_not_count_as_throughput() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let args = ["--memory-mib", "64", "--fill", "zero", "--dirty-mib-per-s", "0", "--streams", "1"];
    let output = demo(&dir, &args).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{errors}");
    for part in ["plan of the mirror's address space", "16384 pages compared, 0 differ", "What to try next"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // The working set of 16 MiB is filled in any case; the rest of RAM is not.
    let first = text.lines().find(|l| l.contains("rounds")).unwrap();
    assert!(first.contains("16384 pages, 16."), "{first}");
    assert_eq!((files(&dir), processes(dir.path())), (vec![], vec![]));
}

#[test]
fn a_signal_in_the_middle_leaves_nothing() {
    if !kvm() {
        return;
    }
    for (number, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = in_the_middle(&dir);
        signal(&child, number);
        assert_eq!(end_of(&mut child).code(), Some(status));
        assert_eq!((files(&dir), processes(dir.path())), (vec![], vec![]));
    }
}

#[test]
fn the_daemons_die_with_a_demo_that_is_killed() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = in_the_middle(&dir);
    signal(&child, Signal::KILL);
    assert_eq!(end_of(&mut child).signal(), Some(9));
    let deadline = Instant::now() + Duration::from_secs(40);
    while !processes(dir.path()).is_empty() {
        assert!(Instant::now() < deadline, "the daemons go on without the demo");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_cannot_work_is_refused_with_the_reason_and_what_to_do() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (args, parts) in [
        (&["--driver", "qemu"][..], &["--kernel", "build-linux-guest"][..]),
        (&["--driver", "qemu", "--kernel", "/nowhere", "--initrd", "/nowhere"], &["--kernel /nowhere"]),
        (
            &["--driver", "embedded", "--strategy", "psp-copied", "--via", "send-receive"],
            &["a guest without encryption"],
        ),
        (&["--shift", "5"], &["/strategy"]),
    ] {
        let output = demo(&dir, args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
        assert!(parts.iter().all(|p| errors.contains(p)), "{args:?}: {errors}");
        assert_eq!((files(&dir), processes(dir.path())), (vec![], vec![]));
    }
}
