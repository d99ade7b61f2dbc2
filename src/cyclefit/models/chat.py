"""What vision-language models are asked, as text and as the token ids of their own processors."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from cyclefit import UserError
from cyclefit.models.captioner import LargeVocabulary
from cyclefit.models.rows import Features

TASKS = MappingProxyType({"blip-2": "", "paligemma": "caption en", "florence2": "<CAPTION>"})
"""The prompts of families without a chat template, by `model_type`."""

REQUEST = "Describe the image in one sentence."
"""The prompt of models with a chat template."""

QUESTIONS = MappingProxyType({"blip-2": "Question: {} Answer:", "paligemma": "answer en {}"})
"""How families without a chat template are asked a question, by `model_type`, as published."""

ANSWER = "answer"


def caption_prompt(processor, family: str, prompt: str | None, pretrained: str) -> tuple[str, str, str]:
    """The text before a caption, the white space between the two, and the text after the caption.

    Raises:
        UserError: the model has no prompt of its own, and none is given.

    """
    before, after = TASKS.get(family) if prompt is None else prompt, ""
    if processor.chat_template:
        turn = _turn("user", REQUEST if prompt is None else prompt)
        before = processor.apply_chat_template([turn], add_generation_prompt=True)
        whole = processor.apply_chat_template([turn, _turn("assistant", ANSWER)])
        # Text between the prompt and an answer belongs to the caption's first token; text after it ends it.
        between, _, after = whole.removeprefix(before).partition(ANSWER)
    elif before is None:
        raise UserError(f"captioner: {pretrained} has no chat template: set model.captioner.prompt")
    else:
        between = " " if before and not before[-1].isspace() and family == "blip-2" else ""
        mark = getattr(processor, "image_token", "")
        if family in ("llava", "internvl") and mark not in before:
            before = mark + before
    return before, between if between.isspace() else "", after


def _turn(role: str, text: str) -> dict:
    image = [{"type": "image"}] if role == "user" else []
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}


def encode(processor, text: str, side: int) -> Mapping[str, Tensor]:
    """The inputs that the processor makes of a text and one square image, on the CPU."""
    with torch.device("cpu"):
        image = torch.full((3, side, side), 0.25)
        return processor(images=image, text=text, do_rescale=False, return_tensors="pt")


class Chat(LargeVocabulary):
    """A captioner over a processor of transformers, which can also be asked questions about an image.

    The image is at the same places of every chat, and the text before it is the same: after them, a row's question and
    answer are read as its caption is, padded on the right.
    """

    processor: object
    family: str
    pretrained: str
    image_size: int
    between: str
    """The white space before an answer in the chat template."""
    ids: Int[Tensor, "n"]
    """The prompt of captions, the image included."""
    _text_start: int
    """The place after the image, in every chat."""
    encodes: bool
    """Whether an encoder reads image and prompt, and the decoder only the caption."""

    @abstractmethod
    def states_after(
        self,
        before: Int[Tensor, "n"],
        features: Features,
        tokens: Int[Tensor, "b l"],
        asked: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """`states` of tokens after `before`; `asked` is the length of each row's question, `before` included."""

    @override
    def check_questions(self, who: str) -> None:
        if self.encodes or not (self.processor.chat_template or self.family in QUESTIONS):
            raise UserError(
                f"{who}: {self.pretrained} ({self.family}) answers no questions: use a model with a chat template"
            )

    @override
    def answer_log_probs(self, features: Features, questions: list[str], answers: list[str]) -> Float[Tensor, "b"]:
        self.check_questions("answer_log_probs")
        rows = {row: self._encode_question(*row) for row in zip(questions, answers, strict=True)}
        chats = [rows[row] for row in zip(questions, answers, strict=True)]
        states, tokens, mask = self._answer_states(features, *map(list, zip(*chats, strict=True)))
        return -(self._losses(states, tokens) * mask).sum(1)

    @override
    def first_token_log_probs(
        self, features: Features, questions: list[str], words: list[list[str]]
    ) -> Float[Tensor, "b"]:
        self.check_questions("first_token_log_probs")
        rows = {question: self._encode_question(question)[0] for question in questions}
        unknown = torch.tensor([self.pad_token_id], device="cpu")  # what is predicted is not read
        states, _, _ = self._answer_states(features, [rows[q] for q in questions], [unknown] * len(questions))
        found = [[ids[0] for ids in self.tokenizer(row, add_special_tokens=False).input_ids] for row in words]
        wanted = torch.zeros(len(questions), self.vocab_size, dtype=torch.bool, device="cpu")
        for row, first in zip(wanted, found, strict=True):
            row[first] = True
        log_probs = self.head(states[:, 0]).float().log_softmax(-1)
        return log_probs.masked_fill(~wanted.to(log_probs.device), -torch.inf).logsumexp(-1)

    def _encode_question(self, question: str, answer: str = "") -> tuple[Int[Tensor, "q"], Int[Tensor, "a"]]:
        """The ids of a question about one image, up to where the answer starts, and those of the answer.

        With a chat template, the answer's are those of the whole chat after what it has in common with the question.
        """
        processor, between = self.processor, self.between
        if processor.chat_template:
            before = processor.apply_chat_template([_turn("user", question)], add_generation_prompt=True)
        else:
            before, between = QUESTIONS[self.family].format(question), " " * (self.family == "blip-2")
        asked = encode(processor, before, self.image_size)["input_ids"][0]
        if self.family == "paligemma":  # its processor ends the text that it is given
            ids = self.tokenizer(answer, add_special_tokens=False).input_ids
            return asked, torch.tensor(ids, dtype=torch.long, device="cpu")
        if not answer:
            return asked, asked[:0]
        whole = encode(processor, before + between + answer, self.image_size)["input_ids"][0]
        alike = min(len(asked), len(whole))
        alike = int((asked[:alike] == whole[:alike]).long().cumprod(0).sum())
        return asked[:alike], whole[alike:]

    def _answer_states(
        self, features: Features, asked: list[Int[Tensor, "_"]], answers: list[Int[Tensor, "_"]]
    ) -> tuple[Float[Tensor, "b a d"], Int[Tensor, "b a"], Float[Tensor, "b a"]]:
        """The states that predict each row's answer, the answers' tokens, and a mask of those that are no padding."""
        start, device = self._text_start, self.ids.device
        longest = len(self.ids) + self.max_new_tokens - 1
        chats = [torch.cat(row)[start:] for row in zip(asked, answers, strict=True)]
        if (length := start + max(map(len, chats))) > longest:
            raise UserError(
                f"a question has {length} tokens, the image included, and {self.pretrained} reads {longest}"
            )
        tokens = pad_sequence(chats, True, self.pad_token_id).to(device)
        lengths = torch.tensor([len(row) for row in asked], device=device)
        states = self.states_after(self.ids[:start], features, tokens, lengths)
        count = torch.tensor([len(row) for row in answers], device=device)
        column = torch.arange(max(map(len, answers)), device=device)
        at = (lengths[:, None] - start + column).clamp(max=tokens.shape[1] - 1)
        mask = (column < count[:, None]).float()
        return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1])), tokens.gather(1, at), mask
