//! What a serving engine talks to: requests come and go, namespaces keep what they teach, and everything that is
//! held is counted.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sssd_core::{
    Corpus, DraftTree, Knowledge, Limits, MAX_TOKEN, MemoryFull, MemoryPool, Model, Namespace, Reservation,
    Sequence, Token, TopK,
};

use crate::batch::Step;
use crate::metrics::Metrics;
use crate::request::{Request, RequestError};
use crate::sizing::{Allocation, Sizing};
use crate::state::{NamespaceState, State};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use crate::thread_pool::ThreadPool;

/// Steps kept for reuse: as many as run at the same time.
const IDLE_STEPS: usize = 16;
/// Prompts longer than this are indexed in pieces.
const PIECE: usize = 1 << 16;

/// What an engine is made with.
pub struct Options {
    /// Number of token ids, if known. Others are refused before they come here.
    pub vocab_size: Option<u32>,
    /// Nothing is drafted after these.
    pub end_tokens: Vec<Token>,
    /// A corpus that all namespaces see.
    pub store: Option<Arc<dyn Corpus>>,
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
    namespaces: Mutex<BTreeMap<String, Tenant>>,
    threads: ThreadPool<Step>,
    idle: Mutex<Vec<Arc<Step>>>,
    metrics: Metrics,
}

struct Tenant {
    namespace: Arc<Namespace>,
    used: Instant,
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
    pub fn new(options: Options) -> Result<Self, MemoryFull> {
        let engine = Self {
            pool: Arc::new(MemoryPool::new(options.max_bytes)),
            namespaces: Mutex::default(),
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

    /// What it has done.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What requests of a namespace share; made if it is not there.
    pub fn namespace(&self, name: &str) -> Result<Arc<Namespace>, MemoryFull> {
        let mut namespaces = lock(&self.namespaces);
        self.expire(&mut namespaces);
        if let Some(tenant) = namespaces.get_mut(name) {
            tenant.used = Instant::now();
            return Ok(Arc::clone(&tenant.namespace));
        }
        let Options { end_tokens, store, live_bytes, soft_bytes, .. } = &self.options;
        let knowledge = Knowledge::new(Model::default(), *live_bytes, *soft_bytes);
        let reservation = Reservation::new(&self.pool, usize::MAX);
        let namespace = Arc::new(Namespace::new(end_tokens.clone(), store.clone(), knowledge, reservation)?);
        let tenant = Tenant { namespace: Arc::clone(&namespace), used: Instant::now() };
        namespaces.insert(name.to_owned(), tenant);
        Ok(namespace)
    }

    /// What requests of a namespace share, if it is there.
    pub fn find_namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        let mut namespaces = lock(&self.namespaces);
        self.expire(&mut namespaces);
        namespaces.get(name).map(|tenant| Arc::clone(&tenant.namespace))
    }

    /// What all namespaces have learned, to be saved.
    pub fn state(&self) -> State {
        let namespaces = lock(&self.namespaces);
        let held: Vec<_> =
            namespaces.iter().map(|(name, tenant)| (name.clone(), Arc::clone(&tenant.namespace))).collect();
        drop(namespaces);
        let state = |(name, namespace): (String, Arc<Namespace>)| NamespaceState {
            name,
            weights: namespace.model().to_bytes(),
            documents: namespace.documents(),
            feedback: namespace.feedback_entries(),
        };
        State {
            vocab_size: self.options.vocab_size.unwrap_or(0).into(),
            end_tokens: self.options.end_tokens.clone(),
            live_bytes: self.options.live_bytes as u64,
            soft_bytes: self.options.soft_bytes as u64,
            namespaces: held.into_iter().map(state).collect(),
        }
    }

    /// Makes the namespaces of a state, in place of those of their names. False if weights are not those of this
    /// release. The target's probabilities are left out where there is other room for them.
    pub fn restore(&self, state: State) -> Result<bool, MemoryFull> {
        let limit = self.options.vocab_size.unwrap_or(MAX_TOKEN + 1);
        let same_room = self.options.soft_bytes as u64 == state.soft_bytes;
        for NamespaceState { name, weights, documents, feedback } in state.namespaces {
            let Ok(model) = Model::from_bytes(&weights) else { return Ok(false) };
            self.remove_namespace(&name);
            let feedback = if same_room { &feedback[..] } else { &[] };
            self.namespace(&name)?.restore(model, &documents, feedback, limit);
        }
        Ok(true)
    }

    /// Forgets the namespaces whose time is up.
    fn expire(&self, namespaces: &mut BTreeMap<String, Tenant>) {
        let Some(ttl) = self.options.namespace_ttl else { return };
        let now = Instant::now();
        namespaces.retain(|name, tenant| {
            if tenant.namespace.sequences() > 0 {
                tenant.used = now;
            }
            let used = tenant.used.max(tenant.namespace.last_end());
            name.is_empty() || now.saturating_duration_since(used) < ttl
        });
    }

    /// All namespaces, by name.
    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        let mut namespaces = lock(&self.namespaces);
        self.expire(&mut namespaces);
        let info = |(name, tenant): (&String, &Tenant)| NamespaceInfo {
            name: name.clone(),
            requests: tenant.namespace.sequences(),
            live_tokens: tenant.namespace.live_len().0,
            memory_bytes: tenant.namespace.memory_bytes(),
            idle: tenant.used.elapsed(),
        };
        namespaces.iter().map(info).collect()
    }

