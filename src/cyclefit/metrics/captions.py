"""BLEU, ROUGE-L, CIDEr and CIDEr-D of captions, without Java and without torch.

Every score is on the scale of the field's tables, 100 times pycocoevalcap's: BLEU and ROUGE-L in [0, 100], CIDEr in
[0, 1000]. Its 1.22 is "CIDEr 122".
"""

import json
import math
import pickle
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cyclefit import UserError

Ngram = tuple[str, ...]
Tokenizer = Callable[[str], str]

MAX_ORDER = 4
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
THIS_CORPUS = "this corpus"
BLEU = [f"BLEU-{order}" for order in range(1, MAX_ORDER + 1)]
COCO_VAL_IMAGES = 40504
"""Of COCO val2014, as CIDEr's authors have it in their code (github.com/vrama91/cider), not in their file."""
MIN_IMAGES = 20
"""Below this many images the document frequencies of a corpus are too coarse for CIDEr."""
_MASK = 2**32 - 1
_PART = 20_000
"""Candidates scored at a time, which bounds the memory."""

# coco-caption's list. It names brackets in upper case (-LRB-) but tokenizes to lower case, so that they stay
# in its captions as the words -lrb- and -rrb-, and so they do here.
PUNCTUATION = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ASCII = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"}
TYPOGRAPHIC = str.maketrans(ASCII | {"\u2026": "..."})

# Abbreviations that keep their period; "no." only before a number.
ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen sen gov sgt capt lt col corp ltd sr jr dept est st mt ft ave inc co bros "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri vs etc al blvd rd sq tel"
).split()
# Words written as one and read as two.
CLITIC_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "wanna": "wan na",
    "gotta": "got ta",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}
