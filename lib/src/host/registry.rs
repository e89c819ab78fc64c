//! What a host holds many of: found by id and by name, and page by page in every order that lists have, all
//! of it or what has something in common.
//!
//! Owns: that all ways lead to the same entries. Must not know: who may add or remove one. Id, name and time
//! of creation are an entry's for life; names are unique where there are any: whoever inserts has looked
//! under the same lock. By what else an entry is found ([`Facet`]) may change: whoever changes it calls
//! [`Registry::refresh`].

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::host::Labels;
use crate::host::lists::{Order, Place, Selector};

/// Something that entries have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::host) enum Facet {
    /// Their state, by its name.
    State(&'static str),
    /// Whom they belong to.
    Guest(Uuid),
    /// The same by name.
    GuestName(Arc<str>),
    /// A label.
    Label(Arc<str>),
    /// A label and its value.
    LabelIs(Arc<str>, Arc<str>),
}

impl Facet {
    /// Whether there is one of each group among those that something has.
    pub fn are_of_each(has: &[Self], groups: &[Vec<Self>]) -> bool {
        groups.iter().all(|group| group.iter().any(|facet| has.contains(facet)))
    }

    /// Those of labels: by key, and by key and value.
    pub fn of_labels(labels: &Labels) -> impl Iterator<Item = Self> {
        labels.iter().flat_map(|(key, value)| {
            let key = Arc::<str>::from(key.as_str());
            [Self::Label(Arc::clone(&key)), Self::LabelIs(key, value.as_str().into())]
        })
    }
}

impl From<&Selector> for Facet {
    /// What all that meet the condition have.
    fn from(selector: &Selector) -> Self {
        let key = selector.key.as_str().into();
        match &selector.value {
            Some(value) => Self::LabelIs(key, value.as_str().into()),
            None => Self::Label(key),
        }
    }
}

/// What a registry holds.
pub(in crate::host) trait Listed {
    fn id(&self) -> Uuid;
    /// Its name; `None`: it is of a kind that has none.
    fn name(&self) -> Option<Arc<str>>;
    fn created_at(&self) -> Timestamp;
    /// What it is found by, as it is now.
    fn facets(&self) -> Vec<Facet>;
}

/// Entries in the orders that lists have.
struct Orders<T> {
    created: BTreeMap<(Timestamp, Uuid), Arc<T>>,
    named: BTreeMap<(Arc<str>, Uuid), Arc<T>>,
}

impl<T> Default for Orders<T> {
    fn default() -> Self {
        Self { created: BTreeMap::new(), named: BTreeMap::new() }
    }
}

impl<T: Listed> Orders<T> {
    fn insert(&mut self, key: &Key, entry: &Arc<T>) {
        self.created.insert((key.created_at, key.id), Arc::clone(entry));
        if let Some(name) = &key.name {
            self.named.insert((Arc::clone(name), key.id), Arc::clone(entry));
        }
    }

    fn remove(&mut self, key: &Key) {
        self.created.remove(&(key.created_at, key.id));
        if let Some(name) = &key.name {
            self.named.remove(&(Arc::clone(name), key.id));
        }
    }

    fn named(&self, name: &str) -> Option<&Arc<T>> {
        let first = (Arc::<str>::from(name), Uuid::nil());
        self.named.range(first..).next().filter(|((found, _), _)| **found == *name).map(|(_, entry)| entry)
    }

    /// Up to `most` entries that follow a place.
    fn after(&self, order: Order, after: Option<&Place>, most: usize) -> Vec<(Place, Arc<T>)> {
        let created = |(at, id): &(Timestamp, Uuid)| Place::Created(*at, *id);
        let named = |(name, id): &(Arc<str>, Uuid)| Place::Named(Arc::clone(name), *id);
        // A place of another order is none of this: the list from its beginning.
        if order.by_name {
            let after = match after {
                Some(Place::Named(name, id)) => Some((Arc::clone(name), *id)),
                Some(Place::Created(..)) | None => None,
            };
            following(&self.named, order, after, most, named)
        } else {
            let after = match after {
                Some(Place::Created(at, id)) => Some((*at, *id)),
                Some(Place::Named(..)) | None => None,
            };
            following(&self.created, order, after, most, created)
        }
    }
}

