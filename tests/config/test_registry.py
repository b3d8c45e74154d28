import sys
import threading
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from tests.config.conftest import Lens
from vlm_steer import registry
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import ConfigError
from vlm_steer.registry import get_method, list_methods, register_method

pytestmark = pytest.mark.usefixtures("methods")


def test_registration_sets_the_name_and_lists_it():
    assert list_methods() == ["lens", "tilt"]
    assert get_method("lens") is Lens
    assert Lens.name == "lens"


def test_an_unknown_name_is_told_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown method 'lnes'\. Did you mean 'lens'\?"):
        get_method("lnes")


def test_a_name_far_from_everything_gets_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        get_method("zzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert "lens, tilt" in str(caught.value)


def test_a_taken_name_is_refused_and_the_owner_stays():
    @dataclass(frozen=True, kw_only=True)
    class Other(Method):
        """Another class."""

    with pytest.raises(ConfigError, match=r"belongs to tests\.config.conftest\.Lens"):
        register_method("lens")(Other)
    assert get_method("lens") is Lens


def test_defining_the_same_class_again_replaces_it():
    def define() -> type[Method]:
        @register_method("again")
        @dataclass(frozen=True, kw_only=True)
        class Again(Method):
            """Defined twice, as in a notebook."""

        return Again

    first, second = define(), define()
    assert first is not second
    assert get_method("again") is second


@pytest.mark.parametrize("name", ["", "Lens", "2lens", "le-ns", "a+b", "a,b", "a.yaml", "none"])
def test_a_name_that_a_specification_could_not_hold_is_refused(name):
    with pytest.raises(ConfigError, match="cannot name a method"):
        register_method(name)


def test_a_class_that_is_no_method_is_refused():
    @dataclass(frozen=True)
    class Stranger:
        """Not a method."""

    with pytest.raises(ConfigError, match="does not derive from"):
        register_method("stranger")(Stranger)  # type: ignore[type-var]


def test_a_forgotten_dataclass_decorator_is_refused():
    class Forgotten(Method):
        """Would lose its fields silently."""

        strength: float = 1.0

    with pytest.raises(ConfigError, match="not a frozen dataclass"):
        register_method("forgotten")(Forgotten)


def test_an_option_called_like_a_key_of_the_file_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Clash(Method):
        """Could not be written down."""

        method: str = "x"

    with pytest.raises(ConfigError, match="an option cannot be called method"):
        register_method("clash")(Clash)


def test_every_module_in_the_methods_package_is_imported_once(monkeypatch, tmp_path):
    package = sys.modules.get("vlm_steer.methods") or __import__(
        "vlm_steer.methods", fromlist=["methods"]
    )
    (tmp_path / "found_by_itself.py").write_text(
        "from dataclasses import dataclass\n"
        "from vlm_steer.engine.hooks import Method\n"
        "from vlm_steer.registry import register_method\n"
        "@register_method('found_by_itself')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Found(Method):\n"
        "    '''Nobody imports this.'''\n"
    )
    (tmp_path / "_private.py").write_text("raise RuntimeError('never imported')\n")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    registry._discovered.clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(list_methods())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.delitem(sys.modules, "vlm_steer.methods.found_by_itself")
    assert seen == [["found_by_itself", "lens", "tilt"]] * 4


def test_an_entry_point_of_another_package_is_loaded(monkeypatch):
    loaded = EntryPoint("plugin", "json.decoder", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: (loaded,))
    monkeypatch.delitem(sys.modules, "json.decoder")
    registry._discovered.clear()
    list_methods()
    assert "json.decoder" in sys.modules


def test_a_broken_entry_point_is_named(monkeypatch):
    broken = EntryPoint("plugin", "no_such_package_here", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: (broken,))
    registry._discovered.clear()
    with pytest.raises(ConfigError, match=r"'plugin' \(no_such_package_here\).*cannot be loaded"):
        list_methods()
