"""The progress bar of blocking calls; the only place that knows tqdm."""

from __future__ import annotations

from typing import Any

from xllm.outputs import RequestOutput


class ProgressBar:
    """tqdm over requests with tokens per second, or nothing."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: Any = None
        self._num_tokens = 0
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="Processed prompts", unit="req", dynamic_ncols=True)

    def done(self, output: RequestOutput) -> None:
        """Called on the front's thread, one call at a time."""
        if self._bar is None:
            return
        self._num_tokens += sum(len(c.token_ids) for c in output.outputs)
        elapsed_s = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(f"output: {self._num_tokens / elapsed_s:.1f} tok/s", refresh=False)
        self._bar.update(1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
