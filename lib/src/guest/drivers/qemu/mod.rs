//! The driver `qemu`: a machine that is a QEMU process.
//!
//! Owns: the parameters of such a guest, the files that it is made from, whom its process runs as, and what a
//! host needs for it. Must not know: the process (that is [`crate::guest::qemu`]), how a file is opened (that
//! is [`crate::boot_files`]), what of a machine makes no sense (that is [`crate::qemu::machine`]).

mod definition;
mod files;
mod seed;

use crate::codes::{Capability, DriverCapability};

use mirrorvm_abi::header::Header;
use uuid::Uuid;

pub use self::definition::QemuGuest;
use self::files::Making;
use super::{
    Beginning, Body, CannotReceive, Definition, Driver, DriverSchema, Facts, FindsWrites, LayoutFault,
    MirrorsOn, MissingCapability, Order, helper_block_size,
};
use crate::address_space::GuestLayout;
use crate::boot_files::{BootFiles, ImageDirectories};
use crate::guest::driver::{AccelChoice, BadParameters, DriverSpec, Parameters, VCPUS};
use crate::guest::qemu::{QEMU_RESERVED, QemuMachine, QemuMachineSpec};
use crate::guest::{Machine as _, MachineError};
use crate::hypervisor::Hypervisor;
use crate::memory::Backing;
use crate::qemu::{
    APPEND_MAX, Accel, Arriving, KvmAccess, MEMORY_UNIT, QemuUsers, Starter, UserPool, is_command_line,
    kvm_access, may_change_users, pick_accel, qemu_binary,
};
use crate::reading::{FieldError, Fields};

const NAME: &str = "qemu";
/// The driver.
#[derive(Debug)]
pub struct QemuDriver {
    starter: Starter,
    /// Whom processes run as; `None`: as this one, which has no other to choose.
    pool: Option<UserPool>,
}

impl QemuDriver {
    /// With these users, where this process may start others' processes now, and with somebody who does.
    pub fn new(users: QemuUsers, starter: Starter) -> Self {
        // Two daemons of one host begin with different users.
        let pool = || UserPool::new(users, std::process::id());
        Self { starter, pool: may_change_users().then(pool) }
    }

    /// A guest of this driver, as a definition has it.
    pub fn spec(guest: &QemuGuest) -> DriverSpec {
        DriverSpec::of(NAME, guest).expect("numbers, texts and nothing else")
    }

    const fn pool(&self) -> Option<&UserPool> {
        self.pool.as_ref()
    }

    /// How a QEMU of this host runs instructions.
    fn choose_accel(&self, choice: AccelChoice) -> Accel {
        match choice {
            AccelChoice::Auto => pick_accel(self.pool().is_some()).0,
            AccelChoice::Kvm => Accel::Kvm,
            AccelChoice::Tcg => Accel::Tcg,
        }
    }
}

/// Bytes of what a guest boots from.
fn file_bytes(boot: Option<&BootFiles>) -> u64 {
    boot.map_or(0, BootFiles::bytes)
}

const fn accel_name(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    }
}

/// The program that runs its guests.
const QEMU: DriverCapability = DriverCapability::new("qemu", "qemu");

/// Moving a guest while it runs.
const LIVE_MIGRATION: DriverCapability = DriverCapability::new(
    "precopy_of_this_qemu_guest",
    "a way to find what this QEMU guest writes while it runs (mode precopy)",
);

