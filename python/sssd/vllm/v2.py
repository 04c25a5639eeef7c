"""Drafts for vLLM's model runner V2, where ``SSSD_VLLM_V2`` asks for it: experimental."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from sssd.errors import InvalidArgumentError
from sssd.vllm.proposer import Proposer


@dataclass
class _Step:
    """What the runner knows of the pass that is over."""

    names: list[str]
    states: Mapping[str, Any]
    prompts: Any


class Speculator(BaseSpeculator):  # type: ignore[misc]
    """What runner V2 asks for drafts in place of its own speculators: a ``Proposer`` fed from its states.

    That runner holds tokens on the device and verifies as many drafted tokens of each request as the settings
    say. So rows are brought over in each step, which waits for the pass; what is not drafted is filled with
    the last token, as its n-gram speculator does; drafts are not cut where they do not pay; and requests have
    no settings of their own.

    Args:
        vllm_config: vLLM's.
        device: of the runner.
        req_states: the runner's table of requests.

    Raises:
        InvalidArgumentError: there are several ranks, each of which would have to draft the same.
        What ``Proposer`` raises.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: Any, req_states: Any) -> None:
        ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        if ranks != 1:
            raise InvalidArgumentError(
                f"with runner V2 sssd drafts on one device, not with tensor_parallel_size={ranks}; "
                "unset SSSD_VLLM_V2 and VLLM_USE_V2_MODEL_RUNNER"
            )
        self.proposer = Proposer(vllm_config)
        self.proposer.options = replace(self.proposer.options, stop=False)
        self._states = req_states
        shape = (int(vllm_config.scheduler_config.max_num_seqs), self.proposer.k)
        self._drafts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._host = torch.zeros(shape, dtype=torch.int64)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Called by vLLM; nothing is recorded."""

    def capture(self) -> None:
        """Called by vLLM; nothing is recorded."""

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        last_sampled: Any,
        next_prefill_tokens: Any,
        temperature: Any,
        seeds: Any,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Any:
        """Drafts for the requests of a batch.

        Args:
            input_batch: vLLM's; its requests and their places in the table.
            num_sampled: integers [requests], tokens that the pass has sampled; 0 while a prompt is read.
            last_sampled: integers [table, 1], the last of them.
            dummy_run: whether there are no requests, only the shapes.
            attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_rejected,
                next_prefill_tokens, temperature, seeds, dp_sync_state, skip_attn_for_dummy_run, mm_inputs,
                is_profile, num_speculative_tokens: not looked at.

        Returns:
            int64 [requests, k] on the device.
        """
        count = int(input_batch.num_reqs)
        out = self._drafts[:count]
        if dummy_run:
            return out
        with torch.inference_mode():
            return self._propose(input_batch, num_sampled, last_sampled, out)

    def _propose(self, input_batch: Any, num_sampled: Any, last_sampled: Any, out: Any) -> Any:
        count = len(out)
        place = input_batch.idx_mapping[:count].to(torch.int64)
        lengths = self._states.total_len.gpu[place].cpu().numpy()
        rows = self._states.all_token_ids.gpu[place, : int(lengths.max(initial=1))].cpu().numpy()
        self.proposer._step = _Step(  # type: ignore[assignment]
            names=list(input_batch.req_ids[:count]),
            states=dict.fromkeys(self._states.req_id_to_index),
            prompts=self._states.prompt_len.np[place.cpu().numpy()],
        )
        sampled = [[0] * number for number in num_sampled[:count].tolist()]
        drafts = self.proposer.propose(sampled, lengths, rows)
        host = self._host[:count]
        host[:] = last_sampled.view(-1)[place].cpu()[:, None]
        for row, draft in enumerate(drafts):
            host[row, : len(draft)] = torch.from_numpy(np.array(draft, np.int64))
        return out.copy_(host)
