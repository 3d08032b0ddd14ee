"""Compile every Triton kernel for every chip, without one: ``python -m tests.aot``.

The interpreter shows that a kernel computes the right thing; it cannot show that it compiles,
fits a chip's shared memory and keeps its registers. Here the launchers run with recording in the
place of launching, so what is compiled is exactly what they would launch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sdcore.ops.layouts import joint
from sdcore.triton_kernels import (
    chips,
    clean_latents,
    control_step,
    delta_combine,
    geglu,
    group_norm_silu,
    masked_cross_attention,
    sliced_wasserstein,
    wide_attention,
)

KIB = 1024
# Chip: its target, and the shared memory that one program may have.
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


# Bytes (on AMD's chips registers) that a kernel may keep in memory. Gradients to a gate add up,
# over all heads and rows of a program, to more than fits; tiles matter little (216 to 400).
SPILLS = {"_scores_backward": 512}
# Instructions of loops that may do so, of some 900: the backward of regions, with Triton 3.6.
LOOP_SPILLS = 2


@dataclass(frozen=True)
class Launch:
    """One specialization of one kernel, as the launcher would have Triton compile it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        types = " ".join(t for _, t in self.signature if t.startswith("*"))
        shape = " ".join(f"{k}={v}" for k, v in self.constants if k.isupper())
        return f"{self.kernel} [{types}] {shape}"


