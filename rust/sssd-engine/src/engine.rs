//! What a serving engine talks to: requests come and go, namespaces keep what they teach, and everything that is
//! held is counted.

use std::path::Path;
use std::time::{Duration, Instant};

use sssd_core::{
    Common, Corpus, DraftTree, Limits, MAX_TOKEN, MemoryFull, MemoryPool, Model, Namespace, Reservation,
    Sequence, StoreSlot, Token, TopK, WeightsError,
};

use crate::batch::{Step, Work};
use crate::guide::Guide;
use crate::metrics::{Metrics, Undrafted};
use crate::request::{Interrupted, PIECE, Request, RequestError};
use crate::sizing::{Allocation, Sizing};
use crate::state::{Identity, Record, StateError, StateReader, StateWriter};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::tenants::Tenants;
use crate::thread_pool::ThreadPool;

/// Steps kept for reuse: as many as run at the same time.
const IDLE_STEPS: usize = 16;
/// Bytes that a token of a request takes, at least.
const TOKEN_BYTES: usize = 32;

/// What an engine is made with.
pub struct Options {
    /// Number of token ids, if known. Others are refused before they come here.
    pub vocab_size: Option<u32>,
    /// Nothing is drafted after these.
    pub end_tokens: Vec<Token>,
    /// A corpus that all namespaces see, at first; see [`Engine::store`].
    pub store: Option<Arc<dyn Corpus>>,
    /// Whether candidates are ranked where the corpus has tables for it.
    pub ranking: bool,
    /// Memory for the live store of each namespace.
    pub live_bytes: usize,
    /// Memory for the target's probabilities of each namespace.
    pub soft_bytes: usize,
    /// Memory for everything.
    pub max_bytes: usize,
    /// Memory for each request.
    pub max_request_bytes: usize,
    /// Threads of a batch, the caller's included.
    pub threads: usize,
    /// Named namespaces without requests are forgotten after this time.
    pub namespace_ttl: Option<Duration>,
}

impl Default for Options {
    /// One thread, nothing learned from others, no limits.
    fn default() -> Self {
        Self {
            vocab_size: None,
            end_tokens: Vec::new(),
            store: None,
            ranking: true,
            live_bytes: 0,
            soft_bytes: 0,
            max_bytes: usize::MAX,
            max_request_bytes: usize::MAX,
            threads: 1,
            namespace_ttl: None,
        }
    }
}

/// Many requests, in namespaces.
pub struct Engine {
    options: Options,
    pool: Arc<MemoryPool>,
    common: Arc<Common>,
    tenants: Tenants,
    threads: ThreadPool<Step>,
    /// With what pays for each.
    idle: Mutex<Vec<(Arc<Step>, Reservation)>>,
    metrics: Metrics,
}

/// What a namespace holds.
#[derive(Clone, Debug)]
pub struct NamespaceInfo {
    /// Its name; the one that requests have by default has none.
    pub name: String,
    /// Requests that are running.
    pub requests: usize,
    /// Tokens in its live store.
    pub live_tokens: usize,
    /// Bytes that it shares among its requests.
    pub memory_bytes: usize,
    /// Time since a request was begun or found running.
    pub idle: Duration,
}

/// Bytes in use, and the limit.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes allowed.
    pub limit: usize,
    /// Bytes charged: those of requests, and the limits of what namespaces share.
    pub used: usize,
    /// The most bytes ever charged.
    pub peak: usize,
    /// Bytes charged for what namespaces share.
    pub shared: usize,
    /// How often bytes were refused.
    pub refused: u64,
}

impl Engine {
    /// An engine with the default namespace.
    pub fn new(mut options: Options) -> Result<Self, MemoryFull> {
        let pool = Arc::new(MemoryPool::new(options.max_bytes));
        // taken out, for it is replaced there
        let store = options.store.take();
        let mut common = Common::new(options.end_tokens.clone(), store, &pool);
        if !options.ranking {
            common = common.with_network(None);
        }
        let common = Arc::new(common);
        let engine = Self {
            tenants: Tenants::new(
                Arc::clone(&common),
                options.live_bytes,
                options.soft_bytes,
                options.namespace_ttl,
            ),
            common,
            pool,
            threads: ThreadPool::new(options.threads.max(1)),
            idle: Mutex::default(),
            metrics: Metrics::default(),
            options,
        };
        engine.namespace("")?;
        Ok(engine)
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The corpus that requests match unless they are told another, with [`Request::set_store`].
    pub fn store(&self) -> &Arc<StoreSlot> {
        self.common.store()
    }

    /// What it has done.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What requests of a namespace share; made if it is not there.
    pub fn namespace(&self, name: &str) -> Result<Arc<Namespace>, MemoryFull> {
        self.tenants.find_or_make(name)
    }

    /// What requests of a namespace share, if it is there.
    pub fn find_namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.tenants.find(name)
    }

