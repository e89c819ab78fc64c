//! What this host is and can do, said as it is.

use crate::codes::Capability;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Host;
use super::MigrationState;
use super::inner::{HostPlatformKey, Inner};
use super::registry::Facet;
use crate::address_space::{HostLimits, StrategyKind};
use crate::guest::{Driver, MissingCapability};
use crate::hypervisor::kvm::KvmHost;
use crate::migration::Suite;
use crate::migration::wire::{Abilities, PROTOCOL_VERSIONS};
use crate::qemu::QemuUsers;
use crate::sev::kernel::probe;
use crate::store::Writing;
use crate::sync::Locked;
use crate::transport::{Endpoint, Occupancy, is_at, resolve};
use uuid::Uuid;

/// How long the resolver may take about a name that is only looked at.
const NAME_PATIENCE: Duration = Duration::from_secs(2);

/// What this host can do.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Drivers that work here.
    pub drivers: Vec<&'static str>,
    /// `KVM_GET_API_VERSION`, when `/dev/kvm` opens.
    pub kvm_api_version: Option<i32>,
    /// Named KVM capabilities with what `KVM_CHECK_EXTENSION` says.
    pub kvm_caps: Vec<(&'static str, i32)>,
    /// Limits for address spaces.
    pub limits: HostLimits,
    /// Strategies that this build executes.
    pub strategies: Vec<&'static str>,
    /// Oldest and newest helper ABI.
    pub helper_abi: (u32, u32),
    /// SHA-256 of the built-in helper image.
    pub helper_measurement: [u8; 32],
    /// Suites that this image seals by.
    pub suites: Vec<&'static str>,
    /// Versions of the peer protocol.
    pub protocol_versions: Vec<u32>,
    /// Which accelerator a guest gets that asks for none, and why; `None` where no driver has a choice.
    pub accelerator: Option<(&'static str, &'static str)>,
    /// The users that guests' processes run as; `None`: as the daemon's user.
    pub process_users: Option<QemuUsers>,
    /// What is missing.
    pub missing: Vec<MissingCapability>,
}

/// About this host.
#[derive(Clone, Debug)]
pub struct HostInfo {
    /// Made when the state directory was.
    pub id: Uuid,
    /// Name, by default the kernel's node name.
    pub name: String,
    /// Kernel release.
    pub kernel: String,
    /// CPU model.
    pub cpu: String,
    /// Logical CPUs.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// This host's identity on the peer link, as [`super::PeerSpec::identity`].
    pub identity: String,
    /// The key that stands for its security processor, real or, where there is none, modelled: what a guest's
    /// owner may name in [`crate::guest::AttestationSpec::platforms`]. `None` where it cannot be learnt.
    pub platform_key: Option<HostPlatformKey>,
    /// Where others are to connect for migrations to it; `None` without a listener, or while that is on all
    /// addresses and none is advertised.
    pub peer_address: Option<Endpoint>,
    /// Where its peer listener is.
    pub peer_listen: Option<SocketAddr>,
    /// Guests by state.
    pub guests: usize,
    /// Mirrors.
    pub mirrors: usize,
    /// Migrations that have not ended.
    pub active_migrations: usize,
    /// Whether its database takes what is to be stored.
    pub storage: Writing,
}

impl Host {
    /// About this host.
    pub fn info(&self) -> HostInfo {
        let inner = &self.inner;
        let uname = rustix::system::uname();
        let peer_listen = self.peer_listen();
        let active = {
            let migrations = inner.migrations();
            let open = MigrationState::ALL.iter().filter(|state| !state.is_terminal());
            open.map(|state| migrations.count(&Facet::State(state.name()))).sum()
        };
        HostInfo {
            id: inner.id,
            name: inner.name.clone(),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu: cpu_model().unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: memory_bytes().unwrap_or(0),
            identity: inner.identity.pin().to_string(),
            platform_key: inner.platform_key(),
            peer_address: self.peer_address(),
            peer_listen,
            guests: inner.guests().len(),
            mirrors: inner.mirrors().len(),
            active_migrations: active,
            storage: inner.ledger.writing(),
        }
    }

    /// Who is connected to the peer listener and what came to nothing there, by reason; `None` without a
    /// listener.
    pub fn peer_port(&self) -> Option<(Occupancy, Vec<(&'static str, u64)>)> {
        let listener = self.listener.locked();
        listener.as_ref().map(|listener| (listener.occupancy(), listener.turned_away()))
    }

    /// Whether the host's database takes what is to be stored. Where little room is left and nothing failed
    /// lately, it is tried, at most once a second.
    pub async fn storage(&self) -> Writing {
        let ledger = &self.inner.ledger;
        if ledger.writing().failing.is_none() && self.inner.is_short_of_space() {
            // What it met is what the ledger says next.
            let _ = ledger.probe().await;
        }
        ledger.writing()
    }

    /// What it can do.
    pub fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        if self.lacks_address() {
            capabilities.missing.push(MissingCapability {
                what: Capability::PeerAddress,
                why: "the peer listener is on all addresses, so none of them can be named to others".into(),
                fix: "start the daemon with --advertise, or with --peer-listen on one address".into(),
            });
        }
        capabilities
    }

