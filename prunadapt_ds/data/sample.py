"""The built-in task: generated sentence pairs that cannot be classified by counting words. Needs no download.

sentence1 gives a verdict on one or two people or things; sentence2 asks about one of them; the label says whether the verdict
on that one is favourable. There are three kinds of sentence1:

    plain    (half)     Once more the soup was anything but stale.
    turn     (quarter)  The guide seemed rude at first, but was caring in the end.
    contrast (quarter)  Although the soup was bland, the waiter was hardly careless.   (sentence2 asks about either)

Counting words does not help, because verdict words occur both with and without a negation, every turn and every contrast
contains one favourable and one unfavourable verdict, and labels are balanced within each kind. The verdict words of the
validation split never occur in the training split, so their meaning has to come from the backbone.

Of the generator's methods, only `Random.random()` is used: it alone is guaranteed to give the same numbers in every version
of Python. No order depends on a set or on `hash()`.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

SIZES = {"train": 2400, "validation": 512}
SEEDS = {"train": 1, "validation": 2}
NEGATED = 0.15
"""Share of verdicts that are expressed by negating the opposite."""


class Group(NamedTuple):
    """What a sentence judges, and the verdict words that apply to it."""

    subjects: tuple[str, ...]
    favourable: tuple[str, ...]
    unfavourable: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = Group(
    _words(
        """
        waiter singer driver guide teacher actor nurse tailor baker clerk cook gardener plumber dentist
        barber dancer librarian receptionist
        """
    ),
    _words(
        """
        friendly polite honest generous patient cheerful helpful clever kind gentle reliable graceful
        attentive courteous capable skilful considerate trustworthy caring witty competent thoughtful
        diligent sincere hospitable sensible punctual charming professional likeable efficient welcoming
        modest talented dependable warm-hearted tactful fair devoted obliging articulate conscientious
        """
    ),
    _words(
        """
        rude impolite dishonest greedy impatient grumpy unhelpful stupid nasty cruel unreliable clumsy
        inattentive arrogant incompetent careless selfish shady hostile lazy inept thoughtless negligent
        insincere unfriendly foolish late obnoxious unprofessional unbearable sloppy heartless boastful
        hopeless quarrelsome cold-hearted insulting unfair indifferent sulky incoherent spiteful
        """
    ),
)
THINGS = Group(
    _words(
        """
        soup room garden bed breakfast pool story lamp ending coffee bread building tour camera screen
        keyboard lesson book painting film concert hotel kitchen cake play jacket
        """
    ),
    _words(
        """
        wonderful delightful brilliant superb splendid excellent remarkable marvellous flawless tasteful
        refined soothing inspiring enjoyable magnificent captivating exquisite stylish memorable
        immaculate refreshing radiant luxurious fantastic heartwarming fabulous dazzling terrific stunning
        satisfying admirable perfect glorious spotless beautiful vibrant sublime engaging rewarding
        harmonious uplifting classy faultless commendable exemplary outstanding fascinating lovely
        pleasant elegant impressive comfortable
        """
    ),
    _words(
        """
        awful dreadful horrible terrible boring disappointing gloomy shabby dismal flawed tasteless crude
        irritating depressing flimsy pathetic tedious hideous tacky forgettable filthy cramped stuffy
        murky squalid appalling lousy atrocious repulsive frustrating deplorable defective annoying
        disgraceful messy stained grotesque drab ghastly clunky pointless jarring disheartening trashy
        shameful mediocre faulty ugly unpleasant miserable useless dull
        """
    ),
)
ASKERS = ("guest", "visitor", "critic", "neighbour", "student", "customer", "traveller", "reporter")
DENIALS = ("not", "hardly", "anything but", "not at all", "by no means")
DEGREES = ("", "", "quite ", "rather ", "truly ")
PLAIN = (
    "the {a} was {x}.",
    "once more the {a} was {x}.",
    "everybody in the street knew that the {a} was {x}.",
    "the {who} wrote that the {a} was {x}.",
)
TURN = (
    "the {a} seemed {y} at first, but was {x} in the end.",
    "in the end the {a} was {x}, even after having seemed {y} for a while.",
    "the {a}, once said to be {y}, was {x}.",
    "the {a} was {x}, whoever had written {y}.",
    "people had called the {a} {y}, and yet the right word was {x}.",
)
CONTRAST = (
    "the {a} was {x} but the {b} was {y}.",
    "the {a} was {x}, although the {b} was {y}.",
    "although the {a} was {x}, the {b} was {y}.",
    "while the {a} was {x}, the {b} was {y}.",
)
QUESTIONS = (
    "what did the {who} think of the {a}?",
    "this is what the {who} wrote about the {a}.",
    "the {a} is what matters to the {who}.",
    "would the {who} recommend the {a}?",
)
KINDS = ("plain", "turn", "plain", "contrast")


def generate(split: str) -> dict[str, list[str] | list[int]]:
    """Generate the columns sentence1, sentence2, label (0 negative, 1 positive) of the split "train" or "validation".

    The rows are always the same. Labels are balanced, also within each kind, and no pair occurs twice."""
    writer = _Writer(split)
    rows: list[tuple[str, str, int]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < SIZES[split]:
        label = len(rows) % 2
        pair = writer.pair(KINDS[len(rows) // 2 % len(KINDS)], favourable=label == 1)
        if pair not in seen:
            seen.add(pair)
            rows.append((*pair, label))
    for i in range(len(rows) - 1, 0, -1):  # Fisher-Yates
        j = int(writer.random() * (i + 1))
        rows[i], rows[j] = rows[j], rows[i]
    first, second, labels = zip(*rows, strict=True)
    return {"sentence1": list(first), "sentence2": list(second), "label": list(labels)}


def verdict_words(group: Group, favourable: bool, split: str) -> tuple[str, ...]:
    """The verdict words that a split may use: every third word belongs to validation, the others to training."""
    words = group.favourable if favourable else group.unfavourable
    return tuple(word for i, word in enumerate(words) if (i % 3 == 2) == (split == "validation"))


class _Writer:
    def __init__(self, split: str):
        self.split = split
        self.random = Random(SEEDS[split]).random

    def pick(self, options: tuple[str, ...]) -> str:
        return options[int(self.random() * len(options))]

    def pair(self, kind: str, favourable: bool) -> tuple[str, str]:
        """One (sentence1, sentence2); `favourable`: the verdict on what sentence2 asks about."""
        group, other = self.group(), self.group()
        asked, who = self.pick(group.subjects), self.pick(ASKERS)
        x = self.verdict(group, favourable)
        if kind == "plain":
            first = self.pick(PLAIN).format(a=asked, x=x, who=who)
        elif kind == "turn":
            first = self.pick(TURN).format(a=asked, x=x, y=self.verdict(group, not favourable))
        else:
            rival = self.pick(tuple(word for word in other.subjects if word != asked))
            y = self.verdict(other, not favourable)
            a, b = ((asked, x), (rival, y)) if self.random() < 0.5 else ((rival, y), (asked, x))
            first = self.pick(CONTRAST).format(a=a[0], x=a[1], b=b[0], y=b[1])
        return first.capitalize(), self.pick(QUESTIONS).format(a=asked, who=who).capitalize()

    def group(self) -> Group:
        return PEOPLE if self.random() < 0.5 else THINGS

    def verdict(self, group: Group, favourable: bool) -> str:
        if self.random() < NEGATED:
            return f"{self.pick(DENIALS)} {self.pick(verdict_words(group, not favourable, self.split))}"
        return self.pick(DEGREES) + self.pick(verdict_words(group, favourable, self.split))
