//! What a daemon gives up, seen from outside: privileges and system calls of each of its threads, what the
//! process that starts QEMUs keeps, and where secrets are found in its memory.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use mirrorvm_tests::{
    Daemon, Request, children, embedded, kvm, launcher, linux_guest, migration, qemu_binary, until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// What a thread's status says, by the name of the line.
fn status(of: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(of.join("status")).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Every thread of a process, by its name; those that end meanwhile are left out.
fn threads(pid: u32) -> Vec<(String, BTreeMap<String, String>)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let all = tasks.map(|task| status(&task.unwrap().path()));
    all.filter(|s| s.contains_key("Name")).map(|s| (s["Name"].clone(), s)).collect()
}

fn bits(status: &BTreeMap<String, String>, line: &str) -> u64 {
    u64::from_str_radix(&status[line], 16).unwrap()
}

/// A set of capabilities by their names.
fn set(names: &[&str]) -> u64 {
    let number = |name: &str| match name {
        "CAP_KILL" => 5,
        "CAP_SETGID" => 6,
        "CAP_SETUID" => 7,
        "CAP_NET_BIND_SERVICE" => 10,
        "CAP_IPC_LOCK" => 14,
        "CAP_SYS_NICE" => 23,
        other => panic!("{other} is kept, and nobody said why"),
    };
    names.iter().fold(0, |all, name| all | 1 << number(name))
}

/// The state of one of the means; says loudly where this system has none.
fn in_force(confinement: &Value, what: &str) -> bool {
    let force = &confinement[what];
    match force["state"].as_str() {
        Some("enforced") => true,
        Some("partial" | "unavailable") if force["why"].is_string() => {
            println!("SKIPPED ({what}: {}): this part ran nothing", force["why"]);
            false
        }
        _ => panic!("{what}: {force}"),
    }
}

#[test]
fn every_thread_of_a_daemon_is_confined() {
    let d = Daemon::start("a");
    if kvm() {
        d.run_guest(&embedded("g1", 8, 1 << 20));
        let _ = d
            .post(
                "/v1/mirrors",
                &json!({"guest": "g1", "strategy": {"kind": "shifted", "shift": {"kind": "4gib"}}}),
            )
            .expect(201);
    }
    let confinement = d.read("/v1/host")["confinement"].clone();
    println!("{confinement}");
    assert_eq!(confinement["mode"], "enforce");
    let (filtered, reduced) = (in_force(&confinement, "seccomp"), in_force(&confinement, "capabilities"));
    let _ = in_force(&confinement, "landlock");
    let kept: Vec<&str> =
        confinement["capabilities_kept"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    assert!(!kept.contains(&"CAP_NET_BIND_SERVICE"), "it listens on no such port");
    let all = threads(d.pid());
    assert!(all.len() > 3, "{all:?}");
    for (name, status) in &all {
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        if filtered {
            assert_eq!(status["Seccomp"], "2", "{name}");
        }
        if reduced {
            for line in ["CapEff", "CapPrm"] {
                assert_eq!(bits(status, line), set(&kept), "{line} of {name}");
            }
            assert_eq!((bits(status, "CapInh"), bits(status, "CapAmb")), (0, 0), "{name}");
            assert_eq!(bits(status, "CapBnd") & !set(&["CAP_IPC_LOCK", "CAP_SYS_NICE"]), 0, "{name}");
        }
    }
    // What asks the process for something is handled by a thread of the runtime, whose handler may write.
    let asked = [Signal::TERM, Signal::INT, Signal::XFSZ].map(|s| 1u64 << (s.as_raw() - 1));
    let leaves = |of: &str| {
        let status = all.iter().find(|(name, _)| name.starts_with(of)).map(|(_, s)| bits(s, "SigBlk"));
        asked.map(|bit| status.unwrap_or_else(|| panic!("{of}: {all:?}")) & bit != 0)
    };
    assert_eq!(leaves("tokio"), [false; 3]);
    for narrow in ["ledger"].into_iter().chain(kvm().then_some("cpu0-g1")) {
        assert_eq!(leaves(narrow), [true; 3], "{narrow}");
    }
    if filtered {
        // Those with a narrow task have taken a list of their own on top.
        let filters = |of: &str| {
            let found =
                all.iter().find(|(name, _)| name.starts_with(of)).map(|(_, s)| s["Seccomp_filters"].clone());
            found.map(|n| n.parse::<u32>().unwrap())
        };
        let daemons = filters("tokio").unwrap();
        for narrow in ["ledger"].into_iter().chain(kvm().then_some("cpu0-g1")) {
            assert!(filters(narrow).is_some_and(|n| n > daemons), "{narrow}: {all:?}");
        }
    }
}

#[test]
fn a_daemon_says_what_it_is_confined_by_and_no_more() {
    for (how, expected, number) in [("none", "off", "0"), ("log", "logged", "2")] {
        let d = Daemon::start_with("a", &[("MIRRORVM_CONFINE", how)]);
        let confinement = d.read("/v1/host")["confinement"].clone();
        assert_eq!(confinement["mode"], how);
        if confinement["seccomp"]["state"] == "unavailable" {
            println!("SKIPPED (no seccomp here): this part ran nothing");
            continue;
        }
        assert_eq!(confinement["seccomp"]["state"], expected);
        for what in ["landlock", "capabilities"] {
            assert_eq!(confinement[what], json!({"state": "off", "why": null}), "{what}");
        }
        assert!(threads(d.pid()).iter().all(|(_, status)| status["Seccomp"] == number));
        assert!(d.log().contains("the daemon is not confined"), "{}", d.log());
        assert_eq!(launcher(d.pid()).is_some(), how == "log");
    }
}

/// A Linux in QEMU.
fn linux(name: &str) -> Value {
    let built = linux_guest();
    json!({
        "name": name,
        "driver": {"kind": "qemu", "vcpus": 1, "kernel": built.join("vmlinuz"), "initrd": built.join("initrd.gz"),
            "append": "console=ttyS0 no_timer_check panic=-1"},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 256 << 20, "gpa": 0}]},
    })
}

