"""Prompts to token ids, by the vocabularies of CLIP and BERT.

A vocabulary is files: vocab.json and merges.txt of CLIP, vocab.txt of BERT. They lie in a folder that is given, beside
the weights, or in a folder `tokenizer` beside them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLIP_FILES = ("vocab.json", "merges.txt")
BERT_FILES = ("vocab.txt",)
ORIGINS = {
    CLIP_FILES: "huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    BERT_FILES: "huggingface.co/google-bert/bert-base-uncased",
}


class Tokenizer:
    """Token ids of prompts, of one length; the vocabulary is read for the first of them.

    Args:
        files: `CLIP_FILES` or `BERT_FILES`.
        folders: where they may be; the first that has all is taken.
        length: of all ids; longer prompts are cut and keep their end token.
        padding: the id after the end.
        size: ids that the model knows.
    """

    def __init__(self, files: tuple[str, ...], folders: Sequence[Path], *, length: int, padding: int, size: int):
        self.files, self.folders, self.length, self.padding, self.size = files, folders, length, padding, size
        self._tokenizer: Any = None

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 `(P, length)`; the mask is 1 up to and including the end token, then 0.

        Raises:
            ValueError: there is no vocabulary, with what to fetch and from where; one that is not the model's.
        """
        if self._tokenizer is None:
            self._tokenizer = self._read()
        ids = torch.full((len(prompts), self.length), self.padding)
        mask = torch.zeros_like(ids)
        for k, prompt in enumerate(prompts):
            found = self._tokenizer(prompt, truncation=True, max_length=self.length)["input_ids"]
            ids[k, : len(found)], mask[k, : len(found)] = torch.tensor(found), 1
        return ids, mask

    def _read(self) -> Any:
        folder = next((f for f in self.folders if all((f / name).is_file() for name in self.files)), None)
        names = " and ".join(self.files)
        if folder is None:
            raise ValueError(
                f"prompts need {names} of {ORIGINS[self.files]}: fetch them, and put them into "
                f"{' or '.join(map(str, self.folders)) or 'a folder that is given as tokenizer'}"
            )
        try:
            tokenizer = _clip(folder) if self.files == CLIP_FILES else _bert(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{names} in {folder} must be a vocabulary that can be read: {error}") from error
        if len(tokenizer) > self.size:
            raise ValueError(f"{names} in {folder} must have at most the model's {self.size} ids, got {len(tokenizer)}")
        return tokenizer


def _clip(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    vocabulary: Any = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def _bert(folder: Path) -> Any:
    from transformers import BertTokenizer

    lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return BertTokenizer(vocab={token: k for k, token in enumerate(lines)}, do_lower_case=True)
