"""What importing the package sets."""

import os
import runpy

import pytest

import teacher_student_mask


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        # libgomp would take the count, and not the policy.
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_wait_briefly_unless_the_user_has_said_how(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(teacher_student_mask.__file__)
    assert os.environ.get("GOMP_SPINCOUNT") == expected
