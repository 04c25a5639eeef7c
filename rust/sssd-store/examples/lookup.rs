//! Times `Corpus::matches` and what a drafter then reads, on contexts drawn from a token stream.
//!
//! `lookup STORE TOKENS.bin [QUERIES] [mmap|ram]`, the tokens being little-endian `u32`. Prints one line of JSON.

use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use sssd_core::Corpus;
use sssd_store::{Datastore, Load};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let store = arguments.next().ok_or("STORE is missing")?;
    let tokens = std::fs::read(arguments.next().ok_or("TOKENS.bin is missing")?)?;
    let queries: usize = arguments.next().map_or(Ok(20_000), |count| count.parse())?;
    let load = if arguments.next().as_deref() == Some("mmap") { Load::Mmap } else { Load::Ram };
    let tokens: Vec<u32> =
        tokens.as_chunks().0.iter().map(|&bytes: &[u8; 4]| u32::from_le_bytes(bytes)).collect();

    let started = Instant::now();
    let store = Datastore::open(&[store], load)?;
    let open = started.elapsed();
    let (mut root, mut read) = (Vec::with_capacity(queries), Vec::with_capacity(queries));
    let (mut matches, mut window) = (Vec::with_capacity(1024), [0; 8]);
    let mut samples = 0;
    for query in 0..queries {
        // A stride coprime to the length visits distinct, far apart contexts.
        let end = 16 + (query * 1_000_003) % (tokens.len() - 16);
        matches.clear();
        let started = Instant::now();
        store.matches(black_box(&tokens[end - 16..end]), 8, 64, &mut matches);
        root.push(started.elapsed().as_nanos());
        let started = Instant::now();
        for found in &matches {
            black_box(store.continuation(found.position, &mut window));
        }
        read.push(started.elapsed().as_nanos() as f64 / matches.len().max(1) as f64);
        samples += matches.len();
    }
    root.sort_unstable();
    read.sort_unstable_by(f64::total_cmp);
    writeln!(
        std::io::stdout(),
        "{{\"open_us\": {}, \"queries\": {queries}, \"matches_ns_p50\": {}, \"matches_ns_p99\": {}, \
         \"continuation8_ns_p50\": {:.1}, \"samples\": {:.1}}}",
        open.as_micros(),
        root[queries / 2],
        root[queries * 99 / 100],
        read[queries / 2],
        samples as f64 / queries as f64,
    )?;
    Ok(())
}
