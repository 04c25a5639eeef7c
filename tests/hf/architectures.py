"""Every causal language model of the installed transformers, tiny and random, from its default config."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trees import ScriptedDrafter

from sssd import hf
from sssd.errors import UnsupportedModelError
from sssd.hf.fast import fast_pass

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DOCUMENT = Path(__file__).parents[2] / "docs/verification.md"
MARKS = "<!-- made by benches/architectures.py -->", "<!-- end of what benches/architectures.py makes -->"
VOCAB, LAYERS, HEADS, HEAD_DIM, WINDOW = 64, 4, 4, 8, 6
PLACES = 45
"""Entries of position tables: as many as the longest text has tokens, none for drafts beyond it."""

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
)
_HEADS = "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"
_SIZES = [
    (
        VOCAB,
        """
        vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size
        shape_vocab_size unpadded_vocab_size vocab_offset audio_vocab_size
        """,
    ),
    (
        HEADS * HEAD_DIM,
        """
        hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim
        mamba_d_ssm dim_model_base hidden_size_global input_embedding_size output_embedding_size
        lru_width attention_hidden_size pronunciation_embed_dim shape_embed_dim out_hidden_size
        adapter_in_dim adapter_out_dim adapter_input_size router_hidden_size backbone_hidden_size
        projector_input_dim projector_output_dim ple_embed_dim input_size
        """,
    ),
    (
        48,
        """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner n_inner
        mlp_dim ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size
        """,
    ),
    (
        24,
        """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        """,
    ),
    (16, "q_lora_rank kv_lora_rank o_lora_rank chunk_size mamba_chunk_size"),
    (
        HEAD_DIM,
        """
        head_dim d_kv dim_head d_head attention_head_size attention_head_dim swa_head_dim
        qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim rotary_dim index_head_dim mamba_d_head mamba_head_dim mamba_d_state
        ssm_state_size state_size kv_channels hidden_size_per_layer_input laurel_rank hc_lowrank
        loop_gate_rank adapter_rank attention_chunk_size
        """,
    ),
    (
        HEADS,
        """
        encoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_key_heads
        linear_num_heads mamba_n_heads mamba_num_heads index_n_heads num_attention_heads_per_layer
        n_routed_experts num_experts num_local_experts moe_num_experts zero_expert_num
        """,
    ),
    (
        2,
        """
        depth num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_quantizers
        n_group n_groups num_expert_group H_cycles hc_sinkhorn_iters
        """,
    ),
    (1, "topk_group L_cycles"),
    (2 * HEAD_DIM, "qk_head_dim"),
    (
        WINDOW,
        """
        sliding_window sliding_window_size window_size local_attention attention_window_size
        index_topk
        """,
    ),
    (
        PLACES,
        """
        max_position_embeddings n_positions n_ctx max_target_positions context_length max_seq_len
        model_max_length
        """,
    ),
]
_SETTINGS = {name: size for size, names in _SIZES for name in names.split()}
_SETTINGS |= dict.fromkeys(_LAYERS, LAYERS) | dict.fromkeys(_HEADS, HEADS)
_SWITCHES = {"is_decoder": True, "tie_word_embeddings": False}
"""A head tied to the embeddings would repeat one token, and a wrong mask would not show."""
_NOT_OF_THE_MODEL = {"transformers_version", "architectures", "_name_or_path", "dtype", "output_attentions"}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {1: {"head_dim": 2 * HEAD_DIM}, 3: {"head_dim": 2 * HEAD_DIM}},
    "num_kv_shared_layers": 2,
}
_GEMMA3N = {"layer_types": _GEMMA4["layer_types"], "num_kv_shared_layers": 2}
_QWEN4 = {
    "ple_layer_ids": [1],
    "number_of_conv_states": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_DOTS3 = {
    "head_dim": 4 * HEAD_DIM,
    "per_layer_config": {i: {"kv_lora_rank": 32, "qk_nope_head_dim": 3 * HEAD_DIM} for i in (2, 3)},
}
_PER_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        }
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 12,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 3,
        "n_input_layers": 4,
        "n_recurrent_layers": 4,
        "n_output_layers": 4,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {f"text_config.{key}": value for key, value in _DOTS3.items()},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {f"text_config.{key}": value for key, value in _GEMMA3N.items()},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_unified": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_unified_assistant": {
        "text_config.per_layer_config": _GEMMA4["per_layer_config"],
        "text_config.layer_types": _GEMMA4["layer_types"],
        "text_config.num_kv_shared_layers": LAYERS,
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "gemma4_assistant": {"text_config.num_kv_shared_layers": LAYERS},
    "moshi": {"num_codebooks": 2},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"max_position_embeddings": 64},
    "qwen4_exp": {"text_config.eos_token_id": 2}
    | {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "max_position_embeddings": 128,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
    },
}
"""What the rules do not make, by model type; a key with dots leads into a sub-config."""
_GIVEN = {
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 30}},
}
"""Without these there is no default config."""


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The config with all sizes small, and of its layers one of each kind at least."""
    depth = next((config[key] for key in _LAYERS if isinstance(config.get(key), int)), None)
    per_layer = [
        value for value in config.values() if isinstance(value, list | tuple) and len(value) == depth
    ]
    kinds = list(zip(*per_layer, strict=True)) if per_layer else []
    firsts = sorted({kinds.index(kind) for kind in kinds})
    picked = sorted([*firsts, *(i for i in range(len(kinds)) if i not in firsts)][:LAYERS])
    heads = next((config[key] for key in _HEADS if isinstance(config.get(key), int)), None)

    def small(key: str, value: Any) -> Any:
        if key == "per_layer_config":
            return {at: _shrunk(value[f"{i:02}"]) for at, i in enumerate(picked) if f"{i:02}" in value}
        if isinstance(value, dict):
            return _shrunk(value)
        if isinstance(value, list | tuple) and len(value) == depth:
            return [small(key, value[i]) for i in picked]
        if isinstance(value, bool) or not isinstance(value, int):
            return _SWITCHES.get(key, value)
        if key in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
            return HEADS if value == heads else HEADS // 2
        if key.endswith(("token_id", "token_index")):
            return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, min(value, VOCAB - 1))
        return min(value, _SETTINGS.get(key, value))

    return {key: small(key, value) for key, value in config.items() if key not in _NOT_OF_THE_MODEL}


