"""A run killed at any moment and resumed ends as one never killed; arguments are kept; curves have no gap."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents
from agents.checkpoint import load_checkpoint
from agents.imitation import ImitationLearner
from experiments import record, train
from experiments.learners import default_arguments
from experiments.runs import Interruption, commit, read_config, read_metrics, to_json, write_config

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--num-traces", "2", "--trace-length", "160", "--budgets", "32", "--traces", "recall+tracking", "--hidden", "4",
    "--eval-traces", "2", "--eval-every", "4", "--save-every", "3", "--dagger", "0.5", "--dagger-ramp", "4",
]  # fmt: skip
UPDATES = 11


def arguments(out: Path, *others: str) -> list[str]:
    """Return the arguments of a small run."""
    return ["imitation", *SMALL, "--updates", str(UPDATES), "--out", str(out), *others]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train.main(arguments(out))
    return out


def lines(directory: Path) -> list[dict[str, float]]:
    """Return the metrics but for the times, which no two runs share."""
    return [{tag: x for tag, x in line.items() if not tag.startswith("time/")} for line in read_metrics(directory)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's curves but for the times."""
    events = EventAccumulator(str(directory)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.split("/")[0] in ("loss", "eval", "rollout")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_run(one: Path, two: Path) -> None:
    """Compare weights, moments, cursors, metrics and curves."""
    states = [load_checkpoint(directory / "checkpoints") for directory in (one, two)]
    for state in states:
        del state.values["seconds"]
    assert states[0].values == states[1].values
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], states[1].tensors[name]) for name in states[0].tensors)
    assert (one / "policy/policy.safetensors").read_bytes() == (two / "policy/policy.safetensors").read_bytes()
    assert lines(one) == lines(two)
    assert scalars(one) == scalars(two)


def test_a_run_directory_says_what_was_trained_and_how(straight: Path) -> None:
    config = read_config(straight)
    assert config["learner"] == "imitation"
    assert config["arguments"]["learner"]["updates"] == UPDATES
    assert config["arguments"]["env"]["traces"] == "recall+tracking"
    assert config["commit"] == commit()
    policy: Any = agents.make(straight / "policy")
    assert policy.name == "imitation"
    assert policy.training["updates_done"] == UPDATES


