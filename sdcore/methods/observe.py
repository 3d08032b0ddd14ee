"""Records what a pipeline's denoiser sees and says, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdcore.patching import Call, Method, Run


@dataclass(frozen=True)
class Record:
    """One call of the UNet."""

    index: int  # steps of the scheduler before it
    timestep: float
    alpha: float  # share of the clean latents in the input; alpha² + sigma² = 1
    sigma: float  # share of the noise
    rows: int
    guided: bool
    input_norm: float  # root of the mean square, per element, of the latents in the input
    output_norm: float  # of what the UNet says
    guidance_norm: float  # of its difference between prompt and negative prompt; 0 without guidance
    milliseconds: float  # of the methods further in and the UNet


class Observe(Method):
    """Records noise level, norms and time of each call of the UNet; changes nothing.

    ``observe.runs`` has a list of :class:`Record` for each run that ended, also by an error; the
    last of them is ``observe.records``. On a GPU, times are those between two events on its stream,
    and nothing waits for the GPU before the run has ended. ::

        observe = sdcore.Observe()
        with sdcore.patch(pipe, observe):
            pipe("a lighthouse in the fog")
        observe.chart("lighthouse.png")

    Put on last, it sees what all other methods make of a call; put on first, the UNet alone.
    """

    def __init__(self) -> None:
        self.runs: list[list[Record]] = []

    @property
    def records(self) -> list[Record]:
        if not self.runs:
            raise ValueError("nothing was observed yet: call the pipeline that it is patched on")
        return self.runs[-1]

    def begin(self, run: Run) -> None:
        run.of(self).taken = []

    def denoise(self, call: Call, proceed: Callable[[Call], Tensor]) -> Tensor:
        before = _now(call.sample.device)
        out = proceed(call)
        after = _now(call.sample.device)
        guidance = None
        if call.unconditional is not None:
            guidance = _norm(out[call.conditional] - out[call.unconditional])
        values = [
            torch.as_tensor(call.timestep, device=out.device).float().flatten()[0],
            call.alpha,
            call.sigma,
            _norm(call.sample[:, : call.latents.shape[1]]),
            _norm(out),
            torch.zeros((), device=out.device) if guidance is None else guidance,
        ]
        numbers = (call.index, len(out), guidance is not None)
        call.run.of(self).taken.append((numbers, torch.stack(values), before, after))
        return out

    def end(self, run: Run, error: BaseException | None) -> None:
        self.runs.append([_record(*one) for one in run.of(self).taken])

    def chart(self, path: str | Path, run: int = -1) -> None:
        """Draws a run: noise level, norms and milliseconds over the steps. Needs matplotlib.

        Args:
            path: where to, as a PNG, SVG or PDF.
            run: which of ``runs``.
        """
        if not self.runs:
            raise ValueError("nothing was observed yet: call the pipeline that it is patched on")
        from sdcore import figures

        figures.draw_lines(*_panels(self.runs[run])).savefig(path)


def _norm(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _record(
    numbers: tuple[int, int, bool],
    level: Tensor,
    before: float | torch.cuda.Event,
    after: float | torch.cuda.Event,
) -> Record:
    timestep, alpha, sigma, into, out, guidance = level.tolist()
    if isinstance(before, float):
        milliseconds = 1000 * (after - before)
    else:
        after.synchronize()
        milliseconds = before.elapsed_time(after)
    index, rows, guided = numbers
    return Record(index, timestep, alpha, sigma, rows, guided, into, out, guidance, milliseconds)


def _panels(records: list[Record]) -> tuple[list[int], list[tuple[str, dict[str, list[float]]]]]:
    """The steps, and for each panel its title and its lines."""
    named = {
        "share in the input": {"clean latents": "alpha", "noise": "sigma"},
        "root mean square": {
            "latents in the input": "input_norm",
            "prediction": "output_norm",
            "prompt − negative prompt": "guidance_norm",
        },
        "milliseconds a call": {"": "milliseconds"},
    }
    panels = [
        (
            title,
            {label: [getattr(one, name) for one in records] for label, name in lines.items()},
        )
        for title, lines in named.items()
    ]
    return [one.index for one in records], panels
