"""Edits in words and numbers: an instruction, the scene before it and the scene after it, so that the target is exact.

Five kinds, as the embedded benchmark has them: background, color, object (add, remove), geometry (mirror, bigger,
smaller) and tone (greyscale, darker, brighter). A scene stands on a colour or on a photo.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nouns import Noun, article
from scenes import ALSO, COLOURS, GRADIENT, JITTER, PLACES, RGB, Thing, rgb, shade, tinted

KINDS = {
    "background": ("background",),
    "color": ("color",),
    "object": ("add", "remove"),
    "geometry": ("mirror", "bigger", "smaller"),
    "tone": ("grayscale", "darker", "brighter"),
}
EDITS = tuple(edit for edits in KINDS.values() for edit in edits)
WEIGHTS = {
    "background": 0.14, "color": 0.16, "add": 0.14, "remove": 0.14, "mirror": 0.1, "bigger": 0.08, "smaller": 0.08,
    "grayscale": 0.05, "darker": 0.055, "brighter": 0.055,
}  # fmt: skip

ADDED_SIZE = 0.36
SCALE = 1.45
"""How much bigger (or, divided, smaller) a thing becomes."""
DARKER = 0.55
BRIGHTER = 0.5
"""`darker` multiplies every value by the first; `brighter` takes the second of every value's distance from white."""

SPOTS = {name: (0.27 * x, 0.27 * y) for name, (x, y) in PLACES.items()}

