//! Namespaces, what is saved of them, memory, counters, and prompts that are indexed in the background.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use sssd_core::{Corpus, Limits, MAX_TOKEN, Match, MemoryFull, Model, Token, TopK};
use sssd_engine::{
    Engine, Identity, Options, PIECE, Plan, Record, Request, RequestError, STATE_FILE, StateError,
    StateReader,
};

const TEXT: [Token; 9] = [11, 12, 13, 14, 15, 16, 17, 18, 19];

fn learning() -> Engine {
    Engine::new(Options { live_bytes: 1 << 16, soft_bytes: 1 << 14, ..Options::default() }).unwrap()
}

fn begin(engine: &Engine, namespace: &str, prompt: &[Token]) -> Arc<Request> {
    engine.begin(namespace, prompt, &[], None, &|| false).unwrap()
}

/// Has a namespace learn from everything that there is to learn from.
fn teach(engine: &Engine, namespace: &str) {
    for prompt in [&TEXT[..], &TEXT[..3]] {
        let request = begin(engine, namespace, prompt);
        for token in [14, 15, 16, 17] {
            engine.draft(&request, Limits::nodes(8), None).unwrap();
            engine
                .extend(&request, &[token], Some(TopK { k: 1, ids: &[77], probs: &[0.9] }), &|| false)
                .unwrap();
        }
        engine.finish(&request, &|| false).unwrap();
    }
}

/// What is saved of an engine.
fn saved(engine: &Engine) -> (Vec<Record>, Identity) {
    let folder = tempfile::tempdir().unwrap();
    engine.save(folder.path(), &|| false).unwrap();
    let mut reader = StateReader::open(folder.path(), &|| false).unwrap();
    let records = std::iter::from_fn(|| reader.next_record().unwrap()).collect();
    (records, reader.identity().clone())
}

fn weights(engine: &Engine, namespace: &str) -> Vec<u8> {
    engine.namespace(namespace).unwrap().with_model(Model::to_bytes).unwrap()
}

#[test]
fn a_namespace_begins_with_nothing_that_another_has_learned() {
    let (engine, untaught) = (learning(), Model::default().to_bytes().unwrap());
    for name in ["", "a"] {
        teach(&engine, name);
        assert_ne!(weights(&engine, name), untaught);
        assert!(engine.namespace(name).unwrap().live_len().0 > 0);
    }
    for name in ["A", "a ", "ä", "a\0", "aa"] {
        let namespace = engine.namespace(name).unwrap();
        assert_eq!(namespace.with_model(Model::to_bytes).unwrap(), untaught, "{name:?}");
        assert_eq!(namespace.live_len(), (0, 0), "{name:?}");
        assert_eq!(namespace.for_each_feedback(|_| Err("an entry")), Ok(()), "{name:?}");
    }
    let names: Vec<_> = engine.namespaces().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["", "A", "a", "a\0", "a ", "aa", "ä"]);
}

#[test]
fn what_was_learned_is_restored_exactly_and_takes_the_place_of_what_was_there() {
    let engine = learning();
    for name in ["", "a"] {
        teach(&engine, name);
    }
    let (state, identity) = saved(&engine);
    assert!(
        state.iter().any(|record| matches!(record, Record::Document { used: 1.., .. })),
        "some text was of use"
    );
    let names = state.iter().filter(|record| matches!(record, Record::Namespace { .. })).count();
    let entries = state.iter().filter(|record| matches!(record, Record::Feedback(_))).count();
    assert!(names == 2 && entries > 20);
    let other = learning();
    begin(&other, "a", &[1, 2, 3, 4, 5]);
    teach(&other, "a");
    let folder = tempfile::tempdir().unwrap();
    engine.save(folder.path(), &|| false).unwrap();
    let mut reader = StateReader::open(folder.path(), &|| false).unwrap();
    other.restore(&mut reader, &|| false).unwrap();
    let (restored, other) = saved(&other);
    assert_eq!(other, identity);
    let sorted = |records: Vec<Record>| {
        let mut records: Vec<_> = records.iter().map(|record| format!("{record:?}")).collect();
        records.sort();
        records
    };
    // entries may stand in another order
    assert_eq!(sorted(restored), sorted(state));
}