    /// Where the peer listener is.
    fn peer_listen(&self) -> Option<SocketAddr> {
        let listener = self.listener.locked();
        listener.as_ref().map(crate::transport::PeerListener::local_addr)
    }

    /// Where others are to connect.
    fn peer_address(&self) -> Option<Endpoint> {
        let bound = self.peer_listen()?;
        match &self.advertise {
            Some(advertised) => Some(advertised.for_port(bound.port())),
            None => Some(Endpoint::from(bound)).filter(|at| at.check_connectable().is_ok()),
        }
    }

    /// Whether peers may come, and nobody can be told where to.
    pub(super) fn lacks_address(&self) -> bool {
        self.peer_listen().is_some() && self.peer_address().is_none()
    }

    /// Whether whoever connects to `endpoint` meets this host, as far as that can be said from here.
    pub(super) fn is_own_address(&self, endpoint: &Endpoint) -> bool {
        if self.peer_address().is_some_and(|own| own == *endpoint) {
            return true;
        }
        let (Some(bound), Some(at)) = (self.peer_listen(), endpoint.address()) else { return false };
        is_at(bound, at)
    }

    /// Of what a peer's name leads to now, whatever of it is this host. An address is looked at wherever it
    /// is given; a name that leads nowhere may lead somewhere later, and a resolver that takes long holds
    /// nobody up for it.
    pub(super) async fn own_addresses_of(&self, endpoint: &Endpoint) -> Vec<SocketAddr> {
        let (Some(bound), None) = (self.peer_listen(), endpoint.address()) else { return Vec::new() };
        if endpoint.port() != bound.port() {
            return Vec::new();
        }
        let endpoint = endpoint.clone();
        let look = move || {
            let found = resolve(&endpoint, Instant::now() + NAME_PATIENCE, &|| false).unwrap_or_default();
            found.into_iter().filter(|at| is_at(bound, *at)).collect()
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }
}

impl Capabilities {
    /// What peers are told of it.
    pub(super) fn to_peers(&self) -> Abilities {
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect();
        Abilities {
            drivers: names(&self.drivers),
            strategies: names(&self.strategies),
            helper_abi: self.helper_abi,
            helper_measurement: self.helper_measurement,
            suites: names(&self.suites),
            protocol_versions: self.protocol_versions.clone(),
            max_phys_bits: self.limits.max_phys_bits,
            c_bit: self.limits.c_bit,
            phys_bit_reduction: self.limits.phys_bit_reduction,
            slot_budget: self.limits.slot_budget,
            missing: self.missing.iter().map(|m| m.what.code().to_owned()).collect(),
        }
    }
}

impl Inner {
    /// What the host can do.
    pub fn capabilities(&self) -> Capabilities {
        let inner = self;
        let works = |driver: &&dyn Driver| driver.works(inner.hypervisor_of(*driver)).is_ok();
        Capabilities {
            drivers: inner.drivers.iter().filter(works).map(Driver::name).collect(),
            kvm_api_version: inner.kvm.as_ref().ok().map(KvmHost::api_version),
            kvm_caps: inner.kvm.as_ref().map(KvmHost::capabilities).unwrap_or_default(),
            limits: inner.limits(),
            strategies: StrategyKind::NAMES.to_vec(),
            helper_abi: (inner.image.header().abi_min, inner.image.header().abi_max),
            helper_measurement: inner.image.measurement(),
            suites: Suite::of_helper(inner.image.header()).into_iter().map(Suite::name).collect(),
            protocol_versions: PROTOCOL_VERSIONS.to_vec(),
            accelerator: inner.drivers.iter().find_map(Driver::accelerator),
            process_users: inner.drivers.iter().find_map(Driver::process_users),
            missing: self.missing(),
        }
    }

    fn missing(&self) -> Vec<MissingCapability> {
        let mut list = Vec::new();
        if let Err(why) = &self.kvm {
            list.push(MissingCapability::kvm(why));
        }
        for driver in self.drivers.iter() {
            let missing = driver.works(self.hypervisor_of(driver)).err();
            // Several may miss the same.
            if let Some(missing) = missing.filter(|m| list.iter().all(|l| l.what.code() != m.what.code())) {
                list.push(missing);
            }
        }
        let support = probe();
        let lacking = match &support {
            Err(missing) => Some(missing),
            Ok(support) => support.es.as_ref().err(),
        };
        list.extend(lacking.map(|m| MissingCapability {
            what: m.what,
            why: m.why.to_string(),
            fix: format!("{}; the driver `emulated` has a model of SEV, which protects nothing", m.fix),
        }));
        // Whatever there is: the kernel has no mirrors of such guests.
        list.push(MissingCapability {
            what: Capability::SevSnp,
            why: "KVM refuses to share the context of an SEV-SNP guest: sev_vm_copy_enc_context_from does not copy its VMSA \
                  features"
                .into(),
            fix: "use SEV or SEV-ES; nothing on this host can change it".into(),
        });
        list
    }
}

fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
}

fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
