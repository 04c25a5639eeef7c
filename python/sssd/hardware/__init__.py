"""What a verify pass costs on the hardware at hand, and how large draft trees should be there.

Needs numpy only, but for :func:`profile`, which measures a model and needs ``sssd[hf]``. See
``docs/hardware.md``.
"""

from typing import Any

from sssd._core import PassCosts
from sssd.hardware.budget import Budget, RowBudget
from sssd.hardware.curve import CostCurve, CostCurveError, DraftCost
from sssd.hardware.roofline import DEVICES, Device, ModelShape, roofline

__all__ = [
    "DEVICES",
    "Budget",
    "CostCurve",
    "CostCurveError",
    "Device",
    "DraftCost",
    "ModelShape",
    "PassCosts",
    "RowBudget",
    "profile",
    "roofline",
]


def profile(model: Any, **options: Any) -> CostCurve:
    """Measures the verify pass of a Hugging Face model; see :func:`sssd.hf.profile.profile`."""
    from sssd.hf.profile import profile as measure

    return measure(model, **options)
