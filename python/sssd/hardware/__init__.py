"""What a verify pass costs on the hardware at hand, and how large draft trees should be there.

Needs numpy only, but for :func:`profile`, which measures a model and needs ``sssd[hf]``. See
``docs/hardware.md``.
"""

from typing import Any

from sssd._core import CostGrid, Pace, PassCosts, SizingRule
from sssd.errors import CostCurveError
from sssd.hardware.curve import CostCurve, DraftCost
from sssd.hardware.roofline import DEVICES, Device, ModelShape, roofline

__all__ = [
    "DEVICES",
    "CostCurve",
    "CostCurveError",
    "CostGrid",
    "Device",
    "DraftCost",
    "ModelShape",
    "Pace",
    "PassCosts",
    "SizingRule",
    "profile",
    "roofline",
]


def profile(model: Any, **options: Any) -> CostCurve:
    """Measures the verify pass of a Hugging Face model; see :func:`sssd.hf.profile.profile`."""
    from sssd.hf.profile import profile as measure

    return measure(model, **options)


def _show_curve(curve: CostCurve) -> str:
    from sssd.pictures import curve_html

    return curve_html(curve)


CostCurve._repr_html_ = _show_curve  # type: ignore[attr-defined]
