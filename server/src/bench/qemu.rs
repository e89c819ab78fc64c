//! Two QEMUs of Debian's on this machine and a migration between them over loopback, as QEMU does it by
//! itself.
//!
//! Owns: the processes, what is said to them over QMP, the content of the source's RAM, the check of what
//! arrived. Must not know: what is compared with it. RAM is QEMU's default (anonymous, transparent huge pages
//! by QEMU's own advice).
//!
//! RAM is filled and read through `/proc/PID/mem` at the address that QEMU tells (`gpa2hva`): no second copy
//! of it lies in QEMU as its `loader` device would keep, and what the destination holds is compared with the
//! source in full.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mirrorvm::qemu::Qmp;
use serde_json::{Value, json};

use super::setting::warm;
use super::{BenchError, certificates};

/// The program.
pub(super) const BINARY: &str = "qemu-system-x86_64";
/// What firmware and its tables may use: neither filled nor compared.
const LOW: u64 = 16 << 20;
/// The same at RAM's end, for firmware that runs.
const HIGH: u64 = 24 << 20;
/// The same at its beginning where firmware never runs.
const LOW_PAUSED: u64 = 1 << 20;
/// How long anything of a QEMU may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How QEMU sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mode {
    /// Connections for pages; 0: the one of the migration itself.
    pub channels: u16,
    /// TLS with X.509 certificates on both sides, on all connections.
    pub tls: bool,
}

impl Mode {
    pub fn name(self) -> String {
        let tls = if self.tls { " + TLS" } else { "" };
        match self.channels {
            0 if self.tls => "TLS".into(),
            0 => "plain".into(),
            n => format!("multifd {n}{tls}"),
        }
    }
}

/// Why QEMU cannot be compared with here, if it cannot.
pub(super) fn missing() -> Option<String> {
    let found = Command::new(BINARY).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    (!found.is_ok_and(|s| s.success())).then(|| format!("no {BINARY}"))
}

/// One QEMU; killed and reaped with this value.
struct Process {
    child: Child,
    qmp: Qmp,
    bytes: u64,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a QEMU is started with.
struct Part<'a> {
    name: &'a str,
    bytes: u64,
    /// A multiboot image to run.
    kernel: Option<&'a Path>,
    extra: &'a [&'a str],
}

impl Process {
    fn start(dir: &Path, part: &Part<'_>) -> Result<Self, BenchError> {
        let socket = dir.join(format!("{}.qmp", part.name));
        let listener = UnixListener::bind(&socket)?;
        let credentials = |endpoint| {
            let dir = dir.display();
            format!("tls-creds-x509,id=tls0,dir={dir},endpoint={endpoint},verify-peer=on")
        };
        let endpoint = if part.name == "source" { "client" } else { "server" };
        // setpriv (util-linux) makes the kernel kill QEMU when this process ends, however it ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", BINARY, "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "pc,usb=off", "-accel", "tcg,tb-size=64", "-m"])
            .arg(format!("{}M", part.bytes >> 20))
            .args(["-object", &credentials(endpoint)])
            .args(["-chardev", &format!("socket,id=qmp,path={}", socket.display())])
            .args(["-mon", "chardev=qmp,mode=control"])
            .args(part.extra);
        if let Some(kernel) = part.kernel {
            command.arg("-kernel").arg(kernel);
        }
        let errors = dir.join(format!("{}.err", part.name));
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&errors)?).spawn()?;
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if child.try_wait()?.is_some() || Instant::now() > deadline => {
                    let said = std::fs::read_to_string(&errors).unwrap_or_default();
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(format!("QEMU does not start: {}", said.trim()).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_nonblocking(false)?;
        let qmp = Qmp::connect(stream, Instant::now() + PATIENCE)?;
        Ok(Self { child, qmp, bytes: part.bytes })
    }

    fn say(&mut self, command: &str, arguments: Value) -> Result<Value, BenchError> {
        Ok(self.qmp.execute(command, arguments, Instant::now() + PATIENCE)?)
    }

    fn prepare(&mut self, mode: Mode, downtime_ms: u64) -> Result<(), BenchError> {
        let capabilities: Vec<_> = [("events", true), ("multifd", mode.channels > 0)]
            .iter()
            .map(|(name, on)| json!({ "capability": name, "state": on }))
            .collect();
        self.say("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let mut parameters = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": downtime_ms });
        if mode.channels > 0 {
            parameters["multifd-channels"] = mode.channels.into();
        }
        if mode.tls {
            parameters["tls-creds"] = "tls0".into();
            parameters["tls-hostname"] = certificates::SERVER.into();
        }
        self.say("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Its RAM from outside, and where in its address space it begins.
    fn memory(&mut self) -> Result<(File, u64), BenchError> {
        let said = self.say("human-monitor-command", json!({ "command-line": "gpa2hva 0" }))?;
        let at = host_address(said.as_str().unwrap_or_default()).ok_or("QEMU does not tell where RAM is")?;
        let path = PathBuf::from(format!("/proc/{}/mem", self.child.id()));
        Ok((File::options().read(true).write(true).open(path)?, at))
    }

    /// Waits until a migration ends; gives the moment at which QEMU said so.
    fn ended(&mut self) -> Result<Instant, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let event = self.qmp.wait_event(&["MIGRATION"], deadline)?;
            let now = Instant::now();
            match event.data["status"].as_str() {
                Some("completed") => return Ok(now),
                Some("failed" | "cancelled") => {
                    let why = self.say("query-migrate", json!({}))?;
                    return Err(format!("QEMU's migration failed: {why}").into());
                }
                _ => {}
            }
        }
    }
}

