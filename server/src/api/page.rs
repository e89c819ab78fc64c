//! Pages of lists: `limit`, and a token that continues where the last page ended.
//!
//! The token holds the last item's place in the order (creation time, then id), so that a page stays right when
//! items come and go; and a digest of collection and filters, so that it cannot be used with others.

use std::fmt::Write as _;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::problem::ProblemError;

/// Items of a page when the caller does not say.
pub const LIMIT_DEFAULT: usize = 100;
/// Most items of a page.
pub const LIMIT_MAX: usize = 1000;

const VERSION: u8 = 1;
const TOKEN_BYTES: usize = 1 + 8 + 16 + 16;

/// An item's place in the order of a list.
pub type Place = (Timestamp, Uuid);

/// Which page is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Most items.
    pub limit: usize,
    /// The place that the page starts after.
    pub after: Option<Place>,
}

/// The collection and its filters, spelled out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope([u8; 8]);

impl Scope {
    /// A collection with filters as name and value; their order does not count.
    pub fn new(collection: &str, filters: &[(&str, &str)]) -> Self {
        let mut filters = filters.to_vec();
        filters.sort_unstable();
        let mut hash = Sha256::new();
        for part in [collection].into_iter().chain(filters.iter().flat_map(|(n, v)| [*n, *v])) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let digest = hash.finalize();
        let mut scope = [0; 8];
        scope.copy_from_slice(&digest[..8]);
        Self(scope)
    }

    /// The token that continues after `place`.
    pub fn token(&self, (time, id): Place) -> String {
        let mut bytes = vec![VERSION];
        bytes.extend(self.0);
        bytes.extend(time.as_nanosecond().to_be_bytes());
        bytes.extend(id.as_bytes());
        bytes.iter().fold(String::with_capacity(2 * TOKEN_BYTES), |mut text, byte| {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// The place in `token`.
    ///
    /// # Errors
    /// A problem with the parameter `page_token`.
    pub fn place(&self, token: &str) -> Result<Place, Box<ProblemError>> {
        let bad =
            |detail: &str| Box::new(ProblemError::at_parameter("page_token", "invalid_page_token", detail));
        let bytes = unhex(token).ok_or_else(|| bad("this is not a token of this API"))?;
        if bytes[0] != VERSION {
            return Err(bad("this is not a token of this API"));
        }
        if bytes[1..9] != self.0 {
            return Err(bad("the token belongs to another list or other filters"));
        }
        let (mut nanos, mut id) = ([0; 16], [0; 16]);
        nanos.copy_from_slice(&bytes[9..25]);
        id.copy_from_slice(&bytes[25..41]);
        let time = Timestamp::from_nanosecond(i128::from_be_bytes(nanos))
            .map_err(|_| bad("this is not a token of this API"))?;
        Ok((time, Uuid::from_bytes(id)))
    }
}

fn unhex(text: &str) -> Option<[u8; TOKEN_BYTES]> {
    if text.len() != 2 * TOKEN_BYTES {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let mut bytes = [0; TOKEN_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Cuts `items` to the page asked for; also gives the place to continue after, when more follow.
pub fn cut<T>(
    mut items: Vec<T>,
    request: &PageRequest,
    place: impl Fn(&T) -> Place,
) -> (Vec<T>, Option<Place>) {
    items.sort_by_key(&place);
    if let Some(after) = request.after {
        items.retain(|item| place(item) > after);
    }
    let more = items.len() > request.limit;
    items.truncate(request.limit);
    let next = more.then(|| items.last().map(&place)).flatten();
    (items, next)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(n: u8) -> Place {
        (Timestamp::from_second(i64::from(n) / 3).unwrap(), Uuid::from_u128(u128::from(n)))
    }

    proptest! {
        #[test]
        fn pages_put_together_are_the_list(count in 0u8..40, limit in 1usize..12) {
            let scope = Scope::new("guests", &[]);
            let all: Vec<Place> = (0..count).map(place).collect();
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let (items, next) = cut(all.clone(), &PageRequest { limit, after }, |p| *p);
                seen.extend(items);
                match next {
                    Some(next) => after = Some(scope.place(&scope.token(next)).unwrap()),
                    None => break,
                }
            }
            prop_assert_eq!(seen, all);
        }

        #[test]
        fn any_text_is_a_token_or_a_problem(text in "\\PC{0,90}", hex in "[0-9a-f]{82}") {
            let scope = Scope::new("guests", &[]);
            prop_assert!(scope.place(&text).is_err());
            let _ = scope.place(&hex);
        }
    }

    #[test]
    fn a_token_holds_for_its_list_and_filters_alone() {
        let token = Scope::new("migrations", &[("state", "failed"), ("guest", "g")]).token(place(7));
        let same = Scope::new("migrations", &[("guest", "g"), ("state", "failed")]);
        assert_eq!(same.place(&token), Ok(place(7)));
        for other in [Scope::new("migrations", &[("guest", "g")]), Scope::new("mirrors", &[])] {
            assert_eq!(other.place(&token).unwrap_err().code, "invalid_page_token");
        }
    }
}