fn following<K: Ord, T>(
    map: &BTreeMap<K, Arc<T>>,
    order: Order,
    after: Option<K>,
    most: usize,
    place: impl Fn(&K) -> Place,
) -> Vec<(Place, Arc<T>)> {
    let end = after.map_or(Bound::Unbounded, Bound::Excluded);
    let shown = |(key, entry): (&K, &Arc<T>)| (place(key), Arc::clone(entry));
    if order.descending {
        map.range((Bound::Unbounded, end)).rev().take(most).map(shown).collect()
    } else {
        map.range((end, Bound::Unbounded)).take(most).map(shown).collect()
    }
}

/// What of an entry stays.
#[derive(Clone)]
struct Key {
    id: Uuid,
    name: Option<Arc<str>>,
    created_at: Timestamp,
}

impl Key {
    fn of<T: Listed>(entry: &T) -> Self {
        Self { id: entry.id(), name: entry.name(), created_at: entry.created_at() }
    }
}

/// An entry, and what it is found by at the moment.
struct Slot<T> {
    entry: Arc<T>,
    facets: Box<[Facet]>,
}

/// Entries by id, by name, and in order.
pub(in crate::host) struct Registry<T> {
    by_id: HashMap<Uuid, Slot<T>>,
    all: Orders<T>,
    by_facet: HashMap<Facet, Orders<T>>,
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self { by_id: HashMap::new(), all: Orders::default(), by_facet: HashMap::new() }
    }
}

