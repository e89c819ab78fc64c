//! One `mirrorvmd serve` process.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::{Value, json};

use crate::disk::SmallDisk;
use crate::http::{Reply, Request};
use crate::wait::{until, until_some};

/// Longest time to the `ready` line.
const READY: Duration = Duration::from_secs(60);
/// Longest time to the end of what is run from the command line.
const COMMAND: Duration = Duration::from_secs(120);

/// The daemon's binary: `MIRRORVMD`, or the one that the same cargo profile built.
///
/// # Panics
/// When there is none.
pub fn daemon_binary() -> PathBuf {
    let path = std::env::var_os("MIRRORVMD").map_or_else(
        || {
            let exe = std::env::current_exe().unwrap();
            exe.parent().and_then(Path::parent).unwrap().join("mirrorvmd")
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run `cargo build -p mirrorvmd` first", path.display());
    path
}

/// A daemon with its own state directory. Dropping it kills the process, removes the directory, and checks
/// that no child of it lives on.
pub struct Daemon {
    child: Option<Child>,
    /// What its state directory lies on. Unmounted before the directory is removed.
    disk: Option<SmallDisk>,
    dir: tempfile::TempDir,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    binary: PathBuf,
    /// Its name, also as a peer.
    pub name: String,
    /// What it said when it was ready.
    pub ready: String,
    /// Its pinned identity.
    pub identity: String,
    /// Where its peers connect.
    pub peer_address: String,
}

/// What a daemon holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// Open descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Of the descriptors, memory files.
    pub memfds: usize,
    /// Of the descriptors, KVM's.
    pub kvm: usize,
    /// Processes that run guests.
    pub children: usize,
}

/// Where definitions may name files of, unless a test says otherwise: the tests' own, and the Linux guest's.
fn image_directories() -> OsString {
    let tests = crate::repository().join("tests");
    let linux =
        std::env::var_os("MIRRORVM_GUEST_DIR").map_or_else(|| tests.join(".cache/guest"), PathBuf::from);
    // It may be filled later, by the first test that needs it.
    std::fs::create_dir_all(&linux).unwrap();
    let mut list = tests.join("guest").into_os_string();
    list.push(",");
    list.push(linux);
    list
}

impl Daemon {
    /// Starts one with a state directory of its own and waits until it is ready.
    pub fn start(name: &str) -> Self {
        Self::start_with(name, &[])
    }

    /// The same with environment variables, among them what its configuration reads; empty ones are not set.
    pub fn start_with(name: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_as(name, environment, |_| Vec::new())
    }

    /// The same with more arguments, which may name files in its directory.
    pub fn start_as(
        name: &str,
        environment: &[(&str, &str)],
        arguments: impl FnOnce(&Path) -> Vec<String>,
    ) -> Self {
        Self::launched(daemon_binary(), name, environment, arguments, None)
    }

    /// Starts one of another program, which takes the same command line.
    pub fn start_of(binary: &Path, name: &str) -> Self {
        Self::launched(binary.to_owned(), name, &[], |_| Vec::new(), None)
    }

    /// The same with its state directory on a file system of its own of `kib` KiB.
    ///
    /// # Panics
    /// When none [can be mounted](crate::can_mount).
    pub fn start_on_disk(name: &str, kib: u32, environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let arguments = |_: &Path| arguments.iter().map(|a| (*a).to_owned()).collect();
        Self::launched(daemon_binary(), name, environment, arguments, Some(kib))
    }

    fn launched(
        binary: PathBuf,
        name: &str,
        environment: &[(&str, &str)],
        arguments: impl FnOnce(&Path) -> Vec<String>,
        disk_kib: Option<u32>,
    ) -> Self {
        let dir = tempfile::Builder::new().prefix("mirrorvm-t").tempdir().unwrap();
        let mut daemon = Self {
            child: None,
            disk: disk_kib.map(|kib| SmallDisk::mount(&dir.path().join("state"), kib)),
            arguments: arguments(dir.path()),
            dir,
            binary,
            environment: environment.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect(),
            name: name.into(),
            ready: String::new(),
            identity: String::new(),
            peer_address: format!("{}:0", crate::own_address()),
        };
        daemon.launch();
        daemon
    }

    /// Starts it again on the same state directory and peer address.
    ///
    /// # Panics
    /// When it still runs.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        self.launch();
    }

    /// Starts it again where it must not start; gives what it said while it refused.
    ///
    /// # Panics
    /// When it still runs, or does start.
    pub fn restart_refused(&mut self) -> String {
        assert!(self.child.is_none(), "it runs");
        let before = self.log().len();
        let mut child = self.spawn();
        let ended = until_some("the end of a daemon that must not start", 60, || child.try_wait().unwrap());
        let said = self.log().split_off(before);
        assert!(!ended.success(), "it started; its log:\n{said}");
        said
    }

    /// Runs the program with these arguments, where no daemon runs; gives its exit code and what it said.
    pub fn command_line(&self, arguments: &[&str]) -> (i32, String, String) {
        let (out, err) = (self.dir.path().join("command.out"), self.dir.path().join("command.err"));
        let file = |path: &Path| std::fs::File::create(path).unwrap();
        let mut command = Command::new(&self.binary);
        let mut child = command.args(arguments).stdout(file(&out)).stderr(file(&err)).spawn().unwrap();
        let deadline = Instant::now() + COMMAND;
        let code = loop {
            match child.try_wait().unwrap() {
                Some(ended) => break ended.code().unwrap_or(-1),
                None if Instant::now() > deadline => {
                    let _ = (child.kill(), child.wait());
                    panic!("{arguments:?} does not end");
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let text = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
        (code, text(&out), text(&err))
    }

    fn launch(&mut self) {
        let mut child = self.spawn();
        let stdout = child.stdout.take().unwrap();
        self.child = Some(child);
        self.await_ready(stdout);
    }

    fn spawn(&self) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new(&self.binary);
        if !self.environment.iter().any(|(name, _)| name == "MIRRORVM_IMAGE_DIRECTORIES") {
            command.env("MIRRORVM_IMAGE_DIRECTORIES", image_directories());
        }
        if !self.environment.iter().any(|(name, _)| name == "MIRRORVM_PEER_LISTEN") {
            command.env("MIRRORVM_PEER_LISTEN", &self.peer_address);
        }
        command
            .args(["serve", "--name", &self.name])
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .args(&self.arguments)
            .env_remove("MIRRORVM_STATE_DIR")
            .envs(self.environment.iter().filter(|(_, value)| !value.is_empty()).cloned())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn await_ready(&mut self, stdout: ChildStdout) {
        let (sender, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = BufReader::new(stdout).read_line(&mut text);
            let _ = sender.send(text);
        });
        let line = line.recv_timeout(READY).unwrap_or_default();
        assert!(line.starts_with("ready "), "{} said {line:?}; its log:\n{}", self.name, self.log());
        let word = |start: &str| {
            let found = line.split_whitespace().find_map(|w| w.strip_prefix(start));
            found.unwrap_or_else(|| panic!("no {start} in {line:?}")).to_owned()
        };
        if self.arguments.is_empty() {
            assert_eq!(word("unix:"), self.socket().to_string_lossy());
        }
        self.ready = line.trim().to_owned();
        self.peer_address = word("peer:");
        let identity = word("identity:");
        if !self.identity.is_empty() && self.identity != identity {
            // Nothing but an empty state directory makes a daemon another host.
            let there = std::fs::read_dir(self.state_dir()).map(|d| d.flatten().map(|e| e.path()).collect());
            let there: Vec<PathBuf> = there.unwrap_or_default();
            panic!("{} was {} and is {identity}; its directory has {there:?}", self.name, self.identity);
        }
        self.identity = identity;
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// The file system that its state directory is on.
    ///
    /// # Panics
    /// When it has none of its own.
    pub fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().unwrap()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("state/mirrorvmd.sock")
    }

    /// The directory that all of it is in.
    pub fn directory(&self) -> &Path {
        self.dir.path()
    }

    /// The address after `start` in what it said when it was ready, as `tcp:`.
    ///
    /// # Panics
    /// When there is none.
    pub fn listens(&self, start: &str) -> String {
        let found = self.ready.split_whitespace().find_map(|w| w.strip_prefix(start));
        found.unwrap_or_else(|| panic!("no {start} in {:?}", self.ready)).to_owned()
    }

    /// Its state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The token that it wrote when it started.
    ///
    /// # Panics
    /// When there is none: it serves neither TCP nor TLS.
    pub fn admin_token(&self) -> String {
        std::fs::read_to_string(self.state_dir().join("admin.token")).unwrap().trim_end().to_owned()
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Kills it without warning.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Panics
    /// When it does not end within 40 seconds.
    pub fn terminate(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        until_some("the daemon's end after SIGTERM", 40, || child.try_wait().unwrap())
    }

    /// Sends any request.
    pub fn send(&self, request: &Request) -> Reply {
        request.send(&self.socket())
    }

    /// GET.
    pub fn get(&self, target: &str) -> Reply {
        self.send(&Request::new("GET", target))
    }

    /// GET of something that must be there.
    pub fn read(&self, target: &str) -> Value {
        self.get(target).expect(200).json()
    }

    /// POST with JSON.
    pub fn post(&self, target: &str, body: &Value) -> Reply {
        self.send(&Request::new("POST", target).json(body))
    }

    /// POST without a body.
    pub fn act(&self, target: &str) -> Reply {
        self.send(&Request::new("POST", target))
    }

    /// DELETE.
    pub fn delete(&self, target: &str) -> Reply {
        self.send(&Request::new("DELETE", target))
    }

    /// Items of a list.
    pub fn items(&self, target: &str) -> Vec<Value> {
        self.read(target)["items"].as_array().unwrap().clone()
    }

    /// Follows a resource by long polls until `good`.
    ///
    /// # Panics
    /// When it is not so within `seconds`.
    pub fn follow(&self, target: &str, seconds: u64, mut good: impl FnMut(&Value) -> bool) -> Value {
        let mut tag = String::new();
        let mut last = Value::Null;
        let what = format!("{target} of {} as wanted", self.name);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until_some(&what, seconds, || {
                let mut request = Request::new("GET", &format!("{target}?wait=2s"));
                if !tag.is_empty() {
                    request = request.header("if-none-match", &tag);
                }
                let reply = self.send(&request);
                if reply.status == 304 {
                    return None;
                }
                let reply = reply.expect(200);
                tag = reply.header("etag").unwrap().to_owned();
                last = reply.json();
                good(&last).then(|| last.clone())
            })
        }));
        found.unwrap_or_else(|_| panic!("{what}: it is {last}\nlog:\n{}", tail(&self.log())))
    }

    /// Waits for a guest's state.
    pub fn guest_in(&self, guest: &str, state: &str) -> Value {
        self.follow(&format!("/v1/guests/{guest}"), 60, |g| g["state"] == state)
    }

    /// Waits for a migration's end.
    pub fn migration_end(&self, id: &str) -> Value {
        self.follow(&format!("/v1/migrations/{id}"), 120, |m| crate::guest::is_terminal(&m["state"]))
    }

    /// Makes `other` known here under its name, at `address`.
    pub fn add_peer(&self, other: &Self, address: &str) {
        let body = json!({"name": other.name, "address": address, "identity": other.identity});
        let _ = self.post("/v1/hosts", &body).expect(201);
    }

    /// What it holds now.
    pub fn census(&self) -> Census {
        let pid = self.pid();
        let links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
            .map(|p| p.to_string_lossy().into_owned())
            .collect();
        Census {
            fds: links.len(),
            threads: std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(),
            memfds: links.iter().filter(|l| l.starts_with("/memfd:")).count(),
            kvm: links.iter().filter(|l| l.contains("kvm")).count(),
            children: children(pid).len(),
        }
    }

    /// Lets none of its files grow beyond `bytes`; `None` lifts the limit. With 0 its disk takes nothing.
    ///
    /// # Panics
    /// When the limit cannot be set.
    pub fn limit_files(&self, bytes: Option<u64>) {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Pid::from_raw(self.pid() as i32), Resource::Fsize, limit).unwrap();
    }

    /// Limits its address space to what it has now and `more` bytes; `None` lifts the limit.
    ///
    /// # Panics
    /// When the limit cannot be set.
    pub fn limit_memory(&self, more: Option<u64>) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let kib: u64 = status
            .lines()
            .find_map(|l| l.strip_prefix("VmSize:"))
            .and_then(|v| v.trim().trim_end_matches(" kB").parse().ok())
            .unwrap();
        let limit = Rlimit { current: more.map(|m| kib * 1024 + m), maximum: None };
        prlimit(Pid::from_raw(self.pid() as i32), Resource::As, limit).unwrap();
    }
}

