"""`python -m attnfuse`: `explain FILE.py[:fn]` reports on a program, `env` on the installation, `templates` on what the Triton
kernels compile to; `codes` lists remarks.

`env` has to print whatever is broken, so only the standard library is imported here, and what may crash (importing
torch, asking for a GPU) runs in processes of its own.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO


class UsageError(Exception):
    """What the command line asks for cannot be done; the text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 2 where the command line or FILE is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m attnfuse", description="Find and explain the attention in a model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="say what becomes of each attention",
        description="FILE.py provides a function that returns (callable, args) or (callable, args, kwargs); "
        "attnfuse compiles callable(*args, **kwargs) and reports.",
    )
    explain.add_argument("target", metavar="FILE.py[:fn]", help="fn is the function's name (default: main)")
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser("env", help="print what attnfuse runs on, for bug reports")
    templates = commands.add_parser(
        "templates",
        help="print what the Triton kernels compile to",
        description="Compiles the kernels, forward and backward, for each architecture, without a GPU: registers, spilled "
        "bytes, shared memory, matrix instruction.",
    )
    templates.add_argument("--arch", action="append", help="sm_80, sm_90, sm_100 or gfx942 (default: all)")
    templates.add_argument(
        "--case", action="append", help="full, causal, window, padded, softcap or alibi (default: causal)"
    )
    templates.add_argument("--dtype", action="append", help="bf16, f16 or f32 (default: bf16)")
    templates.add_argument("--depth", action="append", type=int, help="head dimensions (default: 64, 128 and 256)")
    commands.add_parser("codes", help="print every remark code with its cause and cure, as Markdown")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "env":
            print_environment(sys.stdout)
        elif parsed.command == "codes":
            print(codes_text())
        elif parsed.command == "templates":
            print(templates_text(parsed.arch, parsed.case, parsed.dtype, parsed.depth))
        else:
            print(explain_text(parsed.target, as_json=parsed.json))
        sys.stdout.flush()
    except UsageError as error:
        print(f"attnfuse: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # the reader has seen enough (`| head`); nothing may be left for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def explain_text(target: str, *, as_json: bool = False) -> str:
    """The report on what `FILE.py[:fn]` provides.

    Raises:
        UsageError: no such file or function, it returns something else than (callable, args[, kwargs]), or ATTNFUSE is no value
            that there is.  What the file itself raises is passed on.
    """
    import attnfuse
    from attnfuse.options import Options, OptionsError

    try:
        Options.parse()
    except OptionsError as error:
        raise UsageError(str(error)) from error
    call, args, kwargs = _load(target)
    report = attnfuse.explain(call, *args, **kwargs)
    return report.to_json(indent=2) if as_json else str(report)


def templates_text(
    archs: Sequence[str] | None, cases: Sequence[str] | None, dtypes: Sequence[str] | None, depths: Sequence[int] | None
) -> str:
    """What the Triton kernels compile to, as a table.

    Raises:
        UsageError: a name that is not known, or no triton.
    """
    from attnfuse.templates import compiled

    known = {case.name: case for case in compiled.CASES}
    for what, given, names in (
        ("architecture", archs, compiled.ARCHITECTURES),
        ("case", cases, tuple(known)),
        ("dtype", dtypes, tuple(compiled.DTYPES)),
        ("depth", depths, range(1, 257)),
    ):
        for name in given or ():
            if name not in names:
                limit = "1 to 256" if what == "depth" else ", ".join(map(str, names))
                raise UsageError(f"there is no {what} {name!r}; there are {limit}")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed, and these are its kernels: pip install triton")
    rows = [
        row
        for arch in archs or compiled.ARCHITECTURES
        for dtype in dtypes or ("bf16",)
        for depth in depths or (64, 128, 256)
        for case in cases or ("causal",)
        for decode in (False, True)
        for row in compiled.compile_case(arch, known[case], dtype, depth, decode=decode)
    ]
    return compiled.table(rows)


def _load(target: str) -> tuple[Callable[..., object], Sequence[object], Mapping[str, object]]:
    file, separator, name = target.rpartition(":")
    # A colon may also belong to the path (C:\model.py), but then what follows it is no name.
    if not separator or not name.isidentifier():
        file, name = target, "main"
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file!r}; the form is FILE.py[:fn]")
    provide = getattr(_execute(path), name, None)
    if not callable(provide):
        raise UsageError(
            f"{file} has no function {name!r}; name one that returns (callable, args) or (callable, args, kwargs), "
            f"as {file}:fn"
        )
    needed = [
        p.name
        for p in inspect.signature(provide).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(
            f"{name}() of {file} needs {', '.join(needed)}; it is called without arguments and returns what to run"
        )
    provided = provide()
    match provided:
        case (call, [*args]) if callable(call):
            return call, args, {}
        case (call, [*args], {**kwargs}) if callable(call):
            return call, args, {str(key): value for key, value in kwargs.items()}
    kinds = ", ".join(type(part).__name__ for part in provided) if isinstance(provided, tuple) else ""
    raise UsageError(
        f"{name}() of {file} returned {f'({kinds})' if kinds else type(provided).__name__}; "
        "it has to return (callable, args) or (callable, args, kwargs), args a tuple or list, kwargs a dict"
    )


def _execute(path: Path) -> ModuleType:
    """Imports the file, with its folder importable, as running it would."""
    # Code that looks up its own module (dataclasses, transformers) has to find it, and no other module may be replaced.
    name = f"attnfuse_explained_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def codes_text() -> str:
    """`CODES` as Markdown."""
    from attnfuse.remark import CODES

    sections = [
        f"## {name} {code.meaning}\n\n*{code.kind}*. {code.cause}\n\n**Cure.** {code.cure}"
        for name, code in sorted(CODES.items())
    ]
    return "\n\n".join(sections)


PACKAGES = ("attnfuse", "torch", "triton", "transformers", "sympy", "rich", "numpy")
VARIABLES = ("ATTNFUSE", "TORCH", "PYTORCH_", "TRITON_", "CUDA_", "OMP_", "MKL_")
TORCH_PROBE = """
import torch
print("torch imports", f"yes, {torch.__version__} from {torch.__file__}", sep="\\t")
print("threads", torch.get_num_threads(), sep="\\t")
print("CPU capability", torch.backends.cpu.get_cpu_capability(), sep="\\t")
print("CUDA build", torch.version.cuda or torch.version.hip or "no", sep="\\t")
for number in range(torch.cuda.device_count()):
    device = torch.cuda.get_device_properties(number)
    print(f"device {number}", f"{device.name}, {torch.cuda.get_device_capability(number)}, "
          f"{device.total_memory / 2**30:.0f} GiB", sep="\\t")
"""
BACKEND_PROBE = """
from torch._dynamo.backends.registry import lookup_backend
print("backend loads", f"yes, {lookup_backend('attnfuse').__module__}", sep="\\t")
"""
KERNEL_PROBE = """
from attnfuse.templates import native
print("CPU attention", native.about(), sep="\\t")
"""
TRITON_PROBE = """
import triton
print("triton imports", f"yes, {triton.__version__}", sep="\\t")
"""


def print_environment(out: TextIO) -> None:
    """Prints `name  value` lines; a fact that cannot be had prints the reason in place of its value."""
    for name in PACKAGES:
        _line(out, name, _attempt(functools.partial(importlib.metadata.version, name)))
    _line(out, "python", f"{platform.python_version()} {sys.executable}")
    _line(out, "platform", _attempt(platform.platform))
    _line(out, "processor", f"{_attempt(_processor)}, {os.cpu_count()} threads")
    _line(out, "C++ compiler", _attempt(_compiler))
    _line(out, "entry point", _attempt(_entry_point))
    for title, probe in (
        ("torch imports", TORCH_PROBE),
        ("CPU attention", KERNEL_PROBE),
        ("triton imports", TRITON_PROBE),
        ("backend loads", BACKEND_PROBE),
    ):
        for name, value in _probe(title, probe):
            _line(out, name, value)
    for name, value in sorted(os.environ.items()):
        if name in ("CC", "CXX") or name.startswith(VARIABLES):
            _line(out, name, value)


def _line(out: TextIO, name: str, value: str) -> None:
    print(f"{name:<16}{value}", file=out, flush=True)


def _attempt(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"not known ({type(error).__name__}: {error})"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl")):
        if path := shutil.which(name):
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
            return f"{path}, {answer.stdout.partition(os.linesep)[0]}"
    return "none found; Inductor needs one to compile for the CPU"


def _entry_point() -> str:
    found = [point.value for point in importlib.metadata.entry_points(group="torch_dynamo_backends", name="attnfuse")]
    return ", ".join(found) or "missing: torch.compile(backend='attnfuse') needs attnfuse to be installed with pip"


def _probe(title: str, code: str, timeout: float = 120) -> list[tuple[str, str]]:
    """Runs code that prints name-tab-value lines in another process; a failure becomes a last line, named `title`."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [(title, _reason(error))]
    facts = [(name, value) for name, tab, value in (line.partition("\t") for line in answer.stdout.splitlines()) if tab]
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()
        facts.append((title, f"no: {said[-1] if said else f'the process ended with status {answer.returncode}'}"))
    return facts


if __name__ == "__main__":
    sys.exit(main())
