from __future__ import annotations

import os
import re
from pathlib import Path

import jax
import pytest

from infsub import provenance


def test_the_revision_is_of_infsubs_own_checkout(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{40}\+?", provenance.git_revision())
    # In another's checkout, and not of it.
    installed = Path(provenance.__file__).with_name("installed.py")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.git_revision() == ""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux gives a process its cores")
def test_the_machine_has_the_cores_that_the_process_may_use(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the machine is its accelerators")
    for cores, text in (({0}, "1 core of "), ({0, 3}, "2 cores of ")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert provenance.machine() == text + provenance.processor()
