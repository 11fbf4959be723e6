"""A story must be true: kept shares add up to the budget, losses are the rollout's; and its pictures can be opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import agents
from experiments import show
from experiments.story import Story, follow
from kvenv.layerwise import rollout
from kvenv.models import LoadedModel
from kvenv.state import Protection
from kvenv.traces import load_traces

OPTIONS = {"budget": 24, "interval": 8, "protection": Protection(4, 8)}


def story(tiny_model: LoadedModel, name: str, **options) -> Story:
    source = load_traces("recall", split="validation", tokenizer=tiny_model.tokenizer, trace_length=90)
    policy = None if name == "full" else agents.make(name)
    options = {"tokenizer": tiny_model.tokenizer} | OPTIONS | options
    return follow(policy, source, 5, model=tiny_model.model, **options)


@pytest.mark.parametrize("name", ["random", "h2o", "golden"])
def test_a_story_is_what_happened(tiny_model: LoadedModel, name: str) -> None:
    told = story(tiny_model, name)
    assert told.decisions == list(range(32, 89, 8))
    assert list(told.windows())[-1] == (7, 88, 90)
    assert told.kept.sum(axis=1) == pytest.approx(np.full(8, 24), abs=1e-4)
    for number, decision in enumerate(told.decisions):
        assert (told.kept[number, :4] == 1).all()
        assert (told.kept[number, decision - 8 : decision] == 1).all()
        assert not told.kept[number, decision:].any()
    # What is evicted never comes back.
    before = np.where(np.arange(90) < np.array(told.decisions[:-1])[:, None], told.kept[:-1], 1)
    assert (told.kept[1:] <= before + 1e-6).all()
    assert told.disagreement.any() == (name != "golden")
    # In each of the ten heads as many are kept where golden would evict as the other way round.
    assert not np.any(np.round(told.disagreement.sum(axis=1) * 10) % 2)
    source = load_traces("recall", split="validation", tokenizer=tiny_model.tokenizer, trace_length=90)
    if name != "golden":
        alone = rollout(agents.make(name), [source[5]], model=tiny_model.model, rollouts=[5], **OPTIONS)
        assert told.nll[1:] == pytest.approx(alone.losses.nll[0].numpy(), abs=1e-4)
    assert len(told.words) == 90
    assert [i for i in range(90) if told.answer[i]] == [i for a in source[5].answers for i in range(*a)]


def test_the_full_cache_has_nothing_to_tell(tiny_model: LoadedModel) -> None:
    told = story(tiny_model, "full")
    assert told.decisions == []
    assert (told.nll == told.full_nll).all()


def test_words_are_ids_where_there_is_no_tokenizer(tiny_model: LoadedModel) -> None:
    assert story(tiny_model, "random", tokenizer=None).words[0].isdigit()


SMALL = ["--trace-length", "90", "--budget", "24", "--interval", "8", "--split", "validation"]


def test_the_command_prints_every_window(capsys: pytest.CaptureFixture[str]) -> None:
    show.main(["--policy", "h2o", *SMALL])
    out = capsys.readouterr().out
    assert "h2o on recall/validation/0, budget 24" in out
    for number in range(1, 9):
        assert f"decision {number} of 8" in out


@pytest.mark.parametrize(("suffix", "kind", "frames"), [("png", "PNG", 1), ("gif", "GIF", 8)])
def test_pictures_can_be_opened(suffix: str, kind: str, frames: int, tmp_path: Path) -> None:
    path = tmp_path / f"story.{suffix}"
    show.main(["--policy", "random", *SMALL, "--out", str(path)])
    with Image.open(path) as picture:
        assert (picture.format, getattr(picture, "n_frames", 1)) == (kind, frames)
        assert min(picture.size) > 100


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_the_full_cache_has_no_picture(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is evicted"):
        show.main(["--policy", "full", *SMALL, "--out", str(tmp_path / f"full.{suffix}")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "story.pdf"], r"story\.pdf must end in \.png or \.gif"),
        (["--policy", "h3o"], "unknown policy 'h3o'"),
        (["--budget", "10"], "budget 10 is less than the 12 protected"),
        (["--budget", "0"], "budget 0"),
        (["--interval", "0"], "interval 0"),
        (["--trace", "-1"], "trace -1"),
    ],
)
def test_bad_arguments_are_one_clear_error(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show.main(["--policy", "random", *SMALL, *options])
