"""The vocabulary of the embedded models: each of the world's words a token, all else by letters."""

from __future__ import annotations

import json
import random
from pathlib import Path

from sdcore.embedded import world

LENGTH = 40  # tokens of a prompt; the longest of 20,000 captions take 38
START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path) -> None:
    """Writes a CLIPTokenizer's files, from which Diffusers and Transformers load it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = learned(captions())
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def captions() -> list[str]:
    """Enough of them to have all the world's words many times over."""
    rng = random.Random(0)
    styles = ("plain", "plain", "ink")
    some = (world.scene(rng, style=rng.choice(styles)) for _ in range(20000))
    return [world.caption(one, rng) for one in some]


def learned(texts: list[str]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of byte pairs, until each word of the texts is one token.

    Any byte has a token too, within a word and at its end, so that nothing is unknown.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [first + second for first, second in pairs]
    tokens = list(dict.fromkeys([*tokens, START, END]))
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in pairs]
