"""ClipCap: CLIP's embedding of an image as a prefix of GPT-2."""

import json
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.paths import NameOrPath
from cyclefit.config.ranges import Count, Share, checked
from cyclefit.models.captioner import LargeVocabulary
from cyclefit.models.pretrained import (
    freeze,
    halve,
    load_model,
    loading,
    own_precision,
    weights_dtype,
    without_weights,
)
from cyclefit.models.repository import local_files
from cyclefit.models.rows import Features
from cyclefit.models.scorer import OpenClip

SHAPE = ("mapper", "prefix_length", "mapper_layers", "mapper_heads")
"""Settings that the shape of a mapper's weights depends on."""


@checked
class ClipCap(LargeVocabulary):
    """ClipCap (Mokady et al., arXiv 2111.09734): c = m(CLIP(x)), p(y | x) = GPT-2(c_1 .. c_k, y).

    The mapper m turns the image embedding of a frozen CLIP, not normalised, into k vectors, the prefix of the caption
    in the language model. As in the paper, either the mapper alone is trained (a transformer), or GPT-2 too (an MLP).

    Args:
        pretrained: a folder that `export` wrote: mapper, and GPT-2 where it was trained; None starts a new mapper.
        language_model: GPT-2 or another causal model of transformers: hub id or local folder.
        clip: an open_clip model name, or a local folder as `OpenClip` takes.
        clip_weights: an open_clip tag; not used for a local folder.
        mapper: `mlp`, two layers with tanh between; `transformer` over k projections of the embedding and k learned
            vectors, whose outputs are the prefix.
        prefix_length: k.
        mapper_layers: of the transformer.
        mapper_heads: of the transformer.
        trainable: `mapper`, or `mapper and decoder`; None freezes everything.
        label_smoothing: of the training loss.
        random_weights: build the language model from its config alone, for tests and benchmarks.

    Raises:
        FileNotFoundError: a model is neither a local folder nor available from its hub.
        UserError: the folder's mapper has another shape than in the settings.

    """

    formats = {"clipcap": ""}

    def __init__(
        self,
        pretrained: NameOrPath | str | None = None,
        language_model: NameOrPath | str = "openai-community/gpt2",
        clip: NameOrPath | str = "ViT-B-32-quickgelu",
        clip_weights: str | None = "openai",
        mapper: Literal["mlp", "transformer"] = "mlp",
        prefix_length: Count = 10,
        mapper_layers: Count = 8,
        mapper_heads: Count = 8,
        trainable: Literal["mapper", "mapper and decoder"] | None = None,
        label_smoothing: Share = 0.0,
        random_weights: bool = False,
    ):
        super().__init__()
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

        self.shape = dict(zip(SHAPE, (mapper, prefix_length, mapper_layers, mapper_heads), strict=True))
        weights = {}
        if pretrained is not None and not without_weights():
            weights = self._read(Path(pretrained))
            if (Path(pretrained) / "config.json").exists():
                language_model = str(pretrained)  # GPT-2 was trained with the mapper
        with loading("captioner's language model", language_model):
            files = local_files(language_model)
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(files))]
            self.model = load_model(kind, language_model, random_weights=random_weights)
            self.tokenizer = AutoTokenizer.from_pretrained(files)
        self.clip = OpenClip(clip, clip_weights)
        self.named = {"language_model": str(language_model), "clip": str(clip), "clip_weights": clip_weights}
        # GPT-2 has no other special token.
        self.end_token_id = self.pad_token_id = self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig()
        self.label_smoothing = label_smoothing
        self.prefix_length = prefix_length
        table = self.model.get_input_embeddings()
        self.vocab_size, width = table.weight.shape
        seen = self.clip.model.visual.output_dim
        if mapper == "mlp":
            inner = (width * prefix_length) // 2
            last = nn.Linear(inner, width * prefix_length), nn.Unflatten(-1, (prefix_length, width))
            self.mapper = nn.Sequential(nn.Linear(seen, inner), nn.Tanh(), *last)
        else:
            self.mapper = PrefixTransformer(seen, width, prefix_length, mapper_layers, mapper_heads)
        if weights:
            self.mapper.load_state_dict(weights)
        self.max_new_tokens = self.model.config.max_position_embeddings - prefix_length + 1
        self.max_tokens = min(self.max_tokens, self.max_new_tokens)
        self.trainable = trainable
        freeze(self)
        for part in {None: [], "mapper": [self.mapper]}.get(trainable, [self.mapper, self.model]):
            part.train().requires_grad_(True)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        path = folder / "mapper.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} is no ClipCap: there is no {path.name}, which `cyclefit.export` writes")
        written = json.loads((folder / "clipcap.json").read_text())
        if odd := [f"{name} {written.get(name)}" for name, value in self.shape.items() if written.get(name) != value]:
            raise UserError(f"{folder} has a mapper with {', '.join(odd)}: set model.captioner to it")
        return load_file(path)

    @override
    def half_on_gpu(self) -> None:
        self.clip.half_on_gpu()
        halve(self.model)

    @override
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        return Features(self.clip.embed_images(images, normalize=False)[:, None])

    def _prefix(self, features: Features) -> Float[Tensor, "b k d"]:
        # Mapped here and not in `embed`: detached features must not detach the mapper, which is part of the decoder.
        seen = features.hidden[:, 0].to(weights_dtype(self.mapper))
        return self.mapper(seen)

    @override
    def states(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        with own_precision(self.model, self.trainable is None):
            prefix, table = self._prefix(features), self.model.get_input_embeddings()
            inputs = torch.cat([prefix.to(table.weight.dtype), table(tokens[:, :-1])], 1)
            mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            decoder = self.model.get_decoder()
            states = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return states[:, self.prefix_length - 1 :]

    @override
    def head(self, states: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape v"]:
        with own_precision(self.model, self.trainable is None):
            return self.model.get_output_embeddings()(states)

    @override
    def generate_tokens(self, features: Features, **settings) -> Int[Tensor, "b l"]:
        prefix = self._prefix(features).to(weights_dtype(self.model))
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        return self.model.generate(inputs_embeds=prefix, attention_mask=mask, **settings)

    @override
    def export(self, form: str, path: Path) -> str:
        """A folder for `pretrained`: the mapper, and the language model where it was trained."""
        path.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.mapper.state_dict().items()}, path / "mapper.safetensors"
        )
        (path / "clipcap.json").write_text(json.dumps(self.shape, indent=2))
        if self.trainable == "mapper and decoder":
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        settings = "".join(f", {name}={value!r}" for name, value in (self.named | self.shape).items())
        return (
            "from torchvision.transforms.functional import to_tensor\n"
            "from cyclefit.models import ClipCap, Decoding\n"
            f"captioner = ClipCap({str(path)!r}{settings})\n"
            "caption = captioner.sample(to_tensor(image)[None], Decoding(), seeds=[0])[0][0]"
        )


class PrefixTransformer(nn.Module):
    """m(x): a pre-norm transformer over k projections of x and k learned vectors; the outputs of the latter."""

    def __init__(self, seen: int, width: int, length: int, layers: int, heads: int):
        super().__init__()
        self.project = nn.Linear(seen, length * width)
        self.learned = nn.Parameter(torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="relu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, seen: Float[Tensor, "b d"]) -> Float[Tensor, "b k w"]:
        """The prefix of images."""
        projected = self.project(seen).unflatten(-1, self.learned.shape)
        joined = torch.cat([projected, self.learned.expand(len(seen), -1, -1)], 1)
        return self.layers(joined)[:, len(self.learned) :]
