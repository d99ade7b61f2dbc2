"""BLEU, ROUGE-L, CIDEr and CIDEr-D of captions, without Java and without torch.

Every score is on the scale of pycocoevalcap: BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]. Tables multiply by
100, as the field does: a CIDEr of 1.22 is "CIDEr 122".
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge

Ngram = tuple[str, ...]
Tokenizer = Callable[[str], str]

MAX_ORDER = 4
CIDER_SIGMA = 6.0
THIS_CORPUS = "this corpus"
BLEU = [f"BLEU-{order}" for order in range(1, MAX_ORDER + 1)]
MIN_IMAGES = 20
"""Below this many images the document frequencies of a corpus are too coarse for CIDEr."""

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


class CiderScorer:
    """CIDEr and CIDEr-D of any number of candidates against fixed references, whose vectors are kept.

    With g^n(s) the tf-idf vector of the n-grams of s, idf = log(images) - log(max(1, document frequency)),

        CIDEr(c, S)   = 10/4 sum_n mean_j  g^n(c) . g^n(s_j) / (|g^n(c)| |g^n(s_j)|)
        CIDEr-D(c, S) = 10/4 sum_n mean_j  exp(-(l(c) - l(s_j))^2 / (2 * 6^2))
                                           min(g^n(c), g^n(s_j)) . g^n(s_j) / (|g^n(c)| |g^n(s_j)|)

    (Vedantam et al. 2015, arXiv 1411.5726). The factor 10, which the paper gives to CIDEr-D only, is on both,
    as in the authors' code. The paper stems the words; their code does not, nor does this. CIDEr-D is what
    pycocoevalcap and the COCO server call "CIDEr". Scores are in [0, 10].

    Without `document_frequencies` they are those of `references`: the scores are 0 for a single image and
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
        counts = [[self._counts(caption) for caption in captions] for captions in references]
        if document_frequencies is None:
            if len(references) < MIN_IMAGES:
                warnings.warn(
                    f"CIDEr over {len(references)} images is unstable (0 for one image): "
                    f"give `document_frequencies` or score at least {MIN_IMAGES} images.",
                    stacklevel=2,
                )
            occurrences = Counter(ngram for image in counts for ngram in set().union(*image))
            document_frequencies = DocumentFrequencies(occurrences, len(references), THIS_CORPUS)
        elif document_frequencies.images < (most := max(document_frequencies.counts.values(), default=1)):
            raise ValueError(
                f"The document frequencies name {document_frequencies.images} images, "
                f"but an n-gram may occur in {most}: give the number of images they were counted over."
            )
        self.document_frequencies = document_frequencies
        self._log_images = math.log(document_frequencies.images)
        self._images = [self._index([self._vector(caption) for caption in image]) for image in counts]

    def __len__(self) -> int:
        return len(self._images)

    def score(self, candidates: Sequence[str], indices: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Scores "CIDEr" and "CIDEr-D", each (len(candidates),), of candidate i against image `indices[i]`.

        Without `indices` there is one candidate per image, in order. Raises ValueError where lengths differ,
        an index is out of range or a candidate is no string.
        """
        indices = range(len(self)) if indices is None else indices
        if len(candidates) != len(indices):
            raise ValueError(f"There are {len(candidates)} candidates for {len(indices)} sets of references.")
        _check_candidates(candidates)
        scores = np.zeros((2, len(candidates)))
        for position, (candidate, index) in enumerate(zip(candidates, indices, strict=True)):
            if not 0 <= index < len(self):
                raise ValueError(f"Candidate {position} is for image {index} of only {len(self)} images.")
            scores[:, position] = self._score(candidate, *self._images[index])
        return {"CIDEr": scores[0], "CIDEr-D": scores[1]}

    def _counts(self, caption: str) -> Counter:
        return Counter(_ngrams(self.tokenizer(caption).split()))

    def _vector(self, counts: Counter) -> tuple[dict[Ngram, float], list[float], int]:
        frequency = self.document_frequencies.counts
        weights = {
            ngram: count * (self._log_images - math.log(max(1, frequency.get(ngram, 0))))
            for ngram, count in counts.items()
        }
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        length = sum(count for ngram, count in counts.items() if len(ngram) == 1)
        return weights, [math.sqrt(square) for square in squares], length

    @staticmethod
    def _index(vectors: list) -> tuple[dict[Ngram, list[tuple[int, float]]], list[list[float]], list[int]]:
        """One image's references: for each n-gram its (reference, weight) pairs; the norms; the lengths."""
        postings: dict[Ngram, list[tuple[int, float]]] = {}
        for j, (weights, _, _) in enumerate(vectors):
            for ngram, weight in weights.items():
                postings.setdefault(ngram, []).append((j, weight))
        return postings, [norms for _, norms, _ in vectors], [length for _, _, length in vectors]

    def _score(self, candidate: str, postings: dict, norms: list, lengths: list) -> tuple[float, float]:
        weights, candidate_norms, length = self._vector(self._counts(candidate))
        penalties = [math.exp(-((length - other) ** 2) / (2 * CIDER_SIGMA**2)) for other in lengths]
        plain = defended = 0.0
        for ngram, weight in weights.items():
            order = len(ngram) - 1
            for j, reference in postings.get(ngram, ()):
                if weight and reference:
                    cosine = reference / (candidate_norms[order] * norms[j][order])
                    plain += weight * cosine
                    defended += min(weight, reference) * cosine * penalties[j]
        scale = 10 / (MAX_ORDER * len(lengths))
        return plain * scale, defended * scale

    def describe(self) -> dict[str, str]:
        """What these scores depend on, for the head of a table: tokenizer and document frequencies."""
        return describe(self.document_frequencies, tokenizer=self.tokenizer)


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

    BLEU and ROUGE-L are pycocoevalcap's. For several candidates per image, repeat its references and give
    `document_frequencies`, or use a `CiderScorer`. Raises ValueError where lengths differ or references are
    empty or of the wrong type, naming the index.
    """
    return _scores(candidates, references, document_frequencies, tokenizer)[0]


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
    scores, bleu, words = _scores(candidates, references, document_frequencies, tokenizer)
    metrics = dict(zip(BLEU, map(float, bleu), strict=True))
    metrics |= {name: float(scores[name].mean()) for name in ("ROUGE-L", "CIDEr", "CIDEr-D")}
    metrics["words"] = sum(map(len, words)) / len(words)
    for order in (1, 2):
        ngrams = [ngram for caption in words for ngram in _ngrams(caption) if len(ngram) == order]
        metrics[f"distinct-{order}"] = len(set(ngrams)) / max(1, len(ngrams))
    return metrics


def _scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    document_frequencies: DocumentFrequencies | None,
    tokenizer: Tokenizer,
) -> tuple[dict[str, np.ndarray], list[float], list[list[str]]]:
    """Per-sample scores, corpus BLEU-1..4, and the words of each candidate."""
    check_pairs(candidates, references)
    candidates = [tokenizer(candidate) for candidate in candidates]
    references = [[tokenizer(caption) for caption in captions] for captions in references]
    results = {i: [candidate] for i, candidate in enumerate(candidates)}
    truths = dict(enumerate(references))
    bleu, sentence_bleu = Bleu(MAX_ORDER).compute_score(truths, results, verbose=0)
    scores = {name: np.array(values) for name, values in zip(BLEU, sentence_bleu, strict=True)}
    scores["ROUGE-L"] = Rouge().compute_score(truths, results)[1]
    cider = CiderScorer(references, document_frequencies=document_frequencies, tokenizer=str)
    return scores | cider.score(candidates), bleu, [candidate.split() for candidate in candidates]


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