#[test]
fn whoever_interrupts_a_save_leaves_the_old_one() {
    let (engine, folder) = (learning(), tempfile::tempdir().unwrap());
    engine.save(folder.path(), &|| false).unwrap();
    let file = folder.path().join(STATE_FILE);
    let before = std::fs::read(&file).unwrap();
    teach(&engine, "");
    assert!(matches!(engine.save(folder.path(), &|| true), Err(StateError::Interrupted)));
    assert_eq!(std::fs::read(&file).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_was_learned_fits_as_far_as_there_is_room() {
    let (engine, folder) = (learning(), tempfile::tempdir().unwrap());
    teach(&engine, "");
    engine.save(folder.path(), &|| false).unwrap();
    for (live_bytes, soft_bytes) in [(0, 0), (1 << 14, 1 << 10), (1 << 20, 1 << 20)] {
        let other = Engine::new(Options { live_bytes, soft_bytes, ..Options::default() }).unwrap();
        other.restore(&mut StateReader::open(folder.path(), &|| false).unwrap(), &|| false).unwrap();
        let namespace = other.namespace("").unwrap();
        assert_eq!(namespace.live_len().0 > 0, live_bytes > 0);
        assert_eq!(namespace.for_each_feedback(|_| Err(())).is_err(), soft_bytes > 0);
        assert_eq!(namespace.with_model(Model::to_bytes).unwrap(), weights(&engine, ""));
        assert!(namespace.memory_bytes() <= live_bytes + soft_bytes + 150_000);
    }
}

#[test]
fn any_number_of_namespaces_costs_no_call_more_than_its_own() {
    let ttl = Duration::from_millis(200);
    let engine = Engine::new(Options { namespace_ttl: Some(ttl), ..Options::default() }).unwrap();
    let held = engine.memory().used;
    (0..3000).for_each(|n| drop(engine.namespace(&n.to_string()).unwrap()));
    let each = (engine.memory().used - held) / 3000;
    assert!((1000..8000).contains(&each), "{each}");
    let before = engine.memory().used;
    engine.namespace(&"x".repeat(5000)).unwrap();
    assert!(engine.memory().used - before > 4900 + each, "names are charged");
    sleep(ttl + ttl / 4);
    // a few at a time, by calls for others
    engine.namespace("other").unwrap();
    assert!(engine.memory().used > held + 2900 * each);
    assert!(engine.find_namespace("17").is_none());
    (0..1000).for_each(|_| drop(engine.namespace("other").unwrap()));
    assert!(engine.memory().used < held + 3 * each);
    let names: Vec<_> = engine.namespaces().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["", "other"]);
}

#[test]
fn a_full_memory_forgets_namespaces_that_have_learned_nothing() {
    let engine =
        Engine::new(Options { max_bytes: 1 << 20, live_bytes: 1 << 16, ..Options::default() }).unwrap();
    teach(&engine, "taught");
    let running = begin(&engine, "running", &TEXT);
    for n in 0..500 {
        drop(begin(&engine, &format!("{n}{}", "x".repeat(5000)), &TEXT));
    }
    assert!(engine.find_namespace("taught").is_some() && engine.find_namespace("running").is_some());
    assert!((5..200).contains(&engine.namespaces().len()));
    running.with(|sequence| assert_eq!(sequence.tokens(), TEXT)).unwrap();
}

#[test]
fn a_full_memory_forgets_what_is_to_be_forgotten() {
    let options =
        Options { namespace_ttl: Some(Duration::from_millis(1)), max_bytes: 1 << 18, ..Options::default() };
    let engine = Engine::new(options).unwrap();
    (0..100).for_each(|n| _ = engine.namespace(&format!("{n}{}", "x".repeat(5000))));
    assert!(engine.memory().refused > 0, "names are charged");
    sleep(Duration::from_millis(3));
    assert!(engine.namespace(&"y".repeat(1 << 17)).is_ok());
}

#[test]
fn time_to_live_counts_from_when_a_namespace_was_last_seen_in_use() {
    let ttl = Duration::from_secs(1);
    let engine = Engine::new(Options { namespace_ttl: Some(ttl), ..Options::default() }).unwrap();
    let request = begin(&engine, "long", &TEXT);
    drop(begin(&engine, "short", &TEXT));
    sleep(ttl + ttl / 10);
    assert_eq!(engine.namespaces().len(), 2, "the default one, and the one in use");
    drop(request);
    assert!(engine.find_namespace("long").is_some());
    assert!(engine.find_namespace("short").is_none());
}

#[test]
fn time_to_live_counts_from_the_end_of_the_last_request_if_nobody_has_looked_since() {
    let ttl = Duration::from_millis(500);
    let engine = Engine::new(Options { namespace_ttl: Some(ttl), ..Options::default() }).unwrap();
    let request = begin(&engine, "long", &TEXT);
    sleep(ttl + ttl / 5);
    drop(request);
    assert!(engine.namespaces().iter().any(|info| info.name == "long"));
    sleep(ttl + ttl / 5);
    assert!(engine.find_namespace("long").is_none());
}

#[test]
fn whoever_interrupts_a_long_prompt_leaves_nothing() {
    let (engine, asked) = (learning(), AtomicU64::new(0));
    let prompt: Vec<Token> = (0..3 << 16).collect();
    let interrupted = || asked.fetch_add(1, Ordering::Relaxed) == 1;
    for (prompt, prediction) in [(&prompt[..], &[][..]), (&[1][..], &prompt[..])] {
        asked.store(0, Ordering::Relaxed);
        let begun = engine.begin("", prompt, prediction, None, &interrupted);
        assert!(matches!(begun, Err(RequestError::Interrupted)));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
    let memory = engine.memory();
    assert_eq!(memory.used, memory.shared);
}

/// Asked the first time: no; later: yes.
fn soon() -> impl Fn() -> bool + Sync {
    let asked = AtomicU64::new(0);
    move || asked.fetch_add(1, Ordering::Relaxed) > 0
}

#[test]
fn what_is_interrupted_is_undone_or_done_by_the_next_call() {
    let engine = learning();
    let text: Vec<Token> = (0..10 * PIECE as Token).map(|n| n % 977).collect();
    let request = begin(&engine, "", &TEXT);
    engine.draft(&request, Limits::nodes(8), None).unwrap();
    for interrupt in [0, 1] {
        let done = match interrupt {
            0 => request.prefill(&text, &soon()),
            _ => engine.extend(&request, &text, None, &soon()),
        };
        assert_eq!(done, Err(RequestError::Interrupted));
        request
            .with(|sequence| assert_eq!((sequence.tokens(), sequence.check()), (&TEXT[..], Ok(()))))
            .unwrap();
    }
    request.prefill(&text, &|| false).unwrap();
    let whole = request.with(|sequence| sequence.tokens().to_vec()).unwrap();
    assert_eq!(whole, [&TEXT[..], &text[..]].concat());
    assert_eq!(request.truncate(5, &soon()), Err(RequestError::Interrupted));
    assert!(request.is_busy(), "drafts wait");
    assert_eq!(engine.draft(&request, Limits::nodes(8), None).unwrap().len(), 0);
    assert_eq!(request.complete(&soon()), Err(RequestError::Interrupted));
    request.complete(&|| false).unwrap();
    request.with(|sequence| assert_eq!((sequence.tokens(), sequence.check()), (&TEXT[..5], Ok(())))).unwrap();
    // in several pieces as in one
    let twin = begin(&engine, "", &TEXT[..5]);
    engine.extend(&request, &text, None, &|| false).unwrap();
    twin.with(|sequence| sequence.extend(&text, None)).unwrap().unwrap();
    let drafts = [&request, &twin].map(|request| engine.draft(request, Limits::nodes(8), None).unwrap());
    assert_eq!(drafts[0], drafts[1]);
    let engine = Engine::new(Options { live_bytes: 1 << 24, ..Options::default() }).unwrap();
    let text: Vec<Token> = (0..10 * PIECE as Token).collect();
    let request = begin(&engine, "", &text);
    assert_eq!(engine.finish(&request, &soon()), Err(RequestError::Interrupted));
    assert!(request.closed());
    assert!((1..text.len()).contains(&engine.namespaces()[0].live_tokens));
}

#[test]
fn what_does_not_fit_in_the_end_leaves_nothing_either() {
    let engine = Engine::new(Options { max_bytes: 1 << 20, ..Options::default() }).unwrap();
    let request = begin(&engine, "", &TEXT);
    let used = engine.memory().used;
    let text: Vec<Token> = (0..40_000).collect();
    for _ in 0..2 {
        assert!(matches!(engine.extend(&request, &text, None, &|| false), Err(RequestError::Memory(_))));
        request
            .with(|sequence| assert_eq!((sequence.tokens(), sequence.check()), (&TEXT[..], Ok(()))))
            .unwrap();
    }
    assert!(engine.may_hold(40_000).is_err() && engine.may_hold(1000).is_ok());
    engine.extend(&request, &text[..1000], None, &|| false).unwrap();
    assert!(engine.memory().used > used);
}

#[test]
fn a_prompt_in_the_background_comes_piece_by_piece_and_in_order() {
    let engine = learning();
    let prompt: Vec<Token> = (0..10_000).collect();
    // no other thread is there to index it: each draft does a piece
    let request = engine.begin_in_background("", prompt.clone(), &[], None, &|| false).unwrap();
    assert_eq!(engine.draft(&request, Limits::nodes(8), None).unwrap().len(), 0);
    assert_eq!([(); 3].map(|()| request.fill()), [false, true, true]);
    request.with(|sequence| assert_eq!(sequence.tokens(), prompt)).unwrap();
    let charged = engine.memory().used - engine.memory().shared;
    request.with(|sequence| assert_eq!(charged, sequence.charged_bytes())).unwrap();
}

#[test]
fn a_prompt_that_does_not_fit_ends_its_request_and_gives_everything_back() {
    let options = Options { max_bytes: 1 << 20, ..Options::default() };
    let engine = Engine::new(options).unwrap();
    let request = engine.begin_in_background("", (0..50_000).collect(), &[], None, &|| false).unwrap();
    assert!(matches!(request.with(|_| ()), Err(RequestError::Memory(_))));
    assert!(request.closed());
    let memory = engine.memory();
    assert_eq!((memory.used, memory.refused), (memory.shared, 1));
}

/// Nobody may ask it for what follows 13.
struct Trap;

impl Corpus for Trap {
    fn matches(&self, context: &[Token], _: usize, _: usize, _: &mut Vec<Match>) {
        assert_ne!(context.last(), Some(&13));
    }

    fn continuation(&self, _: u64, _: &mut [Token]) -> usize {
        0
    }

    fn successors(&self, _: Token, _: &mut Vec<(Token, f32)>) {}
}

#[test]
fn what_happens_is_counted_once() {
    let engine = Engine::new(Options { store: Some(Arc::new(Trap)), ..Options::default() }).unwrap();
    let request = begin(&engine, "", &[1, 2, 1]);
    let fork = engine.fork(&request).unwrap();
    engine.extend(&request, &[2, 1, 2], None, &|| false).unwrap();
    engine.finish(&request, &|| false).unwrap();
    engine.finish(&request, &|| false).unwrap();
    engine.extend(&fork, &[13], None, &|| false).unwrap();
    assert!(matches!(engine.draft(&fork, Limits::nodes(8), None), Err(RequestError::Failed(_))));
    let counted = |counter: fn(&sssd_engine::Metrics) -> &std::sync::atomic::AtomicU64| {
        counter(engine.metrics()).load(Ordering::Relaxed)
    };
    assert_eq!(counted(|metrics| &metrics.begun), 2);
    assert_eq!(counted(|metrics| &metrics.finished), 1);
    assert_eq!(counted(|metrics| &metrics.failed), 1);
    assert_eq!(counted(|metrics| &metrics.tokens), 4);
}

#[test]
fn a_request_that_is_there_twice_is_found() {
    let engine = learning();
    let requests = [1, 2].map(|token| begin(&engine, "", &[token]));
    let step = engine.idle_step();
    let mut work = step.lock();
    work.requests.extend(requests.iter().cloned());
    assert_eq!(work.repeated(), None);
    assert_eq!(work.repeated(), None, "an earlier batch does not count");
    work.requests.push(Arc::clone(&requests[0]));
    assert_eq!(work.repeated(), Some(2));
}

#[test]
fn what_went_wrong_in_a_step_is_not_said_of_the_next() {
    let engine = learning();
    let drafted = |request: &Arc<Request>| {
        let step = engine.idle_step();
        let mut work = step.lock();
        work.draft = true;
        work.requests.push(Arc::clone(request));
        work.plans.push(Plan { min_nodes: 0, limits: Limits::nodes(8) });
        drop(work);
        engine.run(&step);
        let failures = step.lock().failures().count();
        engine.put_back(step);
        failures
    };
    let (closed, open) = (begin(&engine, "", &TEXT), begin(&engine, "", &TEXT));
    closed.close();
    assert_eq!([drafted(&closed), drafted(&open), drafted(&closed)], [1, 0, 1]);
}

/// What a request drafts, as tokens and probabilities.
fn drafted(engine: &Engine, request: &Request) -> (Vec<Token>, Vec<f32>) {
    let tree = engine.draft(request, Limits::nodes(16), None).unwrap();
    (tree.token_ids, tree.probs)
}

#[test]
fn a_request_follows_a_row() {
    let engine = learning();
    let held: Vec<Token> = TEXT.iter().copied().cycle().take(50).collect();
    let request = begin(&engine, "", &held);
    for (keep, new) in [(50, &[14, 15][..]), (51, &[]), (30, &[77]), (31, &[18, 19]), (33, &[])] {
        let before = request.with(|sequence| sequence.tokens()[..keep].to_vec()).unwrap();
        engine.follow(&request, keep, new, false, &|| false).unwrap();
        let row = [&before[..], new].concat();
        assert_eq!(request.with(|sequence| sequence.tokens().to_vec()).unwrap(), row);
        assert_eq!(request.with(|sequence| sequence.check()).unwrap(), Ok(()));
    }
    assert_eq!(engine.namespace("").unwrap().live_len().0, 0);
    // nothing in common: as if begun with it, and learned from if so asked
    for learn in [false, true] {
        engine.follow(&request, 0, &TEXT, learn, &|| false).unwrap();
        assert_eq!(engine.namespace("").unwrap().live_len().0 > 0, learn);
        assert_eq!(drafted(&engine, &request), drafted(&engine, &begin(&engine, "", &TEXT)));
    }
    let tree = engine.draft(&request, Limits::nodes(16), None).unwrap();
    let accepted = tree.accept(&[&[11][..], &vec![0; tree.len()]].concat()).unwrap().len();
    assert_eq!(engine.follow(&request, 9, &[11], false, &|| false), Ok(accepted));
    request.close();
    assert_eq!(engine.follow(&request, 0, &TEXT, false, &|| false), Err(RequestError::Closed));
}

#[test]
fn a_row_that_is_interrupted_or_does_not_fit_leaves_what_is_shared() {
    let engine = Engine::new(Options { max_request_bytes: 4_000_000, ..Options::default() }).unwrap();
    let text: Vec<Token> = (0..3 * PIECE as Token).collect();
    let request = begin(&engine, "", &text[..PIECE]);
    let held = |request: &Request| request.with(|sequence| sequence.tokens().to_vec()).unwrap();
    let interrupted = engine.follow(&request, PIECE, &text[PIECE..], false, &|| true);
    assert_eq!(interrupted, Err(RequestError::Interrupted));
    assert_eq!(held(&request), text[..PIECE]);
    let much: Vec<Token> = (0..100_000).collect();
    assert!(matches!(engine.follow(&request, 100, &much, false, &|| false), Err(RequestError::Memory(_))));
    assert_eq!(held(&request), text[..100]);
    assert_eq!(request.with(|sequence| sequence.check()).unwrap(), Ok(()));
}

#[test]
fn all_namespaces_are_forgotten_at_once() {
    let engine = learning();
    for name in ["", "a", "b"] {
        teach(&engine, name);
    }
    let running = begin(&engine, "a", &TEXT);
    engine.forget();
    assert_eq!(engine.namespaces().len(), 0);
    assert_eq!(weights(&engine, "a"), Model::default().to_bytes().unwrap());
    engine.finish(&running, &|| false).unwrap();
    assert_eq!(engine.namespace("a").unwrap().live_len().0, 0);
}

#[test]
fn a_text_that_is_learned_is_as_one_that_finished_here() {
    let text: Vec<_> = TEXT.iter().copied().chain([MAX_TOKEN + 1, 3, 4]).chain(TEXT).collect();
    let [there, here] = [(); 2].map(|()| learning());
    there.finish(&begin(&there, "a", &text), &|| false).unwrap();
    here.learn("a", &text, &|| false).unwrap();
    assert!(matches!(here.learn("a", &text, &|| true), Err(RequestError::Interrupted)));
    let learned = |engine: &Engine| {
        let mut documents = Vec::new();
        let namespace = engine.find_namespace("a").unwrap();
        let all = namespace.for_each_document(|tokens, used| {
            documents.push((tokens.to_vec(), used));
            Ok::<_, MemoryFull>(())
        });
        all.unwrap();
        documents
    };
    assert_eq!(learned(&here), learned(&there));
    assert_eq!(learned(&here), [(TEXT.to_vec(), 0), ([&[3, 4], &TEXT[..]].concat(), 0)]);
    assert_eq!(here.metrics().begun.load(Ordering::Relaxed), 0);
    let request = begin(&here, "a", &TEXT);
    request.with(|sequence| assert_eq!(&**sequence.namespace(), "a")).unwrap();
    here.fork(&request).unwrap().with(|sequence| assert_eq!(&**sequence.namespace(), "a")).unwrap();
}
