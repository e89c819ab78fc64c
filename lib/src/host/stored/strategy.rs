//! How a mirror's address space is laid out, and where its threads run, on disk.

use serde::{Deserialize, Serialize};

use crate::address_space::{PspVia, Shift, Strategy};
use crate::host::MirrorOptions;
use crate::mirror::{Placement, Scheduler};
use crate::store::form::{Part, Wrong, form, words};

/// The form of a [`Strategy`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StrategyForm {
    Shifted { shift: ShiftForm },
    IdentityCbit {},
    Declared {},
    PspCopied { via: ViaForm },
}

/// The form of a [`Shift`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ShiftForm {
    #[serde(rename = "4gib")]
    FourGib {},
    MaxPhys {},
    Explicit {
        bytes: u64,
    },
}

words! {
    ViaForm of PspVia {
        LaunchUpdate = "launch-update",
        SendReceive = "send-receive",
    }
}

impl Part for Strategy {
    type Form = StrategyForm;

    fn form(&self) -> StrategyForm {
        match self {
            Self::Shifted { shift } => StrategyForm::Shifted { shift: shift.form() },
            Self::IdentityCbit => StrategyForm::IdentityCbit {},
            Self::Declared => StrategyForm::Declared {},
            Self::PspCopied { via } => StrategyForm::PspCopied { via: via.form() },
        }
    }

    fn of(form: StrategyForm) -> Result<Self, Wrong> {
        Ok(match form {
            StrategyForm::Shifted { shift } => Self::Shifted { shift: Shift::of(shift)? },
            StrategyForm::IdentityCbit {} => Self::IdentityCbit,
            StrategyForm::Declared {} => Self::Declared,
            StrategyForm::PspCopied { via } => Self::PspCopied { via: PspVia::of(via)? },
        })
    }
}

impl Part for Shift {
    type Form = ShiftForm;

    fn form(&self) -> ShiftForm {
        match self {
            Self::FourGib => ShiftForm::FourGib {},
            Self::MaxPhys => ShiftForm::MaxPhys {},
            Self::Explicit { bytes } => ShiftForm::Explicit { bytes: *bytes },
        }
    }

    fn of(form: ShiftForm) -> Result<Self, Wrong> {
        Ok(match form {
            ShiftForm::FourGib {} => Self::FourGib,
            ShiftForm::MaxPhys {} => Self::MaxPhys,
            ShiftForm::Explicit { bytes } => Self::Explicit { bytes },
        })
    }
}

/// The form of a [`Scheduler`].
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SchedulerForm {
    Other { nice: i8 },
    Batch { nice: i8 },
    Idle {},
    Fifo { priority: u8 },
}

impl Part for Scheduler {
    type Form = SchedulerForm;

    fn form(&self) -> SchedulerForm {
        match *self {
            Self::Other { nice } => SchedulerForm::Other { nice },
            Self::Batch { nice } => SchedulerForm::Batch { nice },
            Self::Idle => SchedulerForm::Idle {},
            Self::Fifo { priority } => SchedulerForm::Fifo { priority },
        }
    }

    fn of(form: SchedulerForm) -> Result<Self, Wrong> {
        Ok(match form {
            SchedulerForm::Other { nice } => Self::Other { nice },
            SchedulerForm::Batch { nice } => Self::Batch { nice },
            SchedulerForm::Idle {} => Self::Idle,
            SchedulerForm::Fifo { priority } => Self::Fifo { priority },
        })
    }
}

form! {
    PlacementForm of Placement {
        cpus: Vec<u32>,
        scheduler: Option<Scheduler>,
    }
}

form! {
    MirrorOptionsForm of MirrorOptions {
        placement: Placement,
        helper_image: Option<String>,
    }
}
