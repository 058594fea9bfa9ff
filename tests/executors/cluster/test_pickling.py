"""Pickling for other processes: what is named, what is sent, what stays."""

from __future__ import annotations

import os.path
import pickle
import subprocess
import sys

import pytest
import torch
import torch.backends

from flowtrain_dask.cluster.pickling import dumps, loads


def test_modules_are_named_also_those_of_a_type_of_their_own() -> None:
    found = loads(dumps({"backends": torch.backends, "path": os.path, "torch": torch}))
    assert found == {"backends": torch.backends, "path": os.path, "torch": torch}
    assert type(torch.backends).__name__ != "module"  # what makes it hard


def test_what_stays_is_the_other_sides_and_inside_of_anything() -> None:
    mine, yours = [1], [2]
    found = loads(dumps({"it": mine, "again": (mine,), "other": [1]}, [mine]), [yours])
    assert found["it"] is yours
    assert found["again"][0] is yours
    assert found["other"] == [1]


def test_without_what_stays_it_is_a_pickle_like_any_other() -> None:
    assert pickle.loads(dumps({"a": (1, 2.5, "three")})) == {"a": (1, 2.5, "three")}


def test_methods_of_a_script_that_name_a_backend_of_torch_travel() -> None:
    """A class of ``__main__`` is sent by value, with the modules that its methods mention."""
    script = """
import sys, torch
from flowtrain_dask.cluster.codec import encode
from flowtrain_dask.cluster.pickling import dumps

class Mine:
    def look(self):
        return torch.backends.mkldnn.is_available(), self.__class__.__name__

sys.stdout.buffer.write(dumps(Mine()))
encode(Mine())
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr.decode()
    assert loads(made.stdout).look() == (torch.backends.mkldnn.is_available(), "Mine")


def test_what_does_not_pickle_says_so() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        dumps(number for number in range(3))
