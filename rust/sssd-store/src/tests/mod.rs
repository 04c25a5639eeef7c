mod documents;
mod domains;
mod hostile;
mod oracle;
mod part;
mod ranking;
mod scale;
mod tombstones;

use std::path::Path;

use sssd_core::Token;

use crate::{BuildOptions, Builder, Progress};

/// Builds a file, with segments smaller than any memory limit would give if `segment_symbols` says so.
fn build(path: &Path, options: BuildOptions, segment_symbols: Option<u64>, documents: &[Vec<Token>]) {
    let mut builder = Builder::create(path, options).unwrap();
    builder.limit_segments(segment_symbols.unwrap_or(u64::MAX));
    for document in documents {
        builder.add_document(document).unwrap();
    }
    builder.finish(&Progress::default()).unwrap();
}
