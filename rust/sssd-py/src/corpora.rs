//! The datastores of a drafter, by name: which of them a sequence matches, and how they are replaced while it runs.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};
use sssd_core::{Corpus, StoreSlot};
use sssd_store::{Datastore, Fingerprint};

use crate::boundary::{call, name};
use crate::datastore::PyDatastore;
use crate::errors::{error, raised};
use crate::source::Source;

/// Choices that are kept when no sequence has made them any more.
const KEPT: usize = 256;
/// How long who replaces stores waits for the drafts that use the old ones, to spare these the closing of files.
const PATIENCE: Duration = Duration::from_millis(200);

/// A datastore, unless it is an empty corpus, and where it comes from.
#[derive(Clone)]
pub struct Named {
    pub store: Option<Arc<Datastore>>,
    pub source: Source,
}

/// By name; one that was given alone has none.
pub type All = BTreeMap<String, Named>;

/// The datastores of a drafter.
pub struct Corpora {
    held: Mutex<Held>,
    /// What sequences match that do not choose.
    all: Arc<StoreSlot>,
    vocab_size: Option<u32>,
}

struct Held {
    named: All,
    /// How often they have been replaced.
    version: u64,
    /// What sequences match that choose, by the names in order.
    chosen: HashMap<Vec<String>, Arc<StoreSlot>>,
}

impl Corpora {
    /// Those that a drafter is made with. `all` is the slot that their union is in already.
    pub fn new(named: All, all: &Arc<StoreSlot>, vocab_size: Option<u32>) -> Self {
        let held = Mutex::new(Held { named, version: 0, chosen: HashMap::new() });
        Self { held, all: Arc::clone(all), vocab_size }
    }

    /// What there is, by name.
    pub fn named(&self) -> All {
        self.lock().named.clone()
    }

    /// What a sequence matches that chooses these; nothing if that is all there is.
    pub fn choose(&self, py: Python<'_>, mut names: Vec<String>) -> PyResult<Option<Arc<StoreSlot>>> {
        names.sort_unstable();
        names.dedup();
        match call(py, false, || self.find(names))? {
            Ok(found) => Ok(found),
            Err(Refused::Unknown { name, known }) => {
                let known: Vec<_> = known.iter().map(|name| format!("{name:?}")).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                let message = format!("there is no datastore {name:?}; the drafter has {known}");
                Err(error(py, "InvalidArgumentError", message))
            }
            Err(Refused::Store(failure)) => Err(raised(py, failure)),
        }
    }

    /// The slot of a choice. Nothing of Python happens while the lock is held: who waits for it may have the GIL.
    fn find(&self, names: Vec<String>) -> Result<Option<Arc<StoreSlot>>, Refused> {
        let mut held = self.lock();
        if let Some(name) = names.iter().find(|name| !held.named.contains_key(*name)) {
            let known = held.named.keys().cloned().collect();
            return Err(Refused::Unknown { name: name.clone(), known });
        }
        if names.len() == held.named.len() {
            return Ok(None);
        }
        if let Some(slot) = held.chosen.get(&names) {
            return Ok(Some(Arc::clone(slot)));
        }
        if held.chosen.len() >= KEPT {
            held.chosen.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        let corpus = union(&held.named, Some(&names)).map_err(Refused::Store)?;
        let slot = Arc::new(StoreSlot::new(corpus));
        held.chosen.insert(names, Arc::clone(&slot));
        Ok(Some(slot))
    }

    /// Opens what there is now in the same places, or other datastores, and has drafts match it from the next one on.
    /// False if it is what is there.
    pub fn reopen(&self, py: Python<'_>, other: Option<(&Bound<'_, PyAny>, &str)>) -> PyResult<bool> {
        loop {
            let (before, version) = call(py, false, || {
                let held = self.lock();
                (held.named.clone(), held.version)
            })?;
            let given = match other {
                Some((datastore, load)) => Given::all(datastore, load)?,
                None => before
                    .iter()
                    .map(|(name, named)| (name.clone(), Given::Place(named.source.clone())))
                    .collect(),
            };
            let named = resolve(py, given, &before)?;
            if same(&before, &named) {
                return Ok(false);
            }
            let checked = check(py, &named, self.vocab_size).and_then(|()| check_like(py, &before, &named));
            if let Err(refused) = checked {
                py.detach(|| drop(named)); // to unmap takes its time
                return Err(refused);
            }
            // what another thread has put there meanwhile may be newer
            let old =
                call(py, true, || self.replace(named, version))?.map_err(|failure| raised(py, failure))?;
            if let Some(old) = old {
                py.detach(|| old.close(before));
                return Ok(true);
            }
        }
    }

