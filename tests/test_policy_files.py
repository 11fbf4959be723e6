"""Learned policies travel: two files that give back the same policy, from a directory or the hub, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import agents
from agents.kvp_scorer import KVPPolicy, KVPScorer
from agents.learned import LearnedPolicy
from agents.scorer import Scorer, ScorerPolicy
from kvenv.features import feature_set
from kvenv.identity import Architecture, ModelIdentity
from kvenv.layerwise import rollout
from kvenv.models import load_model
from tests.environments import BUDGET, INTERVAL, MODEL, PROTECTION, trace
from tests.policies import kvenv_model

OWN = ["policy.json", "policy.safetensors"]


def terms() -> dict[str, Any]:
    """Return what a policy of the small random model knows of its training."""
    model = ModelIdentity.of(load_model(MODEL).model)
    return {"training": {"learner": "none", "run": {"x": [1, None]}}, "model": model, "budgets": (8, 20), "interval": 6}


def learned(kind: str) -> LearnedPolicy:
    """Return a policy of random weights for the small random model, of each class and shape that there is."""
    generator = torch.Generator().manual_seed(0)
    if kind == "kvp":
        inv_freq = list(terms()["model"].architecture.inv_freq)
        return KVPPolicy(KVPScorer(2, 2, 16, 4, 6, inv_freq, generator), "some kvp", **terms())
    features, depth = kind.split()
    scorer = Scorer(2, 2, feature_set(features).width(16, 2), 5, int(depth), generator)
    for constants in (scorer.centre, scorer.scale, scorer.mean, scorer.deviation):
        constants.uniform_(0.5, 2.0, generator=generator)
    return ScorerPolicy(scorer, features, "some scorer", **terms())


KINDS = ["kvp", "pre-rope 1", "pre-rope 2", "stats 1", "kv 1"]


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_what_was_saved_bit_for_bit(kind: str, tmp_path: Path) -> None:
    policy = learned(kind)
    policy.save_pretrained(tmp_path / "one")
    for load in (agents.Policy.from_pretrained, type(policy).from_pretrained, agents.make):
        again: Any = load(tmp_path / "one")
        assert type(again) is type(policy)
        assert (again.name, again.training, again.model) == (policy.name, policy.training, policy.model)
        assert (again.budgets, again.interval, again.needs) == ((8, 20), 6, policy.needs)
        mine, theirs = policy.scorer.state_dict(), again.scorer.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        again.save_pretrained(tmp_path / "two")
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
    options: dict[str, Any] = {"model": kvenv_model(), "budget": BUDGET, "interval": INTERVAL, "protection": PROTECTION}
    assert torch.equal(*(rollout(each, [trace(0)], **options).losses.nll for each in (policy, again)))


def test_saving_writes_three_files_and_says_nothing(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    policy = learned("stats 1")
    policy.save_pretrained(tmp_path)
    agents.Policy.from_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", *OWN]
    assert (*capfd.readouterr(), caplog.text, len(recwarn)) == ("", "", "", 0)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert list(description) == [
        "type", "name", "features", "shape", "fingerprint", "model", "budgets", "interval", "training",
    ]  # fmt: skip
    assert description["model"] == json.loads(json.dumps(asdict(policy.model)))
    assert description["model"]["name"] == MODEL
    card = (tmp_path / "README.md").read_text()
    assert "library_name: kvenv" in card
    assert "license" not in card
    for fact in ("# some scorer", f"`{MODEL}`", "layers 2", policy.model.fingerprint[:12], "8, 20"):
        assert fact in card


def test_a_readme_that_is_there_stays_and_a_foreign_config_too(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    learned("kvp").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is no policy's and would be deleted"):
        learned("kvp").save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


class Hub:
    """Stands in for the hub: keeps what is uploaded, gives it back, and notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}
        self.directory: Path | None = None

    def __call__(self, **options: Any) -> Hub:
        """Be the client that ``HfApi(token=...)`` would be."""
        self.calls.append(("api", options))
        return self

    def create_repo(self, **options: Any) -> Any:
        """Return an object with the repository's id."""
        self.calls.append(("create_repo", options))
        self.repo_id = options["repo_id"]
        return self

    def upload_folder(self, **options: Any) -> str:
        """Keep the files of a folder."""
        self.uploaded = contents(Path(options["folder_path"]))
        self.calls.append(("upload_folder", options))
        return f"commit of {options['repo_id']}"

    def snapshot_download(self, repository: str, **options: Any) -> str:
        """Write the files that match to the directory."""
        assert self.directory is not None
        self.calls.append((repository, options))
        self.directory.mkdir(exist_ok=True)
        for name in set(self.uploaded) & set(options["allow_patterns"]):
            (self.directory / name).write_bytes(self.uploaded[name])
        return str(self.directory)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Put the stand-in where the hub's client is."""
    hub = Hub()
    hub.directory = tmp_path / "snapshot"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_it_travels_over_the_hub(hub: Hub) -> None:
    policy = learned("pre-rope 1")
    assert policy.push_to_hub("owner/name", private=True, branch="mine") == "commit of owner/name"
    (_, _), (_, created), (_, upload) = hub.calls
    assert (created["repo_id"], created["private"]) == ("owner/name", True)
    assert (upload["repo_id"], upload["revision"], upload["repo_type"]) == ("owner/name", "mine", "model")
    assert sorted(hub.uploaded) == ["README.md", *OWN]
    assert json.loads(hub.uploaded["policy.json"]) == json.loads(json.dumps(policy.description()))
    hub.calls.clear()
    loads: list[Any] = [agents.Policy.from_pretrained, ScorerPolicy.from_pretrained, agents.make]
    for load in loads:
        again = load("owner/name", revision="v1")
        assert hub.calls.pop() == ("owner/name", {"revision": "v1", "allow_patterns": OWN})
        assert again.description() == policy.description()
    assert sorted(contents(hub.directory)) == OWN  # type: ignore[arg-type]
    agents.make("owner/name")
    assert hub.calls.pop()[1]["revision"] is None


