"""What start-up tells: where the time went, what was chosen and why. Text only; nobody parses it."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm.clock import Clock


@dataclass(slots=True)
class StartupReport:
    """Collects stages with their seconds; the composer prints the lines as they come."""

    clock: Clock
    started_s: float = field(init=False)
    stages: list[tuple[str, float]] = field(default_factory=list)
    _last_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self._last_s = self.clock.monotonic_s()

    def stage(self, name: str) -> str:
        """Close the stage that just ended and return its line."""
        now = self.clock.monotonic_s()
        seconds, self._last_s = now - self._last_s, now
        self.stages.append((name, seconds))
        return f"  {seconds:7.2f} s  {name}"

    def total(self) -> str:
        return f"  {self.clock.monotonic_s() - self.started_s:7.2f} s  total"


def sources_lines(values: dict[str, object], sources: dict[str, str]) -> list[str]:
    """`max_num_seqs = 8 (environment)` for every value that is no default; keys are never shown."""
    secret = {"api_key", "admin_key"}
    shown = {name: "set" if name in secret else repr(value) for name, value in values.items()}
    return [f"{name} = {shown[name]} ({sources[name]})" for name in sorted(sources)]


def gib(num_bytes: int) -> str:
    """Bytes for people: GiB from one GiB on, else MiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
