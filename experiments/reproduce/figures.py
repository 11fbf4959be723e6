"""What the two papers report, as far as it is known here, and how well.

No figure stands without its provenance: nobody had ForesightKV's full text at hand, only its abstract, its code, its
reviews and three summaries by others, and all quality results of KVP's first version are plots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["P", "C", "N", "A"]

SOURCES: dict[Source, str] = {
    "P": "read in the paper's text",
    "C": "read in its released code",
    "N": "from summaries by others, not checked against the paper",
    "A": "from the abstract or the code's README only",
}


@dataclass(frozen=True)
class Figure:
    """Something that a paper reports.

    Attributes
    ----------
    where : str
        In the paper.
    setting : str
        What was measured how.
    source : {"P", "C", "N", "A"}
        How it is known, see :data:`SOURCES`.
    values : dict of str to float
        The numbers, if any are known.
    says : str
        What is claimed in words.
    doubt : str
        Why not to rely on it.
    """

    where: str
    setting: str
    source: Source
    values: dict[str, float] = field(default_factory=dict)
    says: str = ""
    doubt: str = ""

    def __str__(self) -> str:
        """Return it in words, with provenance and doubts."""
        values = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        parts = [self.says, f"{self.setting}: {values}" if values else self.setting]
        return f"{'; '.join(filter(None, parts))} ({self.where}) [{self.source}]. {self.doubt}".strip()


AIME_DOUBT = "Doubtful: the notes contradict each other about AIME, and the budget isn't given."

FORESIGHTKV = {
    "oracle 1024": Figure(
        "quality of Golden Eviction", "Qwen3-4B, budget 1,024, interval 256: LM loss over the full cache's", "N",
        {"golden": 1.0711, "h2o": 1.2730, "snapkv": 1.4091, "r-kv": 1.4101},
    ),
    "oracle 2048": Figure(
        "quality of Golden Eviction", "Qwen3-4B, budget 2,048, interval 256: LM loss over the full cache's", "N",
        {"golden": 1.0166, "h2o": 1.0948, "snapkv": 1.1281, "r-kv": 1.1606},
    ),
    "entropy": Figure(
        "motivation",
        "math, all at one budget: relative loss increase of the 80 % of tokens with the least entropy, and "
        "of the others", "N", {"low": 1.47, "high": 0.52},
        doubt="Which policy and budget isn't known. For code, 75 % of low-entropy tokens.",
    ),
    "rewards": Figure(
        "reward ablation", "Qwen3-4B, AIME24, accuracy after RL with each reward", "N",
        {"supervised": 51.7, "all": 50.6, "low": 53.5, "high": 49.6, "large": 53.8, "squared": 54.5},
        doubt=AIME_DOUBT,
    ),
    "half": Figure(
        "abstract", "reasoning models on AIME", "A", says="beats prior methods with half their budget", doubt=AIME_DOUBT
    ),
    "features": Figure(
        "feature ablation", "AIME24", "N", says="attention statistics alone are worse than with key and value",
        doubt="No number is known.",
    ),
    "rl": Figure(
        "reward ablation", "Qwen3-4B, AIME24, accuracy", "N", {"supervised": 51.7, "with RL": 54.5}, doubt=AIME_DOUBT
    ),
    "sampler": Figure(
        "sampler ablation", "test accuracy", "N",
        says="drawing from the 2 W that score lowest beats both the lowest W and drawing from all",
        doubt="No number is known.",
    ),
    "throughput": Figure(
        "throughput", "Qwen3-4B, A800, 32K tokens generated, tokens/s at the largest batch", "N",
        {"full": 37.73, "4096": 193.95, "2048": 268.36, "1024": 369.43},
    ),
    "aime": Figure(
        "main results", "DeepSeek-R1-Distill-Qwen-7B, Qwen3-4B, Qwen3-1.7B; AIME24/25, mean of 32 samples", "N",
        says="about 92 % of the full cache at budget 2,048, 99 % at 4,096",
        doubt="Doubtful: the same notes have 54.5 of the full cache's 55.6 at 1,024, 98 %, and a reviewer saw more "
        "than 40 % lost there.",
    ),
}  # fmt: skip
"""arXiv 2602.03203."""

KVP = {
    "quality": Figure(
        "RULER and OASST2 plots", "Qwen2.5-7B, one compression after the prompt, by tokens kept", "P",
        says="best accuracy at most budgets and lowest perplexity of all methods that see keys and values only",
        doubt="Plots, no numbers; the text of the second version was not at hand.",
    ),
    "attention": Figure(
        "RULER and OASST2 plots", "Qwen2.5-7B, the same compression, beside TOVA and SnapKV, which see attention", "P",
        says="perplexity often below theirs", doubt="Plots, no numbers.",
    ),
    "cost": Figure(
        "reward validity", "future attention lost by budget, layer 10 head 0 of Qwen2.5-7B on OASST2", "P",
        {"top of the plot": 0.10}, says="KVP lies among the methods that see attention",
        doubt="Of one head, read off a plot.",
    ),
    "heads": Figure(
        "reward validity", "future attention lost by budget, head by head", "P",
        says="StreamingLLM is good on some heads and bad on others; KeyDiff fails on one",
    ),
    "objectives": Figure(
        "RL against supervised learning", "same network and data: soft ranks (Blondel et al. 2020), length-normalised "
        "squared error to true ranks, step sizes 5e-6, 5e-5 and 5e-4", "P",
        says="all three fail: high, unstable cost",
        doubt="Neither regression on utilities nor a pairwise loss was tried. How strongly soft ranks were regularised "
        "isn't known.",
    ),
    "transfer": Figure(
        "transfer", "KVP_R, trained on RULER, and KVP_S, trained on dialogue, on other tasks", "P",
        says="KVP_S is better on BoolQ and GovReport, KVP_R on MMLU", doubt="Plots, no numbers.",
    ),
    "length": Figure(
        "abstract of the second version", "RULER up to 128K tokens", "A",
        says="adds longer prompts and strong baselines", doubt="The text was not at hand, nor any result.",
    ),
    "overhead": Figure(
        "overhead", "Qwen2.5-7B: parameters of all 112 agents, GFLOPs per token of scoring beside the LLM's", "P",
        {"million parameters": 72.8, "scoring": 0.15, "LLM": 14.00},
        doubt="The released configuration has 0.47 M parameters per agent, not 0.65 M: a longer table of positions "
        "would explain it.",
    ),
    "latency": Figure(
        "overhead", "one layer at 10,000 tokens on a B200, beside prefill", "P", {"ms": 0.71, "prefill ms": 404.0},
    ),
}  # fmt: skip
"""arXiv 2602.10238, first version."""