    /// Puts others in place, unless that was done since `version`. Either all slots change or none.
    fn replace(&self, named: All, version: u64) -> sssd_store::Result<Option<Old>> {
        let mut held = self.lock();
        if held.version != version {
            return Ok(None);
        }
        held.chosen.retain(|_, slot| Arc::strong_count(slot) > 1);
        let mut new = vec![(&self.all, union(&named, None)?)];
        for (names, slot) in &held.chosen {
            new.push((slot, union(&named, Some(names))?));
        }
        let mut corpora = Vec::new();
        for (slot, corpus) in new {
            let kept = corpus.clone();
            let same =
                |old: &Arc<dyn Corpus>| kept.as_ref().is_some_and(|kept| address(kept) == address(old));
            corpora.extend(slot.replace(corpus).filter(|old| !same(old)));
        }
        let named = std::mem::replace(&mut held.named, named);
        held.version += 1;
        Ok(Some(Old { corpora, named }))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was replaced.
struct Old {
    corpora: Vec<Arc<dyn Corpus>>,
    named: All,
}

impl Old {
    /// Waits until no draft uses it: whoever is last closes the files, which may take long. Gives up on what somebody else
    /// has, too.
    fn close(self, before: All) {
        drop((self.named, before));
        let start = Instant::now();
        let mut corpora = self.corpora;
        corpora.sort_by_key(address);
        corpora.dedup_by_key(|corpus| address(corpus)); // one of each
        for corpus in corpora {
            while Arc::strong_count(&corpus) > 1 && start.elapsed() < PATIENCE {
                thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

fn address(corpus: &Arc<dyn Corpus>) -> usize {
    Arc::as_ptr(corpus).addr()
}

/// Why a choice cannot be made.
enum Refused {
    Unknown { name: String, known: Vec<String> },
    Store(sssd_store::Error),
}

/// What a caller gives for a datastore.
enum Given {
    Open(Named),
    Place(Source),
}

impl Given {
    /// A datastore, or several by name.
    fn all(datastore: &Bound<'_, PyAny>, load: &str) -> PyResult<BTreeMap<String, Self>> {
        let Ok(mapping) = datastore.cast::<PyMapping>() else {
            return Ok(BTreeMap::from([(String::new(), Self::new(datastore, load)?)]));
        };
        let items = mapping.items()?;
        let read = |item: Bound<'_, PyAny>| {
            let (key, datastore): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
            Ok((name(&key)?, Self::new(&datastore, load)?))
        };
        items.iter().map(read).collect()
    }

    fn new(datastore: &Bound<'_, PyAny>, load: &str) -> PyResult<Self> {
        let py = datastore.py();
        let Ok(store) = datastore.cast::<PyDatastore>() else {
            return Ok(Self::Place(Source::new(datastore, None, None, load)?.absolute()));
        };
        let (store, source) = (store.get().store(py)?, store.get().source(py)?.absolute());
        Ok(Self::Open(Named { store: Some(store), source }))
    }
}

/// Opens a datastore, or several by name.
pub fn open(datastore: &Bound<'_, PyAny>, load: &str) -> PyResult<All> {
    resolve(datastore.py(), Given::all(datastore, load)?, &All::new())
}

/// Opens what is given; what has not changed since `before` stays as it is.
fn resolve(py: Python<'_>, given: BTreeMap<String, Given>, before: &All) -> PyResult<All> {
    let resolve = |(name, given): (String, Given)| {
        let source = match given {
            Given::Open(named) => return Ok((name, named)),
            Given::Place(source) => source,
        };
        if let Some(held) = before.get(&name).filter(|held| held.source == source)
            && source.is_unchanged(py, held.store.as_ref())?
        {
            return Ok((name, held.clone()));
        }
        let store = source.open(py, |_| Ok(()))?;
        Ok((name, Named { store, source }))
    };
    given.into_iter().map(resolve).collect()
}

fn same(one: &All, other: &All) -> bool {
    let same = |one: &Named, other: &Named| match (&one.store, &other.store) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    };
    one.len() == other.len()
        && one.iter().zip(other).all(|((name, named), (others_name, others))| {
            name == others_name && same(named, others) && named.source == others.source
        })
}

/// Refuses stores that a drafter of this vocabulary, or another of the stores, does not go with.
pub fn check(py: Python<'_>, named: &All, vocab_size: Option<u32>) -> PyResult<()> {
    for store in stores(named) {
        let known = store.vocab_size();
        if let Some(size) = vocab_size.filter(|&size| known > size) {
            let advice = "open the store that was built with the model's own tokenizer";
            let message = format!("the datastore has {known} token ids and the model only {size}; {advice}");
            return Err(error(py, "VocabularyMismatchError", message));
        }
    }
    union(named, None).map(drop).map_err(|failure| raised(py, failure))
}

/// Refuses stores of another vocabulary or tokenizer than those before.
fn check_like(py: Python<'_>, before: &All, named: &All) -> PyResult<()> {
    let Some(size) = stores(before).map(|store| store.vocab_size()).next() else { return Ok(()) };
    let fingerprints = stores(before).flat_map(|store| store.files()).map(|file| file.fingerprint);
    let known = fingerprints.into_iter().find(|fingerprint| *fingerprint != Fingerprint::default());
    for store in stores(named) {
        store.check_model(Some(size), known.as_ref()).map_err(|failure| raised(py, failure))?;
    }
    Ok(())
}

fn stores(named: &All) -> impl Iterator<Item = &Arc<Datastore>> {
    named.values().filter_map(|named| named.store.as_ref())
}

/// Those of `names`, or all, as one. Names that are not there any more are left out.
pub fn union(named: &All, names: Option<&[String]>) -> sssd_store::Result<Option<Arc<dyn Corpus>>> {
    Ok(union_of(named, names)?.map(|store| store as Arc<dyn Corpus>))
}

/// The same, as a datastore.
pub fn union_of(named: &All, names: Option<&[String]>) -> sssd_store::Result<Option<Arc<Datastore>>> {
    let chosen = |name: &String| names.is_none_or(|names| names.contains(name));
    let stores: Vec<_> =
        named.iter().filter(|(name, _)| chosen(name)).filter_map(|(_, named)| named.store.as_ref()).collect();
    match stores.as_slice() {
        [] => Ok(None),
        [store] => Ok(Some(Arc::clone(store))),
        stores => Datastore::union(stores.iter().map(|store| &***store)).map(|store| Some(Arc::new(store))),
    }
}

/// An argument that names some of a drafter's datastores, or None.
pub fn names(value: &Bound<'_, PyAny>) -> PyResult<Option<Vec<String>>> {
    if value.is_none() {
        return Ok(None);
    }
    let refused = || PyTypeError::new_err(format!("datastores must be a sequence of names, got {value}"));
    if value.is_instance_of::<PyString>() {
        return Err(refused());
    }
    let items = value.try_iter().map_err(|_| refused())?;
    items.map(|item| name(&item?)).collect::<PyResult<_>>().map(Some)
}
