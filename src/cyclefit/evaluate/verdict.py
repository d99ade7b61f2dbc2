"""What an evaluation says in words: whether the cycle made captions or images truer, against plain finetuning and CLIP.

Helped means that truth rises and coverage does not fall, or that coverage rises and truth does not fall, each with its
95 % interval apart from 0. Where nothing is known of the facts, the verdict says so and reports agreement alone.
"""

from cyclefit.evaluate.common import baselines
from cyclefit.runs import Which

DECODINGS = {"nucleus": "one nucleus sample", "greedy": "one greedy caption", "single": "one image of each prompt"}
BRACKETS = "In brackets the 95 % interval of the difference."
FALSE = {"captioner": "false captions", "generator": "false images"}


def verdict(models: dict[str, tuple], which: Which, results: dict, agreement: str, decodings: list[str]) -> dict | None:
    """The verdict on the first run with a cycle against the first without, by the first split and decoding.

    Beside the `sentence` stands what came out against the image-text `control`, and the `changes` by kind of fact.
    `agreement` is the metric that is told, and decides, where there are no facts.
    """
    plain, cycles, controls = baselines(models, which)
    cycle = next(iter(cycles or controls), None)
    if not plain or cycle is None:
        return None
    better, head, sentence = _against(results, cycle, plain[0], which, agreement, decodings)
    found = {"better": better, "sentence": f"{head}: {cycle} against {plain[0]} {sentence}. {BRACKETS}"}
    if controls and cycles:
        better, head, sentence = _against(results, cycle, controls[0], which, agreement, decodings)
        found["control"] = {
            "better": better,
            "sentence": f"{head} than with CLIP as the only reward ({controls[0]}) {sentence}. {BRACKETS}",
        }
    if changes := _changes(next(iter(results.values())), f"{cycle} · {decodings[0]}", f"{plain[0]} · {decodings[0]}"):
        found["changes"] = changes
    return found


def outcome(truth: dict, coverage: dict | None) -> tuple[bool | None, str]:
    """Whether it helped, and the head of the sentence, of the differences in truth and coverage."""
    names = [(truth, "truer", "less true")] + ([(coverage, "more complete", "less complete")] if coverage else [])
    rises = [up for of, up, _ in names if (of["low"] or 0) > 0]
    falls = [down for of, _, down in names if (of["high"] or 0) < 0]
    if rises and falls:
        return None, f"{rises[0].capitalize()} but {falls[0]}"
    if rises or falls:
        return bool(rises), " and ".join(rises or falls).capitalize()
    return None, "Not clearly truer or less true"


def _against(
    results: dict, a: str, b: str, which: Which, agreement: str, decodings: list[str]
) -> tuple[bool | None, str, str]:
    """What decides, how the sentence begins, and its numbers of every split and decoding."""
    deciding, parts = None, []
    for split, result in results.items():
        rows = {(row["metric"], row["a"], row["b"]): row for row in result["differences"]}
        told = []
        for decoding in decodings:

            def of(metric: str, decoding: str = decoding, rows: dict = rows) -> dict | None:
                return rows.get((metric, f"{a} · {decoding}", f"{b} · {decoding}"))

            truth = of("truth")
            if deciding is None:
                deciding = outcome(truth, of("coverage")) if truth else _agrees(of(agreement), agreement)
            names = (FALSE[which], "truth", "coverage") if truth else (agreement,)
            values = [(name, of(name)) for name in names]
            numbers = ", ".join(f"{name} {_change(row, name)}" for name, row in values if row)
            told.append(f"{DECODINGS[decoding]}: {numbers}")
        unit = {"captioner": "images", "generator": "prompts"}[which]
        parts.append(f"on {result['num_images']} {unit} of {split}, {'; '.join(told)}")
    return *deciding, ". ".join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts))


def _agrees(row: dict, metric: str) -> tuple[bool | None, str]:
    """Without facts."""
    unknown = "; whether it is truer is not known, because the shards hold no facts"
    if row["low"] > 0:
        return True, f"Better in {metric}{unknown}"
    if row["high"] < 0:
        return False, f"Worse in {metric}{unknown}"
    return None, f"No difference in {metric} that these can show{unknown}"


def _change(row: dict, metric: str) -> str:
    """From, to, and the interval of the difference."""
    if row["value"] is None:
        return "of nothing"
    places = 3 if "similarity" in metric else 1
    # 0.0 is added because a rounded -0.0 would read as a loss.
    a, b = (f"{round(row[k], places) + 0.0:.{places}f}" for k in ("a_value", "b_value"))
    low, high = (f"{round(row[k], places) + 0.0:+.{places}f}" for k in ("low", "high"))
    return f"{b} to {a} [{low}, {high}]"


def _changes(result: dict, a: str, b: str) -> str:
    """Which kinds of fact changed, in words; nothing where no facts are known."""
    parts = next((entry for entry in result.get("parts", []) if (entry["a"], entry["b"]) == (a, b)), None)
    if parts is None:
        return ""
    told, same = [], []
    for kind, of in parts["kinds"].items():
        said = []
        for name, words in (("coverage", "stated rightly of those there"), ("truth", "right of those stated")):
            row = of.get(name)
            if row and row["low"] is not None and (row["low"] > 0 or row["high"] < 0):
                said.append(f"{words} {row['b_value']:.0f} % to {row['a_value']:.0f} %")
        (told if said else same).append(f"{kind}: {', '.join(said)}" if said else kind)
    words = parts["words"]
    sentence = f"What changed: {'; '.join(told)}" if told else "No kind of fact changed clearly"
    if told and same:
        sentence += f"; not clearly changed: {', '.join(same)}"
    if words:
        sentence += f"; words {words['b_value']:.1f} to {words['a_value']:.1f}"
    return sentence + "."
