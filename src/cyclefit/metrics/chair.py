"""Objects that a caption names, held against those in the photograph: CHAIR.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018 (arXiv 1809.02156). Categories, synonyms and the
treatment of double words are those published with it (github.com/LisaAnne/Hallucination, data/synonyms.txt and
utils/chair.py); the code is ours. Every mention counts, repeated ones too:

    CHAIRi = mentions of a category that is not in the image / mentions
    CHAIRs = captions with such a mention / captions
    object recall = categories of the images that are mentioned / categories of the images
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cyclefit import UserError
from cyclefit.metrics.facts import FactCheck, Statement

SYNONYMS = {
    "person": "adult baby baker bicyclist biker boy bride buyer caller camper chef child children cop cowboy coworker "
    "doctor drinker driver father female foreigner gentleman girl grandchild groom guy hunter kid lady male man mother "
    "offender officer passenger patient people pitcher player policeman politician rider serviceman shopper sister "
    "skateboarder skater skier snowboarder soldier solider student teenager thief traveler trespasser villager walker "
    "woman worker",
    "bicycle": "bike minibike trike unicycle",
    "car": "automobile cab coupe hatchback jeep limo minivan sedan suv taxi taxicab van",
    "motorcycle": "moped motor_bike motor_cycle motorbike scooter",
    "airplane": "air_plane airbus aircraft biplane jet jetliner monoplane plane seaplane",
    "bus": "minibus trolley",
    "train": "caboose locomotive tramway",
    "truck": "firetruck hauler lorry pickup",
    "boat": "barge battleship canoe catamaran dinghy ferry ferryboat freighter houseboat kayak lifeboat liner "
    "motorboat paddleboat pontoon powerboat riverboat rowboat sailboard sailboat schooner ship skiff speedboat "
    "steamboat steamship trawler tugboat vessel watercraft yacht",
    "traffic light": "stop_light stoplight street_light streetlight traffic_signal",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "pew",
    "bird": "blackbird bluebird bluejay buzzard chickadee cockatiel cockatoo condor cormorant cowbird crow duck egret "
    "falcon finch flamingo fowl goose gosling gull heron hummingbird kingfisher loon lorikeet macaw magpie mallard "
    "oriole osprey ostrich owl parakeet parrot peacock peafowl pelican pheasant pigeon puffin quail raven robin "
    "rooster sandpiper seabird seagull shorebird songbird sparrow swan turkey vulture warbler waterbird waterfowl "
    "willet woodpecker",
    "cat": "feline kitten tabby",
    "dog": "beagle brindle bulldog canine chihuahua cocker collie corgi dachshund doberman doggie doggy greyhound "
    "hound husky labrador mutt pitbull poodle pug pup puppy retriever rottweiler schnauzer sheepdog spaniel terrier "
    "weimaraner whippet",
    "horse": "bronc bronco clydesdale colt equine foal mare mustang palomino pony racehorse stallion",
    "sheep": "ewe goat lamb ram",
    "cow": "bison buffalo bull calf cattle heifer holstein ox oxen zebu",
    "elephant": "",
    "bear": "panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack",
    "umbrella": "",
    "handbag": "briefcase purse wallet",
    "tie": "bow bow_tie",
    "suitcase": "luggage suit_case",
    "frisbee": "",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "",
    "skateboard": "",
    "surfboard": "longboard shortboard skimboard wakeboard",
    "tennis racket": "racket",
    "bottle": "",
    "wine glass": "",
    "cup": "",
    "fork": "",
    "knife": "knive pocketknife",
    "spoon": "",
    "bowl": "container",
    "banana": "",
    "apple": "",
    "sandwich": "burger cheeseburger hamburger sub",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "",
    "pizza": "",
    "donut": "bagel doughnut",
    "cake": "cheesecake coffeecake cupcake pancake shortcake",
    "chair": "seat stool",
    "couch": "chesterfield futon loveseat recliner settee sofa",
    "potted plant": "houseplant",
    "bed": "",
    "dining table": "desk table",
    "toilet": "commode lavatory potty urinal",
    "tv": "monitor television televison",
    "laptop": "computer laptop_computer lenovo macbook netbook notebook",
    "mouse": "",
    "remote": "",
    "keyboard": "",
    "cell phone": "cellphone iphone mobile_phone phon phone smartphone telephone",
    "microwave": "",
    "oven": "stove stovetop",
    "toaster": "",
    "sink": "",
    "refrigerator": "freezer fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddybear",
    "hair drier": "hairdryer",
    "toothbrush": "",
}
"""COCO's 80 categories and what else captions call them; `_` stands between the words of a double word."""

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
READ_AS = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
READ_AS |= {"passenger jet": "jet", "passenger train": "train", "toilet seat": "toilet", "train track": "track"}
"""Double words that are read as one; without them their parts would name another category, or any at all."""
IRREGULAR = {
    "calves": "calf",
    "geese": "goose",
    "grandchildren": "grandchild",
    "knives": "knife",
    "mice": "mouse",
    "pocketknives": "pocketknife",
    "thieves": "thief",
    "buffaloes": "buffalo",
    "flamingoes": "flamingo",
    "busses": "bus",
    "minibusses": "minibus",
}
"""Plurals without a rule; `children`, `people` and `oxen` are synonyms themselves."""

