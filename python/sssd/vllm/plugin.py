"""What vLLM calls in its processes as a general plug-in: nothing is done unless ``SSSD_VLLM_V2`` is set."""

import functools
import os
from typing import Any

NAMES = ("sssd.vllm.Proposer", "sssd.vllm.proposer.Proposer")
_METHOD = "speculative method 'custom_class'"


def plugin() -> None:
    """Has model runner V2, which takes no ``custom_class``, draft with :class:`sssd.vllm.v2.Speculator`.

    Experimental: no release of vLLM offers this, and it has not run on a device here. ``docs/vllm.md``.
    """
    if os.environ.get("SSSD_VLLM_V2", "") in ("", "0"):
        return
    from vllm.config.vllm import VllmConfig
    from vllm.v1.worker.gpu import model_runner

    unsupported = VllmConfig._get_v2_model_runner_unsupported_features
    original = model_runner.init_speculator
    if getattr(original, "is_ours", False):
        return

    @functools.wraps(unsupported)
    def but_ours(self: Any) -> list[str]:
        return [name for name in unsupported(self) if name != _METHOD or not _is_ours(self)]

    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not _is_ours(vllm_config):
            return original(vllm_config, device, req_states)
        from sssd.vllm.v2 import Speculator

        return Speculator(vllm_config, device, req_states)

    init_speculator.is_ours = True  # type: ignore[attr-defined]
    VllmConfig._get_v2_model_runner_unsupported_features = but_ours
    model_runner.init_speculator = init_speculator


def _is_ours(vllm_config: Any) -> bool:
    spec = vllm_config.speculative_config
    return spec is not None and spec.method == "custom_class" and spec.model in NAMES
