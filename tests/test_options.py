"""`Options.parse`: attnfuse's own keys, Inductor's keys and modes, the environment variable, and what is refused."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from attnfuse.options import Options, OptionsError

pytestmark = pytest.mark.lenient


def refused(mode: str | None = None, options: Any = None) -> str:
    with pytest.raises(OptionsError) as caught:
        Options.parse(mode, options)
    return str(caught.value)


def test_defaults() -> None:
    assert Options.parse() == Options()
    assert Options.parse("default", {}) == Options()
    assert Options() == Options(
        strict=False,
        downstream="inductor",
        dump=None,
        verify=False,
        inline_scores=1 << 14,
        inductor_attention_patterns=False,
        inductor={},
        enabled=True,
        explain=False,
    )


def test_own_keys_are_taken_and_kept_from_inductor(tmp_path: Path) -> None:
    options = Options.parse(
        None,
        {
            "strict": True,
            "downstream": "aot_eager",
            "dump": tmp_path,
            "verify": True,
            "inline_scores": 64,
            "inductor-attention-patterns": True,
        },
    )
    assert options == Options(
        strict=True,
        downstream="aot_eager",
        dump=str(tmp_path),
        verify=True,
        inline_scores=64,
        inductor_attention_patterns=True,
    )


def test_every_field_that_options_sets_is_documented() -> None:
    text = inspect.getdoc(Options) or ""
    assert [field.name for field in dataclasses.fields(Options) if f"  {field.name}: " not in text] == []


def test_own_keys_are_no_inductor_keys() -> None:
    from torch._inductor import list_options

    assert {field.name for field in dataclasses.fields(Options)} & set(list_options()) == set()


def test_inductor_keys_win_over_the_mode() -> None:
    options = Options.parse("max-autotune", {"max_autotune": False, "triton.unique-kernel-names": True})
    assert options.inductor["max_autotune"] is False
    assert options.inductor["triton.cudagraphs"] is True
    assert options.inductor["triton.unique_kernel_names"] is True


def test_modes_are_those_of_stock_torch_compile() -> None:
    import torch

    for mode in torch._inductor.list_mode_options():
        stock = torch._TorchCompileInductorWrapper(mode, None, None)
        assert Options.parse(mode).inductor == stock.config, mode


def test_a_mode_is_copied() -> None:
    Options.parse("lite").inductor.clear()
    assert Options.parse("lite").inductor != {}


def test_every_value_that_inductor_has_now_is_accepted() -> None:
    from torch._inductor import config

    current = config.get_config_copy()
    assert Options.parse(None, current).inductor == current


def test_options_are_hashable_and_equal_by_value() -> None:
    one, other = (Options.parse("reduce-overhead", {"strict": True}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Options.parse(None, {"strict": True})


@pytest.mark.parametrize("value", [-1, True, 1.0, "64"])
def test_inline_scores_is_a_count(value: object) -> None:
    assert repr(value) in refused(options={"inline_scores": value})


def test_unknown_mode() -> None:
    text = refused("max-autotun")
    assert "'max-autotun'" in text
    assert "did you mean 'max-autotune'" in text
    assert "'reduce-overhead'" in text


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("strct", "strict"),
        ("verfy", "verify"),
        ("inductor_attention_pattern", "inductor_attention_patterns"),
        ("max_autotun", "max_autotune"),
        ("cudagraphs", "triton.cudagraphs"),
        ("triton.cuda-graphs", "triton.cudagraphs"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    text = refused(None, {key: True})
    assert f"unknown option {key!r}" in text
    assert f"did you mean {meant!r}" in text


def test_unknown_key_without_a_near_one_lists_what_there_is() -> None:
    text = refused(None, {"qqqqqqqq": 1})
    assert "did you mean" not in text
    assert "strict, downstream, dump" in text
    assert "torch._inductor.list_options()" in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strict", 1, ("'strict' is 1 of type int", "True or False")),
        ("verify", "yes", ("'verify' is 'yes' of type str", "True or False")),
        ("downstream", "aot-eager", ("'aot-eager'", "'inductor', 'aot_eager' or 'eager'", "did you mean 'aot_eager'")),
        ("downstream", None, ("None", "'inductor', 'aot_eager' or 'eager'")),
        ("dump", "", ("''", "path of a folder")),
        ("dump", 3, ("3 of type int", "path of a folder")),
        ("max_autotune", "yes", ("'max_autotune' is 'yes' of type str", "wants bool")),
        ("triton.cudagraphs", 1, ("'triton.cudagraphs' is 1 of type int", "wants bool")),
        ("max_autotune_gemm_search_space", "default", ("'default'", "DEFAULT", "EXHAUSTIVE")),
    ],
)
def test_wrong_value(key: str, value: object, said: tuple[str, ...]) -> None:
    text = refused(None, {key: value})
    assert [part for part in said if part not in text] == []


def test_a_key_that_is_no_string() -> None:
    assert "3 of type int" in refused(None, {3: True})


@pytest.mark.parametrize(
    ("value", "enabled", "explain"), [("", True, False), ("off", False, False), ("explain", True, True)]
)
def test_environment(value: str, enabled: bool, explain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE", value)
    options = Options.parse()
    assert (options.enabled, options.explain) == (enabled, explain)


def test_environment_of_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE", "explian")
    assert "ATTNFUSE is 'explian'; it takes 'off' or 'explain', or nothing (did you mean 'explain'?)" in refused()


def test_parsing_changes_nothing_global() -> None:
    from torch._inductor import config

    before = config.get_config_copy()
    Options.parse("max-autotune", {"epilogue_fusion": False})
    assert config.get_config_copy() == before
