#![doc = include_str!("../README.md")]

mod builder;
mod bytes;
mod datastore;
mod documents;
mod domains;
mod error;
mod format;
mod index;
mod learning;
mod lookup;
mod output;
mod own;
mod packed;
mod progress;
mod read_domains;
mod residency;
mod segment;
mod sorting;
mod successors;
mod tables;
#[cfg(test)]
mod tests;
mod tombstones;

pub use builder::{BuildOptions, BuildSummary, Builder};
pub use bytes::Load;
pub use datastore::{Datastore, FileInfo};
pub use documents::{Document, DocumentReader};
pub use domains::DomainRun;
pub use error::{Error, Result};
pub use format::{TABLES_VERSION, VERSION};
pub use progress::Progress;
pub use tombstones::{TOMBSTONES_VERSION, write_tombstones};

/// Identifies a tokenizer, so that a store is not queried with the ids of another one. All zero: unknown.
pub type Fingerprint = [u8; 32];
