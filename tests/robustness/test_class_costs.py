"""Perplexity of the classes that the native stage leaves out, over float32 on their own values."""

from __future__ import annotations

import pytest

from tests.native.native_driver import library
from tests.native.test_quality import check_cost, source, tokenizer  # noqa: F401  (fixtures)


@pytest.mark.skipif(library() is None, reason="the native kernels are not built here")
@pytest.mark.robustness
@pytest.mark.parametrize(("quantize", "most"), [("w4g32", 1.005), ("w8a8", 1.05)])
def test_a_class_costs_no_more_perplexity_than_is_said(source, tokenizer, quantize: str, most: float) -> None:  # noqa: F811
    check_cost(source, tokenizer, quantize, most)
