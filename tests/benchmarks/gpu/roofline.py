"""What the card itself can do, measured beside everything else: the rate of products, and of copies."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from tests.benchmarks.gpu import Given, Say


def run(given: Given, until: float, record: dict[str, Any], say: Say) -> None:
    """Measure products of square matrices by precision, in TFLOP/s, and copies on the device, in GB/s."""
    side, copied = (64, 2**10) if given.quick else (8192, 2**28)
    record["tflops"] = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float64", torch.float64, "ieee"),
    ):
        a = torch.randn(side, side, device=given.device).to(dtype)
        out = torch.empty_like(a)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = tf32
        try:
            taken = seconds(given.device, lambda a=a, out=out: torch.mm(a, a, out=out))
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        record["tflops"][name] = 2 * side**3 / taken / 1e12
    source = torch.zeros(copied, device=given.device)
    target = torch.empty_like(source)
    taken = seconds(given.device, lambda: target.copy_(source))
    record["copy_gb_per_s"] = 2 * source.nbytes / taken / 1e9
    rates = ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in record["tflops"].items())
    say(f"{rates}, copies {record['copy_gb_per_s']:.4g} GB/s")


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    """Return the median time of some work on the device, by its own clock where it has one."""
    work()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return median(taken)
