//! The driver `qemu`: a QEMU process that boots a Linux kernel.
//!
//! Owns: the parameters of such a guest, the files that it boots from, whom its process runs as, and what a
//! host needs for it. Must not know: the machine (that is [`crate::guest::qemu`]), how a file is opened (that
//! is [`crate::boot_files`]).

use crate::codes::{Capability, DriverCapability};
use std::path::Path;

use mirrorvm_abi::header::Header;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::workload::vcpus_schema;
use super::{
    Beginning, Body, CannotReceive, Definition, Driver, DriverSchema, Facts, FindsWrites, LayoutFault,
    MirrorsOn, MissingCapability, Order, helper_block_size,
};
use crate::address_space::GuestLayout;
use crate::boot_files::{BootFile, BootFiles, FileRefusal, ImageDirectories, SealedFile};
use crate::guest::MachineError;
use crate::guest::driver::{AccelChoice, BadParameters, DriverSpec, Parameters, VCPUS};
use crate::guest::qemu::{QEMU_RESERVED, QemuMachine, QemuMachineSpec};
use crate::hypervisor::Hypervisor;
use crate::memory::Backing;
use crate::qemu::{
    APPEND_MAX, Accel, KvmAccess, MEMORY_UNIT, QemuUsers, Starter, UserPool, is_command_line, kvm_access,
    may_change_users, pick_accel, qemu_binary,
};
use crate::reading::{Decode, Errors, FieldError, Fields, Node, one_of};

const NAME: &str = "qemu";
/// A kernel is loaded above this; an initial RAM disk is, too.
const BELOW_KERNEL: u64 = 1 << 20;
/// At the end of the guest's memory QEMU keeps this much for ACPI's tables.
const TABLES: u64 = 160 << 10;
/// The machine type of a guest that boots here.
const MACHINE_TYPE: &str = "pc";

/// What such a guest is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuGuest {
    /// 1 to 16.
    pub vcpus: u32,
    /// Kernel image, a path on the host.
    pub kernel: String,
    /// Initial RAM disk, a path on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: String,
    /// Accelerator.
    pub accel: AccelChoice,
}

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
    boot.map_or(0, |b| b.kernel.bytes.saturating_add(b.initrd.map_or(0, |i| i.bytes)))
}

const fn accel_name(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    }
}

