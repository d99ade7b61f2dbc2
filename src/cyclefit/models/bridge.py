"""The vocabulary bridge: a captioner's token distributions as input embeddings of a generator's text encoder.

`python -m cyclefit.models.bridge --captioner FOLDER_OR_HUB_ID --generator FOLDER_OR_HUB_ID` counts its rows by kind.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cyclefit import UserError
from cyclefit.config.paths import packaged
from cyclefit.config.start import run
from cyclefit.models.pretrained import loading
from cyclefit.models.repository import local_files, repository
from cyclefit.models.rows import SoftTexts
from cyclefit.models.towers import Framed, TextTower
from cyclefit.models.vocabulary import KINDS, Surfaces, match_vocabularies

__all__ = ["Bridge", "Framed", "TextTower"]


def align(targets: Int[Tensor, "b n 2"], sources: Int[Tensor, "b l 2"]) -> Float[Tensor, "b n l"]:
    """Weights that average, for each target, the sources whose characters it shares.

    `w_ij = [i and j overlap] / (number of sources that overlap i)`, from half-open spans [start, end); a
    target that overlaps none, such as an empty span, gets zeros.
    """
    starts = torch.maximum(targets[:, :, None, 0], sources[:, None, :, 0])
    ends = torch.minimum(targets[:, :, None, 1], sources[:, None, :, 1])
    overlap = (starts < ends).float()
    return overlap / overlap.sum(-1, keepdim=True).clamp(min=1)


class Bridge(nn.Module):
    """Embeds a captioner's distributions over its own vocabulary for text encoders.

    For each tower, row k of its matrix M is the mean of the tower's embeddings of the ids of captioner token k, and
    zero where it has none: such a token's probability contributes nothing; the command of this module counts them.
    Shapes: n is the length of the tower's input (77 for Stable Diffusion), l the positions of the captioner, without
    begin token and prompt; `lengths` counts the tokens before the end token; later positions have no influence.
    No parameters, and nothing in the state dict.
    """

    def __init__(self, captioner_tokenizer, towers: Sequence[TextTower], vocab_size: int | None = None):
        """Builds every M once; `vocab_size` is the width of the captioner's logits if its tokenizer is smaller.

        Raises:
            UserError: as `match_vocabularies`, and if a tower's embedding has fewer rows than its tokenizer has tokens.

        """
        super().__init__()
        self.surfaces = Surfaces(captioner_tokenizer, vocab_size)
        self.towers = nn.ModuleList(_Crossing(self.surfaces, tower) for tower in towers)

    def soft(self, probabilities: Float[Tensor, "b l v"], lengths: Int[Tensor, "b"]) -> tuple[SoftTexts, ...]:
        """For each tower BOS, e_1 .. e_L, EOS and padding, with `e_l = pi_l^T M` (arXiv 2212.12249).

        Gradient flows to the positions that fit into the tower's input; longer captions are truncated there.

        Raises:
            UserError: as `check_soft`.

        """
        self.check_soft()
        return tuple(tower.soft(probabilities, lengths) for tower in self.towers)

    def check_soft(self) -> None:
        """Raises UserError if a tower cannot read a sequence of mixtures, because it reads captions in a template."""
        for tower in self.towers:
            if not tower.reads_soft:
                raise UserError(
                    "soft captions need text encoders that read a caption alone, padded behind it to one length, as "
                    f"CLIP and T5 do; the one with {type(tower.tokenizer).__name__} does not: set form to "
                    "straight-through"
                )

    def straight_through(
        self, token_ids: Int[Tensor, "b l"], probabilities: Float[Tensor, "b l v"], lengths: Int[Tensor, "b"]
    ) -> tuple[SoftTexts, ...]:
        """For each tower the embeddings of the decoded caption's tokens, with the gradient of the soft ones.

        `h_i + s_i - stop_gradient(s_i)`: h_i embeds the i-th token of the tower's input for the caption's text; s_i is
        the mean of the e_l whose characters it shares. Tokens outside the caption carry no gradient.
        """
        texts, spans = self._read(token_ids, lengths)
        return tuple(tower.straight_through(texts, spans, probabilities) for tower in self.towers)

    def _read(self, token_ids: Int[Tensor, "b l"], lengths: Int[Tensor, "b"]) -> tuple[list[str], Int[Tensor, "b l 2"]]:
        """The captions, and the characters [start, end) of each token in them, empty for special tokens."""
        texts, spans = [], torch.zeros(*token_ids.shape, 2, dtype=torch.long)
        for row, (ids, length) in enumerate(zip(token_ids.tolist(), lengths.tolist(), strict=True)):
            text, places = self.surfaces.read(ids[:length])
            texts.append(text)
            spans[row, : len(places)] = torch.tensor(places, dtype=torch.long).view(-1, 2)
        return texts, spans


class _Crossing(nn.Module):
    """The bridge to one tower."""

    matrix: Float[Tensor, "v_captioner d"]
    """M, float32, without gradient."""
    embedding: Float[Tensor, "v_tower d"]
    """The tower's token embedding, float32, without gradient."""

    def __init__(self, surfaces: Surfaces, tower: TextTower):
        super().__init__()
        if len(tower.embedding) < len(tower.tokenizer):
            raise UserError(
                f"The generator's token embedding has {len(tower.embedding)} rows and its tokenizer "
                f"{len(tower.tokenizer)} tokens: take both from the same generator."
            )
        self.frame, self.tokenizer = tower.frame, tower.tokenizer
        self.vocabulary = match_vocabularies(surfaces, tower.tokenizer)
        self._frame_soft(tower)

        embedding = tower.embedding.detach().float()
        sizes = torch.tensor([0, *map(len, self.vocabulary.ids)], device=embedding.device)
        ids = torch.tensor([i for row in self.vocabulary.ids for i in row], device=embedding.device)
        matrix = F.embedding_bag(ids, embedding, sizes.cumsum(0)[:-1], mode="mean")  # zero for an empty row
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("matrix", matrix, persistent=False)

    def _frame_soft(self, tower: TextTower) -> None:
        """Finds where a caption starts in the tower's input, how many tokens fit into it, and what follows it."""
        empty, full = tower.frame([""]), tower.frame(["a " * 5000])
        places = (full.offsets[0, :, 0] < full.offsets[0, :, 1]).nonzero()[:, 0].tolist()
        self.start, self.room = min(places, default=0), len(places)
        special = {*tower.tokenizer.all_special_ids, tower.tokenizer.pad_token_id}
        alone = bool(places) and set(empty.ids[0].tolist()) <= special
        same = empty.ids.shape == full.ids.shape and torch.equal(empty.ids[0, : self.start], full.ids[0, : self.start])
        self.reads_soft = alone and same
        self.ordinary = int(full.ids[0, self.start])
        device = tower.embedding.device
        self.register_buffer("empty", empty.ids[0].to(device), persistent=False)
        self.register_buffer("empty_mask", None if empty.mask is None else empty.mask[0].to(device), persistent=False)

    def soft(self, probabilities: Float[Tensor, "b l v"], lengths: Int[Tensor, "b"]) -> SoftTexts:
        """See Bridge."""
        mixed = self._mix(probabilities[:, : self.room])
        lengths = lengths.to(mixed.device).clamp(max=mixed.shape[1])[:, None]
        position, start = torch.arange(len(self.empty), device=mixed.device), self.start
        inside = (position >= start) & (position < start + lengths)
        # The caption is followed by the same tokens as an empty one.
        place = torch.where(position < start, position, (position - lengths).clamp(min=0))
        ids = self.empty[place]
        mixed = F.pad(mixed, (0, 0, start, len(position) - start - mixed.shape[1]))
        embeddings = torch.where(inside[..., None], mixed, self.embedding[ids])
        mask = None if self.empty_mask is None else self.empty_mask[place].masked_fill(inside, 1)
        return SoftTexts(embeddings, ids.masked_fill(inside, self.ordinary), mask)

    def straight_through(
        self, texts: list[str], spans: Int[Tensor, "b l 2"], probabilities: Float[Tensor, "b l v"]
    ) -> SoftTexts:
        """See Bridge."""
        mixed = self._mix(probabilities)
        framed = self.frame(texts)
        soft, ids = align(framed.offsets, spans).to(mixed) @ mixed, framed.ids.to(mixed.device)
        mask = None if framed.mask is None else framed.mask.to(mixed.device)
        return SoftTexts(self.embedding[ids] + (soft - soft.detach()), ids, mask)

    def _mix(self, probabilities: Float[Tensor, "b l v"]) -> Float[Tensor, "b l d"]:
        return probabilities.to(self.matrix.dtype) @ self.matrix


