"""The fused kernels compiled for Hopper by Triton's own assembler, which needs no GPU: each fits
the chip and multiplies by its tensor cores.

Letters: C feature dimension.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip("before Triton 3.3 a kernel is compiled by other calls", allow_module_level=True)
if not all((TOOLS / name).is_file() for name in ("ptxas", "cuobjdump")):
    pytest.skip("this Triton comes without NVIDIA's assembler", allow_module_level=True)

from moco_isl.ops import kernels

# bytes a block of a Hopper chip, registers a thread, bytes a thread that may go to memory
SHARED = 227 * 1024
REGISTERS = 255
SPILLED = 64


def compiled(kernel, types: dict[str, str], constants: dict, warps: int, stages: int):
    """The kernel for sm_90 as a run calls it: pointers and all that torch allocates divide by
    16.
    """
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    place = lambda name: (kernel.arg_names.index(name),)
    aligned = {
        place(name): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("N", "length", "words", "per")
    }
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={place(name): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(
        source,
        target=compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def usage(found, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    (folder / "kernel.cubin").write_bytes(found.asm["cubin"])
    said = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))


def softmax(C: int, masked: bool):
    tile = kernels.softmax_tile(C)
    types = {
        "f_ptr": "*fp32",
        "rows_ptr": "*fp16",
        "bits_ptr": "*i32",
        "top_ptr": "*fp32",
        "total_ptr": "*fp32",
        "mean_ptr": "*fp32",
        "scale": "fp32",
    }
    sizes = {
        "C": C,
        "MASKED": masked,
        "BN": tile.anchors,
        "BM": tile.rows,
        "BC": max(16, triton.next_power_of_2(C)),
        "SHARES": kernels._SCALE,
    }
    return compiled(kernels._softmax_kernel, types, sizes, tile.warps, tile.stages)


def maxima(C: int, _=None):
    tile = kernels.search_tile(C)
    sizes = {"C": C, "BN": tile.anchors, "BM": tile.rows, "BC": max(16, triton.next_power_of_2(C))}
    return compiled(
        kernels._maxima_kernel,
        {"q_ptr": "*fp16", "bank_ptr": "*fp16", "out_ptr": "*fp32"},
        sizes,
        tile.warps,
        tile.stages,
    )


def rescore(C: int, half: bool):
    rows = "*fp16" if half else "*fp32"
    sizes = {"C": C, "BM": kernels.GROUP, "BC": triton.next_power_of_2(C)}
    return compiled(
        kernels._rescore_kernel,
        {"q_ptr": rows, "bank_ptr": rows, "group_ptr": "*i64", "out_ptr": "*fp32"},
        sizes,
        4,
        3,
    )


@pytest.mark.parametrize(
    ("build", "C", "how"),
    [
        (softmax, 32, True),
        (softmax, 64, True),
        (softmax, 128, False),
        (softmax, 128, True),
        (softmax, 256, False),
        (softmax, 256, True),
        (softmax, 24, True),
        (softmax, 100, True),
        (maxima, 24, None),
        (maxima, 100, None),
        (rescore, 100, True),
        (maxima, 32, None),
        (maxima, 64, None),
        (maxima, 128, None),
        (maxima, 256, None),
        (rescore, 128, True),
        (rescore, 256, False),
    ],
)
def test_fits_a_hopper_chip(build, C, how, tmp_path):
    found = build(C, how)
    registers, spilled = usage(found, tmp_path)
    assert found.metadata.shared <= SHARED and registers <= REGISTERS and spilled <= SPILLED
    if build is not rescore:
        assert "wgmma" in found.asm["ptx"], "no product by the tensor cores"
        assert "cp.async" in found.asm["ptx"], "rows are not loaded ahead"


def test_bits_compile(tmp_path):
    found = compiled(
        kernels._bits_kernel, {"absent_ptr": "*i64", "bits_ptr": "*i32"}, {"BLOCK": 128}, 4, 3
    )
    assert usage(found, tmp_path)[1] == 0
