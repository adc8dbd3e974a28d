"""Launches chosen variants, for a profiler or compute-sanitizer to watch, or says how long each launch takes.

  METRICS=$(python benchmarks/profile_scan.py --metrics)
  ncu --metrics $METRICS -k regex:Scan python benchmarks/profile_scan.py Ti 64 197 1,1,0,0,0,0,0,0
  python benchmarks/profile_scan.py --times Ti 1 6085 3,24,8,32,2,0,3,8

A case is a model, a batch, a length and a variant: the fields of vim_scan_variant (selective_scan_cuda.h), in order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

_STALLS = (
    "barrier",
    "long_scoreboard",
    "short_scoreboard",
    "mio_throttle",
    "math_pipe_throttle",
    "wait",
    "not_selected",
)
#: What benchmarks/notes.md quotes: how busy issue, exponential unit and L1 are, and what warps wait for.
METRICS = [
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    *(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in _STALLS),
]


def launch_times(calls, rounds: int = 4) -> dict[str, float]:
    """Median microseconds of each kernel of `calls`. Launches that overlap wait within their own time."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if "Scan" in event.name:
            times.setdefault(event.name.removeprefix("void ").split("(")[0], []).append(event.time_range.elapsed_us())
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="MODEL BATCH LENGTH VARIANT, any number of times")
    parser.add_argument("--times", action="store_true", help="print how long each launch takes")
    parser.add_argument("--metrics", action="store_true", help="print ncu's names of what benchmarks/notes.md quotes")
    arguments = parser.parse_args()
    if arguments.metrics:
        print(",".join(METRICS))
        return
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
    import cuda_library as lib
    from scan import MODELS, layers

    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if arguments.times else 0
    for model, batch, length, fields in zip(*[iter(arguments.case)] * 4, strict=True):
        channels, rank = MODELS[model]
        variant = lib.Variant(*map(int, fields.split(",")))
        sets = layers(int(batch), int(length), channels, rank, torch.float16, l2_bytes)
        calls = [each.fused(variant) for each in sets]
        for call in calls:
            call()
        torch.cuda.synchronize()
        if arguments.times:
            times = ", ".join(f"{name} {us:.1f} us" for name, us in launch_times(calls).items())
            print(f"Vim-{model}, batch {batch}, {length} tokens: {times}", flush=True)


if __name__ == "__main__":
    main()
