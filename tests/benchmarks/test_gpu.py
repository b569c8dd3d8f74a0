"""``benchmarks.gpu`` is written where there is no accelerator: every line of it has run, on a CPU and on a stand-in."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_learning

FILES = {str(Path(module.__file__)) for module in (gpu, gpu_learning)}
CPU = torch.device("cpu")


class StandInForCuda:
    """The parts of ``torch.cuda`` that record a graph; what is recorded runs again when the graph is replayed."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class CUDAGraph:
        def replay(self) -> None:
            self.recorded()

    current_stream = Stream

    @staticmethod
    def stream(_: Stream) -> Any:
        return nullcontext()

    def __init__(self, step: Any, h: torch.Tensor, rows: torch.Tensor) -> None:
        self.step = step

    @classmethod
    @contextmanager
    def graph(cls, graph: "StandInForCuda.CUDAGraph") -> Iterator[None]:
        cls.capturing = graph
        yield
        cls.capturing = None

    capturing: Any = None


class RecordingStep(gpu_learning.FastStep):
    """Is recorded while a graph is captured, as the device's operations would be: nothing is computed then."""

    def __call__(self, h: torch.Tensor, rows: torch.Tensor) -> Any:
        run = super().__call__
        if StandInForCuda.capturing is not None:
            StandInForCuda.capturing.recorded = lambda: run(h, rows)
            return None
        return run(h, rows)


@contextmanager
def lines_run() -> Iterator[set[tuple[str, int]]]:
    """(file, line) of the benchmark's lines that run within."""
    found: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)
        threading.settrace(None)


def lines_of(code: CodeType) -> set[int]:
    """The lines of all functions in ``code``, which are those that do not run when the file is imported."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {line for *_, line in code.co_lines() if line} if code.co_flags & CO_OPTIMIZED else set()
    return own.union(*(lines_of(part) for part in inner))


def test_every_line_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu_learning, "FastStep", RecordingStep)
    monkeypatch.setattr(gpu.logging, "disable", lambda: None)  # it would last
    monkeypatch.setattr(gpu.torch.accelerator, "is_available", lambda: False)
    chosen = []
    monkeypatch.setattr(gpu.torch.cpu, "set_device", chosen.append)
    monkeypatch.setattr(gpu, "use_full_fp32", lambda: None)  # it would last, too
    with lines_run() as run:
        monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu:0", "--small"])
        gpu.main()
        assert chosen == [0]
        table = capsys.readouterr().out
        times = gpu_learning.step_times(32, 3, CPU, StandInForCuda)
        assert gpu.note_of_step(times["largest difference of a parameter"], 1.0) == "0.0e+00"
        gpu_learning.Projection(CPU, 4)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))  # a run calls it in other threads
        monkeypatch.setattr(sys, "argv", ["gpu"])
        with pytest.raises(SystemExit):
            gpu.main()
    missed = [
        f"{Path(path).name}:{line}"
        for path in sorted(FILES)
        for line in sorted(lines_of(compile(Path(path).read_text(encoding="utf-8"), path, "exec")))
        if (path, line) not in run
    ]
    assert missed == []
    parts = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert [part.split(" ")[0] for part in dict.fromkeys(parts)] == [
        "part",
        "forward",
        "loading",
        "copies",
        "step",
        "run",
    ]
    assert "failed" not in table and "nan" not in table and "What waits for what" in table


def test_features_are_the_same_whether_copies_overlap_or_not():
    host, rows = [torch.full((2, 3, 4, 4), value, dtype=torch.uint8) for value in (1, 2, 3)], {}
    for way in (gpu.in_turn, gpu.overlapped):
        rows[way] = []
        way(lambda batch, way=way: rows[way].append(batch) or batch, host, CPU)
    assert all(torch.equal(a, b) for a, b in zip(rows[gpu.in_turn], rows[gpu.overlapped], strict=True))
    assert len(rows[gpu.in_turn]) == len(rows[gpu.overlapped]) == len(host)
