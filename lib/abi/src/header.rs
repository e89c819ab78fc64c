//! The first bytes of every helper image: who it is, what it needs, how it is entered.

use crate::record::Suite;
use crate::{u32_at, u64_at};

/// Marks a mirrorvm helper image: 1f3b8a52-6c0d-4e4b-9a2e-6d6972726f72, as bytes.
pub const GUID: [u8; 16] =
    [0x1f, 0x3b, 0x8a, 0x52, 0x6c, 0x0d, 0x4e, 0x4b, 0x9a, 0x2e, 0x6d, 0x69, 0x72, 0x72, 0x6f, 0x72];
/// Version of this header's layout.
pub const HEADER_VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 96;
/// Largest image file that is looked at.
pub const FILE_MAX: usize = 16 << 20;

/// A decoded header. All addresses are virtual, as linked; sections are page aligned and in this order:
/// text (with the header), read-only data, data, bss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Oldest [`crate::ABI_VERSION`] that the helper speaks.
    pub abi_min: u32,
    /// Newest one.
    pub abi_max: u32,
    /// [`crate::layout::LAYOUT_HASH`] of the build.
    pub layout_hash: u64,
    /// Where the image starts.
    pub base: u64,
    /// Where a worker starts: `rdi` = worker index, `rsp` = end of its area.
    pub entry: u64,
    /// End of what is executable.
    pub text_end: u64,
    /// End of read-only data.
    pub rodata_end: u64,
    /// End of the file's bytes.
    pub data_end: u64,
    /// End of zeroed data: the footprint.
    pub bss_end: u64,
    /// What it seals by: [`Suite::bit`]s. [`Suite::Aes256Gcm`] is always among them; bits of suites that this
    /// build does not know are none of its business.
    pub suites: u64,
}

/// Why bytes are no helper image that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Fewer bytes than a header.
    Short {
        /// Bytes there are.
        len: usize,
    },
    /// Another GUID: no helper image.
    NotAHelper,
    /// A header version that this build does not know.
    HeaderVersion {
        /// The version found.
        version: u32,
    },
    /// The helper does not speak this host's ABI.
    Abi {
        /// Oldest ABI the helper speaks.
        min: u32,
        /// Newest ABI the helper speaks.
        max: u32,
    },
    /// The helper is built for another address layout.
    Layout {
        /// Its layout hash.
        hash: u64,
    },
    /// An address in the header is unaligned, out of order or out of range.
    Section {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The helper lacks the suite that every helper has.
    Suites {
        /// Its word of suites.
        suites: u64,
    },
    /// The file does not end where the header says.
    FileLength {
        /// Bytes by the header.
        declared: u64,
        /// Bytes there are.
        actual: usize,
    },
}

impl core::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Short { len } => {
                write!(f, "{len} bytes are shorter than a helper header of {HEADER_BYTES}")
            }
            Self::NotAHelper => f.write_str("the GUID is not that of a mirrorvm helper"),
            Self::HeaderVersion { version } => write!(f, "header version {version} is not {HEADER_VERSION}"),
            Self::Abi { min, max } => {
                write!(f, "the helper speaks ABI {min} to {max}, this host {}", crate::ABI_VERSION)
            }
            Self::Layout { hash } => {
                write!(f, "layout hash {hash:#018x} is not {:#018x}", crate::layout::LAYOUT_HASH)
            }
            Self::Section { field, value } => write!(f, "header field {field} = {value:#x} is not possible"),
            Self::Suites { suites } => write!(f, "the helper's suites {suites:#x} lack AES-256-GCM"),
            Self::FileLength { declared, actual } => {
                write!(f, "the header declares {declared} bytes, the image has {actual}")
            }
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header {
    /// Reads and checks the header of a whole image file.
    ///
    /// # Errors
    /// [`HeaderError`] for the first thing that is wrong.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        if file.len() < HEADER_BYTES {
            return Err(HeaderError::Short { len: file.len() });
        }
        if file[..16] != GUID {
            return Err(HeaderError::NotAHelper);
        }
        let version = u32_at(file, 16);
        if version != HEADER_VERSION || u32_at(file, 20) as usize != HEADER_BYTES {
            return Err(HeaderError::HeaderVersion { version });
        }
        let header = Self {
            abi_min: u32_at(file, 24),
            abi_max: u32_at(file, 28),
            layout_hash: u64_at(file, 32),
            base: u64_at(file, 40),
            entry: u64_at(file, 48),
            text_end: u64_at(file, 56),
            rodata_end: u64_at(file, 64),
            data_end: u64_at(file, 72),
            bss_end: u64_at(file, 80),
            suites: u64_at(file, 88),
        };
        header.check(file)?;
        Ok(header)
    }

    /// Bytes of memory the image takes, bss included.
    pub const fn footprint(&self) -> u64 {
        self.bss_end - self.base
    }

    /// Whether the helper seals by `suite`.
    pub const fn has(&self, suite: Suite) -> bool {
        self.suites & suite.bit() != 0
    }

    fn check(&self, file: &[u8]) -> Result<(), HeaderError> {
        if self.abi_min > self.abi_max || !(self.abi_min..=self.abi_max).contains(&crate::ABI_VERSION) {
            return Err(HeaderError::Abi { min: self.abi_min, max: self.abi_max });
        }
        if self.layout_hash != crate::layout::LAYOUT_HASH {
            return Err(HeaderError::Layout { hash: self.layout_hash });
        }
        if self.base != crate::layout::IMAGE_VA {
            return Err(HeaderError::Section { field: "base", value: self.base });
        }
        let end = self.base + crate::layout::IMAGE_MAX;
        let mut last = self.base;
        let sections = [
            ("text_end", self.text_end),
            ("rodata_end", self.rodata_end),
            ("data_end", self.data_end),
            ("bss_end", self.bss_end),
        ];
        for (field, value) in sections {
            if value < last || value > end || value % crate::PAGE_BYTES as u64 != 0 {
                return Err(HeaderError::Section { field, value });
            }
            last = value;
        }
        if self.entry < self.base + HEADER_BYTES as u64 || self.entry >= self.text_end {
            return Err(HeaderError::Section { field: "entry", value: self.entry });
        }
        if !self.has(Suite::Aes256Gcm) {
            return Err(HeaderError::Suites { suites: self.suites });
        }
        let declared = self.data_end - self.base;
        if declared != file.len() as u64 {
            return Err(HeaderError::FileLength { declared, actual: file.len() });
        }
        Ok(())
    }
}
