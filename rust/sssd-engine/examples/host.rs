//! A serving engine in small, without Python: requests join and leave, each step drafts for all that run from their own
//! texts, from earlier ones and from a datastore, as much as pays, and one packed pass of the target verifies it.
//!
//! `host`. The target is a table and the times are those of a device on paper, so that it runs anywhere; a host puts its
//! model's forward pass in the place of [`Target::pass`]. It checks that every text is the target's own.

use std::collections::VecDeque;
use std::error::Error;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use sssd_core::{Corpus, FlatTrees, Limits, PassBlock, Shape, Token};
use sssd_engine::{
    CostCurve, DraftCost, Engine, Layout, Options, Plan, Request, RuleOptions, Sizing, SizingRule, StepTimes,
};
use sssd_store::{BuildOptions, Builder, Datastore, Load, Progress};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const VOCABULARY: Token = 1000;
const END: Token = 0;
const MOST_NODES: usize = 16;
const PASS_SECONDS: f64 = 0.02;
const NODE_SECONDS: f64 = 0.0002;

/// Stands for the model.
struct Target;

impl Target {
    /// The token after a text: mostly the same after the same two, and some noise that repeats less often.
    fn next(text: &[Token]) -> Token {
        let last = |back: usize| text.len().checked_sub(back).map_or(1, |place| text[place]);
        let noise = if (last(1) + last(2)) % 11 == 0 { last(7) } else { 0 };
        1 + (last(1) * 31 + last(2) * 17 + noise * 7) % 97
    }

    /// A pass over the entries of a block: what comes after each, and the seconds that it took.
    fn pass(rows: &[Running], block: &PassBlock) -> Result<(Vec<i64>, f64)> {
        let n = block.entries();
        let (mut ids, mut parents, mut of_row) = (vec![0; n], vec![0; n], vec![0; n]);
        let mut starts = vec![0; rows.len() + 1];
        block.ids(&mut ids)?;
        block.parents(&mut parents)?;
        block.row_numbers(&mut of_row)?;
        block.offsets(&mut starts)?;
        let after = |entry: usize| {
            let row = of_row[entry] as usize;
            let mut path = Vec::new();
            let (mut place, first) = (entry as i64 - i64::from(starts[row]), i64::from(starts[row]));
            while place > 0 {
                path.push(ids[(first + place) as usize] as Token);
                place = parents[(first + place) as usize];
            }
            let mut text = rows[row].text.clone();
            text.extend(path.iter().rev());
            i64::from(Self::next(&text))
        };
        let seconds = PASS_SECONDS + NODE_SECONDS * (n - rows.len()) as f64;
        Ok(((0..n).map(after).collect(), seconds))
    }
}

/// A request that runs.
struct Running {
    request: Arc<Request>,
    prompt: usize,
    wanted: usize,
    text: Vec<Token>,
    /// What the last pass has produced.
    produced: Vec<Token>,
}

impl Running {
    /// Begins a request; its first token comes from the pass that reads the prompt.
    fn begin(engine: &Engine, prompt: &[Token], wanted: usize) -> Result<Self> {
        let request = engine.begin("", prompt, &[], Some(prompt.len() + wanted), &|| false)?;
        let first = Target::next(prompt);
        let mut text = prompt.to_vec();
        text.push(first);
        Ok(Self { request, prompt: prompt.len(), wanted, text, produced: vec![first] })
    }

    fn is_over(&self) -> bool {
        self.text.len() >= self.prompt + self.wanted || self.produced.contains(&END)
    }
}

/// Drafts of all rows, one after another.
#[derive(Default)]
struct Drafts {
    token_ids: Vec<i32>,
    parents: Vec<i32>,
    offsets: Vec<i32>,
}

/// Hands over what was produced, and drafts.
fn draft(engine: &Engine, rule: &Arc<SizingRule>, rows: &[Running]) -> Drafts {
    let step = engine.idle_step();
    let mut work = step.lock();
    (work.extend, work.draft) = (true, true);
    work.sizing = Some(Sizing::Rule(Arc::clone(rule)));
    work.offsets.push(0);
    for row in rows {
        work.requests.push(Arc::clone(&row.request));
        work.tokens.extend(&row.produced);
        let end = work.tokens.len();
        work.offsets.push(end);
        work.plans.push(Plan { min_nodes: 0, limits: Limits::nodes(MOST_NODES) });
    }
    drop(work);
    engine.run(&step);
    let work = step.lock();
    // a request that has failed has an empty tree, and is decoded without drafts
    let mut drafts = Drafts { offsets: vec![0], ..Drafts::default() };
    work.trees(|_, tree| {
        drafts.token_ids.extend(tree.token_ids.iter().map(|&token| token as i32));
        drafts.parents.extend(&tree.parents);
        drafts.offsets.push(drafts.token_ids.len() as i32);
    });
    drop(work);
    engine.put_back(step);
    drafts
}

