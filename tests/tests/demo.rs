//! `mirrorvmd demo` as people run it: every strategy on every driver that this host has, and a host without
//! KVM.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::process::{Command, Output};

use mirrorvm_tests::{daemon_binary, kvm};
use serde_json::{Value, json};

/// RAM of the guests: small, as every strategy has its own.
const MIB: u64 = 32;

/// Every strategy with its way, in the demo's order.
const ALL: [(&str, Option<&str>); 5] = [
    ("shifted", None),
    ("identity-cbit", None),
    ("declared", None),
    ("psp-copied", Some("launch-update")),
    ("psp-copied", Some("send-receive")),
];

fn demo(arguments: &[&str]) -> Command {
    let mut command = Command::new(daemon_binary());
    command.arg("demo").args(arguments);
    command
}

/// Runs it to its end; nothing of it may be left in its directory for temporary files.
fn run_out(command: &mut Command) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let output = command.env("TMPDIR", dir.path()).output().unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?} is left");
    output
}

/// The demo's one object on stdout; it must have ended well.
fn object(mut command: Command) -> Value {
    let output = run_out(&mut command);
    let body = serde_json::from_slice(&output.stdout);
    assert!(output.status.success() && body.is_ok(), "{command:?}\n{}", said(&output));
    body.unwrap()
}

fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n--- stdout\n{out}\n--- stderr\n{err}", output.status)
}

fn names(list: &Value) -> Vec<(&str, Option<&str>)> {
    list.as_array().unwrap().iter().map(|r| (r["strategy"].as_str().unwrap(), r["via"].as_str())).collect()
}

fn run<'a>(body: &'a Value, strategy: &str, via: Option<&str>) -> &'a Value {
    let runs = body["runs"].as_array().unwrap();
    runs.iter().find(|r| r["strategy"] == strategy && r["via"].as_str() == via).unwrap()
}

fn exposes(run: &Value, code: &str) -> bool {
    run["exposures"].as_array().unwrap().iter().any(|c| c == code)
}

/// Pages of an SEV-ES guest besides its RAM blocks: the save areas of its vCPU and of the firmware's.
const SAVE_AREAS: u64 = 2;

/// What every run must have come to, whatever the strategy.
fn check_run(run: &Value, driver: &str, level: &str, save_areas: u64) {
    assert_eq!((&run["driver"], &run["protection_level"]), (&json!(driver), &json!(level)), "{run}");
    let (pages, verified) = (MIB * 256 + save_areas, &run["verified"]);
    assert_eq!(run["memory_bytes"], pages * 4096);
    assert_eq!(
        verified,
        &json!({"pages_compared": pages, "mismatches": 0, "guest_continued": true}),
        "{run}"
    );
    assert_eq!((&run["source_state"], &run["destination_state"]), (&json!("stopped"), &json!("running")));
    // Every page crossed at least once, sealed but for the guest's few shared ones.
    let (sealed, shared) = (run["pages_sealed"].as_u64().unwrap(), run["pages_shared"].as_u64().unwrap());
    assert!(sealed + shared >= pages && shared > 0 && sealed > pages / 2, "{run}");
    for positive in ["total_ms", "downtime_ms", "verify_ms", "throughput_bytes_per_second", "mirror_ready_ms"]
    {
        assert!(run[positive].as_f64().unwrap() > 0.0, "{positive}: {run}");
    }
    assert!(run["downtime_ms"].as_f64() < run["total_ms"].as_f64(), "{run}");
    assert!(run["rounds"].as_u64().unwrap() >= 2, "pre-copy, and what is left: {run}");
    assert!(
        run["mirror_slots"].as_u64().unwrap() >= 2 && run["page_table_pages"].as_u64().unwrap() >= 4,
        "{run}"
    );
    assert!(exposes(run, "mirror_reaches_all_ram"), "{run}");
    assert_eq!(run["unreachable"], json!({"codes": [], "bytes": 0}), "all RAM is plugged: {run}");
}

