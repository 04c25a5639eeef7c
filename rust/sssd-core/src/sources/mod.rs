//! Where evidence comes from: one row a source in [`SOURCES`], one file for what it looks up.

pub mod aligned;
pub mod corpus;
pub mod feedback;
pub mod live;
pub mod lower;
pub mod request;
pub mod seqlock;

/// What the predictor must know of a source. The order of the rows is that of the learned tables.
pub struct Source {
    /// What users call it.
    pub name: &'static str,
    pub evidence: Evidence,
    /// Whether a longer match is among the shorter ones as well; if not, each length was sampled by itself.
    pub nested: bool,
    pub looked_up: LookedUp,
    pub length: Length,
}

/// What a look-up gives.
pub enum Evidence {
    /// Places in the request's own text, which are read on as the tree grows.
    Request,
    /// Places in a [`corpus::Corpus`], likewise: at most `samples`, after matches of at most `longest` tokens.
    Corpus { longest: usize, samples: usize },
    /// Tokens with probabilities after contexts of several lengths.
    Distributions,
    /// Tokens with probabilities.
    List,
}

/// At which nodes of the tree.
#[derive(Clone, Copy, PartialEq)]
pub enum LookedUp {
    Root,
    /// All but the root, if they are probable enough.
    Nodes,
    Everywhere,
}

/// What becomes of a match's length with one more token that agrees.
#[derive(Clone, Copy, PartialEq)]
pub enum Length {
    PlusOne,
    /// See [`aligned::agreed`].
    Aligned,
}

/// The request's own prompt and output.
pub const REQUEST: usize = 0;
/// The same, for contexts shorter than those of `REQUEST`, looked up anew at drafted nodes.
pub const LOWER: usize = 1;
/// The static datastore.
pub const STORE: usize = 2;
/// Finished requests.
pub const LIVE: usize = 3;
/// The text that the output has been following: a predicted output, or what it copied until it went astray.
pub const ALIGNED: usize = 4;
/// The target's own most probable tokens after such contexts.
pub const FEEDBACK: usize = 5;
/// The most frequent successors of the last token in the datastore.
pub const SUCCESSORS: usize = 6;

/// Number of sources.
pub const COUNT: usize = 7;
/// A draft from outside. It is no source of the mixture: see `predictor::guest`.
pub const GIVEN: usize = COUNT;

/// Sources that give samples come first, then those that blend contexts of several lengths, then mere lists.
pub const SOURCES: [Source; COUNT] = {
    use {Evidence::*, Length::*, LookedUp::*};
    // 128 samples, or matches of 12 tokens in the datastore, change nothing
    let store = Corpus { longest: 8, samples: 64 };
    let live = Corpus { longest: MAX_LENGTH, samples: 64 };
    [
        Source { name: "request", evidence: Request, nested: true, looked_up: Root, length: PlusOne },
        Source { name: "lower", evidence: Request, nested: true, looked_up: Nodes, length: PlusOne },
        Source { name: "datastore", evidence: store, nested: false, looked_up: Root, length: PlusOne },
        Source { name: "live", evidence: live, nested: true, looked_up: Root, length: PlusOne },
        Source { name: "aligned", evidence: Request, nested: false, looked_up: Root, length: Aligned },
        Source {
            name: "soft",
            evidence: Distributions,
            nested: false,
            looked_up: Everywhere,
            length: PlusOne,
        },
        Source { name: "successors", evidence: List, nested: false, looked_up: Everywhere, length: PlusOne },
    ]
};

/// Number of sources that give samples.
pub const SAMPLED: usize = leading(0);
/// Number of sources that blend contexts of several lengths, those included.
pub const BLENDED: usize = leading(1);

const fn leading(most: u8) -> usize {
    let mut row = 0;
    while row < COUNT {
        let kind = match SOURCES[row].evidence {
            Evidence::Request | Evidence::Corpus { .. } => 0,
            Evidence::Distributions => 1,
            Evidence::List => 2,
        };
        if kind > most {
            break;
        }
        row += 1;
    }
    row
}

/// The names of the sources, drafts from outside last.
pub const NAMES: [&str; COUNT + 1] = {
    let mut names = ["given"; COUNT + 1];
    let mut row = 0;
    while row < COUNT {
        names[row] = SOURCES[row].name;
        row += 1;
    }
    names
};

/// Match lengths are told apart up to 32 tokens, in this many classes.
pub const CLASSES: usize = 12;
/// Longer matches count as this long.
pub const MAX_LENGTH: usize = 32;
/// In place of a class: nothing matches.
pub const NO_CLASS: u8 = u8::MAX;

/// The class of a match of `length` >= 1 tokens.
pub fn class(length: u16) -> usize {
    const TABLE: [u8; MAX_LENGTH + 1] = [
        0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10,
        10, 11,
    ];
    TABLE[usize::from(length).min(MAX_LENGTH)] as usize
}
