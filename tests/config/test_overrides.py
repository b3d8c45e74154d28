import pytest

from tests.config.conftest import Lens, Tilt
from vlm_steer.config import apply_overrides
from vlm_steer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("methods")

LENS, TILT = Lens(), Tilt(degrees=1)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("lens.power=0.25", Lens(power=0.25)),
        ("lens.power=1e-1", Lens(power=0.1)),
        ("lens.power = 2", Lens(power=2.0)),
        ("mode=water", Lens(mode="water")),
        ("lens.layers=[2, null]", Lens(layers=(2, None))),
        ("lens.layers={indices: [1, 18]}", Lens(layers={"indices": [1, 18]})),
        ("lens.dots=null", Lens()),
        ("manual=true", Lens(manual=True)),
    ],
)
def test_one_option_changes_and_the_rest_stays(override, changed):
    assert apply_overrides((LENS, TILT), [override]) == (changed, TILT)


def test_without_overrides_methods_are_untouched():
    assert apply_overrides((LENS, TILT), []) == (LENS, TILT)


def test_overrides_of_one_method_act_together():
    changed = apply_overrides((LENS, TILT), ["focus=2.0", "manual=true", "tilt.power=3"])
    assert changed == (Lens(focus=2.0, manual=True), Tilt(degrees=1, power=3.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["power"], r"--set power: is not method\.option=value"),
        (["=3"], r"is not method\.option=value"),
        ([".power=3"], r"is not method\.option=value"),
        (["lens.=3"], r"is not method\.option=value"),
        (["power=3"], r"several methods in use have power .lens, tilt.\. Write lens\.power="),
        (["lnes.power=3"], r"'lnes' is not among the methods in use .*Did you mean 'lens'"),
        (["lens.pwer=3"], r"unknown option 'pwer' for lens\. Did you mean 'power'"),
        (["degres=3"], r"unknown option 'degres' for lens, tilt\. Did you mean 'degrees'"),
        (["lens.power=yes"], r'power must be a number, not the text "yes"'),
        (["lens.power="], "power must be a number, not null"),
        (["lens.power=99"], r"--set lens\.power=99: lens: power must lie in \[0, 10\]"),
        (["lens.power=["], "not valid YAML"),
        (["lens.power=1", "lens.power=2"], "power is set twice"),
        (["lens.focus=2.0"], "focus has no effect here"),
    ],
)
def test_a_wrong_override_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides((LENS, TILT), overrides)


def test_an_override_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="no method is in use"):
        apply_overrides((), ["power=1"])


def test_a_method_that_stands_twice_is_not_guessed():
    with pytest.raises(ConfigError, match="Change it in the file"):
        apply_overrides((LENS, LENS), ["lens.power=1"])