/// Processes that run guests of the daemon `pid`: its children and those of its launcher, without the
/// launcher.
pub fn children(pid: u32) -> Vec<u32> {
    let launcher = launcher(pid);
    let all = offspring(pid).into_iter().chain(launcher.into_iter().flat_map(offspring));
    all.filter(|child| Some(*child) != launcher).collect()
}

/// The process that starts QEMUs for the daemon `pid`, where it has one.
pub fn launcher(pid: u32) -> Option<u32> {
    offspring(pid).into_iter().find(|child| {
        let line = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"qemu-launcher")
    })
}

/// Child processes of `pid` that are no zombies.
fn offspring(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let mut words = stat.rsplit(") ").next().unwrap_or("").split(' ');
        let (state, parent) = (words.next(), words.next());
        if state != Some("Z") && parent == Some(pid.to_string().as_str()) {
            found.push(child);
        }
    }
    found
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- end of {}'s log\n{}", self.name, tail(&self.log()));
        }
        let Some(mut child) = self.child.take() else { return };
        let family: Vec<u32> = children(child.id()).into_iter().chain(launcher(child.id())).collect();
        let _ = child.kill();
        let _ = child.wait();
        if !std::thread::panicking() {
            until("children of a killed daemon are gone", 10, || family.iter().all(|pid| !is_alive(*pid)));
        }
    }
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).is_some_and(|state| state != 'Z')
}
