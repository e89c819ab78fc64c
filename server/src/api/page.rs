//! Pages of lists: order, `limit`, and a token that continues where the last page ended.
//!
//! The token holds the last item's place in the order (time or name, then id), so that a page stays right
//! when items come and go, and a MAC over it with collection, filters and order, so that it holds for them
//! alone and cannot be made up.

use std::fmt::Write as _;

use jiff::Timestamp;
pub use mirrorvm::host::lists::{Order, PageRequest, Place};
use ring::hmac;
use uuid::Uuid;

use crate::problem::ProblemError;

/// How many items a page has when the caller does not say.
pub const LIMIT_DEFAULT: usize = 100;
/// How many items a page has at most.
pub const LIMIT_MAX: usize = 1000;

const VERSION: u8 = 2;
const MAC_BYTES: usize = 16;
/// Version, MAC, id, and a key of 1 to 64 bytes.
const TOKEN_MIN: usize = 1 + MAC_BYTES + 16 + 1;
const TOKEN_MAX: usize = TOKEN_MIN + 64;

/// The order called `text`; `named` lists can be sorted by name, too.
pub fn order(text: &str, named: bool) -> Option<Order> {
    let (descending, field) = text.strip_prefix('-').map_or((false, text), |field| (true, field));
    match field {
        "created_at" => Some(Order { by_name: false, descending }),
        "name" if named => Some(Order { by_name: true, descending }),
        _ => None,
    }
}

/// The name that the API uses for an order.
pub const fn name_of(order: Order) -> &'static str {
    match (order.by_name, order.descending) {
        (false, false) => "created_at",
        (false, true) => "-created_at",
        (true, false) => "name",
        (true, true) => "-name",
    }
}

/// With it turned over, the bytes of times compare as the times do.
const SIGN: u128 = 1 << 127;

/// A place as it is in a token: its id, then its key.
fn written(place: &Place) -> Vec<u8> {
    let (id, key) = match place {
        Place::Created(at, id) => (id, ((at.as_nanosecond() as u128) ^ SIGN).to_be_bytes().to_vec()),
        Place::Named(name, id) => (id, name.as_bytes().to_vec()),
    };
    [id.as_bytes().as_slice(), &key].concat()
}

/// What was written of a place of this order.
fn read(order: Order, content: &[u8]) -> Option<Place> {
    let (id, key) = content.split_at_checked(16)?;
    let id = Uuid::from_slice(id).ok()?;
    if order.by_name {
        return Some(Place::Named(std::str::from_utf8(key).ok()?.into(), id));
    }
    let at = (u128::from_be_bytes(key.try_into().ok()?) ^ SIGN) as i128;
    Some(Place::Created(Timestamp::from_nanosecond(at).ok()?, id))
}

/// The collection with its filters, spelled out, and the key under which its tokens are made.
#[derive(Clone, Debug)]
pub struct Scope {
    key: hmac::Key,
    text: Vec<u8>,
}

impl Scope {
    /// A collection with filters as name and value; their order does not count.
    pub fn new(key: &hmac::Key, collection: &str, filters: &[(&str, &str)]) -> Self {
        let mut filters = filters.to_vec();
        filters.sort_unstable();
        let mut text = Vec::new();
        for part in [collection].into_iter().chain(filters.iter().flat_map(|(n, v)| [*n, *v])) {
            text.extend((part.len() as u64).to_le_bytes());
            text.extend(part.as_bytes());
        }
        Self { key: key.clone(), text }
    }