#[test]
fn the_process_that_starts_qemus_keeps_what_that_takes_and_ends_with_the_daemon() {
    let mut d = Daemon::start("a");
    let its = launcher(d.pid()).expect("a confined daemon has one");
    let proc = Path::new("/proc").join(its.to_string());
    let found = status(&proc);
    assert_eq!(found["NoNewPrivs"], "1");
    let kept = set(&["CAP_SETUID", "CAP_SETGID", "CAP_KILL"]);
    assert_eq!(bits(&found, "CapEff") & !kept, 0, "{}", found["CapEff"]);
    let open: Vec<_> = std::fs::read_dir(proc.join("fd")).unwrap().map(|e| e.unwrap().file_name()).collect();
    // Standard input is the socket, and is held once more while it is served.
    assert!(open.len() <= 4, "{open:?}");
    let environment = std::fs::read(proc.join("environ")).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("MIRRORVM"), "it needs none of the daemon's");
    d.kill();
    until("the launcher is gone", 10, || {
        !proc.join("status").exists() || status(&proc)["State"].starts_with('Z')
    });
}

#[test]
fn a_daemon_without_its_launcher_goes_on_and_says_why_it_starts_no_qemu() {
    if !kvm() || qemu_binary().is_none() {
        println!("SKIPPED (no KVM or no QEMU): this test ran nothing");
        return;
    }
    let d = Daemon::start("a");
    d.run_guest(&embedded("g1", 8, 0));
    d.run_guest(&linux("q1"));
    let [qemu] = children(d.pid())[..] else { panic!("one QEMU") };
    let gone = |pid: u32| {
        let status = status(&Path::new("/proc").join(pid.to_string()));
        status.get("State").is_none_or(|state| state.starts_with('Z'))
    };
    let its = launcher(d.pid()).unwrap();
    kill_process(Pid::from_raw(its as i32).unwrap(), Signal::KILL).unwrap();
    until("its QEMU is gone", 20, || gone(qemu));
    let end = d.guest_in("q1", "failed");
    assert!(end["error"]["detail"].as_str().unwrap().contains("QEMU"), "{end}");
    assert_eq!(d.guest_state("g1"), "running");
    let _ = d.post("/v1/guests", &linux("q2")).expect(201);
    let reply = d.act("/v1/guests/q2/start");
    let told =
        if reply.status == 202 { d.guest_in("q2", "failed")["error"].to_string() } else { reply.text() };
    assert!(told.contains("QEMU could not be started"), "{told}");
    assert_eq!(d.guest_state("g1"), "running");
}

