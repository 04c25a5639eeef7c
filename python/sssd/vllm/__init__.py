"""sssd in vLLM: ``pip install 'sssd[vllm]'``. ``docs/vllm.md`` says how to start it and what was tested.

    vllm serve MODEL --middleware sssd.vllm.Middleware --speculative-config
        '{"method": "custom_class", "model": "sssd.vllm.Proposer", "num_speculative_tokens": 16}'

Nothing here imports vLLM before vLLM asks for a :class:`Proposer`.
"""

from sssd.vllm.middleware import Middleware
from sssd.vllm.proposer import Proposer

__all__ = ["Middleware", "Proposer"]
