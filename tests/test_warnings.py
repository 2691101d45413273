"""A warning that no test expects is an error, but for some of dependencies, which are named."""

from __future__ import annotations

import warnings

import pytest


def test_every_warning_is_an_error_unless_it_is_named(pytestconfig: pytest.Config) -> None:
    first, *named = pytestconfig.getini("filterwarnings")
    assert first == "error"
    for one in named:
        action, message, kind, *_ = one.split(":")
        assert (action, len(message) > 20) == ("ignore", True), one
        assert kind.endswith("Warning")
        assert "hfcompress" not in one
    with pytest.raises(UserWarning, match="of ours"):
        warnings.warn("one of ours", stacklevel=1)
