"""The start-up probe: it finds the smallest row count that is exact, and admits when there is none."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the reference platform needs the extra xllm[torch]")
exactness = pytest.importorskip("xllm.engine.kernels.reference.exactness")

WEIGHT = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))


def exact_linear(x, weight):
    """Element by element in one order, whatever the number of rows."""
    return (x.double()[:, None, :] * weight.double()[None]).sum(-1).float()


@pytest.mark.parametrize("safe", [4, 8, 16, 32])
def test_it_finds_the_multiple_below_which_another_kernel_runs(safe: int) -> None:
    def linear(x, weight):
        # The rest of a tile of `safe` rows is computed in another way.
        whole = len(x) // safe * safe
        return exact_linear(x, weight) + (torch.arange(len(x)) >= whole)[:, None] * 1e-6

    assert exactness.exact_row_multiple(linear, [WEIGHT], torch.float32) == safe


def test_it_admits_that_rows_depend_on_the_number_of_rows() -> None:
    def linear(x, weight):
        return exact_linear(x, weight) + 1e-6 * len(x)

    assert exactness.exact_row_multiple(linear, [WEIGHT], torch.float32) is None


def test_it_admits_that_rows_depend_on_their_place() -> None:
    def linear(x, weight):
        return exact_linear(x, weight) + 1e-6 * (torch.arange(len(x)) % 2)[:, None]

    assert exactness.exact_row_multiple(linear, [WEIGHT], torch.float32) is None
