//! What a host lets an address space look like.

use serde::{Deserialize, Serialize};

/// Limits of a host that a plan must respect. Read from CPUID and KVM by `hypervisor`, or given by a caller
/// who plans for another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// MAXPHYADDR: physical address bits (CPUID 0x8000_0008 EAX\[7:0\]); 36 to 52.
    pub max_phys_bits: u8,
    /// Position of the C-bit (CPUID 0x8000_001F EBX\[5:0\]); `None` without SEV.
    pub c_bit: Option<u8>,
    /// Physical address bits lost to memory encryption (CPUID 0x8000_001F EBX\[11:6\]); 0 without SEV.
    pub phys_bit_reduction: u8,
    /// Memory slots one VM may have (KVM_CAP_NR_MEMSLOTS).
    pub slot_budget: u32,
    /// Whether a guest may use 1 GiB pages (CPUID 0x8000_0001 EDX\[26\]).
    pub gib_pages: bool,
}

impl HostLimits {
    /// The first guest-physical address that cannot be used: 2^(MAXPHYADDR - reduction).
    pub const fn phys_limit(&self) -> u64 {
        1 << self.usable_bits()
    }

    /// The `max-phys` shift: the upper half of the usable space.
    pub const fn max_phys_shift(&self) -> u64 {
        1 << (self.usable_bits() - 1)
    }

    /// The C-bit as a mask, 0 without one.
    pub const fn c_bit_mask(&self) -> u64 {
        match self.c_bit {
            Some(bit) if bit < 64 => 1 << bit,
            _ => 0,
        }
    }

    // Clamped, so that limits given by a caller cannot make a shift overflow: [33, 52] keeps the bottom
    // 4 GiB addressable and is what an x86 page-table entry can hold.
    const fn usable_bits(&self) -> u32 {
        let bits = self.max_phys_bits.saturating_sub(self.phys_bit_reduction) as u32;
        if bits < 33 {
            33
        } else if bits > 52 {
            52
        } else {
            bits
        }
    }
}
