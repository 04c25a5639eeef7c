//! The tables for ranking: what they learn, when they are made, and files that have them.

use std::path::Path;
use std::sync::Arc;

use sssd_core::{Corpus, DIMENSIONS, LogBilinear, Token};

use super::build;
use crate::format::tables_length;
use crate::{
    BuildOptions, Builder, Datastore, Error, Load, Progress, TABLES_VERSION, VERSION, write_tombstones,
};

const VOCAB: u32 = 12;
const PAGE: usize = 4096;

fn options(ranking: bool) -> BuildOptions {
    BuildOptions { ranking: Some(ranking), ..BuildOptions::new(VOCAB) }
}

/// Texts in which 8 is followed by 2 after 0 and by 3 after 1, with one token between, and by either as often.
fn telling(documents: u32) -> Vec<Vec<Token>> {
    let mut state = 7u32;
    let mut bit = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 31
    };
    let piece = |first: u32, between: u32| [first, 5 + between, 8, 2 + first, 10];
    (0..documents).map(|_| (0..40).flat_map(|_| piece(bit(), bit())).collect()).collect()
}

fn file(path: &Path, options: BuildOptions, documents: &[Vec<Token>]) -> Vec<u8> {
    build(path, options, None, documents);
    std::fs::read(path).unwrap()
}

fn open(path: &Path) -> Arc<Datastore> {
    Arc::new(Datastore::open(&[path], Load::Ram).unwrap())
}

/// How much more the tables think of 2 than of 3 after these tokens.
fn prefers_two(store: &Datastore, context: &[Token]) -> f32 {
    let tables = store.tables().unwrap();
    let number = |row: sssd_core::Row, at: usize| f32::from(row.values[at].cast_signed()) * row.scale;
    let mut sums = [0.0; DIMENSIONS];
    for (&token, weights) in context.iter().rev().zip(tables.weights()) {
        let row = tables.input(token).unwrap();
        sums.iter_mut().enumerate().for_each(|(at, sum)| *sum += weights[at] * number(row, at));
    }
    let score = |token: Token| {
        let output = tables.output(token).unwrap();
        sums.iter().enumerate().map(|(at, sum)| sum * number(output.row, at)).sum::<f32>() + output.bias
    };
    score(2) - score(3)
}

#[test]
fn tables_tell_what_the_last_token_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    build(&path, options(true), Some(3000), &telling(60));
    let store = open(&path);
    assert!(store.files().next().unwrap().segments > 3);
    for between in [5, 6] {
        assert!(prefers_two(&store, &[10, 0, between, 8]) > 1.0);
        assert!(prefers_two(&store, &[10, 1, between, 8]) < -1.0);
    }
    let tables = store.tables().unwrap();
    let share = 1.0 / 5.0f32;
    let share_of = |token: Token| tables.output(token).unwrap().share;
    assert!((share_of(8) - share.ln()).abs() < 1e-5 && share_of(9) < -16.0);
    assert!(tables.input(VOCAB).is_none() && tables.output(Token::MAX).is_none());
}

#[test]
fn equal_input_gives_equal_bytes_whatever_the_threads() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [1, 3].map(|threads| {
        let path = folder.path().join("store");
        build(&path, BuildOptions { threads, ..options(true) }, Some(900), &telling(30));
        std::fs::read(path).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
}

#[test]
fn files_without_tables_are_of_the_version_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let found = |options: BuildOptions| {
        build(&path, options, None, &telling(3));
        let store = open(&path);
        let info = store.files().next().unwrap().clone();
        (info.version, info.ranking_tokens, store.tables().is_some())
    };
    assert_eq!(found(options(false)), (VERSION, None, false));
    assert_eq!(found(BuildOptions::new(VOCAB)), (VERSION, None, false)); // too small to be worth it
    assert_eq!(found(options(true)), (TABLES_VERSION, Some(600), true));
    // nothing to learn from
    build(&path, options(true), None, &[vec![]]);
    assert!(open(&path).tables().is_none());
}

#[test]
fn memory_that_does_not_suffice_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        BuildOptions { ranking: Some(true), max_memory: Some(1 << 27), ..BuildOptions::new(128_256) };
    let error = Builder::create(&folder.path().join("store"), options.clone()).err().unwrap();
    assert!(
        matches!(&error, Error::InvalidArgument(problem) if problem.contains("tables for ranking")),
        "{error}"
    );
    assert!(Builder::create(&folder.path().join("store"), BuildOptions { ranking: None, ..options }).is_ok());
}

