"""Data sets in the layouts of the Hugging Face hub: parquet files, or images with a metadata file beside them.

Files are read as data: there is no loading script, and nothing is unpickled.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cyclefit import UserError
from cyclefit.config.paths import is_path
from cyclefit.files import within

from .pack import Sample
from .sources import table_source
from .tables import CAPTION_FIELDS, FILE_FIELDS, captions_in, choose_column

_METADATA = ("metadata.jsonl", "metadata.csv")
_ROWS = 64
"""Read at a time: their encoded images are in memory together."""


@dataclass(frozen=True)
class Dataset:
    """A split of a data set in a local folder or on the hub."""

    name: str
    folder: Path | None
    """None on the hub."""
    files: list[str]
    """The parquet files of the split, or its metadata file, by their paths in the data set."""
    commit: str | None = None
    """Of the revision, on the hub."""

    @property
    def is_parquet(self) -> bool:
        """Whether the samples hold their images, and not the files of these."""
        return self.files[0].endswith(".parquet")

    def rows(self) -> int | None:
        """How many rows the parquet files have; None where one cannot be read, and on the hub."""
        pyarrow, parquet = _pyarrow()
        if self.folder is None:
            return None
        try:
            return sum(parquet.read_metadata(self.folder / file).num_rows for file in self.files)
        except (pyarrow.ArrowException, OSError):
            return None

    def samples(self, image_column: str | None = None, caption_column: str | None = None) -> Iterator[Sample]:
        """The samples of the split; parquet files are downloaded one by one, each when its turn comes.

        Columns are chosen as in `table_source`. In parquet files an image is a struct of `bytes` and `path`, its bytes
        alone, or in a local folder a path relative to the parquet file. Rows that follow each other with the same image
        are one sample; its key is the file and the number of the first row, and further columns of text and numbers are
        kept. What a file that cannot be read has lost is a sample that the writer counts and names.

        Raises:
            UserError: there are no such columns, an image lies outside the folder, or the hub does not give a file.

        """
        if not self.is_parquet:
            yield from table_source(self.folder / self.files[0], None, image_column, caption_column)
            return
        for file in self.files:
            yield from self._parquet_samples(file, image_column, caption_column)

    def _parquet_samples(self, file: str, image_column: str | None, caption_column: str | None) -> Iterator[Sample]:
        pyarrow, parquet = _pyarrow()
        path = self.folder / file if self.folder else _download(self.name, file, self.commit)
        number = -1
        try:
            with parquet.ParquetFile(path) as table:
                image, caption, others = _columns(
                    table.schema_arrow, f"{self.name}: {file}", image_column, caption_column
                )
                batches = table.iter_batches(_ROWS, columns=[image, caption, *others])
                rows = enumerate(row for batch in batches for row in batch.to_pylist())
                for _, same in groupby(rows, lambda numbered: _identity(numbered[1][image]) or numbered[0]):
                    same = list(same)
                    number, row = same[0]
                    captions = [one for _, each in same for one in captions_in(each[caption])]
                    extra = {name: row[name] for name in others if row[name] is not None}
                    yield self._sample(f"{Path(file).stem}-{number:06d}", file, row[image], captions, extra)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
            lost = "unreadable parquet file" if number < 0 else f"damaged parquet file, after row {number}"
            yield Sample(file, b"", [], lost=lost)

    def _sample(
        self, key: str, file: str, image: dict | bytes | str | None, captions: list[str], extra: dict
    ) -> Sample:
        name = image
        if isinstance(image, dict):
            image, name = image.get("bytes"), image.get("path")
            if image is not None and isinstance(name, str):
                extra.setdefault("file_name", name)
        if isinstance(image, bytes):
            return Sample(key, image, captions, extra)
        if not isinstance(name, str):
            return Sample(key, b"", captions, lost="empty image")
        if name.startswith(("http://", "https://")):
            raise UserError(
                f"{self.name}: {file} has the addresses of images; download them with img2dataset and pack its shards."
            )
        if self.folder is None:
            return Sample(key, b"", captions, lost="the path of an image instead of its bytes")
        root = (self.folder / file).parent
        return Sample(key, within(root, name, f"{self.name}: {file}, {key}: the image"), captions, extra)


def find_dataset(name: str, split: str | None = None, revision: str | None = None) -> Dataset:
    """A split of a data set in a local folder, or by its id on the hub, there at a branch, tag or commit.

    A split is what precedes the numbers in the names of its parquet files (`data/train-00000-of-00002.parquet`) or the
    folder of its files (`default/train/0000.parquet`, `train/metadata.jsonl`). `split` is its name, with its folders
    where that is not unique; it can be omitted if there is only one.

    Raises:
        UserError: there is no such data set or split, or none that is read; the message names the splits there are.

    """
    folder, commit = Path(name), None
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{name} is a folder; --revision {revision} is for a data set on the hub: leave it out.")
        found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    elif is_path(name):
        raise UserError(f"{name} is not a folder; give one, or the id of a data set on the hub (ORG/NAME).")
    else:
        folder = None
        commit, found = _list(name, revision)
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.split("/")))
    parquet = [file for file in files if file.endswith(".parquet")]
    if not parquet and folder is None:
        raise UserError(
            f"{name} has no parquet files on the hub: --revision refs/convert/parquet has the hub's own conversion, if "
            f"there is one; or download it (hf download --repo-type dataset {name} --local-dir FOLDER) and pack that."
        )
    splits: dict[str, list[str]] = {}
    for file in parquet or [file for file in files if file.rpartition("/")[2] in _METADATA]:
        splits.setdefault(_split_of(file), []).append(file)
    if not splits:
        raise UserError(f"{name} contains neither parquet files nor {' or '.join(_METADATA)}.")
    fitting = [known for known in splits if split in (None, known, known.rpartition("/")[2])]
    if len(fitting) != 1:
        what = "several splits" if split is None else f"{split} several times" if fitting else f"no split {split}"
        raise UserError(f"{name} has {what}: --split names one of {', '.join(fitting or splits)}.")
    return Dataset(name, folder, splits[fitting[0]], commit)


def _split_of(file: str) -> str:
    folder, _, stem = file.rpartition("/")
    stem = re.sub(r"^metadata\.\w+$|^part-\d.*|(^|[-_.])\d+([-_]of[-_]\d+.*)?(\.parquet)$|\.parquet$", "", stem)
    return "/".join(filter(None, (folder, stem))) or "."


def _columns(schema, where: str, image_column: str | None, caption_column: str | None) -> tuple[str, str, list[str]]:
    """The columns of images and captions, and those of plain values."""
    from pyarrow import types

    def is_encoded(kind) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_image(kind) -> bool:
        return is_encoded(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    def is_text(kind) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    plain = (is_text, types.is_integer, types.is_floating, types.is_boolean)
    encoded = [field.name for field in schema if is_image(field.type)]
    known = encoded if len(encoded) == 1 else FILE_FIELDS
    image = choose_column(
        schema.names if image_column else encoded or schema.names, image_column, known, "image", where
    )
    caption = choose_column(schema.names, caption_column, CAPTION_FIELDS, "caption", where)
    kind = schema.field(image).type
    if not (is_image(kind) or is_text(kind)):
        raise UserError(f"{where}: the column {image} has {kind}, neither encoded images nor their paths.")
    kind = schema.field(caption).type
    listed = types.is_list(kind) or types.is_large_list(kind)
    if not is_text(kind.value_type if listed else kind):
        raise UserError(f"{where}: the column {caption} has {kind}, neither texts nor lists of texts.")
    others = [field.name for field in schema if any(test(field.type) for test in plain)]
    return image, caption, [name for name in others if name not in (image, caption)]


def _identity(image: dict | bytes | str | None) -> tuple | bytes | str | None:
    """What images of rows are compared by; nothing for a row without one."""
    if isinstance(image, dict):
        return tuple(image.values()) if any(image.values()) else None
    return image or None


def _pyarrow() -> tuple:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("parquet files are read by pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _list(name: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit of a data set's revision and the files that it has there."""
    from huggingface_hub import HfApi, constants

    with _asking(name, revision):
        found = HfApi(constants.ENDPOINT).dataset_info(name, revision=revision)
    return found.sha, [file.rfilename for file in found.siblings or ()]


def _download(name: str, file: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # there is one of the samples
    with _asking(name, commit):
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))


@contextmanager
def _asking(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence; a hub that does not answer is not asked."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    from cyclefit.hub import silence_of

    offline = constants.is_offline_mode()
    try:
        if reason := "HF_HUB_OFFLINE is set" if offline else silence_of(constants.ENDPOINT):
            raise ConnectionError(reason)
        yield
    except Exception as error:  # whatever the client's library raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, RevisionNotFoundError):
            raise UserError(f"{name} has no branch, tag or commit {revision!r} on the hub") from error
        if isinstance(error, GatedRepoError):
            reason = (
                "its files are given only to those who have accepted its terms on the hub; do so there, and log in "
                "with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such data set, or a private one: `hf auth login` or HF_TOKEN says who asks"
        raise UserError(
            f"cannot read the data set {name!r}: give the id of one on the hub (with network access), or a local "
            f"folder in the hub's own layout ({reason})"
        ) from error
