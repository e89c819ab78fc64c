//! What a guest's owner demands to know of another platform before the guest's pages leave for it.
//!
//! Owns: the form of these demands in a definition, their bounds, and what they come to for one launch. Must
//! not know: how evidence is checked (the helper does), hosts, drivers.

use std::fmt;
use std::str::FromStr;

use mirrorvm_abi::evidence::{KEY_BYTES, LAUNCH_DIGEST_BYTES, RELEASE_KEYS, RELEASE_LAUNCHES, Release};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::sev::modelled_chip;

/// How many platforms' keys may be named.
pub const PLATFORMS: std::ops::RangeInclusive<u64> = 1..=RELEASE_KEYS as u64;
/// How many launch digests may be named.
pub const LAUNCHES: std::ops::RangeInclusive<u64> = 1..=RELEASE_LAUNCHES as u64;

/// So many bytes, told as hexadecimal digits in lower case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is not so many hexadecimal digits in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be {0} hexadecimal digits in lower case")]
pub struct NotHex(pub usize);

impl<const N: usize> FromStr for Hex<N> {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Self, NotHex> {
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let bad = NotHex(2 * N);
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(bad) };
        let mut bytes = [0; N];
        if pairs.len() != N {
            return Err(bad);
        }
        for (to, [high, low]) in bytes.iter_mut().zip(pairs) {
            *to = digit(*high).ok_or(bad)? << 4 | digit(*low).ok_or(bad)?;
        }
        Ok(Self(bytes))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What is demanded of a destination before pages leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttestationSpec {
    /// Whether evidence is demanded at all.
    pub demanded: bool,
    /// Public keys on P-384 (x, then y, big-endian) of which one must have signed the certificate of the
    /// destination's PEK: keys of chips (CEK) that the owner has checked against AMD's certificates himself,
    /// or an owner's (OCA). `None`: the modelled chip's, at level `modelled`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platforms: Option<Vec<Hex<KEY_BYTES>>>,
    /// Launch digests of which the destination's guest must have one. `None`: that of a guest of the same
    /// definition which waits for pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launches: Option<Vec<Hex<LAUNCH_DIGEST_BYTES>>>,
}

impl AttestationSpec {
    /// What is demanded where nobody said anything. A real platform's keys nobody can guess.
    pub const fn default_at(modelled: bool) -> Self {
        Self { demanded: modelled, platforms: None, launches: None }
    }

    /// What it comes to for a guest whose like is launched as `arrival` where it waits for pages; `None` for
    /// a demand that names no platform, where none is known without being named, or too much.
    pub fn release(&self, modelled: bool, arrival: [u8; LAUNCH_DIGEST_BYTES]) -> Option<Release> {
        if !self.demanded {
            return Some(Release::NOT_DEMANDED);
        }
        let keys: Vec<_> = match &self.platforms {
            Some(named) => named.iter().map(|key| key.0).collect(),
            None if modelled => vec![modelled_chip()],
            None => return None,
        };
        let launches: Vec<_> = match &self.launches {
            Some(named) => named.iter().map(|digest| digest.0).collect(),
            None => vec![arrival],
        };
        Release::demanded(&keys, &launches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_as_digits_and_nothing_else_is_read() {
        let hex = Hex([0x00, 0x9a, 0xff]);
        assert_eq!(hex.to_string(), "009aff");
        assert_eq!("009aff".parse(), Ok(hex));
        for bad in ["", "009af", "009aff0", "009AFF", "009aff00", "+09aff", "0 9aff", "\u{e9}9af"] {
            assert_eq!(bad.parse::<Hex<3>>(), Err(NotHex(6)), "{bad}");
        }
    }

    #[test]
    fn a_demand_names_platforms_or_is_of_the_model() {
        let named = |platforms: Option<usize>, launches: Option<usize>| AttestationSpec {
            demanded: true,
            platforms: platforms.map(|n| vec![Hex([1; KEY_BYTES]); n]),
            launches: launches.map(|n| vec![Hex([2; LAUNCH_DIGEST_BYTES]); n]),
        };
        let default = named(None, None).release(true, [3; 32]).unwrap();
        assert_eq!((default.keys(), default.launches()), (&[modelled_chip()][..], &[[3; 32]][..]));
        let both = named(Some(4), Some(4)).release(false, [3; 32]).unwrap();
        assert_eq!((both.keys(), both.launches()), (&[[1; KEY_BYTES]; 4][..], &[[2; 32]; 4][..]));
        for bad in [named(None, None), named(Some(0), None), named(Some(5), None), named(Some(1), Some(5))] {
            assert_eq!(bad.release(false, [3; 32]), None, "{bad:?}");
        }
        for modelled in [true, false] {
            let default = AttestationSpec::default_at(modelled);
            assert_eq!(default.release(modelled, [3; 32]).map(|r| r.is_demanded()), Some(modelled));
        }
    }
}
