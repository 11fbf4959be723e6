"""What each learner can be told on the command line, and how it is built from that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from agents import grpo, imitation, kvp, ppo
from agents.learner import Learner, SharedLearner
from experiments.crew import CrewArgs
from experiments.progress import track
from experiments.validation import Validation
from kvenv.files import digest
from kvenv.models import load_model
from kvenv.state import Protection
from kvenv.store import INDEX, TraceStore
from kvenv.traces import load_traces
from kvenv.vector_env import KVEvictVectorEnv

PresetName = Literal["none", "foresightkv", "kvp"]


@dataclass(frozen=True)
class DecodingArgs:
    """What is decoded how; names and defaults are those of KVEvict-v0."""

    model: str = "tiny"
    """The LLM: tiny, a directory, a hub id or a registered name."""
    traces: str = "recall+tracking+dialogue+reasoning"
    """A trace family, several joined by +, a .txt or .jsonl file, hf: and the name of a Hugging Face dataset, or a
    registered name."""
    trace_length: int = 512
    """Tokens of a trace."""
    interval: int = 16
    """Tokens decoded between two evictions."""
    sinks: int = 4
    """First tokens that are never evicted."""
    recent: int = 16
    """Newest tokens that are never evicted."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """Data type of the LLM."""
    deterministic: bool = False
    """Whether to compute the same bits in every run on a GPU, too, which is slower; on a CPU they always are."""


@dataclass(frozen=True)
class RolloutArgs(DecodingArgs):
    """Decoding, and what the policy sees."""

    features: str = "pre-rope"
    """What the policy sees: kv, foresight, pre-rope, stats or a registered name; a policy to start from has its own."""

    def learn_with(self, kind: Any, config: Any) -> Any:
        """Return a learner by rollouts, of class ``kind``, at its start."""
        loaded = load_model(self.model, dtype=self.dtype, device=self.device)
        source = load_traces(self.traces, split="train", tokenizer=loaded.tokenizer, trace_length=self.trace_length)
        protection = Protection(self.sinks, self.recent)
        terms = {"interval": self.interval, "protection": protection, "features": self.features}
        return kind(loaded.model, source, config, **terms)


@dataclass(frozen=True)
class EnvironmentArgs(RolloutArgs):
    """Where the agent trains."""

    budget: int = 64
    """Pairs each (layer, KV head) keeps after an eviction."""
    num_envs: int = 16
    """Traces decoded side by side."""

    def make(self) -> KVEvictVectorEnv:
        """Return the training environment as Stable-Baselines3 wants it."""
        return KVEvictVectorEnv(**asdict(self), split="train", output="numpy", autoreset_mode="SameStep")


@dataclass(frozen=True)
class RunArgs:
    """What is kept of the training, and how often."""

    preset: PresetName = "none"
    """Start from published hyper-parameters; options given besides override them."""
    out: Path = Path("runs/train")
    """Directory of the run: config.json, metrics.jsonl, checkpoints/, policy/, TensorBoard events."""
    resume: Path | None = None
    """Go on with the run in this directory, with its arguments; --updates extends a finished one."""
    eval_every: int = 20
    """Updates between two evaluations on validation traces; 0 for none."""
    eval_traces: int = 32
    """Validation traces; a mixture's families come in turn."""
    eval_budgets: tuple[int, ...] = ()
    """Budgets of the evaluation, whose mean is reported; those of the training if empty."""
    save_every: int = 10
    """Updates between two checkpoints."""


