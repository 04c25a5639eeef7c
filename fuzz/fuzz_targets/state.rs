//! Saved states with anything in them, and a checksum that fits: loaded, restored, drafted from, saved again.
#![no_main]

use std::cell::OnceCell;
use std::ops::Range;
use std::path::Path;

use libfuzzer_sys::{Corpus, fuzz_target};
use sssd_engine::{Engine, Options, Record, STATE_FILE, StateReader};
use sssd_fuzz::{GO_ON, MAX_BYTES, check_memory, learned, use_namespace};
use xxhash_rust::xxh3::xxh3_64;

/// Bytes before what the drafter is.
const HEADER: usize = 20;
/// More namespaces than these are not asked to draft.
const ASKED: usize = 3;

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
    static GOOD: OnceCell<Good> = const { OnceCell::new() };
}

/// A state that has learned, to be changed.
struct Good {
    head: Vec<u8>,
    payload: Vec<u8>,
    /// The places outside the tables of weights, which are most of it.
    places: Vec<usize>,
}

fn good(folder: &Path) -> Good {
    let options = Options {
        vocab_size: Some(60),
        end_tokens: vec![3],
        live_bytes: 1 << 12,
        soft_bytes: 1 << 11,
        ..Options::default()
    };
    let engine = Engine::new(options).unwrap();
    for name in ["", "b"] {
        use_namespace(&engine, name, &[1, 2, 4, 1, 2, 5, 1, 2, 4, 6]);
    }
    engine.save(folder, &GO_ON).unwrap();
    let bytes = std::fs::read(folder.join(STATE_FILE)).unwrap();
    let payload = bytes[HEADER..bytes.len() - 8].to_vec();
    let mut tables: Vec<Range<usize>> = Vec::new();
    let mut reader = StateReader::open(folder, &GO_ON).unwrap();
    while let Some(record) = reader.next_record().unwrap() {
        let Record::Namespace { weights, .. } = record else { continue };
        let from = tables.last().map_or(0, |range| range.end);
        let at = payload[from..].windows(weights.len()).position(|window| window == weights).unwrap();
        tables.push(from + at + 16..from + at + weights.len() - 8);
    }
    let places =
        (0..payload.len() - 7).filter(|place| !tables.iter().any(|range| range.contains(place))).collect();
    Good { head: bytes[..HEADER].to_vec(), payload, places }
}

fn seal(payload: &[u8], head: &[u8]) -> Vec<u8> {
    let mut bytes = head.to_vec();
    bytes.extend(payload);
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    bytes
}

/// What is fuzzed: a whole payload (first byte 0), or changes of a good one: a place of 3 bytes, then 8 new bytes.
fn payload(data: &[u8], good: &Good) -> Option<Vec<u8>> {
    let (&kind, rest) = data.split_first()?;
    if kind == 0 {
        return Some(rest.to_vec());
    }
    let mut payload = good.payload.clone();
    for change in rest.chunks_exact(11) {
        let place = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
        let at =
            if kind % 4 > 0 { good.places[place % good.places.len()] } else { place % (payload.len() - 7) };
        payload[at..at + 8].copy_from_slice(&change[3..]);
    }
    Some(payload)
}

fuzz_target!(|data: &[u8]| -> Corpus {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir_in("/dev/shm").unwrap()).path().to_owned();
        let sealed = GOOD.with(|held| {
            let good = held.get_or_init(|| good(&folder));
            payload(data, good).map(|payload| seal(&payload, &good.head))
        });
        let Some(sealed) = sealed else { return Corpus::Reject };
        std::fs::write(folder.join(STATE_FILE), sealed).unwrap();
        let Ok(mut state) = StateReader::open(&folder, &GO_ON) else { return Corpus::Keep };
        let identity = state.identity().clone();
        let vocab_size =
            (identity.vocab_size > 0).then(|| u32::try_from(identity.vocab_size).unwrap_or(u32::MAX));
        let options = Options {
            // as Drafter.load does
            vocab_size,
            end_tokens: identity.end_tokens,
            live_bytes: usize::try_from(identity.live_bytes).unwrap(),
            soft_bytes: usize::try_from(identity.soft_bytes).unwrap(),
            max_bytes: MAX_BYTES,
            ..Options::default()
        };
        let vocab = options.vocab_size.unwrap_or(60);
        if vocab > 1 << 24 {
            return Corpus::Keep;
        }
        let Ok(engine) = Engine::new(options) else { return Corpus::Keep };
        // what there was room for stays
        let whole = engine.restore(&mut state, &GO_ON).is_ok();
        let prompt = [1, 2, 4, 1, 2].map(|token| token % vocab);
        for namespace in engine.namespaces().iter().take(ASKED) {
            use_namespace(&engine, &namespace.name, &prompt);
        }
        check_memory(&engine);
        if whole {
            learned(&engine, &folder);
        }
        Corpus::Keep
    })
});