/// One step of all that run: draft, verify, keep what the target would have said.
fn step(
    engine: &Engine,
    rule: &Arc<SizingRule>,
    rows: &mut [Running],
    block: &mut PassBlock,
) -> Result<usize> {
    let started = Instant::now();
    let Drafts { token_ids, parents, offsets } = draft(engine, rule, rows);
    let draft_seconds = started.elapsed().as_secs_f64();
    let roots: Vec<Token> = rows.iter().map(|row| row.text[row.text.len() - 1]).collect();
    let trees = FlatTrees { token_ids: &token_ids, parents: &parents, offsets: &offsets };
    block.set(&roots, trees, Shape::Packed)?;
    let (targets, seconds) = Target::pass(rows, block)?;
    let (mut kept, mut tokens) = (vec![0; block.filled()], vec![0; block.filled()]);
    let mut starts = vec![0; rows.len() + 1];
    block.accept(&targets, &mut kept, &mut tokens, &mut starts)?; // `kept`: what stays in a cache of keys and values
    for (row, bounds) in rows.iter_mut().zip(starts.windows(2)) {
        let room = row.prompt + row.wanted - row.text.len();
        let new = &tokens[bounds[0] as usize..bounds[1] as usize];
        let ended =
            new.iter().position(|&token| token == i64::from(END)).map_or(new.len(), |place| place + 1);
        row.produced = new[..ended.min(room)].iter().map(|&token| token as Token).collect();
        row.text.extend(&row.produced);
    }
    rule.observe(&StepTimes {
        batch: rows.len(),
        size: token_ids.len(),
        context: rows.iter().map(|row| row.text.len()).sum::<usize>() as f64 / rows.len() as f64,
        seconds: Some(seconds),
        prefill_tokens: 0,
        tokens: rows.iter().map(|row| row.produced.len()).sum::<usize>() as f64,
        draft_seconds,
    });
    Ok(token_ids.len())
}

/// The datastore: texts that the target has written before.
fn corpus(folder: &std::path::Path) -> Result<Datastore> {
    let path = folder.join("corpus.sssd");
    let mut builder = Builder::create(&path, BuildOptions::new(VOCABULARY))?;
    for start in 1..20 {
        let mut text = vec![start];
        for _ in 0..100 {
            text.push(Target::next(&text));
        }
        builder.add_document(&text)?;
    }
    builder.finish(&Progress::default())?;
    Ok(Datastore::open(&[path], Load::Ram)?)
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let engine = Engine::new(Options {
        vocab_size: Some(VOCABULARY),
        end_tokens: vec![END],
        store: Some(Arc::new(corpus(folder.path())?) as Arc<dyn Corpus>),
        live_bytes: 1 << 20,
        max_bytes: 256 << 20,
        threads: 2,
        ..Options::default()
    })?;
    // a pass of one token, and one of 129
    let axes = [vec![1.0], vec![1.0, 129.0], vec![0.0]];
    let seconds = vec![PASS_SECONDS, PASS_SECONDS + 128.0 * NODE_SECONDS];
    let free = DraftCost { step: 0.0, request: 0.0, node: 0.0, threads: 1 };
    let curve = Arc::new(CostCurve::new(axes, seconds, Layout::Packed, Vec::new(), free)?);
    let rule = Arc::new(SizingRule::new(curve, Some(MOST_NODES), RuleOptions::default()));

    let mut waiting: VecDeque<Vec<Token>> = (0..12).map(|n| (n..n + 30).collect()).collect();
    let (mut rows, mut block) = (Vec::new(), PassBlock::default());
    let (mut passes, mut requests, mut produced, mut drafted) = (0, 0, 0, 0);
    while !(waiting.is_empty() && rows.is_empty()) {
        while let Some(prompt) = if rows.len() < 4 { waiting.pop_front() } else { None } {
            rows.push(Running::begin(&engine, &prompt, 100)?);
        }
        drafted += step(&engine, &rule, &mut rows, &mut block)?;
        (passes, requests) = (passes + 1, requests + rows.len());
        for row in rows.extract_if(.., |row| row.is_over()) {
            let mut plain = row.text[..row.prompt].to_vec();
            (0..row.text.len() - row.prompt).for_each(|_| plain.push(Target::next(&plain)));
            assert_eq!(row.text, plain, "every text is the target's own");
            produced += row.text.len() - row.prompt - 1;
            // the last tokens were not handed over by a step
            engine.extend(&row.request, &row.produced, None, &|| false)?;
            engine.finish(&row.request, &|| false)?;
        }
    }
    let per_step = produced as f64 / requests as f64;
    writeln!(
        std::io::stdout(),
        "{produced} tokens in {passes} passes: {per_step:.2} tokens per request and pass, {drafted} drafted"
    )?;
    assert!(per_step > 1.5, "drafts come true");
    Ok(())
}
