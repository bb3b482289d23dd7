"""How many tasks share a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill import models
from imagemill.batching import BYTES_A_PIXEL, PIXELS, batch_for, limit, size_of, sizes
from imagemill.config import Settings, merge
from imagemill.families import family
from imagemill.intake import Models
from imagemill.models import Model
from imagemill.plan import shape_need
from imagemill.records import Task

Z_IMAGE = family("z_image")
GIB = 2**30


@dataclass(frozen=True)
class Family:
    """What batching asks of one."""

    max_batch: int
    max_edit_batch: int = 1
    fields: frozenset[str] = frozenset()


def used(*names: str) -> tuple[Model, ...]:
    book = Models(models.resolve, names[0])
    for name in names:
        book.get(name)
    return book.used()


def needs(model: str, width: int | None = None, height: int | None = None) -> tuple[str, ...]:
    return (f"model:{model}", "adapters:-", shape_need(Task("a", "p", width=width, height=height)))


def settings(**given: object) -> Settings:
    return merge(Settings(), {"batch_size": "auto", **given})


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((1024, 1024), 1),
        ((768, 768), 1),
        ((528, 512), 1),
        ((512, 512), 4),
        ((384, 384), 4),
        ((256, 256), 8),
        ((1024, 256), 4),
    ],
)
def test_small_pictures_share_a_pass_and_large_ones_do_not(size: tuple[int, int], batch: int) -> None:
    assert batch_for(*size, Z_IMAGE, True) == batch
    assert batch_for(*size, Z_IMAGE, False) == 1


@given(st.integers(16, 2048), st.integers(16, 2048), st.integers(1, 64), st.none() | st.integers(-GIB, 80 * GIB))
def test_a_batch_is_a_power_of_two_that_family_pixels_and_memory_hold(
    width: int, height: int, most: int, free: int | None
) -> None:
    batch = batch_for(width, height, Family(most), True, free)
    assert batch & (batch - 1) == 0
    assert 1 <= batch <= most
    assert batch == 1 or batch * width * height <= PIXELS
    assert batch == 1 or free is None or batch * width * height * BYTES_A_PIXEL <= free


def test_little_memory_makes_small_batches() -> None:
    a_picture = 512 * 512 * BYTES_A_PIXEL
    assert [batch_for(512, 512, Z_IMAGE, True, count * a_picture) for count in (0, 1, 2, 3, 4, 99)] == [
        1,
        1,
        2,
        2,
        4,
        4,
    ]


def test_a_family_that_only_edits_takes_as_many_edits() -> None:
    assert batch_for(256, 256, Family(8, 2, frozenset({"images"})), True) == 2
    assert batch_for(256, 256, Family(8, 2, frozenset({"images", "prompt_only"})), True) == 8


def test_the_limit_of_a_run_hangs_on_the_model_and_on_the_shape() -> None:
    most = limit(settings(), used("tiny", "fake"), on_cuda=True)
    assert most(needs("tiny", 512, 512)) == 4
    assert most(needs("tiny", 1024, 1024)) == 1
    assert most(needs("fake", 128, 128)) == 64
    assert most(needs("other", 128, 128)) == 1
    assert most(()) == 1


def test_a_number_counts_for_every_shape_up_to_what_the_family_takes() -> None:
    most = limit(settings(batch_size=16), used("tiny"), on_cuda=False)
    assert most(needs("tiny", 1024, 1024)) == 8
    assert limit(settings(batch_size=2), used("tiny"), on_cuda=False)(needs("tiny", 64, 64)) == 2


def test_exact_keeps_batches_of_one() -> None:
    most = limit(settings(exact=True), used("tiny"), on_cuda=True)
    assert most(needs("tiny", 128, 128)) == 1


def test_judges_have_their_own_batches() -> None:
    asked = settings(**{"judge.batch_size": 3})
    most = limit(asked, used("judge:reference"), on_cuda=False)
    assert most(needs("judge:reference")) == 3
    assert limit(settings(), used("judge:reference"), on_cuda=True)(needs("judge:reference")) == 4


def test_a_device_with_less_than_the_model_needs_has_room_for_one_alone() -> None:
    (model,) = used("tiny")
    for free, batch in ((model.spec.memory, 4), (model.spec.memory - 2 * GIB, 1)):
        assert limit(settings(), (model,), on_cuda=True, free=free)(needs("tiny", 512, 512)) == batch


@given(st.integers(1, 9999), st.integers(1, 9999))
def test_a_size_reads_back_from_the_needs(width: int, height: int) -> None:
    assert size_of(needs("m", width, height)) == (width, height)


def test_an_answer_has_no_size() -> None:
    assert size_of(needs("m")) is None
    assert size_of(()) is None


def test_sizes_come_by_how_often_they_are() -> None:
    counted = {needs("a", 64, 64): 2, needs("a", 32, 32): 1, needs("b", 32, 32): 4, needs("j"): 9}
    assert sizes(counted) == ((32, 32), (64, 64))