@dataclass(frozen=True)
class LearnerArgs:
    """What the arguments of every learner have."""

    name: ClassVar[str]
    env: Any
    learner: Any
    run: RunArgs

    def build(self) -> Learner:
        """Return the learner at its start."""
        raise NotImplementedError

    def verify(self) -> None:
        """Look through large files that it will learn from, once, before it does.

        Raises
        ------
        ValueError
            If one is damaged.
        """

    def first_stage(self, out: Path) -> LearnerArgs | None:
        """Return what is to be trained first, in a directory of the run ``out``, if anything is."""
        return None

    def after(self, policy: Path) -> LearnerArgs:
        """Return these arguments, to go on from the policy of the first stage."""
        return replace(self, learner=replace(self.learner, init=str(policy)))

    def files(self) -> dict[str, Path]:
        """Return the local files that updates learn from, by what they hold; a policy to start from is read once."""
        traces = Path(self.env.traces)
        return {"traces": traces} if traces.is_file() else {}

    def made_from(self, learner: Learner) -> dict[str, str]:
        """Return the digests of the LLM and the local data that the learner depends on."""
        policy: Any = learner.policy
        return {"model": policy.model.fingerprint} | {name: digest(path) for name, path in self.files().items()}

    def budgets(self) -> tuple[int, ...]:
        """Return the budgets that it is trained for."""
        return tuple(self.learner.budgets) or (self.env.budget,)

    def validation(self) -> Validation:
        """Return the validation of its policies."""
        return Validation(
            model=self.env.model,
            traces=self.env.traces,
            trace_length=self.env.trace_length,
            interval=self.env.interval,
            sinks=self.env.sinks,
            recent=self.env.recent,
            budgets=self.run.eval_budgets or self.budgets(),
            num_traces=self.run.eval_traces,
            device=self.env.device,
            dtype=self.env.dtype,
        )


@dataclass(frozen=True)
class SharedArgs(LearnerArgs):
    """What the arguments of a learner have whose work can be divided."""

    crew: Any

    def build(self) -> SharedLearner:
        """Return the learner at its start."""
        raise NotImplementedError

    def divided(self) -> SharedArgs:
        """Return these arguments with an update divided into parts, where it isn't."""
        return self


@dataclass(frozen=True)
class Imitation(LearnerArgs):
    """Imitate Golden Eviction along its own trajectories or, with DAgger, the agent's (ForesightKV, stage 1)."""

    name = "imitation"

    env: tyro.conf.OmitArgPrefixes[RolloutArgs] = field(default_factory=RolloutArgs)
    learner: tyro.conf.OmitArgPrefixes[imitation.ImitationConfig] = field(default_factory=imitation.ImitationConfig)
    run: tyro.conf.OmitArgPrefixes[RunArgs] = field(default_factory=RunArgs)

    def build(self) -> Learner:
        """Return the learner at its start."""
        return self.env.learn_with(imitation.ImitationLearner, self.learner)


@dataclass(frozen=True)
class GRPO(SharedArgs):
    """Improve a policy by comparing sampled rollouts of the same trace (ForesightKV, stage 2)."""

    name = "grpo"

    env: tyro.conf.OmitArgPrefixes[RolloutArgs] = field(default_factory=RolloutArgs)
    learner: tyro.conf.OmitArgPrefixes[grpo.GRPOConfig] = field(default_factory=grpo.GRPOConfig)
    run: tyro.conf.OmitArgPrefixes[RunArgs] = field(default_factory=RunArgs)
    crew: tyro.conf.OmitArgPrefixes[CrewArgs] = field(default_factory=CrewArgs)
    imitation_updates: int = 0
    """Updates of imitation that come first, in OUT/imitation, where no policy to start from is given; 0: none."""

    def first_stage(self, out: Path) -> LearnerArgs | None:
        """Return the imitation that comes first, with the hyper-parameters of the same preset."""
        if not self.imitation_updates or self.learner.init:
            return None
        config = replace(
            imitation.PRESETS.get(self.run.preset, imitation.ImitationConfig()),
            updates=self.imitation_updates,
            **{name: getattr(self.learner, name) for name in ("budgets", "hidden", "depth", "seed")},
        )
        return Imitation(self.env, config, replace(self.run, out=out / Imitation.name, resume=None))

    def divided(self) -> GRPO:
        """Return these arguments with parts of one trace each, if all traces would be rolled out at once."""
        return replace(self, learner=replace(self.learner, at_once=self.learner.at_once or 1))

    def build(self) -> SharedLearner:
        """Return the learner at its start."""
        return self.env.learn_with(grpo.GRPOLearner, self.learner)


