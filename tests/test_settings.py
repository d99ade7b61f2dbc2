"""Settings that cannot be right: numbers outside their ranges, and keys, classes and values mistyped."""

import inspect
import math
import re
import sys
from functools import cache
from typing import get_args, get_origin

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from cyclefit import UserError, evaluate
from cyclefit.config.ranges import range_of
from cyclefit.config.start import CONFIGS, resolve_configs
from cyclefit.cycles import OneStepCaptioning, PolicyGradient, SoftCaptionDenoising, TruncatedSampling
from cyclefit.data import ShardData
from cyclefit.finetune import CaptionerFinetune, Finetune
from cyclefit.judges import Denoising, Partners, Regeneration
from cyclefit.models import Decoding, Flux, Lora, StableDiffusion
from cyclefit.train import cli
from tests.conftest import ROOT

COMPLETED = {
    "ablation_": "evaluate_captions.yaml",
    "miniature_ablation_": "miniature_evaluate.yaml",
    "miniature_modern.yaml": "miniature_cycle_blip_reward.yaml",
    "miniature_modern_evaluate.yaml": "miniature_evaluate.yaml",
}
"""Configs that are read on top of another one."""

ZERO = {
    "weight", "kl_weight", "text_weight", "image_text_weight", "likelihood_weight",
    "contrast", "min_timestep", "num_others", "warmup_steps",
    "round_trip_images", "validation_images", "caption_dropout", "ema_decay", "label_smoothing", "num_workers",
    "shuffle_buffer", "max_bad_fraction", "seed", "min_new_tokens", "gallery", "weight_decay", "betas",
    "seed_everything", "fast_dev_run", "min_epochs", "min_steps", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "overfit_batches", "num_sanity_val_steps", "gradient_clip_val", "old_decay",
    "reward_images",
    "reload_dataloaders_every_n_epochs",
}  # fmt: skip
"""Numbers of which 0 says something."""

MINUS_ONE = {"trainer.devices", "trainer.max_steps", "trainer.max_epochs", "trainer.num_sanity_val_steps"}
"""Numbers of which Lightning takes -1 for all."""

AT_MOST = {
    "label_smoothing": 1, "caption_dropout": 1, "max_bad_fraction": 1, "top_p": 1, "nucleus_p": 1, "seed": 2**32 - 1,
    "seed_everything": 2**32 - 1, "noise_level": 1,
}  # fmt: skip
BELOW = {"ema_decay": 1, "betas": 1, "old_decay": 1, "clip": 1}


class Parsed(Exception):
    """Parsing came to its end."""


def parsers(monkeypatch):
    """The parser of train.py and that of each command of evaluate.py."""
    found = {}

    def keep(name):
        def parse(parser, arguments):
            found[name] = parser
            raise Parsed

        return parse

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(cli, "parse", keep("train"))
    with pytest.raises(Parsed):
        cli.train([])
    for command in ("captions", "images", "matrix", "judges", "score", "questions"):
        monkeypatch.setattr("cyclefit.config.settings.parse", keep(command))
        with pytest.raises(Parsed):
            evaluate.main([command])
    monkeypatch.undo()
    return found


@cache
def configs():
    """The arguments that read each config, and the parser's name they go to."""
    read = {}
    paths = [path for path in CONFIGS.glob("*.yaml") if path.name != "miniature.yaml"]
    for path in sorted(paths, key=lambda p: (p.name != "miniature_blip.yaml", p.name)):
        under = [f"--config={whole}" for start, whole in COMPLETED.items() if path.name.startswith(start)]
        text = path.read_text()
        named = re.search(r"evaluate.py (images|judges|matrix)", text)
        command = "train" if "\nmodel:" in text else named[1] if named else "captions"
        read[path.name] = command, resolve_configs([*under, f"--config={path}"])
    return read


def is_number(hint):
    from cyclefit.config.settings import _options

    return any(
        o in (int, float) or (get_origin(o) in (tuple, list) and is_number(get_args(o)[0])) for o in _options(hint)
    )


