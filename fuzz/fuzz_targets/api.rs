//! The whole engine as a sequence of operations, whatever their order. What is drafted is a draft, what is held is whole,
//! and at the end every byte has been given back.
#![no_main]

use std::sync::Arc;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sssd_core::{Limits, PLACEHOLDER, Token, TopK};
use sssd_engine::{Engine, Options, Request, RequestError, StateReader};
use sssd_fuzz::{GO_ON, check_memory, check_tree, learned, step};
use sssd_store::{BuildOptions, Builder, Datastore, Load, Progress};

const VOCAB: Token = 24;
const NAMES: [&str; 4] = ["", "a", "A", "ä\0"];
const MOST_REQUESTS: usize = 12;

#[derive(Arbitrary, Debug)]
struct Session {
    store: bool,
    live: bool,
    soft: bool,
    tight: bool,
    ends: bool,
    threads: bool,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Begin { name: u8, prompt: Text, prediction: Text, max_length: Option<u8>, background: bool },
    Extend { which: u8, tokens: Text, feedback: bool },
    Follow { which: u8, nodes: u8 },
    Feedback { which: u8, tokens: Text },
    Draft { which: u8, nodes: u16, depth: u8, min_prob: u8 },
    Step { tokens: Text, nodes: u8, total: Option<u8> },
    Truncate { which: u8, len: u16 },
    Prefill { which: u8, tokens: Text },
    Fork { which: u8 },
    Finish { which: u8 },
    Close { which: u8 },
    Remove { name: u8 },
    Save,
    Look,
}

/// Tokens, some of them runs of what was there before: `(token, repeats)`.
#[derive(Arbitrary, Debug)]
struct Text(Vec<(u8, u8)>);

impl Text {
    fn tokens(&self) -> Vec<Token> {
        let mut out: Vec<Token> = Vec::new();
        for &(token, run) in self.0.iter().take(40) {
            if token >= 200 && !out.is_empty() {
                let from = usize::from(token) % out.len();
                let to = (from + usize::from(run % 32)).min(out.len());
                out.extend_from_within(from..to);
            } else {
                out.push(if token == 199 { PLACEHOLDER } else { Token::from(token) % VOCAB });
            }
        }
        out
    }
}

static STORE: LazyLock<Arc<Datastore>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut builder = Builder::create(&path, BuildOptions::new(VOCAB)).unwrap();
    for document in 0..8 {
        let tokens: Vec<Token> = (0..60).map(|at| (at * at + document * at) % VOCAB).collect();
        builder.add_document(&tokens).unwrap();
    }
    builder.finish(&Progress::default()).unwrap();
    Arc::new(Datastore::open(&[path], Load::Ram).unwrap())
});

fn engine(session: &Session, restored: bool) -> Engine {
    let shared = if session.live { 1 << 14 } else { 0 };
    let soft = if session.soft { 1 << 12 } else { 0 };
    // the weights alone take some of it
    let max_bytes = if session.tight && !restored { 1 << 20 } else { 32 << 20 };
    Engine::new(Options {
        vocab_size: Some(VOCAB),
        end_tokens: if session.ends { vec![VOCAB - 1] } else { Vec::new() },
        store: if session.store { Some(Arc::clone(&*STORE) as Arc<dyn sssd_core::Corpus>) } else { None },
        live_bytes: shared,
        soft_bytes: soft,
        max_bytes,
        max_request_bytes: usize::MAX,
        threads: if session.threads { 3 } else { 1 },
        namespace_ttl: None,
    })
    .unwrap()
}

fn rows(tokens: &[Token]) -> (Vec<Token>, Vec<f32>) {
    let ids = tokens.iter().flat_map(|&token| [token % VOCAB, (token.wrapping_mul(7) + 1) % VOCAB]).collect();
    (ids, tokens.iter().flat_map(|_| [0.5, 0.25]).collect())
}

fn begin(engine: &Engine, operation: &Operation) -> Option<Arc<Request>> {
    let Operation::Begin { name, prompt, prediction, max_length, background } = operation else {
        return None;
    };
    let name = NAMES[usize::from(*name) % NAMES.len()];
    let (prompt, prediction) = (prompt.tokens(), prediction.tokens());
    let max_length = max_length.map(usize::from);
    if *background {
        return engine.begin_in_background(name, prompt, &prediction, max_length, &GO_ON).ok();
    }
    engine.begin(name, &prompt, &prediction, max_length, &GO_ON).ok()
}

