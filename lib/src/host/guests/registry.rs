//! The guests of a host, found by id and by name.
//!
//! Owns: that both ways lead to the same guest. Must not know: who may define or remove one. A guest's name
//! is its for life and unique on the host; whoever inserts has looked under the same lock.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use crate::host::guests::entry::GuestEntry;

/// What a registry holds: something with an id and a name that stay.
pub(in crate::host) trait Named {
    fn id(&self) -> Uuid;
    fn name(&self) -> String;
}

impl Named for GuestEntry {
    fn id(&self) -> Uuid {
        self.id
    }

    fn name(&self) -> String {
        Self::name(self)
    }
}

/// Entries by id and by name.
pub(in crate::host) struct Registry<T> {
    by_id: HashMap<Uuid, Arc<T>>,
    by_name: HashMap<String, Uuid>,
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self { by_id: HashMap::new(), by_name: HashMap::new() }
    }
}

impl<T: Named> Registry<T> {
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.by_id.values()
    }

    pub fn get(&self, id: &Uuid) -> Option<&Arc<T>> {
        self.by_id.get(id)
    }

    pub fn contains_key(&self, id: &Uuid) -> bool {
        self.by_id.contains_key(id)
    }

    pub fn named(&self, name: &str) -> Option<&Arc<T>> {
        self.by_name.get(name).and_then(|id| self.by_id.get(id))
    }

    /// Puts it in; gives what had its id before.
    pub fn insert(&mut self, entry: Arc<T>) -> Option<Arc<T>> {
        let old = self.remove(&entry.id());
        self.by_name.insert(entry.name(), entry.id());
        self.by_id.insert(entry.id(), entry);
        old
    }

    pub fn remove(&mut self, id: &Uuid) -> Option<Arc<T>> {
        let old = self.by_id.remove(id)?;
        let name = old.name();
        if self.by_name.get(&name) == Some(id) {
            self.by_name.remove(&name);
        }
        Some(old)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq)]
    struct Entry(Uuid, String);

    impl Named for Entry {
        fn id(&self) -> Uuid {
            self.0
        }
        fn name(&self) -> String {
            self.1.clone()
        }
    }

    proptest! {
        /// Whatever was put in and taken out: a name finds what a search over all would find.
        #[test]
        fn names_lead_where_a_search_would(
            acts in prop::collection::vec((any::<bool>(), 0u128..6, 0u8..6), 0..60),
        ) {
            let mut registry = Registry::<Entry>::default();
            for (puts, id, name) in acts {
                let (id, name) = (Uuid::from_u128(id), format!("g{name}"));
                if !puts {
                    let there = registry.get(&id).cloned();
                    prop_assert_eq!(registry.remove(&id), there);
                } else if registry.named(&name).is_none_or(|e| e.id() == id) {
                    let there = registry.get(&id).cloned();
                    prop_assert_eq!(registry.insert(Arc::new(Entry(id, name))), there);
                }
                for n in 0..6 {
                    let name = format!("g{n}");
                    let searched = registry.values().find(|e| e.name() == name);
                    prop_assert_eq!(registry.named(&name), searched);
                }
                prop_assert_eq!(registry.len(), registry.values().count());
                prop_assert!(registry.values().all(|e| registry.contains_key(&e.id())));
            }
        }
    }
}
