import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.conftest import Lens, Tilt
from vlm_steer.config import describe, dump, resolve
from vlm_steer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("methods")

LENS = Lens()


@pytest.mark.parametrize("nothing", [None, "none", [], (), {"methods": []}, "none+none", [None]])
def test_nothing_is_an_empty_tuple(nothing):
    assert resolve(nothing) == ()


@pytest.mark.parametrize(
    "spec",
    [
        "lens",
        " lens ",
        ["lens"],
        LENS,
        [LENS],
        {"method": "lens"},
        {"method": "lens", "version": 1},
        {"methods": ["lens"]},
        {"methods": [{"method": "lens"}]},
        {"methods": [LENS]},
        "none+lens",
    ],
)
def test_every_way_to_write_a_default_method_gives_the_same(spec):
    assert resolve(spec) == (LENS,)


def test_order_is_kept():
    tilt = {"method": "tilt", "degrees": 3}
    assert resolve(["lens", tilt]) == (LENS, Tilt(degrees=3))
    assert resolve([tilt, "lens"]) == (Tilt(degrees=3), LENS)
    assert resolve("lens+lens") == (LENS, LENS)


@pytest.mark.parametrize(
    ("written", "held"),
    [
        ({"power": 2}, Lens(power=2.0)),
        ({"layers": [9, 14]}, Lens(layers=(9, 14))),
        ({"layers": [0.25, 1.0]}, Lens(layers=(0.25, 1.0))),
        ({"layers": {"indices": [1, 18]}}, Lens(layers={"indices": [1, 18]})),
        ({"layers": "all"}, Lens(layers="all")),
        ({"dots": [1, 2]}, Lens(dots=(1, 2))),
        ({"dots": None}, Lens()),
        ({"manual": True, "focus": 2}, Lens(manual=True, focus=2.0)),
    ],
)
def test_plain_data_becomes_typed_options(written, held):
    (method,) = resolve({"method": "lens", **written})
    assert method == held
    assert repr(method) == repr(held)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"power": "0.5"}, r'power must be a number, not the text "0.5"\. Remove the quotes'),
        ({"power": True}, "power must be a number, not true"),
        ({"power": None}, "power must be a number, not null"),
        ({"power": float("nan")}, "power must be a number, not NaN"),
        ({"power": float("inf")}, "power must be a number, not Infinity"),
        ({"power": [1]}, r"power must be a number, not \[1\]"),
        ({"power": object()}, "power must be a number, not"),
        ({"power": 11}, r"power must lie in \[0, 10\], not 11"),
        ({"count": 1.5}, "count must be a whole number, not 1.5"),
        ({"count": False}, "count must be a whole number, not false"),
        ({"manual": 1}, "manual must be true or false, not 1"),
        ({"manual": "no"}, 'manual must be true or false, not the text "no"'),
        ({"mode": "air"}, 'mode must be glass or water, not the text "air"'),
        ({"dots": [1, "2"]}, "dots must be a list .each a whole number. or null"),
        ({"layers": [1, 2, 3]}, r"layers must be all, \[start, stop\]"),
        ({"layers": {"lats": 2}}, r"\{lats: 2\} is not a selector"),
        ({"focus": 2.0}, "focus has no effect here: the focus is automatic"),
        ({"pwoer": 1.0}, r"unknown option 'pwoer' for lens\. Did you mean 'power'\?"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(written, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"method": "lens", **written})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lnes", r"unknown method or preset 'lnes'\. Did you mean 'lens'\?"),
        ("lens,tilt", "list of arms.*'\\+'"),
        ("", "names no method"),
        ("lens+", "names no method"),
        (3, "a int does not say what to steer"),
        ({}, "the key methods is missing"),
        ({"methods": "lens"}, 'methods must be a list, not "lens"'),
        ({"methods": [3]}, "a method is a name, or a mapping with method:, not 3"),
        ({"methods": [{"power": 1}]}, "the key method is missing"),
        ({"method": 3}, "method must be a name, not 3"),
        ({"method": "lnes"}, r"unknown method 'lnes'\. Did you mean 'lens'\?"),
        ({"metods": []}, r"unknown key 'metods'\. Did you mean 'methods'\?"),
        ({"version": 2, "methods": []}, "version 2 is not known"),
        ({"version": True, "methods": []}, "version true is not known"),
        ({"methods": [], "include": ["x.yaml"]}, "include works in files only"),
        ({"method": "lens", 3: 4}, "the key 3 must be text"),
        ("tilt", r"tilt needs degrees\. Write degrees: a whole number"),
        ({"method": "tilt"}, "tilt needs degrees"),
    ],
)
def test_a_wrong_specification_is_named_with_what_to_do(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve(spec)


def test_dump_writes_every_option_that_has_an_effect():
    assert dump([Lens(power=2.0)]) == {
        "version": 1,
        "methods": [
            {
                "method": "lens",
                "layers": [2, None],
                "scope": "positive",
                "power": 2.0,
                "manual": False,
                "mode": "glass",
                "dots": None,
                "count": 3,
            }
        ],
    }


def test_dump_of_nothing_loads_as_nothing():
    assert resolve(dump(())) == ()


def test_dump_refuses_what_no_file_can_hold():
    with pytest.raises(ConfigError, match="option 'power' holds a set"):
        dump([Tilt(degrees=1, power={1.0})])  # type: ignore[arg-type]


@given(
    power=st.floats(0, 10),
    manual=st.booleans(),
    count=st.integers(-(10**6), 10**6),
    dots=st.none() | st.lists(st.integers(0, 50)).map(tuple),
    start=st.integers(0, 30) | st.floats(0, 1),
)
def test_dumped_methods_load_unchanged_through_json(power, manual, count, dots, start):
    made = (
        Lens(power=power, manual=manual, count=count, dots=dots, layers=(start, None)),
        Tilt(degrees=count),
    )
    loaded = resolve(json.loads(json.dumps(dump(made))))
    assert loaded == made
    assert repr(loaded) == repr(made)


@given(text=st.text(alphabet=string.printable, max_size=30))
def test_any_text_either_resolves_or_says_what_is_wrong(text):
    try:
        methods = resolve(text)
    except ConfigError:
        return
    assert {type(method) for method in methods} <= {Lens}


def test_describe_lists_own_options_first_with_their_documentation():
    options = describe(Lens)
    assert [option.name for option in options] == [
        "layers",
        "power",
        "focus",
        "manual",
        "mode",
        "dots",
        "count",
        "scope",
    ]
    by_name = {option.name: option for option in options}
    assert by_name["power"].doc == "How much closer, in [0, 10]; 0 disables."
    assert by_name["focus"].doc == "Distance in metres; only used when ``manual``."
    assert by_name["layers"].doc == "Where to look."
    assert by_name["layers"].default == [2, None]
    assert by_name["scope"].doc.startswith("Streams to act on")
    assert by_name["mode"].type == "glass or water"
    assert not by_name["power"].required


def test_describe_marks_an_option_without_a_default():
    degrees = describe(Tilt)[0]
    assert degrees.name == "degrees"
    assert degrees.required
    assert degrees.default is None