def test_a_directory_of_that_name_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    learned("kvp").save_pretrained("owner/name")
    assert agents.make("owner/name").name == "some kvp"
    assert not hub.calls
    with pytest.raises(ValueError, match="revision 'v1' means nothing for the directory 'owner/name'"):
        agents.Policy.from_pretrained("owner/name", revision="v1")


def test_what_the_hub_does_not_give_is_one_error() -> None:
    # The tests are offline: this is huggingface_hub's own refusal.
    for ask in (agents.make, agents.Policy.from_pretrained):
        with pytest.raises(ValueError, match=r"'nobody/nothing', revision 'v9', is no directory here and can't be had"):
            ask("nobody/nothing", revision="v9")


def test_a_repository_that_is_no_policy_is_refused(hub: Hub) -> None:
    hub.uploaded = {"model.safetensors": b"", "policy.json": b"{}"}
    with pytest.raises(ValueError, match=r"'owner/name' is on the hub without policy\.safetensors: it is no policy"):
        agents.make("owner/name")


@pytest.mark.parametrize("name", ["imitation-tiny", "runs/a/b", "../x", "./x", "owner/", "/x/y"])
def test_what_is_neither_directory_nor_id_is_refused(name: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match="is neither a directory nor a hub id owner/name"):
        agents.Policy.from_pretrained(name)
    assert not hub.calls


def test_a_class_takes_its_own_policies_only(tmp_path: Path) -> None:
    learned("kvp").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a KVPPolicy, no ScorerPolicy: use Policy\.from"):
        ScorerPolicy.from_pretrained(tmp_path)
    assert isinstance(LearnedPolicy.from_pretrained(tmp_path), KVPPolicy)


def test_policies_of_before_know_what_their_network_says(tmp_path: Path) -> None:
    learned("stats 1").save_pretrained(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    nothing = {"name": None, "fingerprint": None, "architecture": dict.fromkeys(description["model"]["architecture"])}
    for change in ({"model": nothing}, {"model": None}, {}):
        for name in ("model", "budgets", "interval"):
            description.pop(name, None)
        (tmp_path / "policy.json").write_text(json.dumps(description | change))
        policy = ScorerPolicy.from_pretrained(tmp_path)
        assert (policy.model.name, policy.model.fingerprint, policy.budgets, policy.interval) == (None,) * 4
        assert policy.model.architecture == Architecture(layers=2, kv_heads=2)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": {}},
        {"model": {"name": 1, "fingerprint": None, "architecture": {}}},
        {"model": {"name": None, "fingerprint": None, "architecture": {"layers": 2}}},
        {"budgets": 3},
        {"budgets": ["x"]},
        {"interval": [1]},
        {"training": 3},
        {"shape": [2, 2]},
        {"shape": [0, 2, 12, 5, 1]},
        {"shape": [2, -2, 12, 5, 1]},
        {"features": "unknown"},
        {"shape": [2, 2, 12, 5, 10**9]},
        {"shape": [10**30, 2, 12, 5, 1]},
        {"interval": float("inf")},
    ],
    ids=str,
)
def test_a_malformed_description_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    learned("stats 1").save_pretrained(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=r"policy\.json is not a scorer policy's description|doesn't hold this scorer's"
    ):
        agents.make(tmp_path)


def test_a_network_of_another_shape_than_its_model_is_refused(tmp_path: Path) -> None:
    learned("kvp").save_pretrained(tmp_path)
    path = tmp_path / "policy.json"
    description = json.loads(path.read_text())
    description["model"]["architecture"]["head_dim"] = 32
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"policy\.json is not a kvp .*: head_dim 16, not 32"):
        agents.make(tmp_path)


@pytest.mark.parametrize("name", agents.TRAINED)
def test_trained_policies_name_the_bundled_model(name: str, tiny_model: Any) -> None:
    policy: Any = agents.make(name)
    assert policy.model == ModelIdentity.of(tiny_model.model)
    assert policy.model.name == "tiny"
    assert policy.interval == 16
    assert policy.budgets == (None if name == "kvp-tiny" else (32, 48, 64))
    assert policy.training.get("budgets") == (None if policy.budgets is None else list(policy.budgets))
    directory = Path(agents.__file__).parent / "trained" / name
    assert (directory / "policy.json").read_text() == json.dumps(policy.description(), indent=2) + "\n"


def test_an_unknown_type_is_named_with_its_file(tmp_path: Path) -> None:
    learned("kvp").save_pretrained(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"type": "oracle"}))
    with pytest.raises(ValueError, match=r"policy\.json: unknown policy type 'oracle': known are scorer, kvp"):
        agents.make(tmp_path)
