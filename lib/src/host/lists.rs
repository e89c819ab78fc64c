//! Lists of a host's resources, page by page: in which order, after what, of which labels.
//!
//! Owns: orders, places in them, conditions on labels, putting a page together. Must not know: what is
//! listed, how callers ask.

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use super::Labels;

/// What a list is sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Whether to sort by name instead of by creation.
    pub by_name: bool,
    /// Whether the order is reversed.
    pub descending: bool,
}

/// An item's place in the order of a list. Places of one order compare as their items follow each other when
/// it is not reversed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// By when it was made, and by its id.
    Created(Timestamp, Uuid),
    /// By its name, and by its id.
    Named(Arc<str>, Uuid),
}

impl Place {
    /// The place of an item in a list of this order.
    pub fn of(order: Order, created_at: Timestamp, name: &str, id: Uuid) -> Self {
        if order.by_name { Self::Named(name.into(), id) } else { Self::Created(created_at, id) }
    }
}

/// What is asked of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// How many items the page may have.
    pub limit: usize,
    /// The order of the list.
    pub order: Order,
    /// The place that the page starts after; of the same order.
    pub after: Option<Place>,
}

/// A page, and the place to continue after when more follow.
pub type Page<T> = (Vec<T>, Option<Place>);

/// A condition on a resource's labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// The label that there must be.
    pub key: String,
    /// The value that it must have; `None`: any.
    pub value: Option<String>,
}

impl Selector {
    /// Whether `labels` meet the condition.
    pub fn holds(&self, labels: &Labels) -> bool {
        labels.get(&self.key).is_some_and(|v| self.value.as_ref().is_none_or(|wanted| wanted == v))
    }

    /// Whether `labels` meet all conditions.
    pub fn all_hold(all: &[Self], labels: &Labels) -> bool {
        all.iter().all(|s| s.holds(labels))
    }
}

/// Items looked at between two looks at what there is.
const CHUNK: usize = 128;

/// Puts a page together from what `chunk` gives: up to so many items that follow a place, in order. `look`
/// says how an item is shown, if it is one of the list. No lock that `chunk` takes is held while it does.
pub(super) fn page<T, R>(
    asked: &PageRequest,
    chunk: impl Fn(Option<&Place>, usize) -> Vec<(Place, T)>,
    mut look: impl FnMut(T) -> Option<R>,
) -> Page<R> {
    let (mut items, mut last) = (Vec::new(), None);
    let mut after = asked.after.clone();
    loop {
        // One more than fit: whether there is a next page.
        let room = (asked.limit + 1 - items.len()).max(CHUNK);
        let found = chunk(after.as_ref(), room);
        let ends = found.len() < room;
        for (place, item) in found {
            if items.len() == asked.limit {
                if look(item).is_some() {
                    return (items, last);
                }
            } else if let Some(shown) = look(item) {
                items.push(shown);
                last = Some(place.clone());
            }
            after = Some(place);
        }
        if ends {
            return (items, None);
        }
    }
}
