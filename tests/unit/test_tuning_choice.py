"""Whether a run compiles, and why: by the settings and by all its pictures, done or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from imagemill import models
from imagemill.config import Settings, merge
from imagemill.errors import ConfigError
from imagemill.guidance import guidance
from imagemill.intake import Models
from imagemill.records import Tuning
from imagemill.staging import Shape
from imagemill.tuning_choice import MOST_SIZES, Choice, Figures, as_stats, check, choices, choose, tuning_of

SIZE = ((1024, 1024),)
KNOWN = Figures(1.4, measured=True)


def chosen(pictures: int | None = 10_000, workers: int = 1, *, on_cuda: bool = True, **given: Any) -> Choice:
    return choose(merge(Settings(), given), SIZE, pictures, workers, on_cuda, KNOWN)


def test_a_long_run_on_a_gpu_compiles_and_a_short_one_does_not() -> None:
    long, short = chosen(10_000), chosen(8)
    assert long.tuning == Tuning(True, "bf16", "auto", SIZE, 1)
    assert not short.tuning.compile
    assert long.spent == short.spent == 43
    assert long.saved == pytest.approx(10_000 * 1.4 * (1 - 0.812 / 1.347), rel=1e-6)
    assert long.why == short.why == "as measured on one H100"


def test_what_counts_are_the_pictures_of_each_worker() -> None:
    assert chosen(200, workers=1).tuning.compile
    assert not chosen(200, workers=8).tuning.compile


def test_an_estimate_that_was_not_measured_says_so() -> None:
    found = choose(Settings(), SIZE, 10_000, 1, True, Figures(1.4))
    assert found.tuning.compile
    assert found.why == "if it gains as much as Z-Image on one H100"


def test_auto_is_off_on_the_cpu_and_on_is_allowed_there() -> None:
    assert not chosen(on_cuda=False).tuning.compile
    assert chosen(8, on_cuda=False, compile="on").tuning.compile


@pytest.mark.parametrize("asked", ["on", "off"])
def test_what_was_asked_for_is_done(asked: str) -> None:
    for pictures in (8, 10_000, None):
        found = chosen(pictures, compile=asked)
        assert (found.tuning.compile, found.why) == (asked == "on", "as asked")


def test_with_exact_compiling_does_not_hang_on_the_length_of_the_run() -> None:
    assert {chosen(pictures, exact=True).tuning for pictures in (8, 10_000)} == {Tuning(sizes=SIZE)}
    assert chosen(8, exact=True, compile="on").tuning.compile


def test_fp8_compiles_however_short_the_run() -> None:
    assert chosen(8, precision="fp8").tuning == Tuning(True, "fp8", "auto", SIZE, 1)
    assert not chosen(8, precision="fp8", compile="off").tuning.compile


def test_a_run_of_unknown_length_does_not_compile_by_itself() -> None:
    assert not chosen(None).tuning.compile
    assert "not known" in chosen(None).why


def test_the_most_frequent_sizes_are_warmed_up_and_many_sizes_are_compiled_all_the_same() -> None:
    many = tuple((64 * number, 64) for number in range(1, MOST_SIZES + 2))
    found = tuning_of(Settings(), many, 10_000, 1, True, KNOWN)
    assert (found.compile, found.sizes) == (True, many[:MOST_SIZES])


def test_batches_are_compiled_apart_and_cost_more() -> None:
    alone, batched = (choose(Settings(), SIZE, 10_000, 1, True, KNOWN, batch) for batch in (1, 4))
    assert (alone.spent, batched.spent) == (43, 64)
    assert batched.tuning.batch == 4


def test_tasks_with_guidance_and_tasks_without_cost_as_much_more_as_batches_do() -> None:
    kinds = [(False,), (True,), (False, True)]
    spent = [choose(Settings(), SIZE, 10_000, 1, True, KNOWN, guided=kind).spent for kind in kinds]
    assert spent == [43, 43, 64]
    assert choose(Settings(), SIZE, 10_000, 1, True, KNOWN, 4, (False, True)).spent == 64


def test_the_attention_asked_for_is_handed_on() -> None:
    assert chosen(attention="_flash_3").tuning.attention == "_flash_3"


def test_fp8_on_a_machine_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^precision fp8 needs a GPU, and this run is on the CPU; remove it$"):
        check(merge(Settings(), {"precision": "fp8"}), on_cuda=False)
    check(merge(Settings(), {"precision": "fp8"}), on_cuda=True)
    check(Settings(), on_cuda=False)


# --- a run's models ---------------------------------------------------------------------------------------------------


def book(*names: str) -> Models:
    found = Models(models.resolve, names[0])
    for name in names:
        found.get(name)
    return found


SHAPES = [
    Shape("model:tiny", "shape:512x512", 900, 450.0),
    Shape("model:tiny", "shape:1024x1024", 100, 140.0),
    Shape("model:tiny-edit", "shape:128x128", 3, 0.03),
    Shape("model:fake", "shape:16x16", 7, 1.0),
]


def test_each_model_has_its_own_choice_from_its_own_pictures() -> None:
    used = book("tiny", "tiny-edit", "fake", "judge:reference").used()
    auto = merge(Settings(), {"batch_size": "auto"})
    found = choices(auto, used, SHAPES, workers=1, on_cuda=True, device="NVIDIA H100 80GB HBM3")
    assert list(found) == ["tiny", "tiny-edit"]
    assert found["tiny"].tuning == Tuning(
        True, "bf16", "auto", ((512, 512), (1024, 1024)), 4, guided=(False,), adapters=False
    )
    assert found["tiny"].saved == pytest.approx(1000 * 0.59 * (1 - 0.812 / 1.347))
    assert found["tiny"].why == "as measured on one H100"
    assert not found["tiny-edit"].tuning.compile
    assert found["tiny-edit"].why == "if it gains as much as Z-Image on one H100"


def test_a_source_read_as_it_is_needed_has_the_size_that_is_expected() -> None:
    used = book("tiny").used()
    lazy = choices(merge(Settings(), {"compile": True}), used, None, 1, on_cuda=True)["tiny"]
    assert lazy.tuning == Tuning(True, sizes=((128, 128),), batch=8, guided=(False,), adapters=True)
    asked = choices(merge(Settings(), {"size": "64x32"}), used, None, 1, on_cuda=True)["tiny"]
    assert asked.tuning == Tuning(sizes=((64, 32),), batch=8, guided=(False,))


def test_the_kinds_of_guidance_among_the_tasks_are_warmed_up() -> None:
    used = book("tiny", "fake").used()
    bare, scaled = guidance(0.0, None, None), guidance(4.0, None, "dull")

    def found(*kinds: Any) -> Tuning:
        shapes = [Shape("model:tiny", f"shape:{64 * (place + 1)}x64", 9, 9.0, own) for place, own in enumerate(kinds)]
        other = Shape("model:fake", "shape:16x16", 7, 1.0, (scaled,))
        return choices(Settings(), used, [*shapes, other], 1, on_cuda=True)["tiny"].tuning

    assert found((bare,)).guided == (False,)
    assert found((scaled,)).guided == (True,)
    assert found((bare,), (scaled, bare)).guided == (False, True)


def test_the_tasks_of_a_source_read_as_it_is_needed_have_the_guidance_of_the_run() -> None:
    used = book("tiny").used()

    def lazy(**given: Any) -> Tuning:
        return choices(merge(Settings(), given), used, None, 1, on_cuda=True)["tiny"].tuning

    assert lazy(guidance=3.0).guided == (True,)
    assert lazy(guidance=0.0).guided == lazy().guided == (False,)


def test_whether_there_are_adapters_is_told_by_the_models_own_tasks() -> None:
    used = book("tiny", "tiny-edit").used()
    worn = [replace(shape, adapters=shape.model == "model:tiny") for shape in SHAPES]
    found = choices(Settings(), used, worn, 1, on_cuda=True)
    assert (found["tiny"].tuning.adapters, found["tiny-edit"].tuning.adapters) == (True, False)
    assert choices(Settings(), used, [], 1, on_cuda=True)["tiny"].tuning.adapters
    assert choices(Settings(), used, worn, 1, on_cuda=True, kept=True)["tiny-edit"].tuning.adapters


def test_models_are_given_their_tunings() -> None:
    found = book("tiny", "fake")
    tuning = Tuning(True, sizes=SIZE)
    found.tune({"tiny": tuning, "nobody": Tuning()})
    assert found.get(None).spec.tuning == found.used()[0].spec.tuning == tuning
    assert found.get("fake").spec.tuning == Tuning()


def test_the_report_is_told_what_was_chosen() -> None:
    assert as_stats({"tiny": chosen(compile="on")}) == {
        "tiny": {"compiled": True, "why": "as asked", "precision": "bf16", "attention": "auto", "sizes": ["1024x1024"],
                 "batch_size": 1},
    }  # fmt: skip
    kinds = [("bf16", "float32"), ("bf16", "bfloat16"), ("bf16", "float16"), ("fp8", "bfloat16")]
    named = [Choice(Tuning(precision=precision), "", dtype=dtype).precision for precision, dtype in kinds]
    assert named == ["fp32", "bf16", "fp16", "fp8"]
