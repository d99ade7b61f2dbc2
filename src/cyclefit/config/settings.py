"""One sentence about what is wrong with a command line and its configs, which names the setting.

jsonargparse decides whether they can be parsed. If not, they are searched for the first setting that is wrong; if so,
their numbers are checked against the ranges of `cyclefit.config.ranges`.
"""

import importlib
import inspect
import json
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace
from torch.optim import Optimizer

from cyclefit import UserError
from cyclefit.config.paths import working
from cyclefit.config.ranges import OPTIMIZER, Count, Natural, NonNegative, Positive, Range, Seed, range_of, wanted

CountOrAll = Annotated[int, Range(1, also=-1)]

TRAINER = {
    "seed_everything": bool | Seed,
    "trainer.devices": list[int] | str | CountOrAll,
    "trainer.num_nodes": Count,
    "trainer.fast_dev_run": bool | Natural,
    "trainer.max_epochs": CountOrAll | None,
    "trainer.min_epochs": Natural | None,
    "trainer.max_steps": CountOrAll,
    "trainer.min_steps": Natural | None,
    "trainer.limit_train_batches": Positive | None,
    "trainer.limit_val_batches": NonNegative | None,
    "trainer.limit_test_batches": NonNegative | None,
    "trainer.limit_predict_batches": NonNegative | None,
    "trainer.overfit_batches": NonNegative,
    "trainer.val_check_interval": Positive | str | dict | None,
    "trainer.check_val_every_n_epoch": Count | None,
    "trainer.num_sanity_val_steps": Annotated[int, Range(-1)] | None,
    "trainer.log_every_n_steps": Count | None,
    "trainer.accumulate_grad_batches": Count,
    "trainer.gradient_clip_val": NonNegative | None,
    "trainer.reload_dataloaders_every_n_epochs": Natural,
}
"""Numbers of Lightning's command line."""

BASE = "the configs that a yaml is read on top of; on the command line, give --config several times instead"


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The arguments as parsed by a parser that was made with `exit_on_error=False`.

    Raises:
        UserError: something is wrong; the message names the first such setting, and the nearest right one.

    """
    if not any(action.dest == "base" for action in parser._actions):
        parser.add_argument("--base", type=str | list[str] | None, help=BASE)
    if any(argument.partition("=")[0] == "--base" for argument in arguments):
        raise UserError(f"base: {BASE}")
    actions = [action for action in parser._actions if action.dest.rpartition(".")[2] != "help"]
    hints = {action.dest: getattr(action, "_typehint", Any) for action in actions}
    hints |= {key: hint for key, hint in TRAINER.items() if key in hints}
    try:
        with working():
            config = parser.parse_args(arguments)
    except ArgumentError as error:
        required = {action.dest for action in actions if action.required}
        for problem, source in _search(arguments, hints, required):
            raise UserError(source + problem.sentence) from None
        raise UserError(_condensed(str(error))) from None
    config.pop("base")
    for problem in Search(hints).settings(config.as_dict()):
        if problem.of_range:
            sources = [source for found, source in _search(arguments, hints) if found.key == problem.key]
            raise UserError((sources[-1] if sources else "") + problem.sentence)
    return config


def _condensed(message: str) -> str:
    """The parser's own message without the types that were tried."""
    keys = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    # It does not take null for what is deeper than one class.
    if nested := re.search(r"Given value: NestedArg\(key='[^']*', val=(.*)\)", message):
        value = "null" if nested[1] == "None" else nested[1]
        return f"{keys} cannot be set to {value} on the command line: write it into a yaml, given as a second --config"
    framing = r"(- )?(Parser key|Problem with given class_path|Does not validate|Subtypes|Errors|Given value type)"
    lines = [line.strip(" -") for line in message.splitlines() if not re.match(rf"\s*{framing}", line)]
    given = "".join([f"; {line}" for line in lines if line.startswith("Given value")][:1])
    return f"{keys}: {lines[0]}{given}" if keys and lines else " ".join(message.split())


class Problem(NamedTuple):
    """A setting that is wrong."""

    key: str
    sentence: str
    of_range: bool = False


