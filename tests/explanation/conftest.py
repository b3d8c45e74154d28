"""One explanation of an answer of the embedded model, for all tests."""

import warnings

import pytest

import vlm_steer
from vlm_steer.explanation import ExplainResult
from vlm_steer.tiny import scenes


@pytest.fixture(scope="session")
def tiny():
    return vlm_steer.load_tiny()


@pytest.fixture(scope="session")
def picture():
    """Not square, so that swapped axes show."""
    return scenes.render(scenes.scene("broken", 0)).resize((120, 90))


@pytest.fixture(scope="session")
def result(tiny, picture) -> ExplainResult:
    """A description, unsteered and steered; two words of each checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vlm_steer.explain(
            *tiny,
            picture,
            "Describe the image.",
            methods={"method": "pai", "alpha": 0.2, "gamma": 1.0},
            detectors=("logprob", "svar"),
            checks=2,
            max_new_tokens=12,
        )