def numbers(node, key):
    """Every number of every class that is named below a key: its own key, its class, its annotation."""
    from cyclefit.config.settings import _base, _imported, _options, parameters

    cls = _imported(str(node.get("class_path"))) if "class_path" in node else None
    settings = node.get("init_args") or {} if cls else {k: v for k, v in node.items() if isinstance(v, dict)}
    known = parameters(cls)[0] if cls else {}
    for name, parameter in known.items():
        if name not in ("params",) and is_number(parameter.annotation):
            yield f"{key}.{name}", cls, parameter.annotation
    for name, value in settings.items():
        if isinstance(value, dict):
            bases = [_base(o) for o in _options(known[name].annotation)] if name in known else [None]
            if "class_path" not in value and bases[0]:
                value = {"class_path": f"{bases[0].__module__}.{bases[0].__name__}", "init_args": value}
            yield from numbers(value, f"{key}.{name}".lstrip("."))


@pytest.fixture(scope="module")
def known():
    """Every number of every class that a config names: its annotation and a way to set it, by class and name."""
    from cyclefit.config.settings import TRAINER, parse

    patch, found = pytest.MonkeyPatch(), {}
    made = parsers(patch)
    plain = {"score": ["--candidates=a", "--references=b"]}
    plain |= {"questions": ["--prompts=a", "--images=b", "--captioner=VisionLanguage"]}
    for command, arguments in [*configs().values(), *plain.items()]:
        parser = made[command]
        merged = parse(parser, arguments).as_dict()
        for action in parser._actions:
            hint = TRAINER.get(action.dest, getattr(action, "_typehint", str))
            if is_number(hint):
                found.setdefault((command, action.dest), (hint, parser, arguments, action.dest))
        for key, cls, hint in numbers(merged, ""):
            found.setdefault((cls, key.rpartition(".")[2]), (hint, parser, arguments, key.lstrip(".")))
    return found


def allowed(key, value):
    """What a number may be, said once more."""
    name = key.rpartition(".")[2]
    if not math.isfinite(value):
        return False
    if value < 0:
        return value == -1 and key in MINUS_ONE
    if value == 0:
        return name in ZERO or (name == "alpha" and "judges" in key)  # of a likelihood, not of LoRA
    if name == "num_samples" and value == 1:
        return None  # of a decoding, not of a policy gradient
    return not (value > AT_MOST.get(name, math.inf) or value >= BELOW.get(name, math.inf))


def test_every_number_has_a_range(known):
    from cyclefit.config.settings import Search

    assert len(known) > 90
    for (_, dest), (hint, _, _, key) in known.items():
        name = dest.rpartition(".")[2]
        far = AT_MOST.get(name, BELOW.get(name, 10**9))
        for value in (-1, 0, 1, math.nan, math.inf, -math.inf, far, far + 1, -far, -2):
            given = [0.5, value] if name == "betas" else value
            said = [problem.sentence for problem in Search({}).problems(given, hint, key)]
            if (right := allowed(key, value)) is not None:
                assert (not said) == right, (key, value, said)
            for sentence in said:
                assert sentence.startswith(key), sentence
                assert " must be a " in sentence, sentence
                assert sentence.endswith(f"not {value}") or not math.isfinite(value), sentence


def test_parsing_holds_every_number_against_its_range(known, tmp_path):
    from cyclefit.config.settings import parse

    for (cls, dest), (_, parser, arguments, key) in known.items():
        name = dest.rpartition(".")[2]
        if name == "betas":
            continue
        value = -2 if allowed(key, -1) else -1
        more = [] if arguments else ["--candidates=a", "--references=b"]
        setting = f"--{key}={value}"
        if key.startswith("judges."):  # their names are not for the command line
            judge = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": {name: value}}
            (tmp_path / "own.yaml").write_text(yaml.safe_dump({"judges": {"own": judge}}))
            key, setting = f"judges.own.{name}", f"--config={tmp_path / 'own.yaml'}"
        with pytest.raises(UserError, match=rf"(^|: ){key} must be a .*, not {value}") as caught:
            parse(parser, [*arguments, *more, setting])
        assert "\n" not in str(caught.value)


