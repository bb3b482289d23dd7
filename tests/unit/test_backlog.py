"""Backlog: the oldest, the longest and the retries are each found, whatever was taken before."""

from __future__ import annotations

from random import Random

from imagemill.backlog import Backlog, Entry
from imagemill.records import Ticket, Try


def entry(ordinal: int, cost: float = 1.0, need: str = "m", group: str = "") -> Entry:
    return Entry(Ticket(ordinal, (need,), group, cost), ordinal)


def retry(ordinal: int, not_before: float = 0.0) -> Entry:
    made = entry(ordinal)
    made.tries.append(Try(1, 0, "transient", ""))
    made.alone, made.not_before = True, not_before
    return made


def filled(*entries: Entry) -> Backlog:
    backlog = Backlog()
    for one in entries:
        backlog.add(one)
    return backlog


def test_the_oldest_is_the_first_that_came() -> None:
    first, second = entry(0), entry(1, cost=9.0)
    backlog = filled(first, second)
    assert backlog.oldest() is first
    backlog.take(first)
    assert backlog.oldest() is second
    backlog.take(second)
    assert backlog.oldest() is None
    assert len(backlog) == 0


def test_the_longest_of_equals_is_the_one_that_came_first() -> None:
    short, long, later = entry(0), entry(1, cost=5.0), entry(2, cost=5.0)
    backlog = filled(short, long, later)
    taken = []
    while found := backlog.longest(short.bucket):
        taken.append(found.ordinal)
        backlog.take(found)
    assert taken == [1, 2, 0]


def test_buckets_are_apart_by_needs_and_by_group() -> None:
    a, b, c = entry(0), entry(1, need="n"), entry(2, group="g")
    backlog = filled(a, b, c)
    assert dict(backlog.heads()) == {a.bucket: a, b.bucket: b, c.bucket: c}
    backlog.take(b)
    assert dict(backlog.heads()) == {a.bucket: a, c.bucket: c}
    assert backlog.longest(b.bucket) is None


def test_retries_are_kept_apart_until_their_time_and_come_in_order_of_arrival() -> None:
    late, early, now = retry(1, not_before=9.0), retry(3), retry(2)
    backlog = filled(entry(0), late, early, now)
    assert [one.ordinal for one in backlog.retries(5.0)] == [2, 3]
    assert [one.ordinal for one in backlog.retries(9.0)] == [1, 2, 3]
    assert sorted(backlog.retry_times()) == [0.0, 0.0, 9.0]
    assert (len(backlog), backlog.waiting()) == (4, 1)
    backlog.take(early)
    assert [one.ordinal for one in backlog.retries(5.0)] == [2]


def test_a_member_of_a_split_batch_waits_again_before_those_that_came_later() -> None:
    split, later = entry(0), entry(1)
    backlog = filled(split, later)
    backlog.take(split)
    split.tries.append(Try(1, 0, "oom", "", 4))
    backlog.add(split)
    assert backlog.oldest() is split
    assert backlog.longest(split.bucket) is split


def test_members_of_a_split_batch_keep_their_order() -> None:
    entries = [entry(number) for number in range(4)]
    backlog = filled(*entries)
    for one in entries[:3]:
        backlog.take(one)
        one.tries.append(Try(1, 0, "oom", "", 3))
    for one in entries[:3]:
        backlog.add(one)
    assert [one.ordinal for one in backlog.in_order()] == [0, 1, 2, 3]


def test_overtaken_counts_the_later_tasks_that_went_first() -> None:
    entries = [entry(number) for number in range(5)]
    backlog = filled(*entries)
    assert backlog.overtaken() == 0
    backlog.take(entries[3])
    backlog.take(entries[4])
    assert backlog.overtaken() == 2
    backlog.take(entries[0])
    assert backlog.overtaken() == 2
    assert Backlog().overtaken() == 0


def test_it_agrees_with_a_plain_list_over_many_random_moves() -> None:
    rng, backlog, plain = Random(7), Backlog(), []
    for ordinal in range(600):
        one = entry(ordinal, cost=rng.randrange(5), need=rng.choice("abc"))
        backlog.add(one)
        plain.append(one)
        while plain and rng.random() < 0.55:
            gone = rng.choice([rng.choice(plain), plain[0], backlog.longest(plain[-1].bucket)])
            assert gone
            plain.remove(gone)
            backlog.take(gone)
            if rng.random() < 0.2:
                gone.tries.append(Try(1, 0, "oom", "", 2))
                backlog.add(gone)
                plain.append(gone)
        assert len(backlog) == len(plain)
        assert {one.ordinal for one in backlog.in_order()} == {one.ordinal for one in plain}
        for bucket, head in backlog.heads():
            members = [one for one in plain if one.bucket == bucket]
            assert head is max(members, key=lambda one: (one.ticket.cost, -one.ordinal))
        assert {bucket for bucket, _ in backlog.heads()} == {one.bucket for one in plain}
