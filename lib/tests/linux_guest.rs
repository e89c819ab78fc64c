//! Boots a stock Debian kernel under QEMU and moves it to a second QEMU by hand.
//!
//! Needs `qemu-system-x86_64` (or `$MIRRORVM_QEMU`) and the packages that `tests/guest/build-linux-guest`
//! fetches; without QEMU each test says so in a line that the test runner counts.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use mirrorvm::boot_files::ImageDirectories;
use mirrorvm::qemu::{Accel, Qemu, QemuError, QemuSpec, RunState, Starter, Timeouts};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const RAM: u64 = 256 << 20;
const PAGE: usize = 4096;

fn guest_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests");
        let out =
            std::env::var_os("MIRRORVM_GUEST_DIR").map_or_else(|| tests.join(".cache/guest"), PathBuf::from);
        if !(out.join("vmlinuz").is_file() && out.join("initrd.gz").is_file()) {
            let built = Command::new(tests.join("guest/build-linux-guest")).arg(&out).status().unwrap();
            assert!(built.success(), "the guest could not be built");
        }
        out
    })
}

/// Whether there is a QEMU.
fn qemu() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::var_os("MIRRORVM_QEMU").is_some()
        || std::env::split_paths(&path).any(|d| d.join("qemu-system-x86_64").is_file());
    if !there {
        println!("SKIPPED (no qemu): this test ran nothing");
    }
    there
}

/// One host: RAM, console text, process.
struct Host {
    qemu: Qemu,
    ram: File,
    console: Arc<Mutex<Vec<u8>>>,
}

fn ram() -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, RAM).unwrap();
    fd
}

/// A file of the guest's as QEMU gets it.
fn sealed(name: &str) -> OwnedFd {
    let images = ImageDirectories::open(&[guest_dir().to_owned()], &[]).unwrap();
    images.file(&guest_dir().join(name)).unwrap().copy(name, RAM).unwrap().into_fd()
}

fn spec(ram: OwnedFd, incoming: bool) -> QemuSpec {
    QemuSpec {
        binary: std::env::var_os(if incoming { "MIRRORVM_QEMU_TARGET" } else { "MIRRORVM_QEMU" })
            .or_else(|| std::env::var_os("MIRRORVM_QEMU"))
            .unwrap_or_else(|| "qemu-system-x86_64".into())
            .into(),
        accel: if std::env::var_os("MIRRORVM_TEST_KVM").is_some() { Accel::Kvm } else { Accel::Tcg },
        machine: std::env::var("MIRRORVM_MACHINE").unwrap_or_else(|_| "pc".to_owned()),
        cpu: std::env::var("MIRRORVM_CPU").unwrap_or_else(|_| "max".to_owned()),
        vcpus: 2,
        memory_bytes: RAM,
        kernel: sealed("vmlinuz"),
        initrd: Some(sealed("initrd.gz")),
        append: "console=ttyS0 no_timer_check quiet panic=-1".to_owned(),
        ram,
        run_as: None,
        incoming,
        files: None,
        timeouts: Timeouts::default(),
    }
}

impl Host {
    fn launch(incoming: bool) -> Self {
        Self::launch_on(ram(), incoming)
    }

