"""The page about detection names every detector, and its example runs."""

import re
from pathlib import Path

from vlm_steer.detection import list_detectors

PAGE = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()


def test_the_page_names_every_detector():
    assert set(list_detectors()) <= set(re.findall(r"`(\w+)`", PAGE))


def test_the_example_of_the_page_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(example, "detection.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "('system', 'image_0', 'instruction', 'cue', 'generated')" in shown