def build(name: str) -> tuple[Any, str]:
    """Builds the model of a type in float32, in evaluation mode; returns it and its attention."""
    config = AutoConfig.for_model(name, **_GIVEN.get(name, {}))
    values = _shrunk(config.to_dict())
    del values["model_type"]
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for path, value in _PER_TYPE.get(name, {}).items():
        *parents, key = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[key] = value
    config = AutoConfig.for_model(name, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights than the default initialization, so that a wrong mask shows in the logits.
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model, model.config.get_text_config(decoder=True)._attn_implementation


PROMPT = torch.tensor([[5, 9, 33, 12, 5, 9, 33, 40, 8, 21, 22, 23, 21, 22, 23, 21, 22, 50, 5, 9, 33]])
BATCH = torch.tensor(
    [[0, 0, 0, 5, 9, 33, 12, 5, 9], [7, 7, 3, 41, 22, 7, 7, 3, 41], [0, 0, 0, 0, 0, 0, 0, 0, 50]]
)
CALLS = [(PROMPT, torch.ones_like(PROMPT)), (BATCH, (BATCH != 0).long())]
GREEDY = {
    "do_sample": False,
    "max_new_tokens": PLACES - PROMPT.shape[1],
    "eos_token_id": None,
    "pad_token_id": 0,
}
UNDECODABLE = {
    "blt": ("num_hidden_layers", "generate makes no cache for its config"),
    "gemma3n": ("timm", "needs timm"),
    "gemma4_assistant": (
        "get_seq_length|shared_kv_states",
        "reads the cache of the model that it drafts for",
    ),
    "gemma4_unified_assistant": (
        "get_seq_length|shared_kv_states",
        "reads the cache of the model that it drafts for",
    ),
    "musicgen": ("dropout|text_encoder", "cannot be built from its own config"),
    "musicgen_melody": ("dropout|text_encoder", "cannot be built from its own config"),
}
"""What ``model.generate`` cannot decode from text: words of its error, and why."""


@functools.cache
def examine(name: str) -> str:
    """Decodes one row and a batch with and without drafts; the line of the table in ``docs/verification.md``.

    Raises:
        AssertionError: The tokens differ, or a model is decoded plainly without a reason given.
    """
    if name in UNDECODABLE:
        return _line(
            name,
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name],
            "",
            "",
            f"not by `generate`: {UNDECODABLE[name][1]}",
        )
    model, attention = build(name)
    ways = [_way(model, ids, mask) for ids, mask in CALLS]
    way, reason = (" / ".join(dict.fromkeys(filter(None, part))) for part in zip(*ways, strict=True))
    return _line(name, type(model).__name__, attention, way, reason)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """What ``docs/verification.md`` says between its two marks, for the installed transformers."""
    head = [f"transformers {transformers.__version__}:", ""]
    head += [_line("type", "class", "attention", "decoded", "why not with drafts"), _line(*["---"] * 5)]
    return "\n".join(["", *head, *map(_found, TYPES), ""])


def _found(name: str) -> str:
    try:
        return examine(name)
    except AssertionError:
        return _line(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], "", "DIFFERENT", "")


def documented() -> tuple[str, str]:
    """The version of transformers that the table in the documentation was made with, and the table."""
    text = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    return text.split(":")[0].split()[-1], text


def _way(model: Any, ids: Any, mask: Any) -> tuple[str, str]:
    """How the text is continued, by drafts that are often right and by real ones, and why not with drafts."""
    # Some repeat one token whatever they attend to; their logits do not.
    more = {"return_dict_in_generate": True, "output_logits": len(ids) == 1}
    expected = model.generate(ids, attention_mask=mask, **GREEDY, **more)
    texts = [row[keep.argmax() :].tolist() for row, keep in zip(expected.sequences, mask, strict=True)]
    drafter = ScriptedDrafter(texts, VOCAB, right=0.8)
    found, reason = generate(model, ids, mask, drafter, **more)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for logits, plain in zip(found.logits or (), expected.logits or (), strict=True):
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
    if not drafter.sequences:
        assert reason
        return "fallback", reason
    assert not reason
    assert generate(model, ids, mask)[0].tolist() == expected.sequences.tolist()
    return ("fast" if fast_pass(model) else "drafted"), ""


def generate(model: Any, ids: Any, mask: Any, drafter: Any = None, **more: Any) -> tuple[Any, str]:
    """What ``sssd.hf.generate`` gives, and why it decodes without drafts, if it does."""
    options = {"attention_mask": mask, **GREEDY, **more}
    call = functools.partial(hf.generate, model, ids, drafter, max_nodes=9, **options)
    try:
        return call(on_unsupported="raise"), ""
    except UnsupportedModelError as error:
        return call(), str(error).split(": ", 1)[-1]
