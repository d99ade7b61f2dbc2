"""The driver of evaluations: every model on the same inputs, its candidates judged and measured, and what came out."""

import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import torch
from torch import Tensor

from cyclefit import UserError
from cyclefit.batch import Batch
from cyclefit.config.start import command_line
from cyclefit.data import evaluation_batches, expand_shards
from cyclefit.digests import digest_of_shards
from cyclefit.evaluate.base import Evaluate, Inputs
from cyclefit.evaluate.common import (
    CandidateFile,
    describe_models,
    launch,
    load_models,
    log_tables,
    machine,
    print_results,
    save_sources,
)
from cyclefit.evaluate.hacking import rewarding
from cyclefit.evaluate.results import results as results_of
from cyclefit.evaluate.verdict import verdict
from cyclefit.judges import check_judge, place
from cyclefit.metrics.captions import describe
from cyclefit.models import Captioner, Generator
from cyclefit.models.pretrained import Adapter, freeze
from cyclefit.progress import progress_bar
from cyclefit.records import IMAGE_TEXT, Candidate, Evaluation, Settings, write_evaluation, write_json
from cyclefit.report import write_report
from cyclefit.report.tables import main_table
from cyclefit.rerank import with_others


def run(evaluation: Evaluate) -> int:
    """Evaluates; returns the exit status."""
    started = time.perf_counter()
    check_settings(evaluation)
    evaluation.fabric = launch(evaluation.devices, evaluation.num_nodes)
    models = load_models(evaluation.base, evaluation.runs, evaluation.checkpoint, evaluation.kind)
    evaluation.rewards = rewarding([config for _, config in models.values()], evaluation.kind, evaluation.judges)
    # Taken before anything changes its precision.
    common = {"seed": evaluation.seed, "image_size": evaluation.image_size}
    depends = {name: common | evaluation.depends(name, model) for name, (model, _) in models.items()}
    for judge in evaluation.judges.values():
        place(judge, evaluation.fabric.device)
    for model in (evaluation.partners.generator, evaluation.partners.captioner, *evaluation.scorers.values()):
        if model is not None:
            _to_device(evaluation, model)

    files, inputs = {}, {}
    for split in evaluation.shards:
        files[split] = _file(evaluation, split, depends)
        inputs[split] = _read(evaluation, split)
        evaluation.prepare(inputs[split])
        for name, (model, _) in models.items():
            _to_device(evaluation, model, evaluation.half)
            _make(evaluation, files[split], inputs[split], name, model)
            model.to("cpu")
    evaluation.fabric.barrier()
    if not evaluation.fabric.is_global_zero:
        return 0

    results, chosen = {}, {}
    for split, file in files.items():
        file.merge(models, list(inputs[split].references))
        evaluation.measure(file.candidates, inputs[split])
        _measure_more(evaluation, file.candidates, inputs[split])
        _add_sum(evaluation, file.candidates)
        results[split], chosen[split] = results_of(evaluation, file.candidates, inputs[split], models)
    notes = evaluation.finish(files, inputs, results, chosen)
    for file in files.values():
        file.rewrite()
    found = Evaluation(
        results,
        evaluation.kind,
        title="Did the cycle help?",
        created=date.today().isoformat(),
        models=describe_models(models, evaluation.kind),
        metadata=_metadata(evaluation, started) | notes,
        judges={name: judge.describe() for name, judge in evaluation.judges.items()},
        gallery=evaluation.gallery,
        verdict=verdict(models, evaluation.kind, results, evaluation.quality, evaluation.singles, evaluation.judges),
    )
    write_evaluation(evaluation.folder, found)
    report = write_report(evaluation.folder)
    print_results(found, evaluation.columns)
    print(f"report: {report}")
    _log(evaluation, found, [config for _, config in models.values() if config])
    return 0


def _log(evaluation: Evaluate, found: Evaluation, configs: list[dict]) -> None:
    """The tables and figures where the runs log."""
    values = {
        f"{split}/{row.name}/{metric}": estimate.value
        for split, results in found.splits.items()
        for row in results.rows
        for metric, estimate in row.metrics.items()
    }
    tables = {f"{evaluation.kind}/{split}": main_table(results.rows) for split, results in found.splits.items()}
    log_tables(tables, evaluation.folder, values, configs, job_type="evaluation", config=found.metadata)


def check_settings(evaluation: Evaluate) -> None:
    """Raises UserError if a judge or a metric does not fit the evaluation."""
    for name, judge in evaluation.judges.items():
        check_judge(judge, evaluation.kind, f"judges.{name}")
        for partner in judge.needs:
            if getattr(evaluation.partners, partner) is None:
                what = f"{type(judge).__name__} needs a {partner}"
                raise UserError(f"judges.{name}: {what}, and an evaluation of {evaluation.kind} has none: leave it out")
        judge.check(evaluation.partners)
    for name, metric in evaluation.metrics.items():
        if evaluation.kind not in metric.kinds:
            what = f"{type(metric).__name__} measures {' and '.join(metric.kinds)}"
            raise UserError(f"metrics.{name}: {what}, not {evaluation.kind}: leave it out")


def _to_device(evaluation: Evaluate, model: Adapter, half: bool = True) -> None:
    freeze(model.to(evaluation.fabric.device))
    if half:
        model.half_on_gpu()


