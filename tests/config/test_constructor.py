"""Options without effect are refused in Python as they are in files."""

import copy
import dataclasses

import pytest
from torch import Tensor

from vlm_steer import get_method
from vlm_steer.config import dump, resolve
from vlm_steer.engine.hooks import LogitsAt, Method
from vlm_steer.errors import ConfigError

IDLE_BETA = r"^pai: beta has no effect here: gamma is 1, so there is no guidance\. Remove it\.$"


def test_an_option_without_effect_is_refused_by_the_constructor_as_in_a_file():
    with pytest.raises(ConfigError, match=IDLE_BETA):
        get_method("pai")(alpha=0.3, gamma=1.0, beta=0.5)
    with pytest.raises(ConfigError, match=IDLE_BETA):
        resolve({"method": "pai", "gamma": 1.0, "beta": 0.5})


def test_it_is_refused_at_its_default_too():
    with pytest.raises(ConfigError, match=IDLE_BETA):
        get_method("pai")(gamma=1.0, beta=0.1)


def test_layers_are_refused_by_a_method_that_acts_in_none():
    with pytest.raises(ConfigError, match="layers has no effect here: vcd acts on"):
        get_method("vcd")(layers="all")


def test_a_class_without_a_name_is_called_by_its_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unregistered(Method):
        def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
            return logits

    with pytest.raises(ConfigError, match=r"^Unregistered: scope has no effect here"):
        Unregistered(scope="all")


def test_an_option_that_was_not_given_may_be_without_effect():
    assert get_method("pai")(alpha=0.3, gamma=1.0).beta == 0.1


def test_a_range_is_checked_before_an_effect():
    with pytest.raises(ConfigError, match=r"beta is 2\.0; it must lie in"):
        get_method("pai")(gamma=1.0, beta=2.0)


def test_replace_keeps_an_option_that_loses_its_effect_and_refuses_to_set_it():
    guided = get_method("pai")(gamma=1.5, beta=0.5)
    plain = guided.replace(gamma=1.0)
    assert plain.beta == 0.5
    assert plain.replace(gamma=1.5) == guided
    with pytest.raises(ConfigError, match=IDLE_BETA):
        plain.replace(beta=0.2)
    assert plain.replace(gamma=1.2, beta=0.2).beta == 0.2


def test_copies_and_equality_are_those_of_any_frozen_dataclass():
    plain = get_method("pai")(gamma=1.0)
    assert dataclasses.replace(plain, alpha=0.7) == get_method("pai")(gamma=1.0, alpha=0.7)
    assert copy.deepcopy(plain) == copy.copy(plain) == plain
    assert hash(copy.copy(plain)) == hash(plain)
    assert resolve(dump([plain])) == (plain,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.alpha = 1.0
