//! Has segments sorted, several at once, and puts what comes of it into the file in their order.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::format::SegmentEntry;
use crate::index::{Index, index};
use crate::output::Output;
use crate::progress::Progress;

/// Between two looks at whether the result is still wanted.
const TICK: Duration = Duration::from_millis(20);

pub struct Sorting {
    vocab_size: u32,
    /// Segments that are sorted or wait to be written, at most.
    at_once: usize,
    /// Segments that have been started.
    started: usize,
    running: VecDeque<Receiver<io::Result<Index>>>,
    progress: Arc<Progress>,
    process: u32,
}

impl Sorting {
    pub fn new(vocab_size: u32, at_once: usize) -> Self {
        let (running, process) = (VecDeque::new(), std::process::id());
        Self { vocab_size, at_once, started: 0, running, progress: Arc::default(), process }
    }

    /// Starts to sort what may be, of the segments whose text is in the file.
    pub fn start(&mut self, output: &mut Output, segments: &[SegmentEntry]) -> io::Result<()> {
        while self.at_once > 1 && self.running.len() < self.at_once && self.started < segments.len() {
            let (file, segment, vocab_size) =
                (output.read_back()?, segments[self.started].clone(), self.vocab_size);
            self.running.try_reserve(1)?;
            let progress = Arc::clone(&self.progress);
            let (sender, receiver) = sync_channel(1);
            let work = move || {
                let done = catch_unwind(AssertUnwindSafe(|| index(file, &segment, vocab_size, &progress)));
                let done = done.unwrap_or_else(|_| Err(io::Error::other("the sorter panicked")));
                let _ = sender.send(done); // nobody may listen any more
            };
            let thread = thread::Builder::new().name("sssd-sort".into());
            if !sssd_core::room_for_a_thread() || thread.spawn(work).is_err() {
                self.at_once = 1; // whoever finishes does it
                return Ok(());
            }
            self.running.push_back(receiver);
            self.started += 1;
        }
        Ok(())
    }

    /// Sorts what is left, and appends everything in order.
    pub fn finish(
        &mut self,
        output: &mut Output,
        segments: &mut [SegmentEntry],
        progress: &Progress,
    ) -> io::Result<()> {
        output.flush()?; // fails in a fork, which has no threads to wait for
        for number in 0..segments.len() {
            self.start(output, segments)?;
            let made = match self.running.pop_front() {
                Some(running) => self.wait(&running, progress)?,
                None => {
                    self.started += 1;
                    index(output.read_back()?, &segments[number], self.vocab_size, progress)?
                }
            };
            made.write(output, &mut segments[number])?;
            progress.advance(0)?;
        }
        Ok(())
    }

    fn wait(&self, running: &Receiver<io::Result<Index>>, progress: &Progress) -> io::Result<Index> {
        loop {
            progress.follow(&self.progress);
            match running.recv_timeout(TICK) {
                Ok(made) => return made,
                Err(RecvTimeoutError::Timeout) => progress.advance(0)?,
                Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the sorter stopped")),
            }
        }
    }
}

/// What is being sorted is not wanted any more.
impl Drop for Sorting {
    fn drop(&mut self) {
        self.progress.cancel();
        if self.process != std::process::id() {
            std::mem::forget(std::mem::take(&mut self.running)); // of threads that a fork does not have
        }
    }
}
