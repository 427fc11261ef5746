"""Functions of modules that are imported when first used."""

from __future__ import annotations

import sys

import pytest

from moba_train.attention import lazy


def test_a_module_is_imported_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_LOADED", {})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert lazy.load("colorsys", "rgb_to_hsv")(0.0, 0.0, 1.0) == pytest.approx((2 / 3, 1.0, 1.0))
    found = sys.modules.pop("colorsys")
    assert lazy.load("colorsys", "rgb_to_hsv") is found.rgb_to_hsv, "looked up, not imported again"
    assert "colorsys" not in sys.modules


def test_an_unknown_name_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_LOADED", {})
    with pytest.raises(AttributeError, match="no_such_function"):
        lazy.load("colorsys", "no_such_function")
    assert not lazy._LOADED
