from typing import get_args

import pytest

from commands import outbox
from commands.events import AnyEvent, Event
from projections.catalogue import READ_MODELS
from projections.outbox import LANES
from projections.read_model import EVENT_TYPES, EVENTS, ReadModel


def concrete_events(above: type[Event] = Event) -> set[type[Event]]:
    below = set(above.__subclasses__())
    nested = set[type[Event]]().union(*(concrete_events(each) for each in below))
    return {each for each in below | nested if hasattr(each, "type")}


def test_every_published_event_is_one_that_read_models_decide_on() -> None:
    assert concrete_events() == set(get_args(AnyEvent)) == set(EVENTS)


@pytest.mark.parametrize("model", READ_MODELS, ids=lambda model: model.name)
def test_a_read_model_decides_on_every_event(model: ReadModel) -> None:
    decisions = {event.type: model.listens_to(event) for event in EVENTS}
    assert decisions.keys() == EVENT_TYPES
    assert model.events == {event for event, listens in decisions.items() if listens}
    assert model.events


def test_read_models_have_names_of_their_own() -> None:
    names = [model.name for model in READ_MODELS]
    assert len(set(names)) == len(names)


def test_the_projector_knows_as_many_lanes_as_events_are_given_to() -> None:
    assert outbox.LANES == LANES