impl Decode for AccelChoice {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("auto", Self::Auto), ("kvm", Self::Kvm), ("tcg", Self::Tcg)])
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
        let properties = Map::from_iter([
            ("vcpus".to_owned(), vcpus_schema()),
            (
                "kernel".to_owned(),
                json!({
                    "description": "Path of the kernel image, beneath one of the host's image directories.",
                    "example": "/boot/vmlinuz",
                    "type": "string"
                }),
            ),
            (
                "initrd".to_owned(),
                json!({
                    "description": "Path of the initial RAM disk, beneath one of the host's image directories.",
                    "type": [
                        "string",
                        "null"
                    ]
                }),
            ),
            (
                "append".to_owned(),
                json!({
                    "default": "",
                    "description": "Kernel command line: at most 2047 bytes, without control characters.",
                    "type": "string"
                }),
            ),
            (
                "accel".to_owned(),
                json!({
                    "$ref": "#/components/schemas/Accel",
                    "default": "auto",
                    "description": "The accelerator that QEMU uses."
                }),
            ),
        ]);
        let accel = json!({
            "description": "The accelerator of a QEMU guest.",
            "enum": [
                "auto",
                "kvm",
                "tcg"
            ],
            "type": "string"
        });
        DriverSchema {
            title: "DriverQemu",
            description: "A QEMU process that boots a Linux kernel. The guest has one RAM block of whole MiB, at guest-physical\naddress 0.",
            properties,
            required: vec!["kernel"],
            components: vec![("Accel", accel)],
        }
    }

    fn read(&self, fields: &mut Fields<'_, '_>, _: u64) -> Option<DriverSpec> {
        let vcpus = fields.int_or("vcpus", VCPUS, 1);
        let kernel = fields.required("kernel");
        let initrd = fields.optional("initrd");
        let append = fields.or("append", String::new());
        let accel = fields.or("accel", AccelChoice::Auto);
        Some(Self::spec(&QemuGuest {
            vcpus: vcpus?,
            kernel: kernel?,
            initrd: initrd?,
            append: append?,
            accel: accel?,
        }))
    }

    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        spec.read::<QemuGuest>().map(|guest| Self::spec(&guest))
    }

    fn shown(&self, spec: &DriverSpec) -> Parameters {
        let mut shown = spec.parameters().clone();
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
        let Ok(QemuGuest { kernel, initrd, .. }) = definition.spec.read() else { return Ok(None) };
        let room = definition.ram_bytes();
        let facts = |path: &str, room| images.file(Path::new(path))?.facts(room);
        let kernel = facts(&kernel, room).map_err(|refusal| ("kernel", refusal));
        // Both have to lie in the guest's memory at once, beside what is QEMU's there.
        let kept = kernel.as_ref().map_or(0, |k| k.bytes).saturating_add(BELOW_KERNEL + TABLES);
        let left = room.saturating_sub(kept);
        let initrd = initrd.as_deref().map(|path| facts(path, left)).transpose();
        match (kernel, initrd.map_err(|refusal| ("initrd", refusal))) {
            (Ok(kernel), Ok(initrd)) => Ok(Some(BootFiles { kernel, initrd })),
            (kernel, initrd) => {
                let wrong = [kernel.err(), initrd.err()].into_iter().flatten();
                let error = |(field, refusal): (&str, FileRefusal)| {
                    FieldError::new(format!("/driver/{field}"), refusal.code(), refusal.to_string())
                };
                Err(wrong.map(error).collect())
            }
        }
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
        let guest: QemuGuest = order.spec.read().map_err(MachineError::Parameters)?;
        let (kernel, initrd) = boot_copies(&guest, &order)?;
        // They are there now, and are none of what the process will have for itself.
        order.own_memory.iter().for_each(|claim| claim.was_taken(file_bytes(order.boot)));
        let lease = |pool: &UserPool| pool.lease().ok_or(MachineError::NoUser);
        let user = self.pool().map(lease).transpose()?;
        let (machine_type, incoming) = match order.beginning {
            Beginning::Boot => (MACHINE_TYPE, false),
            Beginning::Arrival { machine_type } => (machine_type.unwrap_or(MACHINE_TYPE), true),
        };
        let spec = QemuMachineSpec {
            binary: qemu_binary().ok_or(MachineError::Unsupported { what: "find QEMU" })?,
            machine_type: machine_type.to_owned(),
            accel: self.choose_accel(guest.accel),
            vcpus: guest.vcpus,
            kernel,
            initrd,
            append: guest.append,
            user,
            memory: order.own_memory,
            incoming,
        };
        let mut machine = QemuMachine::launch(spec, order.ram, order.secret, &self.starter)?;
        let layout = if incoming { order.layout.clone() } else { machine.true_layout(order.layout)? };
        Ok(Body { machine: Box::new(machine), layout })
    }
}

/// Sealed copies of a guest's files, which must hold what they held when the guest was defined.
fn boot_copies(
    guest: &QemuGuest,
    order: &Order<'_>,
) -> Result<(SealedFile, Option<SealedFile>), MachineError> {
    let room = order.home.ram_bytes();
    let copy = |field: &'static str, path: &str, pinned: Option<BootFile>| {
        let copied = order.images.file(Path::new(path)).and_then(|file| file.copy(field, room));
        let copied = copied.map_err(|refusal| MachineError::BootFile { field, refusal })?;
        match pinned {
            Some(pinned) if pinned != copied.facts() => Err(MachineError::BootFileChanged { field }),
            Some(_) | None => Ok(copied),
        }
    };
    let kernel = copy("kernel", &guest.kernel, order.boot.map(|b| b.kernel))?;
    let pinned = order.boot.and_then(|b| b.initrd);
    let initrd = guest.initrd.as_deref().map(|path| copy("initrd", path, pinned)).transpose()?;
    Ok((kernel, initrd))
}