/// What sets the strategies apart, in a demo of all that are in `runs`.
fn check_differences(body: &Value) {
    for run in body["runs"].as_array().unwrap() {
        let kind = run["strategy"].as_str().unwrap();
        assert_eq!(
            run["helper_addresses"],
            if kind == "identity-cbit" { "gpa" } else { "ram_addr" },
            "{run}"
        );
        assert_eq!(run["guest_can_write_helper"], kind != "psp-copied", "{run}");
        assert_eq!(exposes(run, "guest_can_write_helper"), kind != "psp-copied", "{run}");
        assert_eq!(exposes(run, "guest_chose_layout"), kind == "declared", "{run}");
        assert_eq!(exposes(run, "helper_private_to_mirror"), kind == "psp-copied", "{run}");
        assert!(run["when_to_use"].as_str().is_some_and(|s| s.len() > 20), "{run}");
    }
    // The helper that declares itself in pieces has a slot for each.
    let slots = |kind| run(body, kind, None)["mirror_slots"].as_u64().unwrap();
    assert!(slots("declared") > slots("shifted") && slots("shifted") > slots("identity-cbit"), "{body}");
}

fn all(driver: &str, more: &[&str]) -> Value {
    let memory = MIB.to_string();
    let mut command = demo(&["--json", "--strategy", "all", "--memory-mib", &memory, "--driver", driver]);
    command.args(more);
    let body = object(command);
    println!("{body:#}");
    assert_eq!(
        (&body["driver"], &body["fallback"], &body["failed"]),
        (&json!(driver), &Value::Null, &json!([]))
    );
    body
}

#[test]
fn every_strategy_on_the_software_machine() {
    let body = all("emulated", &[]);
    assert_eq!((names(&body["runs"]), &body["refused"]), (ALL.to_vec(), &json!([])));
    for run in body["runs"].as_array().unwrap() {
        check_run(run, "emulated", "modelled", 0);
        assert!(exposes(run, "key_shared_with_mirror") && exposes(run, "host_sees_registers"), "{run}");
        assert!(run["protection_promise"].as_str().unwrap().contains("protects nothing"), "{run}");
    }
    check_differences(&body);
    let send = run(&body, "psp-copied", Some("send-receive"));
    assert!(exposes(send, "policy_allows_send_and_sharing"), "{send}");
    assert!(!exposes(run(&body, "psp-copied", Some("launch-update")), "policy_allows_send_and_sharing"));
    assert!(exposes(run(&body, "identity-cbit", None), "plain_alias"));
}

#[test]
fn every_strategy_with_encrypted_registers() {
    let body = all("emulated", &["--es", "--streams", "1"]);
    assert_eq!(names(&body["runs"]), ALL[..4]);
    for run in body["runs"].as_array().unwrap() {
        check_run(run, "emulated", "modelled", SAVE_AREAS);
        assert!(exposes(run, "host_sees_access_patterns") && !exposes(run, "host_sees_registers"), "{run}");
        assert_eq!(run["streams"], 1);
    }
    // By the daemon's own words.
    assert_eq!(names(&body["refused"]), ALL[4..]);
    let refused = &body["refused"][0];
    assert_eq!((&refused["code"], &refused["status"]), (&json!("validation_failed"), &json!(422)));
    assert!(refused["reason"].as_str().unwrap().contains("/driver/sev/mirror/strategy"), "{refused}");
}

#[test]
fn every_strategy_on_kvm() {
    if !kvm() {
        return;
    }
    let body = all("embedded", &[]);
    assert_eq!(names(&body["runs"]), ALL[..4]);
    for run in body["runs"].as_array().unwrap() {
        check_run(run, "embedded", "none", 0);
        assert!(exposes(run, "host_sees_everything") && !exposes(run, "key_shared_with_mirror"), "{run}");
    }
    check_differences(&body);
    assert_eq!(names(&body["refused"]), ALL[4..]);
    let refused = &body["refused"][0];
    assert_eq!((&refused["code"], &refused["status"]), (&json!("plan_refused"), &json!(422)));
    assert!(refused["reason"].as_str().unwrap().contains("without encryption has no context"), "{refused}");
}