    fn launch_on(ram: OwnedFd, incoming: bool) -> Self {
        let console = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&console);
        let kept = ram.try_clone().unwrap();
        let qemu = Qemu::launch(
            spec(ram, incoming),
            Box::new(move |bytes| sink.lock().unwrap().extend_from_slice(bytes)),
            &Starter::Here,
        )
        .unwrap();
        Self { qemu, ram: File::from(kept), console }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap()).into_owned()
    }

    fn wait_ticks(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while ticks(&self.text()).len() < count {
            assert!(Instant::now() < deadline, "no {count} ticks; console: {}", self.text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        self.ram.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// The ticks that are complete lines: number, checksum, uptime in seconds.
fn ticks(text: &str) -> Vec<(u64, String, f64)> {
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete
        .lines()
        .filter_map(|line| {
            let mut words = line.trim().strip_prefix("tick ")?.split(' ');
            let number = words.next()?.parse().ok()?;
            let sum = words.next()?.strip_prefix("sum=")?.to_owned();
            let uptime = words.next()?.strip_prefix("uptime=")?.parse().ok()?;
            Some((number, sum, uptime))
        })
        .collect()
}

fn assert_no_gap(text: &str) {
    let ticks = ticks(text);
    for (index, tick) in ticks.iter().enumerate() {
        assert_eq!(tick.0, index as u64 + 1, "a tick is missing or doubled: {text}");
        assert_eq!(tick.1, ticks[0].1, "the checksum changed: {text}");
        assert!(index == 0 || tick.2 >= ticks[index - 1].2, "time went back: {text}");
    }
}

fn changed_pages(before: &[u8], after: &[u8]) -> Vec<usize> {
    before
        .chunks(PAGE)
        .zip(after.chunks(PAGE))
        .enumerate()
        .filter_map(|(index, (before, after))| (before != after).then_some(index))
        .collect()
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = run();
    println!("{what}: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    value
}

#[test]
fn a_linux_guest_moves_without_missing_a_tick() {
    if !qemu() {
        return;
    }
    let _ = guest_dir();
    let mut source = timed("launch", || Host::launch(false));
    assert_eq!(source.qemu.status().unwrap(), RunState::Prelaunch);
    println!("prelaunch layout: {:x?}", source.qemu.layout().unwrap());
    timed("boot to first tick", || {
        source.qemu.cont().unwrap();
        source.wait_ticks(1);
    });
    source.wait_ticks(15);
    timed("stop", || source.qemu.stop().unwrap());
    assert_eq!(source.qemu.status().unwrap(), RunState::Paused);
    println!("layout: {:x?}, machine {}", source.qemu.layout().unwrap(), source.qemu.machine_type().unwrap());

    let before_save = source.image();
    let state = timed("save", || source.qemu.save_device_state(64 << 20).unwrap());
    let image = source.image();
    println!(
        "state: {} bytes; pages changed by save: {:x?}",
        state.len(),
        changed_pages(&before_save, &image)
    );

    // RAM is there before QEMU is: nothing in its start may overwrite it.
    let target_ram = ram();
    File::from(target_ram.try_clone().unwrap()).write_all_at(&image, 0).unwrap();
    let mut target = Host::launch_on(target_ram, true);
    assert_eq!(target.qemu.status().unwrap(), RunState::InMigrate);
    assert_eq!(changed_pages(&image, &target.image()), [] as [usize; 0], "starting overwrote ram");
    assert!(matches!(target.qemu.cont(), Err(QemuError::WrongState { .. })));
    timed("load", || target.qemu.load_device_state(&state).unwrap());
    assert_eq!(target.qemu.status().unwrap(), RunState::Paused);
    println!("pages changed by load: {:x?}", changed_pages(&image, &target.image()));

    let after_stop = source.text();
    timed("cont", || target.qemu.cont().unwrap());
    let resumed = Instant::now();
    target.wait_ticks(20);
    println!("20 ticks on the target took {:?}", resumed.elapsed());
    assert_eq!(source.text(), after_stop, "the source ran on");
    assert_eq!(changed_pages(&image, &source.image()), [] as [usize; 0]);
    source.qemu.quit().unwrap();
    let text = after_stop + &target.text();
    assert_no_gap(&text);
    assert!(ticks(&text).len() >= 35);
    let exit = timed("quit", || target.qemu.quit().unwrap());
    assert_eq!(exit.code, Some(0), "{exit}");
}

#[test]
fn a_saved_source_can_run_on_and_be_saved_again() {
    if !qemu() {
        return;
    }
    let mut host = Host::launch(false);
    assert!(matches!(host.qemu.save_device_state(64 << 20), Err(QemuError::WrongState { .. })));
    host.qemu.cont().unwrap();
    host.wait_ticks(2);
    assert!(matches!(host.qemu.save_device_state(64 << 20), Err(QemuError::WrongState { .. })));
    for round in 1..=3 {
        host.qemu.stop().unwrap();
        let image = host.image();
        let state = host.qemu.save_device_state(64 << 20).unwrap();
        // Once more in the same pause: the same, as nothing ran. QEMU alone would refuse.
        assert_eq!(host.qemu.status().unwrap(), RunState::PostMigrate);
        assert!(host.qemu.save_device_state(64 << 20).unwrap() == state);
        let refused = host.qemu.save_device_state(1000);
        assert!(matches!(refused, Err(QemuError::StateTooLarge { limit: 1000 })), "{refused:?}");
        println!("saving changed {} pages", changed_pages(&image, &host.image()).len());
        let before = ticks(&host.text()).len();
        host.qemu.cont().unwrap();
        host.wait_ticks(before + 4);
        println!("round {round}: {} ticks", before + 4);
        // A limit that is too small fails, and the guest runs on.
        host.qemu.stop().unwrap();
        let refused = host.qemu.save_device_state(1000);
        assert!(matches!(refused, Err(QemuError::StateTooLarge { limit: 1000 })), "{refused:?}");
        host.qemu.cont().unwrap();
        host.wait_ticks(before + 6);
    }
    assert_no_gap(&host.text());
}

#[test]
fn ram_may_arrive_after_the_target_started_and_the_guest_may_move_twice() {
    if !qemu() {
        return;
    }
    let mut host = Host::launch(false);
    host.qemu.cont().unwrap();
    host.wait_ticks(3);
    let mut text = String::new();
    for hop in 1..=2 {
        let mut target = Host::launch(true);
        let touched = target.image().iter().filter(|&&byte| byte != 0).count();
        println!("hop {hop}: a fresh incoming qemu wrote {touched} bytes of ram");
        host.qemu.stop().unwrap();
        let state = host.qemu.save_device_state(64 << 20).unwrap();
        let mut spoilt = Host::launch(true);
        spoilt.ram.write_all_at(&host.image(), 0).unwrap();
        let error = spoilt.qemu.load_device_state(&state[..state.len() / 2]).unwrap_err();
        println!("half a state: {error}");
        drop(spoilt);
        target.ram.write_all_at(&host.image(), 0).unwrap();
        target.qemu.load_device_state(&state).unwrap();
        target.qemu.cont().unwrap();
        target.wait_ticks(3);
        text += &host.text();
        host.qemu.quit().unwrap();
        host = target;
    }
    host.qemu.stop().unwrap();
    assert_no_gap(&(text + &host.text()));
}

#[test]
fn bad_state_is_an_error_and_not_a_guest() {
    if !qemu() {
        return;
    }
    for (name, state) in
        [("empty", vec![]), ("junk", vec![0x5a; 100_000]), ("cut", b"QEVM\0\0\0\x03".to_vec())]
    {
        let mut target = Host::launch(true);
        let error = target.qemu.load_device_state(&state).unwrap_err();
        println!("{name}: {error}");
        assert!(matches!(error, QemuError::Exited(_) | QemuError::StateRefused { .. }), "{error:?}");
    }
}

#[test]
fn a_command_line_qemu_dislikes_is_explained() {
    if !qemu() {
        return;
    }
    let mut wrong = spec(ram(), false);
    wrong.machine = "no-such-machine".to_owned();
    match Qemu::launch(wrong, Box::new(|_| {}), &Starter::Here) {
        Err(QemuError::Exited(exit)) => assert!(exit.stderr.contains("machine type"), "{exit}"),
        other => panic!("{other:?}"),
    }
    let mut missing = spec(ram(), false);
    missing.binary = "/nonexistent/qemu".into();
    let error = Qemu::launch(missing, Box::new(|_| {}), &Starter::Here).unwrap_err();
    println!("{error}");
    let mut sneaky = spec(ram(), false);
    sneaky.machine = "pc,memory-backend=other".to_owned();
    assert!(matches!(
        Qemu::launch(sneaky, Box::new(|_| {}), &Starter::Here),
        Err(QemuError::BadSpec { field: "machine", .. })
    ));
    let mut large = spec(ram(), false);
    large.memory_bytes *= 2;
    assert!(matches!(
        Qemu::launch(large, Box::new(|_| {}), &Starter::Here),
        Err(QemuError::BadRam { found: RAM, .. })
    ));
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).is_some_and(|state| state != 'Z')
}

#[test]
fn dropping_kills_and_an_unexpected_death_is_noticed() {
    if !qemu() {
        return;
    }
    let host = Host::launch(false);
    let pid = host.qemu.pid();
    assert!(is_alive(pid));
    drop(host);
    assert!(!is_alive(pid));

    let mut host = Host::launch(false);
    let pid = i32::try_from(host.qemu.pid()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::SEGV,
    )
    .unwrap();
    let error = host.qemu.wait_event(&["STOP"], Duration::from_secs(5)).unwrap_err();
    assert!(matches!(error, QemuError::Exited(ref exit) if exit.signal == Some(11)), "{error:?}");
    assert!(host.qemu.has_exited().is_some());
    assert!(matches!(host.qemu.status(), Err(QemuError::Exited(_))));
}

/// The daemon's part in `qemu_dies_with_the_daemon`: launches from a thread that ends at once, then waits for
/// death.
#[test]
#[ignore = "started by qemu_dies_with_the_daemon"]
fn daemon_to_be_killed() {
    let host = std::thread::spawn(|| Host::launch(false)).join().unwrap();
    // A reply from QEMU after the launching thread is gone.
    let mut host = host;
    let answers = host.qemu.status().is_ok();
    println!("qemu-pid={} alive={}", host.qemu.pid(), answers && is_alive(host.qemu.pid()));
    // Until it is killed.
    loop {
        std::thread::park();
    }
}

#[test]
fn qemu_dies_with_the_daemon() {
    if !qemu() {
        return;
    }
    use std::io::{BufRead, BufReader};
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "daemon_to_be_killed", "--nocapture"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let line = BufReader::new(daemon.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .find(|line| line.contains("qemu-pid="))
        .unwrap();
    assert!(line.contains("alive=true"), "the end of the launching thread killed qemu: {line}");
    let pid = line.split("qemu-pid=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // It had no chance to tidy up.
    let _ =
        std::fs::remove_dir_all(std::env::temp_dir().join(format!("mirrorvm-linux-{}-daemon", daemon.id())));
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "qemu {pid} outlived its daemon");
        std::thread::sleep(Duration::from_millis(10));
    }
}
