//! Options of the demo.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use mirrorvm::address_space::StrategyKind;

use super::error::DemoError;
use super::method::{Method, Via};

/// How `downtime` and `throughput` come about; shown by `--help`.
pub(crate) const LONG_ABOUT: &str = "\
Migrate a guest between two daemons on this machine, and check what arrived.

Starts two daemons as processes of their own, with temporary state directories and peers on loopback; defines and \
starts a guest on the first; shows the plan of the mirror's address space; migrates the guest over the REST API; \
compares every page of RAM; prints what happened; and removes everything again, also on Ctrl-C.

With --strategy all it does so for every strategy in turn, each with a fresh guest, and ends with one table that \
compares them. What the daemon refuses for the driver is listed with the daemon's reason. The exit status is success \
only if something was migrated and everything that was not refused verified.

Without --driver the guest runs on KVM (embedded) where /dev/kvm works, and else on the software machine (emulated), \
which needs no KVM: RAM really is ciphertext under a model of SEV, but the daemon holds the keys, so that the model \
shows what SEV does and protects nothing.

mirror ready: from the request for a mirror to its helper's first idle doorbell, taken from a mirror that is made for \
this and removed before the migration makes its own (with --es: from the one that the guest was launched with).

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
    /// How the guest runs [default: embedded where /dev/kvm works, else emulated].
    #[arg(long, value_enum)]
    pub(super) driver: Option<Driver>,
    /// Layout of the mirror's address space, or all of them in turn.
    #[arg(long, value_parser = strategy_choices(), default_value = StrategyKind::Shifted.name())]
    pub(super) strategy: StrategyChoice,
    /// How a `psp-copied` helper gets into its memory [default: launch-update].
    #[arg(long, value_enum)]
    pub(super) via: Option<Via>,
    /// Where `shifted` has its RAM window: 4gib, max-phys, or a number of bytes.
    #[arg(long, default_value = "4gib", value_name = "4gib|max-phys|BYTES")]
    pub(super) shift: ShiftChoice,
    /// Encrypt the vCPUs' registers, too (SEV-ES): the guest is launched with its mirror.
    #[arg(long)]
    pub(super) es: bool,
    /// RAM of the guest.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub(super) memory_mib: u64,
    /// How fast the workload guest rewrites its working set (64 MiB, or a quarter of RAM where that is less).
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    pub(super) dirty_mib_per_s: u64,
    /// What the workload guest's RAM holds: incompressible data, or nothing.
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
    /// The daemon is the VMM, on KVM; the guest is the built-in workload.
    Embedded,
    /// A software machine with a model of SEV, without KVM; the guest is the built-in workload.
    Emulated,
    /// QEMU boots a Linux guest; needs --kernel and --initrd.
    Qemu,
}

/// Which strategies are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StrategyChoice {
    /// One kind.
    One(StrategyKind),
    /// Every one in turn, and a table that compares them.
    All,
}

/// What `--strategy` takes.
fn strategy_choices() -> impl TypedValueParser<Value = StrategyChoice> {
    let kind = |kind: &StrategyKind| PossibleValue::new(kind.name()).help(kind.facts().summary);
    let all = PossibleValue::new("all").help("Every one in turn, and a table that compares them");
    let names = StrategyKind::ALL.iter().map(kind).chain([all]);
    PossibleValuesParser::new(names)
        .map(|name| StrategyKind::named(&name).map_or(StrategyChoice::All, StrategyChoice::One))
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
            Self::Emulated => "emulated",
            Self::Qemu => "qemu",
        }
    }
}

/// Two streams where there are two processors: one stream leaves the second processor waiting while a helper
/// seals.
fn default_streams() -> u16 {
    if std::thread::available_parallelism().map_or(1, std::num::NonZero::get) > 1 { 2 } else { 1 }
}

impl DemoArgs {
    /// Where the files are that the definition of a `qemu` guest names.
    pub(super) fn image_directories(&self) -> Vec<PathBuf> {
        let directory = |file: &PathBuf| std::path::absolute(file).ok()?.parent().map(PathBuf::from);
        let mut list: Vec<PathBuf> =
            [&self.kernel, &self.initrd].into_iter().flatten().filter_map(directory).collect();
        list.dedup();
        list
    }

    /// What can be told before anything is started.
    pub(super) fn check(&self) -> Result<(), DemoError> {
        if self.via.is_some() && self.strategy != StrategyChoice::One(StrategyKind::PspCopied) {
            return Err(DemoError::Options("--via goes with --strategy psp-copied; `all` shows both ways"));
        }
        if self.driver != Some(Driver::Qemu) {
            return Ok(());
        }
        if self.es {
            return Err(DemoError::Options("--es goes with the drivers embedded and emulated"));
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

    /// The strategies to show, in order.
    pub(super) fn methods(&self) -> Vec<Method> {
        match self.strategy {
            StrategyChoice::One(StrategyKind::PspCopied) => {
                vec![Method::PspCopied(self.via.unwrap_or(Via::LaunchUpdate))]
            }
            StrategyChoice::One(kind) => Method::all_of(kind, self.shift),
            StrategyChoice::All => {
                StrategyKind::ALL.iter().flat_map(|kind| Method::all_of(*kind, self.shift)).collect()
            }
        }
    }
}

/// The options of this command line, for tests.
#[cfg(test)]
pub(super) fn parsed(line: &[&str]) -> DemoArgs {
    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoArgs,
    }
    let line: Line = clap::Parser::try_parse_from(["demo"].iter().chain(line)).unwrap();
    line.demo
}

#[cfg(test)]
mod tests {
    use super::parsed as args;
    use super::*;

    #[test]
    fn all_is_every_way() {
        let names = |line: &[&str]| args(line).methods().iter().map(|m| m.title()).collect::<Vec<_>>();
        assert_eq!(names(&[]), ["shifted"]);
        assert_eq!(names(&["--strategy", "psp-copied"]), ["psp-copied launch-update"]);
        assert_eq!(
            names(&["--strategy", "psp-copied", "--via", "send-receive"]),
            ["psp-copied send-receive"]
        );
        let all =
            ["shifted", "identity-cbit", "declared", "psp-copied launch-update", "psp-copied send-receive"];
        assert_eq!(names(&["--strategy", "all"]), all);
    }

    #[test]
    fn options_that_do_not_go_together_are_refused() {
        let refused = |line: &[&str]| matches!(args(line).check(), Err(DemoError::Options(_)));
        assert!(refused(&["--via", "send-receive"]));
        assert!(refused(&["--strategy", "all", "--via", "send-receive"]));
        assert!(refused(&["--driver", "qemu", "--es"]));
        assert!(matches!(args(&["--driver", "qemu"]).check(), Err(DemoError::NoLinuxGuest)));
        for fine in [&["--es"][..], &["--driver", "emulated", "--es"], &[]] {
            args(fine).check().unwrap();
        }
    }
}
