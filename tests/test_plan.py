"""What a training is said to take against what it takes: operations counted, and the memory of its process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from experiments import plan as command
from experiments.bench.memory import peak
from experiments.plan import plan
from experiments.train import parse
from kvenv.models import TINY

SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


def make_model(directory: Path, **sizes: int) -> Path:
    """Save a random model of other sizes than the bundled one, with its tokenizer."""
    vocabulary = AutoConfig.from_pretrained(TINY).vocab_size
    config = Qwen3Config(vocab_size=vocabulary, max_position_embeddings=4096, **(SIZES | sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


def arguments(learner: str, model: Path, length: int, *others: str) -> Any:
    """Return the arguments of a small training."""
    return parse([
        learner, "--model", str(model), "--traces", "recall", "--trace-length", str(length), "--budgets", "64",
        "--num-traces", "2", *others,
    ])  # fmt: skip


LEARNERS = {
    "imitation": ["--features", "foresight"],
    "grpo": ["--group", "4", "--credit", "trajectory"],
    "grpo by attention": ["--group", "4", "--credit", "attention", "--at-once", "1"],
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_work_is_what_is_counted(name: str, tmp_path: Path) -> None:
    args = arguments(name.split()[0], make_model(tmp_path), 640, *LEARNERS[name])
    learner = args.build()
    with FlopCounterMode(display=False) as counter:
        learner.update()
    (stage,) = plan(args)
    assert stage.flops == pytest.approx(counter.get_total_flops(), rel=0.15)


def prepared_training(learner: str, model: Path, length: int, others: tuple[str, ...]) -> Callable[[], object]:
    """Return a learner's building and first update to be measured, in a process of its own.

    The LLM is there before, and a small training has loaded whatever code is needed.
    """
    torch.set_num_threads(1)
    arguments(learner, model, 128, *others, "--budgets", "32", "--num-traces", "1").build().update()
    return lambda: arguments(learner, model, length, *others).build().update()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "length", "others"),
    [
        ("imitation", 1024, LEARNERS["imitation"]),
        ("grpo", 1024, LEARNERS["grpo"]),
        ("grpo", 320, ["--group", "2", "--num-traces", "16", "--at-once", "1", "--budgets", "256"]),
    ],
)
def test_the_memory_is_what_a_process_takes(learner: str, length: int, others: list[str], tmp_path: Path) -> None:
    model = make_model(tmp_path, hidden_size=512, intermediate_size=1536, head_dim=128)
    (stage,) = plan(arguments(learner, model, length, *others))
    said = sum(stage.memory.values()) - stage.memory["weights"]
    found = peak(prepared_training, learner, model, length, tuple(others), device="cpu")
    assert 0.5 < said / found < 2, f"{said / 1e6:.0f} MB were said, {found / 1e6:.0f} MB taken"


QWEN3_4B = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip


def test_readme_says_what_its_command_computes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    given = re.search(r"^kvenv plan (grpo [^#]*)#", readme, re.MULTILINE)
    assert given is not None
    argv = given[1].replace("\\\n", " ").replace("Qwen/Qwen3-4B", str(tmp_path)).split()
    first, second = plan(parse(argv))
    said = re.search(
        r"computes (\S+) GB of tensors and (\S+) hours for the imitation, (\S+) GB and (\S+) hours for GRPO",
        " ".join(readme.split()),
    )
    assert said is not None
    gigabytes = [sum(stage.memory.values()) / 1e9 for stage in (first, second)]
    hours = [stage.hours(command.REACHED) for stage in (first, second)]
    assert [float(said[1]), float(said[3])] == [round(x) for x in gigabytes]
    assert [float(said[2]), float(said[4])] == [round(hours[0], 1), round(hours[1])]


def test_a_preset_is_planned_with_its_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))  # nothing else: no weights, no tokenizer
    argv = [
        "grpo",
        "--preset",
        "foresightkv",
        "--model",
        str(tmp_path),
        "--dtype",
        "bfloat16",
        "--trace-length",
        "8192",
    ]
    stages = plan(parse(argv))
    assert [(stage.name, stage.updates) for stage in stages] == [("imitation", 1000), ("grpo", 250)]
    # 4.02 billion parameters of Qwen3-4B, two bytes each.
    assert stages[0].memory["weights"] == pytest.approx(8.04e9, rel=0.01)
    command.main([*argv, "--tflops", "600"])
    fast = capsys.readouterr().out
    assert "hours at 600" in fast
    assert f"{stages[1].hours(600):,.1f}" in fast
    assert stages[1].hours(300) == pytest.approx(2 * stages[1].hours(600))


def test_fewer_traces_at_once_take_less_memory(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    whole, parted = (
        sum(plan(arguments("grpo", model, 640, "--at-once", at_once))[0].memory.values()) for at_once in ("0", "1")
    )
    assert parted < whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grpo", "--model", "nowhere"], "model 'nowhere' can't be planned for"),
        (["grpo", "--tflops", "0"], "--tflops 0.0 is impossible"),
    ],
)
def test_what_cannot_be_planned_is_said(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(argv)


@pytest.mark.parametrize("argv", [["kvp"], [], ["grpo", "--tflops", "many"]])
def test_wrong_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
