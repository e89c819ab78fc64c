//! The Debian guest: found or built, its disk copied, what it counts read from wherever it counts.
//!
//! Owns: the disk that `tests/guest/build-debian-guest` makes, and the layout that this script gives it. Must
//! not know: how a guest is defined or started; whoever boots the disk does.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::Duration;

use crate::guest::{qemu_binary, repository};

/// The port on which the guest serves HTTP.
pub const PORT: u16 = 8080;

/// Where the root file system starts on the disk, in bytes: after the table's MiB and the EFI system
/// partition.
const ROOT_OFFSET: u64 = 65 << 20;

/// The guest's counter file.
const LOG: &str = "/var/lib/tick/log";

/// How long a request of the guest may take, under emulation and beside other tests.
const PATIENCE: Duration = Duration::from_secs(10);

/// No answer of the guest's is longer, in bytes.
const LONGEST: u64 = 16 << 20;

/// The Debian guest's disk, `disk.qcow2`, built when it is not there. It is what an installer would leave:
/// never booted. Tests boot overlays of it ([`Disk::over`]).
///
/// # Panics
/// When it cannot be built: not as root, or with packages missing. [`has_debian_guest`] tells before.
pub fn debian_guest() -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let disk = directory().join("disk.qcow2");
    if !disk.is_file() {
        let script = repository().join("tests/guest/build-debian-guest");
        let built = Command::new(script).arg(directory()).status().unwrap();
        assert!(built.success(), "the Debian guest could not be built");
    }
    disk
}

/// Whether the Debian guest is there or can be built, and QEMU and `qemu-img` with it; says so loudly when
/// not, in a line that the test runner counts.
pub fn has_debian_guest() -> bool {
    if qemu_binary().is_none() {
        println!("SKIPPED (no qemu-system-x86_64): this test ran nothing");
        return false;
    }
    if !on_path("qemu-img") {
        println!("SKIPPED (no qemu-img): this test ran nothing");
        return false;
    }
    let there = directory().join("disk.qcow2").is_file()
        || rustix::process::geteuid().is_root() && on_path("mmdebstrap") && on_path("mcopy");
    if !there {
        println!("SKIPPED (no Debian guest, and it cannot be built here): this test ran nothing");
    }
    there
}

/// Where the guest's files are.
fn directory() -> PathBuf {
    std::env::var_os("MIRRORVM_DEBIAN_DIR")
        .map_or_else(|| repository().join("tests/.cache/debian"), PathBuf::from)
}

/// The QEMU of Debian's backports, fetched when it is not there: `None` where it cannot be fetched, which is
/// said in a line that the test runner counts.
///
/// # Panics
/// When the script that fetches it cannot be started.
pub fn newer_qemu() -> Option<PathBuf> {
    static FETCHING: Mutex<()> = Mutex::new(());
    let _one = FETCHING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let out = std::env::var_os("MIRRORVM_NEWER_QEMU_DIR")
        .map_or_else(|| repository().join("tests/.cache/qemu-backports"), PathBuf::from);
    let binary = out.join("qemu-system-x86_64");
    if !binary.is_file() {
        let script = repository().join("tests/guest/fetch-qemu-backports");
        if !Command::new(script).arg(&out).status().unwrap().success() {
            println!("SKIPPED (no newer QEMU can be fetched): this test ran nothing");
            return None;
        }
    }
    Some(binary)
}

/// Whether a program is on the PATH.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| d.join(program).is_file())
}