    fn mac(&self, order: Order, place: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&[VERSION]);
        context.update(&(self.text.len() as u64).to_le_bytes());
        context.update(&self.text);
        context.update(name_of(order).as_bytes());
        context.update(b"\0");
        context.update(place);
        context.sign()
    }

    /// The token that continues after `place`.
    pub fn token(&self, order: Order, place: &Place) -> String {
        let content = written(place);
        let mac = self.mac(order, &content);
        let bytes = [VERSION].into_iter().chain(mac.as_ref()[..MAC_BYTES].iter().copied()).chain(content);
        bytes.fold(String::new(), |mut text, byte| {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// The place in `token`.
    ///
    /// # Errors
    /// A problem with the parameter `page_token`.
    pub fn place(&self, order: Order, token: &str) -> Result<Place, Box<ProblemError>> {
        let bad = || {
            let detail = "this is not a token of this list with these filters and this order";
            Box::new(ProblemError::at_parameter("page_token", "invalid_page_token", detail))
        };
        let bytes = unhex(token).filter(|b| b[0] == VERSION).ok_or_else(bad)?;
        let (mac, content) = bytes[1..].split_at(MAC_BYTES);
        let wanted = self.mac(order, content);
        if !bool::from(subtle::ConstantTimeEq::ct_eq(mac, &wanted.as_ref()[..MAC_BYTES])) {
            return Err(bad());
        }
        read(order, content).ok_or_else(bad)
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !(TOKEN_MIN..=TOKEN_MAX).contains(&(text.len() / 2)) {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    text.as_bytes().chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// Cuts all the items of a short list to the page asked for; also gives the place to continue after, when
/// more follow.
pub fn cut<T>(items: Vec<T>, request: &PageRequest, place: impl Fn(&T) -> Place) -> (Vec<T>, Option<Place>) {
    let descending = request.order.descending;
    let mut placed: Vec<(Place, T)> = items.into_iter().map(|item| (place(&item), item)).collect();
    if let Some(after) = &request.after {
        placed.retain(|(place, _)| if descending { place < after } else { place > after });
    }
    placed.sort_by(|(a, _), (b, _)| if descending { b.cmp(a) } else { a.cmp(b) });
    let more = placed.len() > request.limit;
    placed.truncate(request.limit);
    let next = if more { placed.last().map(|(place, _)| place.clone()) } else { None };
    (placed.into_iter().map(|(_, item)| item).collect(), next)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ORDERS: [&str; 4] = ["created_at", "-created_at", "name", "-name"];

    fn key() -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &[7; 32])
    }

    fn item(n: u8) -> (Timestamp, String, Uuid) {
        let time = Timestamp::from_second(i64::from(n) / 3 - 5).unwrap();
        (time, format!("g{}", u32::from(n) * 7919 % 41), Uuid::from_u128(u128::from(n)))
    }

    proptest! {
        #[test]
        fn pages_put_together_are_the_list(count in 0u8..40, limit in 1usize..12, order in 0usize..4) {
            let order = super::order(ORDERS[order], true).unwrap();
            let scope = Scope::new(&key(), "guests", &[]);
            let place = |i: &(Timestamp, String, Uuid)| Place::of(order, i.0, &i.1, i.2);
            let all: Vec<_> = (0..count).map(item).collect();
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let (items, next) = cut(all.clone(), &PageRequest { limit, order, after }, place);
                seen.extend(items);
                match next {
                    Some(next) => after = Some(scope.place(order, &scope.token(order, &next)).unwrap()),
                    None => break,
                }
            }
            let mut wanted = all;
            wanted.sort_by(|a, b| if order.by_name { (&a.1, a.2).cmp(&(&b.1, b.2)) } else { (a.0, a.2).cmp(&(b.0, b.2)) });
            if order.descending {
                wanted.reverse();
            }
            prop_assert_eq!(seen, wanted);
        }

        #[test]
        fn any_text_is_refused(text in "\\PC{0,90}", hex in "02[0-9a-f]{96}") {
            let scope = Scope::new(&key(), "guests", &[]);
            prop_assert!(scope.place(Order::default(), &text).is_err());
            prop_assert!(scope.place(Order::default(), &hex).is_err());
        }
    }

    #[test]
    fn a_token_holds_for_its_list_filters_order_and_key_alone() {
        let order = Order::default();
        let (time, name, id) = item(7);
        let place = Place::of(order, time, &name, id);
        let filters = [("state", "failed"), ("guest", "g")];
        let token = Scope::new(&key(), "migrations", &filters).token(order, &place);
        let same = Scope::new(&key(), "migrations", &[("guest", "g"), ("state", "failed")]);
        assert_eq!(same.place(order, &token), Ok(place));
        assert!(same.place(Order { descending: true, by_name: false }, &token).is_err());
        let other_key = hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]);
        for other in [
            Scope::new(&key(), "migrations", &[("guest", "g")]),
            Scope::new(&key(), "mirrors", &filters),
            Scope::new(&other_key, "migrations", &filters),
        ] {
            assert_eq!(other.place(order, &token).unwrap_err().code, "invalid_page_token");
        }
    }
}
