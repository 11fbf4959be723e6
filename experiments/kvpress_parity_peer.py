"""kvpress's side of ``kvpress_parity``, run by the Python of an environment of its own: a line in, a line out.

``python kvpress_parity_peer.py MODEL_DIRECTORY``, then lines of JSON with ``prompt``, ``policy``, ``ratio``, ``new``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

# Last, so that this environment's packages stay what they are.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import agents
from agents.kvpress_press import KVEnvPress


class Watched(KVEnvPress):
    """A press that tells which positions it kept, found by the keys that are left.

    Attributes
    ----------
    kept : list of Tensor (H, B)
        By layer, in order.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept: list[Tensor] = []

    def compress(self, module: Any, hidden_states: Tensor, keys: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Compress, and look for what is left among what was there."""
        left, values = super().compress(module, hidden_states, keys, *others)
        same = (left[0, :, :, None] == keys[0, :, None]).all(dim=-1)
        self.kept.append(same.int().argmax(dim=-1).sort().values)
        return left, values


@torch.no_grad()
def answer(model: Any, prompt: Tensor, policy: str, ratio: float, new: int) -> dict[str, Any]:
    """Return what is kept of a prompt (1, P), and the tokens that follow greedily, fed as kvpress's pipeline does."""
    press, cache, length = Watched(agents.make(policy), ratio), DynamicCache(), prompt.shape[1]
    with press(model):
        logits = model(prompt, past_key_values=cache).logits
    tokens = [logits[:, -1:].argmax(dim=-1)]
    for position in range(length, length + new - 1):
        place = torch.tensor([[position]])
        tokens.append(model(tokens[-1], past_key_values=cache, position_ids=place).logits[:, -1:].argmax(dim=-1))
    return {"kept": torch.stack(press.kept).tolist(), "tokens": torch.cat(tokens, dim=1)[0].tolist()}


def main() -> None:
    """Answer until the questions end."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], use_safetensors=True).eval()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(model, torch.tensor(asked.pop("prompt")), **asked)), flush=True)


if __name__ == "__main__":
    main()