def _search(arguments: list[str], hints: dict[str, Any], required: Iterable[str] = ()) -> Iterator[tuple[Problem, str]]:
    """Everything that is wrong in the order it is given, each with the config it is in, `PATH: `, or nothing."""
    search, rest = Search(hints), list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("-"):
            continue
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if flag in ("-c", "--config"):
            search.source, values = f"{text}: ", _read(text)
        else:
            search.source, values = "", _value(text)
            for part in reversed(flag.lstrip("-").removesuffix("+").split(".")):
                values = {part: values}
        for problem in search.settings(values):
            yield problem, search.source
    for key in sorted(set(required) - search.given):
        yield Problem(key, f"{key} is missing: set it in a config, --config NAME, or with --{key}"), ""
    for key, known in search.classes.items():
        for name in sorted(known.required - known.given):
            yield Problem(key, f"{known.cls.__name__} needs a {name}: set {key}.{name}"), known.source


def _read(path: str) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a config: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a config: it has no `key: value` lines")
    return values


def _value(text: str) -> Any:
    """A value of the command line: structures and null as YAML, everything else as text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, dict | list) else text


class Known(NamedTuple):
    """The class that a setting has so far."""

    cls: Any
    required: set[str]
    """The class's settings that have no default."""
    given: set[str]
    source: str
    """Where the class was named."""


class Search:
    """Searches settings for problems, those of one config or argument after the other."""

    def __init__(self, hints: dict[str, Any]):
        self.hints = hints
        """The annotations of the command's own settings, by their full keys."""
        self.source = ""
        self.given: set[str] = set()
        self.classes: dict[str, Known] = {}

    def settings(self, values: dict, prefix: str = "") -> Iterator[Problem]:
        """Problems of the command's own settings."""
        names = sorted({key[len(prefix) :].split(".")[0] for key in self.hints if key.startswith(prefix)})
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and any(hint.startswith(f"{key}.") for hint in self.hints):
                yield from self.settings(value, f"{key}.")
            elif key not in self.hints:
                yield _unknown(key, names, "the settings there are")
            elif key != "config":
                self.given.add(key)
                yield from self.problems(value, self.hints[key], key)

    def problems(self, value: Any, hint: Any, key: str) -> Iterator[Problem]:
        """Problems of a value for a parameter of this annotation."""
        options, number = _options(hint), range_of(hint)
        if number and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                if (given := float(value)) not in number[1] and not (number[0] is int and given % 1):
                    yield Problem(key, f"{key} must be {wanted(*number)}, not {value}", True)
                    return
            except ValueError:
                pass
        if value is None:
            self.classes.pop(key, None)
        if any(_accepts(value, option) for option in options):
            return
        for option in options:
            inner = get_args(option)
            if isinstance(value, dict) and get_origin(option) is dict:
                for name, x in value.items():
                    yield from self.problems(x, inner[1], f"{key}.{name}")
                return
            if isinstance(value, list | tuple) and _holds_many(option):
                each = inner[:1] * len(value) if len(inner) != len(value) else inner
                for k, (x, of) in enumerate(zip(value, each, strict=True)):
                    yield from self.problems(x, of, f"{key}.{k}")
                return
        bases = tuple(base for option in options if (base := _base(option)))
        if bases and isinstance(value, dict | str):
            # A callable makes the object later, from first arguments that the caller gives.
            later = max((len(get_args(o)[0]) for o in options if get_origin(o) is Callable), default=0)
            yield from self._of_class(value, bases, later, key)
            return
        literals = list(dict.fromkeys(str(x) for o in options if get_origin(o) is Literal for x in get_args(o)))
        words = [f"one of {', '.join(literals)}"] if literals else []
        words += [wanted(*number)] if number else []
        words += [_word(o) for o in options if get_origin(o) is not Literal and not (number and o == number[0])]
        near = "".join(f"; did you mean {x}?" for x in get_close_matches(str(value), literals, 1))
        yield Problem(key, f"{key} must be {' or '.join(words)}, not {_shown(value)}{near}")

    def _of_class(self, value: dict | str, bases: tuple[type, ...], later: int, key: str) -> Iterator[Problem]:
        """Problems of a class and its settings, but for the first `later` ones."""
        if isinstance(value, str):
            if Path(value).suffix in (".yaml", ".yml", ".json"):
                return
            value = {"class_path": value}
        settings = (value.get("init_args") or {}) if value.keys() & {"class_path", "init_args"} else value
        known = self.classes.get(key)
        if "class_path" in value:
            cls = class_named(str(value["class_path"]), bases, key)
            if beside := [name for name in value if name not in ("class_path", "init_args", "dict_kwargs")]:
                inner = f"{key}.{beside[0]}"
                cls = Problem(inner, f"{inner} stands beside class_path: put it under init_args")
        elif known:
            cls = known.cls
        elif later:
            return
        elif inspect.isabstract(bases[0]):
            cls = Problem(key, f"{key} has no class_path; there are {', '.join(_subclasses(bases))}")
        else:
            cls = bases[0]
        if not isinstance(settings, dict):
            cls = Problem(key, f"the init_args of {key} must be `key: value` lines, not {_shown(settings)}")
        if isinstance(cls, Problem):
            yield cls
            return
        named, others = parameters(cls)
        named = dict(list(named.items())[later:])
        required = {name for name, parameter in named.items() if parameter.default is parameter.empty and not later}
        given = settings.keys() | (known.given if known else set())
        source = known.source if known and known.cls is cls else self.source
        self.classes[key] = Known(cls, required, given, source)
        for name, x in settings.items():
            if name in named:
                yield from self.problems(x, named[name].annotation, f"{key}.{name}")
            elif not others:
                yield _unknown(f"{key}.{name}", list(named), f"{cls.__name__} has")


