//! The API's speed against libvirt's, in the same run: one guest read, a thousand listed, durable definitions.
//!
//! libvirt answers from its test driver, which runs no guests: the comparison is of RPC and bookkeeping on both sides. It
//! is driven by its own Python binding, as its users do; without libvirtd or the binding those rows are left out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{BenchArgs, BenchError, Row};

/// Guests of the list.
const GUESTS: usize = 1000;
/// Reads of one run.
const READS: usize = 2000;
/// Clients that define at once, and what each defines.
const CLIENTS: usize = 32;
const EACH: usize = 16;

/// A daemon on a state directory of its own; ends with this value.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start() -> Result<Self, BenchError> {
        let dir = tempfile::tempdir()?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", "--name", "bench", "--exit-with-stdin", "--state-dir"])
            .arg(dir.path().join("state"))
            .env("RUST_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
        if !line.starts_with("ready ") {
            return Err("the daemon does not start".into());
        }
        Ok(Self { child, dir })
    }

    fn connect(&self) -> Result<Client, BenchError> {
        Client::connect(&self.dir.path().join("state/mirrorvmd.sock"))
    }
}

/// HTTP/1.1 over one kept connection, as small as it can be.
struct Client {
    stream: BufReader<UnixStream>,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(socket: &Path) -> Result<Self, BenchError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { stream: BufReader::new(stream), buffer: Vec::new() })
    }

    /// One request; gives status and length of the body.
    fn call(&mut self, method: &str, path: &str, body: &str) -> Result<(u16, usize), BenchError> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(head.as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or("no status")?;
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let header = line.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        self.buffer.resize(length, 0);
        self.stream.read_exact(&mut self.buffer)?;
        Ok((status, length))
    }
}

fn definition(name: &str) -> String {
    serde_json::json!({
        "name": name,
        "driver": {"kind": "embedded", "vcpus": 1},
        "memory": {"blocks": [{"name": "ram0", "size_bytes": 8 << 20, "gpa": 0}]},
    })
    .to_string()
}

fn define(client: &mut Client, name: &str) -> Result<(), BenchError> {
    match client.call("POST", "/v1/guests", &definition(name))? {
        (201, _) => Ok(()),
        (status, _) => Err(format!("defining {name} was answered {status}").into()),
    }
}

/// The median of `n` timings, microseconds.
fn median(n: usize, mut once: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let mut times = Vec::with_capacity(n);
    for _ in 0..n {
        let begun = Instant::now();
        once()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[n / 2])
}

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let daemon = Daemon::start()?;
    let mut rates = Vec::new();
    for run in 0..args.runs {
        rates.push(concurrent(&daemon, run)?);
    }
    let mut client = daemon.connect()?;
    let there = args.runs as usize * CLIENTS * EACH;
    for n in there..GUESTS {
        define(&mut client, &format!("g{n}"))?;
    }
    let libvirt = Libvirt::start();
    let (mut ours, mut theirs, mut list, mut their_list) = (vec![], vec![], vec![], vec![]);
    for _ in 0..args.runs {
        ours.push(median(READS, || expect(client.call("GET", "/v1/guests/r0-0-0", "")?))?);
        list.push(median(20, || expect(client.call("GET", "/v1/guests?limit=1000", "")?))? / 1e3);
        if let Ok(libvirt) = &libvirt {
            let (info, domains) = libvirt.once()?;
            theirs.push(info);
            their_list.push(domains);
        }
    }
    let ratio = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>();
    let mut rows = vec![
        Row::new("GET one guest over the Unix socket, p50", "us", ours.clone()),
        Row::new("GET a list of 1,000 guests", "ms", list.clone()),
        Row::new("durable definitions, 32 clients at once", "1/s", rates),
    ];
    match libvirt {
        Ok(_) => rows.extend([
            Row::new("libvirt: virDomainGetInfo, test driver, p50", "us", theirs.clone()),
            Row::new("libvirt: listing 1,000 domains", "ms", their_list.clone()),
            Row::new("one guest: ours / libvirt", "ratio", ratio(&ours, &theirs)),
            Row::new("list: ours / libvirt", "ratio", ratio(&list, &their_list)),
        ]),
        Err(why) => eprintln!("SKIPPED ({why}): the comparison with libvirt"),
    }
    Ok(rows)
}

fn expect((status, length): (u16, usize)) -> Result<(), BenchError> {
    if status == 200 && length > 0 { Ok(()) } else { Err(format!("answered {status}").into()) }
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

/// A libvirtd of our own with its test driver, and 1,000 domains in it.
struct Libvirt {
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
info = median(2000, d.info) * 1e6
domains = median(20, c.listAllDomains) * 1e3
assert len(c.listAllDomains()) >= 1000
print(info, domains)
"#;

impl Libvirt {
    fn start() -> Result<Self, BenchError> {
        let binding =
            Command::new("/usr/bin/python3").args(["-c", "import libvirt"]).stderr(Stdio::null()).status();
        if !binding.is_ok_and(|s| s.success()) {
            return Err("no python3-libvirt".into());
        }
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nlog_outputs = \"4:stderr\"\n",
            at("")
        );
        std::fs::write(dir.path().join("libvirtd.conf"), config)?;
        let daemon = Command::new("/usr/sbin/libvirtd")
            .args(["--config", &at("libvirtd.conf"), "--pid-file", &at("pid")])
            .env("HOME", dir.path())
            .env("XDG_RUNTIME_DIR", dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|_| "no libvirtd")?;
        let libvirt = Self { daemon, dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !libvirt.socket().exists() {
            if Instant::now() > deadline {
                return Err("libvirtd does not start".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        libvirt.once().map_err(|e| format!("libvirt's test driver does not answer: {e}"))?;
        Ok(libvirt)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("libvirt-sock")
    }

    /// p50 of one domain's info in microseconds and of listing all in milliseconds.
    fn once(&self) -> Result<(f64, f64), BenchError> {
        let output = Command::new("/usr/bin/python3").args(["-c", SCRIPT]).arg(self.socket()).output()?;
        let text = String::from_utf8(output.stdout)?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        match numbers.as_slice() {
            [info, domains] => Ok((*info, *domains)),
            _ => Err(String::from_utf8_lossy(&output.stderr)
                .lines()
                .last()
                .unwrap_or("no answer")
                .to_owned()
                .into()),
        }
    }
}
