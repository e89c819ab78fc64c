//! The two hosts of a campaign and everything that can be done to them.
//!
//! Owns: daemons, the network between them, their disks and clocks, strangers at their ports. Must not know:
//! what is right.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::dice::Dice;
use crate::daemon::Daemon;
use crate::disk::can_mount;
use crate::preload::{Page, Preload};
use crate::proxy::{Act, Break, Proxy, Way};

/// Names of the hosts.
pub const NAMES: [&str; 2] = ["a", "b"];
/// Size of a state directory's file system.
const DISK_KIB: u32 = 24 << 10;

/// Everything that is done to the hosts beside using them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A break of one connection between the hosts at a random place.
    Break,
    /// The network between the hosts is gone for a while.
    Cut,
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Terminate,
    /// SIGSTOP for a moment.
    Freeze,
    /// No room in the state directory.
    FullDisk,
    /// Syncs of files fail.
    SyncErrors,
    /// The wall clock jumps.
    Clock,
    /// Connections to every port, from who says nothing or something else.
    Strangers,
}

/// All of them with how often they come.
pub const FAULTS: [(u64, Fault); 9] = [
    (6, Fault::Break),
    (2, Fault::Cut),
    (2, Fault::Kill),
    (1, Fault::Terminate),
    (2, Fault::Freeze),
    (2, Fault::FullDisk),
    (2, Fault::SyncErrors),
    (2, Fault::Clock),
    (2, Fault::Strangers),
];

/// One host.
pub struct Side {
    /// Its daemon.
    pub daemon: Daemon,
    /// Whether the daemon runs.
    pub up: bool,
    /// The way to it from the other host.
    pub proxy: Proxy,
    page: Option<Page>,
}

/// Both.
pub struct World {
    /// The hosts.
    pub sides: [Side; 2],
    /// What strangers hold open.
    strangers: Vec<TcpStream>,
    local_strangers: Vec<UnixStream>,
    thaws: Vec<JoinHandle<()>>,
    _preload: Option<Preload>,
}

impl World {
    /// Starts two daemons that know each other through proxies.
    pub fn start() -> Self {
        let preload = Preload::build();
        let start = |name: &str| {
            let page = preload.as_ref().map(|p| p.page(name));
            let environment = match (&preload, &page) {
                (Some(preload), Some(page)) => preload.environment(page).to_vec(),
                _ => Vec::new(),
            };
            let environment: Vec<_> = environment.iter().map(|(n, v)| (*n, v.as_str())).collect();
            let arguments = ["--listen", "tcp:127.0.0.1:0", "--metrics-listen", "tcp:127.0.0.1:0"];
            let daemon = if can_mount() {
                Daemon::start_on_disk(name, DISK_KIB, &environment, &arguments)
            } else {
                println!("SKIPPED (not root: no file system can be mounted): full disks");
                Daemon::start_as(name, &environment, |_| arguments.map(str::to_owned).into())
            };
            let proxy = Proxy::to(&daemon.peer_address);
            Side { daemon, up: true, proxy, page }
        };
        let sides = NAMES.map(start);
        for (here, there) in [(0, 1), (1, 0)] {
            sides[here].daemon.add_peer(&sides[there].daemon, &sides[there].proxy.address());
        }
        Self {
            sides,
            strangers: Vec::new(),
            local_strangers: Vec::new(),
            thaws: Vec::new(),
            _preload: preload,
        }
    }

    /// Faults that cannot be made here.
    pub fn impossible(&self) -> Vec<Fault> {
        let mut list = Vec::new();
        if !can_mount() {
            list.push(Fault::FullDisk);
        }
        if self.sides.iter().any(|s| s.page.is_none()) {
            list.extend([Fault::SyncErrors, Fault::Clock]);
        }
        list
    }