def load_tokenizers(name: str) -> dict[str, object]:
    """The tokenizers of a local folder or hub id, by folder: those of a pipeline's text encoders, or its own, by "".

    Raises:
        MissingModel: there is none.

    """
    from transformers import AutoTokenizer

    with loading("tokenizer", name):
        files = [file.split("/") for file in repository(name).files]
        inner = sorted({path[0] for path in files if len(path) > 1 and path[0].startswith("tokenizer")}) or [""]
        found = {part: AutoTokenizer.from_pretrained(local_files(name, part)) for part in inner}
        for tokenizer in found.values():
            # transformers makes a tokenizer of special tokens alone from a folder without vocabulary files.
            if len(tokenizer) == len(tokenizer.all_special_tokens):
                raise FileNotFoundError(f"there is no vocabulary in {name}")
    return found


def main(arguments: list[str]) -> int:
    """Prints how many of a captioner's tokens have a counterpart in each of a generator's vocabularies, by kind."""
    parser = argparse.ArgumentParser(prog="cyclefit bridge", description=main.__doc__)
    parser.add_argument("--captioner", type=packaged, required=True, help="hub id or folder with a tokenizer")
    parser.add_argument("--generator", type=packaged, required=True, help="hub id or folder of a pipeline or tokenizer")
    parser.add_argument("--vocab_size", type=int, help="width of the captioner's logits, if its tokenizer has fewer")
    parser.add_argument("--list", choices=KINDS, metavar="KIND", help=f"also list the rows of {', '.join(KINDS)}")
    options = parser.parse_args(arguments)
    captioner, *_ = load_tokenizers(options.captioner).values()
    towers, surfaces = load_tokenizers(options.generator), Surfaces(captioner, options.vocab_size)
    for name, tokenizer in towers.items():
        if len(towers) > 1:
            print(f"{name}, {type(tokenizer).__name__}:")
        vocabulary = match_vocabularies(surfaces, tokenizer)
        for kind, count in vocabulary.counts().items():
            print(f"{kind:<14}{count:>7}{count / len(vocabulary.tokens):>9.2%}")
        print(f"{'all':<14}{len(vocabulary.tokens):>7}")
        for row in np.flatnonzero(vocabulary.kinds == options.list) if options.list else ():
            print(row, vocabulary.tokens[row], *tokenizer.convert_ids_to_tokens(vocabulary.ids[row]))
    return 0


if __name__ == "__main__":
    run(main)
