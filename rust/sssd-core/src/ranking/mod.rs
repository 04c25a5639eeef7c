//! The ranking stage: once a node's candidates have their probabilities, a small network looks at all that was used to
//! make them, and at what a log-bilinear model of the corpus says of each, and gives them new ones. What this request
//! has shown of such probabilities corrects them afterwards.

pub mod bilinear;
mod features;
pub mod network;
pub mod numbers;
pub mod record;
pub mod stage;
