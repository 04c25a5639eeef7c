//! The namespaces of an engine, by name, and when they are forgotten.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Bound;
use std::time::{Duration, Instant};

use sssd_core::{Common, MemoryFull, Namespace};

use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Namespaces that are looked at before others get their turn.
const PAGE: usize = 256;
/// Namespaces that a call which needs one looks at, whether they are to be forgotten.
const FORGOTTEN: usize = 8;

/// Namespaces that a call which finds memory full looks at, whether they are empty.
const LOOKED: usize = 1024;

/// Namespaces, in any number: no call takes time for those that it does not ask for.
pub struct Tenants {
    common: Arc<Common>,
    live_bytes: usize,
    soft_bytes: usize,
    /// Named ones are forgotten so long after their last use.
    ttl: Option<Duration>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    by_name: BTreeMap<Arc<str>, Tenant>,
    /// When to look whether one is to be forgotten, with its number: one entry for each.
    due: BinaryHeap<Reverse<(Instant, u64, Arc<str>)>>,
    made: u64,
    /// Up to where empty ones were looked for.
    looked: Option<Arc<str>>,
}

struct Tenant {
    namespace: Arc<Namespace>,
    number: u64,
    /// When a request was begun or found running.
    used: Instant,
}

impl Tenant {
    /// Whether its time is up at `now`, or when to look again.
    fn due(&mut self, ttl: Duration, now: Instant) -> Option<Instant> {
        if self.namespace.sequences() > 0 {
            self.used = now;
        }
        // a time that no clock will show is never
        self.used.max(self.namespace.last_end()).checked_add(ttl)
    }
}

impl Tenants {
    pub fn new(common: Arc<Common>, live_bytes: usize, soft_bytes: usize, ttl: Option<Duration>) -> Self {
        Self { common, live_bytes, soft_bytes, ttl, held: Mutex::default() }
    }

    /// A namespace; made if it is not there.
    pub fn find_or_make(&self, name: &str) -> Result<Arc<Namespace>, MemoryFull> {
        self.expire(FORGOTTEN);
        match self.try_find_or_make(name) {
            // what is to be forgotten may make room
            Err(_) if self.make_room() => self.try_find_or_make(name),
            made => made,
        }
    }

    /// Forgets what is to be forgotten, and what is empty; false if there was nothing.
    pub fn make_room(&self) -> bool {
        self.expire(usize::MAX) + self.forget_empty() > 0
    }

    fn try_find_or_make(&self, name: &str) -> Result<Arc<Namespace>, MemoryFull> {
        let expired = self.take_if_expired(name);
        let (mut held, now) = (self.lock(), Instant::now());
        if let Some(tenant) = held.by_name.get_mut(name) {
            tenant.used = now;
            return Ok(Arc::clone(&tenant.namespace));
        }
        let bytes = 64 + name.len() + 2 * size_of::<Tenant>() + size_of::<(Instant, u64, Arc<str>)>();
        let name = Arc::<str>::from(name);
        let namespace = Namespace::new(&name, &self.common, self.live_bytes, self.soft_bytes, bytes)?;
        let (number, namespace) = (held.made, Arc::new(namespace));
        held.made += 1;
        if let Some(due) = self.ttl_of(&name).and_then(|ttl| now.checked_add(ttl)) {
            held.due.push(Reverse((due, number, Arc::clone(&name))));
        }
        held.by_name.insert(name, Tenant { namespace: Arc::clone(&namespace), number, used: now });
        // what was forgotten is freed when nobody waits
        drop(held);
        drop(expired);
        Ok(namespace)
    }

    /// A namespace, if it is there.
    pub fn find(&self, name: &str) -> Option<Arc<Namespace>> {
        drop(self.take_if_expired(name));
        self.lock().by_name.get(name).map(|tenant| Arc::clone(&tenant.namespace))
    }

    /// Forgets a namespace; false if there is none of that name.
    pub fn remove(&self, name: &str) -> bool {
        let removed = self.lock().by_name.remove(name);
        removed.is_some()
    }

