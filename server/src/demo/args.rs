//! Options of the demo.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::error::DemoError;

/// Largest working set of the embedded guest; a quarter of its RAM where that is less.
const WORKING_SET_MIB: u64 = 64;

/// How `downtime` and `throughput` come about; shown by `--help`.
pub(crate) const LONG_ABOUT: &str = "\
Migrate a guest between two daemons on this machine, and check what arrived.

Starts two daemons as processes of their own, with temporary state directories and peers on loopback; defines and \
starts a guest on the first; shows the plan of the mirror's address space; migrates the guest over the REST API; \
compares every page of RAM; prints what happened; and removes everything again, also on Ctrl-C.

downtime: from the guest's last instruction at the source to its first at the destination; the time that both \
hosts spend on digests for the comparison is taken off and shown separately.

total time: from the request to the end of the migration, set-up of both mirrors and the digests at both hosts \
included.

throughput: bytes of page content that crossed in all rounds (zero pages cross as a mark and do not count), divided \
by the sum of the rounds' durations. The rounds' durations include the destination's acknowledgement; setting up, \
hand-over and verification are outside.

verified: both daemons digest every page of RAM at the pause point, by plain reads of host memory that do not go \
through the helper (SHA-256, 16 bytes each); the demo fetches both lists and compares them page by page. Besides, \
the guest must go on at the destination from where it was, find its memory intact, and be stopped at the source.";

/// What the demo shows.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How the guest runs.
    #[arg(long, value_enum, default_value = "embedded")]
    pub(super) driver: Driver,
    /// Layout of the mirror's address space.
    #[arg(long, value_enum, default_value = "shifted")]
    pub(super) strategy: StrategyKind,
    /// Where `shifted` has its RAM window: 4gib, max-phys, or a number of bytes.
    #[arg(long, default_value = "4gib", value_name = "4gib|max-phys|BYTES")]
    pub(super) shift: ShiftChoice,
    /// RAM of the guest.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub(super) memory_mib: u64,
    /// How fast the embedded guest rewrites its working set (64 MiB, or a quarter of RAM where that is less).
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    pub(super) dirty_mib_per_s: u64,
    /// What the embedded guest's RAM holds: incompressible data, or nothing.
    #[arg(long, value_enum, default_value = "random")]
    pub(super) fill: Fill,
    /// Helper workers and connections.
    #[arg(long, default_value_t = default_streams(), value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(super) streams: u16,
    /// Kernel of the qemu guest.
    #[arg(long, value_name = "PATH")]
    pub(super) kernel: Option<PathBuf>,
    /// Initial RAM disk of the qemu guest.
    #[arg(long, value_name = "PATH")]
    pub(super) initrd: Option<PathBuf>,
    /// Print one JSON object on stdout, and nothing else there.
    #[arg(long)]
    pub(super) json: bool,
}

/// How the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Driver {
    /// The daemon is the VMM; the guest is the built-in workload.
    Embedded,
    /// QEMU boots a Linux guest; needs --kernel and --initrd.
    Qemu,
}

/// Layout of the mirror's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum StrategyKind {
    /// Bottom 4 GiB one to one, all RAM again above it.
    Shifted,
    /// The guest's own addresses.
    IdentityCbit,
    /// The helper declares what it needs.
    Declared,
    /// The helper's memory is private to the mirror.
    PspCopied,
}

/// What RAM holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fill {
    /// Incompressible data.
    Random,
    /// Nothing.
    Zero,
}

/// Where `shifted` has its RAM window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShiftChoice {
    FourGib,
    MaxPhys,
    Bytes(u64),
}

impl FromStr for ShiftChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "4gib" => Ok(Self::FourGib),
            "max-phys" => Ok(Self::MaxPhys),
            // Whether the bytes make sense is the daemon's to say.
            bytes => bytes
                .parse()
                .map(Self::Bytes)
                .map_err(|_| "this is neither 4gib nor max-phys nor a number of bytes"),
        }
    }
}

impl Driver {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Qemu => "qemu",
        }
    }
}

impl StrategyKind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Shifted => "shifted",
            Self::IdentityCbit => "identity-cbit",
            Self::Declared => "declared",
            Self::PspCopied => "psp-copied",
        }
    }
}

/// Two streams where there are two processors: one stream leaves the second processor waiting while a helper seals.
fn default_streams() -> u16 {
    if std::thread::available_parallelism().map_or(1, std::num::NonZero::get) > 1 { 2 } else { 1 }
}

impl DemoArgs {
    /// What can be told before anything is started.
    pub(super) fn check(&self) -> Result<(), DemoError> {
        if self.driver == Driver::Embedded {
            return Ok(());
        }
        let (Some(kernel), Some(initrd)) = (&self.kernel, &self.initrd) else {
            return Err(DemoError::NoLinuxGuest);
        };
        for (option, path) in [("--kernel", kernel), ("--initrd", initrd)] {
            std::fs::File::open(path).map_err(|source| DemoError::GuestFile {
                option,
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    pub(super) const fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// The strategy as the API has it.
    pub(super) fn strategy_body(&self) -> Value {
        let kind = self.strategy.name();
        match self.strategy {
            StrategyKind::Shifted => {
                let shift = match self.shift {
                    ShiftChoice::FourGib => json!({"kind": "4gib"}),
                    ShiftChoice::MaxPhys => json!({"kind": "max-phys"}),
                    ShiftChoice::Bytes(bytes) => json!({"kind": "explicit", "bytes": bytes}),
                };
                json!({"kind": kind, "shift": shift})
            }
            StrategyKind::IdentityCbit | StrategyKind::Declared => json!({"kind": kind}),
            StrategyKind::PspCopied => json!({"kind": kind, "via": "launch-update"}),
        }
    }

    /// The driver as the API has it.
    pub(super) fn driver_body(&self) -> Value {
        match self.driver {
            Driver::Embedded => {
                let working_set = (WORKING_SET_MIB << 20).min(self.memory_bytes() / 4);
                json!({"kind": "embedded", "vcpus": 1, "workload": {
                    "fill": match self.fill { Fill::Random => "random", Fill::Zero => "zero" },
                    "working_set_bytes": working_set,
                    "dirty_bytes_per_second": self.dirty_mib_per_s << 20,
                }})
            }
            Driver::Qemu => json!({"kind": "qemu", "vcpus": 1,
                "kernel": absolute(self.kernel.as_deref()), "initrd": absolute(self.initrd.as_deref()),
                "append": "console=ttyS0 quiet panic=-1", "accel": "auto"}),
        }
    }

    /// QEMU does not export its dirty log, so its guests move in one go.
    pub(super) const fn mode(&self) -> &'static str {
        match self.driver {
            Driver::Embedded => "precopy",
            Driver::Qemu => "stop_and_copy",
        }
    }
}

/// The daemon may be somewhere else.
fn absolute(path: Option<&Path>) -> Option<String> {
    path.map(|p| std::path::absolute(p).unwrap_or_else(|_| p.to_owned()).to_string_lossy().into_owned())
}
