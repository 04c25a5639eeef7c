//! A few threads that help with steps and index prompts in the background.
//!
//! Plain threads that wait for jobs: a step shares its items by a counter, so a helper that comes late finds
//! nothing to do and nobody waits for it, which a task pool with scopes cannot promise. Nothing is allocated to
//! hand over a job.

use std::collections::VecDeque;

use sssd_core::room_for_a_thread;

use crate::gate;
use crate::request::Request;
use crate::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use crate::sync::{Arc, Mutex, PoisonError, thread};

/// Jobs that may wait for one thread.
const QUEUE: usize = 64;

/// What several threads may work on.
pub trait Shared: Send + Sync + 'static {
    /// Works on it until nothing is left to take.
    fn help(&self);
}

enum Job<S> {
    Help(Arc<S>),
    Fill(Arc<Request>),
}

/// Started when first needed, and again in a forked child.
pub struct ThreadPool<S> {
    threads: usize,
    helpers: Mutex<Helpers<S>>,
}

struct Helpers<S> {
    generation: u32,
    senders: Vec<SyncSender<Job<S>>>,
    next: usize,
}

impl<S> Helpers<S> {
    /// Lets go of threads of a parent process. Their channels are not to be touched, not even to be dropped: the fork
    /// may have found a lock of theirs closed.
    fn disown(&mut self) {
        let generation = gate::generation();
        if self.generation != generation {
            std::mem::forget(std::mem::take(&mut self.senders));
            self.generation = generation;
        }
    }
}

impl<S> Drop for Helpers<S> {
    fn drop(&mut self) {
        self.disown();
    }
}

impl<S: Shared> ThreadPool<S> {
    /// `threads` in all, the caller's included.
    pub fn new(threads: usize) -> Self {
        let helpers = Helpers { generation: 0, senders: Vec::new(), next: 0 };
        Self { threads, helpers: Mutex::new(helpers) }
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Asks at most `helpers` threads for help with a step.
    pub fn help(&self, step: &Arc<S>, helpers: usize) {
        let helpers = helpers.min(self.threads - 1);
        if helpers > 0 {
            self.with(|pool| {
                for helper in &pool.senders[..helpers.min(pool.senders.len())] {
                    // a full queue is a busy thread
                    let _ = helper.try_send(Job::Help(Arc::clone(step)));
                }
            });
        }
    }

    /// Has the prompt of a request indexed in the background; false if nobody can.
    pub fn fill(&self, request: &Arc<Request>) -> bool {
        self.threads > 1
            && self.with(|helpers| {
                helpers.next += 1;
                let senders = helpers.senders.len().max(1);
                let helper = helpers.senders.get(helpers.next % senders);
                helper.is_some_and(|helper| helper.try_send(Job::Fill(Arc::clone(request))).is_ok())
            })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Helpers<S>) -> T) -> T {
        let mut helpers = self.helpers.lock().unwrap_or_else(PoisonError::into_inner);
        helpers.disown();
        if helpers.senders.is_empty() {
            helpers.senders = (1..self.threads).map_while(start).collect();
        }
        work(&mut helpers)
    }
}

/// A thread that ends when the pool does; nothing if the system has none to spare.
fn start<S: Shared>(number: usize) -> Option<SyncSender<Job<S>>> {
    if !room_for_a_thread() {
        return None;
    }
    let (sender, receiver) = sync_channel(QUEUE);
    let thread = thread::Builder::new().name(format!("sssd-{number}"));
    thread.spawn(move || work(&receiver)).ok().map(|_| sender)
}

fn work<S: Shared>(jobs: &Receiver<Job<S>>) {
    let mut filling = VecDeque::new();
    loop {
        let job = match jobs.try_recv() {
            Err(TryRecvError::Empty) if filling.is_empty() => {
                jobs.recv().map_err(|_| TryRecvError::Disconnected)
            }
            job => job,
        };
        match job {
            Ok(Job::Help(step)) => {
                let _pass = gate::enter();
                step.help();
            }
            Ok(Job::Fill(request)) => filling.push_back(request),
            // steps come first
            Err(TryRecvError::Empty) => {
                let _pass = gate::enter();
                if filling.front().is_none_or(|request: &Arc<Request>| request.fill()) {
                    filling.pop_front();
                }
            }
            Err(TryRecvError::Disconnected) => return,
        }
    }
}