    /// Forgets all namespaces.
    pub fn clear(&self) {
        let mut held = self.lock();
        held.due.clear();
        let removed = std::mem::take(&mut held.by_name);
        // freed when nobody waits
        drop(held);
        drop(removed);
    }

    /// Calls `act` with each namespace and when it was last used, in the order of their names.
    pub fn for_each(&self, mut act: impl FnMut(&str, &Namespace, Instant)) {
        self.expire(usize::MAX);
        let all: Result<(), std::convert::Infallible> = self.try_for_each(|name, namespace, used| {
            act(name, namespace, used);
            Ok(())
        });
        let Ok(()) = all;
    }

    /// The same, up to the first error.
    pub fn try_for_each<E>(
        &self,
        mut act: impl FnMut(&str, &Namespace, Instant) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut after: Option<Arc<str>> = None;
        loop {
            let start = after.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
            let held = self.lock();
            let page = held.by_name.range::<str, _>((start, Bound::Unbounded)).take(PAGE);
            let page: Vec<_> = page
                .map(|(name, tenant)| (Arc::clone(name), Arc::clone(&tenant.namespace), tenant.used))
                .collect();
            drop(held);
            let Some((last, ..)) = page.last() else { return Ok(()) };
            after = Some(Arc::clone(last));
            page.iter().try_for_each(|(name, namespace, used)| act(name, namespace, *used))?;
        }
    }

    fn ttl_of(&self, name: &str) -> Option<Duration> {
        self.ttl.filter(|_| !name.is_empty())
    }

    /// Takes a namespace out if its time is up.
    fn take_if_expired(&self, name: &str) -> Option<Tenant> {
        let (ttl, mut held, now) = (self.ttl_of(name)?, self.lock(), Instant::now());
        let due = held.by_name.get_mut(name)?.due(ttl, now)?;
        if due <= now { held.by_name.remove(name) } else { None }
    }

    /// Forgets namespaces whose time is up, having looked at `most` at most. Tells how many.
    fn expire(&self, most: usize) -> usize {
        let Some(ttl) = self.ttl else { return 0 };
        let (mut looked, mut forgotten) = (0, 0);
        while looked < most {
            // freed when nobody waits
            let (gone, more) = self.lock().expire(ttl, PAGE.min(most - looked));
            (looked, forgotten) = (looked + PAGE, forgotten + gone.len());
            if !more {
                break;
            }
        }
        forgotten
    }

    /// Forgets namespaces in which nothing was learned and nothing runs, of the next ones in the order of their names.
    /// Tells how many.
    fn forget_empty(&self) -> usize {
        let mut held = self.lock();
        let start = held.looked.as_deref().map_or(Bound::Excluded(""), Bound::Excluded);
        let next: Vec<_> = held.by_name.range::<str, _>((start, Bound::Unbounded)).take(LOOKED).collect();
        let empty = next.iter().filter(|(_, tenant)| tenant.namespace.is_empty());
        let empty: Vec<_> = empty.map(|(name, _)| Arc::clone(name)).collect();
        let last = next.last().filter(|_| next.len() == LOOKED).map(|(name, _)| Arc::clone(name));
        held.looked = last;
        let gone: Vec<_> = empty.iter().filter_map(|name| held.by_name.remove(name)).collect();
        drop(held);
        gone.len()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Takes out namespaces whose time is up, having looked at `most`, and tells whether there are more to look at.
    fn expire(&mut self, ttl: Duration, most: usize) -> (Vec<Tenant>, bool) {
        let (now, mut gone) = (Instant::now(), Vec::new());
        for _ in 0..most {
            if self.due.peek().is_none_or(|Reverse((due, ..))| *due > now) {
                return (gone, false);
            }
            let Some(Reverse((_, number, name))) = self.due.pop() else { return (gone, false) };
            // another one may have been made under the name
            let Some(tenant) = self.by_name.get_mut(&name).filter(|tenant| tenant.number == number) else {
                continue;
            };
            match tenant.due(ttl, now) {
                Some(due) if due <= now => gone.extend(self.by_name.remove(&name)),
                Some(due) => self.due.push(Reverse((due, number, name))),
                None => {}
            }
        }
        (gone, true)
    }
}
