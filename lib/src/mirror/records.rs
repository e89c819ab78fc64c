//! Walking over sealed records that lie one behind the other.
//!
//! Owns: where one ends and the next begins. Must not know: where they lie, what is in them, how many are
//! wanted. What is walked over is anybody's bytes.

use mirrorvm_abi::record::{HEADER_BYTES, Header, TAG_BYTES};

/// Bytes of the record with this header.
pub fn record_bytes(header: &Header) -> usize {
    HEADER_BYTES + header.kind.body_bytes() + TAG_BYTES
}

/// A place among records: the beginning of one, or the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    at: usize,
    len: usize,
}

impl Walk {
    /// At the beginning of `len` bytes.
    pub const fn over(len: usize) -> Self {
        Self { at: 0, len }
    }

    /// Where the next record is to begin, counted from the first one's beginning.
    pub const fn at(&self) -> usize {
        self.at
    }

    /// Whether nothing follows.
    pub const fn is_over(&self) -> bool {
        self.at == self.len
    }

    /// Whether there is room for a header.
    pub const fn has_header(&self) -> bool {
        self.len - self.at >= HEADER_BYTES
    }

    /// Steps over the record that begins with these bytes. `None`: none does that would end within what there
    /// is; the place is as before then.
    pub fn step(&mut self, raw: &[u8; HEADER_BYTES]) -> Option<Header> {
        let header = Header::decode(raw)?;
        let end = self.at.checked_add(record_bytes(&header)).filter(|end| *end <= self.len)?;
        self.at = end;
        Some(header)
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm_abi::record::Kind;
    use proptest::prelude::*;

    use super::*;

    fn header(kind: Kind) -> [u8; HEADER_BYTES] {
        let len = kind.body_bytes() as u32;
        Header { kind, stream: 1, epoch: 1, sequence: 0, page: 7, len }.encode()
    }

    #[test]
    fn a_record_is_as_long_as_its_kind_says_and_none_goes_beyond_the_end() {
        let (zero, commit) = (header(Kind::ZeroPage), header(Kind::Commit));
        let both = HEADER_BYTES + TAG_BYTES + HEADER_BYTES + 96 + TAG_BYTES;
        let mut walk = Walk::over(both);
        assert_eq!(walk.step(&zero).map(|h| h.kind), Some(Kind::ZeroPage));
        assert_eq!((walk.at(), walk.has_header(), walk.is_over()), (48, true, false));
        assert!(walk.step(&header(Kind::Page)).is_none(), "a page is longer than what is left");
        assert!(walk.step(&[0; HEADER_BYTES]).is_none());
        assert_eq!(walk.at(), 48);
        assert!(walk.step(&commit).is_some() && walk.is_over() && !walk.has_header());
        assert!(walk.step(&zero).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_lead_beyond_the_end(len in 0usize..9000, raw in prop::array::uniform32(any::<u8>())) {
            let mut walk = Walk::over(len);
            while walk.has_header() && walk.step(&raw).is_some() {}
            prop_assert!(walk.at() <= len);
        }
    }
}
