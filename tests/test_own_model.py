"""From nothing to text: a policy is trained for a user's own model directory and tokenizer, and used there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import agents
import kvenv
from experiments import evaluate, generate, train
from experiments.results import read_rows
from experiments.runs import read_config
from tests.local_model import TEXT, make_model, make_traces
from tests.models import random_model

BUDGET, INTERVAL = 24, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory with traces beside it."""
    where = tmp_path_factory.mktemp("own")
    make_traces(where / "traces.jsonl")
    return make_model(where / "model")


def arguments(directory: Path, out: Path) -> list[str]:
    """Return the arguments of README's recipe, smaller."""
    return [
        "grpo", "--preset", "foresightkv", "--model", str(directory),
        "--traces", str(directory.parent / "traces.jsonl"), "--trace-length", "160",
        "--interval", str(INTERVAL), "--recent", str(INTERVAL), "--budgets", str(BUDGET), "--imitation-updates", "4",
        "--updates", "3", "--num-traces", "2", "--group", "2", "--at-once", "1", "--eval-traces", "2",
        "--eval-every", "2", "--save-every", "2", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that the recipe's one command makes."""
    out = tmp_path_factory.mktemp("runs") / "grpo"
    train.main(arguments(directory, out))
    return out


def interrupt(patch: pytest.MonkeyPatch, learner: str, done: int, directory: Path, out: Path) -> None:
    """Make the run of the recipe, but let a signal come in an update of one of its stages."""
    advance = train._advance

    def interrupted(run: Any, learning: Any, validation: Any, args: Any, interruption: Any, *rest: Any) -> bool:
        if (learning.name, learning.done) == (learner, done):
            interruption.signal = 2
        return advance(run, learning, validation, args, interruption, *rest)

    with patch.context() as patched:
        patched.setattr(train, "_advance", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(directory, out))
    assert stopped.value.code == 130


def assert_same_policies(one: Path, two: Path) -> None:
    """Compare what both stages of two runs became."""
    for stage in ("imitation/policy", "policy"):
        whole, other = weights(agents.make(one / stage)), weights(agents.make(two / stage))
        assert all(torch.equal(whole[name], other[name]) for name in whole)


def weights(policy: Any) -> dict[str, torch.Tensor]:
    return dict(policy.scorer.state_dict())


def test_one_command_imitates_and_then_improves(run: Path) -> None:
    first, second = agents.make(run / "imitation" / "policy"), agents.make(run / "policy")
    assert (first.name, second.name) == ("imitation", "grpo")
    assert read_config(run / "imitation")["arguments"]["learner"]["loss"] == "pairwise"  # the preset's
    assert read_config(run / "imitation")["arguments"]["learner"]["updates"] == 4
    assert any(not torch.equal(one, weights(second)[name]) for name, one in weights(first).items())
    # Improved from there, not from random weights: a few steps of 3e-4 don't get far.
    for name, one in weights(first).items():
        torch.testing.assert_close(one, weights(second)[name], rtol=0, atol=0.01)


def test_the_policy_generates_with_plain_transformers(directory: Path, run: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(TEXT, return_tensors="pt")
    cache = kvenv.EvictingCache(model, agents.make(run / "policy"), budget=BUDGET, interval=INTERVAL)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 40
    assert (cache.positions >= 0).sum(dim=-1).max() <= BUDGET + INTERVAL


def test_generate_streams_and_says_what_it_took(directory: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([
        TEXT, "--model", str(directory), "--policy", str(run / "policy"), "--budget", str(BUDGET),
        "--interval", str(INTERVAL), "--max-new-tokens", "30", "--temperature", "0",
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.strip()
    tokens, rate = captured.err.split("tokens, ")[0].split()[-1], captured.err.split("tokens, ")[1].split()[0]
    assert 1 <= int(tokens) <= 30
    assert float(rate) > 0
    # 3 layers, 2 heads, at most 32 pairs of 2 x 8 float32, said in megabytes.
    assert "cache: 0.0 MB of keys and values; all of them would be" in captured.err


def test_it_is_evaluated_on_the_papers_tasks(directory: Path, run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"problem": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(3)]
    (data / "aime24.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data / "text.txt").write_text(f"{TEXT} " * 40)
    evaluate.main([
        "--model", str(directory), "--policies", "full", str(run / "policy"), "--budgets", str(BUDGET),
        "--tasks", "reasoning/aime24", "perplexity/text", "entropy/text", "--task-data", str(data), "--interval",
        str(INTERVAL), "--trace-length", "200", "--num-traces", "2", "--seeds", "0", "1", "--temperature", "0.6",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    rows = read_rows(tmp_path / "out" / "results.json")
    assert {row.traces for row in rows} == {"reasoning/aime24", "perplexity/text", "entropy/text"}
    assert {row.policy for row in rows} == {"full", "grpo", "random"}
    assert len(rows) == 3 * 3 * 2 * 2
    for row in rows:
        answered = row.traces == "reasoning/aime24"
        assert (row.score is not None) == (row.generated_tokens is not None) == answered
        assert (row.lm_loss is None) == answered
        assert (row.loss_by_entropy is not None) == (row.traces == "entropy/text")
    assert (tmp_path / "out" / "entropy.png").stat().st_size > 1000


def test_what_is_interrupted_in_its_first_stage_is_resumed_by_its_own_name(
    directory: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grpo"
    interrupt(monkeypatch, "imitation", 1, directory, out)
    assert f"imitation: 2 updates are saved, go on with --resume {out}\n" in capsys.readouterr().err
    train.main(["--resume", str(out)])
    assert_same_policies(run, out)


def test_a_first_stage_goes_on_wherever_its_directory_is(
    directory: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, "imitation", 1, directory, Path("begun"))
    Path("begun").rename("moved")
    with pytest.raises(ValueError, match="--out begun: the run has its directory, moved, and goes on there"):
        train.main(["--resume", "moved", "--out", "begun"])
    train.main(["--resume", str(tmp_path / "moved"), "--out", "moved"])
    assert_same_policies(run, tmp_path / "moved")
    assert not Path("begun").exists()


def test_another_number_of_updates_is_refused_before_the_first_stage_goes_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grpo"
    interrupt(monkeypatch, "imitation", 1, directory, out)
    before = (out / "imitation" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="--updates 9: the run has made 0 of its 3 updates; finish it"):
        train.main(["--resume", str(out), "--updates", "9"])
    assert (out / "imitation" / "metrics.jsonl").read_text() == before


def test_a_policy_says_what_it_started_from_after_a_resume_too(
    directory: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grpo"
    interrupt(monkeypatch, "grpo", 0, directory, out)
    train.main(["--resume", str(out)])
    for where in (run, out):
        described = json.loads((where / "policy" / "policy.json").read_text())
        assert described["training"]["init"] == str(where / "imitation" / "policy")
    assert_same_policies(run, out)


@pytest.mark.parametrize(
    "others",
    [
        ["imitation", "--budgets", str(BUDGET)],
        ["ppo", "--budget", str(BUDGET), "--num-envs", "2"],
        ["imitation", "--budgets", "8", "--eval-budgets", str(BUDGET)],
    ],
)
def test_short_traces_are_told_before_anything_is_trained(directory: Path, tmp_path: Path, others: list[str]) -> None:
    tokens = {"input_ids": list(range(3, 9)) * 5}
    traces = (directory.parent / "traces.jsonl").read_text() + json.dumps(tokens) + "\n"
    (tmp_path / "traces.jsonl").write_text(traces)
    least = BUDGET + INTERVAL + 2
    with pytest.raises(ValueError, match=f"traces.jsonl:7' has 30 tokens: .*1 of 7 traces .* shorter than {least} "):
        train.main([
            *others, "--model", str(directory), "--traces", str(tmp_path / "traces.jsonl"), "--trace-length", "160",
            "--interval", str(INTERVAL), "--sinks", "2", "--recent", "4", "--out", str(tmp_path / "run"),
        ])  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["", "--policy", "h2o"], "the prompt is empty"),
        (
            [TEXT, "--max-new-tokens", "5000"],
            "the number of tokens of prompt and answer, .* exceeds the 4096 positions",
        ),
        ([TEXT, "--temperature", "-1"], "temperature -1.0"),
        ([TEXT, "--top-p", "2"], "top_p 2.0"),
        ([TEXT, "--max-new-tokens", "0"], "max_new_tokens 0"),
        ([TEXT, "--policy", "golden"], "golden.*no known future"),
        ([TEXT, "--policy", "nobody"], "unknown policy 'nobody'"),
    ],
)
def test_what_cannot_be_generated_is_said(options: list[str], message: str, directory: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate.main([*options, "--model", str(directory)])


def test_a_word_that_the_tokenizer_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match="the tokenizer of model 'tiny' doesn't know 'é'"):
        generate.main(["the stone é"])


def test_a_tokenizer_whose_unknown_token_begins_a_text_knows_its_words(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.unk_token = tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate.main([TEXT, "--model", str(tmp_path), "--max-new-tokens", "3", "--policy", "full"])
    assert "and a prompt of" in capsys.readouterr().err


def test_thoughts_and_texts_have_a_prompt_where_it_is_asked_for(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 40)
    evaluate.main([
        "--model", str(directory), "--policies", "full", "keydiff", "--budgets", str(BUDGET), "--tasks", "entropy/text",
        "--task-data", str(tmp_path), "--trace-length", "200", "--num-traces", "2", "--schedule", "prefill",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    rows = read_rows(tmp_path / "out" / "results.json")
    assert {(row.schedule, row.score_from) for row in rows} == {("prefill", 100)}
    assert all((row.kept_fraction == 1) == (row.policy == "full") for row in rows)


@pytest.mark.parametrize(
    "argv",
    [
        [generate, TEXT],
        [evaluate, "--tasks", "perplexity/text", "--trace-length", "200", "--budgets", "24", "--num-traces", "1"],
        [evaluate, "--tasks", "reasoning/aime24", "--trace-length", "200", "--budgets", "24", "--num-traces", "1"],
        [train, "imitation", "--trace-length", "160", "--interval", "8", "--recent", "8", "--budgets", "24"],
    ],
    ids=["generate", "traces", "questions", "train"],
)
def test_a_tokenizer_of_another_model_is_told(argv: list[Any], directory: Path, tmp_path: Path) -> None:
    """The model has fewer tokens than its tokenizer."""
    command, *options = argv
    random_model("qwen3", torch.float32).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 40)
    (tmp_path / "aime24.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    if command is evaluate:
        options += ["--task-data", str(tmp_path), "--policies", "full", "--out", str(tmp_path / "out")]
    if command is train:
        options += ["--traces", str(directory.parent / "traces.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(
        ValueError, match=r"has token ids \d+ to \d+: .* knows 0 to 63; is the tokenizer another model's"
    ):
        command.main([*options, "--model", str(tmp_path / "model")])
    assert not (tmp_path / "out").exists()
