"""Bytes to milliseconds: latency and bandwidth are told apart when sizes differ."""

from __future__ import annotations

import pytest

from xllm.cost import TransferCost, TransferFitter


def fitted(sizes: list[int], true: TransferCost, factor: float = 1.0) -> TransferCost:
    fitter = TransferFitter()
    for size in sizes:
        fitter.observe(size, true.transfer_ms(size) * factor)
    cost = fitter.cost()
    assert cost is not None
    return cost


def test_latency_and_bandwidth_are_recovered() -> None:
    cost = fitted([1000, 50_000, 2_000_000, 300_000, 10_000_000], TransferCost(0.8, 1e6))
    assert cost.latency_ms == pytest.approx(0.8, rel=1e-6)
    assert cost.bytes_per_ms == pytest.approx(1e6, rel=1e-6)


def test_one_size_only_is_all_bandwidth() -> None:
    cost = fitted([1_000_000] * 10, TransferCost(0.5, 1e6))
    assert cost.latency_ms == 0.0
    assert cost.transfer_ms(1_000_000) == pytest.approx(1.5)


def test_nothing_is_said_before_a_few_transfers_or_of_impossible_ones() -> None:
    fitter = TransferFitter()
    for _ in range(10):
        fitter.observe(0, 1.0)
        fitter.observe(10, 0.0)
        fitter.observe(10, float("nan"))
    for size in (10, 20, 30):
        fitter.observe(size, 1.0)
    assert fitter.cost() is None


@pytest.mark.parametrize("times", [[4.0, 3.0, 2.0, 1.0], [0.1, 1.0, 9.0, 80.0]])
def test_neither_part_is_negative(times: list[float]) -> None:
    fitter = TransferFitter()
    for size, ms in zip([1000, 2000, 4000, 8000], times, strict=True):
        fitter.observe(size, ms)
    cost = fitter.cost()
    assert cost is not None
    assert cost.latency_ms >= 0.0
    assert cost.bytes_per_ms > 0.0


def test_a_link_that_became_slower_is_followed() -> None:
    fitter = TransferFitter()
    for rate in (1e6, 1e5):
        for i in range(200):
            size = 1000 * (1 + i % 50)
            fitter.observe(size, 0.2 + size / rate)
    cost = fitter.cost()
    assert cost is not None
    assert cost.bytes_per_ms == pytest.approx(1e5, rel=0.05)
