//! Owns the reading of `x-query-ramblock`, QEMU's list of RAM blocks. Pure text in, values out; must not know
//! where the text came from.
//!
//! Two shapes exist. 7.2 prints `name psize offset used total`; from 8.1 on (read on 10.0.2) two columns
//! follow, the host virtual address and `ro`/`rw`. Columns are found by what they look like, not by where
//! they stand.

use thiserror::Error;

/// More blocks than any machine we start has; a longer list is refused.
const MAX_BLOCKS: usize = 1024;

/// One RAM block as QEMU lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuRamBlock {
    /// QEMU's `idstr`, for our guest RAM the id of the memory backend.
    pub name: String,
    /// Page size of the backing, in bytes.
    pub page_size: u64,
    /// `ram_addr_t` of the block's first byte.
    pub offset: u64,
    /// How many bytes of the block are in use.
    pub used_length: u64,
    /// Bytes the block may grow to; at least `used_length`.
    pub total_length: u64,
    /// Whether QEMU maps it read-only for the guest; `None` where this QEMU does not say (7.2).
    pub read_only: Option<bool>,
}

/// QEMU's account of guest RAM could not be believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A line of the block table is not a block.
    #[error("line {line} of the ram block table is not a block")]
    BadBlock {
        /// Line number, from 1.
        line: usize,
    },
    /// A line of the flat view is not a range.
    #[error("line {line} of the flat view is not a range")]
    BadRange {
        /// Line number, from 1.
        line: usize,
    },
    /// The table or view is longer than any machine of ours can produce.
    #[error("more than {limit} entries in qemu's ram layout")]
    TooMany {
        /// The limit that was passed.
        limit: usize,
    },
    /// The memory backend is not in the block table, or has another size.
    #[error("no ram block {name} of {bytes} bytes")]
    NoBlock {
        /// The name that was looked for.
        name: &'static str,
        /// Length expected, in bytes.
        bytes: u64,
    },
    /// There is no flat view of the address space `memory`.
    #[error("no flat view of the address space \"memory\"")]
    NoView,
    /// A piece reaches past the end of its block.
    #[error("piece at {gpa:#x} takes {len:#x} bytes at {offset:#x} of a block of {block_len:#x}")]
    OutsideBlock {
        /// Guest physical address of the piece.
        gpa: u64,
        /// Offset into the block.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Length of the block in bytes.
        block_len: u64,
    },
    /// Ranges are not in rising order, so two of them may overlap.
    #[error("range at {gpa:#x} does not come after the one before it")]
    Disorder {
        /// Start of the offending range.
        gpa: u64,
    },
}

/// Parses the table.
///
/// # Errors
/// [`LayoutError::BadBlock`] at the first line that is neither blank, the heading, nor a block whose numbers
/// are consistent; [`LayoutError::TooMany`].
pub fn parse_ram_blocks(text: &str) -> Result<Vec<QemuRamBlock>, LayoutError> {
    let mut blocks = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with("Block Name") {
            continue;
        }
        if blocks.len() == MAX_BLOCKS {
            return Err(LayoutError::TooMany { limit: MAX_BLOCKS });
        }
        blocks.push(parse_block(trimmed).ok_or(LayoutError::BadBlock { line: index + 1 })?);
    }
    Ok(blocks)
}

fn parse_block(line: &str) -> Option<QemuRamBlock> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let read_only = match words.last().copied() {
        Some("ro") => Some(true),
        Some("rw") => Some(false),
        _ => None,
    };
    if read_only.is_some() {
        words.pop();
    }
    // `name size unit`, then three or four (host address) hexadecimal numbers.
    let (name, size, unit, numbers) = match words.as_slice() {
        [name, size, unit, numbers @ ..] if (3..=4).contains(&numbers.len()) => {
            (*name, *size, *unit, numbers)
        }
        _ => return None,
    };
    let block = QemuRamBlock {
        name: name.to_owned(),
        page_size: size.parse::<u64>().ok()?.checked_mul(unit_bytes(unit)?)?,
        offset: hex(numbers.first()?)?,
        used_length: hex(numbers.get(1)?)?,
        total_length: hex(numbers.get(2)?)?,
        read_only,
    };
    block.offset.checked_add(block.total_length)?;
    (block.used_length <= block.total_length && block.page_size.is_power_of_two()).then_some(block)
}

/// The units `size_to_str` (QEMU util/cutils.c) prints for a page size.
fn unit_bytes(unit: &str) -> Option<u64> {
    match unit {
        "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    }
}

fn hex(word: &str) -> Option<u64> {
    let digits = word.strip_prefix("0x")?;
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V7: &str = include_str!("testdata/ramblock-7.2-pc-booted.txt");
    const V10: &str = include_str!("testdata/ramblock-10.0-pc-booted.txt");
    const Q35: &str = include_str!("testdata/ramblock-7.2-q35-booted.txt");

    #[test]
    fn reads_the_table_of_7_2() {
        let blocks = parse_ram_blocks(V7).unwrap();
        assert_eq!(blocks.len(), 6);
        assert_eq!(
            blocks[0],
            QemuRamBlock {
                name: "ram0".to_owned(),
                page_size: 4096,
                offset: 0,
                used_length: 256 << 20,
                total_length: 256 << 20,
                read_only: None,
            }
        );
        assert_eq!(blocks[1].name, "/rom@etc/acpi/tables");
        assert_eq!((blocks[1].used_length, blocks[1].total_length), (0x20000, 0x20_0000));
        assert_eq!(parse_ram_blocks(Q35).unwrap(), blocks);
    }

    #[test]
    fn reads_the_table_of_10_0() {
        let blocks = parse_ram_blocks(V10).unwrap();
        let flags: Vec<_> = blocks.iter().map(|block| block.read_only).collect();
        assert_eq!(flags, [Some(false), Some(true), Some(true), Some(true), Some(true), Some(true)]);
        let old = parse_ram_blocks(V7).unwrap();
        for (new, old) in blocks.iter().zip(&old) {
            assert_eq!((&new.name, new.offset, new.used_length), (&old.name, old.offset, old.used_length));
        }
    }

    #[test]
    fn refuses_lies() {
        for bad in [
            "ram0 4 KiB 0x0 0x2000 0x1000",
            "ram0 4 KiB 0xffffffffffffffff 0x1000 0x1000",
            "ram0 3 KiB 0x0 0x1000 0x1000",
            "ram0 99999999999999999999 KiB 0x0 0x1000 0x1000",
            "ram0 4 KiB 0x0 0x+1 0x1000",
            "ram0 4 KiB 0x0 0x1000",
            "ram0 4 KiB 0x0 0x1000 0x1000 0x1 0x2",
            "ram0",
        ] {
            assert_eq!(parse_ram_blocks(bad), Err(LayoutError::BadBlock { line: 1 }), "{bad}");
        }
        let many = "a 4 KiB 0x0 0x1000 0x1000\n".repeat(MAX_BLOCKS + 1);
        assert_eq!(parse_ram_blocks(&many), Err(LayoutError::TooMany { limit: MAX_BLOCKS }));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,400}") {
            let _ = parse_ram_blocks(&text);
        }

        #[test]
        fn never_panics_near_the_truth(at in 0..V10.len(), with in "[ -~\\n]{0,8}", cut in 0usize..16) {
            let mut bytes = V10.as_bytes().to_vec();
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, with.bytes());
            let _ = parse_ram_blocks(&String::from_utf8_lossy(&bytes));
        }
    }
}