_CATEGORY = {
    word.replace("_", " "): category for category, others in SYNONYMS.items() for word in (category, *others.split())
}
_DOUBLE = {word: word for word in _CATEGORY if " " in word} | READ_AS
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+|['\u2019](?![sS]\b)[^\W_]+)*")


def _plural(word: str) -> str:
    if re.search("(?:[sxz]|[cs]h)$", word):
        return f"{word}es"
    if re.search("[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word[:-3]}men" if word.endswith("man") else f"{word}s"


_SINGULAR = {_plural(word): word for phrase in (*_CATEGORY, *_DOUBLE) for word in phrase.split()} | IRREGULAR


def mentions(caption: str) -> list[tuple[str, int, int]]:
    """The categories that a caption names, in its order: category, and the characters from where to where.

    A word is what stands between spaces and punctuation, a possessive `'s` taken off; hyphens join. Singular and
    plural are the same. Of two words that make a double word neither is read alone. No seat is a chair where there is a
    toilet.
    """
    words = [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(caption)]
    words = [(_SINGULAR.get(word, word), start, end) for word, start, end in words]
    read, i = [], 0
    while i < len(words):
        word, start, end = words[i]
        i += 1
        if i < len(words) and caption[end : words[i][1]].isspace() and (both := f"{word} {words[i][0]}") in _DOUBLE:
            word, end = _DOUBLE[both], words[i][2]
            i += 1
        read.append((word, start, end))
    if any(word == "toilet" for word, _, _ in read):
        read = [entry for entry in read if entry[0] != "seat"]
    return [(_CATEGORY[word], start, end) for word, start, end in read if word in _CATEGORY]


def objects_of(captions: Iterable[str]) -> set[str]:
    """The categories that captions name."""
    return {category for caption in captions for category, _, _ in mentions(caption)}


def check_objects(caption: str, facts: dict) -> FactCheck:
    """A caption against `facts["objects"]`, the categories in the image.

    Each mention is a statement, right if its category is in the image; a category is covered once.
    """
    objects, named = set(facts["objects"]), mentions(caption)
    return FactCheck(
        [Statement("object", start, end, category in objects) for category, start, end in named],
        covered=Counter({"object": len(objects & {category for category, _, _ in named})}),
        there=Counter({"object": len(objects)}),
    )


def chair_scores(checks: Sequence[FactCheck]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """`CHAIRi`, `CHAIRs` and `object recall` in percent, of all captions together and of each.

    The value of a share of nothing is nan, the mean over all captions likewise left out.
    """
    counts = [check.counts("object") for check in checks]
    truth, recall = (np.array([of[name] for of in counts], float).T for name in ("truth", "coverage"))
    false = np.array([[check.false for check in checks], np.ones(len(checks))], float)
    corpus, each = {}, {}
    wrong = np.stack([truth[1] - truth[0], truth[1]])
    for name, (parts, wholes) in {"CHAIRi": wrong, "CHAIRs": false, "object recall": recall}.items():
        each[name] = np.divide(100 * parts, wholes, out=np.full(len(checks), np.nan), where=wholes > 0)
        if wholes.any():
            corpus[name] = float(100 * parts.sum() / wholes.sum())
    return corpus, each


def read_instances(path: Path) -> dict[str, set[str]]:
    """The categories of each image that COCO's `instances_*.json` lists, by image id.

    Ids and names alone are kept while the file is parsed.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds something else.

    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with instances")
    found: dict[int | str, set[int | str]] = {}

    def keep(entry: dict) -> dict | bool:
        if {"image_id", "category_id"} <= entry.keys():
            image, category = entry["image_id"], entry["category_id"]
            if isinstance(image, int | str) and isinstance(category, int | str):
                found.setdefault(image, set()).add(category)
                return True
        elif "file_name" in entry and isinstance(entry.get("id"), int | str):
            found.setdefault(entry["id"], set())
            return True
        return entry

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=keep)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {getattr(error, 'msg', error)}") from None
    parts = [content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")]
    categories = content.get("categories") if isinstance(content, dict) else None
    if not all(isinstance(part, list) and all(entry is True for entry in part) for part in parts) or not (
        isinstance(categories, list)
        and all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in categories)
    ):
        raise UserError(
            f"{path} is not COCO's instances_*.json: expected images, annotations with image_id and category_id, and "
            "categories with id and name"
        )
    names = {str(category["id"]): category["name"] for category in categories}
    if strange := [name for name in names.values() if name not in list(SYNONYMS)]:
        raise UserError(f"{path} has the category {strange[0]!r:.60}, which is none of COCO's 80")
    if strange := {category for row in found.values() for category in row if str(category) not in names}:
        raise UserError(f"{path} has annotations of category {min(strange, key=str)}, which its categories lack")
    return {str(image): {names[str(category)] for category in row} for image, row in found.items()}


def objects_by_image(instances: Iterable[Path], captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """CHAIR's ground truth: the sorted categories of each image's instances and of what its captions name.

    Args:
        instances: COCO's `instances_*.json`, that together list all images.
        captions: the references by image id.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a file holds something else, or an image is in none.

    """
    found: dict[str, set[str]] = {key: set() for key in captions}
    paths, missing = list(instances), set(captions)
    for path in paths:
        listed = read_instances(path)
        missing -= listed.keys()
        for key in found.keys() & listed.keys():
            found[key] |= listed[key]
    where = ", ".join(map(str, paths))
    if not any(found.values()):
        raise UserError(f"{where} has no annotation of any of the {len(captions)} images: it may be another split's")
    if first := next((key for key in captions if key in missing), None):
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{where} does not list image {first}{more}: CHAIR needs the instances of every image")
    return {key: sorted(categories | objects_of(captions[key])) for key, categories in found.items()}