#[test]
fn the_comparison_is_a_table_for_people() {
    let output =
        run_out(&mut demo(&["--driver", "emulated", "--es", "--strategy", "all", "--memory-mib", "16"]));
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    let table = &text[text.find("4 strategies moved a guest: driver emulated, 16 MiB").unwrap()..];
    for line in [
        "strategy",
        "pages by",
        "guest writes helper",
        "slots",
        "table pages",
        "mirror ready",
        "throughput",
        "downtime",
        "pages verified",
        "exposed besides",
        "out of reach",
    ] {
        assert!(table.lines().any(|l| l.trim_start().starts_with(line)), "no line {line} in\n{table}");
    }
    let verified = table.lines().find(|l| l.trim_start().starts_with("pages verified")).unwrap();
    assert_eq!(verified.split_whitespace().skip(2).collect::<Vec<_>>(), ["4098"; 4], "{verified}");
    assert!(table.contains("refused: psp-copied send-receive"), "{table}");
    let advice = &table[table.find("when to use which").unwrap()..];
    for kind in ["shifted", "identity-cbit", "declared", "psp-copied"] {
        assert!(advice.lines().any(|l| l.trim_start().starts_with(kind)), "{advice}");
    }
}

#[test]
fn one_way_is_shown_and_one_that_is_refused_fails_with_the_reason() {
    let way = [
        "--json",
        "--driver",
        "emulated",
        "--strategy",
        "psp-copied",
        "--via",
        "send-receive",
        "--memory-mib",
        "32",
    ];
    let body = object(demo(&way));
    check_run(&body, "emulated", "modelled", 0);
    assert_eq!((&body["strategy"], &body["via"]), (&json!("psp-copied"), &json!("send-receive")));

    let output = run_out(&mut demo(&[&way[..], &["--es"]].concat()));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.stdout.is_empty(), "{}", said(&output));
    assert!(error.contains("psp-copied send-receive") && error.contains("RECEIVE_UPDATE_VMSA"), "{error}");
}

/// The demo where `/dev/kvm` is something else: in a mount namespace of its own, `/dev/null` lies over it.
/// `None`, said loudly, where this cannot be made.
fn without_kvm(arguments: &[&str]) -> Option<Command> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--", "sh", "-c"]);
    let covered = "[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm || exit 99; exec \"$@\"";
    let tried = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--", "sh", "-c", covered, "sh", "true"])
        .output();
    match tried {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            println!("SKIPPED (no mount namespace: needs root): {}", said(&output).replace('\n', " "));
            return None;
        }
        Err(error) => {
            println!("SKIPPED (no unshare): {error}");
            return None;
        }
    }
    command.args([covered, "sh"]).arg(daemon_binary()).arg("demo").args(arguments);
    Some(command)
}

#[test]
fn a_host_without_kvm_gets_the_software_machine_and_is_told_so() {
    let Some(command) = without_kvm(&["--json", "--memory-mib", "32"]) else { return };
    let body = object(command);
    check_run(&body, "emulated", "modelled", 0);
    assert_eq!((&body["strategy"], &body["via"]), (&json!("shifted"), &Value::Null));
    let fallback = &body["fallback"];
    assert_eq!((&fallback["from"], &fallback["code"]), (&json!("embedded"), &json!("kvm")));
    for field in ["why", "fix"] {
        assert!(fallback[field].as_str().is_some_and(|s| !s.is_empty()), "{fallback}");
    }

    // The same for people, with the host's own reason.
    let mut command = without_kvm(&["--memory-mib", "16", "--strategy", "declared"]).unwrap();
    let output = run_out(&mut command);
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    for part in [
        "kvm is missing",
        fallback["why"].as_str().unwrap(),
        fallback["fix"].as_str().unwrap(),
        "driver emulated: a software machine without KVM",
        "Protection is modelled",
        "4096 pages compared, 0 differ",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }

    // Who asks for KVM does not get something else.
    let mut command = without_kvm(&["--driver", "embedded", "--memory-mib", "16"]).unwrap();
    let output = run_out(&mut command);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{}", said(&output));
    assert!(error.contains("embedded") || error.contains("/dev/kvm"), "{error}");
}
