"""kvpress's side of the section ``generate``, run by the Python of an environment of its own: a line in, a line out.

``python kvpress_peer.py MODEL_DIRECTORY DEVICE``, then lines of JSON with ``rows``, ``new``, ``budget``, ``interval``.
"""

from __future__ import annotations

import json
import sys

import torch
from kvpress import DecodingPress, KnormPress
from transformers import AutoModelForCausalLM
from transformers.utils import logging

NEVER_SAID = 10**6


def main() -> None:
    """Generate as often as asked; the cheapest of the presses decides what goes."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=sys.argv[2], use_safetensors=True).eval()
    for line in sys.stdin:
        asked = json.loads(line)
        prompt = torch.tensor(asked["prompt"], device=model.device)
        press = DecodingPress(
            base_press=KnormPress(),
            compression_interval=asked["interval"],
            target_size=asked["budget"],
            hidden_states_buffer_size=0,
        )
        with torch.no_grad(), press(model):
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=asked["new"],
                do_sample=False,
                eos_token_id=NEVER_SAID,
                pad_token_id=0,
            )
        print(json.dumps({"tokens": out.shape[1] - prompt.shape[1]}), flush=True)


if __name__ == "__main__":
    main()