def class_named(path: str, bases: tuple[type, ...], key: str) -> Any:
    """The class of this path or short name, or a Problem."""
    classes = _subclasses(bases)
    cls = _imported(path) or classes.get(path)
    if cls is None:
        near = get_close_matches(path.rpartition(".")[2], classes, 1)
        right = f"did you mean {near[0]}?" if near else f"there are {', '.join(classes)}"
        return Problem(key, f"{key}: there is no class {path}; {right}")
    if inspect.isclass(cls) and not issubclass(cls, bases):
        return Problem(key, f"{key} must be {' or '.join(map(_word, bases))} ({', '.join(classes)}), not {path}")
    return cls


def _subclasses(bases: Iterable[type]) -> dict[str, type]:
    """The classes that can be made of these, by their short names."""
    found: dict[str, type] = {}
    for base in bases:
        found |= _subclasses(base.__subclasses__())
        if not inspect.isabstract(base):
            found[base.__name__] = base
    return dict(sorted(found.items()))


def _imported(path: str) -> Any:
    """What a dotted path leads to; None if nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except (ImportError, ValueError, TypeError):
        return None


def parameters(cls: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The settings of a class, and whether it may take others.

    Where a constructor takes `**settings`, those of the next base class that has one are among them.
    """
    if not inspect.isclass(cls):
        return {}, True
    found: dict[str, inspect.Parameter] = {}
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        try:
            hints = typing.get_type_hints(init, include_extras=True)
        except (NameError, TypeError, AttributeError):
            hints = {}
        others = False
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                others = True
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                hint = hints.get(name, parameter.annotation)
                hint = OPTIMIZER.get(name, hint) if issubclass(cls, Optimizer) else hint
                found.setdefault(name, parameter.replace(annotation=hint))
        if not others:
            return found, False
    return found, True


def _unknown(key: str, names: list[str], what: str) -> Problem:
    place, _, name = key.rpartition(".")
    near = get_close_matches(name, names, 1)
    right = f"did you mean {f'{place}.{near[0]}' if place else near[0]}?" if near else f"{what} {', '.join(names)}"
    return Problem(key, f"there is no setting {key}; {right}")


def _options(hint: Any) -> list[Any]:
    """The alternatives of an annotation, without their notes."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _options(get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _base(option: Any) -> type | None:
    """The class whose subclasses an alternative takes; None if it takes values."""
    if get_origin(option) is Callable:
        option = get_args(option)[-1]
    values = ("builtins", "datetime", "pathlib")
    if not inspect.isclass(option) or get_args(option) or option.__module__ in values or issubclass(option, str):
        return None
    return option


def _holds_many(option: Any) -> bool:
    origin = get_origin(option)
    return inspect.isclass(origin) and issubclass(origin, Iterable)


def _accepts(value: Any, option: Any) -> bool:
    """Whether an alternative takes a value as it is; alternatives of unknown kinds take everything."""
    if option is type(None):
        return value is None
    if option is bool:
        return str(value).lower() in ("true", "false")
    if option in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        try:
            return float(value) is not None if option is float else int(value) == float(value)
        except (ValueError, OverflowError):
            return False
    if inspect.isclass(option) and issubclass(option, str):
        return isinstance(value, str)
    if get_origin(option) is Literal:
        return str(value) in map(str, get_args(option))
    if option in (dict, list, tuple):
        return isinstance(value, option)
    return _base(option) is None and not _holds_many(option)


def _word(option: Any) -> str:
    """An alternative of an annotation, in words."""
    if _holds_many(option):
        return "`key: value` lines" if get_origin(option) is dict else "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    name = getattr(option, "__name__", str(option))
    return words.get(option, f"{'an' if name[0] in 'AEIO' else 'a'} {name}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."
