"""Processes that serve one variant: they answer a line of JSON for their first call, then one for each command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answer = dict[str, Any]


class Process:
    """The asking side. `first` is the answer to the first call.

    Args:
        arguments: of the interpreter.
        caches: folder of its compile caches.

    Raises:
        RuntimeError: the process ended; the text holds the last lines that it wrote.
    """

    def __init__(self, arguments: Sequence[str], caches: Path) -> None:
        self._arguments = arguments
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={
                # an installed package is compiled to byte code, as torch is
                **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
                "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
                "TRITON_CACHE_DIR": str(caches / "triton"),
            },
        )
        self.first = self._answer()

    def ask(self, command: str) -> Answer:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells more
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            said = "".join(self._said.readlines()[-20:])
            raise RuntimeError(f"`python {' '.join(self._arguments)}` ended with status {status}:\n{said}")
        answer: Answer = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()


def serve(start: Callable[[], tuple[Answer, Mapping[str, Callable[[str], Answer]]]]) -> None:
    """The answering side, until standard input ends.

    Args:
        start: does the first call; returns its answer and the commands, which get what follows their name in the line.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    first, commands = start()
    print(json.dumps(first), file=answers)
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        if name not in commands:
            raise SystemExit(f"unknown command {name!r}; known are {', '.join(commands)}")
        print(json.dumps(commands[name](argument)), file=answers)
