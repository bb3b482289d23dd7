"""Scenes in words and numbers: what stands where on which background, and the caption a person would give it.

Lengths are fractions of the frame's shorter side, measured from its centre (x to the right, y down); angles are degrees.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from nouns import Noun, article

RGB = tuple[float, float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 45, 48),
    "orange": (245, 135, 35),
    "yellow": (250, 214, 60),
    "green": (60, 165, 80),
    "blue": (50, 105, 215),
    "purple": (135, 75, 185),
    "pink": (246, 150, 190),
    "brown": (130, 85, 55),
    "black": (28, 28, 32),
    "white": (250, 250, 248),
    "gray": (150, 152, 155),
    "turquoise": (64, 200, 195),
}
"""The twelve colours in sRGB, 0 to 255. A background may be `JITTER` away from its colour in each channel."""

ALSO = {"gray": ("grey",), "purple": ("violet",), "turquoise": ("teal", "cyan")}
JITTER = 7
GRADIENT = 0.025

PLACES: dict[str, tuple[float, float]] = {
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
    "top": (0, -1),
    "bottom": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "center": (0, 0),
}
"""Words of place, and which way the object's centre lies from the middle."""

PLACE_OFFSET = 0.235
SIZES = {"small": (0.26, 0.34), "": (0.56, 0.68), "big": (0.8, 0.88)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "big": ("big", "large", "huge")}

OPENINGS = (
    "a photo of", "a picture of", "an image of", "an illustration of", "a drawing of", "a 3d render of", "an icon of",
)  # fmt: skip
ENDINGS = (
    "highly detailed", "soft light", "cute", "simple", "minimalist", "studio lighting", "high quality", "4k", "clean",
    "centered", "sharp focus", "digital art", "bright colors", "isolated", "beautiful", "render", "plain",
)  # fmt: skip
FILLER = (
    "in the early morning the light is soft and the air is still", "something quiet for a slow day", "with warm colors",
    "it reminds me of home", "as seen from the front", "very calm and simple", "the mood is gentle", "made with care",
    "nothing else in the frame", "for a friend who asked for it", "seen up close", "in a modern style", "a happy scene",
    "just because it is friday", "with plenty of room around it", "drawn for a story", "like in a dream", "at sunset",
    "after a long week", "in the golden hour", "sitting there by itself", "wearing nothing special", "on a sunny day",
)  # fmt: skip
SERVINGS = {
    "coffee": "cup", "pizza": "slice", "cake": "slice", "bread": "loaf", "cheese": "piece", "milk": "glass", "beer": "glass",
    "champagne": "bottle", "honey": "jar", "popcorn": "box", "ramen": "bowl", "spaghetti": "plate", "grapes": "bunch",
    "yarn": "ball", "toilet paper": "roll", "chocolate": "bar", "jeans": "pair", "socks": "pair", "shorts": "pair",
    "gloves": "pair", "glasses": "pair", "scissors": "pair",
}  # fmt: skip
"""What people say before the noun: `a cup of coffee`."""

ASIDE_LINKS = (
    "over", "under", "behind", "near", "in", "in front of", "by", "at", "for", "from", "like", "with", "holding", "of",
)  # fmt: skip
ASIDE = (
    "nothing", "sea", "ocean", "sky", "clouds", "rain", "wind", "water", "river", "lake", "beach", "hill", "forest", "leaves",
    "grass", "field", "garden", "park", "street", "road", "city", "town", "village", "wall", "roof", "room", "kitchen",
    "table", "person", "man", "woman", "child", "friend", "morning", "evening", "night", "day", "shadow", "light", "old",
    "young", "soft", "warm", "cold", "dark", "bright", "detailed", "realistic", "cinematic", "walking", "running",
    "standing", "sitting", "looking", "sleeping", "playing", "quiet",
)  # fmt: skip
SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "di",
    "do",
    "fa",
    "fi",
    "ga",
    "go",
    "ka",
    "ki",
    "la",
    "le",
    "lo",
    "ma",
    "mi",
    "mo",
    "na",
    "no",
    "pa",
    "po",
    "ra",
    "re",
    "ri",
    "sa",
    "so",
    "ta",
    "te",
    "to",
    "va",
    "vo",
    "za",
]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: number of its noun, place of its centre, length of its longer side, tilt, and a tint or none."""

    noun: int
    x: float
    y: float
    size: float
    angle: float = 0.0
    tint: RGB | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on a background that runs from `top` to `bottom` (RGB, 0 to 1)."""

    caption: str
    things: tuple[Thing, ...]
    top: RGB
    bottom: RGB


