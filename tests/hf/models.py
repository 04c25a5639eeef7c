"""Tiny random models: milliseconds per pass, every attention pattern that verification has to respect."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 6
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2_mixed": {"use_sliding_window": True, **_MIXED},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": _MIXED,
    "gemma3_text": _MIXED,
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **_MIXED},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW},
    "cohere2": _MIXED,
    "olmo2": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
}
"""Test name to what its config changes; the part before ``_mixed`` is transformers' model type."""

EAGER_ONLY = {"gemma2", "gpt_oss"}
"""Attention sinks and soft capping, which sdpa does not have."""


def tiny_model(name: str, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """Builds a random model of the named architecture, float32, in evaluation mode."""
    settings = {**_COMMON, **ARCHITECTURES.get(name, {}), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = AutoConfig.for_model(name.removesuffix("_mixed"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights than the default initialization, so that a wrong mask shows in the logits.
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.float().eval()