def test_constructors_hold_every_number_against_its_range(known):
    """Before they load anything."""
    from cyclefit.config.settings import parameters

    classes = {cls for cls, _ in known if inspect.isclass(cls) and cls.__module__.startswith("cyclefit.")}
    assert len(classes) > 8
    for cls in (*classes, Decoding, ShardData):
        own = parameters(cls)[0]
        required = {name: None for name, parameter in own.items() if parameter.default is parameter.empty}
        for name, parameter in own.items():
            if is_number(parameter.annotation):
                for value in (-1.0, math.nan) if range_of(parameter.annotation)[0] is float else (-1,):
                    with pytest.raises(UserError, match=rf"\w: {name} must be a .*, not {value}"):
                        cls(**required, **{name: value})


def test_inherited_settings_are_held_against_their_ranges():
    """Those that a constructor passes on to its base class, in the name of the class itself."""
    for kind, name in ((Flux, "image_size"), (Flux, "batch_size"), (TruncatedSampling, "text_weight")):
        with pytest.raises(UserError, match=rf"^{kind.__name__}: {name} must be a .* number .*, not -1"):
            kind(**{name: -1})


def test_every_config_parses():
    from cyclefit.config.settings import parse

    made = parsers(pytest.MonkeyPatch())
    for command, arguments in configs().values():
        parse(made[command], arguments)


CROSSED = {
    "min_timestep 600 must be below max_timestep 600": [
        lambda: SoftCaptionDenoising(min_timestep=600, max_timestep=600),
        lambda: OneStepCaptioning(min_timestep=600, max_timestep=600),
        lambda: Denoising(min_timestep=600, max_timestep=600),
    ],
    "num_timesteps must be at most 2": [lambda: Denoising(max_timestep=2, num_timesteps=3)],
    "set num_others to 1 or more": [lambda: Denoising(contrast=0.5)],
    "grad_steps must be at most steps, 2, not 3": [lambda: TruncatedSampling(grad_steps=3, steps=2)],
    "set num_images to 2 or more": [lambda: TruncatedSampling(contrastive=True, num_images=1)],
    "min_new_tokens must be at most max_new_tokens, 30, not 31": [lambda: Decoding(min_new_tokens=31)],
    "targets must name at least one layer": [lambda: Lora(targets=())],
    "lr must be a finite number above 0, not inf": [lambda: optimized(lr=math.inf)],
    "optimizer: Invalid": [lambda: optimized(lr=math.nan), lambda: optimized(lr=-1.0), lambda: optimized(betas=(2, 0))],
    "optimizer: .*unexpected": [lambda: optimized(lrr=1)],
}


def optimized(**settings):
    module = LightningModule.__new__(CaptionerFinetune)
    Finetune.__init__(module, lambda parameters: torch.optim.AdamW(parameters, **settings), 0, 0)


@pytest.mark.parametrize("said", CROSSED)
def test_numbers_are_held_against_each_other(said):
    for made in CROSSED[said]:
        with pytest.raises(UserError, match=said):
            made()


def test_numbers_are_held_against_the_models(generator, captioner, weights):
    partners = Partners(generator, None, captioner)
    for cycle in (SoftCaptionDenoising(max_timestep=5000), PolicyGradient(Denoising(max_timestep=5000))):
        with pytest.raises(UserError, match=r"max_timestep must be at most 1000, the generator's, not 5000"):
            cycle.prepare(captioner, partners)
    with pytest.raises(UserError, match=r"max_timestep must be at most 1000, the generator's, not 5000"):
        OneStepCaptioning(max_timestep=5000).prepare(generator, partners)
    with pytest.raises(UserError, match=r"Regeneration: steps must be at most 1000"):
        PolicyGradient(Regeneration(steps=1001)).prepare(captioner, partners)
    with pytest.raises(UserError, match=r"grad_steps must be at most steps, 8, the generator's own, not 9"):
        TruncatedSampling(grad_steps=9).prepare(generator, partners)
    with pytest.raises(UserError, match=r"max_new_tokens must be at most \d+, .* not 100000"):
        PolicyGradient(Denoising(), max_new_tokens=100_000).prepare(captioner, partners)
    for cycle in (PolicyGradient(Denoising(num_others=1)), OneStepCaptioning(contrastive=True)):
        with pytest.raises(UserError, match=r"a batch size of 1 leaves fewer than 1 other images to contrast with"):
            cycle.check_batch(1)
    folder = str(weights / "stable-diffusion")
    with pytest.raises(UserError, match=r"image_size must be a multiple of 4, .* not 33"):
        StableDiffusion(folder, image_size=33)
    with pytest.raises(UserError, match=r"StableDiffusion: steps must be at most 1000, .* not 1001"):
        StableDiffusion(folder, steps=1001)
    for target in ("to_qq", "attn1"):
        with pytest.raises(UserError, match=rf"no layer '{target}'; its layers are .*to_k, to_out\.0, to_q, to_v"):
            StableDiffusion(folder, lora=Lora(targets=("to_k", target)))