impl<T: Listed> Registry<T> {
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// All by creation.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &Arc<T>> {
        self.all.created.values()
    }

    pub fn get(&self, id: &Uuid) -> Option<&Arc<T>> {
        self.by_id.get(id).map(|slot| &slot.entry)
    }

    pub fn contains_key(&self, id: &Uuid) -> bool {
        self.by_id.contains_key(id)
    }

    pub fn named(&self, name: &str) -> Option<&Arc<T>> {
        self.all.named(name)
    }

    /// How many have something in common.
    pub fn count(&self, facet: &Facet) -> usize {
        self.by_facet.get(facet).map_or(0, |orders| orders.created.len())
    }

    /// All that have something in common, by creation.
    pub fn having<'a>(&'a self, facet: &Facet) -> impl DoubleEndedIterator<Item = &'a Arc<T>> + use<'a, T> {
        self.by_facet.get(facet).into_iter().flat_map(|orders| orders.created.values())
    }

    /// Up to `most` entries that follow `after`, among them all those that have of each of `groups` at least
    /// one facet; which of the others is not said. Costs about what is given.
    pub fn chunk(
        &self,
        order: Order,
        after: Option<&Place>,
        groups: &[Vec<Facet>],
        most: usize,
    ) -> Vec<(Place, Arc<T>)> {
        let size = |group: &&Vec<Facet>| group.iter().map(|f| self.count(f)).sum::<usize>();
        let Some(fewest) = groups.iter().min_by_key(size) else {
            return self.all.after(order, after, most);
        };
        let of = |facet| self.by_facet.get(facet).map(|orders| orders.after(order, after, most));
        let mut found: Vec<_> = fewest.iter().filter_map(of).flatten().collect();
        if fewest.len() > 1 {
            found.sort_by(|(a, _), (b, _)| if order.descending { b.cmp(a) } else { a.cmp(b) });
            found.dedup_by(|(a, _), (b, _)| a == b);
            found.truncate(most);
        }
        found
    }

    /// Puts it in; gives what had its id before.
    pub fn insert(&mut self, entry: Arc<T>) -> Option<Arc<T>> {
        let key = Key::of(&*entry);
        let old = self.remove(&key.id);
        self.all.insert(&key, &entry);
        let facets = entry.facets().into();
        self.by_id.insert(key.id, Slot { entry: Arc::clone(&entry), facets: Box::default() });
        self.move_to(&key, facets);
        old
    }

    pub fn remove(&mut self, id: &Uuid) -> Option<Arc<T>> {
        let key = Key::of(&**self.get(id)?);
        self.move_to(&key, Box::default());
        self.all.remove(&key);
        self.by_id.remove(id).map(|slot| slot.entry)
    }

    /// Whether an entry is not found any more by what it is now.
    pub fn is_stale(&self, id: &Uuid) -> bool {
        self.by_id.get(id).is_some_and(|slot| *slot.facets != *slot.entry.facets())
    }

    /// Has `entry` found by what it is now, if it is the one of its id.
    pub fn refresh(&mut self, entry: &Arc<T>) {
        if self.get(&entry.id()).is_some_and(|held| Arc::ptr_eq(held, entry)) {
            self.refresh_id(&entry.id());
        }
    }

    /// The same for the entry of this id.
    pub fn refresh_id(&mut self, id: &Uuid) {
        let Some(slot) = self.by_id.get(id) else { return };
        let facets = slot.entry.facets();
        if *slot.facets != *facets {
            let key = Key::of(&*slot.entry);
            self.move_to(&key, facets.into());
        }
    }

    /// Has an entry found by these facets and no others.
    fn move_to(&mut self, key: &Key, facets: Box<[Facet]>) {
        let Some(slot) = self.by_id.get_mut(&key.id) else { return };
        for facet in &slot.facets {
            if let Some(orders) = self.by_facet.get_mut(facet) {
                orders.remove(key);
                if orders.created.is_empty() {
                    self.by_facet.remove(facet);
                }
            }
        }
        for facet in &facets {
            self.by_facet.entry(facet.clone()).or_default().insert(key, &slot.entry);
        }
        slot.facets = facets;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::host::lists::{Page, PageRequest, page};
    use crate::sync::Locked;

    #[derive(Debug)]
    struct Entry {
        id: Uuid,
        name: Arc<str>,
        created_at: Timestamp,
        /// State, and what its one label says.
        now: Mutex<(&'static str, Option<u8>)>,
    }

    impl Listed for Entry {
        fn id(&self) -> Uuid {
            self.id
        }
        fn name(&self) -> Option<Arc<str>> {
            Some(Arc::clone(&self.name))
        }
        fn created_at(&self) -> Timestamp {
            self.created_at
        }
        fn facets(&self) -> Vec<Facet> {
            let (state, value) = &*self.now.locked();
            let label = |l: &u8| [Facet::Label("l".into()), Facet::LabelIs("l".into(), l.to_string().into())];
            value.iter().flat_map(label).chain([Facet::State(state)]).collect()
        }
    }

    impl PartialEq for Entry {
        fn eq(&self, other: &Self) -> bool {
            std::ptr::eq(self, other)
        }
    }

    impl Entry {
        fn has(&self, groups: &[Vec<Facet>]) -> bool {
            Facet::are_of_each(&self.facets(), groups)
        }
    }

    const STATES: [&str; 3] = ["stopped", "running", "failed"];

    #[derive(Clone, Debug)]
    enum Act {
        Define { id: u128, name: u8, at: i64 },
        Delete(u128),
        Label(u128, Option<u8>),
        State(u128, usize),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            (0u128..12, 0u8..12, 0i64..4).prop_map(|(id, name, at)| Act::Define { id, name, at }),
            (0u128..12).prop_map(Act::Delete),
            (0u128..12, prop::option::of(0u8..3)).prop_map(|(id, l)| Act::Label(id, l)),
            (0u128..12, 0usize..3).prop_map(|(id, s)| Act::State(id, s)),
        ];
        prop::collection::vec(act, 0..80)
    }

    fn groups() -> impl Strategy<Value = Vec<Vec<Facet>>> {
        let states = prop::collection::btree_set(0usize..3, 1..3)
            .prop_map(|s| s.into_iter().map(|s| Facet::State(STATES[s])).collect::<Vec<_>>());
        let label = prop_oneof![
            Just(vec![Facet::Label("l".into())]),
            (0u8..4).prop_map(|l| vec![Facet::LabelIs("l".into(), l.to_string().into())]),
        ];
        (prop::option::of(states), prop::option::of(label))
            .prop_map(|(s, l)| s.into_iter().chain(l).collect())
    }

    fn act(registry: &mut Registry<Entry>, act: Act) {
        let find = |registry: &Registry<Entry>, id| registry.get(&Uuid::from_u128(id)).cloned();
        match act {
            Act::Define { id, name, at } => {
                let (id, name) = (Uuid::from_u128(id), format!("g{name}"));
                if registry.named(&name).is_none_or(|e| e.id == id) {
                    let created_at = Timestamp::from_second(at).unwrap();
                    let now = Mutex::new((STATES[0], None));
                    let there = registry.get(&id).cloned();
                    let entry = Arc::new(Entry { id, name: name.into(), created_at, now });
                    assert_eq!(registry.insert(entry), there);
                    // What was replaced is found by nothing, whatever becomes of it.
                    if let Some(old) = there {
                        old.now.locked().0 = STATES[2];
                        registry.refresh(&old);
                    }
                }
            }
            Act::Delete(id) => {
                let there = find(registry, id);
                assert_eq!(registry.remove(&Uuid::from_u128(id)), there);
            }
            Act::Label(id, label) => {
                if let Some(entry) = find(registry, id) {
                    entry.now.locked().1 = label;
                    registry.refresh(&entry);
                }
            }
            Act::State(id, state) => {
                if let Some(entry) = find(registry, id) {
                    entry.now.locked().0 = STATES[state];
                    registry.refresh(&entry);
                }
            }
        }
    }

    fn paged(registry: &Registry<Entry>, asked: &PageRequest, groups: &[Vec<Facet>]) -> Page<Arc<Entry>> {
        let chunk = |after: Option<&Place>, most| registry.chunk(asked.order, after, groups, most);
        page(asked, chunk, |entry: Arc<Entry>| entry.has(groups).then_some(entry))
    }

    proptest! {
        /// Whatever was defined, changed and deleted: names, counts and every page of every list are what a
        /// search over all gives.
        #[test]
        fn every_way_leads_where_a_search_would(
            acts in acts(),
            groups in groups(),
            limit in 1usize..6,
            (by_name, descending) in any::<(bool, bool)>(),
        ) {
            let mut registry = Registry::<Entry>::default();
            for one in acts {
                act(&mut registry, one);
            }
            let entries: Vec<_> = registry.by_id.values().map(|slot| Arc::clone(&slot.entry)).collect();
            prop_assert_eq!(registry.len(), entries.len());
            for n in 0..12 {
                let name = format!("g{n}");
                prop_assert_eq!(registry.named(&name), entries.iter().find(|e| *e.name == *name));
            }
            for facet in groups.iter().flatten() {
                let having = entries.iter().filter(|e| e.facets().contains(facet)).count();
                prop_assert_eq!(registry.count(facet), having);
                prop_assert_eq!(registry.having(facet).count(), having);
            }
            // Nothing is kept of what nobody has.
            prop_assert!(registry.by_facet.values().all(|o| !o.created.is_empty()));
            let order = Order { by_name, descending };
            let place = |e: &Arc<Entry>| Place::of(order, e.created_at, &e.name, e.id);
            let mut wanted: Vec<_> = entries.into_iter().filter(|e| e.has(&groups)).collect();
            wanted.sort_by_key(&place);
            if descending {
                wanted.reverse();
            }
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let (items, next) = paged(&registry, &PageRequest { limit, order, after }, &groups);
                prop_assert!(items.len() <= limit && (next.is_none() || items.len() == limit));
                seen.extend(items);
                match next {
                    Some(next) => after = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(seen, wanted);
        }
    }

    /// A page of what few of many have does not look at the many.
    #[test]
    fn a_page_looks_at_little_more_than_it_shows() {
        let mut registry = Registry::<Entry>::default();
        for n in 0..3000u128 {
            let label = Some(u8::from(n % 1000 == 7));
            let now = Mutex::new((STATES[usize::from(n % 500 == 0)], label));
            let name = format!("g{n}").into();
            let (id, created_at) = (Uuid::from_u128(n), Timestamp::from_second(n as i64).unwrap());
            registry.insert(Arc::new(Entry { id, name, created_at, now }));
        }
        let looks = |groups: &[Vec<Facet>], limit, by_name| {
            let mut looked = 0;
            let order = Order { by_name, descending: false };
            let asked = PageRequest { limit, order, after: None };
            let chunk = |after: Option<&Place>, most| registry.chunk(order, after, groups, most);
            let look = |entry: Arc<Entry>| {
                looked += 1;
                entry.has(groups).then_some(entry)
            };
            let (items, _) = page(&asked, chunk, look);
            (items.len(), looked)
        };
        let running = || vec![Facet::State(STATES[1])];
        let rare = || vec![Facet::LabelIs("l".into(), "1".into())];
        for by_name in [false, true] {
            assert_eq!(looks(&[], 100, by_name), (100, 101));
            assert_eq!(looks(&[running()], 100, by_name), (6, 6));
            assert_eq!(looks(&[rare(), vec![Facet::State(STATES[0])]], 100, by_name), (3, 3));
            assert_eq!(looks(&[rare(), running()], 100, by_name), (0, 3));
        }
    }
}
