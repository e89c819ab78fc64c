//! A guest on disk.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::address_space::{BlockSpec, GuestLayout};
use crate::boot_files::{BootFile, BootFiles};
use crate::guest::DriverSpec;
use crate::host::{Audit, Fault, GuestAudit, GuestRecord, GuestSpec, GuestState, Labels, ProtectionLevel};
use crate::memory::Backing;
use crate::store::form::{fill, form, leaves, words};
use jiff::Timestamp;

form! {
    GuestForm of GuestRecord, version 8 by forward {
        id: Uuid,
        spec: GuestSpec,
        layout: GuestLayout,
        state: GuestState,
        generation: u64,
        protection: ProtectionLevel,
        boot: Option<BootFiles>,
        migration: Option<Uuid>,
        moved_to: Option<String>,
        unconfirmed: bool,
        audit: Option<GuestAudit>,
        error: Option<Fault>,
        created_at: Timestamp,
        started_at: Option<Timestamp>,
    } live { readiness }
}

/// Version 7 had no firmware among what a guest boots from, and always a kernel. Versions up to 6 had no
/// audits. Version 4 left out what says nothing, and what earlier builds did not
/// have.
fn forward(_from: u64, document: &mut Value) {
    fill(document, [("boot", Value::Null), ("unconfirmed", json!(false)), ("audit", Value::Null)]);
    if let Some(boot) = document.get_mut("boot").filter(|boot| boot.is_object()) {
        fill(boot, [("firmware", Value::Null)]);
    }
    if let Some(spec) = document.get_mut("spec") {
        fill(spec, [("backing", Value::Null)]);
    }
}

form! {
    GuestAuditForm of GuestAudit {
        migration: Uuid,
        audit: Audit,
    }
}

form! {
    GuestSpecForm of GuestSpec {
        name: String,
        driver: DriverSpec,
        blocks: Vec<BlockSpec>,
        backing: Option<Backing>,
        labels: Labels,
    }
}

// Its form is the driver's own, whoever that is.
leaves!(DriverSpec);

words! {
    GuestStateForm of GuestState {
        Stopped = "stopped",
        Starting = "starting",
        Running = "running",
        Paused = "paused",
        Stopping = "stopping",
        Incoming = "incoming",
        InDoubt = "in_doubt",
        Failed = "failed",
    }
}

words! {
    ProtectionForm of ProtectionLevel {
        None = "none",
        Modelled = "modelled",
        Sev = "sev",
        SevEs = "sev-es",
    }
}

form! {
    BootFilesForm of BootFiles {
        kernel: Option<BootFile>,
        initrd: Option<BootFile>,
        firmware: Option<BootFile>,
    }
}

form! {
    BootFileForm of BootFile {
        bytes: u64,
        sha256: [u8; 32],
    }
}
