"""The results of one split: the table, differences and analyses of all candidates."""

from collections.abc import Sequence

from cyclefit.evaluate.analyses import (
    Chosen,
    Samples,
    checks,
    correlations,
    count_curve,
    difference,
    estimate,
    failures,
    parts,
    rank_curve,
)
from cyclefit.evaluate.base import Evaluate, Inputs
from cyclefit.evaluate.common import baselines
from cyclefit.metrics.facts import by_kind
from cyclefit.records import FALSE, IMAGE_TEXT, ORACLE, SINGLE, Candidate, KindFacts, Row, Split, joined


def results(
    evaluation: Evaluate, candidates: list[Candidate], inputs: Inputs, models: dict[str, tuple]
) -> tuple[Split, Chosen]:
    """The table, differences and analyses of one split; and what each row of the table keeps."""
    by_model = {name: {key: [] for key in inputs.references} for name in models}
    for one in candidates:
        by_model[one.model][one.key].append(one)
        one.metrics |= {name: one.scores[name] for name in evaluation.reconstructions}
    rows, chosen, pools = [], {}, {}
    facts, further = candidates[0].facts is not None, (*evaluation.further, *evaluation.reconstructions)

    def add(model: str, decoding: str, selection: str, samples: Samples, picked: list[Candidate]) -> None:
        kinds = {kind: KindFacts(**of) for kind, of in by_kind(checks(picked)).items()} if facts else None
        costs = evaluation.cost(samples, decoding, selection)
        metrics = evaluation.summary(picked, samples, selection, inputs)
        metrics |= {name: estimate([one.metrics[name] for one in picked]) for name in further}
        rows.append(Row(model, metrics, decoding, selection, *costs, kinds))
        chosen[rows[-1].name] = picked

    for model, by_key in by_model.items():
        for decoding in evaluation.decodings:
            samples = [[one for one in sample if one.decoding == decoding] for sample in by_key.values()]
            add(model, decoding, SINGLE, samples, [sample[0] for sample in samples])
        if len(samples[0]) < 2:
            continue
        pools[model] = samples
        for judge in samples[0][0].scores:
            best = [max(sample, key=lambda one: one.scores[judge]) for sample in samples]
            add(model, decoding, judge, samples, best)
        best = [max(sample, key=lambda one: one.metrics[evaluation.oracle]) for sample in samples]
        add(model, decoding, ORACLE, samples, best)
    return _analyses(evaluation, rows, chosen, pools, _pairs(evaluation, models), facts), chosen


def _analyses(
    evaluation: Evaluate, rows: list[Row], chosen: Chosen, pools: dict[str, Samples], pairs, facts: bool
) -> Split:
    rankings = [(model, judge, pool) for model, pool in pools.items() for judge in pool[0][0].scores]
    told = evaluation.analysed(rankings, facts)
    pairs = [(a, b) for a, b in pairs if a in chosen and b in chosen]
    single, judge, base = evaluation.singles[0], next(iter(evaluation.judges)), next(iter(chosen.values()))
    compared = [*(*evaluation.shares, FALSE[evaluation.kind]) * facts, *evaluation.compared]
    compared += [*evaluation.further, *evaluation.reconstructions]
    gained = [*evaluation.shares * facts, *evaluation.gained(base[0])]
    return Split(
        rows,
        len(base),
        [difference(metric, a, b, chosen) for a, b in pairs
         for metric in dict.fromkeys((*compared, *_both_scored(evaluation.rewards, chosen[a], chosen[b])))],
        [parts(a, b, chosen, evaluation.shares) for a, b in pairs if facts],
        [difference(metric, joined(model, ranker), joined(model, single), chosen)
         for model, ranker, _ in rankings for metric in gained],
        [rank_curve(*of, metric, pool) for (*of, pool), metric in told],
        [count_curve(model, ranker, evaluation.quality, pool)
         for model, pool in pools.items() for ranker in (*pool[0][0].scores, ORACLE)],
        [found for (*of, pool), metric in told if (found := correlations(*of, metric, pool))],
        [failures(model, judge, evaluation.quality, pool) for model, pool in pools.items()],
    )  # fmt: skip


def _both_scored(judges: Sequence[str], a: list[Candidate], b: list[Candidate]) -> list[str]:
    """The judges that have scored single captions or images of both models."""
    return [judge for judge in judges if all(judge in one.scores for one in (a[0], b[0]))]


def _pairs(evaluation: Evaluate, models: dict[str, tuple]) -> list[tuple[str, str]]:
    """What is compared: runs with a cycle with plain ones, the control and reranking; reranking with none."""
    plain, cycles, controls = baselines(models, evaluation.kind)
    judges = [name for name in evaluation.judges if evaluation.kind == "captions" or name != IMAGE_TEXT]
    pairs = [(a, b) for a in cycles for b in (*plain, *controls)] + [(a, b) for a in controls for b in plain]
    pairs = [(joined(a, single), joined(b, single)) for a, b in pairs for single in evaluation.singles]
    base = [joined("base", judge) for judge in judges]
    pairs += [(joined(a, single), judge) for single in evaluation.singles for a in cycles for judge in base]
    pairs += [(judge, joined("base", evaluation.singles[0])) for judge in base]
    return [*pairs, (joined("base", evaluation.cycle), joined("base", IMAGE_TEXT))]