    /// Forgets what a namespace has learned; false if there is none of that name. Its running requests go on with
    /// what they know, and hand it on to nobody.
    pub fn remove_namespace(&self, name: &str) -> bool {
        lock(&self.namespaces).remove(name).is_some()
    }

    /// Bytes in use.
    pub fn memory(&self) -> Memory {
        let namespaces = lock(&self.namespaces);
        let shared = namespaces.values().map(|tenant| tenant.namespace.most_bytes());
        Memory {
            limit: self.pool.limit(),
            used: self.pool.used(),
            peak: self.pool.peak(),
            shared: shared.sum(),
            refused: self.pool.refused(),
        }
    }

    /// Starts a request. `interrupted` is asked between pieces of a long prompt whether to give up; then there is no
    /// request.
    pub fn begin(
        &self,
        namespace: &str,
        prompt: &[Token],
        prediction: &[Token],
        max_length: Option<usize>,
        mut interrupted: impl FnMut() -> bool,
    ) -> Result<Option<Arc<Request>>, MemoryFull> {
        let mut sequence = self.start(namespace, prediction, max_length)?;
        for piece in prompt.chunks(PIECE) {
            sequence.prefill(piece)?;
            if piece.len() == PIECE && interrupted() {
                return Ok(None);
            }
        }
        sequence.admit();
        Ok(Some(Arc::new(Request::new(sequence))))
    }

    /// Starts a request whose prompt is indexed in the background. Until then its drafts are empty.
    pub fn begin_in_background(
        &self,
        namespace: &str,
        prompt: Vec<Token>,
        prediction: &[Token],
        max_length: Option<usize>,
    ) -> Result<Arc<Request>, MemoryFull> {
        let mut sequence = self.start(namespace, prediction, max_length)?;
        let mut reservation = Reservation::new(&self.pool, self.options.max_request_bytes);
        reservation.try_resize(prompt.capacity() * size_of::<Token>())?;
        sequence.admit();
        let request = Arc::new(Request::with_backlog(sequence, prompt, Some(reservation)));
        if !self.threads.fill(&request) {
            // whoever asks for it indexes it piece by piece
            request.leave_to_callers();
        }
        Ok(request)
    }

    fn start(
        &self,
        namespace: &str,
        prediction: &[Token],
        max_length: Option<usize>,
    ) -> Result<sssd_core::Sequence, MemoryFull> {
        let reservation = Reservation::new(&self.pool, self.options.max_request_bytes);
        let namespace = self.namespace(namespace)?;
        let mut sequence = Sequence::begin(&namespace, &[], prediction, reservation)?;
        sequence.set_max_length(max_length.unwrap_or(usize::MAX));
        Metrics::count(&self.metrics.begun, 1);
        Ok(sequence)
    }

    /// Another request with the same history.
    pub fn fork(&self, request: &Request) -> Result<Arc<Request>, RequestError> {
        let fork = request.with(|sequence| sequence.fork())??;
        Metrics::count(&self.metrics.begun, 1);
        Ok(Arc::new(Request::new(fork)))
    }

    /// Ends a request; later ones of its namespace learn from it. Finishing a closed one does nothing.
    pub fn finish(&self, request: &Request) -> Result<(), RequestError> {
        match request.take() {
            Ok(sequence) => {
                sequence.finish();
                Metrics::count(&self.metrics.finished, 1);
                Ok(())
            }
            Err(RequestError::Closed) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Appends tokens to one request.
    pub fn extend(&self, request: &Request, tokens: &[Token], top: Option<TopK>) -> Result<(), RequestError> {
        let outcome = self.noted(request.with(|sequence| sequence.extend(tokens, top)))??;
        Metrics::count(&self.metrics.tokens, tokens.len() as u64);
        self.metrics.outcomes(outcome);
        Ok(())
    }

    /// Drafts for one request, as a batch of one does.
    pub fn draft(
        &self,
        request: &Request,
        mut limits: Limits,
        sizing: Option<&Sizing>,
    ) -> Result<DraftTree, RequestError> {
        let start = Instant::now();
        let ruled = matches!(sizing, Some(Sizing::Rule(_)));
        let mut pace = if ruled { *request.pace() } else { None };
        if let Some(sizing) = sizing {
            sizing.begin_step(std::iter::once((&mut limits, &mut pace)));
        }
        let drafted = request.with_ready(|sequence| {
            sequence.start_draft(limits, limits.max_nodes);
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
        lock(&self.idle).pop().unwrap_or_default()
    }

    /// Does a step that has been filled.
    pub fn run(&self, step: &Arc<Step>) {
        let start = Instant::now();
        step.run(&self.threads);
        Metrics::time(&self.metrics.step_ns, start.elapsed());
        let work = step.lock();
        self.metrics.batch.add(work.requests.len() as u64);
        if work.extend {
            Metrics::count(&self.metrics.tokens, work.tokens.len() as u64);
            self.metrics.outcomes(work.outcomes());
        }
        let failed = work.failures().filter(|failure| matches!(failure.error, RequestError::Failed(_)));
        Metrics::count(&self.metrics.failed, failed.count() as u64);
    }

    /// Takes the buffers of a step back.
    pub fn put_back(&self, step: Arc<Step>) {
        step.lock().clear();
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE_STEPS {
            idle.push(step);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