/// A piece of a process's memory.
struct Piece {
    name: String,
    bytes: Vec<u8>,
    /// Whether a dump would contain it.
    dumped: bool,
}

/// Everything that a process can write to, as far as it can be read.
fn memory(pid: u32) -> Vec<Piece> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
    let (mut pieces, mut head) = (Vec::new(), None);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            head = Some((from, to, line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")));
        }
        let Some(flags) = line.strip_prefix("VmFlags: ") else { continue };
        let Some((from, to, name)) = head.take() else { continue };
        let flags: Vec<&str> = flags.split(' ').collect();
        if !flags.contains(&"wr") || flags.contains(&"io") {
            continue;
        }
        let mut bytes = Vec::new();
        let mut page = [0; 4096];
        for at in (from..to).step_by(4096) {
            // What was never touched, or went away meanwhile, holds nothing.
            let read = mem.read_exact_at(&mut page, at).is_ok();
            bytes.extend_from_slice(if read { &page } else { &[0; 4096] });
        }
        pieces.push(Piece { name, bytes, dumped: !flags.contains(&"dd") });
    }
    pieces
}

/// Where in memory that would be dumped `needle` is.
fn dumped(pieces: &[Piece], needle: &[u8]) -> Vec<String> {
    let holds = |piece: &&Piece| piece.dumped && piece.bytes.windows(needle.len()).any(|w| w == needle);
    pieces.iter().filter(holds).map(|piece| piece.name.clone()).collect()
}