LETTER = r"[^\W\d_]"
TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s,"]*[\w/]                     # addresses
  | \w[\w.-]*@\w[\w.-]*\w                                # name@site
  | [@#]{LETTER}\w*                                      # @name, #tag
  | </?[a-z][\w-]*>                                      # <unk>
  | (?P<two>{"|".join(CLITIC_WORDS)})(?!\w)
  | (?:{"|".join(ABBREVIATIONS)})\.(?!\w)
  | no\.(?=\s*\d)
  | {LETTER}(?:\.{LETTER})*\.(?!\w|\.)                   # a.  p.m.  u.s.
  | {LETTER}+(?=n't(?!\w))                               # do + n't
  | n't(?!\w)
  | '(?:s|re|ve|ll|d|m)(?!\w)                            # dog + 's
  | '(?:\d\ds|em|n'|n|til|cause)(?!\w)                   # '70s  'em  'n'
  | \d{{1,2}}:\d\d(?=[ap]m?\b)                           # 12:30 + pm
  | \d+(?:[.,:/]\d+)+ | \.\d+                            # 1,000  3.5  10:10  1/2  .50
  | y'(?=all|know)                                       # y' + all
  | (?:{LETTER}|ma|ne|qu)'(?!(?:s|re|ve|ll|d|m)\b){LETTER}+  # o'clock  ma'am
  | [^\W_]\w*(?:(?:[-/]|\.(?={LETTER}))\w+)*(?:\.(?=[,;:]))?  # dog  t-shirt  and/or  street.the  bat.,
  | \.{{3,}}|-{{2,}}|[!?]+|\*+|``|''
  | \S
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> str:
    """Lower-cased words joined by spaces, as coco-caption's PTBTokenizer leaves them, without its Java.

    Contractions are split ("isn't" is "is n't", "dog's" is "dog 's"), hyphenated words stay whole, and
    punctuation is dropped. `docs/metrics.md` states the measured agreement and the differences.
    """
    words = []
    for match in TOKEN.finditer(caption.translate(TYPOGRAPHIC).lower()):
        word = match[0]
        if match["two"]:
            word = CLITIC_WORDS[word]
        elif word in BRACKETS:
            word = BRACKETS[word]
        if word not in PUNCTUATION and word.strip("-."):
            words.append(word)
    return " ".join(words)


class DocumentFrequencies(NamedTuple):
    """For how many of `images` images each n-gram occurs in at least one reference."""

    counts: Mapping[Ngram, int]
    images: int
    name: str = "given"
    """What `describe` calls them, for example "COCO val2014"."""


def read_document_frequencies(path: Path) -> DocumentFrequencies:
    """Document frequencies from a file: `{"images": 40504, "document_frequency": {"a dog": 17, ...}}` as JSON, or the
    field's pickles: `document_frequency` with tuples of words, and `ref_len`, the number of images; or the frequencies
    alone, as in `coco-val-df.p`, which are then COCO val2014's.

    Of a pickle only dictionaries, tuples, strings and numbers are read; whatever else it names is refused and not run.

    Raises:
        UserError: the file is neither, or does not hold what it should.

    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open("rb") as file:
                content = _Plain(file, encoding="latin-1").load()
        if path.suffix != ".json" and "document_frequency" not in content:
            content = {"document_frequency": content, "images": COCO_VAL_IMAGES}
        images = content.get("images", content.get("ref_len"))
        counts = {tuple(k.split(" ")) if isinstance(k, str) else k: v for k, v in content["document_frequency"].items()}
        if not all(isinstance(k, tuple) and isinstance(v, int | float) for k, v in counts.items()):
            raise ValueError("an n-gram or its count is of another type")
        if images < (most := max(counts.values(), default=1)):
            raise ValueError(f"it names {images} images, but an n-gram occurs in {most}")
        return DocumentFrequencies(counts, int(images), path.name)
    except OSError as error:
        raise UserError(f"document frequencies cannot be read from {path}: {error.strerror}") from None
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(
            f'{path} holds no document frequencies ({error}): it should be JSON, {{"images": N, '
            '"document_frequency": {"a dog": n, ...}}, or a file like coco-val-df.p'
        ) from None


class _Plain(pickle.Unpickler):
    """Reads containers of strings and numbers, runs nothing."""

    def find_class(self, module: str, name: str):
        allowed = {"defaultdict": defaultdict, "dict": dict, "int": int, "float": float}
        if module in ("collections", "builtins", "__builtin__") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def document_frequencies(
    references: Iterable[Sequence[str]], *, tokenizer: Tokenizer = tokenize, name: str = "given"
) -> DocumentFrequencies:
    """Document frequencies of n = 1..4 grams over the references of each image, to fix CIDEr's weights.

    Raises ValueError where an entry is no list of captions or is empty.
    """
    references = list(references)
    _check_references(references)
    counts = Counter()
    for captions in references:
        counts.update({ngram for caption in captions for ngram in _ngrams(tokenizer(caption).split())})
    return DocumentFrequencies(counts, len(references), name)


class CaptionScorer:
    """BLEU, ROUGE-L, CIDEr and CIDEr-D of any number of candidates against fixed references, which are read once.

    BLEU-1..4 and ROUGE-L are pycocoevalcap's (docs/metrics.md). With g^n(s) the tf-idf vector of the n-grams of s,
    idf = log(images) - log(max(1, document frequency)),

        CIDEr(c, S)   = 1000/4 sum_n mean_j  g^n(c) . g^n(s_j) / (|g^n(c)| |g^n(s_j)|)
        CIDEr-D(c, S) = 1000/4 sum_n mean_j  exp(-(l(c) - l(s_j))^2 / (2 * 6^2))
                                           min(g^n(c), g^n(s_j)) . g^n(s_j) / (|g^n(c)| |g^n(s_j)|)

    (Vedantam et al. 2015, arXiv 1411.5726). The factor 10, which the paper gives to CIDEr-D only, is on both,
    as in the authors' code, and 100 beside it. The paper stems the words; their code does not, nor does this. CIDEr-D
    is what pycocoevalcap and the COCO server call "CIDEr". Both are in [0, 1000], the others in [0, 100].

    Without `document_frequencies` they are those of `references`: CIDEr is 0 for a single image and
    unstable on tiny sets (a warning below 20 images). `tokenizer` maps a caption to words joined by spaces;
    with `str` captions are taken as they are. Raises ValueError where `references` are empty or no lists.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        *,
        document_frequencies: DocumentFrequencies | None = None,
        tokenizer: Tokenizer = tokenize,
    ):
        _check_references(references)
        self.tokenizer = tokenizer
        counts = [len(captions) for captions in references]
        self._first = np.concatenate([[0], np.cumsum(counts)])
        texts = [tokenizer(caption) for captions in references for caption in captions]
        self._split = [text.split(" ") for text in texts]
        self._words: dict[str, int] = {}
        self._lengths, grams, self._tables = _ngram_counts(texts, self._words, [])
        image = np.arange(len(references)).repeat(counts)
        if document_frequencies is None:
            if len(references) < MIN_IMAGES:
                warnings.warn(
                    f"CIDEr over {len(references)} images is unstable (0 for one image): "
                    f"give `document_frequencies` or score at least {MIN_IMAGES} images.",
                    stacklevel=2,
                )
            document_frequencies = DocumentFrequencies({}, len(references), THIS_CORPUS)
            self._occurrences = [
                np.bincount(np.unique(image[owner] << 32 | gram) & _MASK, minlength=len(table))
                for (owner, gram, _), table in zip(grams, self._tables, strict=True)
            ]
        else:
            self._occurrences = [np.zeros(0)] * MAX_ORDER
            if document_frequencies.images < (most := max(document_frequencies.counts.values(), default=1)):
                raise ValueError(
                    f"The document frequencies name {document_frequencies.images} images, "
                    f"but an n-gram may occur in {most}: give the number of images they were counted over."
                )
        self.document_frequencies = document_frequencies
        self._occurrences = self._frequencies(self._tables, self._words)
        # Per order, sorted by image and n-gram: what each reference has of it, and the most that one reference has.
        self._postings = []
        for (owner, gram, count), idf in zip(grams, self._idf(self._tables, self._words), strict=True):
            weight = count * idf[gram]
            norm = np.sqrt(np.bincount(owner, weight**2, minlength=len(texts)))
            key = image[owner] << 32 | gram
            order = np.argsort(key, kind="stable")
            key = key[order]
            starts = np.flatnonzero(np.diff(key, prepend=-1))
            most = np.maximum.reduceat(count[order], starts) if len(key) else count
            self._postings.append((key, owner[order], weight[order], norm, key[starts], most))

    def __len__(self) -> int:
        return len(self._first) - 1

    def score(self, candidates: Sequence[str], indices: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Each sentence's "BLEU-1".."BLEU-4", "ROUGE-L", "CIDEr" and "CIDEr-D", each (len(candidates),).

        Candidate i is scored against image `indices[i]`; without them there is one candidate per image, in order.
        Raises ValueError where lengths differ, an index is out of range or a candidate is no string.
        """
        return self.measure(candidates, indices)[0]

    def measure(
        self, candidates: Sequence[str], indices: Sequence[int] | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """`score`'s, and the counts (len(candidates), 10) whose sum over a corpus `bleu` makes corpus BLEU of."""
        indices = range(len(self)) if indices is None else indices
        if len(candidates) != len(indices):
            raise ValueError(f"There are {len(candidates)} candidates for {len(indices)} sets of references.")
        _check_candidates(candidates)
        for position, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise ValueError(f"Candidate {position} is for image {index} of only {len(self)} images.")
        image = np.array(indices, dtype=np.int64)
        texts = [self.tokenizer(candidate) for candidate in candidates]
        parts = [self._measure(texts[i : i + _PART], image[i : i + _PART]) for i in range(0, len(texts), _PART)]
        counts = np.concatenate([counts for _, counts in parts]) if parts else np.zeros((0, 10))
        scores = dict(zip(BLEU, bleu(counts).T, strict=True))
        scores["ROUGE-L"] = np.array([self._rouge(text, i) for text, i in zip(texts, indices, strict=True)])
        cider = np.concatenate([cider for cider, _ in parts], axis=1) if parts else np.zeros((2, 0))
        return scores | dict(zip(("CIDEr", "CIDEr-D"), cider, strict=True)), counts

    def _measure(self, texts: list[str], image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CIDEr and CIDEr-D (2, n), and BLEU's counts (n, 10): matches, n-grams, words, words of the closest length."""
        words = dict(self._words)
        lengths, grams, tables = _ngram_counts(texts, words, self._tables)
        count = len(texts)
        cider, correct = np.zeros((2, count)), np.zeros((count, MAX_ORDER))
        for n, ((owner, gram, times), idf) in enumerate(zip(grams, self._idf(tables, words), strict=True)):
            keys, reference, weights, norms, distinct, most = self._postings[n]
            key, weight = image[owner] << 32 | gram, times * idf[gram]
            norm = np.sqrt(np.bincount(owner, weight**2, minlength=count))
            place = np.searchsorted(distinct, key)
            known = place < len(distinct)
            known[known] = distinct[place[known]] == key[known]
            matched = np.minimum(times[known], most[place[known]])
            correct[:, n] = np.bincount(owner[known], matched, minlength=count)
            # Every pair of a candidate's n-gram and a reference that has it.
            low = np.searchsorted(keys, key)
            pairs = np.searchsorted(keys, key, side="right") - low
            mine = np.arange(len(key)).repeat(pairs)
            theirs = np.arange(len(mine)) + (low - (np.cumsum(pairs) - pairs)).repeat(pairs)
            mine, theirs = (side[(weight[mine] != 0) & (weights[theirs] != 0)] for side in (mine, theirs))
            caption, candidate = reference[theirs], owner[mine]
            cosine = weights[theirs] / (norm[candidate] * norms[caption])
            far = np.exp(-((lengths[candidate] - self._lengths[caption]) ** 2) / (2 * CIDER_SIGMA**2))
            cider[0] += np.bincount(candidate, weight[mine] * cosine, minlength=count)
            clipped = np.minimum(weight[mine], weights[theirs])
            cider[1] += np.bincount(candidate, clipped * cosine * far, minlength=count)
        first, last = self._first[image], self._first[image + 1]
        possible = np.maximum(0, lengths[:, None] - np.arange(MAX_ORDER))
        closest = [
            min((abs(other - own), other) for other in self._lengths[i:j].tolist())[1]
            for own, i, j in zip(lengths.tolist(), first, last, strict=True)
        ]
        counts = np.concatenate([correct, possible, np.stack([lengths, closest], axis=1)], axis=1)
        return cider * 1000 / (MAX_ORDER * (last - first)), counts

    def _idf(self, tables: list[np.ndarray], words: dict[str, int]) -> list[np.ndarray]:
        log_images = math.log(self.document_frequencies.images)
        return [log_images - np.log(np.maximum(1, counts)) for counts in self._frequencies(tables, words)]

    def _frequencies(self, tables: list[np.ndarray], words: dict[str, int]) -> list[np.ndarray]:
        """Document frequencies of tables of n-grams; only those that the references lack are looked up."""
        frequency, names, found = self.document_frequencies.counts, list(words), []
        for n, (table, known) in enumerate(zip(tables, self._occurrences, strict=True)):
            counts = np.zeros(len(table))
            counts[: len(known)] = known
            for i in range(len(known), len(table)) if frequency else ():
                ngram, key = [], int(table[i])
                for shorter in tables[:n][::-1]:
                    ngram.append(names[key & _MASK])
                    key = int(shorter[key >> 32])
                counts[i] = frequency.get((names[key], *reversed(ngram)), 0)
            found.append(counts)
        return found

    def _rouge(self, text: str, index: int) -> float:
        """The F-measure, beta = 1.2, of the best precision and the best recall over the references."""
        own = text.split(" ")
        masks: dict[str, int] = {}
        for i, word in enumerate(own):
            masks[word] = masks.get(word, 0) | 1 << i
        precision = recall = 0.0
        for other in self._split[self._first[index] : self._first[index + 1]]:
            # The longest common subsequence in bits (Hyyrö 2004): one that is 0 in `row` is a step of it.
            row = full = (1 << len(own)) - 1
            for word in other:
                if hit := row & masks.get(word, 0):
                    row = ((row + hit) | (row - hit)) & full
            length = len(own) - row.bit_count()
            precision, recall = max(precision, length / len(own)), max(recall, length / len(other))
        if not precision:
            return 0.0
        return 100 * (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)

    def describe(self) -> dict[str, str]:
        """What these scores depend on, for the head of a table: tokenizer and document frequencies."""
        return describe(self.document_frequencies, tokenizer=self.tokenizer)


def _ngram_counts(
    texts: list[str], words: dict[str, int], references: list[np.ndarray]
) -> tuple[np.ndarray, list, list[np.ndarray]]:
    """Lengths of texts, and per order the (text, n-gram, count) of each, and the table of n-grams.

    An n-gram's id is its place in the table; its key there is the id of its first n - 1 words and its last word.
    Tables are the `references`', followed by what only `texts` have; new words are added to `words`.
    """
    split = [text.split() for text in texts]
    lengths = np.array([len(row) for row in split], dtype=np.int64)
    flat = np.array([words.setdefault(word, len(words)) for row in split for word in row], dtype=np.int64)
    text = np.arange(len(texts)).repeat(lengths)
    left = (np.cumsum(lengths).repeat(lengths) - np.arange(len(flat))) if len(flat) else flat
    at, key, grams, tables = np.arange(len(flat)), flat, [], []
    for n in range(MAX_ORDER):
        known = references[n] if references else flat[:0]
        place = np.searchsorted(known, key)
        new = place == len(known)
        new[~new] = known[place[~new]] != key[~new]
        fresh = np.unique(key[new])
        place[new] = len(known) + np.searchsorted(fresh, key[new])
        tables.append(np.concatenate([known, fresh]))
        pair, count = np.unique(text[at] << 32 | place, return_counts=True)
        grams.append((pair >> 32, pair & _MASK, count))
        longer = left[at] > n + 1
        at = at[longer]
        key = place[longer] << 32 | flat[at + n + 1]
    return lengths, grams, tables


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1..4 (..., 4), in [0, 100], of a sentence's counts (..., 10), or of a corpus' sum (Papineni et al. 2002)."""
    correct, possible, words, closest = np.split(counts, (4, 8, 9), axis=-1)
    # pycocoevalcap's small numbers.
    precision = (correct + 1e-15) / (possible + 1e-9)
    ratio = (words + 1e-15) / (closest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return 100 * np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1)) * brevity


def describe(
    document_frequencies: DocumentFrequencies | None = None, *, tokenizer: Tokenizer = tokenize
) -> dict[str, str]:
    """What caption scores depend on, for the head of a table: tokenizer and document frequencies."""
    frequencies = document_frequencies or DocumentFrequencies({}, 0, THIS_CORPUS)
    return {
        "tokenizer": f"{tokenizer.__module__}.{tokenizer.__qualname__}",
        "document frequencies": frequencies.name + (f", {n} images" if (n := frequencies.images) else ""),
    }


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    document_frequencies: DocumentFrequencies | None = None,
    tokenizer: Tokenizer = tokenize,
) -> dict[str, np.ndarray]:
    """Per-sample "BLEU-1".."BLEU-4" (sentence BLEU), "ROUGE-L", "CIDEr" and "CIDEr-D", each (samples,).

    For several candidates per image use a `CaptionScorer`. Raises ValueError where lengths differ or references are
    empty or of the wrong type, naming the index.
    """
    check_pairs(candidates, references)
    scorer = CaptionScorer(references, document_frequencies=document_frequencies, tokenizer=tokenizer)
    return scorer.score(candidates)


def caption_metrics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    document_frequencies: DocumentFrequencies | None = None,
    tokenizer: Tokenizer = tokenize,
) -> dict[str, float]:
    """Corpus "BLEU-1".."BLEU-4", "ROUGE-L", "CIDEr", "CIDEr-D", "words", "distinct-1" and "distinct-2".

    BLEU is corpus BLEU, the others are means over samples; "words" is the mean length of a candidate,
    "distinct-n" the number of different n-grams of all candidates over the number of all of them, in [0, 1]
    (Li et al. 2016, arXiv 1510.03055). Raises ValueError as `caption_scores`.
    """
    check_pairs(candidates, references)
    scorer = CaptionScorer(references, document_frequencies=document_frequencies, tokenizer=tokenizer)
    return corpus_metrics(*scorer.measure(candidates), [tokenizer(candidate).split() for candidate in candidates])


def corpus_metrics(scores: Mapping[str, np.ndarray], counts: np.ndarray, words: list[list[str]]) -> dict[str, float]:
    """`caption_metrics` of what `CaptionScorer.measure` found, and the candidates' words."""
    metrics = dict(zip(BLEU, map(float, bleu(counts.sum(0))), strict=True))
    metrics |= {name: float(scores[name].mean()) for name in ("ROUGE-L", "CIDEr", "CIDEr-D")}
    metrics["words"] = sum(map(len, words)) / len(words)
    for order in (1, 2):
        ngrams = [tuple(row[i : i + order]) for row in words for i in range(len(row) - order + 1)]
        metrics[f"distinct-{order}"] = len(set(ngrams)) / max(1, len(ngrams))
    return metrics


def self_bleu(groups: Sequence[Sequence[str]], *, tokenizer: Tokenizer = tokenize) -> np.ndarray:
    """Self-BLEU (groups,): mean BLEU-4 of each of an image's captions against its other ones; lower is more diverse.

    (Zhu et al., SIGIR 2018, arXiv 1802.01886, there over a whole corpus.) Raises ValueError where a group has fewer
    than two captions.
    """
    if short := [i for i, captions in enumerate(groups) if len(captions) < 2]:
        raise ValueError(f"Self-BLEU needs two captions of an image; group {short[0]} has {len(groups[short[0]])}.")
    sizes = [len(captions) for captions in groups]
    texts = [tokenizer(caption) for captions in groups for caption in captions]
    group, count = np.arange(len(groups)).repeat(sizes), len(texts)
    lengths, grams, _ = _ngram_counts(texts, {}, [])
    correct = np.zeros((count, MAX_ORDER))
    for n, (owner, gram, times) in enumerate(grams):
        # What the others have at most: the group's most, or the next most where that is a caption's own.
        order = np.lexsort((-times, group[owner] << 32 | gram))
        owner, gram, times = owner[order], gram[order], times[order]
        first = np.diff(group[owner] << 32 | gram, prepend=-1) != 0
        start = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        follows = np.append(~first[1:], False)
        others = np.where(first, np.where(follows, np.append(times[1:], 0), 0), times[start])
        correct[:, n] = np.bincount(owner, np.minimum(times, others), minlength=count)
    possible = np.maximum(0, lengths[:, None] - np.arange(MAX_ORDER))
    closest = []
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        own = lengths[start : start + size].tolist()
        for i, length in enumerate(own):
            closest.append(min((abs(other - length), other) for j, other in enumerate(own) if j != i)[1])
    values = bleu(np.concatenate([correct, possible, np.stack([lengths, closest], axis=1)], axis=1))[:, -1]
    return np.bincount(group, values) / sizes


def check_pairs(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless each of one or more samples has a caption and a list of references."""
    _check_references(references)
    _check_candidates(candidates)
    if len(candidates) != len(references):
        raise ValueError(f"There are {len(candidates)} candidates for {len(references)} sets of references.")


def _ngrams(words: list[str]) -> list[Ngram]:
    return [tuple(words[i : i + order]) for order in range(1, MAX_ORDER + 1) for i in range(len(words) - order + 1)]


def _check_candidates(candidates: Sequence[str]) -> None:
    if isinstance(candidates, str):
        raise ValueError("Candidates are one string: give a list with one caption per sample.")
    for index, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            raise ValueError(f"Candidate {index} is of type {type(candidate).__name__}, not a string.")


def _check_references(references: Sequence[Sequence[str]]) -> None:
    if isinstance(references, str) or not len(references):
        raise ValueError("There are no references: give a list of captions for each of at least one image.")
    for index, captions in enumerate(references):
        if isinstance(captions, str) or not isinstance(captions, Sequence):
            raise ValueError(f"References {index} are of type {type(captions).__name__}, not a list of captions.")
        if not captions:
            raise ValueError(f"References {index} are empty: every image needs at least one caption.")
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"References {index} hold a {type(caption).__name__}, not only strings.")