/// The address in "Host virtual address for 0x0 (pc.ram) is 0x7f...".
fn host_address(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().rsplit_once(" is 0x")?.1, 16).ok()
}

/// How a migration went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    /// From the command to the event that it completed.
    pub seconds: f64,
    /// QEMU's own figure.
    pub downtime_ms: f64,
}

/// A guest and how it moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course<'a> {
    pub bytes: u64,
    pub mode: Mode,
    /// A program that works on its RAM; `None`: the machine is stopped before its first instruction.
    pub writer: Option<&'a super::writer::Writer>,
    /// The limit of QEMU's, milliseconds.
    pub downtime_ms: u64,
}

/// One migration between two new QEMUs.
pub(super) fn migrate(course: &Course<'_>) -> Result<Moved, BenchError> {
    let dir = tempfile::tempdir()?;
    certificates::write(dir.path())?;
    let image = course.writer.map(|w| w.write(dir.path())).transpose()?;
    let part = Part { name: "source", bytes: course.bytes, kernel: image.as_deref(), extra: &["-S"] };
    let mut source = Process::start(dir.path(), &part)?;
    let low = if course.writer.is_some() { LOW } else { LOW_PAUSED };
    let random = fill(&mut source, low)?;
    let extra: &[_] = match course.writer {
        Some(_) => &["-incoming", "defer"],
        None => &["-incoming", "defer", "-S"],
    };
    let mut destination = Process::start(dir.path(), &Part { name: "destination", extra, ..part })?;
    if let Some(writer) = course.writer {
        source.say("cont", json!({}))?;
        let (memory, at) = source.memory()?;
        writer.await_load(&memory, at)?;
    }
    for process in [&mut source, &mut destination] {
        process.prepare(course.mode, course.downtime_ms)?;
    }
    destination.say("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
    let listening = destination.say("query-migrate", json!({}))?;
    let port =
        listening["socket-address"][0]["port"].as_str().ok_or("QEMU does not tell its port")?.to_owned();
    warm(course.bytes)?;
    let begun = Instant::now();
    source.say("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
    let seconds = (source.ended()? - begun).as_secs_f64();
    destination.ended()?;
    let said = source.say("query-migrate", json!({}))?;
    plausible(&said, course.bytes)?;
    match course.writer {
        // It works on over there; what it left alone is compared.
        Some(writer) => {
            let (memory, at) = destination.memory()?;
            writer.await_load(&memory, at)?;
            for range in writer.outside(low..course.bytes - HIGH) {
                same(&mut destination, &random, range)?;
            }
        }
        None => same(&mut destination, &random, low..course.bytes)?,
    }
    Ok(Moved { seconds, downtime_ms: said["downtime"].as_f64().ok_or("QEMU does not tell its downtime")? })
}

/// What QEMU says of a completed migration: all of RAM must have crossed, none of it as zero pages but what
/// is below [`LOW`].
fn plausible(said: &Value, bytes: u64) -> Result<(), BenchError> {
    let number = |name: &str| said["ram"][name].as_u64().unwrap_or(0);
    let (transferred, zero) = (number("transferred"), number("duplicate") * 4096);
    if said["status"] != "completed" || transferred < bytes - LOW || zero > 2 * LOW {
        return Err(format!("QEMU's migration is not what it should be: {said}").into());
    }
    Ok(())
}

/// A megabyte that does not compress; pages all over RAM differ by their number, written into them.
struct Content(Vec<u8>);

impl Content {
    fn at(&mut self, offset: u64) -> &[u8] {
        for (page, bytes) in self.0.chunks_exact_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(&(offset / 4096 + page as u64).to_le_bytes());
        }
        &self.0
    }
}

const PIECE: u64 = 1 << 20;

/// Fills RAM from `low` on, a multiple of [`PIECE`]; gives what it was filled with, by the random part.
fn fill(process: &mut Process, low: u64) -> Result<Vec<u8>, BenchError> {
    use ring::rand::SecureRandom;
    let mut random = vec![0; PIECE as usize];
    ring::rand::SystemRandom::new().fill(&mut random).map_err(|_| "no random numbers")?;
    let (memory, base) = process.memory()?;
    let mut content = Content(random.clone());
    for offset in (low..process.bytes).step_by(PIECE as usize) {
        memory.write_all_at(content.at(offset), base + offset)?;
    }
    Ok(random)
}

/// Every byte of `range`, in whole [`PIECE`]s, is what [`fill`] put there.
fn same(process: &mut Process, random: &[u8], range: std::ops::Range<u64>) -> Result<(), BenchError> {
    let (memory, base) = process.memory()?;
    let mut content = Content(random.to_vec());
    let mut found = vec![0; PIECE as usize];
    for offset in range.step_by(PIECE as usize) {
        memory.read_exact_at(&mut found, base + offset)?;
        if content.at(offset) != found {
            return Err(format!("RAM at {offset:#x} differs at QEMU's destination").into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_and_nothing_else() {
        let said = "Host virtual address for 0x0 (pc.ram) is 0x7f12c0000000\r\n";
        assert_eq!(host_address(said), Some(0x7f12_c000_0000));
        for no in ["", "No memory is mapped at address 0x0", "x is 0xzz"] {
            assert_eq!(host_address(no), None);
        }
    }

    #[test]
    fn a_migration_that_moved_too_little_is_no_migration() {
        let said = |status: &str, transferred: u64, duplicate: u64| json!({ "status": status, "ram": { "transferred": transferred, "duplicate": duplicate } });
        let ram = 1 << 30;
        plausible(&said("completed", ram, 4096), ram).unwrap();
        for wrong in [
            said("active", ram, 0),
            said("completed", ram / 2, 0),
            said("completed", ram, ram / 4096 / 2),
            json!({}),
        ] {
            assert!(plausible(&wrong, ram).is_err(), "{wrong}");
        }
    }

    #[test]
    fn content_differs_from_page_to_page() {
        let mut content = Content(vec![7; PIECE as usize]);
        let first = content.at(0).to_vec();
        assert_ne!(first[..4096], first[4096..8192]);
        assert_ne!(first, content.at(PIECE));
    }

    #[test]
    fn modes_have_names() {
        let name = |channels, tls| Mode { channels, tls }.name();
        assert_eq!(name(0, false), "plain");
        assert_eq!(name(0, true), "TLS");
        assert_eq!(name(4, true), "multifd 4 + TLS");
    }
}