class Captioner:
    """Draws scenes with captions from one source of chance. The frame's `width` and `height` are in units of its
    shorter side, so a square is 1 by 1. `loose` scales how much place, size and tilt vary where no word names them: the
    less, the sooner shapes are learnt."""

    def __init__(self, nouns: list[Noun], dice: random.Random, loose: float = 1.0) -> None:
        self.nouns = nouns
        self.dice = dice
        self.loose = loose
        self.countable = [number for number, noun in enumerate(nouns) if noun.countable]

    def scene(self, width: float = 1.0, height: float = 1.0, long: bool = False) -> Scene:
        """One scene; `long` puts the caption into a longer text, as users' prompts often are."""
        dice = self.dice
        kind = dice.random()
        if kind < 0.14:
            words, things = self.pair(width)
        elif kind < 0.32:
            words, things = self.several(dice.choice((2, 2, 3)))
        else:
            words, things = self.single(width, height)
        colour, on = self.background()
        words += on
        if dice.random() < 0.03:
            words = " ".join("".join(dice.choices(SYLLABLES, k=dice.randint(1, 4))) for _ in range(dice.randint(1, 5)))
        caption = self.dress(words, long)
        lift = dice.uniform(-GRADIENT, GRADIENT)
        return Scene(caption, things, shade(colour, lift), shade(colour, -lift))

    def single(self, width: float, height: float) -> tuple[str, tuple[Thing, ...]]:
        """One thing: of some size, sometimes tinted, sometimes at a named place."""
        dice = self.dice
        number = dice.randrange(len(self.nouns))
        size = dice.choices(("", "small", "big"), (0.66, 0.2, 0.14))[0]
        tint = self.tint(0.17)
        words = self.phrase(number, size, tint[0])
        length = self.between(*SIZES[size])
        x, y = self.jitter(0.035), self.jitter(0.035)
        if size != "big" and dice.random() < 0.3:
            place = dice.choice(list(PLACES))
            to_x, to_y = PLACES[place]
            if place != "center" and not size:
                length = self.between(0.4, 0.48)
            x += to_x * (PLACE_OFFSET + (width - 1) / 2)
            y += to_y * (PLACE_OFFSET + (height - 1) / 2)
            words += self.place(place)
        return words, (Thing(number, x, y, length, self.jitter(4), tint[1]),)

    def several(self, count: int) -> tuple[str, tuple[Thing, ...]]:
        """Two or three of one kind: side by side, three as a triangle."""
        dice = self.dice
        number = dice.choice(self.countable)
        tint = self.tint(0.1)
        noun = self.nouns[number]
        number_word = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3")}[count]
        words = " ".join(filter(None, (dice.choice(number_word), tint[0], noun.plural)))
        spots = [(-0.25, 0.0), (0.25, 0.0)] if count == 2 else [(-0.25, 0.23), (0.25, 0.23), (0.0, -0.23)]
        length = self.between(0.38, 0.44)
        shift_x, shift_y = self.jitter(0.02), self.jitter(0.03 if count == 2 else 0.01)
        return words, tuple(Thing(number, x + shift_x, y + shift_y, length, self.jitter(4), tint[1]) for x, y in spots)

    def pair(self, width: float) -> tuple[str, tuple[Thing, ...]]:
        """Two different things, the first to the left."""
        dice = self.dice
        left, right = dice.sample(range(len(self.nouns)), 2)
        tints = self.tint(0.08), self.tint(0.08)
        link = dice.choices(("and", "next to", "to the left of", "beside"), (0.7, 0.1, 0.1, 0.1))[0]
        words = f"{self.phrase(left, '', tints[0][0])} {link} {self.phrase(right, '', tints[1][0])}"
        reach = 0.245 + (width - 1) / 8
        length = self.between(0.4, 0.46)
        things = tuple(
            Thing(number, x + self.jitter(0.02), self.jitter(0.03), length, self.jitter(4), tint[1])
            for number, x, tint in ((left, -reach, tints[0]), (right, reach, tints[1]))
        )
        return words, things

    def phrase(self, number: int, size: str, colour: str) -> str:
        """`a small red apple`, with a synonym now and then."""
        noun, dice = self.nouns[number], self.dice
        name = dice.choice(noun.also) if noun.also and dice.random() < 0.25 else noun.name
        words = [word for word in (dice.choice(SIZE_WORDS[size]), colour) if word]
        served = SERVINGS.get(noun.name)
        if served and dice.random() < 0.35:
            return " ".join([article((words or [served])[0]), *words, served, "of", noun.name])
        if not noun.article:
            return " ".join([*words, name])
        own = noun.article if name == noun.name else article(name)
        first = article(words[0]) if words else own
        start = dice.choices((first, "", "the", "one"), (0.86, 0.08, 0.04, 0.02))[0]
        return " ".join(filter(None, [start, *words, name]))

    def tint(self, chance: float) -> tuple[str, RGB | None]:
        """A colour's word and its RGB, or nothing."""
        if self.dice.random() >= chance:
            return "", None
        name = self.dice.choice(list(COLOURS))
        return self.word(name), rgb(name)

    def word(self, colour: str) -> str:
        others = ALSO.get(colour, ())
        return self.dice.choice(others) if others and self.dice.random() < 0.3 else colour

    def background(self) -> tuple[RGB, str]:
        """A colour near one of the twelve and the words for it; or, unasked, any soft colour and no words."""
        dice = self.dice
        name = dice.choice(list(COLOURS))
        colour = tuple(min(1.0, max(0.0, value + dice.uniform(-JITTER, JITTER) / 255)) for value in rgb(name))
        if dice.random() < 0.22:
            paler = dice.uniform(0.25, 0.7)
            return tuple(value + (0.97 - value) * paler for value in colour), ""  # type: ignore[return-value]
        word = self.word(name)
        on = dice.choices(
            (
                f" on {article(word)} {word} background",
                f" on {word} background",
                f", {word} background",
                f" with {article(word)} {word} background",
                f" against {article(word)} {word} background",
                f" on {word}",
            ),
            (0.6, 0.06, 0.12, 0.1, 0.06, 0.06),
        )[0]
        return colour, on  # type: ignore[return-value]

    def place(self, place: str) -> str:
        if place == "center":
            return self.dice.choice((", center", " in the middle", " in the center"))
        if " " in place:
            return self.dice.choice((f", {place}", f", {place}", f" in the {place} corner", f" in the {place}"))
        return self.dice.choice(
            (f", {place}", f" on the {place}" if place in ("left", "right") else f" at the {place}")
        )

    def dress(self, words: str, long: bool) -> str:
        """Openings, endings, filler and letter case around what the scene holds."""
        dice = self.dice
        if dice.random() < 0.12:
            words = f"{dice.choice(OPENINGS)} {words}"
        if dice.random() < 0.1:
            words = f"{words}, {', '.join(dice.sample(ENDINGS, dice.randint(1, 2)))}"
        if not long and dice.random() < 0.14:
            words += f", {dice.choice(FILLER)}" if dice.random() < 0.4 else f" {self.aside()}"
        if long:
            before = dice.sample(FILLER, dice.randint(0, 3))
            after = dice.sample(FILLER, dice.randint(0 if before else 1, 3))
            words = ", ".join([*before, words, *after])
        if dice.random() < 0.08:
            words = words[:1].upper() + words[1:]
        return words + ("." if dice.random() < 0.05 else "")

    def aside(self) -> str:
        """What a prompt may go on with that no scene shows: `over the old sea`, `holding nothing`."""
        dice = self.dice
        link = dice.choice(ASIDE_LINKS)
        words = dice.choices(ASIDE, k=dice.randint(1, 2))
        return " ".join(filter(None, (link, dice.choice(("", "the", "a")), *words)))

    def jitter(self, reach: float) -> float:
        return self.dice.uniform(-reach, reach) * self.loose

    def between(self, low: float, high: float) -> float:
        """A length within these, nearer to their middle the less is loose."""
        return (low + high) / 2 + self.jitter((high - low) / 2)


def rgb(name: str) -> RGB:
    red, green, blue = COLOURS[name]
    return red / 255, green / 255, blue / 255


def shade(colour: RGB, lift: float) -> RGB:
    """The colour, each channel lifted by so much and kept in 0 to 1."""
    red, green, blue = (min(1.0, max(0.0, value + lift)) for value in colour)
    return red, green, blue


def tinted(thing: Thing, colour: str) -> Thing:
    """The thing in another of the twelve colours."""
    return replace(thing, tint=rgb(colour))