/// Runs a program to its end.
///
/// # Panics
/// When it cannot be started. `/usr/sbin` is looked in too: Debian has file system tools there.
fn ran(program: &str, args: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program).args(args).env("PATH", format!("{path}:/usr/sbin:/sbin")).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Runs a program that has to succeed; gives what it printed.
///
/// # Panics
/// When it fails, with what it said.
fn done(program: &str, args: &[&str]) -> Vec<u8> {
    let output = ran(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A disk of a test's own, in a directory of its own that goes with it.
pub struct Disk {
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    /// An empty overlay, in qcow2, of another disk in qcow2, which must not change while this one is used.
    ///
    /// # Panics
    /// When `qemu-img` cannot make it.
    pub fn over(base: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let base = base.canonicalize().unwrap();
        let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&base), text(&path)];
        let _ = done("qemu-img", &args);
        Self { directory, path }
    }

    /// A disk with the same content that needs no other: `qcow2` or `raw`, as `format` says.
    ///
    /// # Panics
    /// When `qemu-img` cannot make it.
    pub fn copy(base: &Path, format: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(format!("disk.{format}"));
        let _ = done("qemu-img", &["convert", "-f", "qcow2", "-O", format, text(base), text(&path)]);
        Self { directory, path }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is on it once nobody has it open any more; the file system must be clean, and is not changed.
    ///
    /// # Panics
    /// When QEMU still has it open, when `e2fsck` finds anything to mend or a journal to replay, and when the
    /// guest has never counted.
    pub fn counted(&self) -> Vec<u64> {
        let raw = self.directory.path().join("read.raw");
        // The extension says the format to nobody: a disk in raw is read as such.
        let format = if self.path.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        let _ = done("qemu-img", &["convert", "-f", format, "-O", "raw", text(&self.path), text(&raw)]);
        let root = format!("{}?offset={ROOT_OFFSET}", text(&raw));
        let checked = ran("e2fsck", &["-f", "-n", &root]);
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.status.success(), "the guest's file system is not clean: {said}");
        assert!(!said.contains("recovery"), "the guest's file system was not unmounted: {said}");
        let log = done("debugfs", &["-R", &format!("cat {LOG}"), &root]);
        std::fs::remove_file(&raw).unwrap();
        let numbers = numbers(&log);
        assert!(!numbers.is_empty(), "the guest's {LOG} is empty or missing");
        numbers
    }
}

/// A path as an argument; those of tests are UTF-8.
fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The numbers of a counter file, a line each.
///
/// # Panics
/// When a line is no number, or the last one is not finished: the guest writes whole lines.
pub fn numbers(log: &[u8]) -> Vec<u64> {
    let log = std::str::from_utf8(log).unwrap();
    assert!(log.is_empty() || log.ends_with('\n'), "the last line of the counter file is torn");
    log.lines()
        .map(|l| l.parse().unwrap_or_else(|_| panic!("no number in the counter file: {l:?}")))
        .collect()
}

/// What the guest printed in one tick.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tick {
    /// Its number; goes on over reboots.
    pub number: u64,
    /// Seconds since the guest's kernel started.
    pub up: f64,
}

/// The ticks in a console's text, in order. A prompt or something typed may stand before one on its line, as
/// the terminal is a shell's too; a line that is not finished yet holds none.
pub fn debian_ticks(console: &str) -> Vec<Tick> {
    let complete = console.rfind('\n').map_or("", |end| &console[..end]);
    let tick = |line: &str| {
        let mut words = line[line.rfind("tick ")?..].split_whitespace().skip(1);
        let number = words.next()?.parse().ok()?;
        let up = (words.next()? == "up").then(|| words.next())??.parse().ok()?;
        Some(Tick { number, up })
    };
    complete.lines().filter_map(tick).collect()
}

/// Checks that numbers go up by one each, none missing and none twice.
///
/// # Panics
/// When not, with the place; `of` says whose numbers they are.
pub fn contiguous(of: &str, numbers: &[u64]) {
    for pair in numbers.windows(2) {
        assert_eq!(pair[1], pair[0] + 1, "{of}: {} follows {}", pair[1], pair[0]);
    }
}

/// Asks the guest's HTTP server, which `address` is forwarded to, for a path; gives the body. `None` as long
/// as there is no whole answer with status 200: a forwarded port takes connections before the guest does.
pub fn served(address: SocketAddr, path: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    let _ = stream.take(LONGEST).read_to_end(&mut answer).ok()?;
    body(&answer).map(<[u8]>::to_vec)
}

