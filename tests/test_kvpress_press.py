"""kvenv's policies as presses: what they keep of a prompt is what EvictingCache keeps.

kvpress itself needs another transformers: ``python -m experiments.kvpress_parity`` tests against it, here stands in for
it the little that a press takes from it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import agents
import kvenv
from agents.kvp_scorer import KVPPolicy, KVPScorer
from agents.learned import LearnedPolicy
from agents.scorer import Scorer, ScorerPolicy
from experiments import kvpress_parity
from kvenv.features import feature_set
from kvenv.identity import ModelIdentity
from kvenv.state import Protection
from tests.models import ARCHITECTURES, random_tokens
from tests.policies import kvenv_model
from tests.reference import copy_with

PROTECTION = Protection(2, 5)


class ScorerPress:
    """What kvpress's class of this name does with scores."""

    def __init__(self, compression_ratio: float = 0.0) -> None:
        self.compression_ratio = compression_ratio

    def keep(self, model: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
        """Return the positions (L, N, H, B) that are kept when each layer has attended to a prompt, in order."""
        self.post_init_from_model(model)  # type: ignore[attr-defined]
        cache, kept, hooks = DynamicCache(), [], []

        def hook(module: Any, _: Any, kwargs: dict[str, Any], __: Any) -> None:
            module.rotary_emb = model.model.rotary_emb
            layer = cache.layers[module.layer_idx]
            given = (module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
            scores = self.score(*given)  # type: ignore[attr-defined]
            kept.append(scores.topk(compute_n_kept(layer.keys.shape[2], self.compression_ratio)).indices)

        for layer in model.model.layers:
            hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        try:
            with torch.no_grad():
                model(prompt, past_key_values=cache, **options)
        finally:
            for each in hooks:
                each.remove()
        return torch.stack(kept).sort().values


def compute_n_kept(k_len: int, compression_ratio: float) -> int:
    """Return how many pairs stay."""
    return max(1, int(k_len * (1 - compression_ratio)))


def get_prerope_query_states(module: Any, hidden_states: Tensor) -> Tensor:
    """Return queries (N, H * G, S, D) before they are rotated."""
    heads = module.config.num_attention_heads * module.head_dim
    projected = module.q_proj(hidden_states) if hasattr(module, "q_proj") else module.qkv_proj(hidden_states)
    query = projected[..., :heads].unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return module.q_norm(query) if hasattr(module, "q_norm") else query


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the class, made from what stands in for kvpress."""
    whole, utils = ModuleType("kvpress"), ModuleType("kvpress.utils")
    whole.ScorerPress = ScorerPress  # type: ignore[attr-defined]
    vars(utils).update(compute_n_kept=compute_n_kept, get_prerope_query_states=get_prerope_query_states)
    monkeypatch.setitem(sys.modules, "kvpress", whole)
    monkeypatch.setitem(sys.modules, "kvpress.utils", utils)
    monkeypatch.delitem(sys.modules, "agents.kvpress_press", raising=False)
    yield importlib.import_module("agents.kvpress_press").KVEnvPress
    sys.modules.pop("agents.kvpress_press", None)


def policy_for(kind: str, model: PreTrainedModel) -> LearnedPolicy:
    """Return a policy of random weights for a model."""
    known, generator = ModelIdentity.of(model), torch.Generator().manual_seed(0)
    shape = known.architecture
    if kind == "kvp":
        return KVPPolicy(KVPScorer(2, 2, shape.head_dim, 4, 6, shape.inv_freq, generator), model=known)
    width = feature_set(kind).width(shape.head_dim, shape.groups)
    scorer = Scorer(2, 2, width, 5, generator=generator)
    scorer.scale.uniform_(0.1, 1.0, generator=generator)
    return ScorerPolicy(scorer, kind, model=known, interval=7)


def evicted_by_kvenv(model: PreTrainedModel, policy: Any, prompt: Tensor, budget: int, interval: int) -> Tensor:
    """Return the positions (L, N, H, B) of a prompt that EvictingCache keeps, in order."""
    terms: dict[str, Any] = {"budget": budget, "interval": interval, "protection": PROTECTION}
    cache = kvenv.EvictingCache(model, policy, schedule="prefill", **terms)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=2, do_sample=False,
        eos_token_id=10**6, pad_token_id=0,
    )  # fmt: skip
    length = prompt.shape[1]
    held = cache.positions
    return torch.where((held >= 0) & (held < length), held, length).sort().values[..., :budget]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["kvp", "pre-rope", "foresight", "h2o", "tova", "snapkv"])
def test_it_keeps_what_kvenv_keeps(kind: str, architecture: str, press: Any) -> None:
    model = kvenv_model(architecture)
    policy = agents.make(kind) if kind in agents.names() else policy_for(kind, model)
    prompt = random_tokens(2, 52)
    kept = press(policy, 0.4, interval=7, protection=PROTECTION).keep(copy_with(model, "sdpa"), prompt)
    assert kept.shape[-1] == 31
    assert torch.equal(kept, evicted_by_kvenv(model, policy, prompt, 31, 7))
    assert not torch.equal(kept[0], kept[1])


def test_windows_are_the_policys_own_and_end_with_the_prompt(press: Any) -> None:
    model = kvenv_model()
    policy, prompt = policy_for("pre-rope", model), random_tokens(1, 45)
    own = press(policy, 0.5, protection=PROTECTION).keep(model, prompt)
    assert torch.equal(own, evicted_by_kvenv(model, policy, prompt, 22, 7))
    other = press(policy, 0.5, interval=3, protection=PROTECTION).keep(model, prompt)
    assert torch.equal(other, evicted_by_kvenv(model, policy, prompt, 22, 3))
    assert not torch.equal(own, other)
    assert press(agents.make("h2o")).interval == 16


def test_protected_pairs_stay_whatever_the_scores(press: Any) -> None:
    class Backwards:
        name, needs = "backwards", frozenset[str]()

        def __call__(self, state: kvenv.LayerState) -> Tensor:
            return -1e9 * state.positions.double().where(state.mask, torch.tensor(1.0))

    for ratio, kept in ((0.75, 3), (0.82, 0)):
        small = press(Backwards(), ratio, protection=PROTECTION)
        positions = small.keep(kvenv_model(), random_tokens(1, 40))[0, 0, 0]
        assert positions.tolist() == [*range(2 + kept), *range(35, 40)]


def test_what_a_press_cannot_do_is_refused(press: Any) -> None:
    model, prompt = kvenv_model(), random_tokens(2, 20)
    for name, need in (("random", "noise"), ("golden", "future"), ("expected-attention", "query_moments")):
        with pytest.raises(ValueError, match=f"policy '{name}' needs .*{need}.*: a press knows"):
            press(agents.make(name))
    with pytest.raises(ValueError, match="interval must be an integer of at least 1, not 0"):
        press(agents.make("h2o"), interval=0)
    with pytest.raises(ValueError, match="budget 10 is less than the 20 protected pairs"):
        press(agents.make("knorm"), 0.5).keep(model, prompt)
    with pytest.raises(ValueError, match=r"'kvp-tiny' was trained for another architecture .* layers 5, not 2"):
        press(agents.make("kvp-tiny"), 0.5).keep(model, prompt)


def test_parts_of_a_prompt_are_refused(press: Any) -> None:
    model = kvenv_model()
    states, pairs, turned = torch.zeros(1, 40, 32), torch.zeros(1, 2, 40, 16), torch.zeros(1, 40, 16)
    layer, small = model.model.layers[0].self_attn, press(agents.make("knorm"), 0.5, protection=PROTECTION)
    for parts in ((states[:, :8], pairs[:, :, :8], turned), (states[:, :8], pairs, turned[:, :1])):
        with pytest.raises(ValueError, match="a policy ranks a whole prompt, not"):
            small.score(layer, parts[0], parts[1], parts[1], None, {"position_embeddings": (parts[2], parts[2])})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_prompts_are_refused(attention: str, press: Any) -> None:
    model, prompt = copy_with(kvenv_model(), attention), random_tokens(2, 20)
    mask = torch.ones_like(prompt)
    small = press(agents.make("knorm"), 0.5, protection=PROTECTION)
    small.keep(model, prompt, attention_mask=mask)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="prompts are padded"):
        small.keep(model, prompt, attention_mask=mask)


def test_without_kvpress_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    monkeypatch.delitem(sys.modules, "agents.kvpress_press", raising=False)
    with pytest.raises(ImportError, match=r"needs kvpress, which needs transformers<5\.3: .*pip install kvpress"):
        importlib.import_module("agents.kvpress_press")


class Echo:
    """Answers as kvpress would if it agreed, but for one head of one prompt."""

    def __init__(self, wrong: bool) -> None:
        self.wrong, self.asked = wrong, 0

    def ask(self, prompt: list[list[int]], policy: str, ratio: float, new: int) -> dict[str, Any]:
        """Return what kvenv itself does."""
        ids = torch.tensor(prompt)
        budget = compute_n_kept(ids.shape[1], ratio)
        kept, tokens = kvpress_parity.ours(kvenv.load_model("tiny").model, policy, ids, budget, new)
        self.asked += 1
        if self.wrong and self.asked == 2:
            kept[1, 0, 0] += 1
            tokens[1] += 1
        return {"kept": kept.tolist(), "tokens": tokens}

    def close(self) -> None:
        """Do nothing."""


def test_the_comparison_counts_and_ends_with_1_if_anything_differs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--policies", "knorm", "--ratios", "0.5", "--new", "4", "--out", str(tmp_path / "parity.txt")]
    monkeypatch.setattr(kvpress_parity, "LENGTHS", (44, 50))
    monkeypatch.setattr(kvpress_parity, "kvpress", lambda *_: Echo(wrong=False))
    kvpress_parity.main(arguments)
    assert "20 of 20" in (tmp_path / "parity.txt").read_text()
    monkeypatch.setattr(kvpress_parity, "kvpress", lambda *_: Echo(wrong=True))
    with pytest.raises(SystemExit, match="1"):
        kvpress_parity.main(arguments)
    told = (tmp_path / "parity.txt").read_text()
    assert "19 of 20" in told
    assert "5 of 8" in told
