//! The API's speed against libvirt's, in the same run: one guest read, a thousand listed, durable
//! definitions.
//!
//! libvirt answers from its test driver, which runs no guests: the comparison is of RPC and bookkeeping on
//! both sides. It is driven by its own Python binding, as its users do; without libvirtd or the binding those
//! rows are left out.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mirrorvm_client::blocking::Connection;
use mirrorvm_client::{Request, Response};
use serde_json::{Value, json};

use super::daemon::{Daemon, connect};
use super::{BenchArgs, BenchError, Found, Row, Target, ratios};

/// The daemon that is compared with.
pub(super) const LIBVIRTD: &str = "/usr/sbin/libvirtd";
/// How long it may take to make its socket; a busy machine is slow, and one that fails to start ends.
const START: Duration = Duration::from_secs(120);
/// Guests of the list.
const GUESTS: usize = 1000;
/// Reads of one run.
const READS: usize = 2000;
/// Clients that define at once, and what each defines.
const CLIENTS: usize = 32;
const EACH: usize = 16;

fn definition(name: &str) -> Value {
    json!({
        "name": name,
        "driver": {"kind": "embedded", "vcpus": 1},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 8 << 20, "gpa": 0}]},
    })
}

pub(super) fn define(connection: &mut Connection, name: &str) -> Result<(), BenchError> {
    let defined = connection.send(&Request::post("/v1/guests").json(&definition(name)));
    defined.map(drop).map_err(|e| format!("defining {name}: {e}").into())
}

/// The median of `n` timings, microseconds.
pub(super) fn median(n: usize, mut once: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let mut times = Vec::with_capacity(n);
    for _ in 0..n {
        let begun = Instant::now();
        once()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[n / 2])
}

pub(super) fn measure(args: &BenchArgs) -> Result<Found, BenchError> {
    let reads = if args.smoke { 100 } else { READS };
    let daemon = Daemon::start("bench")?;
    // The lists are to have as many entries as libvirt's, so these go to a daemon of their own.
    let other = Daemon::start("definitions")?;
    let mut rates = Vec::new();
    for run in 0..args.runs() {
        rates.push(concurrent(&other, run)?);
    }
    drop(other);
    // Before our own client connects: its start takes longer than a daemon waits for an idle one.
    let libvirt = Libvirt::start();
    let mut client = daemon.connect()?;
    for n in 0..GUESTS {
        define(&mut client, &format!("g{n}"))?;
    }
    let (one, all) = (Request::get("/v1/guests/g500"), Request::get(LIST));
    // What a socket and two threads cost without any server: the same client, as many bytes each way.
    let length = expect(&client.exchange(&one)?)?;
    let floor_dir = tempfile::tempdir()?;
    let mut echo = echo(&floor_dir.path().join("echo"), length)?;
    let (mut ours, mut theirs, mut list, mut their_list, mut floor) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..args.runs() {
        // What libvirt did meanwhile may have taken longer than that, too.
        client = daemon.connect()?;
        expect(&client.exchange(&one)?)?;
        floor.push(median(reads, || expect(&echo.exchange(&one)?).map(drop))?);
        ours.push(median(reads, || expect(&client.exchange(&one)?).map(drop))?);
        list.push(median(reads / 100, || expect(&client.exchange(&all)?).map(drop))? / 1e3);
        if let Ok(libvirt) = &libvirt {
            let (info, domains) = libvirt.once(reads)?;
            theirs.push(info);
            their_list.push(domains);
        }
    }
    let mut found = Found::from(vec![
        Row::new("GET one guest over the Unix socket, p50", "us", ours.clone()),
        Row::new("the same bytes from a thread that only echoes, p50", "us", floor.clone()),
        Row::new("one guest / echo", "ratio", ratios(&ours, &floor)),
        Row::new("GET a list of 1,000 guests", "ms", list.clone()),
        Row::new("durable definitions, 32 clients at once", "1/s", rates),
    ]);
    match libvirt {
        Ok(_) => found.rows.extend([
            Row::new("libvirt: virDomainGetInfo, test driver, p50", "us", theirs.clone()),
            Row::new("libvirt: listing 1,000 domains", "ms", their_list.clone()),
            Row::new("one guest: ours / libvirt", "ratio", ratios(&ours, &theirs))
                .promised(Target::AtMost(0.333)),
            Row::new("list: ours / libvirt", "ratio", ratios(&list, &their_list))
                .promised(Target::AtMost(1.0)),
        ]),
        Err(why) => found.skipped.push(format!("the comparison with libvirt: {why}")),
    }
    Ok(found)
}

