"""Where a step's time goes: traces as JAX's profiler writes them, and programs as XLA prints them, in small."""

from pathlib import Path

import pytest

import deepseek_jax
from deepseek_jax.launch import _profile
from deepseek_jax.launch._profile import Event

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_mul (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %multiply.1 = bf16[8]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp(experts)/mul"}
}

%fused_call (q: bf16[8]) -> bf16[8] {
  %q = bf16[8]{0} parameter(0)
  ROOT %call.1 = bf16[8]{0} custom-call(%q), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main.1 (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %loop_fusion = bf16[8]{0} fusion(%x), kind=kLoop, calls=%fused_mul
  %slice_fusion = bf16[8]{0} fusion(%loop_fusion), kind=kCustom, calls=%fused_call, metadata={op_name="jit(step)/router/x"}
  ROOT %gemm.2 = bf16[8]{0} custom-call(%slice_fusion), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/transpose(jvp(projections))/attention/dot"}
}
"""  # noqa: E501


def event(name: str, begin: float, taken: float, thread: int = 1) -> Event:
    return Event((1, thread), name, begin, taken)


def trace(*operations: tuple, device: str = "/device:GPU:0") -> dict:
    """A trace with one stream, and the profiler's summary line beside it."""
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": device}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "Stream #14(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "XLA Ops"}},
    ]
    spans = [
        {"ph": "X", "pid": 1, "tid": thread, "ts": begin, "dur": taken, "name": "k", "args": {"hlo_op": name}}
        for thread in (1, 2)
        for name, begin, taken in operations
    ]
    return {"traceEvents": [*names, *spans, {"ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 9, "name": "host"}]}


def test_operations_count_once_and_loops_without_their_bodies():
    events = [event("while", 0, 100), event("dot", 10, 30), event("dot", 50, 40), event("copy", 100, 5)]
    assert _profile.own_times(events) == {"while": 30, "dot": 70, "copy": 5}
    assert sum(_profile.own_times(events).values()) == _profile.busy(events)


def test_time_in_which_two_lines_run_at_once_is_busy_once():
    assert _profile.busy([event("a", 0, 10), event("b", 5, 10, thread=2), event("c", 30, 1)]) == 16


def test_summaries_beside_the_streams_of_a_gpu_are_left_out():
    found = _profile.device_events(trace(("b", 5, 2), ("a", 0, 5)))
    assert [(e.name, e.begin, e.taken) for e in found] == [("a", 0, 5), ("b", 5, 2)]
    assert len(_profile.device_events(trace(("a", 0, 5), device="/host:CPU"))) == 2


def test_fusions_are_named_after_what_is_fused_in_them():
    found = _profile.operations(PROGRAM)
    assert _profile.part(found["loop_fusion"].scope) == _profile.PARTS["experts"]
    assert _profile.part(found["gemm.2"].scope) == _profile.PARTS["attention"]
    assert _profile.kind("slice_fusion", found["slice_fusion"].target) == "own kernels"
    assert _profile.kind("gemm.2", found["gemm.2"].target) == "matrix products"


def test_the_table_adds_up():
    events = [event("loop_fusion", 0, 60), event("gemm.2", 70, 30), event("unknown", 100, 10)]
    lines = _profile.table(events, PROGRAM, n_steps=1)
    assert "0.10 ms of operations per step" in lines[0]
    assert "0.11 ms, of which the device idled 0.01 ms" in lines[0]
    rows = {" ".join(line.split()[:-2]): line.split()[-1] for line in lines[2:5]}
    assert rows == {"routed experts": "60.0%", "attention itself": "30.0%", _profile.REST: "10.0%"}


def test_a_directory_without_a_trace_is_explained(tmp_path):
    with pytest.raises(_profile.UserError, match="wrote no"):
        _profile.newest_trace(tmp_path)


def test_parts_are_scopes_that_the_code_opens():
    """A scope that nobody opens would be a row that is always missing."""
    code = "\n".join(path.read_text() for path in Path(deepseek_jax.__file__).parent.rglob("*.py"))
    assert {name for name in _profile.PARTS if f'named_scope("{name}")' not in code} == set()
