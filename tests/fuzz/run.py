"""Runs a fuzzer of a reader in Python: `python -m tests.fuzz.run NAME CORPUS... [-option=...]`.

NAME_fuzz is a module beside this one; its `survive(data)` raises where something is wrong. The
branches taken in INSTRUMENTED guide it (atheris); the options are libFuzzer's, -merge=1 too.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys

import atheris

from tests.fuzz.mutation import spoil

INSTRUMENTED = {
    "journal": ["agent.journal", "agent.record", "agent.state", "agent.migration"],
    "certificate": [
        "agent.certificate",
        "agent.certificate.fields",
        "agent.certificate.statement",
        "agent.migration",
    ],
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED[name]):
        module = importlib.import_module(f"tests.fuzz.{name}_fuzz")

    logging.disable()  # a line for each journal that is put aside

    def one_input(data: bytes) -> None:
        module.survive(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        head = module.HEAD_BYTES
        if chance.random() < 0.5:
            try:
                return (data[:head] + spoil(data[head:], chance))[:max_size]
            except ValueError:
                pass  # no JSON (any more)
        return bytes(atheris.Mutate(data, max_size))

    again = f"{sys.executable} -m tests.fuzz.run {name}"  # what -merge=1 hands to a shell
    atheris.Setup([again, *arguments], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
