"""The error tree: every kind has its error, every foreign exception its kind, every error its exit code."""

from __future__ import annotations

import errno
from typing import Any, get_args

import pytest

from imagemill import errors
from imagemill.errors import (
    KINDS,
    TASK_ERRORS,
    BadTask,
    ChangedTasksError,
    ConfigError,
    FolderInUseError,
    ImagemillError,
    InputError,
    LedgerError,
    NoWorkersError,
    OutOfMemory,
    OutputError,
    StoreFailed,
    TaskError,
    TaskFileError,
    Transient,
    WorkerGone,
    classify,
)
from imagemill.records import Kind


def tree(root: type[Any]) -> set[type[Any]]:
    return {root}.union(*map(tree, root.__subclasses__()))


def named(name: str, words: str = "", base: type[Exception] = RuntimeError) -> Exception:
    """An exception whose class has this name, as torch's have."""
    error: Exception = type(name, (base,), {})(words)
    return error


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_every_kind_has_its_error() -> None:
    assert set(TASK_ERRORS) == set(KINDS) == set(get_args(Kind))
    for kind, error in TASK_ERRORS.items():
        assert error.kind == kind
        assert issubclass(error, TaskError)


def test_every_task_error_is_in_the_table_or_a_special_case_of_one_that_is() -> None:
    for error in tree(TaskError) - {TaskError}:
        assert issubclass(error, TASK_ERRORS[error.kind]), error


def test_every_error_of_the_file_belongs_to_one_tree() -> None:
    found = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, BaseException)}
    assert found == tree(ImagemillError) & found
    drawn = errors.__doc__ or ""
    assert all(error.__name__ in drawn for error in found)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImagemillError, 1),
        (InputError, 2),
        (TaskFileError, 2),
        (ConfigError, 2),
        (ChangedTasksError, 2),
        (FolderInUseError, 2),
        (LedgerError, 2),
        (OutputError, 1),
        (NoWorkersError, 1),
        (TaskError, 1),
    ],
)
def test_exit_codes_are_those_of_the_readme(error: type[ImagemillError], code: int) -> None:
    assert error.exit_code == code


def test_many_bad_rows_are_told_one_a_line_with_how_many_more_there_are() -> None:
    error = TaskFileError(["a.csv, line 2: width: is 7", "a.csv, line 3: seed: is -1"], 5, "mend them")
    assert str(error).splitlines() == [*error.problems, "... and 3 more", "mend them"]
    assert error.total == 5
    assert str(TaskFileError(["one"], 1)) == "one"


def test_changed_tasks_keep_their_differences() -> None:
    error = ChangedTasksError(["cat: seed: 1 -> 2"], 3)
    assert (error.differences, error.total) == (("cat: seed: 1 -> 2",), 3)
    assert str(error).splitlines() == [
        "3 tasks changed under ids this folder already knows",
        "  cat: seed: 1 -> 2",
        "give options=RunOptions(rerun_changed=True) to make them again, or another out to keep both",
    ]
    assert str(ChangedTasksError(["cat: seed: 1 -> 2"], 1)).startswith("1 task changed")


# --- classify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [kind("why") for kind in TASK_ERRORS.values()] + [StoreFailed("full")])
def test_a_task_error_stays_what_it_is(error: TaskError) -> None:
    assert classify(error) is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        named("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB."),
        named("OutOfMemoryError"),
        named("AcceleratorError", "CUDA error: out of memory"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_a_full_device_is_known_by_name_and_words(error: Exception) -> None:
    assert type(classify(error)) is OutOfMemory


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost"),
        named("AcceleratorError", "CUDA error: unknown error"),
    ],
    ids=str,
)
def test_a_poisoned_context_ends_the_worker(error: Exception) -> None:
    fault = classify(error)
    assert type(fault) is WorkerGone
    assert str(error) in str(fault)


@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("x"), RuntimeError(), OSError(5, "I/O"), StopIteration()]
)
def test_what_is_not_known_is_tried_again(error: Exception) -> None:
    fault = classify(error)
    assert type(fault) is Transient
    assert type(error).__name__ in str(fault)


def test_a_message_is_one_line_of_bounded_length() -> None:
    fault = classify(ValueError("first\n\n  second\tthird " + "x" * 10_000))
    assert str(fault).startswith("ValueError: first second third x")
    assert "\n" not in str(fault)
    assert len(str(fault)) < 600


def test_every_part_of_the_list_of_poisons_can_match() -> None:
    assert all(part == part.lower() for part in errors.POISONING)


def test_a_bad_task_is_no_transient() -> None:
    assert not issubclass(BadTask, Transient)
    assert issubclass(StoreFailed, Transient)