/// The migration secrets of a daemon's guests, from where each helper reads its own.
fn migration_secrets(pieces: &[Piece]) -> Vec<[u8; 32]> {
    let pages = pieces.iter().flat_map(|piece| piece.bytes.chunks_exact(4096));
    let secret = |page: &[u8]| Some(*page.strip_prefix(b"mvmkey01")?.first_chunk::<32>()?);
    let mut found: Vec<_> = pages.filter_map(secret).filter(|s| *s != [0; 32]).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// A secret as it is in a message of JSON.
fn as_json(secret: &[u8]) -> Vec<u8> {
    serde_json::to_vec(secret).unwrap()
}

#[test]
fn a_canary_is_found_where_it_is_kept_and_nowhere_else() {
    if !kvm() {
        return;
    }
    let hurried = [("RUST_LOG", "trace"), ("MIRRORVM_LIMITS_REQUESTS_PER_SECOND", "0")];
    let start = |name| {
        Daemon::start_as(name, &hurried, |_| ["--listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec())
    };
    let (a, b) = (start("a"), start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    a.run_guest(&embedded("g1", 16, 1 << 20));
    let token = a.admin_token();
    let secret = token.trim().rsplit('_').next().unwrap().to_owned();
    let before = memory(a.pid());
    // What the daemon keeps of a token is its digest.
    assert_eq!(dumped(&before, secret.as_bytes()), [""; 0], "the admin token, which nobody has shown yet");
    let [canary] = migration_secrets(&before)[..] else { panic!("one guest, one secret") };

    // It is used: a migration there, and errors at every turn, with the token.
    let mut slow = migration("g1", "b", "precopy");
    slow["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20});
    let m = a.migrate(&slow);
    let path = format!("/v1/migrations/{m}");
    a.follow(&path, 60, |m| m["state"] == "precopy");
    // Little has been said since the message that it is in, so little lies over what is left of that.
    let message = as_json(&canary);
    for d in [&a, &b] {
        let meanwhile = memory(d.pid());
        for needle in [&canary[..], &message] {
            let found = dumped(&meanwhile, needle);
            assert!(found.is_empty(), "the migration secret would be in a dump of {}: {found:?}", d.name);
        }
    }
    let faster = json!({"limits": {"bandwidth_bytes_per_second": 1u64 << 40}});
    let patch = Request::new("PATCH", &path).header("content-type", "application/merge-patch+json");
    let _ = a.send(&patch.body(faster.to_string())).expect(200);
    assert_eq!(a.migration_end(&m)["state"], "succeeded");
    let bearer = format!("Bearer {}", token.trim());
    let mut answers = String::new();
    for (method, target, body) in [
        ("GET", "/v1/whoami", None),
        ("GET", "/v1/guests/none", None),
        ("GET", "/v1/guests/g1", None),
        ("GET", "/v1/events", None),
        ("GET", "/v1/audit-log", None),
        ("GET", "/metrics", None),
        (
            "POST",
            "/v1/migrations",
            Some(json!({"guest": "g1", "destination": {"kind": "peer", "peer": "none"}})),
        ),
        ("POST", "/v1/guests", Some(json!({"name": 7}))),
        ("POST", "/v1/tokens", Some(json!({"name": "x", "role": "none"}))),
    ] {
        let mut request = Request::new(method, target).header("authorization", &bearer);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let reply = request.send_tcp(&a.listens("tcp:"));
        answers.push_str(&format!("{:?}{}", reply.headers, reply.text()));
    }
    answers.push_str(&format!("{}{}", b.read("/v1/guests/g1"), b.read(&format!("/v1/migrations/{m}"))));

    let (there, here) = (memory(b.pid()), memory(a.pid()));
    let kept = |piece: &Piece| !piece.dumped && piece.bytes.windows(32).any(|w| w == canary);
    assert!(there.iter().any(kept), "it went with the guest, to where no dump has it");
    for (host, pieces) in [("the source", &here), ("the destination", &there)] {
        for needle in [&canary[..], &message] {
            let found = dumped(pieces, needle);
            assert!(found.is_empty(), "the migration secret would be in a dump of {host}: {found:?}");
        }
    }
    // Callers have gone, and what their heads were read into has been freed.
    until("a token that was shown is in no dump", 20, || {
        dumped(&memory(a.pid()), secret.as_bytes()).is_empty()
    });
    let hex: String = canary.iter().map(|byte| format!("{byte:02x}")).collect();
    let proc = |d: &Daemon, name: &str| {
        String::from_utf8_lossy(&std::fs::read(format!("/proc/{}/{name}", d.pid())).unwrap()).into_owned()
    };
    for d in [&a, &b] {
        let places = [
            ("its log", d.log()),
            ("its environment", proc(d, "environ")),
            ("its command line", proc(d, "cmdline")),
            ("the names of its memory", proc(d, "maps")),
        ];
        for (place, text) in places.iter().chain([&("answers", answers.clone())]) {
            for canary in [&secret, &hex, &String::from_utf8(as_json(&canary)).unwrap()] {
                assert!(!text.contains(canary.as_str()), "{canary:.8}... is in {place} of {}", d.name);
            }
        }
        // On disk there is the token's own file, and no migration secret at all.
        let mut left = vec![d.state_dir()];
        while let Some(at) = left.pop() {
            if at.is_dir() {
                left.extend(std::fs::read_dir(at).unwrap().map(|e| e.unwrap().path()));
                continue;
            }
            let Ok(bytes) = std::fs::read(&at) else { continue };
            let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
            assert!(!holds(&canary) && !holds(&as_json(&canary)), "{}", at.display());
            assert!(!holds(secret.as_bytes()) || at.ends_with("admin.token"), "{}", at.display());
        }
    }
}
