"""Vision-language models of transformers as captioners."""

from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from cyclefit import UserError
from cyclefit.config.paths import NameOrPath
from cyclefit.config.ranges import Count, Share, checked
from cyclefit.models.captioner import merged
from cyclefit.models.chat import Chat, caption_prompt, encode
from cyclefit.models.pretrained import (
    freeze,
    halve,
    load_model,
    loading,
    own_precision,
    resized,
    weights_dtype,
    without_weights,
)
from cyclefit.models.quantized import load_quantized
from cyclefit.models.repository import FAMILIES, check_family, local_files
from cyclefit.models.rows import Features


@checked
class VisionLanguage(Chat):
    """A vision-language model over transformers' AutoModelForImageTextToText.

    SmolVLM, Idefics3, Qwen2.5-VL, Qwen3-VL, LLaVA, InternVL, Gemma 3, BLIP-2, PaliGemma, Florence-2. All images become
    one square without tiles ("image splitting", "pan and scan"): the prompt and the image's places in it are the same.

    Args:
        pretrained: hub id or local folder in the hub's layout.
        trainable: `lora` (on all linear layers of the language decoder), `decoder` (with its head), `all`, or None.
        prompt: text before every caption; None: a request for one sentence (chat template) or the family's task prompt.
        image_size: side of the square; None: the vision tower's training size, 448 if it accepts any.
        label_smoothing: of the training loss.
        lora_rank: rank and alpha of the adapters.
        quantization: frozen weights in 8 or 4 bits by bitsandbytes (with `lora` QLoRA, Dettmers et al., NeurIPS 2023).
        random_weights: build the architecture from the config alone, for tests and benchmarks.
        revision: branch, tag or commit on the hub.
        variant: of the weights, such as `fp16`; loaded in float32.
        gradient_checkpointing: recompute activations in the backward pass, for less memory and about a third more time.

    Raises:
        FileNotFoundError: the model is neither a local folder nor available from the hub.
        UserError: the family is not supported, or a setting does not fit it.

    """

    formats = {"transformers": ""}

    def __init__(
        self,
        pretrained: NameOrPath | str = "HuggingFaceTB/SmolVLM-256M-Instruct",
        trainable: Literal["lora", "decoder", "all"] | None = None,
        prompt: str | None = None,
        image_size: Count | None = None,
        label_smoothing: Share = 0.0,
        lora_rank: Count = 16,
        quantization: Literal["8bit", "4bit"] | None = None,
        random_weights: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor, GenerationConfig

        with loading("captioner", pretrained):
            check_family("VisionLanguage", FAMILIES["VisionLanguage"], pretrained, revision)
            files = local_files(pretrained, revision=revision)
            config = AutoConfig.from_pretrained(files)
            self.family = config.model_type
            kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
            if quantization is None or without_weights():
                self.model = load_model(kind, pretrained, "", random_weights, revision, variant)
            else:
                self.model = load_quantized(kind, pretrained, quantization, trainable in (None, "lora"), revision)
            self.processor = AutoProcessor.from_pretrained(files)
        self.pretrained = pretrained
        self.trainable = trainable
        self.tokenizer = self.processor.tokenizer
        self.label_smoothing = label_smoothing
        # The sampling settings that a model is published with would change the distribution that is sampled from.
        try:
            self.generation_config = GenerationConfig.from_pretrained(files)
        except OSError:  # there is no such file
            self.generation_config = self.model.generation_config
        for part in (self.model, self.model.get_decoder()):
            part.generation_config = GenerationConfig()
        self.vocab_size = self.model.get_output_embeddings().weight.shape[0]
        self._fix_images(image_size)
        self._fix_prompt(prompt)
        freeze(self)
        self._unfreeze(lora_rank)
        if gradient_checkpointing and trainable is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def decoder(self) -> nn.Module:
        """The layers of the language model that read the caption, without their head."""
        decoder = self.model.get_decoder()
        while (inner := decoder.get_decoder()) is not decoder:
            decoder = inner
        return decoder

    def _fix_images(self, size: int | None) -> None:
        vision, images = self.model.config.vision_config, self.processor.image_processor
        own = getattr(vision, "image_size", None)
        if self.family == "florence2":
            own = images.size["height"]
        own = own[0] if isinstance(own, (list, tuple)) else own
        self.image_size = size or own or 448
        unit = getattr(images, "patch_size", 1) * images.merge_size if hasattr(images, "merge_size") else 1
        if self.image_size % unit:
            raise UserError(
                f"captioner: image_size must be a multiple of {unit} for {self.family}, not {self.image_size}"
            )
        if own and self.image_size != own and self.family not in ("idefics3", "smolvlm"):
            raise UserError(f"captioner: image_size must be {own} for {self.pretrained}, or null, not {size}")
        for name in ("do_image_splitting", "do_pan_and_scan", "crop_to_patches", "do_center_crop"):
            if hasattr(images, name):
                setattr(images, name, False)
        side = self.image_size
        keys = {key for key in ("height", "width", "shortest_edge", "longest_edge") if images.size.get(key)}
        if "height" in keys or keys == {"shortest_edge"}:
            images.size = {"height": side, "width": side}
        elif hasattr(images, "merge_size"):
            images.size = {"shortest_edge": side * side, "longest_edge": side * side}  # of Qwen: numbers of pixels
        else:
            images.size = images.max_image_size = {"longest_edge": side}

    def _fix_prompt(self, prompt: str | None) -> None:
        # The prompt of one image; only the image's features differ between samples.
        self.prompt, self.between, after = caption_prompt(self.processor, self.family, prompt, self.pretrained)
        tokenizer, end = self.tokenizer, self.generation_config.eos_token_id
        ends = [end] if isinstance(end, int) else end or [tokenizer.eos_token_id]
        special = [(id_, tokenizer.convert_ids_to_tokens(id_)) for id_ in (*ends, *tokenizer.all_special_ids)]
        named = [id_ for id_, token in special if token and after.lstrip().startswith(token)]
        self.end_token_id = (named or ends)[0]
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_token_id
        inputs = encode(self.processor, self.prompt, self.image_size)
        ids, token = inputs["input_ids"][0], self.model.config.image_token_id
        grid = inputs.get("image_grid_thw")
        self._text_start = int((ids == token).nonzero()[-1]) + 1
        self.grid: list[int] | None = None if grid is None else grid[0].tolist()
        kinds = None
        if self.family == "paligemma":
            kinds = torch.zeros_like(ids)
        elif self.grid is not None or self.family == "gemma3":
            kinds = (ids == token).long()
        constants = {"ids": ids, "places": (ids == token).nonzero()[:, 0], "kinds": kinds}
        if hasattr(self.model.base_model, "get_rope_index"):
            longer = torch.cat([ids, ids[-1:]])[None], torch.cat([kinds, kinds.new_zeros(1)])[None]
            constants["positions"] = self.model.base_model.get_rope_index(*longer, image_grid_thw=grid)[0][:, 0]
        device = torch.get_default_device()
        for name, value in constants.items():
            self.register_buffer(name, None if value is None else value.to(device), persistent=False)
        text = self.model.config.get_text_config(decoder=True)
        decoded = 2 if self.encodes else len(ids)
        self.max_new_tokens = getattr(text, "max_position_embeddings", 512) - decoded + 1  # T5's are relative
        self.max_tokens = min(self.max_tokens, self.max_new_tokens)

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads image and prompt, and the decoder only the caption."""
        return self.model.get_decoder().config.is_encoder_decoder

    def _unfreeze(self, rank: int) -> None:
        if self.trainable == "lora":
            from peft import LoraConfig

            self.decoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
        elif self.trainable == "decoder":
            for part in (self.decoder, self.model.get_output_embeddings()):
                part.requires_grad_(True)
        elif self.trainable == "all":
            self.model.requires_grad_(True)
        if self.trainable is not None:
            (self.model if self.trainable == "all" else self.decoder).train()
            self.model.get_output_embeddings().train()

    @override
    def half_on_gpu(self) -> None:
        halve(self.model)  # rotary frequencies are buffers

    @override
    def tokenize(self, captions: list[str]) -> Int[Tensor, "b l"]:
        return super().tokenize([self.between + caption for caption in captions])

    @override
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        images = resized(images, self.image_size, self.image_size)
        inputs = self.processor.image_processor(list(images), do_rescale=False, return_tensors="pt")
        with own_precision(self.model, self.trainable != "all"):
            pixels, base = inputs["pixel_values"].to(weights_dtype(self.model)), self.model.base_model
            if self.family in ("idefics3", "smolvlm"):
                # Their `get_image_features` drops images of a uniform grey as padding.
                return Features(base.connector(base.vision_model(pixels.flatten(0, 1)).last_hidden_state))
            seen = base.get_image_features(pixels, **self._vision_arguments(len(images)), return_dict=True)
            hidden, deeper = _stacked(seen.pooler_output), getattr(seen, "deepstack_features", None)
            if self.encodes:
                ids = self.ids.expand(len(images), -1)
                encoder, embedded = self.model.get_encoder(), self._merged(ids, hidden)
                hidden = encoder(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).last_hidden_state
            return Features(hidden, deeper=deeper and torch.stack([_stacked(level) for level in deeper], 1))

    def _vision_arguments(self, count: int) -> dict[str, Tensor]:
        # What follows from the grid of patches alone, computed on the CPU: the towers would wait for the device.
        if self.grid is None:
            return {}
        from transformers import vision_utils

        vision, device = self.model.config.vision_config, self.ids.device
        with torch.device("cpu"):
            grid = torch.tensor([self.grid] * count)
            lengths = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
            merge = vision.spatial_merge_size
            moved = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
            if self.family == "qwen2_5_vl":
                index, windows = vision_utils.get_vision_window_index(
                    grid, merge, vision.window_size, vision.patch_size
                )
                lengths |= {"window_index": index, "cu_window_seqlens": windows}
            else:
                tower = self.model.base_model.visual
                moved["interp_indices"], moved["interp_weights"] = (
                    vision_utils.get_vision_interpolation_indices_and_weights(
                        grid,
                        tower.num_grid_per_side,
                        tower.interpolation_mode,
                        tower.interpolation_align_corners,
                        merge,
                    )
                )
        if device.type != "meta":  # there, attention still splits by the values of these
            moved |= lengths
        arguments = lengths | {name: value.to(device) for name, value in moved.items()}
        return {"image_grid_thw": grid} | {f"image_{name}": value for name, value in arguments.items()}

    def _merged(self, ids: Int[Tensor, "b l"], hidden: Float[Tensor, "b p d"]) -> Float[Tensor, "b l d"]:
        # The image's id may be none of the table's.
        table = self.model.get_input_embeddings()
        embedded = table(ids.index_fill(1, self.places, 0))
        return embedded.index_copy(1, self.places, hidden.to(embedded.dtype))

    @property
    def begin(self) -> Int[Tensor, "n"]:
        """The tokens before a caption in the decoder of an encoder-decoder: the start token, and the forced one."""
        given = self.generation_config
        start = given.decoder_start_token_id
        if start is None:
            start = self.model.config.get_text_config(decoder=True).decoder_start_token_id
        ids = [start] if given.forced_bos_token_id is None else [start, given.forced_bos_token_id]
        return torch.tensor(ids, device=self.ids.device)

    @override
    def states(self, features: Features, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return self.states_after(self.begin if self.encodes else self.ids, features, tokens)

    @override
    def states_after(
        self,
        before: Int[Tensor, "n"],
        features: Features,
        tokens: Int[Tensor, "b l"],
        asked: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        with own_precision(self.model, self.trainable is None):
            ids = torch.cat([before.expand(len(tokens), -1), tokens[:, :-1]], 1)
            mask = torch.ones_like(ids)
            if self.encodes:
                seen = features.hidden.to(weights_dtype(self.decoder))
                inputs = {"input_ids": ids, "encoder_hidden_states": seen}
            else:
                inputs = {"inputs_embeds": self._merged(ids, features.hidden)}
                inputs |= self._positions(ids.shape) | self._deeper(features, ids.shape)
                mask = self._causal(inputs["inputs_embeds"], mask, asked)
            states = self.decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return states[:, len(before) - 1 :]

    def _positions(self, shape: torch.Size) -> dict[str, Tensor]:
        count, length = shape
        if self.family == "paligemma":  # counts from 1
            return {"position_ids": torch.arange(1, length + 1, device=self.ids.device).expand(count, -1)}
        if not hasattr(self, "positions"):
            return {}
        # Three axes: after the prompt they run on together.
        after = self.positions[:, -1:] + torch.arange(1, max(1, length - len(self.ids)), device=self.ids.device)
        return {"position_ids": torch.cat([self.positions, after], 1)[:, None, :length].expand(-1, count, -1)}

    def _deeper(self, features: Features, shape: torch.Size) -> dict[str, Tensor | list[Tensor]]:
        if features.deeper is None:
            return {}
        # Everywhere, and zero beside the image: no position is looked up by value.
        levels = features.deeper.new_zeros(*features.deeper.shape[:2], shape[1], features.deeper.shape[-1])
        levels = levels.index_copy(2, self.places, features.deeper)
        everywhere = torch.ones(shape, dtype=torch.bool, device=self.ids.device)
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [x.flatten(0, 1) for x in levels.unbind(1)]}

    def _causal(self, embedded: Float[Tensor, "b l d"], mask: Int[Tensor, "b l"], asked: Int[Tensor, "b"] | None):
        # PaliGemma's prompt and Gemma 3's image are read in both directions; what follows them is not.
        if self.family == "paligemma":
            ends = len(self.ids) if asked is None else asked[:, None]
            kinds = (torch.arange(mask.shape[1], device=mask.device) >= ends).long().expand(len(mask), -1)
        elif self.family == "gemma3":
            kinds = F.pad(self.kinds, (0, mask.shape[1] - len(self.kinds))).expand(len(mask), -1)
        else:
            return mask
        return self.model.create_masks_for_generate(
            self.model.config, embedded, mask, None, self._positions(mask.shape).get("position_ids"), kinds
        )

    @override
    def head(self, states: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape v"]:
        head = self.model.get_output_embeddings()
        with own_precision(self.model, self.trainable is None):
            logits = head(states.to(head.weight.dtype) if self.trainable is None else states)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    @override
    def generate_tokens(self, features: Features, **settings) -> Int[Tensor, "b l"]:
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

        count = len(features)
        before = (self.begin if self.encodes else self.ids).repeat(count, 1)
        if self.encodes:
            settings |= {"decoder_input_ids": before, "decoder_start_token_id": int(before[0, 0])}
            settings["encoder_outputs"] = BaseModelOutput(features.hidden.to(weights_dtype(self.decoder)))
            settings["attention_mask"] = torch.ones(features.hidden.shape[:2], dtype=torch.long, device=before.device)
            model = self.model.language_model if self.family == "blip-2" else self.model
            return model.generate(**settings)[:, before.shape[1] :]
        mask = torch.ones_like(before)
        if self.family == "blip-2":  # its own `generate` would see the image again
            embedded = self._merged(before, features.hidden)
            return self.model.language_model.generate(inputs_embeds=embedded, attention_mask=mask, **settings)
        seen = BaseModelOutputWithPooling(pooler_output=features.hidden)
        if self.family not in ("paligemma", "gemma3", "internvl"):
            seen.pooler_output = list(features.hidden)
        if features.deeper is not None:
            seen["deepstack_features"] = [list(level) for level in features.deeper.unbind(1)]
        if self.grid is not None:
            settings["image_grid_thw"] = torch.tensor([self.grid] * count, device=before.device)
        if self.kinds is not None:
            settings["mm_token_type_ids" if self.grid else "token_type_ids"] = self.kinds.repeat(count, 1)
        try:
            tokens = self.model.generate(
                input_ids=before, attention_mask=mask, mm_encoder_outputs={"image": seen}, **settings
            )
        finally:
            if hasattr(self.model.base_model, "rope_deltas"):
                self.model.base_model.rope_deltas = None
        return tokens[:, before.shape[1] :]

    @override
    def export(self, form: str, path: Path) -> str:
        """A folder for `AutoModelForImageTextToText`, adapters merged, with the processor."""
        if getattr(self.model, "is_quantized", False):
            raise UserError("weights in 8 or 4 bits are not exported: load the run with quantization null first")
        merged(self.model)
        with patch.object(self.model, "generation_config", self.generation_config):
            self.model.save_pretrained(path)
        self.processor.save_pretrained(path)
        cut = "" if self.encodes or self.family == "blip-2" else "[inputs.input_ids.shape[1]:]"
        return (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            f"processor = AutoProcessor.from_pretrained({str(path)!r})\n"
            f"model = AutoModelForImageTextToText.from_pretrained({str(path)!r})\n"
            f"inputs = processor(images=image.resize(({self.image_size}, {self.image_size})), text={self.prompt!r}, "
            "return_tensors='pt')\n"
            f"tokens = model.generate(**inputs, max_new_tokens=30)[0]{cut}\n"
            "caption = processor.decode(tokens, skip_special_tokens=True).strip()"
        )


def _stacked(parts: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Float[Tensor, "b p d"]:
    return parts if isinstance(parts, Tensor) else torch.stack(list(parts))
