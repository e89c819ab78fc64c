//! A driver as somebody else would write one, with nothing but what the libraries give everybody.
//!
//! Its guest is no guest at all: a thread that writes pages of RAM one after the other. Its RAM is its own,
//! on memory files that it makes itself and that are full of rubbish before anything else is in them.

mod machine;
mod unfit;
mod writer;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mirrorvm::addr::RamPage;
use mirrorvm::address_space::GuestLayout;
use mirrorvm::guest::drivers::{
    Beginning, Body, Definition, Driver, DriverSchema, Facts, MirrorsOn, Order, WriteRate,
};
use mirrorvm::guest::{DriverSpec, MachineError};
use mirrorvm::memory::{Backing, ForeignRamError, GuestRam, MemoryError};
use mirrorvm::reading::{FieldError, Fields};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use machine::OutsideMachine;
pub use unfit::Unfit;

const NAME: &str = "outside";
/// Pages that a guest writes in a second.
const PAGES_PER_SECOND: std::ops::RangeInclusive<u64> = 1..=100_000;
/// What a file of RAM holds at first.
static RUBBISH: [u8; 64 << 10] = [0xa5; 64 << 10];

/// What a guest is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    pages_per_second: u64,
    greeting: String,
    /// A page of RAM that changes whenever the state is saved, without a word in the log: what a driver must
    /// never do.
    loses_page: Option<u64>,
}

/// The driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outside;

fn file(bytes: u64) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("outside", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    let mut at = 0;
    while at < bytes {
        let len = RUBBISH.len().min((bytes - at) as usize);
        at += rustix::io::pwrite(&fd, &RUBBISH[..len], at)? as u64;
    }
    Ok(fd)
}

impl Driver for Outside {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schema(&self) -> DriverSchema {
        let rate = json!({
            "description": "How many pages the guest writes per second.",
            "type": "integer", "format": "int64", "default": 500,
            "minimum": PAGES_PER_SECOND.start(), "maximum": PAGES_PER_SECOND.end(),
        });
        DriverSchema {
            title: "DriverOutside",
            description: "A thread that writes RAM, for tests.",
            properties: Map::from_iter([
                ("pages_per_second".to_owned(), rate),
                (
                    "loses_page".to_owned(),
                    json!({"description": "A page whose last write is not logged.", "type": ["integer", "null"]}),
                ),
                ("greeting".to_owned(), json!({"description": "What it prints first.", "type": "string"})),
            ]),
            required: vec!["greeting"],
            components: Vec::new(),
        }
    }

    fn read(&self, fields: &mut Fields<'_, '_>, _: u64) -> Option<DriverSpec> {
        let pages_per_second = fields.int_or("pages_per_second", PAGES_PER_SECOND, 500);
        let greeting = fields.required("greeting");
        let loses_page = fields.optional_int("loses_page", 0..=u64::MAX >> 12);
        let told = Told { pages_per_second: pages_per_second?, greeting: greeting?, loses_page: loses_page? };
        DriverSpec::of(NAME, &told).ok()
    }

    fn check(&self, definition: &Definition<'_>, errors: &mut Vec<FieldError>) {
        match definition.spec.read::<Told>() {
            Err(bad) => errors.push(FieldError::new("/driver", "invalid", bad.source.to_string())),
            Ok(told) if !told.greeting.is_ascii() => {
                errors.push(FieldError::new("/driver/greeting", "not_ascii", "the greeting is not ASCII"));
            }
            Ok(_) => {}
        }
    }

    fn facts(&self, _: &DriverSpec) -> Facts {
        Facts { vcpus: 1, ..Facts::default() }
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Software
    }

    fn backings(&self) -> &'static [Backing] {
        &[Backing::Memfd]
    }

    fn memory(&self, layout: &Arc<GuestLayout>, _: &[Backing]) -> Result<GuestRam, MemoryError> {
        let files: rustix::io::Result<Vec<_>> = layout.ram().map(|block| file(block.size)).collect();
        let files = files.map_err(|source| MemoryError::System { what: "memfd_create", source })?;
        GuestRam::from_fds(Arc::clone(layout), files).map_err(|e| match e {
            ForeignRamError::Memory(e) => e,
            ForeignRamError::Count { .. } | ForeignRamError::File { .. } => {
                MemoryError::System { what: "GuestRam::from_fds", source: rustix::io::Errno::INVAL }
            }
        })
    }

    fn write_rate(&self, spec: &DriverSpec) -> Option<WriteRate> {
        let told: Told = spec.read().ok()?;
        let rate = told.pages_per_second * mirrorvm::addr::PAGE_SIZE;
        Some(WriteRate { bytes_per_second: rate, working_set_bytes: rate })
    }

    fn make(&self, order: Order<'_>) -> Result<Body, MachineError> {
        let told: Told = order.spec.read().map_err(MachineError::Parameters)?;
        let layout = order.layout.clone();
        let mut machine = OutsideMachine::new(order.ram, order.secret, told.pages_per_second)?;
        machine.loses(told.loses_page.map(RamPage::new));
        if order.beginning == Beginning::Boot {
            machine.boot(&told.greeting)?;
        }
        Ok(Body { machine: Box::new(machine), layout, settled: None })
    }
}
