"""What everything that can be resumed asks of a state before it takes it over."""

from collections.abc import Mapping
from typing import Any

from dspfx.errors import LearnError


def check_kind(own: Mapping[str, Any], state: Mapping[str, Any], kind: str) -> None:
    """Refuse a `state` that has other entries than `own`; `kind` is the class of the object.

    Raises:
        LearnError: it does.
    """
    if own.keys() != state.keys():
        raise LearnError(f"this is no state of a {kind}: it has {', '.join(state)}")


def check_settings(own: Mapping[str, Any], saved: Mapping[str, Any], who: str) -> None:
    """Refuse settings that differ from `own`; `who` has these.

    Raises:
        LearnError: the first that differs, with both values.
    """
    for name, value in own.items():
        if saved[name] != value:
            raise LearnError(
                f"the state was saved with {name}={saved[name]}, {who} has {value}; construct it "
                "with the settings of the run that is resumed"
            )