ASKS: dict[str, tuple[str, ...]] = {
    "background": (
        "change the background to {color}", "make the background {color}", "replace the background with {a_color} one",
        "turn the background {color}", "give it {a_color} background", "change the background color to {color}",
    ),
    "color": (
        "make the {noun} {color}", "change the color of the {noun} to {color}", "turn the {noun} {color}",
        "paint the {noun} {color}", "change the {noun} to {color}", "recolor the {noun} in {color}",
    ),
    "add": (
        "add {a_noun} {place}", "put {a_noun} {place}", "place {a_noun} {place}", "insert {a_noun} {place}",
    ),
    "remove": ("remove the {noun}", "delete the {noun}", "take away the {noun}", "erase the {noun}", "get rid of the {noun}"),
    "mirror": ("mirror the picture", "flip the image horizontally", "mirror the image", "flip it left to right"),
    "bigger": ("make the {noun} bigger", "make the {noun} larger", "enlarge the {noun}"),
    "smaller": ("make the {noun} smaller", "shrink the {noun}", "reduce the size of the {noun}"),
    "grayscale": (
        "make it grayscale", "turn it black and white", "convert the image to grayscale", "remove all color",
        "make the picture black and white",
    ),
    "darker": ("make it darker", "darken the image", "make the picture darker", "lower the brightness"),
    "brighter": ("make it brighter", "brighten the image", "make the picture brighter", "raise the brightness"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Photo:
    """A square out of a photo: which one, the square's centre and side as fractions of its shorter side, and a flip."""

    number: int
    x: float
    y: float
    side: float
    flip: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """A picture in numbers: things on a photo or on colours, then mirrored, then one of the tones ("" for none)."""

    things: tuple[Thing, ...]
    top: RGB
    bottom: RGB
    photo: Photo | None = None
    mirrored: bool = False
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Edit:
    """One pair: `edit` is one of `EDITS`."""

    edit: str
    instruction: str
    source: Stage
    target: Stage


class Editor:
    """Draws edits from one source of chance. `photos` are the numbers of the photos it may use; `weights` says how often
    each edit comes, beside the other `WEIGHTS`."""

    def __init__(
        self, nouns: list[Noun], photos: list[int], dice: random.Random, weights: Mapping[str, float] = WEIGHTS
    ) -> None:
        self.nouns = nouns
        self.photos = photos
        self.dice = dice
        self.weights = WEIGHTS | dict(weights)

    def edit(self, edit: str = "", on_photo: bool | None = None) -> Edit:
        """One edit, of the named kind or of any; `on_photo` says whether it happens on a photo."""
        dice = self.dice
        edit = edit or dice.choices(list(self.weights), list(self.weights.values()))[0]
        if on_photo is None:
            chances = {"background": 0.0, "color": 0.25, "bigger": 0.2, "smaller": 0.2, "add": 0.4, "remove": 0.4}
            on_photo = dice.random() < chances.get(edit, 0.7)
        stage = self.stage(edit, on_photo and bool(self.photos))
        number = dice.randrange(len(stage.things)) if stage.things else 0
        words = {"noun": self.name(stage.things[number].noun)} if stage.things else {}
        target = stage
        if edit == "background":
            stage, target, words["color"] = self.new_background(stage)
        elif edit == "color":
            shown = stage.things[number].tint
            color = dice.choice([name for name in COLOURS if rgb(name) != shown])
            target, words["color"] = swap(stage, number, tinted(stage.things[number], color)), self.word(color)
        elif edit == "add":
            place, thing = self.newcomer(stage)
            target = replace(stage, things=(*stage.things, thing))
            name = self.name(thing.noun)
            words |= {"a_noun": self.with_article(thing.noun, name), "place": place}
        elif edit == "remove":
            target = replace(stage, things=stage.things[:number] + stage.things[number + 1 :])
        elif edit in ("bigger", "smaller"):
            factor = SCALE if edit == "bigger" else 1 / SCALE
            thing = stage.things[number]
            target = swap(stage, number, replace(thing, size=thing.size * factor))
        elif edit == "mirror":
            target = replace(stage, mirrored=True)
        else:
            target = replace(stage, tone=edit)
        words["a_color"] = f"{article(words.get('color', ''))} {words.get('color', '')}"
        instruction = dice.choice(ASKS[edit]).format(**words)
        if dice.random() < 0.3:
            instruction = instruction[:1].upper() + instruction[1:]
        return Edit(edit, instruction + ("." if dice.random() < 0.15 else ""), stage, target)

    def stage(self, edit: str, on_photo: bool) -> Stage:
        """A scene that the edit can be done to."""
        dice = self.dice
        colour = self.near(dice.choice(list(COLOURS)))
        lift = dice.uniform(-GRADIENT, GRADIENT)
        photo = self.photo() if on_photo else None
        bare = edit in ("mirror", "grayscale", "darker", "brighter", "add") and dice.random() < (0.8 if photo else 0.25)
        if bare and (photo or edit == "add"):
            things: tuple[Thing, ...] = ()
        elif edit in ("bigger", "smaller"):
            things = self.things(1, (0.36, 0.52) if edit == "bigger" else (0.56, 0.8))
        elif edit == "add":
            things = (self.thing((0.0, 0.0), (0.3, 0.4)),)
        else:
            things = self.things(dice.choice((1, 1, 2)), (0.4, 0.68))
        return Stage(things, shade(colour, lift), shade(colour, -lift), photo)

    def things(self, count: int, sizes: tuple[float, float]) -> tuple[Thing, ...]:
        """One thing near the middle, or two of different kinds side by side."""
        if count == 1:
            return (self.thing((self.dice.uniform(-0.1, 0.1), self.dice.uniform(-0.1, 0.1)), sizes),)
        left, right = self.dice.sample(range(len(self.nouns)), 2)
        return (
            replace(self.thing((-0.25, self.dice.uniform(-0.1, 0.1)), (0.36, 0.44)), noun=left),
            replace(self.thing((0.25, self.dice.uniform(-0.1, 0.1)), (0.36, 0.44)), noun=right),
        )

    def thing(self, place: tuple[float, float], sizes: tuple[float, float]) -> Thing:
        dice = self.dice
        tint = rgb(dice.choice(list(COLOURS))) if dice.random() < 0.2 else None
        number = dice.randrange(len(self.nouns))
        return Thing(number, *place, dice.uniform(*sizes), dice.uniform(-4, 4), tint)

    def newcomer(self, stage: Stage) -> tuple[str, Thing]:
        """A thing at a named place that nothing else covers, and the words for the place."""
        dice = self.dice
        taken = bool(stage.things)
        place = dice.choice([name for name in SPOTS if not taken or name != "center"])
        used = {thing.noun for thing in stage.things}
        number = dice.choice([number for number in range(len(self.nouns)) if number not in used])
        if place == "center":
            words = dice.choice(("in the middle", "in the center"))
        elif " " in place:
            words = dice.choice((f"in the {place} corner", f"in the {place}", f"at the {place}"))
        else:
            words = f"on the {place}" if place in ("left", "right") else f"at the {place}"
        return words, Thing(number, *SPOTS[place], ADDED_SIZE)

    def new_background(self, stage: Stage) -> tuple[Stage, Stage, str]:
        """The scene on one colour and on another, and the word for the other."""
        old, new = self.dice.sample(list(COLOURS), 2)
        lift = self.dice.uniform(-GRADIENT, GRADIENT)
        before, after = self.near(old), rgb(new)
        return (
            replace(stage, top=shade(before, lift), bottom=shade(before, -lift), photo=None),
            replace(stage, top=shade(after, lift), bottom=shade(after, -lift), photo=None),
            self.word(new),
        )

    def photo(self) -> Photo:
        dice = self.dice
        side = dice.uniform(0.45, 1.0)
        reach = (1 - side) / 2
        return Photo(
            dice.choice(self.photos),
            dice.uniform(-reach, reach),
            dice.uniform(-reach, reach),
            side,
            dice.random() < 0.5,
        )

    def name(self, number: int) -> str:
        noun = self.nouns[number]
        return self.dice.choice(noun.also) if noun.also and self.dice.random() < 0.2 else noun.name

    def with_article(self, number: int, name: str) -> str:
        noun = self.nouns[number]
        if not noun.article:
            return name
        return f"{noun.article if name == noun.name else article(name)} {name}"

    def word(self, color: str) -> str:
        others = ALSO.get(color, ())
        return self.dice.choice(others) if others and self.dice.random() < 0.25 else color

    def near(self, color: str) -> RGB:
        red, green, blue = (value + self.dice.uniform(-JITTER, JITTER) / 255 for value in rgb(color))
        return shade((red, green, blue), 0.0)


def swap(stage: Stage, number: int, thing: Thing) -> Stage:
    """The stage with one thing replaced."""
    return replace(stage, things=(*stage.things[:number], thing, *stage.things[number + 1 :]))