def cases() -> Iterator[tuple[Any, ...]]:
    """What the launchers are called with: the tuned shape in every dtype, and its variations."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield dtype, 3, 4096, 1, False
        yield dtype, 3, 4096, 2, True
    yield torch.float32, 1, 256, 1, False
    # One point in one direction: Triton makes ones constants.
    yield torch.float32, 3, 4096, 1, False, 1
    yield torch.float32, 3, 4096, 1, True, 65536, True
    yield torch.bfloat16, 3, 4096, 1, False, 65536, True
    yield torch.float64, 3, 4096, 1, False, 65536, True
    yield torch.float32, 3, 100, 1, False
    yield torch.float32, 2, 8192, 1, False
    yield torch.float32, 4, 65536, 1, False
    yield torch.float32, 256, 4096, 1, False


def run_sliced_wasserstein(
    dtype: torch.dtype,
    d: int,
    bins: int,
    p: int,
    weighted: bool,
    n: int = 65536,
    planar: bool = False,
) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.empty(1, n, d, dtype=dtype), torch.empty(1, n, d, dtype=dtype)
    if planar:
        x = torch.empty(1, d, n, dtype=dtype).mT
        # Of a picture and the colors of another, or of two pictures.
        y = torch.empty(1, 2 * d, n, dtype=dtype)[:, :d].mT if weighted else y.to(real)
    rescale = [0.5, 0.5, 0.0, 1.0] if planar else None
    count_l = min(32, n)
    directions = torch.empty(count_l, d, dtype=real)
    weights = torch.empty(1, n, dtype=torch.float64) if weighted else None
    values, table, _, edges = sliced_wasserstein.binned(
        x, y, directions, weights, weights, p, bins, None, rescale
    )
    sliced_wasserstein.binned_backward(values, x, directions, weights, table, edges, rescale)
    known = torch.empty(1, count_l, bins, dtype=torch.int64)
    sliced_wasserstein.binned_to(x, known, directions, weights, p, [0.0, 1.0], rescale)


def attention_cases(chip: str) -> Iterator[tuple[Any, ...]]:
    """dtype, width, tokens, mask and segments: the tuned ones with every mask, and variations."""
    for mask in ("", "bits", "regions", "gate", "bias"):
        yield torch.bfloat16, 64, 77, mask
    yield torch.bfloat16, 64, 77, "gate", [0, 70, 70, 75, 10, 20]
    yield torch.bfloat16, 40, 77, "regions"
    yield torch.bfloat16, 40, 77, "bits"
    yield torch.bfloat16, 80, 77, "bits"
    yield torch.float16, 64, 77, "bits"
    if chip == "sm_90":  # these take the compiler long, and are not tuned
        yield torch.float32, 64, 77, "bits"
        yield torch.bfloat16, 160, 77, "bits"
        yield torch.bfloat16, 64, 154, "bits"
        yield torch.bfloat16, 64, 231, "bits"


def run_attention(
    dtype: torch.dtype, d: int, tokens: int, mask: str, segments: Sequence[int] = ()
) -> None:
    batch, heads, n = 2, 10, 4096
    q = torch.empty(batch, n, heads, d, dtype=dtype).transpose(1, 2)
    k, v = (torch.empty(batch, tokens, heads, d, dtype=dtype).transpose(1, 2) for _ in range(2))
    words = torch.empty(batch, n, -(-tokens // 32), dtype=torch.int32)
    sets = [torch.empty(batch, rows, dtype=torch.int32) for rows in (n, tokens)]
    features = [torch.empty(batch, rows, 128, dtype=dtype) for rows in (n, tokens)]
    shift = torch.empty(1)
    bits = words if mask == "bits" else None
    regions = sets if mask == "regions" else [None, None]
    gate = [*features, shift] if mask == "gate" else [None, None, None]
    bias = torch.empty(1, 1, n, tokens, dtype=dtype) if mask == "bias" else None
    scaled = 0.125, list(segments) or [0, tokens]
    kernels = masked_cross_attention
    kernels.forward(q, k, v, bits, *regions, *gate, bias, None, *scaled)
    if mask == "gate":
        bits = words
    for needs in ((True, True, True), (True, False, False)):
        kernels.backward(q, q, k, v, bits, *regions, bias, None, *scaled, *needs)
    if mask in ("gate", "bias"):
        needs = mask == "gate", mask == "bias", False
        kernels.scores_backward(
            q, q, k, v, bits, *regions, *gate, bias, None, *scaled, True, *needs
        )


def run_delta(dtype: torch.dtype, size: int, types: Sequence[int], last: bool) -> None:
    """All of the six predictions and two samples; ``last``: predictions are channels-last."""
    format = torch.channels_last if last else torch.contiguous_format
    parts = [torch.empty(size, 4, 128, 128, dtype=dtype, memory_format=format) for _ in range(6)]
    parts += [torch.empty(size, 4, 128, 128) for _ in range(2)]
    out = torch.empty_like(parts[6])
    scalars = [torch.empty(size) for _ in range(6)]
    places, numbers = joint([*parts, out]), (0.7, 4.0)
    for output, guided in ((0, False), (1, True), (2, False), (2, True)):
        halves = (out, None if guided else out)
        rest = parts, scalars, places, *numbers
        delta_combine.combine(halves, *rest, 0.0, types, guided, output)
        delta_combine.backward(halves, *rest, types, guided, output, True)
    delta_combine.combine((out, None), *rest, 0.7, types, True, 2)


def run_latents(dtype: torch.dtype, size: int, last: bool) -> None:
    """A clean image of what a UNet says of the first channels of its input, and a step; ``last``:
    the UNet's tensors are channels-last."""
    format = torch.channels_last if last else torch.contiguous_format
    wide, moved = (
        torch.empty(size, 9, 128, 128, dtype=dtype, memory_format=format) for _ in range(2)
    )
    said, grad = (
        torch.empty(size, 4, 128, 128, dtype=dtype, memory_format=format) for _ in range(2)
    )
    sample, out, u, stepped = wide[:, :4], *(torch.empty(size, 4, 128, 128) for _ in range(3))
    level, channels = torch.empty(1).expand(size), torch.empty(4)
    flat, wider = torch.empty(4, 4, 128, 128), torch.empty(4, 9, 128, 128)
    numbers = level, level, channels
    for kind in range(3):
        places = joint([sample, said, out, flat])
        clean_latents.clean(sample, said, out, *numbers, channels, kind, places)
        clean_latents.backward(out, said, grad, *numbers, kind, joint([out, said, grad, flat]))
    clean_latents.clean(sample, said, out, *numbers[:2], None, None, 0, places)
    places = joint([u, grad, stepped, flat]), joint([wide, moved, wider])
    for factors, rate in ((None, None), (level, level)):
        control_step.step(u, grad, stepped, wide, moved, factors, rate, 0.5, places)


