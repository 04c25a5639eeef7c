//! How much is drafted, and how much of it verified: what passes cost, and the rule that weighs it against what drafts
//! bring. See `docs/hardware.md`.

mod clock;
mod costs;
mod curve;
mod options;
mod rule;

pub use costs::{Allocation, CostError, Layout, PassCosts};
pub use curve::{CostCurve, CurveError, DraftCost};
pub use options::RuleOptions;
pub use rule::{Pace, SizingRule, StepTimes};

use std::sync::Arc;

use sssd_core::Limits;

/// By what trees are sized: as large as pays.
///
/// Maximises expected accepted tokens minus the rate times the seconds that they take beyond a pass without drafts.
/// With the throughput of decoding at large as the rate, the choices of all passes together maximise that throughput
/// (Dinkelbach's method for ratios). With at least the throughput without drafts, no pass is expected to do worse than
/// that.
#[derive(Clone)]
pub enum Sizing {
    /// Given costs. The rate is what a second is worth, in tokens; by default what the requests of a pass decode in it
    /// without drafts.
    Costs(Arc<PassCosts>, Option<f64>),
    /// What a curve says of each batch, for at most so many nodes of a request.
    Curve(Arc<CostCurve>, usize, Option<f64>),
    /// The rule, which learns rate and costs, and says how much to draft in the first place.
    Rule(Arc<SizingRule>),
}

impl Sizing {
    /// The same, unless the rate is none.
    pub fn checked(self) -> Result<Self, CostError> {
        match self {
            Self::Costs(_, Some(rate)) | Self::Curve(_, _, Some(rate))
                if !(rate.is_finite() && rate >= 0.0) =>
            {
                Err(CostError::Rate(rate))
            }
            sizing => Ok(sizing),
        }
    }

    /// Begins a step: what each request may draft, where the rule says so; with what it remembers of each that it lets
    /// draft.
    pub fn begin_step<'a>(&self, requests: impl Iterator<Item = (&'a mut Limits, &'a mut Option<Pace>)>) {
        let Self::Rule(rule) = self else { return };
        let (min_prob, ranks) = (rule.begin_step(), rule.ranks());
        for (limits, pace) in requests {
            let known = pace.get_or_insert_with(|| rule.pace());
            let nodes = min_prob.map_or(0, |_| rule.limit(known));
            limits.max_nodes = limits.max_nodes.min(nodes);
            limits.min_prob = min_prob.unwrap_or(1.0);
            limits.ranking &= ranks;
        }
    }

    /// The number of nodes to verify of each tree, most probable first over all trees; `context` is the mean length of
    /// the requests, `paces` what the rule remembers of each, none where nothing was drafted.
    pub fn allocate<'a>(
        &self,
        context: f64,
        trees: &'a mut Allocation,
        paces: &mut [Option<Pace>],
    ) -> &'a [usize] {
        let requests = trees.len().max(1);
        match self {
            Self::Costs(costs, rate) => trees.allocate(costs, rate.unwrap_or(costs.plain_rate(requests))),
            Self::Curve(curve, max_nodes, rate) => {
                let costs = curve.costs(requests, context, max_nodes + 1);
                trees.allocate(&costs, rate.unwrap_or(costs.plain_rate(requests)))
            }
            Self::Rule(rule) => {
                let prices = rule.allocate(context, trees);
                for (pace, (probs, count)) in paces.iter_mut().zip(trees.given()) {
                    if let Some(pace) = pace {
                        prices.judge(pace, probs, count);
                    }
                }
                trees.counts()
            }
        }
    }
}
