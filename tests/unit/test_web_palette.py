"""The style sheet's colours, computed: text has a contrast of 4.5 to its ground, what only bounds has 3 (WCAG 2.2, AA)."""

from __future__ import annotations

import importlib.resources
import re

import pytest

STYLE = importlib.resources.files("statecache.web").joinpath("static/style.css").read_text()
TEXT = [
    ("ink", "paper"), ("ink", "card"), ("ink", "warn-soft"), ("ink", "bad-soft"), ("ink", "accent-soft"), ("ink", "been"),
    ("muted", "paper"), ("muted", "card"), ("muted", "warn-soft"), ("accent", "paper"), ("accent", "card"),
    ("accent", "accent-soft"), ("accent", "warn-soft"), ("accent", "bad-soft"), ("on-accent", "accent"), ("warn", "paper"),
    ("warn", "card"), ("bad", "paper"), ("bad", "card"), ("bad", "bad-soft"), ("ink", "line"),
]  # fmt: skip
BOUNDS = [("field", "card"), ("field", "paper"), ("accent", "line"), ("accent", "paper")]


def palette(scheme: str) -> dict[str, str]:
    light, _, rest = STYLE.partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rest))
        assert dark.keys() == found.keys(), "every colour has its dark one"
        return dark
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_measure_itself() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    colours = palette(scheme)
    low = {
        (one, on): contrast(colours[one], colours[on]) for one, on in TEXT if contrast(colours[one], colours[on]) < 4.5
    }
    low |= {
        (one, on): contrast(colours[one], colours[on]) for one, on in BOUNDS if contrast(colours[one], colours[on]) < 3
    }
    assert low == {}


def test_no_colour_stands_outside_the_palette() -> None:
    """Else it would be the same in the dark."""
    rules = STYLE.partition("*, *::before")[2]
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsl", rules) == []