def run_group_norm(dtype: torch.dtype, shape: tuple[int, ...], last: bool, more: bool) -> None:
    """``more``: with a shift, a residual, and gradients to all."""
    format = torch.channels_last if last else torch.contiguous_format
    x, out, total = (torch.empty(shape, dtype=dtype, memory_format=format) for _ in range(3))
    weight, bias = torch.empty(2, shape[1], dtype=dtype)
    shift = torch.empty(shape[:2], dtype=dtype) if more else None
    mean, rstd = torch.empty(2, len(x), 32)
    vectors = weight, bias, shift
    none = torch.empty(0)
    group_norm_silu.forward(
        out, total, mean, rstd, last, x, total if more else None, *vectors, 32, 1e-5, True
    )
    found = [out, *vectors] if more else [out, none, none, none]
    group_norm_silu.backward(
        found, last, x, total if more else None, x, *vectors, mean, rstd, 32, True
    )


def run_wide_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.empty(1, 9216, 512, dtype=dtype) for _ in range(3))
    p = torch.empty(1, 1024, 9216, dtype=dtype)
    wide_attention.probabilities(q[:, :1024], k, 0.04, p)
    wide_attention.pulls(q[:, :1024], v, p, torch.empty(1, 1024, 1), 0.04)


def run_geglu(dtype: torch.dtype, n: int, cut: bool) -> None:
    """``cut``: rows lie in two steps."""
    x = torch.empty(2, 2304, 2 * n, dtype=dtype)[:, int(cut) :]
    out = torch.empty(*x.shape[:-1], n, dtype=dtype)
    geglu.forward(x, out)
    geglu.backward(out, x, torch.empty(x.shape, dtype=dtype))


