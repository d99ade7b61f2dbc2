"""Shards of images with captions: writing them (`write`, `sources`) and reading them (`read`)."""

from importlib import import_module

_HOME = {
    "Sample": "write",
    "write_shards": "write",
    "verify_shards": "write",
    "folder_source": "sources",
    "coco_source": "sources",
    "nocaps_source": "sources",
    "img2dataset_source": "sources",
    "ShardData": "read",
    "evaluation_batches": "read",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    # Reading needs torch and Lightning, packing needs neither: each name loads its own module only.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