    /// Makes a fault; what it was in words, or nothing when it cannot be made now.
    pub fn make(&mut self, fault: Fault, dice: &mut Dice) -> Option<String> {
        let side = dice.below(2) as usize;
        let name = NAMES[side];
        if self.impossible().contains(&fault) {
            return None;
        }
        let here = &mut self.sides[side];
        match fault {
            Fault::Break => {
                let plan = Break {
                    connection: dice.below(4) as usize,
                    way: *dice.of(&[Way::Up, Way::Down]),
                    records: dice.below(30) * dice.below(3),
                    bytes: dice.below(40),
                    act: *dice.of(&[Act::Cut, Act::Truncate, Act::Stall, Act::Flip]),
                };
                here.proxy.arm(plan);
                Some(format!("on the way to {name}: {plan:?}"))
            }
            Fault::Cut => {
                here.proxy.cut();
                Some(format!("the way to {name} is cut"))
            }
            Fault::Kill if here.up => {
                here.daemon.kill();
                here.up = false;
                Some(format!("{name} is killed"))
            }
            Fault::Terminate if here.up => {
                let status = here.daemon.terminate();
                here.up = false;
                assert!(status.success(), "{name} ended with {status} after SIGTERM");
                Some(format!("{name} is ended by SIGTERM"))
            }
            Fault::Freeze if here.up => {
                let pid = Pid::from_raw(i32::try_from(here.daemon.pid()).unwrap()).unwrap();
                let time = Duration::from_millis(50 + dice.below(3000));
                kill_process(pid, Signal::STOP).unwrap();
                self.thaws.push(std::thread::spawn(move || {
                    std::thread::sleep(time);
                    let _ = kill_process(pid, Signal::CONT);
                }));
                Some(format!("{name} is stopped for {} ms", time.as_millis()))
            }
            Fault::Kill | Fault::Terminate | Fault::Freeze => None,
            Fault::FullDisk => {
                // Sometimes a few pages are left: it gets full in the middle of something.
                let left = dice.below(3) * 16;
                here.daemon.disk().fill(left * 4096);
                Some(format!("{name}'s disk has {left} blocks left"))
            }
            Fault::SyncErrors => {
                here.page.as_ref()?.fail_syncs(true);
                Some(format!("syncs of {name} fail"))
            }
            Fault::Clock => {
                let year = 365 * 86_400;
                let seconds = *dice.of(&[-3600, -20 * year, 3600, 11 * year, -90, 90]);
                here.page.as_ref()?.set_clock(seconds);
                Some(format!("{name}'s clock is {seconds} s off"))
            }
            Fault::Strangers => self.strangers(side, dice),
        }
    }

    fn strangers(&mut self, side: usize, dice: &mut Dice) -> Option<String> {
        let here = &self.sides[side];
        if !here.up {
            return None;
        }
        let mut ports = vec![here.daemon.peer_address.clone()];
        // Of what it said, those of the API and of the monitoring.
        ports.extend(
            here.daemon.ready.split(' ').filter_map(|w| w.split_once("tcp:")).map(|(_, a)| a.to_owned()),
        );
        let words: [&[u8]; 6] = [
            b"",
            b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"POST /v1/guests HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n{",
            &[0xff; 200],
        ];
        let count = 1 + dice.below(40);
        for _ in 0..count {
            let Ok(mut stream) = TcpStream::connect(dice.of(&ports)) else { continue };
            let _ = stream.set_nonblocking(true);
            let _ = stream.write_all(words[dice.below(6) as usize]);
            self.strangers.push(stream);
        }
        if let Ok(mut stream) = UnixStream::connect(here.daemon.socket()) {
            let _ = stream.set_nonblocking(true);
            let _ = stream.write_all(words[dice.below(6) as usize]);
            self.local_strangers.push(stream);
        }
        Some(format!("{count} strangers at {}'s ports", NAMES[side]))
    }

    /// Starts a daemon that was ended, once its disk has room again.
    pub fn restart(&mut self, side: usize) {
        self.lift_disk(side);
        let here = &mut self.sides[side];
        if !here.up {
            // A disk that refuses every sync is no disk to start on.
            here.lift_syncs();
            here.daemon.restart();
            here.up = true;
        }
    }

    fn lift_disk(&mut self, side: usize) {
        if can_mount() {
            self.sides[side].daemon.disk().free();
        }
    }

    /// Ends every fault; daemons run afterwards. Clocks stay where they are.
    pub fn lift(&mut self) {
        for thaw in self.thaws.drain(..) {
            let _ = thaw.join();
        }
        self.strangers.clear();
        self.local_strangers.clear();
        for side in 0..2 {
            self.lift_disk(side);
            self.sides[side].lift_syncs();
            self.sides[side].proxy.mend();
            self.restart(side);
        }
    }

    /// Syncs that failed so far.
    pub fn failed_syncs(&self) -> i64 {
        self.sides.iter().filter_map(|s| s.page.as_ref()).map(Page::failed_syncs).sum()
    }
}

impl Side {
    fn lift_syncs(&self) {
        if let Some(page) = &self.page {
            page.fail_syncs(false);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for thaw in self.thaws.drain(..) {
            let _ = thaw.join();
        }
    }
}
