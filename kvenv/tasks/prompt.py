"""From the text of a prompt to its tokens."""

from __future__ import annotations

from typing import Any

_HERE = "\u241e"
"""Stands for the place between context and question while a chat template is filled in: no text has it."""


class Framer:
    """Encodes prompts, in the tokenizer's chat template if it has one.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The LLM's.
    chat : bool
        Whether a chat template is used; without one, a prompt begins with the BOS token, if there is one.
    """

    def __init__(self, tokenizer: Any, chat: bool = True) -> None:
        self.tokenizer = tokenizer
        self.chat = chat and getattr(tokenizer, "chat_template", None) is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, without special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def frame(
        self, context: str, question: str, answer: str = "", *, thinking: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of a prompt in two parts, encoded each for itself.

        Parameters
        ----------
        context : str
            What the user says first.
        question : str
            What the user says then; white space between the two belongs to it.
        answer : str
            How the model's answer is made to begin.
        thinking : bool
            What templates that know ``enable_thinking`` are told.
        """
        if not self.chat:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            start = () if bos is None else (int(bos),)
            return start + self.encode(context), self.encode(question + answer)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{context}{_HERE}{question}"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        before, after = text.split(_HERE)
        return self.encode(before), self.encode(after + answer)