@dataclass(frozen=True)
class KVP(SharedArgs):
    """Learn offline, from recorded traces and without the LLM, to rank pairs by future attention (KVP)."""

    name = "kvp"

    env: tyro.conf.OmitArgPrefixes[DecodingArgs] = field(default_factory=DecodingArgs)
    learner: tyro.conf.OmitArgPrefixes[kvp.KVPConfig] = field(default_factory=kvp.KVPConfig)
    run: tyro.conf.OmitArgPrefixes[RunArgs] = field(
        default_factory=lambda: RunArgs(eval_every=100, eval_budgets=(64,), save_every=100)
    )
    crew: tyro.conf.OmitArgPrefixes[CrewArgs] = field(default_factory=CrewArgs)
    store: Path = Path("runs/store")
    """Trace store to learn from, made by `kvenv record`; what is decoded how is for the evaluation."""

    def build(self) -> SharedLearner:
        """Return the learner at its start."""
        loaded = load_model(self.env.model, dtype=self.env.dtype, device=self.env.device)
        return kvp.KVPLearner(TraceStore(self.store, loaded.model), self.learner, self.env.device)

    def verify(self) -> None:
        """Compare the store's shards with their digests."""
        store = TraceStore(self.store)
        for shard in track(store.shards, f"checking {self.store}"):
            store.verify(shard)

    def files(self) -> dict[str, Path]:
        """Return the store's index, which has the digests of its shards, besides the others'."""
        return super().files() | {"store": self.store / INDEX}

    def budgets(self) -> tuple[int, ...]:
        """Refuse: a ranking is good for all budgets, so that those of the evaluation must be given."""
        raise ValueError("--eval-budgets is empty: kvp is trained for all budgets, say at which it is to be evaluated")


@dataclass(frozen=True)
class PaidArgs(EnvironmentArgs):
    """Where an agent trains by the environment's own rewards, and its observations are kept."""

    features: str = "stats"
    """What the policy sees: stats, kv, foresight or a registered name. An update keeps every observation: kv and
    foresight are large."""
    reward: str = "lm_loss_increase"
    """What a window is paid: lm_loss_increase, which has the least noise, lm_loss, foresight, answer_loss or a
    registered name."""


@dataclass(frozen=True)
class PPO(LearnerArgs):
    """Stable-Baselines3's PPO, unmodified, with one decision of a (layer, KV head) per row."""

    name = "ppo"

    env: tyro.conf.OmitArgPrefixes[PaidArgs] = field(default_factory=PaidArgs)
    learner: tyro.conf.OmitArgPrefixes[ppo.PPOConfig] = field(default_factory=ppo.PPOConfig)
    run: tyro.conf.OmitArgPrefixes[RunArgs] = field(default_factory=RunArgs)

    def build(self) -> Learner:
        """Return the learner at its start."""
        env = self.env.make()
        source, limits = env.dynamics.source, replace(env.dynamics.limits, budget=max(self.budgets()))
        limits.check_traces([source[i] for i in range(source.size or 0)])
        return ppo.PPOLearner(env, self.learner)


LEARNERS: dict[str, type[LearnerArgs]] = {kind.name: kind for kind in (Imitation, KVP, GRPO, PPO)}
"""What can be trained."""

PRESETS: dict[tuple[str, str], LearnerArgs] = {
    ("imitation", "foresightkv"): Imitation(RolloutArgs(features="foresight"), imitation.PRESETS["foresightkv"]),
    ("grpo", "foresightkv"): GRPO(
        RolloutArgs(features="foresight"),
        grpo.PRESETS["foresightkv"],
        imitation_updates=imitation.PRESETS["foresightkv"].updates,
    ),
    ("kvp", "kvp"): KVP(learner=kvp.PRESETS["kvp"]),
}
"""Published hyper-parameters by learner and name; budgets and intervals are ours, at the papers' scale nothing fits."""


def default_arguments(name: str, preset: PresetName = "none") -> LearnerArgs:
    """Return a learner's arguments where none are given.

    Raises
    ------
    ValueError
        If the learner has no such preset.
    """
    kind: Any = LEARNERS[name]
    args: LearnerArgs = kind()
    if preset != "none":
        if (name, preset) not in PRESETS:
            known = [other for learner, other in PRESETS if learner == name]
            raise ValueError(f"--preset {preset} is none of {name}: it has {', '.join(known) or 'no presets'}")
        args = PRESETS[name, preset]
    return replace(args, run=replace(args.run, preset=preset, out=Path("runs") / name))
