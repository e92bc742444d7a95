"""Everything that is fast or slow on a GPU, in under eight minutes, on any machine with CUDA; needs no Ray.

    python -m benchmarks.gpu [--quick] [--json FILE]

Floors are the card's own: the rate of one large product in bfloat16 and in float32, and of one copy, all measured here
first. A routed layer has 6 · R · D · O flop, forward and backward, for R rows.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.report import Row, main
from benchmarks.steps import Memory, Step, batch_of, rbm_of, settings_of
from benchmarks.student_epoch import graph
from rbm_dist.models.student import make_mlp
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.train.kmeans import assigned_sums
from rbm_dist.train.part_batches import PartBatches
from rbm_dist.train.student import bf16
from rbm_dist.train.student_rows import Drawn, StudentRows

_SIDE = 8192  # of the square matrices whose product is the card's rate


def measure(quick: bool, device: torch.device | None = None, small: bool = False) -> list[Row]:
    """`device`, `small`: to go through it without a GPU, for figures that say nothing."""
    if device is None and not torch.cuda.is_available():
        raise SystemExit("no GPU that CUDA can use")
    device = device or torch.device("cuda")
    rows, width, experts = (256, 32, 4) if small else (65_536, 1024, 64)
    rate, full_rate, copied = _card(device, *((64, 2**14) if small else (_SIDE, 2**28)))
    found = [
        Row("the card: bfloat16", rate / 1e12, "TFLOP/s", 1.0, None),
        Row("the card: float32, without TF32", full_rate / 1e12, "TFLOP/s", 1.0, None),
        Row("the card: read and write", copied / 1e9, "GB/s", 1.0, None),
    ]
    name = f"routed layer, {rows:,} × {width}, {experts} experts, k = 1"
    for precision, floor, target_share in (("bf16", rate, 0.6), ("float32", full_rate, 0.6)):
        spent = _layer(device, rows, width, experts, precision)
        flop = 6 * rows * width * width
        found.append(Row(f"{name}, {precision}", flop / spent / 1e12, "TFLOP/s", flop / spent / floor, target_share))
    found += _steps(device, rows, experts, 0.4)
    found.append(_memory(device, rows, experts))
    found += _epochs(device, 2_000 if small else 100_000 if quick else 1_000_000)
    found.append(_clusters(device, rows, width, experts, full_rate))
    return found


def _card(device: torch.device, side: int, floats: int) -> tuple[float, float, float]:
    """flop per second in bfloat16 and in float32, and bytes read and written per second."""
    spent = []
    for dtype in (torch.bfloat16, torch.float32):
        a_SS = torch.randn(side, side, device=device, dtype=dtype)
        spent.append(_seconds(partial(torch.mm, a_SS, a_SS), device))
    source = torch.randn(floats, device=device)
    spent.append(_seconds(partial(torch.empty_like(source).copy_, source), device))
    return 2 * side**3 / spent[0], 2 * side**3 / spent[1], 8 * floats / spent[2]


def _layer(device: torch.device, rows: int, width: int, experts: int, precision: str) -> float:
    """Seconds of a routed layer, forward and backward, with its dispatch and dropout."""
    rbm = rbm_of((width, width), experts, device=device)
    x, key = torch.randn(rows, width, device=device, requires_grad=True), torch.arange(rows, device=device)

    def step() -> None:
        with bf16(device, precision):
            out, _ = rbm(x, key)
        out.sum().backward()

    return _seconds(step, device)


def _steps(device: torch.device, rows: int, experts: int, target: float) -> list[Row]:
    """A whole step against one of an MLP of the same width, both in the GPU's precision."""
    rows, mesh = rows // 4, Mesh.single(device)
    mlp = make_mlp(128, 512, 47, 3, "layer", 0.1, 0).to(device)
    batch, settings = batch_of(rows, 128, 47, mesh), settings_of(num_experts=experts)
    rbm_s, mlp_s = (
        _seconds(partial(Step(each, settings, mesh), batch), device)
        for each in (rbm_of((128, 512, 512, 47), experts, device=device), mlp)
    )
    return [Row(f"step of {rows:,} rows: RbM vs MLP of its width", rbm_s * 1e3, "ms", mlp_s / rbm_s, target)]


def _memory(device: torch.device, rows: int, experts: int) -> Row:
    """What the memory takes of a step."""
    mesh, settings = Mesh.single(device), settings_of(num_experts=experts)
    rbm = rbm_of((512, 512, 512, 47), experts, device=device)
    batch, step, memory = batch_of(rows // 4, 512, 47, mesh), Step(rbm, settings, mesh), Memory(rbm, settings, mesh)
    traces = step(batch)
    step_s, memory_s = _seconds(partial(step, batch), device), _seconds(partial(memory, traces), device)
    return Row(f"memory of {experts} × 512: 3 % of a step", memory_s * 1e3, "ms", 0.03 * step_s / memory_s, 1.0)


def _epochs(device: torch.device, nodes: int) -> list[Row]:
    """An epoch with rows kept on the GPU, and read ahead from files, against its steps alone."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        store = graph(folder, nodes, 128, 40)
        settings = settings_of(num_experts=16)
        step = Step(rbm_of((128, 256, 256, 40), 16, device=device), settings, Mesh.single(device))
        of = PartBatches.of(store, list(range(store.num_parts)), partial(np.less_equal, 0), 8192)
        drawn = [Drawn(number, shares, number, number) for number, shares in enumerate(of.epoch(0, 0))]
        for name, budget in (("kept on the GPU", 2**40), ("from files", 0)):
            rows = StudentRows(store, settings, device, torch.float32, 600.0)
            rows.keep(of.ids, budget=budget)
            with rows.batches("gpu", of, drawn[:1]) as batches:
                (first,) = batches
            alone = len(drawn) * _seconds(partial(step, first), device)
            spent = _seconds(partial(_epoch, rows, of, drawn, step), device, 1)
            title = f"epoch of {nodes:,} rows, {name}: its steps alone"
            found.append(Row(title, nodes / spent, "rows/s", alone / spent, 0.9))
    return found


def _epoch(rows: StudentRows, of: PartBatches, drawn: list[Drawn], step: Step) -> None:
    with rows.batches("gpu", of, drawn) as batches:
        for batch in batches:
            step(batch)


def _clusters(device: torch.device, rows: int, width: int, centres: int, rate: float) -> Row:
    x = torch.randn(rows, width, device=device)
    spent = _seconds(partial(assigned_sums, x, x[:centres]), device)
    flop = 2 * rows * width * centres
    return Row(f"a pass of k-means, {rows:,} × {width}, {centres} centres", spent * 1e3, "ms", flop / spent / rate, 0.3)


def _seconds(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Median seconds on the clock, after a warm-up, until the GPU has done it."""
    call()
    spent = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    main(f"On a GPU: {name}", measure)