/// The body of a whole answer with status 200.
fn body(answer: &[u8]) -> Option<&[u8]> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let mut lines = head.split("\r\n");
    if lines.next()?.split(' ').nth(1)? != "200" {
        return None;
    }
    let length = lines.find_map(|l| l.strip_prefix("Content-Length: "))?.parse::<usize>().ok()?;
    let body = &answer[end + 4..];
    (body.len() == length).then_some(body)
}

/// The number that the guest serves.
pub fn served_tick(address: SocketAddr) -> Option<u64> {
    let body = served(address, "/")?;
    std::str::from_utf8(&body).ok()?.trim_end().strip_prefix("tick ")?.parse().ok()
}

/// The guest's wall clock, since 1970.
pub fn served_time(address: SocketAddr) -> Option<Duration> {
    seconds(std::str::from_utf8(&served(address, "/time")?).ok()?.trim_end())
}

/// A time in seconds, a point, and nine digits.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, nanos) = text.split_once('.')?;
    if nanos.len() != 9 {
        return None;
    }
    Some(Duration::new(whole.parse().ok()?, nanos.parse().ok()?))
}

/// The guest's counter file, as it serves it.
pub fn served_log(address: SocketAddr) -> Option<Vec<u64>> {
    Some(numbers(&served(address, "/log")?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::Duration;

    use super::{Tick, body, contiguous, debian_ticks, numbers, seconds, served_tick};

    #[test]
    fn ticks_are_found_between_what_is_typed() {
        let console =
            "Debian\r\n# tick 7 up 12.5\r\necho tick\r\nls tick 8 up 13.0\r\ntick 9 up 13.5\r\ntick 10 up";
        let expected = [(7, 12.5), (8, 13.0), (9, 13.5)].map(|(number, up)| Tick { number, up });
        assert_eq!(debian_ticks(console), expected);
        assert!(debian_ticks("tick 1 up 2.0").is_empty());
        assert!(debian_ticks("tick x up 2.0\ntick 3 down 4.0\n").is_empty());
    }

    #[test]
    fn a_counter_file_has_whole_lines() {
        assert!(numbers(b"").is_empty());
        assert_eq!(numbers(b"1\n2\n30\n"), [1, 2, 30]);
        assert!(std::panic::catch_unwind(|| numbers(b"1\n2\n3")).is_err());
        assert!(std::panic::catch_unwind(|| numbers(b"1\n\n3\n")).is_err());
    }

    #[test]
    fn a_gap_and_a_repetition_are_seen() {
        contiguous("nothing", &[]);
        contiguous("three", &[4, 5, 6]);
        for wrong in [[4_u64, 6], [4, 4], [4, 3]] {
            assert!(std::panic::catch_unwind(|| contiguous("wrong", &wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn only_whole_answers_count() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntick 5\n";
        assert_eq!(body(answer), Some(&b"tick 5\n"[..]));
        for end in 0..answer.len() {
            assert_eq!(body(&answer[..end]), None, "{end} bytes");
        }
        assert_eq!(body(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), None);
    }

    #[test]
    fn the_guests_clock_is_read_to_the_nanosecond() {
        assert_eq!(seconds("17.000000003"), Some(Duration::new(17, 3)));
        assert_eq!(seconds("17.3"), None);
        assert_eq!(seconds("17"), None);
    }

    #[test]
    fn a_port_that_hangs_up_serves_nothing_yet() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            drop(listener.accept().unwrap());
            let (mut peer, _) = listener.accept().unwrap();
            let mut asked = [0; 256];
            assert!(peer.read(&mut asked).unwrap() > 0);
            peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ntick 12\n").unwrap();
        });
        assert_eq!(served_tick(address), None);
        assert_eq!(served_tick(address), Some(12));
        server.join().unwrap();
    }
}