/// The merged store's tokens that its tables were learned from, and whether the tables are those of the first.
fn merged(folder: &Path, sizes: [u32; 2], leave_out: bool, bury: bool) -> (Option<u64>, bool) {
    let paths = ["one", "two"].map(|name| folder.join(name));
    for (path, size) in paths.iter().zip(sizes) {
        build(path, options(path == &paths[0]), None, &telling(size));
    }
    let (mut one, path) = (open(&paths[0]), folder.join("merged"));
    if bury {
        let dead: Vec<_> = (0..sizes[0]).map(|document| document == 1).collect();
        write_tombstones(&one, &dead, &folder.join("dead"), &Progress::default()).unwrap();
        let mut buried = Datastore::open(&[&paths[0]], Load::Ram).unwrap();
        buried.add_tombstones(0, &folder.join("dead"), &Progress::default()).unwrap();
        one = Arc::new(buried);
    }
    let mut builder = Builder::create(&path, options(true)).unwrap();
    let mut chosen = vec![true; sizes[0] as usize];
    chosen[0] = !leave_out;
    builder.add_datastore(&one, &mut chosen).unwrap();
    builder.add_datastore(&open(&paths[1]), &mut vec![true; sizes[1] as usize]).unwrap();
    builder.finish(&Progress::default()).unwrap();
    let store = open(&path);
    let row = |store: &Datastore| store.tables().unwrap().input(8).unwrap().values.to_vec();
    (store.files().next().unwrap().ranking_tokens, row(&store) == row(&one))
}

#[test]
fn a_store_that_is_merged_whole_hands_its_tables_on() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(merged(folder.path(), [30, 9], false, false), (Some(6000), true));
    // learned from too little of it
    assert_eq!(merged(folder.path(), [29, 10], false, false), (Some(7800), false));
    // nothing of a document that is left out stays
    assert_eq!(merged(folder.path(), [30, 9], true, false), (Some(7600), false));
    assert_eq!(merged(folder.path(), [30, 9], false, true), (Some(7600), false));
}

#[test]
fn the_largest_file_that_has_tables_ranks_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<_> = [(20, true), (10, true), (30, false)]
        .iter()
        .enumerate()
        .map(|(number, &(size, ranking))| {
            let path = folder.path().join(number.to_string());
            build(&path, options(ranking), None, &telling(size));
            path
        })
        .collect();
    let id = |store: &Datastore| store.tables().map(LogBilinear::id);
    let one = id(&open(&paths[0]));
    let all = Datastore::open(&paths, Load::Ram).unwrap();
    assert!(one.is_some() && id(&all) == one && id(&open(&paths[1])) != one);
    assert_eq!(id(&open(&paths[2])), None);
    let parts: Vec<_> = paths.iter().rev().map(|path| open(path)).collect();
    assert_eq!(id(&Datastore::union(parts.iter().map(Arc::as_ref)).unwrap()), one);
}

/// Asks the tables everything.
fn exercise(store: &Datastore) {
    let Some(tables) = store.tables() else { return };
    for token in [0, 1, 8, VOCAB - 1, VOCAB, Token::MAX] {
        let output = tables.output(token).map(|output| output.row);
        for row in [tables.input(token), tables.topic(token), output] {
            assert!(row.is_none_or(|row| row.values.len() == DIMENSIONS));
        }
    }
    assert!(tables.weights().as_flattened().iter().all(|weight| weight.is_finite()));
}

#[test]
fn every_changed_byte_of_the_tables_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = file(&folder.path().join("store"), options(true), &telling(2));
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let place = field(144)..field(152);
    assert_eq!(place.len() as u64, tables_length(VOCAB));
    for at in (144..176).chain(place) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        match Datastore::from_bytes("changed", bytes) {
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }) && at < PAGE),
            Ok(store) => {
                exercise(&store);
                assert!(store.verify().is_err(), "byte {at}");
            }
        }
    }
}

#[test]
fn tables_outside_their_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = file(&folder.path().join("store"), options(true), &telling(2));
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        super::hostile::reseal(&mut bytes);
        Datastore::from_bytes("forged", bytes).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let set = |at: usize, value: u64| {
        move |bytes: &mut Vec<u8>| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    let length = tables_length(VOCAB);
    assert_eq!(refused(&|_| ()), "");
    assert!(refused(&set(144, 0)).contains("contradicts the vocabulary"));
    assert!(refused(&set(152, u64::MAX)).contains("contradicts the vocabulary"));
    for start in [0, PAGE as u64, PAGE as u64 * 1000, u64::MAX - length] {
        let moved = |bytes: &mut Vec<u8>| {
            set(144, start)(bytes);
            set(152, start + length)(bytes);
        };
        assert!(refused(&moved).contains("outside its place"), "{start}");
    }
    assert!(refused(&|bytes| bytes[168] ^= 1).contains("shape"));
    let mut newer = bytes.clone();
    newer[8] = 3;
    let error = Datastore::from_bytes("newer", newer).err().unwrap();
    assert!(matches!(error, Error::Version { found: 3, supported: TABLES_VERSION, .. }));
}

#[test]
fn what_is_not_in_memory_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = file(&folder.path().join("store"), options(true), &telling(2));
    let start = u64::from_le_bytes(bytes[144..152].try_into().unwrap()) as usize;
    // all but the last page of the rows
    let (last, resident) =
        ((start + tables_length(VOCAB) as usize - 1) >> 9, Datastore::from_bytes("all", bytes.clone()));
    let store = Datastore::from_part(bytes, 9, |page| page != last).unwrap();
    let (tables, all) = (store.tables().unwrap(), resident.unwrap());
    assert!(tables.output(VOCAB - 1).is_none() && all.tables().unwrap().output(VOCAB - 1).is_some());
    assert!(tables.input(0).is_some() && tables.output(0).is_some());
}
