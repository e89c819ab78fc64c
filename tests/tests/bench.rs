//! The benchmark suite: every scenario runs, on sizes that say nothing of speed, and its checks can fail.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

use std::process::{Command, Output, Stdio};

use mirrorvm_tests::{daemon_binary, kvm, qemu_binary};
use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(daemon_binary());
    command.args(["bench", "--smoke"]).args(arguments).stdin(Stdio::null());
    command.output().unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let output = bench(&[arguments, &["--json-file", &path]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let table = String::from_utf8(output.stdout).unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for skip in report["skipped"].as_array().unwrap() {
        let skip = skip.as_str().unwrap();
        println!("SKIPPED ({}): of the benchmark {skip}", skip.rsplit(": ").next().unwrap());
        assert!(table.contains(&format!("SKIPPED {skip}")), "{table}");
    }
    for key in ["date", "kernel", "KVM", "machine", "guest RAM", "QEMU", "libvirt", "load average after"] {
        assert!(report["conditions"][key].as_str().is_some_and(|v| !v.is_empty()), "{key}: {report}");
    }
    for row in report["rows"].as_array().unwrap() {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
        assert!(number("min") <= number("median") && number("median") <= number("max"), "{row}");
        assert!(number("min") >= 0.0, "{row}");
        assert_eq!(row["target"].is_null(), row["met"].is_null(), "{row}");
        assert!(table.contains(row["name"].as_str().unwrap()), "{table}");
    }
    report
}

/// Rows whose names contain each of these are there, and those with a target have one.
fn has(report: &Value, wanted: &[(&str, bool)]) {
    let rows = report["rows"].as_array().unwrap();
    for (part, promised) in wanted {
        let row = rows.iter().find(|r| r["name"].as_str().unwrap().contains(part));
        let row = row.unwrap_or_else(|| panic!("no row says {part}: {report:#}"));
        assert_eq!(row["target"].is_object(), *promised, "{row}");
    }
}

#[test]
fn migrations_are_set_against_qemu() {
    if !kvm() {
        return;
    }
    let report = report(&["vs-qemu", "downtime"]);
    has(
        &report,
        &[
            ("64 MiB paused: ours, sealed end to end", false),
            ("cost per GiB, 128 MiB / 64 MiB", true),
            ("downtime, 128 MiB, 8 MiB/s of 32 MiB rewritten: ours", true),
        ],
    );
    if qemu_binary().is_some() {
        has(
            &report,
            &[
                ("64 MiB paused: QEMU, plain", false),
                ("64 MiB paused: QEMU, TLS", false),
                ("64 MiB paused: QEMU, multifd 2 + TLS", false),
                ("64 MiB paused: QEMU, multifd 4 + TLS", false),
                ("64 MiB paused: ours against QEMU's multifd", true),
                ("128 MiB paused: ours against QEMU's multifd", true),
                ("downtime, the same: QEMU, plain", false),
                ("downtime: ours / QEMU's", true),
            ],
        );
    }
}

#[test]
fn helpers_mirrors_memory_and_stages() {
    if !kvm() {
        return;
    }
    let report = report(&["seal", "create", "audit", "memory", "stages", "migrate"]);
    has(
        &report,
        &[
            ("helper seals, first pass / ring", true),
            ("helper seals, second pass / ring", true),
            ("mirror: plan, load, create, helper ready", true),
            ("mirror / raw", true),
            ("audit of 64 MiB: processor time of both helpers", true),
            ("audit of 64 MiB: of that, the source's after START", false),
            ("audit of 64 MiB: of that, the destination's after START", false),
            ("source beyond 64 MiB of guest RAM", true),
            ("destination beyond 64 MiB of guest RAM", true),
            ("destination that keeps digests for an audit, beyond 64 MiB of guest RAM", true),
            ("of that, seal", false),
            ("of that, open", false),
            ("migration, 2 stream(s)", false),
        ],
    );
    let of_that = |r: &&Value| r["name"].as_str().unwrap().starts_with("of that, ");
    let shares = report["rows"].as_array().unwrap().iter().filter(of_that);
    let sum: f64 = shares.map(|r| r["median"].as_f64().unwrap()).sum();
    assert!((99.0..101.0).contains(&sum), "shares of one run are all of it, not {sum} %");
}

#[test]
fn plans_and_the_api() {
    let report = report(&["plan", "api"]);
    has(&report, &[("GET one guest", false), ("from a thread that only echoes", false)]);
    has(
        &report,
        &[
            ("of 100 guests: GET one", false),
            ("a page of 100: of 100 guests / of 20", true),
            ("events of one", false),
            ("definitions up to 100, 32 clients", false),
            ("GET one, 16 connections, p99", false),
            ("8 followers: events delivered", true),
            ("8 followers: from the request to the event, p99", false),
            ("memory for each guest", true),
            ("killed, then ready again with 100 guests", true),
        ],
    );
    let rows = report["rows"].as_array().unwrap();
    let delivered = rows.iter().find(|r| r["name"].as_str().unwrap().ends_with("events delivered")).unwrap();
    assert_eq!(delivered["min"], 100.0, "no event is left out");
    let lacks =
        |peer: &str| report["skipped"].as_array().unwrap().iter().any(|s| s.as_str().unwrap().contains(peer));
    if !lacks("libvirt") {
        has(&report, &[("one guest: ours / libvirt", true), ("list: ours / libvirt", true)]);
        has(&report, &[("listing all of 100 domains", false), ("a page of 100 / libvirt's list", false)]);
    }
    if !lacks("LXD") {
        has(&report, &[("LXD: GET one", false), ("one, ours / LXD's of 100", false)]);
    }
}

#[test]
fn a_check_fails_by_name_when_targets_are_missed_and_only_then() {
    if !kvm() {
        return;
    }
    let kept = bench(&["create", "--check", "--strictness", "1e-9"]);
    assert!(kept.status.success(), "{}", String::from_utf8_lossy(&kept.stderr));
    let missed = bench(&["create", "--check", "--strictness", "1e9"]);
    assert!(!missed.status.success());
    let said = String::from_utf8_lossy(&missed.stderr);
    assert!(said.contains("targets missed") && said.contains("mirror / raw"), "{said}");
}
