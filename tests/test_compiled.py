"""What the Triton kernels compile to, without a GPU: they fit each architecture, and are what they should be there."""

import os

import pytest
import torch

from attnfuse.__main__ import UsageError, main, templates_text
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import tile_lists, tuning
from attnfuse.templates.base import Inputs
from attnfuse.templates.compiled import ARCHITECTURES, CASES, Row, compile_call, compile_case, table
from tests.families import FAMILIES, SEED, Leaves, made

BY_NAME = {case.name: case for case in CASES}
# kernels of matrix products over every tile; the others leave at once in nearly every call
BUSY = ("attend", "gradient_of_keys", "gradient_of_queries")


def check(rows: list[Row]) -> None:
    assert rows
    report = table(rows)
    for row in rows:
        assert row.shared <= row.limit, f"{row.kernel} needs more shared memory than {row.arch} has\n{report}"
        if row.kernel not in BUSY:
            continue
        if row.arch in ("sm_80", "sm_90") and row.dtype != "f32":
            # arithmetic of the score's own takes registers of its own
            most = 0 if row.case in ("full", "causal", "window", "padded", "longformer", "hashed") else 32
            assert row.spills <= most, f"{row.kernel} spills on {row.arch}\n{report}"
        assert row.instruction, f"{row.kernel} has no matrix instruction on {row.arch}\n{report}"
        if row.arch == "sm_90" and row.template == "flash" and row.dtype != "f32":
            assert row.instruction == "wgmma", report


@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_causal_in_bf16(arch: str, depth: int) -> None:
    rows = compile_case(arch, BY_NAME["causal"], "bf16", depth)
    assert {row.kernel for row in rows} >= set(BUSY)
    check(rows)


@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_decode_in_bf16(arch: str, depth: int) -> None:
    rows = compile_case(arch, BY_NAME["causal"], "bf16", depth, decode=True)
    assert [row.kernel for row in rows] == ["attend", "combine"]
    check(rows)


@pytest.mark.parametrize("name", ["window", "padded", "softcap", "hashed", "alibi"])
def test_masks_and_scores_on_hopper(name: str) -> None:
    check(compile_case("sm_90", BY_NAME[name], "bf16", 64))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lists_of_tiles(arch: str) -> None:
    case = BY_NAME["longformer"]
    assert tile_lists.has_no_ranges(parse_spec(case.text))
    check(compile_case(arch, case, "bf16", 128))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("text", "leaves"), FAMILIES.values(), ids=FAMILIES.keys())
def test_what_every_family_launches_compiles(text: str, leaves: Leaves, with_lse: bool) -> None:
    """Triton checks types that its interpreter does not: gradients of leaves, sinks, dropout, sizes of one."""
    shape = Shape(2, 4, 2, 1, 40, 16, 16) if with_lse else Shape(2, 4, 2, 70, 40, 16, 16)
    call = made(text, shape, leaves(shape), torch.bfloat16)
    q, k, v, *rest = (x.detach().to("meta") for x in (call.q, call.k, call.v, *call.leaves))
    inputs = Inputs(call.spec, str(call.spec), shape, q, k, v, rest, (), SEED.to("meta"), call.order)
    found = compile_call("sm_90", inputs, decode=with_lse, with_lse=with_lse)
    assert {name for name, _, _ in found} >= {"attend", "row_facts", "gradient_of_keys", "gradient_of_queries"}


@pytest.mark.parametrize(
    "body", ["s + where(n > 3, -1e39, 0.0)", "s*where(n > 3, 1e-40, 2e-40)", "s*0.1 + 1e39", "s + float(n)*1e-41"]
)
def test_numbers_beyond_fp32(body: str) -> None:
    shape = Shape(1, 1, 1, 1, 1, 16, 16)
    q, k, v = (torch.empty(1, 1, 1, 16, dtype=torch.bfloat16, device="meta") for _ in range(3))
    text = str(parse_spec(f"{body} where n <= m else -inf"))
    inputs = Inputs(parse_spec(text), text, shape, q, k, v, (), (), None, (0, 1, 2, 3))
    assert compile_call("sm_90", inputs)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_case(arch: str, name: str, dtype: str, depth: int) -> None:
    check(compile_case(arch, BY_NAME[name], dtype, depth))
    check(compile_case(arch, BY_NAME[name], dtype, depth, decode=True))


def test_a_smaller_tile_is_the_way_out_where_memory_is_short() -> None:
    for kernel in ("attend", "keys", "queries", "decode"):
        for arch in tuning.SHARED:
            found = tuning.configs(kernel, arch, 2, 128)
            needs = [tuning.shared_memory(kernel, config, 2, 128) for config in found]
            assert needs == sorted(needs, reverse=True)
            assert needs[0] <= tuning.SHARED[arch]
            assert found[-1].block_m * found[-1].block_n < found[0].block_m * found[0].block_n


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    assert main(["templates", "--arch", "sm_90", "--depth", "64"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["arch", "template", "kernel", "case", "dtype", "D"]
    assert any("attend" in line and "wgmma" in line for line in lines)
    assert any("decode" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["sm_12"], None, None, None), "no architecture 'sm_12'; there are sm_80, sm_90, sm_100, gfx942"),
        ((None, ["x"], None, None), "no case 'x'; there are full, causal"),
        ((None, None, ["f64"], None), "no dtype 'f64'; there are bf16, f16, f32"),
        ((None, None, None, [300]), "no depth 300; there are 1 to 256"),
    ],
)
def test_unknown_names(arguments: tuple[list[str] | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        templates_text(*arguments)  # type: ignore[arg-type]
