"""What the user asked for: `Options`, the only reader of `mode=`, `options=` and the environment variable ATTNFUSE.

`Options.parse(mode, options)` takes what `torch.compile(..., mode=, options=)` hands to a backend. A key is one of
attnfuse's own (the fields of `Options`) or an Inductor config key, spelled as stock `torch.compile` takes it. Nothing
is stored globally: the result travels as an argument, Inductor's part of it as a dict of config patches.
"""

import difflib
import functools
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, Union, get_args, get_origin

Downstream = Literal["inductor", "aot_eager", "eager"]

ENVIRONMENT_VARIABLE = "ATTNFUSE"


class OptionsError(ValueError):
    """An option, mode or environment value that attnfuse cannot take; the text says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one `torch.compile(..., backend="attnfuse")`.

    Set by `options={...}`:
      strict: raise what goes wrong inside attnfuse, instead of compiling as stock does with a `failed` remark.
      downstream: who compiles the rewritten graph, "inductor", or for debugging "aot_eager" or "eager"; with these two
        Inductor's modes and config keys are checked but have no effect.
      dump: folder that receives the graph after each pass, as numbered readable files.
      verify: run each attention that was found against its replacement at compile time, at small sizes.
      inline_scores: up to how many scores a head (queries times keys) an attention of static size on the CPU is written out
        for Inductor instead of becoming a call of PyTorch's kernel; 0 for none. Where attnfuse has its own, a multiple or a
        fraction of that: `templates.inline.most_scores`.
      inductor_attention_patterns: let Inductor's own attention patterns loose on the graphs that attnfuse has analysed.
      inductor: config patches for Inductor, those of `mode=` first.

    Set by ATTNFUSE:
      enabled: False with ATTNFUSE=off, where every graph compiles as stock does.
      explain: True with ATTNFUSE=explain, where each compiled graph prints its report.
    """

    strict: bool = False
    downstream: Downstream = "inductor"
    dump: str | None = None
    verify: bool = False
    inline_scores: int = 1 << 14
    inductor_attention_patterns: bool = False
    inductor: dict[str, Any] = field(default_factory=dict, hash=False)
    enabled: bool = True
    explain: bool = False

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, object] | None = None) -> Self:
        """Checks what `torch.compile` was given.

        Args:
            mode: one of Inductor's modes, None or "default".
            options: attnfuse's own keys and Inductor config keys; these win over the mode's.

        Raises:
            OptionsError: unknown mode, key or ATTNFUSE value (naming the nearest known), or a value of the wrong type.
        """
        own: dict[str, object] = {}
        inductor = _mode_patches(mode)
        for key, value in (options or {}).items():
            if not isinstance(key, str):
                raise OptionsError(f"option names are strings, got {key!r} of type {type(key).__name__}")
            name = key.replace("-", "_")
            if name in _OWN:
                own[name] = _OWN[name](name, value)
            else:
                inductor[name] = _inductor_value(key, name, value)
        return cls(**own, inductor=inductor, **_environment())  # type: ignore[arg-type]


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionsError(f"option {name!r} is {value!r} of type {type(value).__name__}; it takes True or False")
    return value


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionsError(
            f"option {name!r} is {value!r} of type {type(value).__name__}; it takes an integer from 0 on"
        )
    return value


def _downstream(name: str, value: object) -> object:
    known = get_args(Downstream)
    if value not in known:
        raise OptionsError(f"option {name!r} is {value!r}; it takes {_alternatives(known)}{_nearest(value, known)}")
    return value


def _folder(name: str, value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise OptionsError(
            f"option {name!r} is {value!r} of type {type(value).__name__}; it takes the path of a folder"
        )
    return path


_OWN: dict[str, Callable[[str, object], object]] = {
    "strict": _boolean,
    "downstream": _downstream,
    "dump": _folder,
    "verify": _boolean,
    "inline_scores": _count,
    "inductor_attention_patterns": _boolean,
}


def _environment() -> dict[str, bool]:
    known = ("off", "explain")
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value and value not in known:
        raise OptionsError(
            f"environment variable {ENVIRONMENT_VARIABLE} is {value!r}; it takes {_alternatives(known)}, or nothing"
            f"{_nearest(value, known)}"
        )
    return {"enabled": value != "off", "explain": value == "explain"}


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise OptionsError(f"unknown mode {mode!r}; Inductor knows {_alternatives(modes)}{_nearest(mode, modes)}")
    return dict(modes[mode])


@functools.cache
def _inductor_types() -> dict[str, Any]:
    from torch._inductor import config

    # get_type is put on the module's class at run time, where a type checker cannot see it.
    get_type: Callable[[str], Any] = config.get_type  # type: ignore[attr-defined]
    return {name: get_type(name) for name in config.get_config_copy()}


def _inductor_value(key: str, name: str, value: object) -> object:
    known = _inductor_types()
    if name not in known:
        raise OptionsError(
            f"unknown option {key!r}{_nearest(name, (*_OWN, *known))}; attnfuse's own are {', '.join(_OWN)}, "
            "and every key of torch._inductor.config is one too (torch._inductor.list_options() prints them)"
        )
    if not _fits(value, known[name]):
        raise OptionsError(
            f"option {key!r} is {value!r} of type {type(value).__name__}; "
            f"torch._inductor.config wants {_type_text(known[name])}"
        )
    return value


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value may stand where the annotation does; True where that cannot be told."""
    # A key with the default None and no annotation says nothing about what it takes.
    if annotation is type(None) or annotation is Any or annotation is None:
        return True
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(value is None if part is type(None) else _fits(value, part) for part in get_args(annotation))
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in get_args(annotation))
    kind = annotation if origin is None else origin
    if not isinstance(kind, type):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _type_text(annotation: Any) -> str:
    plain = isinstance(annotation, type) and get_origin(annotation) is None
    return annotation.__name__ if plain else str(annotation)


def _alternatives(words: Mapping[str, object] | tuple[str, ...]) -> str:
    *head, last = [repr(word) for word in words]
    return f"{', '.join(head)} or {last}" if head else last


def _nearest(word: object, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """ " (did you mean 'x'?)", or nothing where no known word is near."""
    if not isinstance(word, str):
        return ""
    # A nested Inductor key may lack its prefix: `cudagraphs` for `triton.cudagraphs`.
    found = [name for name in known if name.rpartition(".")[2] == word] or difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
