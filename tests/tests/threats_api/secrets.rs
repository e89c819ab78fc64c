//! Row 58: secrets in logs, answers, metrics, environments and cores.

use super::*;

#[test]
fn row_58_secrets_are_in_no_log_answer_metric_or_environment() {
    let d = Daemon::start_with("a", &[("RUST_LOG", "trace"), HURRIED]);
    let _ = d.post("/v1/guests", &embedded("g1", 8, 0)).expect(201);
    let admin = token(&d, "admin");
    let identity = format!("sha256:{}", "5a".repeat(32));
    let leave = json!({"source": {"name": "x", "identity": identity}});
    let ticket =
        d.post("/v1/incoming-migrations", &leave).expect(201).json()["ticket"].as_str().unwrap().to_owned();
    let key = std::fs::read_to_string(d.state_dir().join("identity/host-key.pem")).unwrap();
    let key: Vec<&str> = key.lines().filter(|l| !l.starts_with("-----")).collect();
    let canary = "canary-3f1c9d0b7a";
    let canaries = [admin.as_str(), admin.rsplit('_').next().unwrap(), &ticket, key[0], canary];
    let mut answers = String::new();
    let mut send = |request: Request| {
        let reply = d.send(&request);
        answers.push_str(&format!("{:?}{}", reply.headers, reply.text()));
        reply.status
    };
    assert_eq!(send(bearing(Request::new("GET", "/v1/whoami"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/tokens"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/audit-log"), &admin)), 200);
    assert_eq!(send(bearing(Request::new("GET", "/v1/guests/none"), &admin)), 404);
    // Wrong credentials and secrets in the wrong place are not told back.
    for wrong in [
        format!("Bearer {canary}"),
        format!("Basic {canary}"),
        canary.to_owned(),
        format!("Bearer mvm_{canary}_x"),
    ] {
        assert_eq!(send(Request::new("GET", "/v1/whoami").header("authorization", &wrong)), 401, "{wrong}");
    }
    let body = json!({"guest": "g1", "destination": {"kind": "ticket", "ticket": format!("mvmt1.{canary}")}});
    assert_eq!(send(Request::new("POST", "/v1/migrations").json(&body)), 422);
    let spent = json!({"guest": "g1", "destination": {"kind": "ticket", "ticket": ticket}});
    assert!(send(Request::new("POST", "/v1/migrations").json(&spent)) >= 400);
    assert_eq!(send(Request::new("GET", "/metrics")), 200);
    assert_eq!(send(Request::new("GET", "/v1/events")), 200);
    let log = d.log();
    assert!(log.contains("DEBUG"), "the log says all that it has");
    let proc = |name: &str| std::fs::read(format!("/proc/{}/{name}", d.pid())).unwrap();
    let environ = String::from_utf8_lossy(&proc("environ")).into_owned();
    assert!(environ.contains("RUST_LOG=trace"), "it is the daemon's environment");
    let cmdline = String::from_utf8_lossy(&proc("cmdline")).into_owned();
    for secret in canaries {
        for (place, text) in
            [("log", &log), ("answers", &answers), ("environment", &environ), ("command line", &cmdline)]
        {
            assert!(!text.contains(secret), "{secret:.12}... is in the {place}");
        }
    }
}

#[test]
fn row_58_the_daemon_and_its_children_dump_no_core() {
    let d = Daemon::start("a");
    let dumps_nothing = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"], "{line}");
        // Where dumps are piped to a program the limit does not count, and this does.
        match std::fs::read_to_string(format!("/proc/{pid}/coredump_filter")) {
            Ok(filter) => assert_eq!(u64::from_str_radix(filter.trim(), 16), Ok(0), "{filter}"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::NotFound),
        }
    };
    dumps_nothing(d.pid());
    if mirrorvm_tests::qemu_binary().is_none() || !kvm() {
        println!("SKIPPED (no QEMU): core dumps of children");
        return;
    }
    let linux = mirrorvm_tests::linux_guest();
    let guest = json!({
        "name": "q1",
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": linux.join("vmlinuz"), "initrd": linux.join("initrd.gz")},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256 << 20, "gpa": 0}]},
    });
    let _ = d.post("/v1/guests", &guest).expect(201);
    let _ = d.act("/v1/guests/q1/start").expect(202);
    d.guest_in("q1", "running");
    let children = mirrorvm_tests::children(d.pid());
    assert!(!children.is_empty());
    children.into_iter().for_each(dumps_nothing);
}