def test_metrics_and_curves_have_every_step_once(straight: Path) -> None:
    assert [line["step"] for line in read_metrics(straight)] == list(range(UPDATES + 1))
    curves = scalars(straight)
    assert [step for step, _ in curves["loss/ranking"]] == list(range(1, UPDATES + 1))
    for name in ("answer_loss", "answer_accuracy", "low_entropy_increase", "agreement_with_golden"):
        assert [step for step, _ in curves[f"eval/{name}"]] == [0, 4, 8, UPDATES]
    assert curves["rollout/ep_rew_mean"]
    events = EventAccumulator(str(straight), size_guidance={"images": 0}).Reload()
    assert {"time/env", "time/policy", "time/learn", "time/total"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("kept")] == [0, 4, 8, UPDATES]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_a_killed_run_ends_as_one_never_killed(tmp_path: Path, straight: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.train", *arguments(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list((out / "checkpoints").glob("*/state.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed: make it longer"
    train.main(["imitation", "--resume", str(out)])
    assert_same_run(out, straight)


@pytest.mark.parametrize("at", [1, 8])
def test_a_run_that_dies_without_warning_loses_nothing(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Before the first checkpoint, and between two, with what was logged after it on disk and torn."""
    original = ImitationLearner.update

    def dies(self: ImitationLearner) -> dict[str, float]:
        if self.done == at:
            raise RuntimeError("power cut")
        return original(self)

    monkeypatch.setattr(ImitationLearner, "update", dies)
    out = tmp_path / "died"
    with pytest.raises(RuntimeError, match="power cut"):
        train.main(arguments(out))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss/ran')
    monkeypatch.undo()
    train.main(["--resume", str(out)])
    assert_same_run(out, straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    original = ImitationLearner.update

    def interrupted(self: ImitationLearner) -> dict[str, float]:
        if self.done == 4:
            os.kill(os.getpid(), number)
        return original(self)

    out = tmp_path / "interrupted"
    monkeypatch.setattr(ImitationLearner, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(out))
    assert stopped.value.code == code
    assert load_checkpoint(out / "checkpoints").values["done"] == 5
    monkeypatch.undo()
    train.main(["imitation", "--resume", str(out)])
    assert_same_run(out, straight)


OTHERS = {
    "grpo": ["--num-traces", "2", "--group", "2", "--budgets", "32", "--kl-updates", "2"],
    "ppo": ["--num-envs", "2", "--budget", "32", "--epochs", "1"],
    "kvp": ["--batch-size", "2", "--samples", "2", "--embedding", "4"],
}
"""Arguments of small runs of the other learners."""


@pytest.mark.parametrize("name", OTHERS)
def test_every_learner_goes_on_bit_by_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *OTHERS[name], "--trace-length", "128", "--hidden", "4", "--updates", "4", "--save-every", "2",
        "--eval-every", "0",
    ]  # fmt: skip
    if name == "kvp":
        store = tmp_path / "store"
        record.main(["--out", str(store), "--traces", "recall", "--num-traces", "3", "--trace-length", "128"])
        options += ["--store", str(store)]
    straight, died = tmp_path / "straight", tmp_path / "died"
    train.main([name, *options, "--out", str(straight)])
    kind: Any = type(train.parse([name, *options]).build())
    original = kind.update

    def dies(self: Any) -> dict[str, float]:
        if self.done == 3:
            raise RuntimeError("power cut")
        metrics: dict[str, float] = original(self)
        return metrics

    monkeypatch.setattr(kind, "update", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main([name, *options, "--out", str(died)])
    monkeypatch.undo()
    train.main(["--resume", str(died)])
    assert_same_run(died, straight)


def test_a_second_signal_takes_effect_at_once(request: pytest.FixtureRequest) -> None:
    # Where the tests run in a shell's background, SIGINT is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_damaged_checkpoint_costs_updates_but_no_run(tmp_path: Path, straight: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(straight, out)
    newest = out / "checkpoints" / f"{UPDATES:08d}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        train.main(["imitation", "--resume", str(out)])
    assert_same_run(out, straight)


def test_a_finished_run_is_extended_by_updates_alone(tmp_path: Path, straight: Path) -> None:
    out = tmp_path / "extended"
    shutil.copytree(straight, out)
    train.main(["imitation", "--resume", str(out), "--updates", str(UPDATES + 3)])
    assert [line["step"] for line in read_metrics(out)] == list(range(UPDATES + 4))
    assert read_config(out)["arguments"]["learner"]["updates"] == UPDATES + 3
    with pytest.raises(ValueError, match=r"--updates 2: the run has made 14 already"):
        train.main(["--resume", str(out), "--updates", "2"])


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["--learning-rate", "0.5"], r"--learning-rate 0\.5: the run has 0\.006"),
        (["--num-traces", "3"], r"--num-traces 3: the run has 2"),
        (["--budgets", "16", "32"], r"--budgets \[16, 32\]: the run has \[32\]"),
        (["--out", "elsewhere"], r"--out elsewhere: the run has"),
    ],
)
def test_any_other_changed_argument_is_refused_by_name(straight: Path, others: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train.main(["imitation", "--resume", str(straight), *others])


def test_a_run_is_not_overwritten_and_no_run_is_not_resumed(tmp_path: Path, straight: Path) -> None:
    with pytest.raises(ValueError, match=f"holds a run: --resume {re.escape(str(straight))}"):
        train.main(arguments(straight))
    with pytest.raises(ValueError, match=r"is no run: it has no config\.json"):
        train.main(["imitation", "--resume", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        train.main(["imitation", "--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("learner", "budgets", ["x"]), ("learner", "seed", "0"), ("run", "eval_every", None), ("env", "model", {})],
)
def test_arguments_of_other_types_are_named(part: str, name: str, value: object, tmp_path: Path) -> None:
    arguments = to_json(default_arguments("grpo"))
    arguments[part][name] = value
    write_config(tmp_path, {"learner": "grpo", "arguments": arguments, "commit": None})
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} can't be resumed: config.json has {name} "):
        train.main(["--resume", str(tmp_path)])


@pytest.mark.parametrize(("option", "value"), [("updates", "0"), ("eval-every", "-1"), ("save-every", "0")])
def test_impossible_numbers_are_refused(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--{option} {value} is impossible"):
        train.main(arguments(tmp_path, f"--{option}", value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [("learner", "updates", "11"), ("learner", "updates", None), ("learner", "budgets", 32), ("env", "traces", 7),
     ("run", "out", ["x"]), ("run", "save_every", True)],
)  # fmt: skip
def test_arguments_of_other_types_are_refused_by_name(
    where: str, name: str, value: object, tmp_path: Path, straight: Path
) -> None:
    config = read_config(straight)
    config["arguments"][where][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json has {name} .*, where a value like"):
        train.main(["--resume", str(tmp_path)])


def test_presets_are_defaults_that_options_override() -> None:
    args = train.parse(["imitation", "--preset", "foresightkv", "--hidden", "8"])
    assert (args.learner.loss, args.learner.margin, args.learner.hidden) == ("pairwise", 0.01, 8)
    assert args.learner.num_traces == 4
    with pytest.raises(ValueError, match="--preset kvp is none of imitation: it has foresightkv"):
        train.parse(["imitation", "--preset=kvp"])


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["grpo", "--init", "imitation-tiny", "--budgets", "600"], "with budget 600 and interval 16 it needs"),
        (["imitation", "--eval-budgets", "600"], "with budget 600 and interval 16 it needs"),
        (["imitation", "--budgets", "8"], r"budget 8 is less than the protected pairs, sinks 4 \+ recent 16"),
    ],
)
def test_what_is_impossible_leaves_no_run_behind(tmp_path: Path, others: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train.main([*others, "--num-traces", "1", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for name in train.LEARNERS:
        with pytest.raises(SystemExit):
            train.main([name, "--help"])
        text = capsys.readouterr().out
        assert "--updates" in text
        assert "--resume" in text
        assert "hf:" in re.split(r"\n(?=[│ ]*--[a-z])", text.split("--traces ")[1])[0]
        for block in re.split(r"\n(?=[│ ]*--[a-z])", text)[1:]:
            assert explained(block), f"{name}: no help for {block.splitlines()[0]}"
    assert not explained(
        "│ --updates INT      (default: 96) │\n╰────╯\n╭─ run options ─╮\n│ What is kept, and how often. │"
    )


def explained(block: str) -> bool:
    """Return whether an option's lines of help say more than its name, its type and its default."""
    own = re.sub(r"[│\s]+", " ", block.split("╰")[0])
    said = re.sub(r"--\S+|\{[^}]*\}|\(default: .*\)|\[[^\]]*\]+", "", own)
    return len(re.findall(r"\b[A-Z]?[a-z]{2,}\b", said)) >= 2
