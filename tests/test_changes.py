"""A model or data that changed between two commands that belong together: refused, with both digests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from experiments import cli, evaluate, record, train
from experiments.replicas import Replica
from experiments.runs import Run, read_config
from kvenv import models
from kvenv.identity import fingerprint
from kvenv.models import load_model
from kvenv.recording import Recording
from tests.faults import fails
from tests.local_model import make_model, make_traces
from tests.test_train import SMALL, arguments

DIGESTS = r"\w{12}\.\.\., not \w{12}\.\.\."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory."""
    return make_model(tmp_path / "model")


def change(model: Path) -> None:
    """Train a model on by a hair, and forget what was loaded of it, as another process would."""
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    models._load.cache_clear()


def test_a_store_is_of_the_model_that_it_was_recorded_from(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces, store = make_traces(tmp_path / "traces.jsonl"), tmp_path / "store"
    command = f"record --model {model} --traces {traces} --num-traces 2 --trace-length 256 --batch-size 1 --out {store}"
    cli.main(command.split())
    learn = f"train kvp --model {model} --traces {traces} --store {store} --updates 2 --eval-every 0 --trace-length 256"
    cli.main([*learn.split(), "--out", str(tmp_path / "kvp")])
    was = fingerprint(load_model(str(model)).model)
    change(model)
    now = fingerprint(load_model(str(model)).model)
    assert was != now
    for again in (command.replace("--num-traces 2", "--num-traces 3"), f"{learn} --out {tmp_path / 'other'}"):
        error = fails(capsys, again.split())
        assert was[:12] in error
        assert now[:12] in error
    error = fails(capsys, ["train", "--resume", str(tmp_path / "kvp")])
    assert f"fingerprint {was[:12]}..., not {now[:12]}..." in error


def test_a_store_that_was_recorded_anew_or_damaged_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    record = f"record --traces recall --num-traces 2 --trace-length 128 --out {store}"
    cli.main(record.split())
    options = f"--store {store} --updates 2 --eval-every 0 --embedding 4 --hidden 4 --samples 2 --out {run}"
    cli.main(["train", "kvp", *options.split()])
    cli.main(["train", "--resume", str(run), "--updates", "3"])
    shard = store / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    assert f"{shard} is damaged" in fails(capsys, ["train", "--resume", str(run), "--updates", "4"])
    for file in store.iterdir():
        file.unlink()
    cli.main(record.replace("recall", "tracking").split())
    error = fails(capsys, ["train", "--resume", str(run), "--updates", "4"])
    assert re.search(f"begun with another store than is there now: digest {DIGESTS}", error)


def test_a_run_goes_on_with_its_model_and_its_traces(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces, run = make_traces(tmp_path / "traces.jsonl"), tmp_path / "run"
    options = [*SMALL, "--model", str(model), "--traces", str(traces), "--eval-every", "0", "--trace-length", "256"]
    cli.main(["train", "imitation", *options, "--updates", "2", "--out", str(run)])
    resume = ["train", "--resume", str(run), "--updates"]
    cli.main([*resume, "3"])
    before = traces.read_bytes()
    make_traces(traces, 7)
    assert re.search(f"begun with another traces than .* digest {DIGESTS}", fails(capsys, [*resume, "4"]))
    traces.write_bytes(before)
    cli.main([*resume, "4"])
    config = read_config(run)
    change(model)
    assert re.search(f"{run} was begun with another model than .* digest {DIGESTS}", fails(capsys, [*resume, "5"]))
    assert read_config(run) == config, "what was refused left a trace"


def test_a_node_with_another_model_or_other_traces_is_refused(model: Path, tmp_path: Path) -> None:
    traces = make_traces(tmp_path / "traces.jsonl")
    options = ["--model", str(model), "--traces", str(traces), "--trace-length", "256"]
    args: Any = train.parse(
        ["grpo", *options, "--group", "2", "--num-traces", "1", "--hidden", "4", "--eval-every", "0"]
    )
    learner = args.build()
    state, known = learner.state(), args.made_from(learner)
    Replica(args, state, known)
    before = traces.read_bytes()
    make_traces(traces, 7)
    with pytest.raises(ValueError, match=r"^the traces on .* has digest \w{12}\.\.\., the command's \w{12}\.\.\.: put"):
        Replica(args, state, known)
    traces.write_bytes(before)
    decoded = {"model": str(model), "num_traces": 1, "trace_length": 256, "traces": str(traces)}
    recorder = record.Recorder(record.Args(**decoded))
    recording = Recording.of(recorder.loaded, traces=str(traces), split="train", trace_length=256)
    change(model)
    with pytest.raises(ValueError, match=r"^the model on .* has digest"):
        Replica(args, state, known)
    with pytest.raises(
        ValueError, match=r"^the LLM on .* has fingerprint \w{12}\.\.\., the command's \w{12}\.\.\.: put"
    ):
        record.Recorder(recorder.args).shard(recording, range(1))
    decoded["traces"] = (str(traces),)
    evaluate.Evaluator(evaluate.Args(**decoded))
    with pytest.raises(ValueError, match=r"^the LLM on .* has fingerprint"):
        evaluate.Evaluator(evaluate.Args(**decoded), known["model"])


def test_runs_of_before_digests_go_on(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "imitation", train.parse(arguments(tmp_path)), {"model": "1" * 64})
    with pytest.raises(ValueError, match=r"another model than is there now: digest 1{12}\.\.\., not 2{12}\.\.\."):
        run.check_made_from({"model": "2" * 64})
    run.check_made_from({"model": "1" * 64, "traces": "3" * 64})
    del run.config["made_from"]
    run.check_made_from({"model": "2" * 64})


def test_an_evaluation_goes_on_with_its_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = make_traces(tmp_path / "traces.jsonl")
    command = f"evaluate --model {model} --traces {traces} --num-traces 2 --trace-length 256 --budgets 48".split()
    command += ["--policies", "random", "--out", str(tmp_path / "out")]
    cli.main(command)
    change(model)
    error = fails(capsys, command)
    assert re.search(r"holds an evaluation with fingerprint \w{64}, not \w{64}", error)


def test_a_file_that_was_edited_is_not_recorded_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = tmp_path / "mine.jsonl", tmp_path / "store"
    lines = [json.dumps({"input_ids": [*range(3 + i, 93 + i)]}) + "\n" for i in range(3)]
    file.write_text("".join(lines))
    command = f"record --traces {file} --trace-length 90 --out {store} --num-traces".split()
    cli.main([*command, "2"])
    cli.main([*command, "3"])
    file.write_text("".join(reversed(lines)))
    assert re.search(r"recorded with traces '.*mine\.jsonl \(\w{12}\)', not '.*\)'", fails(capsys, [*command, "3"]))