def _file(evaluation: Evaluate, split: str, depends: dict[str, dict]) -> CandidateFile:
    urls, scorer = evaluation.shards[split], next(iter(evaluation.scorers.values()))
    images = digest_of_shards(expand_shards(urls))
    depends = {name: {"images": images} | own for name, own in depends.items()}
    settings = Settings(evaluation.kind, urls, scorer.name, evaluation.seed, images, depends)
    return CandidateFile(evaluation.folder, split, settings, evaluation.fabric)


def _stream(evaluation: Evaluate, split: str, batch_size: int) -> Iterator[Batch]:
    return evaluation_batches(
        evaluation.shards[split],
        image_size=evaluation.image_size,
        batch_size=batch_size,
        limit=evaluation.limit,
        num_workers=evaluation.num_workers,
    )


@torch.no_grad()
def _read(evaluation: Evaluate, split: str) -> Inputs:
    """Reads a split once on every rank, embeds its images, and saves them, each rank some."""
    inputs, embedded = Inputs(split), {label: [] for label in evaluation.scorers}
    with progress_bar(evaluation.fabric.global_rank) as progress:
        task = progress.add_task(f"{split}: references", total=evaluation.limit)
        for number, batch in enumerate(_stream(evaluation, split, evaluation.batch_size)):
            inputs.references |= dict(zip(batch.keys, batch.references, strict=True))
            inputs.facts |= dict(zip(batch.keys, batch.facts or [None] * len(batch), strict=True))
            if number % evaluation.fabric.world_size == evaluation.fabric.global_rank:
                save_sources(evaluation.folder / "images" / split / "source", batch, evaluation.source_side)
            for label, scorer in evaluation.scorers.items():
                embedded[label].append(scorer.embed_images(batch.images.to(evaluation.fabric.device)).cpu())
            progress.update(task, advance=len(batch))
        progress.update(task, total=len(inputs.references))
    inputs.images = {label: torch.cat(rows) for label, rows in embedded.items()}
    if evaluation.fabric.is_global_zero:
        write_json(evaluation.folder / f"references-{split}.json", inputs.references)
    return inputs


def _make(evaluation: Evaluate, file: CandidateFile, inputs: Inputs, name: str, model: Captioner | Generator) -> None:
    """Appends a model's candidates to its split's file, of this rank's batches; a first input warms up."""
    done, warm, rank = file.done(name), False, evaluation.fabric.global_rank
    with progress_bar(rank) as progress:
        task = progress.add_task(f"{inputs.split}: {name}", total=len(inputs.references))
        # Every rank reads all images, which is little beside what is made of them, and works on some batches.
        stream = _stream(evaluation, inputs.split, evaluation.batch_size_of(name))
        batches = with_others(stream, evaluation.num_others(name), evaluation.inputs_of)
        for number, (batch, others) in enumerate(batches):
            todo = [i for i, key in enumerate(batch.keys) if key not in done]
            if number % evaluation.fabric.world_size == rank and todo:
                if not warm:
                    evaluation.sample(inputs, name, model, *_part(batch, others, todo[:1]))
                    warm = True
                file.append(evaluation.sample(inputs, name, model, *_part(batch, others, todo)))
            progress.update(task, advance=len(batch))


def _measure_more(evaluation: Evaluate, candidates: list[Candidate], inputs: Inputs) -> None:
    references = [inputs.references[one.key] for one in candidates]
    for name, metric in evaluation.metrics.items():
        metric.folder = evaluation.folder
        found = metric.measure(candidates, references)
        for column, values in zip(metric.named(name), found if metric.columns else [found], strict=True):
            for one, value in zip(candidates, values, strict=True):
                one.metrics[column] = round(float(value), 6)


def _add_sum(evaluation: Evaluate, candidates: list[Candidate]) -> None:
    if any(evaluation.judges[name].races for name in (evaluation.cycle, IMAGE_TEXT) if name in evaluation.judges):
        return  # of those dropped early, there is no similarity to add
    for scores in (one.scores for one in candidates):
        if {evaluation.cycle, IMAGE_TEXT} <= scores.keys():
            scores[evaluation.sum] = round(scores[evaluation.cycle] + scores[IMAGE_TEXT], 6)


def _metadata(evaluation: Evaluate, started: float) -> dict[str, Any]:
    return {
        **describe(),
        "scorer": next(iter(evaluation.scorers.values())).name,
        "seed": evaluation.seed,
        "num_candidates": evaluation.num_candidates,
        **evaluation.about,
        **evaluation.sampling,
        "devices": evaluation.devices * evaluation.num_nodes,
        "machine": machine(),
        "commands": [command_line()],
        "seconds": round(time.perf_counter() - started),
    }


def _part(batch: Batch, others: Tensor | list | None, places: list[int]) -> tuple[Batch, Tensor | list | None]:
    """Some samples of a batch, and the other inputs they are contrasted with."""
    captions, references, keys = ([of[i] for i in places] for of in (batch.captions, batch.references, batch.keys))
    part = Batch(batch.images[places], captions, references, keys)
    if isinstance(others, list):
        return part, [others[i] for i in places]
    return part, None if others is None else others[places]
