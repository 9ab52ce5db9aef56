"""What holds for every test: which examples property tests draw, and that no test depends on the one before it."""
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# A random example is a lottery: it may fail on the one machine where nobody can mend it. So `make test` draws the same
# examples everywhere, and tells a failing one as it is; `make fuzz` draws new ones, makes a failing one small (for
# five minutes at most, by Hypothesis' own limit) and remembers it for the next time. No test sets its own numbers.
COMMON = {"deadline": None, "print_blob": True,  # a busy machine is slow, and a fixture does not change between examples
          "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("fixed", **COMMON, derandomize=True, database=None, max_examples=40,
                          phases=(Phase.explicit, Phase.generate))
settings.register_profile("fuzz", **COMMON, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# The files of real benchmarks that the environment names (`data/benchmarks`) are for the tests that ask for them: all
# others find none, on whatever machine they run.
REAL_FILES = {variable: os.environ.get(variable) for variable in (
    "ECHOCHAMBER_GSM8K", "ECHOCHAMBER_GSM8K_TRAIN", "ECHOCHAMBER_GSM1K", "ECHOCHAMBER_MATH500", "ECHOCHAMBER_MATH_TRAIN",
    "ECHOCHAMBER_AIME", "ECHOCHAMBER_AIME24")}


@pytest.fixture(autouse=True)
def no_local_benchmarks(monkeypatch):
    for variable in (*REAL_FILES, "ECHOCHAMBER_HUB"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    "The file of a real benchmark by its name; the test that asks for one skips where the environment names none."
    def find(name: str) -> Path:
        variable = f"ECHOCHAMBER_{name.upper().replace('-', '_')}"
        return Path(REAL_FILES[variable]) if REAL_FILES[variable] else pytest.skip(f"{variable} names no file")
    return find


def pytest_configure(config):
    "pytest-randomly chooses the order; the numbers are seeded here, with or without it."
    config.option.randomly_reset_seed = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The whole study begins first, then whatever starts studies, in whatever order the tests come otherwise: these files
    take longest, so the processes end together."""
    items.sort(key=lambda item: (item.path.stem not in ("test_study_smoke", "test_study_kills"), not item.path.stem.startswith("test_study")))


@pytest.fixture(autouse=True)
def same_random_numbers():
    "Whatever a test draws without a seed of its own is the same in any order of the tests."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter, config):
    "Name the order, so that it can be had again."
    if (seed := config.getoption("randomly_seed", None)) is not None:
        terminalreporter.write_line(f"order of the tests: --randomly-seed={seed}")