@pytest.mark.parametrize(
    ("config", "setting", "said"),
    [
        ("cycle_blip_reward", "model.cycle.num_images=9", "num_images must be at most 8, the batch size, not 9"),
        ("cycle_blip_reward", "model.cycle.reward.num_others=8", "num_images 8 leaves fewer than 8 other images"),
        ("cycle_sd", "data.batch_size=4", "num_images must be at most 4, the batch size, not 8"),
        ("cycle_both", "model.text_cycle.num_images=9", "num_images must be at most 8, the batch size, not 9"),
        ("blip", "model.max_new_tokens=100000", r"max_new_tokens must be at most \d+, .* not 100000"),
    ],
)
def test_numbers_are_held_against_the_batch_before_the_first_step(config, setting, said, launch, tmp_path):
    with pytest.raises(UserError, match=said):
        launch(f"miniature_{config}.yaml", "run", *[f"--{one}" for one in setting.split()])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_gpu_that_is_not_there(launch, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.accelerator asks for a GPU, but torch finds none"):
        launch("miniature_blip.yaml", "run", "--trainer.accelerator=gpu")


@pytest.mark.parametrize("setting", ["trainer.strategy=dpp", "trainer.devices=-3", "trainer.limit_val_batches=1.5"])
def test_what_the_trainer_refuses_is_one_sentence(setting, launch):
    with pytest.raises(UserError, match=r"^trainer") as caught:
        launch("miniature_blip.yaml", "run", f"--{setting}")
    assert "\n" not in str(caught.value)


TYPOS = {
    "model.cycle.init_args.wieght=1": "there is no setting model.cycle.wieght; did you mean model.cycle.weight?",
    "model.captoner.trainable=all": "there is no setting model.captoner; did you mean model.captioner?",
    "model.optimizer.init_args.learning_rat=1": "model.optimizer.learning_rat; AdamW has lr, betas, ",
    "model.cycle.class_path=cyclefit.cycles.PolicyGradiant": "did you mean PolicyGradient?",
    "model.cycle.class_path=cyclefit.cycle.PolicyGradient": "did you mean PolicyGradient?",
    "model.cycle.class_path=PolicyGradiant": "did you mean PolicyGradient?",
    "model.cycle.class_path=nowhere.Whatever": "there are CaptionDpo, PolicyGradient, SoftCaption",
    "model.cycle.class_path=cyclefit.judges.ImageText": "must be an ImageCycle (CaptionDpo, PolicyGradient, SoftC",
    "model.cycle.class_path=cyclefit.cycles.PolicyGradient": "PolicyGradient needs a reward: set model.cycle.reward",
    "model.optimizer.class_path=torch.optim.AdmW": "no class torch.optim.AdmW; did you mean AdamW?",
    "model.class_path=cyclefit.finetune.CaptionerFinetun": "did you mean CaptionerFinetune?",
    "model.captioner.init_args.trainable=decodr": "model.captioner.trainable must be one of cross-attention queries, "
    'cross-attention, decoder, all, lora or null, not "decodr"; did you mean decoder?',
    "model.cycle.init_args.weight=abc": 'model.cycle.weight must be a finite number of at least 0, not "abc"',
    "model.cycle.init_args.weight=.nan": "model.cycle.weight must be a finite number of at least 0, not nan",
    "model.optimizer.init_args.lr=.nan": "model.optimizer.lr must be a finite number above 0, not nan",
    "model.cycle.init_args.contrastive=maybe": 'model.cycle.contrastive must be true or false, not "maybe"',
    "model.generator.init_args.steps=2.5": "model.generator.steps must be a whole number of at least 1, not ",
    "model.generator.init_args.imag_size=64": "model.generator.imag_size; did you mean model.generator.image_size?",
    "model.generator.init_args.variants=fp16": "model.generator.variants; did you mean model.generator.variant?",
    "model.generator.init_args.image_size=0": "model.generator.image_size must be a whole number of at least 1, not 0",
    "model.generator.init_args.lora.rnk=4": "there is no setting model.generator.lora.rnk; did you mean model.gener",
    "data.crop=centre": 'data.crop must be one of random, center, not "centre"; did you mean center?',
    "data.image_siz=32": "there is no setting data.image_siz; did you mean data.image_size?",
    "trainer.max_stepz=3": "there is no setting trainer.max_stepz; did you mean trainer.max_steps?",
    "modle.x=1": "there is no setting modle; did you mean model?",
}


def nested(setting):
    """A setting of the command line as a config has it."""
    key, _, value = setting.partition("=")
    place = tree = {}
    parts = key.split(".")
    for k, part in enumerate(parts[:-1]):
        if k and parts[k - 1] == "model" and part not in ("init_args", "class_path"):
            place = place.setdefault("init_args", {})
        place = place.setdefault(part, {})
    if parts[:-1] == ["model"] and parts[-1] != "class_path":
        place = place.setdefault("init_args", {})
    place[parts[-1]] = yaml.safe_load(value)
    return tree


def one_sentence(command, arguments, capsys):
    with pytest.raises(UserError) as caught:
        command(arguments)
    said = str(caught.value)
    assert "\n" not in said
    assert not {"Union", "Parser", "NestedArg", "usage"} & set(said.split())
    assert "usage:" not in "".join(capsys.readouterr())
    return said


@pytest.mark.parametrize("setting", TYPOS)
def test_a_typo_is_one_sentence(setting, tmp_path, monkeypatch, capsys):
    """On the command line, with `init_args` and without, and in a config, which is named."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(ROOT)
    base = ["--config", "miniature_cycle_blip.yaml"]
    for written in {setting, setting.replace("init_args.", "")}:
        assert TYPOS[setting] in one_sentence(cli.train, [*base, f"--{written}"], capsys)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(nested(setting)))
    said = one_sentence(cli.train, [*base, "--config", str(tmp_path / "own.yaml")], capsys)
    assert said.startswith(f"{tmp_path / 'own.yaml'}: ")
    assert TYPOS[setting].rpartition('"decodr"')[0] in said
    assert not (tmp_path / "runs").exists()


EVALUATIONS = {
    "captoins": "not 'captoins'; did you mean captions?",
    "captions --config miniature_evaluate.yaml --num_candidates=0": "num_candidates must be a whole number of at",
    "captions --config miniature_evaluate.yaml --num_candidate=4": "num_candidate; did you mean num_candidates?",
    "captions --config miniature_evaluate.yaml --batch_size=0": "batch_size must be a whole number of at least 1",
    "captions --config miniature_evaluate.yaml --captioner.trainable=decodr": "did you mean decoder?",
    "captions --config miniature_evaluate.yaml --generator.stps=2": "generator.stps; did you mean generator.steps?",
    "captions --config miniature_evaluate.yaml --scorer=cyclefit.models.OpnClip": "did you mean OpenClip",
    "captions --config miniature_evaluate.yaml --devices=0": "devices must be a whole number of at least 1, not 0",
    "images --config miniature_evaluate_images.yaml --num_candidates=0": "num_candidates must be a whole number",
    "images --config miniature_evaluate_images.yaml --held_out=x": "held_out: there is no class x; there are OpenClip",
    "captions": "captioner is missing: set it in a config, --config NAME, or with --captioner",
    "score --candidates=a --references=b --tokenizer=pbt": 'must be one of own, ptb, not "pbt"; did you mean ptb?',
    "score --candidates=a --references=b --java_timeout=.nan": "java_timeout must be a finite number above 0, not nan",
    "compare --out=x --sed=1": "there is no setting sed",
}


@pytest.mark.parametrize("command", EVALUATIONS)
def test_a_typo_in_an_evaluation_is_one_sentence(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert EVALUATIONS[command] in one_sentence(evaluate.main, command.split(), capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "is not a config: while parsing"), ("- a", "has no `key: value` lines"), ("a\0", "config")],
)
def test_a_config_that_is_none(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "own.yaml").write_text(text)
    assert said in one_sentence(cli.train, ["--config", str(tmp_path / "own.yaml")], capsys)


def test_the_nearest_config_is_named():
    for name in ("cycle_blib.yaml", "cycle_blib", "configs/cycle_blp.yaml"):
        with pytest.raises(
            UserError, match=r"there is no config '.*'; did you mean cycle_blip\.yaml\? There are ablat"
        ):
            resolve_configs(["--config", name])
    with pytest.raises(UserError, match=r"there is no config 'zzz'; in configs/ are ablation"):
        resolve_configs(["--config=zzz"])


def test_a_config_is_read_on_top_of_its_base(tmp_path, monkeypatch):
    """The base is beside the yaml or in configs/; a second pass over the resolved arguments changes nothing."""
    blip, miniature = (str(CONFIGS / f"{name}.yaml") for name in ("blip", "miniature"))
    (tmp_path / "first.yaml").write_text("base: [blip.yaml, 'miniature.yaml']  # in configs/\nname: first\n")
    (tmp_path / "second.yaml").write_text("name: second\nbase: first.yaml\n")
    first, second = (str(tmp_path / f"{name}.yaml") for name in ("first", "second"))
    whole = ["--config", blip, "--config", miniature, "--config", first, "--config", second, "--name=x"]
    assert resolve_configs(["--config", second, "--name=x"]) == whole
    assert resolve_configs(whole) == whole
    assert resolve_configs([f"--config={first}", "-c", second]) == [
        f"--config={x}" for x in (blip, miniature, first)
    ] + [
        "-c",
        second,
    ]
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    assert resolve_configs([f"--config={tmp_path / 'loop.yaml'}"]) == [f"--config={tmp_path / 'loop.yaml'}"]
    (tmp_path / "lines.yaml").write_text("base:\n  - blip.yaml\n")
    with pytest.raises(UserError, match=r"lines\.yaml: write base: NAME or base: \[NAME, NAME\] on one line"):
        resolve_configs(["--config", str(tmp_path / "lines.yaml")])
    (tmp_path / "lost.yaml").write_text("base: blib.yaml\n")
    with pytest.raises(UserError, match=r"there is no config 'blib.yaml'; did you mean blip.yaml"):
        resolve_configs(["--config", str(tmp_path / "lost.yaml")])
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(UserError, match="^base: .* give --config several times"):
        cli.train(["--config=miniature_blip", "--base=blip.yaml"])


@pytest.mark.parametrize("full", [False, True])
def test_classes_have_short_names(full, tmp_path):
    """Beside their full paths, in yaml files and on the command line."""
    from cyclefit.config.settings import parse

    def path(module, name):
        return f"cyclefit.{module}.{name}" if full else name

    def spec(module, name, **settings):
        return {"class_path": path(module, name), "init_args": settings}

    reward = spec("judges", "Regeneration", scorer=spec("models", "OpenClip", model="ViT-B-32"))
    model = spec(
        "finetune", "CaptionerFinetune", captioner=spec("models", "Blip"), generator=spec("models", "StableDiffusion"),
        cycle=spec("cycles", "PolicyGradient", reward=reward),
    )  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "model": model}))
    parser = parsers(pytest.MonkeyPatch())["train"]
    arguments = [f"--config={tmp_path / 'own.yaml'}", f"--model.scorer={path('models', 'OpenClip')}"]
    parsed = parse(parser, arguments).model
    expected = ["cyclefit.finetune.CaptionerFinetune", "cyclefit.models.Blip", "cyclefit.models.StableDiffusion"]
    expected += ["cyclefit.models.OpenClip", "cyclefit.cycles.PolicyGradient", "cyclefit.judges.Regeneration"]
    settings = parsed.init_args
    classes = [parsed, settings.captioner, settings.generator, settings.scorer, settings.cycle]
    assert [part.class_path for part in (*classes, settings.cycle.init_args.reward)] == expected
    assert settings.cycle.init_args.reward.init_args.scorer.class_path == "cyclefit.models.OpenClip"
