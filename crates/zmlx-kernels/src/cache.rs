//! A bounded cache that forgets what was not used for longest.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// At most `limit` values by key. Looking up compares keys one by one: meant for tens of entries.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    entries: Mutex<Vec<(K, V)>>,
    limit: usize,
}

impl<K: PartialEq, V: Clone> Cache<K, V> {
    pub fn new(limit: usize) -> Self {
        Self { entries: Mutex::new(Vec::new()), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(K, V)>> {
        // A panic while the lock is held leaves whole entries.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of a key, made if it is not there. Making happens without the lock: two threads may both make it.
    pub fn get<E>(&self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<V, E> {
        {
            let mut entries = self.lock();
            if let Some(at) = entries.iter().position(|(k, _)| *k == key) {
                let last = entries.len() - 1;
                entries[at..].rotate_left(1);
                return Ok(entries[last].1.clone());
            }
        }
        let value = make(&key)?;
        let mut entries = self.lock();
        if entries.len() >= self.limit {
            entries.remove(0);
        }
        entries.push((key, value.clone()));
        Ok(value)
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn clear(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_most_recent() {
        let cache = Cache::new(2);
        let made = std::cell::Cell::new(0);
        let get = |k: u32| {
            let value: Result<u32, ()> = cache.get(k, |k| {
                made.set(made.get() + 1);
                Ok(k * 10)
            });
            value
        };
        assert_eq!(
            (get(1), get(2), get(1), get(3), get(1), get(2)),
            (Ok(10), Ok(20), Ok(10), Ok(30), Ok(10), Ok(20))
        );
        assert_eq!(made.get(), 4, "1, 2, 3, and 2 again after 3 took its place");
        assert_eq!(cache.len(), 2);
    }
}
