"""A tokenizer for models with random weights, so that the commands that take text run on them too."""

from __future__ import annotations

import json
from pathlib import Path

from torch_nvfp4.checkpoint.writer import write_json

__all__ = ["chat_tokens", "plain_words", "write_tokenizer"]

# The first three are the models' bos, eos and pad; the markers are those of Qwen3's chats, which transformers' server
# looks for.
_WORDS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant")
_CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_AROUND = 5  # tokens of a chat with one message of the user's beside those of the message


def plain_words(vocab: int) -> int:
    """How many words (w0, w1, ...) are no special token."""
    return vocab - len(_WORDS)


def chat_tokens(message: str) -> int:
    """Tokens of the prompt that the template makes of one message of the user's."""
    return len(message.split()) + _AROUND


def write_tokenizer(path: Path, vocab: int) -> None:
    """Writes a tokenizer with one word per token (w0, w1, ...) and a chat template beside a model."""
    words = [*_WORDS, *(f"w{number}" for number in range(plain_words(vocab)))]
    model = {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)}, "unk_token": "<pad>"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>", "chat_template": _CHAT,
    }  # fmt: skip
    write_json(path / "tokenizer_config.json", settings)
