//! Guests, and two daemons that know each other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::proxy::Proxy;
use crate::wait::{until, until_some};

/// Whether `/dev/kvm` is there.
pub fn has_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

/// Whether `/dev/kvm` is there; says so loudly when not, in a line that the test runner counts.
pub fn kvm() -> bool {
    let there = has_kvm();
    if !there {
        println!("SKIPPED (no /dev/kvm): this test ran nothing");
    }
    there
}

/// QEMU on the PATH.
pub fn qemu_binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join("qemu-system-x86_64")).find(|p| p.is_file())
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Directory with the Linux guest's `vmlinuz` and `initrd.gz`, built when they are not there.
///
/// # Panics
/// When they cannot be built.
pub fn linux_guest() -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let tests = repository().join("tests");
    let out =
        std::env::var_os("MIRRORVM_GUEST_DIR").map_or_else(|| tests.join(".cache/guest"), PathBuf::from);
    if !(out.join("vmlinuz").is_file() && out.join("initrd.gz").is_file()) {
        let built = Command::new(tests.join("guest/build-linux-guest")).arg(&out).status().unwrap();
        assert!(built.success(), "the Linux guest could not be built");
    }
    out
}

/// Definition of a workload guest.
pub fn embedded(name: &str, mib: u64, dirty_bytes_per_second: u64) -> Value {
    json!({
        "name": name,
        "driver": {"kind": "embedded", "vcpus": 1, "workload": {
            "fill": "random", "working_set_bytes": 4 << 20, "dirty_bytes_per_second": dirty_bytes_per_second}},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": mib << 20, "gpa": 0}]},
    })
}

/// The same guest on the software machine, which every host has; `sev` as a definition has it, null: its
/// memory is not encrypted.
pub fn emulated(name: &str, mib: u64, dirty_bytes_per_second: u64, sev: &Value) -> Value {
    let mut body = embedded(name, mib, dirty_bytes_per_second);
    body["driver"]["kind"] = json!("emulated");
    body["driver"]["sev"] = sev.clone();
    body
}

/// A migration to the host `to`.
pub fn migration(guest: &str, to: &str, mode: &str) -> Value {
    json!({"guest": guest, "destination": {"kind": "host", "host": to}, "mode": mode, "verify": true})
}

/// Whether a migration's state is an end.
pub fn is_terminal(state: &Value) -> bool {
    ["succeeded", "failed", "canceled"].iter().any(|s| state == s)
}

/// What a workload guest's console said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// The tick.
    pub number: u64,
    /// Pages that the guest found changed behind its back.
    pub errors: u64,
}

impl Daemon {
    /// The end of a guest's console.
    pub fn console_tail(&self, guest: &str, bytes: u64) -> String {
        let end =
            self.read(&format!("/v1/guests/{guest}/console?max_bytes=1"))["end_offset"].as_u64().unwrap();
        let from = end.saturating_sub(bytes);
        let chunk =
            self.read(&format!("/v1/guests/{guest}/console?offset={from}&max_bytes={}", bytes + 65536));
        chunk["data"].as_str().unwrap().to_owned()
    }

    /// The last tick of a workload guest.
    pub fn ticks(&self, guest: &str) -> Option<Ticks> {
        let text = self.console_tail(guest, 2000);
        let complete = &text[..text.rfind('\n')?];
        let line = complete.lines().rfind(|l| l.starts_with("tick "))?;
        let n: Vec<u64> = line.split(' ').filter_map(|w| w.trim().parse().ok()).collect();
        (n.len() == 3).then(|| Ticks { number: n[0], errors: n[2] })
    }

    /// Waits until a workload guest ticks beyond `number`; checks that it found no page changed.
    ///
    /// # Panics
    /// When it does not tick on.
    pub fn ticks_beyond(&self, guest: &str, number: u64) -> Ticks {
        let what = format!("{guest} at {} ticks beyond {number}", self.name);
        let ticks = until_some(&what, 60, || self.ticks(guest).filter(|t| t.number > number));
        assert_eq!(ticks.errors, 0, "the guest found pages changed");
        ticks
    }

    /// Waits until a guest ticks on from where it is.
    pub fn ticks_on(&self, guest: &str) -> Ticks {
        let now = self.ticks(guest).map_or(0, |t| t.number);
        self.ticks_beyond(guest, now + 1)
    }

    /// Defines and starts a guest and waits until it runs; a workload guest, until it ticks.
    pub fn run_guest(&self, definition: &Value) -> String {
        let id = self.post("/v1/guests", definition).expect(201).json()["id"].as_str().unwrap().to_owned();
        let name = definition["name"].as_str().unwrap();
        let _ = self.act(&format!("/v1/guests/{name}/start")).expect(202);
        self.guest_in(name, "running");
        if definition["driver"]["kind"] == "embedded" {
            self.ticks_beyond(name, 2);
        }
        id
    }

    /// Starts a migration; gives its id.
    pub fn migrate(&self, body: &Value) -> String {
        self.post("/v1/migrations", body).expect(201).json()["id"].as_str().unwrap().to_owned()
    }

    /// A guest's state here; `absent` when there is none.
    pub fn guest_state(&self, guest: &str) -> String {
        let reply = self.get(&format!("/v1/guests/{guest}"));
        match reply.status {
            404 => "absent".into(),
            _ => reply.expect(200).json()["state"].as_str().unwrap().to_owned(),
        }
    }

    /// Waits until nothing of a guest that did not arrive is left here: no guest that is not where it was
    /// before, no migration going on, no memory, no KVM descriptor but the daemon's own.
    pub fn nothing_of(&self, guest: &str) {
        until(&format!("{} has nothing of {guest}", self.name), 40, || {
            let census = self.census();
            let idle = self.items("/v1/migrations").iter().all(|m| is_terminal(&m["state"]));
            let state = self.guest_state(guest);
            let gone = match state.as_str() {
                "absent" => true,
                "stopped" => !self.read(&format!("/v1/guests/{guest}"))["moved_to"].is_null(),
                _ => false,
            };
            gone && idle && census.memfds == 0 && census.kvm <= 1 && census.children == 0
        });
    }
}

/// Two daemons, `a` and `b`, that know each other and have nothing between them.
pub fn two_daemons() -> (Daemon, Daemon) {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    (a, b)
}

/// Two daemons that know each other; each reaches the other through a proxy of its own.
pub struct Pair {
    /// The first.
    pub a: Daemon,
    /// The second.
    pub b: Daemon,
    /// From `a` to `b`.
    pub to_b: Proxy,
    /// From `b` to `a`.
    pub to_a: Proxy,
}

impl Pair {
    /// Starts them.
    pub fn start() -> Self {
        let (a, b) = (Daemon::start("a"), Daemon::start("b"));
        let (to_b, to_a) = (Proxy::to(&b.peer_address), Proxy::to(&a.peer_address));
        a.add_peer(&b, &to_b.address());
        b.add_peer(&a, &to_a.address());
        Self { a, b, to_b, to_a }
    }
}
