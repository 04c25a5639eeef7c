"""``sssd.vllm`` in vLLM itself: ``make vllm``."""

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
vllm = pytest.importorskip("vllm", reason="needs vLLM: make vllm")
MODEL = Path(os.environ.get("SSSD_VLLM_MODEL", "nowhere"))
PROMPTS = [
    "List the numbers from one to thirty in words.",
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "Copy this line ten times: name, age, city, country",
    "What are three good habits for learning a new language?",
    "Write a short story about a fox who finds a clock in the forest.",
    "Explain how a bicycle stays upright.",
]


@pytest.fixture(scope="module")
def engine():
    """SmolLM2 in vLLM, in this process, with a small cache, so that requests are preempted."""
    if not (MODEL / "config.json").is_file():
        pytest.skip("SSSD_VLLM_MODEL names no folder of SmolLM2 in safetensors")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    spec = {"method": "custom_class", "model": "sssd.vllm.Proposer", "num_speculative_tokens": 16}
    return vllm.LLM(
        str(MODEL),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=6,
        max_num_batched_tokens=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        num_gpu_blocks_override=9,
        disable_log_stats=False,
        speculative_config=spec,
    )


@pytest.fixture(scope="module")
def proposer(engine):
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


def texts(engine, prompts, **extra):
    """What is decoded, as token ids."""
    params = vllm.SamplingParams(temperature=0, max_tokens=48, extra_args=extra or None)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [list(one.outputs[0].token_ids) for one in engine.chat(asked, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(engine):
    return [texts(engine, [prompt], sssd_off=1)[0] for prompt in PROMPTS]


def test_every_text_is_plain_decodings_alone_and_together(engine, proposer, plain):
    before = proposer.counts.drafted
    assert [texts(engine, [prompt])[0] for prompt in PROMPTS] == plain
    assert texts(engine, PROMPTS) == plain
    assert texts(engine, PROMPTS[::-1]) == plain[::-1]
    assert proposer.counts.drafted > before
    assert proposer.counts.failed == 0


def test_a_prediction_saves_passes(engine, proposer, plain):
    def passes(**extra):
        before = proposer.counts.steps
        assert texts(engine, PROMPTS[4:5], sssd_namespace=str(before), **extra) == plain[4:5]
        return proposer.counts.steps - before

    assert passes(sssd_prediction=plain[4]) < passes() / 2


def test_nothing_is_left_of_requests_that_are_over(engine, proposer, plain):
    texts(engine, PROMPTS[:1], sssd_off=1)
    assert list(proposer.requests) == []
