"""Logits processors: found by name, run before the masks, confined when they fail."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest

from xllm.engine.plan import SampleOp
from xllm.engine.sampling import LogitsProcessor, Sampler, load_processors, processors
from xllm.errors import ConfigError, InternalError
from xllm.types import SamplingParams


class Favourite:
    """Lifts the token named in extra_args."""

    name = "favourite"

    def __call__(self, logits: np.ndarray, op: SampleOp) -> None:
        logits[(op.params.extra_args or {}).get("favourite", 0)] += 1000


class Broken:
    name = "broken"

    def __call__(self, logits: np.ndarray, op: SampleOp) -> None:
        raise ZeroDivisionError("secret detail")


class Poison:
    name = "poison"

    def __call__(self, logits: np.ndarray, op: SampleOp) -> None:
        logits[3] = np.nan


def no_processor() -> object:
    return object()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, f"{__name__}:{target}", processors.GROUP)
        for name, target in (("favourite", "Favourite"), ("object", "no_processor"))
    )
    objects = {"Favourite": Favourite, "no_processor": no_processor}
    monkeypatch.setattr(EntryPoint, "load", lambda self: objects[self.attr])
    monkeypatch.setattr(processors, "entry_points", lambda *, group: points.select(group=group))


def draw(loaded: tuple[LogitsProcessor, ...], banned: tuple[int, ...] = ()) -> int:
    params = SamplingParams(temperature=0.0, extra_args={"favourite": 5})
    case = SampleOp(params=params, seed=0, choices=(0,), offset=0, banned=banned)
    logits = np.arange(8, dtype=np.float32)
    found = Sampler(loaded).sample(logits, case)[0].tokens[0].token_id
    assert np.array_equal(logits, np.arange(8)), "the caller's row stays as it was"
    return found


@pytest.mark.usefixtures("installed")
def test_a_processor_is_loaded_by_name_and_changes_the_token() -> None:
    loaded = load_processors(("favourite",))
    assert [p.name for p in loaded] == ["favourite"]
    assert draw(()) == 7
    assert draw(loaded) == 5


def test_masks_hold_against_processors() -> None:
    assert draw((Favourite(),), banned=(5,)) == 7


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'favorite'.*favourite, object"):
        load_processors(("favorite",))
    with pytest.raises(ConfigError, match="does not make a LogitsProcessor"):
        load_processors(("object",))


def test_no_names_load_nothing() -> None:
    assert load_processors(()) == ()


@pytest.mark.parametrize("processor", [Broken(), Poison()])
def test_a_failing_processor_is_an_internal_error_that_names_it(processor: LogitsProcessor) -> None:
    with pytest.raises(InternalError) as caught:
        draw((processor,))
    assert processor.name in caught.value.message
    assert "secret" not in caught.value.message