    /// Forgets what a namespace has learned; false if there is none of that name. Its running requests go on with
    /// what they know, and hand it on to nobody.
    pub fn remove_namespace(&self, name: &str) -> bool {
        self.tenants.remove(name)
    }

    /// All namespaces, by name.
    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        let mut all = Vec::new();
        self.tenants.for_each(|name, namespace, used| {
            all.push(NamespaceInfo {
                name: name.to_owned(),
                requests: namespace.sequences(),
                live_tokens: namespace.live_len().0,
                memory_bytes: namespace.memory_bytes(),
                idle: used.elapsed(),
            });
        });
        all
    }

    /// Writes what all namespaces have learned into a folder. Whatever happens, the file there is the old one or the new
    /// one; after success the new one survives a loss of power.
    pub fn save(&self, folder: &Path, interrupted: Interrupted) -> Result<(), StateError> {
        let mut writer = StateWriter::create(folder, &self.identity())?;
        let go_on = || if interrupted() { Err(StateError::Interrupted) } else { Ok(()) };
        self.tenants.try_for_each(|name, namespace, _| {
            let entries = namespace.feedback_len() as u64;
            writer.namespace(name, &namespace.with_model(Model::to_bytes)?, entries)?;
            namespace.for_each_document(|tokens, used| {
                go_on()?;
                writer.document(tokens, used)
            })?;
            namespace.for_each_feedback(|words| {
                go_on()?;
                writer.feedback(words)
            })
        })?;
        writer.finish()
    }

    fn identity(&self) -> Identity {
        Identity {
            vocab_size: self.options.vocab_size.unwrap_or(0).into(),
            end_tokens: self.options.end_tokens.clone(),
            live_bytes: self.options.live_bytes as u64,
            soft_bytes: self.options.soft_bytes as u64,
        }
    }

    /// Makes the namespaces of a saved state, in place of those of their names.
    pub fn restore(&self, state: &mut StateReader, interrupted: Interrupted) -> Result<(), StateError> {
        let limit = self.options.vocab_size.unwrap_or(MAX_TOKEN + 1);
        let mut namespace = None;
        while let Some(record) = state.next_record()? {
            if interrupted() {
                return Err(StateError::Interrupted);
            }
            match (record, &namespace) {
                (Record::Namespace { name, weights, entries }, _) => {
                    self.remove_namespace(&name);
                    let made = self.namespace(&name)?;
                    made.set_weights(&weights).map_err(|failure| match failure {
                        WeightsError::Memory(full) => StateError::Memory(full),
                        _ => StateError::Weights { path: state.path().to_owned() },
                    })?;
                    made.expect_feedback(entries as usize);
                    namespace = Some(made);
                }
                (Record::Document { tokens, used }, Some(namespace)) => {
                    namespace.restore_document(&tokens, used)
                }
                (Record::Feedback(words), Some(namespace)) => namespace.restore_feedback(&words, limit),
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Bytes in use.
    pub fn memory(&self) -> Memory {
        Memory {
            limit: self.pool.limit(),
            used: self.pool.used(),
            peak: self.pool.peak(),
            shared: self.pool.shared(),
            refused: self.pool.refused(),
        }
    }

    /// Whether so many tokens may fit into a request's memory and the engine's: to be asked before they are copied.
    pub fn may_hold(&self, tokens: usize) -> Result<(), MemoryFull> {
        let fits = || {
            let mut reservation = Reservation::new(&self.pool, self.options.max_request_bytes);
            reservation.admit();
            reservation.try_resize(tokens.saturating_mul(TOKEN_BYTES))
        };
        fits().or_else(|full| if self.tenants.make_room() { fits() } else { Err(full) })
    }

    /// Starts a request. `interrupted` is asked between pieces of a long prompt whether to give up.
    pub fn begin(
        &self,
        namespace: &str,
        prompt: &[Token],
        prediction: &[Token],
        max_length: Option<usize>,
        interrupted: Interrupted,
    ) -> Result<Arc<Request>, RequestError> {
        let begin = || {
            let mut sequence = self.start(namespace, prediction, max_length, interrupted)?;
            for piece in prompt.chunks(PIECE) {
                sequence.prefill(piece)?;
                if piece.len() == PIECE && interrupted() {
                    return Err(RequestError::Interrupted);
                }
            }
            Ok(sequence)
        };
        let mut sequence = self.with_room(begin)?;
        sequence.admit();
        Metrics::count(&self.metrics.begun, 1);
        Ok(Arc::new(Request::new(sequence)))
    }

    /// Starts a request whose prompt is indexed in the background. Until then its drafts are empty.
    pub fn begin_in_background(
        &self,
        namespace: &str,
        prompt: Vec<Token>,
        prediction: &[Token],
        max_length: Option<usize>,
        interrupted: Interrupted,
    ) -> Result<Arc<Request>, RequestError> {
        let (mut sequence, reservation) = self.with_room(|| {
            let sequence = self.start(namespace, prediction, max_length, interrupted)?;
            let mut reservation = Reservation::new(&self.pool, self.options.max_request_bytes);
            reservation.try_resize(prompt.capacity() * size_of::<Token>())?;
            Ok((sequence, reservation))
        })?;
        sequence.admit();
        Metrics::count(&self.metrics.begun, 1);
        let request = Arc::new(Request::with_backlog(sequence, prompt, Some(reservation)));
        if !self.threads.fill(&request) {
            // whoever asks for it indexes it piece by piece
            request.leave_to_callers();
        }
        Ok(request)
    }

    /// Tries again what did not fit, if there are namespaces to be forgotten.
    fn with_room<T>(&self, begin: impl Fn() -> Result<T, RequestError>) -> Result<T, RequestError> {
        match begin() {
            Err(RequestError::Memory(_)) if self.tenants.make_room() => begin(),
            begun => begun,
        }
    }

    fn start(
        &self,
        namespace: &str,
        prediction: &[Token],
        max_length: Option<usize>,
        interrupted: Interrupted,
    ) -> Result<Sequence, RequestError> {
        let reservation = Reservation::new(&self.pool, self.options.max_request_bytes);
        let namespace = self.namespace(namespace)?;
        let mut sequence = Sequence::new(&namespace, reservation)?;
        for piece in prediction.chunks(PIECE) {
            sequence.predict(piece)?;
            if piece.len() == PIECE && interrupted() {
                return Err(RequestError::Interrupted);
            }
        }
        sequence.set_max_length(max_length.unwrap_or(usize::MAX));
        Ok(sequence)
    }

    /// Another request with the same history.
    pub fn fork(&self, request: &Request) -> Result<Arc<Request>, RequestError> {
        let fork = request.with(|sequence| sequence.fork())??;
        Metrics::count(&self.metrics.begun, 1);
        Ok(Arc::new(Request::new(fork)))
    }

    /// Ends a request; later ones of its namespace learn from it. Finishing a closed one does nothing. If it is
    /// interrupted, part of a long text may not be learned.
    pub fn finish(&self, request: &Request, interrupted: Interrupted) -> Result<(), RequestError> {
        match request.take(interrupted) {
            Ok(sequence) => {
                let finished = sequence.finish(&mut || interrupted());
                Metrics::count(&self.metrics.finished, 1);
                if finished { Ok(()) } else { Err(RequestError::Interrupted) }
            }
            Err(RequestError::Closed) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Learns a text that was decoded elsewhere, as from a request that finished here. If it is interrupted, part of a
    /// long text may not be learned.
    pub fn learn(
        &self,
        namespace: &str,
        tokens: &[Token],
        interrupted: Interrupted,
    ) -> Result<(), RequestError> {
        let learned = self.namespace(namespace)?.learn(tokens, &mut || interrupted());
        if learned { Ok(()) } else { Err(RequestError::Interrupted) }
    }

    /// Appends tokens to one request.
    pub fn extend(
        &self,
        request: &Request,
        tokens: &[Token],
        top: Option<TopK>,
        interrupted: Interrupted,
    ) -> Result<(), RequestError> {
        let outcome = self.noted(request.extend(tokens, top, interrupted))?;
        Metrics::count(&self.metrics.tokens, tokens.len() as u64);
        self.metrics.outcomes(outcome);
        Ok(())
    }

    /// Makes a request's text that of a row, as [`Request::follow`] does, and returns how many nodes of its last draft the
    /// new tokens have accepted. What is begun anew is learned from if `learn`.
    pub fn follow(
        &self,
        request: &Request,
        keep: usize,
        tokens: &[Token],
        learn: bool,
        interrupted: Interrupted,
    ) -> Result<usize, RequestError> {
        let told = self.noted(request.follow(keep, tokens, learn, interrupted))?;
        Metrics::count(&self.metrics.tokens, tokens.len() as u64);
        self.metrics.outcomes(told);
        Ok(told.map_or(0, |outcome| outcome.accepted))
    }

    /// Forgets what all namespaces have learned, as [`Engine::remove_namespace`] does with one.
    pub fn forget(&self) {
        self.tenants.clear();
    }

    /// Drafts for one request, as a batch of one does.
    pub fn draft(
        &self,
        request: &Request,
        limits: Limits,
        sizing: Option<&Sizing>,
    ) -> Result<DraftTree, RequestError> {
        self.draft_with(request, limits, sizing, &Guide::default())
    }

    /// The same with what a caller has to say of the draft. Rules that it does not know are not asked for.
    pub fn draft_with(
        &self,
        request: &Request,
        mut limits: Limits,
        sizing: Option<&Sizing>,
        guide: &Guide,
    ) -> Result<DraftTree, RequestError> {
        let start = Instant::now();
        let ruled = matches!(sizing, Some(Sizing::Rule(_)));
        let (allowed, mut found) = (limits.max_nodes, None);
        let mut pace = if ruled { *request.pace() } else { None };
        if let Some(sizing) = sizing {
            sizing.begin_step(std::iter::once((&mut limits, &mut pace)));
        }
        self.common.look_at_store();
        let drafted = request.with_ready(|sequence| {
            sequence.start_draft_with(limits, limits.max_nodes, guide.outside());
            found = Some(sequence.tree().len());
            let Some(sizing) = sizing else { return sequence.end_draft(limits.max_nodes).clone() };
            let mut trees = Allocation::default();
            trees.push(&sequence.tree().probs);
            let drafted = if limits.max_nodes > 0 { std::slice::from_mut(&mut pace) } else { &mut [] };
            let nodes = sizing.allocate(sequence.tokens().len() as f64, &mut trees, drafted)[0];
            sequence.end_draft(nodes).clone()
        });
        if ruled {
            *request.pace() = pace;
        }
        let tree = self.noted(drafted)?.unwrap_or_default();
        if tree.is_empty() {
            self.metrics.empty_draft(Undrafted::why((allowed, limits.max_nodes), found, sizing.is_some()));
        }
        Metrics::time(&self.metrics.draft_ns, start.elapsed());
        Ok(tree)
    }

    fn noted<T>(&self, done: Result<T, RequestError>) -> Result<T, RequestError> {
        if let Err(RequestError::Failed(_)) = &done {
            Metrics::count(&self.metrics.failed, 1);
        }
        done
    }

    /// Buffers for a step, empty.
    pub fn idle_step(&self) -> Arc<Step> {
        lock(&self.idle).pop().map(|(step, _)| step).unwrap_or_default()
    }

    /// Does a step that has been filled. False if its [`Work::places`](crate::Work::places) lack rules: then it goes on
    /// with [`Engine::resume`] once its guides have them, or ends with [`Engine::give_up`].
    pub fn run(&self, step: &Arc<Step>) -> bool {
        self.advance(step, Work::prepare)
    }

    /// Goes on with a step.
    pub fn resume(&self, step: &Arc<Step>) -> bool {
        self.advance(step, |_| {})
    }

    fn advance(&self, step: &Arc<Step>, begin: impl FnOnce(&mut Work)) -> bool {
        let start = Instant::now();
        self.common.look_at_store();
        let done = step.run(&self.threads, begin);
        Metrics::time(&self.metrics.step_ns, start.elapsed());
        if done {
            self.count_step(step);
        }
        done
    }

    /// Ends a step without drafts.
    pub fn give_up(&self, step: &Arc<Step>) {
        step.lock().drop_drafts();
        self.count_step(step);
    }

    fn count_step(&self, step: &Step) {
        let work = step.lock();
        self.metrics.batch.add(work.requests.len() as u64);
        if work.extend {
            Metrics::count(&self.metrics.tokens, work.tokens.len() as u64);
            self.metrics.outcomes(work.outcomes());
        }
        work.undrafted().for_each(|why| self.metrics.empty_draft(why));
        let failed = work.failures().filter(|failure| matches!(failure.error, RequestError::Failed(_)));
        Metrics::count(&self.metrics.failed, failed.count() as u64);
    }

    /// Takes the buffers of a step back.
    pub fn put_back(&self, step: Arc<Step>) {
        let mut work = step.lock();
        work.clear();
        let bytes = work.memory_bytes();
        drop(work);
        let mut paid = Reservation::shared(&self.pool);
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE_STEPS && paid.try_resize(bytes).is_ok() {
            idle.push((step, paid));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