impl Driver for QemuDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schema(&self) -> DriverSchema {
        DriverSchema {
            title: "DriverQemu",
            description: "A machine that is a QEMU process. It has one RAM block of whole MiB, at guest-physical address 0. It boots\nfrom a disk, or from a Linux kernel that it is given.",
            properties: definition::properties(),
            required: Vec::new(),
            components: definition::components(),
        }
    }

    fn read(&self, fields: &mut Fields<'_, '_>, _: u64) -> Option<DriverSpec> {
        let guest = QemuGuest::read(fields)?;
        let accel = self.choose_accel(guest.accel);
        // The end of such an id is random.
        let mac = || {
            let [.., a, b, c] = Uuid::now_v7().into_bytes();
            [a, b, c]
        };
        let machine = guest.machine.settled(accel, mac);
        Some(Self::spec(&QemuGuest { machine, ..guest }))
    }

    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        spec.read::<QemuGuest>().map(|guest| Self::spec(&guest))
    }

    fn shown(&self, spec: &DriverSpec) -> Parameters {
        let known = spec.read::<QemuGuest>().map(|guest| guest.shown());
        let mut shown = known.unwrap_or_else(|_| spec.parameters());
        shown.entry("initrd").or_insert_with(Default::default);
        shown
    }

    fn check(&self, definition: &Definition<'_>, errors: &mut Vec<FieldError>) {
        let guest: QemuGuest = match definition.spec.read() {
            Ok(guest) => guest,
            Err(bad) => return errors.push(FieldError::new("/driver", "invalid", bad.source.to_string())),
        };
        FieldError::check_bound("/driver/vcpus", guest.vcpus.into(), &VCPUS, errors);
        if definition.backing == Some(Backing::Anonymous) {
            let detail = "anonymous memory cannot be shared with QEMU's process; take memfd or hugetlb";
            errors.push(FieldError::new("/memory/backing", "impossible", detail));
        }
        let one = matches!(definition.blocks, [b] if b.gpa.is_some_and(|g| g.get() == 0)
            && b.size_bytes.is_multiple_of(MEMORY_UNIT));
        if !one {
            let detail = "a qemu guest has one block, of whole MiB, at GPA 0";
            errors.push(FieldError::new("/memory/blocks", "unsupported_layout", detail));
        }
        if !is_command_line(&guest.append) {
            let detail = format!(
                "{} bytes are given: at most {APPEND_MAX}, without control characters, make a kernel command line",
                guest.append.len(),
            );
            errors.push(FieldError::new("/driver/append", "out_of_range", detail));
        }
        if guest.kernel.is_none() && (guest.initrd.is_some() || !guest.append.is_empty()) {
            let detail = "an initial RAM disk and a command line are a kernel's, and none is given";
            errors.push(FieldError::new("/driver/kernel", "missing", detail));
        }
        guest.machine.check(guest.vcpus, guest.kernel.is_some(), errors);
    }

    fn facts(&self, spec: &DriverSpec) -> Facts {
        let vcpus = spec.read::<QemuGuest>().map_or(0, |guest| guest.vcpus);
        Facts { vcpus, ..Facts::default() }
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Kvm
    }

    fn works(&self, _: Result<&dyn Hypervisor, &str>) -> Result<(), MissingCapability> {
        // Its guests run without KVM, too; only their mirrors do not.
        qemu_binary().map(|_| ()).ok_or_else(|| MissingCapability {
            what: Capability::OfDriver(QEMU),
            why: "qemu-system-x86_64 is not on the PATH".into(),
            fix: "install QEMU (Debian: qemu-system-x86)".into(),
        })
    }

    fn can_receive(&self, spec: &DriverSpec) -> Result<(), CannotReceive> {
        let guest: QemuGuest = spec.read().map_err(MachineError::Parameters)?;
        if qemu_binary().is_none() {
            let missing = "the destination lacks qemu: qemu-system-x86_64 is not on the PATH";
            return Err(CannotReceive::Missing(missing.into()));
        }
        let users = self.pool();
        if guest.accel == AccelChoice::Kvm && kvm_access(users.is_some()) == KvmAccess::Closed {
            let closed = "/driver/accel: QEMU's user cannot open /dev/kvm at the destination";
            return Err(CannotReceive::Missing(closed.into()));
        }
        match users {
            // Given back at once: the one who makes the machine takes it.
            Some(pool) if pool.lease().is_none() => Err(MachineError::NoUser.into()),
            Some(_) | None => Ok(()),
        }
    }

    fn layout(
        &self,
        _: &DriverSpec,
        bare: &GuestLayout,
        helper: &Header,
    ) -> Result<GuestLayout, LayoutFault> {
        let size = helper_block_size(bare, helper)?;
        let from = bare.ram_end().checked_add(QEMU_RESERVED).unwrap_or(bare.ram_end());
        Ok(bare.with_helper_after(from, size, false)?)
    }

    fn backings(&self) -> &'static [Backing] {
        &[Backing::Hugetlb, Backing::Memfd]
    }

    fn own_bytes(&self, spec: &DriverSpec, boot: Option<&BootFiles>) -> Option<u64> {
        let guest: QemuGuest = spec.read().ok()?;
        // The sealed copies, and what QEMU reads of them.
        Some(self.choose_accel(guest.accel).own_bytes().saturating_add(file_bytes(boot).saturating_mul(2)))
    }

    fn boot_files(
        &self,
        definition: &Definition<'_>,
        images: &ImageDirectories,
    ) -> Result<Option<BootFiles>, Vec<FieldError>> {
        // Whatever is wrong with the parameters has been said.
        let Ok(guest) = definition.spec.read::<QemuGuest>() else { return Ok(None) };
        files::looked_at(&guest, images, definition.ram_bytes())
    }

    fn finds_writes(&self) -> FindsWrites {
        FindsWrites::Scan {
            lacks: Capability::OfDriver(LIVE_MIGRATION),
            why: "QEMU does not export its dirty log, and the guest's helper has no room for page digests (it is larger \
                  than 4 TiB, or was defined by an earlier version); use mode stop_and_copy",
        }
    }

    fn can_add_blocks(&self) -> Result<(), &'static str> {
        Err("a qemu guest has its RAM in one block, from its definition")
    }

    fn accelerator(&self) -> Option<(&'static str, &'static str)> {
        qemu_binary()?;
        let (accel, why) = pick_accel(self.pool().is_some());
        Some((accel_name(accel), why))
    }

    fn process_users(&self) -> Option<QemuUsers> {
        self.pool().map(UserPool::users)
    }

    fn make(&self, order: Order<'_>) -> Result<Body, MachineError> {
        let mut guest: QemuGuest = order.spec.read().map_err(MachineError::Parameters)?;
        let arriving = match order.beginning {
            Beginning::Boot => None,
            Beginning::Arrival { paused: true, .. } => Some(Arriving::ToPause),
            Beginning::Arrival { paused: false, .. } => Some(Arriving::ToRun),
        };
        let making = Making {
            guest: &guest,
            id: order.id,
            name: order.guest,
            images: order.images,
            pinned: order.boot,
            room: order.home.ram_bytes(),
            boots: arriving.is_none(),
        };
        let passed = making.files()?;
        // They are there now, and are none of what the process will have for itself.
        order.own_memory.iter().for_each(|claim| claim.was_taken(file_bytes(order.boot)));
        let lease = |pool: &UserPool| pool.lease().ok_or(MachineError::NoUser);
        let user = self.pool().map(lease).transpose()?;
        if let Beginning::Arrival { machine_type: Some(exact), .. } = order.beginning {
            exact.clone_into(&mut guest.machine.machine);
        }
        let spec = QemuMachineSpec {
            binary: qemu_binary().ok_or(MachineError::Unsupported { what: "find QEMU" })?,
            machine: guest.machine.clone(),
            accel: self.choose_accel(guest.accel),
            vcpus: guest.vcpus,
            append: guest.append.clone(),
            id: order.id,
            passed,
            user,
            memory: order.own_memory,
            arriving,
        };
        let mut machine = QemuMachine::launch(spec, order.ram, order.secret, &self.starter)?;
        let layout =
            if arriving.is_some() { order.layout.clone() } else { machine.true_layout(order.layout)? };
        // From now on it is this version's machine, whatever the host gets.
        if let Some(exact) = machine.machine_type()? {
            guest.machine.machine = exact;
        }
        Ok(Body { machine: Box::new(machine), layout, settled: Some(Self::spec(&guest)) })
    }
}