/// The list that is read.
const LIST: &str = "/v1/guests?limit=1000";

/// A client of a thread that answers every request with as many bytes as an answer of ours has.
fn echo(socket: &std::path::Path, body: usize) -> Result<Connection, BenchError> {
    let listener = UnixListener::bind(socket)?;
    std::thread::Builder::new().name("echo".into()).spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        // Headers of ours are about as long.
        let answer = format!(
            "HTTP/1.1 200 OK\r\nx-pad: {}\r\ncontent-length: {body}\r\n\r\n{}",
            "x".repeat(250),
            "x".repeat(body)
        );
        let mut request = [0; 4096];
        // Requests of one client come one by one and in one piece.
        while stream.read(&mut request).is_ok_and(|n| n > 0) && stream.write_all(answer.as_bytes()).is_ok() {}
    })?;
    connect(socket)
}

/// Bytes of the body of an answer that must be good.
pub(super) fn expect(answer: &Response) -> Result<usize, BenchError> {
    match answer.body().len() {
        length if answer.status() == 200 && length > 0 => Ok(length),
        _ => Err(format!("answered {}", answer.status()).into()),
    }
}

/// Definitions per second, each on disk before it is answered.
fn concurrent(daemon: &Daemon, run: u32) -> Result<f64, BenchError> {
    let mut clients = (0..CLIENTS).map(|_| daemon.connect()).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    std::thread::scope(|s| {
        let threads: Vec<_> = clients
            .iter_mut()
            .enumerate()
            .map(|(c, client)| {
                s.spawn(move || (0..EACH).try_for_each(|n| define(client, &format!("r{run}-{c}-{n}"))))
            })
            .collect();
        threads.into_iter().try_for_each(|t| t.join().map_err(|_| "a client panicked")?)
    })?;
    Ok((CLIENTS * EACH) as f64 / begun.elapsed().as_secs_f64())
}