fn act(engine: &Engine, requests: &mut Vec<Arc<Request>>, operation: &Operation) {
    let of = |which: u8| requests.get(usize::from(which) % requests.len().max(1)).cloned();
    match operation {
        Operation::Begin { .. } => requests.extend(begin(engine, operation)),
        Operation::Extend { which, tokens, feedback } => {
            let Some(request) = of(*which) else { return };
            let tokens = tokens.tokens();
            let (ids, probs) = rows(&tokens);
            let _ = engine.extend(
                &request,
                &tokens,
                feedback.then_some(TopK { k: 2, ids: &ids, probs: &probs }),
                &GO_ON,
            );
        }
        Operation::Follow { which, nodes } => {
            let Some(request) = of(*which) else { return };
            let limits = Limits::nodes(usize::from(*nodes));
            let Ok(tree) = engine.draft(&request, limits, None) else { return };
            check_tree(engine, &tree, limits);
            let _ = engine.extend(&request, &tree.chain(tree.len()), None, &GO_ON);
        }
        Operation::Feedback { which, tokens } => {
            let Some(request) = of(*which) else { return };
            let (ids, probs) = rows(&tokens.tokens());
            let _ = request.with(|sequence| {
                sequence.feedback_to_draft(TopK { k: 2, ids: &ids, probs: &probs });
            });
        }
        Operation::Draft { which, nodes, depth, min_prob } => {
            let Some(request) = of(*which) else { return };
            let limits = Limits {
                max_nodes: usize::from(*nodes) % 1025,
                max_depth: usize::from(*depth),
                min_prob: f32::from(*min_prob) / 255.0,
                chain: nodes % 2 == 1,
            };
            let Ok(tree) = engine.draft(&request, limits, None) else { return };
            check_tree(engine, &tree, limits);
        }
        Operation::Step { tokens, nodes, total } => {
            let limits = Limits { max_nodes: usize::from(*nodes), max_depth: 20, ..Limits::DEFAULT };
            let total = total.map(usize::from);
            let mut sum = 0;
            for (tree, failed) in step(engine, requests, &tokens.tokens(), limits, total) {
                check_tree(engine, &tree, limits);
                sum += tree.len();
                assert!(!failed || tree.is_empty());
            }
            assert!(total.is_none_or(|total| sum <= total));
        }
        Operation::Truncate { which, len } => {
            let Some(request) = of(*which) else { return };
            let len = usize::from(*len);
            let Ok(held) = request.with(|sequence| sequence.tokens().len()) else { return };
            let _ = request.truncate(len.min(held), &GO_ON);
        }
        Operation::Prefill { which, tokens } => {
            let Some(request) = of(*which) else { return };
            let _ = request.prefill(&tokens.tokens(), &GO_ON);
        }
        Operation::Fork { which } => {
            let Some(request) = of(*which) else { return };
            if requests.len() < MOST_REQUESTS {
                requests.extend(engine.fork(&request));
            }
        }
        Operation::Finish { which } | Operation::Close { which } => {
            let Some(request) = of(*which) else { return };
            requests.retain(|held| !Arc::ptr_eq(held, &request));
            match operation {
                Operation::Finish { .. } => {
                    let _ = engine.finish(&request, &GO_ON);
                }
                _ => request.close(),
            }
        }
        Operation::Remove { name } => {
            engine.remove_namespace(NAMES[usize::from(*name) % NAMES.len()]);
        }
        Operation::Save | Operation::Look => {}
    }
    requests.truncate(MOST_REQUESTS);
}

/// What is saved is what is restored.
fn save(session: &Session, engine: &Engine) {
    // a new engine has the default namespace
    if engine.namespace("").is_err() {
        return;
    }
    let (folder, other) = (tempfile::tempdir_in("/dev/shm").unwrap(), self::engine(session, true));
    let saved = learned(engine, folder.path());
    other.restore(&mut StateReader::open(folder.path(), &GO_ON).unwrap(), &GO_ON).unwrap();
    assert!(learned(&other, folder.path()) == saved, "a restored state is another one");
}

fuzz_target!(|session: Session| {
    let engine = engine(&session, false);
    let mut requests = Vec::new();
    for operation in session.operations.iter().take(200) {
        if matches!(operation, Operation::Save) {
            save(&session, &engine);
        }
        act(&engine, &mut requests, operation);
        let memory = engine.memory();
        assert!(memory.used <= memory.limit, "{memory:?}");
    }
    for request in requests.drain(..) {
        let checked = request.with(|sequence| sequence.check());
        assert!(!matches!(checked, Ok(Err(_)) | Err(RequestError::Failed(_))), "{checked:?}");
        request.close();
    }
    // threads may still hold a prompt that they were indexing
    for _ in 0..1000 {
        if engine.memory().used == engine.memory().shared {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    check_memory(&engine);
});
