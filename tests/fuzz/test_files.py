"""What we wrote comes back cut short, with turned bits, edited by hand or foreign: it is read, or refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from rich.console import Console

import agents
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.learned import LearnedPolicy
from agents.learner import State
from experiments import report
from experiments.learners import LEARNERS, default_arguments
from experiments.results import ANSWERS, RESULTS, ROWS, SAID, Results
from experiments.runs import CONFIG, Run, from_json, read_config, saved_arguments, to_json
from kvenv.evaluation import Row
from kvenv.models import TINY, _load, load_model
from kvenv.rank_env import KVRankEnv
from kvenv.store import TraceStore
from tests.environments import MODEL
from tests.fuzz.counted import fuzz
from tests.fuzz.values import JSON, changed_bytes, changed_json
from tests.test_grpo import learner
from tests.test_policy_files import learned

REFUSALS = (ValueError, FileNotFoundError)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that all examples of a test share."""
    return tmp_path / "it"


class Changed:
    """A directory whose files can be changed, and put back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".md"]
        self.files = {path: path.read_bytes() for path in paths}

    def change(self, data: st.DataObject) -> Path:
        """Change a file, in bytes or in what its JSON says, and return which."""
        for path, content in self.files.items():
            path.write_bytes(content)
        path = data.draw(st.sampled_from(list(self.files)))
        if path.suffix == ".safetensors" or data.draw(st.booleans()):
            path.write_bytes(data.draw(changed_bytes(self.files[path])))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in self.files[path].splitlines()]
            lines = [data.draw(changed_json(line) | JSON) if data.draw(st.booleans()) else line for line in lines]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            value = json.loads(self.files[path])
            if isinstance(value, dict):  # as somebody would write it who knows no seals
                value = {name: inner for name, inner in value.items() if name not in ("seal", "fingerprint")}
            path.write_text(json.dumps(data.draw(st.one_of(changed_json(value), changed_json(value), JSON))))
        return path


def refused_by_name(directory: Path, read: Callable[[], Any]) -> None:
    """Read; what is refused is refused with the name of the directory, or of a file in it."""
    told = str(directory)
    try:
        read()
    except REFUSALS as refusal:
        told = str(refusal)
    assert str(directory) in told


@pytest.mark.parametrize("kind", ["kvp", "stats 1", "pre-rope 2"])
def test_policies(kind: str, directory: Path) -> None:
    learned(kind).save_pretrained(directory)
    changed, model = Changed(directory), load_model(MODEL).model

    @fuzz(20, data=st.data())
    def check(data: st.DataObject) -> None:
        changed.change(data)

        def read() -> None:
            policy = agents.make(directory)
            assert isinstance(policy, LearnedPolicy)
            policy.save_pretrained(directory.parent / "again")
            with warnings.catch_warnings(), contextlib.suppress(ValueError):
                warnings.simplefilter("ignore")  # of another fingerprint
                policy.check_model(model)

        refused_by_name(directory, read)

    check()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("stats 1", [64, 64, 256, 512, 1]), ("stats 1", [2, 2, 12, 5, 10**9]), ("kvp", [2, 2, 16, 4, 10**5])],
)
def test_shapes_that_the_weights_lack_fill_no_memory(kind: str, shape: list[int], directory: Path) -> None:
    learned(kind).save_pretrained(directory)
    path = directory / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"is not a \w+ policy's description|doesn't hold this scorer's weights"):
        agents.make(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes were taken for it"


def test_stores(rank_store: str, directory: Path) -> None:
    shutil.copytree(rank_store, directory)
    changed = Changed(directory)

    @fuzz(50, data=st.data())
    def check(data: st.DataObject) -> None:
        changed.change(data)

        def read() -> None:
            store = TraceStore(directory)
            for shard in store.shards:
                store.verify(shard)
            env = KVRankEnv(store=str(directory))
            env.reset(seed=0)
            env.step(env.action_space.sample())

        refused_by_name(directory, read)

    check()


def test_checkpoints(directory: Path) -> None:
    learning = learner()
    states = [learning.state(), State(learning.state().tensors, learning.state().values | {"done": 1})]
    for step, state in enumerate(states):
        save_checkpoint(directory, state, step)
    changed = Changed(directory)

    @fuzz(50, data=st.data())
    def check(data: st.DataObject) -> None:
        path = changed.change(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = load_checkpoint(directory)
        assert isinstance(state.values, dict)
        if told:
            assert path.parent.name == "00000001"
            assert f"{path.parent}: " in str(told[0].message)
            assert state.values["done"] == 0

    check()


def test_runs(directory: Path) -> None:
    learning = learner()
    arguments = default_arguments("grpo")
    run = Run.create(directory, "grpo", arguments)
    with run.writing(0):
        run.log(0, {"eval/answer_loss": 2.0})
        run.log(1, {"eval/answer_loss": 1.5, "train/loss": 0.5})
        run.save(learning)
    changed = Changed(directory)
    changed.files = {path: x for path, x in changed.files.items() if "tfevents" not in path.name}

    @fuzz(15, data=st.data())
    def check(data: st.DataObject) -> None:
        changed.change(data)

        def read() -> None:
            kind = read_config(directory)["learner"]
            if kind in LEARNERS:
                arguments = saved_arguments(directory, default_arguments(kind))
                assert from_json(arguments, to_json(arguments)) == arguments
            report.report(report.load([directory]), directory.parent, Console(file=io.StringIO()))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a checkpoint passed over
                Run(directory).restore(learning)

        refused_by_name(directory, read)

    check()


TERMS = {"policies": ["random"], "budgets": [8]}


def test_evaluations(directory: Path) -> None:
    directory.mkdir()
    row = Row("random", "recall", "test", 0, 0, 8, 4, "periodic", 12, lm_loss=1.0, score=0.5)
    row_at = {name: getattr(row, name) for name in ("traces", "trace", "policy", "budget", "seed", "score")}
    answer = row_at | dict.fromkeys(SAID, "x")
    (directory / CONFIG).write_text(json.dumps({"terms": TERMS, "commit": None}))
    (directory / RESULTS).write_text(json.dumps([asdict(row)]))
    (directory / ANSWERS).write_text(json.dumps(answer) + "\n")
    (directory / ROWS).write_text(
        json.dumps({"rows": [asdict(row) | {"trace": 1}], "answers": [answer | {"trace": 1}]}) + "\n"
    )
    changed = Changed(directory)

    @fuzz(50, data=st.data())
    def check(data: st.DataObject) -> None:
        changed.change(data)

        def read() -> None:
            results = Results(directory, TERMS)
            results.missing("recall", range(3), 1)

        refused_by_name(directory, read)

    check()


def test_models(directory: Path) -> None:
    shutil.copytree(TINY, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())

    @fuzz(10, changed=changed_json(config) | JSON, data=st.data())
    def check(changed: Any, data: st.DataObject) -> None:
        if isinstance(changed, dict) and isinstance(changed.get("num_hidden_layers"), int):
            changed["num_hidden_layers"] %= 9  # transformers makes as many as are asked for
        text = json.dumps(changed).encode()
        path.write_bytes(data.draw(changed_bytes(text)) if data.draw(st.booleans()) else text)
        _load.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' of what it doesn't know
            refused_by_name(directory, lambda: load_model(str(directory)))

    check()
