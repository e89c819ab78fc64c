//! Walking over groups of sealed pages that lie one behind the other.
//!
//! Owns: where one ends and the next begins. Must not know: where they lie, what is in them, how many are
//! wanted. What is walked over is anybody's bytes.

use mirrorvm_abi::record::{Front, Listed};

/// A group of sealed pages among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedGroup {
    /// Bytes of it, header and list included.
    pub bytes: usize,
    /// Its pages, as the helper calls them.
    pub pages: Vec<Listed>,
}

/// The groups that fill `bytes`, each or where one was to begin and none does that ends within them.
pub(crate) fn groups(bytes: &[u8]) -> impl Iterator<Item = Result<SealedGroup, usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
        let front = Front::read(rest).map(|front| (front, front.group_bytes()));
        let Some((front, len)) = front.filter(|(_, len)| *len <= rest.len()) else {
            let bad = at;
            at = bytes.len();
            return Some(Err(bad));
        };
        at += len;
        Some(Ok(SealedGroup { bytes: len, pages: front.pages().collect() }))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use mirrorvm_abi::record::{Header, Kind, Suite, TAG_BYTES};
    use proptest::prelude::*;

    use super::*;

    /// A group of these pages on stream 3 with its bytes of ciphertext and tags all alike.
    pub fn group(pages: &[Listed]) -> Vec<u8> {
        let header = Header {
            kind: Kind::Pages,
            suite: Suite::Aes256Gcm,
            stream: 3,
            count: pages.len() as u16,
            epoch: 9,
            sequence: 0,
            random: [6; 24],
        };
        let mut bytes = header.encode().to_vec();
        pages.iter().for_each(|p| bytes.extend(p.encode()));
        let sealed = pages.iter().map(|p| p.body_bytes() + TAG_BYTES).sum::<usize>();
        bytes.resize(bytes.len() + sealed, 0x5a);
        bytes
    }

    const fn listed(page: u64, zero: bool) -> Listed {
        Listed { page, zero }
    }

    #[test]
    fn a_group_is_as_long_as_its_list_says_and_none_goes_beyond_the_end() {
        let (one, two) = ([listed(7, true)], [listed(1, false), listed(2, true)]);
        let both = [group(&one), group(&two)].concat();
        let found: Vec<_> = groups(&both).map(Result::unwrap).collect();
        assert_eq!(found[0], SealedGroup { bytes: 48 + 8 + 16, pages: one.to_vec() });
        assert_eq!(found[1], SealedGroup { bytes: 48 + 16 + 4096 + 32, pages: two.to_vec() });
        assert_eq!(found.len(), 2);
        assert_eq!(groups(&both[..both.len() - 1]).last(), Some(Err(72)), "the second one is cut off");
        assert_eq!(groups(&[&both[..], &[0]].concat()).last(), Some(Err(both.len())));
        assert_eq!(groups(&[]).next(), None);
        // A token is no group of pages.
        let mut token = both.clone();
        token[0] = Kind::Commit as u8;
        assert_eq!(groups(&token).collect::<Vec<_>>(), [Err(0)]);
    }

    proptest! {
        #[test]
        fn groups_of_any_bytes_lie_within_them(
            bytes in prop::collection::vec(any::<u8>(), 0..9000), zero in prop::collection::vec(any::<bool>(), 1..9),
        ) {
            let pages: Vec<_> = zero.iter().map(|zero| listed(5, *zero)).collect();
            for bytes in [bytes.clone(), [group(&pages), bytes].concat()] {
                let mut sum = 0;
                let mut sound = true;
                for found in groups(&bytes) {
                    match found {
                        Ok(group) => sum += group.bytes,
                        Err(at) => (sound, sum) = (false, sum.max(at)),
                    }
                }
                let within = if sound { sum == bytes.len() } else { sum < bytes.len() };
                prop_assert!(within);
            }
        }
    }
}
