//! A guest's RAM on disk: its blocks as they were asked for and as they lie, what they are backed by.

use crate::addr::{Gpa, RamAddr};
use crate::address_space::{BlockRole, BlockSpec, GuestLayout, Plug, RamBlock};
use crate::memory::Backing;
use crate::store::form::{Part, Wrong, form, words};

words! {
    BackingForm of Backing {
        Anonymous = "anonymous",
        Memfd = "memfd",
        Hugetlb = "hugetlb",
    }
}

words! {
    RoleForm of BlockRole {
        Ram = "ram",
        Vmsa = "vmsa",
        Helper = "helper",
    }
}

form! {
    BlockSpecForm of BlockSpec {
        name: String,
        size_bytes: u64,
        gpa: Option<Gpa>,
    }
}

form! {
    PlugForm of Plug {
        offset: u64,
        gpa: Gpa,
        len: u64,
    }
}

form! {
    BlockForm of RamBlock {
        name: String,
        ram_addr: RamAddr,
        size: u64,
        role: BlockRole,
        plugs: Vec<Plug>,
    }
}

/// The blocks; what of them lies where is found again.
impl Part for GuestLayout {
    type Form = Vec<BlockForm>;

    fn form(&self) -> Self::Form {
        self.blocks().iter().map(RamBlock::form).collect()
    }

    fn of(form: Self::Form) -> Result<Self, Wrong> {
        Self::try_from(Vec::of(form)?).map_err(Wrong::new)
    }
}

impl Part for Gpa {
    type Form = u64;

    fn form(&self) -> u64 {
        self.get()
    }

    fn of(form: u64) -> Result<Self, Wrong> {
        Ok(Self::new(form))
    }
}

impl Part for RamAddr {
    type Form = u64;

    fn form(&self) -> u64 {
        self.get()
    }

    fn of(form: u64) -> Result<Self, Wrong> {
        Ok(Self::new(form))
    }
}
