"""Texts to continue: of different lengths, and no two with the same beginning."""

from __future__ import annotations

_PASSAGES = (
    "There was a lighthouse at the end of the bay, and",
    "A list of things to see in an old town by the river: the bridge,",
    "The train left the station a little late. Snow lay on the fields, and the few people in the "
    "carriage had stopped talking. An old man by the window opened a book and",
    "To bake a simple bread you need flour, water, salt and yeast. Mix the flour with the salt, "
    "stir the yeast into warm water, and let it stand until it foams. Then pour it all together "
    "and knead the dough for ten minutes. After that",
    "Mountains are made in more than one way. Some grow where two plates of the crust push against "
    "each other and fold the rock between them; others are heaped up by volcanoes, layer on layer "
    "of ash and lava; and some are only what is left when rivers have carried away everything "
    "softer around them. The oldest ones are worn down to hills, while the youngest still rise by "
    "a few millimetres each year. What they have in common is",
)


def prompt(number: int) -> str:
    """The text with this number; those of two numbers differ from their first words on."""
    return f"{number}. {_PASSAGES[number % len(_PASSAGES)]}"


class Prompts:
    """Hands out texts that nobody has had before, so that no cache of prompts helps anybody.

    Two of them hand out the same texts in the same order.
    """

    def __init__(self) -> None:
        self._given = 0

    def take(self, count: int) -> list[str]:
        """The next texts."""
        self._given += count
        return [prompt(number) for number in range(self._given - count, self._given)]
