"""Misspelt keys and classes are named with the nearest right one and their place."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightning_lm.cli.config.check import Checker, command_line_settings
from lightning_lm.cli.config.overlays import read_overlays
from lightning_lm.cli.config.signatures import Argument, accepted_classes, arguments_of
from lightning_lm.errors import UsageError
from lightning_lm.strategies import DataParallelStrategy


class Engine:
    """Base."""


@dataclasses.dataclass
class Petrol(Engine):
    litres: float = 1.5


@dataclasses.dataclass
class Electric(Engine):
    capacity: float
    cooling: str = "air"


class Car:
    def __init__(self, engine: Engine = Petrol(), *, doors: int = 4, colour: str = "red") -> None: ...


class Van(Car):
    def __init__(self, load: float = 1.0, **settings: object) -> None: ...


class Anything:
    def __init__(self, **kwargs: object) -> None: ...


TOP = {"car": Argument(Car), "fleet": Argument(list[Car] | None), "name": Argument(str), "trainer": Argument(Car)}


def check(*layers, top=TOP, classes=None):
    checker = Checker(top, {"car": Car} if classes is None else classes)
    for layer in layers:
        checker.check(layer)


def yaml(tmp_path, text, name="my.yaml"):
    (tmp_path / name).write_text(text)
    return read_overlays(str(tmp_path / name))[-1].root


GOOD = [
    "car: {doors: 3}",
    "car: {engine: {litres: 2}}",
    "car: {class_path: Van, init_args: {load: 2, doors: 5, engine: Electric}}",
    "car: {class_path: Van, init_args: {engine: {class_path: Electric, init_args: {capacity: 50}}}}",
    "fleet: [Car, {class_path: Van, init_args: {load: 3}}]",
    "fleet+: Van",
    "name: NoClassAtAll",
    "car: null",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_right_passes(tmp_path, text):
    check(yaml(tmp_path, text))


BAD = [
    ("car:\n  door: 3", "Unknown key 'door' in Car. Did you mean 'doors'?", 2),
    ("name: x\n\ncarr: {}", "Unknown key 'carr' in the configuration. Did you mean 'car'?", 3),
    ("car:\n  engine:\n    liters: 2", "Unknown key 'liters' in Petrol. Did you mean 'litres'?", 3),
    ("car:\n  engine: Elektric", "Unknown class 'Elektric' for car.engine. Did you mean 'Electric'?", 2),
    ("fleet:\n- Car\n- Vann", "Unknown class 'Vann' for fleet[1]. Did you mean 'Van'?", 3),
    ("car:\n  class_path: Van\n  init_args:\n    loud: 1", "Unknown key 'loud' in Van. Did you mean 'load'?", 4),
    ("car:\n  class_path: Van\n  load: 1", "Key 'load' stands beside class_path in car.", 3),
    ("fleet:\n- Car\n- Van: {load: 2}", "fleet[1] has the name of a class as a key: Van.", 3),
    ("trainer: max_steps", "trainer takes settings, such as trainer: {max_steps: 100}, got 'max_steps'.", 1),
    ("car: {class_path: no.such.Thing}", "The class 'no.such.Thing' for car cannot be imported", 1),
]


@pytest.mark.parametrize(("text", "message", "line"), BAD)
def test_what_is_wrong_is_named_first_with_its_place(tmp_path, text, message, line):
    with pytest.raises(UsageError) as caught:
        check(yaml(tmp_path, text))
    assert str(caught.value).startswith(message)
    assert f"my.yaml, line {line}" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_later_layer_is_read_with_the_classes_of_the_earlier_ones(tmp_path):
    first = yaml(tmp_path, "car: {class_path: Van, init_args: {engine: Electric}}", "first.yaml")
    check(first, yaml(tmp_path, "car: {load: 2, engine: {capacity: 3}}"))
    with pytest.raises(UsageError, match="Unknown key 'litres' in Electric"):
        check(first, yaml(tmp_path, "car: {engine: {litres: 3}}"))


def test_a_new_class_forgets_what_was_known_below_the_old_one(tmp_path):
    first = yaml(tmp_path, "car: {engine: Electric}", "first.yaml")
    check(first, yaml(tmp_path, "car: {class_path: Van, init_args: {engine: {litres: 3}}}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--car.door", "3"], "Unknown key 'door'"),
        (["--car.engine.liters=3"], "Unknown key 'liters' in Petrol"),
        (["--car", "Van", "--car.laod", "3"], "Unknown key 'laod' in Van"),
        (["--car.init_args.engine", "Elektric"], "Unknown class 'Elektric'"),
        (["--fleet+=Vann"], "Unknown class 'Vann'"),
        (["--car.engine", "{litre: 2}"], "Unknown key 'litre' in Petrol"),
    ],
)
def test_the_command_line_is_checked_too(words, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(command_line_settings(words))
    assert "the command line" in str(caught.value)


def test_help_and_config_are_no_keys():
    check(command_line_settings(["--config", "x.yaml", "--car.help", "Van", "--car.doors", "3"]))


def test_what_cannot_be_known_passes(tmp_path):
    top = {"thing": Argument(Anything)}
    check(yaml(tmp_path, "thing: {whatever: 3}"), top=top, classes={"thing": Anything})
    check(yaml(tmp_path, "thing: {whatever: {deep: 3}}"), top={"thing": Argument(dict)}, classes={})
    check(yaml(tmp_path, "car: sub/config.yaml"))


def test_settings_passed_on_to_the_class_above_are_arguments():
    assert list(arguments_of(Van) or {}) == ["load", "engine", "doors", "colour"]
    assert arguments_of(Anything) is None


def test_containers_and_unions_are_opened():
    assert accepted_classes(list[Car] | dict[str, Engine] | int | None) == [Car, Engine]
    assert accepted_classes(Callable[[], list[Car]] | Literal["a"] | tuple[Engine, ...]) == [Engine]


def test_what_a_constructor_gives_to_another_library_is_known_too():
    """`DDPStrategy` gives its ``**kwargs`` to torch's wrapper, so a run's config.yaml names what that takes."""
    for cls in (DDPStrategy, DataParallelStrategy):
        names = arguments_of(cls)
        assert {"output_device", "static_graph", "timeout"} <= names.keys()
        assert "outptu_device" not in names
