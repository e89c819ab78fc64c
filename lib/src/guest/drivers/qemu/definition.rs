//! What a guest of the driver is told: its machine, and how it is run here.
//!
//! Owns: the parameters as they are read, stored, shown and documented. Must not know: files, processes.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::guest::driver::{AccelChoice, Parameters, VCPUS};
use crate::guest::drivers::workload::vcpus_schema;
use crate::qemu::machine::Machine;
use crate::reading::shape::without_nulls;
use crate::reading::{Decode, Errors, FieldError, Fields, Json, Node, decode, one_of};

/// What such a guest is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QemuGuest {
    /// 1 to 16.
    pub vcpus: u32,
    /// Kernel image, a path on the host; `None`: it boots from a disk.
    pub kernel: Option<String>,
    /// Initial RAM disk, a path on the host.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: String,
    /// Accelerator.
    pub accel: AccelChoice,
    /// The machine.
    #[serde(flatten)]
    pub machine: Machine,
}

impl QemuGuest {
    /// A guest with one vCPU that boots a Linux kernel, on a machine without disks and interfaces.
    #[must_use]
    pub fn of_kernel(kernel: impl Into<String>, initrd: Option<String>, append: impl Into<String>) -> Self {
        Self {
            vcpus: 1,
            kernel: Some(kernel.into()),
            initrd,
            append: append.into(),
            accel: AccelChoice::Auto,
            machine: Machine::before(),
        }
    }

    /// Reads the members of a definition.
    pub(super) fn read(fields: &mut Fields<'_, '_>) -> Option<Self> {
        let vcpus = fields.int_or("vcpus", VCPUS, 1);
        let kernel = fields.optional_not_null("kernel");
        let initrd = fields.optional("initrd");
        let append = fields.or("append", String::new());
        let accel = fields.or("accel", AccelChoice::Auto);
        let machine = Machine::read(fields);
        Some(Self {
            vcpus: vcpus?,
            kernel: kernel?,
            initrd: initrd?,
            append: append?,
            accel: accel?,
            machine: machine?,
        })
    }

    /// As callers see it: reading it gives the same again.
    pub(super) fn shown(&self) -> Parameters {
        let Ok(Value::Object(shown)) = serde_json::to_value(self).map(without_nulls) else {
            return Map::new();
        };
        shown
    }
}

impl Decode for QemuGuest {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let mut fields = Fields::open(node, errors)?;
        let read = Self::read(&mut fields);
        fields.done()?;
        read
    }
}

impl<'de> Deserialize<'de> for QemuGuest {
    /// Definitions of builds that could not define machines say nothing of one, and mean what those made.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut given = Map::deserialize(deserializer)?;
        if !given.contains_key("machine")
            && let Ok(Value::Object(before)) = serde_json::to_value(Machine::before()).map(without_nulls)
        {
            before.into_iter().for_each(|(name, value)| _ = given.entry(name).or_insert(value));
        }
        let read = decode::<Self>(&Json::from(&Value::Object(given)));
        read.map_err(|errors| serde::de::Error::custom(FieldError::list(&errors)))
    }
}

impl Decode for AccelChoice {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        one_of(node, errors, &[("auto", Self::Auto), ("kvm", Self::Kvm), ("tcg", Self::Tcg)])
    }
}

/// Schemas of the members.
pub(super) fn properties() -> Parameters {
    let path = |what: &str| json!({"description": what, "type": ["string", "null"]});
    let mut kernel = path(
        "Path of a kernel image, beneath one of the host's image directories. Absent: the guest boots from a disk.",
    );
    (kernel["type"], kernel["example"]) = ("string".into(), "/boot/vmlinuz".into());
    let mut properties = Map::from_iter([
        ("vcpus".to_owned(), vcpus_schema()),
        ("kernel".to_owned(), kernel),
        (
            "initrd".to_owned(),
            path("Path of the initial RAM disk, beneath one of the host's image directories."),
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
    properties.extend(Machine::properties());
    properties
}

/// Components that the members' schemas refer to.
pub(super) fn components() -> Vec<(&'static str, Value)> {
    let accel = json!({
        "description": "The accelerator of a QEMU guest.",
        "enum": ["auto", "kvm", "tcg"],
        "type": "string"
    });
    let mut components = vec![("Accel", accel)];
    Machine::parts(&mut components);
    components
}
