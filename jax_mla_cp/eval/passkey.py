"""Passkey retrieval (arXiv:2305.16300, section 4): a number hidden in a long text, asked for at its end.

The built-in model is trained (tools/default_model/sequences.py) and tested with the same words.
"""

from __future__ import annotations

import dataclasses
import random

FIRST_WORDS = (
    "amber",
    "ancient",
    "arctic",
    "autumn",
    "bitter",
    "blue",
    "brave",
    "bright",
    "broken",
    "calm",
    "clever",
    "cold",
    "copper",
    "crimson",
    "curious",
    "dark",
    "distant",
    "dry",
    "early",
    "eastern",
    "empty",
    "fading",
    "fierce",
    "frozen",
    "gentle",
    "golden",
    "green",
    "hidden",
    "hollow",
    "humble",
    "icy",
    "iron",
    "ivory",
    "jolly",
    "late",
    "little",
    "lonely",
    "long",
    "lucky",
    "misty",
    "narrow",
    "noble",
    "northern",
    "old",
    "orange",
    "pale",
    "patient",
    "proud",
    "purple",
    "quiet",
    "rapid",
    "red",
    "rough",
    "royal",
    "rusty",
    "silent",
    "silver",
    "slow",
    "southern",
    "steady",
    "sunny",
    "western",
    "white",
    "wild",
)
SECOND_WORDS = (
    "anchor",
    "badger",
    "beacon",
    "bear",
    "bridge",
    "candle",
    "canyon",
    "castle",
    "cedar",
    "cloud",
    "comet",
    "crane",
    "desert",
    "dolphin",
    "eagle",
    "falcon",
    "feather",
    "forest",
    "fox",
    "garden",
    "glacier",
    "hammer",
    "harbor",
    "heron",
    "horse",
    "island",
    "kettle",
    "ladder",
    "lantern",
    "lion",
    "maple",
    "meadow",
    "mirror",
    "moon",
    "mountain",
    "needle",
    "ocean",
    "otter",
    "owl",
    "panda",
    "pepper",
    "pine",
    "planet",
    "rabbit",
    "raven",
    "ribbon",
    "river",
    "rocket",
    "salmon",
    "shadow",
    "ship",
    "spider",
    "stone",
    "storm",
    "sun",
    "thunder",
    "tiger",
    "tower",
    "turtle",
    "valley",
    "violin",
    "whale",
    "willow",
    "wolf",
)
"""A passkey's name is one of each: "amber falcon"."""


@dataclasses.dataclass(frozen=True)
class Passkey:
    """A number and the name it goes by; without a name it is the only one in its text."""

    name: str | None
    key: str

    @classmethod
    def random(cls, rng: random.Random, *, named: bool = True, digits: int = 5) -> Passkey:
        name = f"{rng.choice(FIRST_WORDS)} {rng.choice(SECOND_WORDS)}" if named else None
        return cls(name, "".join(rng.choices("0123456789", k=digits)))

    @property
    def subject(self) -> str:
        return "The pass key" if self.name is None else f"The pass key for {self.name}"

    def fact(self) -> str:
        """The sentence that is hidden in the text."""
        return f"{self.subject} is {self.key}. Remember it."

    def question(self) -> str:
        """The question at the end of the text; `key` is the continuation."""
        subject = self.subject
        return f"What is {subject[0].lower()}{subject[1:]}? {subject} is"