def record(ptx: bool, chip: str) -> list[Launch]:
    """All distinct launches of all cases, with PTX or without, that this chip would be given."""
    target, limit = CHIPS[chip]
    found: dict[Launch, None] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[describe(self, args, kwargs)] = None

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(sliced_wasserstein, "speaks_ptx", lambda tensor: ptx),
        mock.patch.object(chips, "multiprocessors", lambda tensor: 132),
        mock.patch.object(chips, "amd", lambda: target.backend == "hip"),
        mock.patch.object(
            chips,
            "generation",
            lambda tensor: target.arch // 10 if target.backend == "cuda" else 0,
        ),
        mock.patch.object(masked_cross_attention, "_shared_memory", lambda tensor: limit),
    ):
        for dtype, d, tokens, *others in attention_cases(chip):
            q = torch.empty(1, 1, 1, d, dtype=dtype)
            if masked_cross_attention.refuses(q, tokens, d) is None:
                run_attention(dtype, d, tokens, *others)
        for case in cases():
            run_sliced_wasserstein(*case)
        run_delta(torch.bfloat16, 1, (1, 0, 0), False)
        run_delta(torch.float16, 64, (0, 0, 0), True)
        run_latents(torch.bfloat16, 1, False)
        run_latents(torch.float16, 2, True)
        for last in (False, True):
            run_group_norm(torch.bfloat16, (1, 512, 192, 192), last, False)
            run_group_norm(torch.bfloat16, (2, 1280, 8, 8), last, False)
        run_wide_attention(torch.bfloat16)
        run_geglu(torch.bfloat16, 2560, False)
        if chip == "sm_90":  # not tuned
            for last in (False, True):
                run_group_norm(torch.float32, (2, 320, 128, 128), last, True)
                run_group_norm(torch.float32, (2, 640, 16, 16), last, True)
            run_wide_attention(torch.float32)
            run_geglu(torch.float16, 5120, True)
            run_geglu(torch.float32, 5, False)
    return list(found)


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Triton's specialization rules: ones are constants, multiples of 16 are marked."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature, constants, aligned = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned.append(position)
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned.append(position)
    return Launch(
        kernel.fn.__module__,
        kernel.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


def compile_for(chip: str, launch: Launch) -> list[str]:
    """What is wrong with this launch on this chip; nothing if it is fine."""
    target, limit = CHIPS[chip]
    source = ASTSource(
        fn=getattr(sys.modules[launch.module], launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.aligned},
    )
    try:
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    except Exception as error:  # whatever the compiler raises is the finding
        return [f"{chip}: {launch}: does not compile: {type(error).__name__}: {error}"]
    wrong = []
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        registers, local, declared = usage(compiled.asm["cubin"])
        again = spills_in_loops(compiled.asm["cubin"]) if local else 0
        if local > SPILLS.get(launch.kernel, 0) and again > LOOP_SPILLS:
            wrong.append(f"spills: {registers} registers, {local} bytes, {again} times in a loop")
        if target.arch == 90:  # where wide products are told their operands' places so
            wrong += [f"reads {one} unset" for one in unset(compiled.asm["cubin"])]
        if target.arch >= 90:
            declared = max(0, declared - KIB)  # the system's part, where a program has any
        if declared:
            # Triton asks for more than 48 KiB only where its own part alone needs them.
            shared, limit = shared + declared, 48 * KIB
            if compiled.asm["ptx"].count("sdcore_words[") != 1:
                wrong.append("the compiler copied the array in shared memory")
    else:
        # Scalar registers spill to lanes of vector registers; only these go to memory.
        count = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        if count is None or int(count[1]) > SPILLS.get(launch.kernel, 0):
            wrong.append(f"spills: {count and count[1]} registers")
    if shared > limit:
        wrong.append(f"{shared} bytes shared, {limit} exist")
    return [f"{chip}: {launch}: {finding}" for finding in wrong]


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of them kept in memory, and bytes of shared memory that the code declares.

    As the chip's own tools report them; what Triton has allocated at the launch is not in it.
    """
    report = tool("cuobjdump", cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell registers: {report!r}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def spills_in_loops(cubin: bytes) -> int:
    """Instructions within loops that write registers to memory or read them back. What does so
    before and after a loop costs next to nothing, and leaves the loop the registers."""
    lines = tool("nvdisasm", cubin, "-c").splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if line.startswith(".L")}
    found: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\S* .*?`\((\.L\w+)\)", line)
        if jump:
            body = range(labels.get(jump[1], i), i)  # empty, if it jumps forward
            found.update(at for at in body if re.search(r"\b(STL|LDL)\b", lines[at]))
    return len(found)


def unset(cubin: bytes) -> list[str]:
    """Uniform registers that are read before anything is written to them, in the code's order.

    ptxas 12.8, which Triton 3.6 has, made such code: it counted places of a tensor core's operands
    from a register that it set only later.
    """
    found: list[str] = []
    written: set[str] = set()
    for line in tool("nvdisasm", cubin, "-c").splitlines():
        matched = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+) (.*?);", line)
        if matched is None:
            continue
        name, operands = matched[1], [re.findall(r"\bUR\d+", one) for one in matched[2].split(",")]
        writes = re.match("U[A-Z0-9]|[RS]2UR|LDCU|VOTEU|REDUX", name) is not None
        read = [one for some in operands[int(writes) :] for one in some]
        if "gdesc" in matched[2]:  # four registers, or the last two where A is in others
            first = int(read[0][2:])
            in_registers = re.match(r"R\d+, R\d+", matched[2]) is not None
            read = [f"UR{first + i}" for i in range(2 if in_registers else 0, 4)]
        found += [one for one in read if one not in written and one not in found]
        for one in operands[0] if writes else ():
            wide = ".64" in name or ".WIDE" in name
            written |= {one, f"UR{int(one[2:]) + 1}"} if wide else {one}
    return found


def tool(name: str, cubin: bytes, option: str) -> str:
    """What a tool of Triton's wheel says of this code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        command = [path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    start = time.monotonic()
    jobs = []
    for chip in arguments.chips:
        launches = record(False, chip)
        if CHIPS[chip][0].backend == "cuda":
            launches += [launch for launch in record(True, chip) if launch not in launches]
        jobs += [(chip, launch) for launch in launches]
    # A cache of its own: nothing compiled earlier counts.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(arguments.workers) as pool:
            found = list(pool.map(compile_for, *zip(*jobs, strict=True)))
    wrong = [line for lines in found for line in lines]
    print(*wrong, sep="\n")
    seconds = time.monotonic() - start
    good = sum(not lines for lines in found)
    print(
        f"ahead of time: {good} of {len(jobs)} compilations fit "
        f"({len(arguments.chips)} chips, {seconds:.0f} s)"
    )
    return 1 if wrong or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