/// A libvirtd of our own with its test driver, and the domains that were defined in it.
pub(super) struct Libvirt {
    daemon: Child,
    dir: tempfile::TempDir,
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Defines the domains where they are missing, and measures.
const SCRIPT: &str = r#"
import sys, time, libvirt
libvirt.registerErrorHandler(lambda *a: None, None)
c = libvirt.open("test+unix:///default?socket=" + sys.argv[1])
have = {d.name() for d in c.listAllDomains()}
for n in range(1000 - len(have)):
    c.defineXML(f"<domain type='test'><name>g{n}</name><memory>8192</memory><os><type>hvm</type></os></domain>")
d = c.lookupByName("test")
def median(n, call):
    times = []
    for _ in range(n):
        begun = time.perf_counter(); call(); times.append(time.perf_counter() - begun)
    return sorted(times)[n // 2]
n = int(sys.argv[2])
info = median(n, d.info) * 1e6
domains = median(n // 100, c.listAllDomains) * 1e3
assert len(c.listAllDomains()) >= 1000
print(info, domains)
"#;

/// The same for as many domains as there are to be; definitions over a connection for each thread. The
/// binding lets other threads run while it waits for the daemon.
const MANY: &str = r#"
import sys, time, threading, libvirt
libvirt.registerErrorHandler(lambda *a: None, None)
uri = "test+unix:///default?socket=" + sys.argv[1]
n, count, clients = (int(a) for a in sys.argv[2:5])
c = libvirt.open(uri)
have = len(c.listAllDomains())
def work(k, connection):
    for n in range(have + k, count, clients):
        connection.defineXML(f"<domain type='test'><name>m{n}</name><memory>8192</memory><os><type>hvm</type></os></domain>")
if have < count:
    threads = [threading.Thread(target=work, args=(k, libvirt.open(uri))) for k in range(clients)]
    begun = time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    rate = (count - have) / (time.perf_counter() - begun)
d = c.lookupByName("test")
def median(n, call):
    times = []
    for _ in range(n):
        begun = time.perf_counter(); call(); times.append(time.perf_counter() - begun)
    return sorted(times)[n // 2]
print(median(n, d.info) * 1e6, median(max(n // 50, 1), c.listAllDomains) * 1e3, *([rate] if have < count else []))
assert len(c.listAllDomains()) >= count
"#;

/// What libvirt does with many domains.
pub(super) struct Many {
    /// p50 of one domain's info, microseconds.
    pub info_us: f64,
    /// p50 of listing all, milliseconds.
    pub list_ms: f64,
    /// Definitions per second, where some were missing.
    pub defined_per_second: Option<f64>,
}

impl Libvirt {
    pub(super) fn start() -> Result<Self, BenchError> {
        let binding =
            Command::new("/usr/bin/python3").args(["-c", "import libvirt"]).stderr(Stdio::null()).status();
        if !binding.is_ok_and(|s| s.success()) {
            return Err("no python3-libvirt".into());
        }
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        // The test driver is part of the library. The drivers that libvirtd loads are for real guests: run by
        // root it ends where one of them lacks its user or its network, and they would touch this machine's
        // own. It looks for them in a directory that has none.
        std::fs::create_dir(at("drivers"))?;
        let config = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nlog_outputs = \"4:stderr\"\n",
            at("")
        );
        std::fs::write(dir.path().join("libvirtd.conf"), config)?;
        let daemon = Command::new(LIBVIRTD)
            .args(["--config", &at("libvirtd.conf"), "--pid-file", &at("pid")])
            .env("HOME", dir.path())
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("LIBVIRT_DRIVER_DIR", at("drivers"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(at("log"))?)
            .spawn()
            .map_err(|_| "no libvirtd")?;
        let mut libvirt = Self { daemon, dir };
        let deadline = Instant::now() + START;
        while !libvirt.socket().exists() {
            if let Some(ended) = libvirt.daemon.try_wait()? {
                return Err(format!("libvirtd ended with {ended}, saying {:?}", libvirt.said_last()).into());
            }
            if Instant::now() > deadline {
                let said = libvirt.said_last();
                return Err(
                    format!("libvirtd made no socket in {} s, saying {said:?}", START.as_secs()).into()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        libvirt.once(100).map_err(|e| format!("libvirt's test driver does not answer: {e}"))?;
        Ok(libvirt)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("libvirt-sock")
    }

    /// The last line of its log.
    fn said_last(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        log.lines().last().unwrap_or("nothing").to_owned()
    }

    /// p50 of one domain's info in microseconds and of listing all in milliseconds.
    fn once(&self, reads: usize) -> Result<(f64, f64), BenchError> {
        match self.run(SCRIPT, &[reads])?.as_slice() {
            [info, domains] => Ok((*info, *domains)),
            found => Err(format!("two numbers were wanted, not {found:?}").into()),
        }
    }

    /// The same with `count` domains, defined by `clients` at once where they are missing.
    pub(super) fn many(&self, reads: usize, count: usize, clients: usize) -> Result<Many, BenchError> {
        match self.run(MANY, &[reads, count, clients])?.as_slice() {
            [info_us, list_ms] => Ok(Many { info_us: *info_us, list_ms: *list_ms, defined_per_second: None }),
            [info_us, list_ms, rate] => {
                Ok(Many { info_us: *info_us, list_ms: *list_ms, defined_per_second: Some(*rate) })
            }
            found => Err(format!("two or three numbers were wanted, not {found:?}").into()),
        }
    }

    /// The numbers that a script prints.
    fn run(&self, script: &str, numbers: &[usize]) -> Result<Vec<f64>, BenchError> {
        let output = Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(self.socket())
            .args(numbers.iter().map(usize::to_string))
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        if output.status.success() && !numbers.is_empty() {
            return Ok(numbers);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(said.lines().last().unwrap_or("no answer").to_owned().into())
    }
}
