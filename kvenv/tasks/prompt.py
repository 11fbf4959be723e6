"""From the text of a prompt to its tokens."""

from __future__ import annotations

from typing import Any

_HERE = "\u241e"
"""Stands for the place between context and question while a chat template is filled in."""

_WITHOUT = "leave the template out (chat=False, --no-chat)"


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
        """Return the ids of a prompt, encoded as a whole, in two parts.

        Parameters
        ----------
        context : str
            What the user says first.
        question : str
            What the user says then; a token that is part of both belongs to it.
        answer : str
            How the model's answer is made to begin.
        thinking : bool
            What templates that know ``enable_thinking`` are told.

        Raises
        ------
        ValueError
            If the chat template can't be filled in.
        """
        if not self.chat:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            first, second = self._split(context, question + answer)
            return (() if bos is None else (int(bos),)) + first, second
        before, after = self._filled(context, question, thinking)
        return self._split(before, after + answer)

    def _filled(self, context: str, question: str, thinking: bool) -> tuple[str, str]:
        """Return the chat template's text before and after the place between context and question."""
        here = _HERE
        while here in context + question:
            here += _HERE
        message = {"role": "user", "content": f"{context}{here}{question}"}
        try:
            text: str = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the tokenizer's chat template refuses a user's message ({error}): {_WITHOUT}") from error
        if text.count(here) != 1:
            times = text.count(here)
            raise ValueError(f"the tokenizer's chat template shows a user's message {times} times: {_WITHOUT}")
        before, after = text.split(here)
        return before, after

    def _split(self, first: str, second: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of two texts that follow each other, as they are encoded together.

        Encoded apart where the tokenizer doesn't tell which characters a token is of.
        """
        if not getattr(self.tokenizer, "is_fast", False) or not first or not second:
            return self.encode(first), self.encode(second)
        encoded = self.tokenizer(first + second, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = tuple(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        cut = next((place for place, end in enumerate(ends) if end > len(first)), len(ids))
        return ids[:cut], ids[cut:]
