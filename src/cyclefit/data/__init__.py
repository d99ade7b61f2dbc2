"""Shards of images with captions: writing them (`sources`, `pack`) and reading them.

A tar (`tars`) in a list of them (`shards`) gives raw samples (`samples`), these a stream of batches (`stream`), and
streams the LightningDataModule of a training (`module`).
"""

from importlib import import_module

_NAMES = {
    "samples": "BadSample BadSamples LATENTS UnusableData decode_image image_of latents_source read_captions "
    "read_extra",
    "shards": "Shards check_shards expand_shards raw_samples",
    "stream": "evaluation_batches",
    "module": "ShardData",
    "pack": "Sample find_packed verify_shards write_shards",
    "sources": "coco_source folder_source img2dataset_source nocaps_source table_source",
    "tars": "IMAGES",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str):
    # Reading needs torch and Lightning, packing needs neither: each name loads its own module only.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
