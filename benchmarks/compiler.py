"""The benchmarks' own C programs, compiled when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.devices import require_tools, run, scratch_directory


@contextmanager
def build(source: str, *options: str) -> Iterator[Path]:
    """The path of a file of this package, compiled; removed again."""
    require_tools("cc")
    with scratch_directory() as directory:
        product = directory / Path(source).stem
        run("cc", "-O2", "-o", str(product), str(Path(__file__).with_name(source)), *options)
        yield product
