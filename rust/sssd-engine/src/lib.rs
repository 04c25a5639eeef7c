#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch;
mod engine;
pub mod gate;
mod guide;
mod metrics;
mod request;
mod share;
mod sizing;
mod state;
mod sync;
mod tenants;
mod thread_pool;

pub use batch::{Drafted, Failure, Plan, Step, Work};
pub use engine::{Engine, Memory, NamespaceInfo, Options};
pub use guide::{Guide, Place};
pub use metrics::{Histogram, Metrics, Undrafted};
pub use request::{Interrupted, PIECE, Request, RequestError, panic_reason, shared_prefix};
pub use sizing::{
    Allocation, CostCurve, CostError, CurveError, DraftCost, Layout, Pace, PassCosts, RuleOptions, Sizing,
    SizingRule, StepTimes,
};
pub use state::{FILE as STATE_FILE, Identity, Record, StateError, StateReader, StateWriter};
