"""Word problems from an embedded generator.

Generated problems are held out twice: the test split has story templates of its own, and numbers whose sum falls in a
residue class (mod 5) that the training split never uses, so no tuple of numbers is shared. The validation split keeps
the training templates and holds out numbers alone.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from sst_jax.data.documents import Problem
from sst_jax.errors import InputError

# -------------------------------------------------------------------------------------------------------- Generated

# The residues, mod 5, of the sum of a problem's numbers.
SPLITS = {"train": (2, 3, 4), "validation": (1,), "test": (0,)}
RESIDUES = sum(map(len, SPLITS.values()))
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "Dimitri",
    "Elif",
    "Farid",
    "Grace",
    "Hana",
    "Ivan",
    "Joana",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Omar",
    "Priya",
    "Quentin",
    "Rosa",
    "Sven",
    "Tara",
    "Umar",
    "Vera",
    "Wanda",
    "Yusuf",
    "Zoe",
)


class Template(NamedTuple):
    """A story. `numbers` and `words` are drawn; all numbers stand in `question`. {A}, {B} and {C} are names.

    Each step is "x = a * b" with a sentence in which {x} is written out as "3 * 4 = 12"; the last one is the result.
    """

    name: str
    question: str
    steps: tuple[tuple[str, str], ...]
    numbers: Mapping[str, Sequence[int]]
    words: Mapping[str, Sequence[str]]


def _story(name: str, question: str, *steps: str, **drawn: Sequence[int] | Sequence[str]) -> Template:
    numbers: dict[str, Sequence[int]] = {}
    words: dict[str, Sequence[str]] = {}
    for key, choices in drawn.items():
        if isinstance(choices[0], int):
            numbers[key] = cast(Sequence[int], choices)
        else:
            words[key] = cast(Sequence[str], choices)
    halves = [step.split(" | ") for step in steps]
    return Template(name, question, tuple((formula, sentence) for formula, sentence in halves), numbers, words)


TRAIN_TEMPLATES = (
    _story(
        "boxes",
        "{A} buys {boxes} boxes of {thing} with {each} {thing} in every box. {A} gives {given} of them to {B} and "
        "shares the rest equally among {classes} classes. How many {thing} does each class get?",
        "all = boxes * each | {A} buys {all} {thing}.",
        "rest = all - given | After the gift to {B}, {rest} {thing} are left.",
        "share = rest / classes | Each class gets {share} {thing}.",
        boxes=range(3, 13),
        each=range(6, 25),
        given=range(2, 30),
        classes=range(2, 9),
        thing=("pencils", "markers", "erasers", "notebooks", "stickers"),
    ),
    _story(
        "change",
        "A bakery sells {thing} for ${price} each. {A} buys {count} of them and a drink for ${drink}, and pays with "
        "${paid}. How many dollars does {A} get back?",
        "cost = price * count | The {thing} cost {cost} dollars.",
        "bill = cost + drink | With the drink, {A} has to pay {bill} dollars.",
        "back = paid - bill | {A} gets {back} dollars back.",
        price=range(2, 9),
        count=range(2, 12),
        drink=range(2, 7),
        paid=range(20, 101, 5),
        thing=("cakes", "pies", "loaves", "tarts"),
    ),
    _story(
        "journey",
        "{A} {drives} for {hours} hours at {speed} miles per hour, and after a break for another {more} hours at "
        "{slow} miles per hour. How many miles is that in total?",
        "first = hours * speed | Before the break {A} covers {first} miles.",
        "second = more * slow | After the break {A} covers {second} miles.",
        "all = first + second | In total that is {all} miles.",
        hours=range(2, 8),
        speed=range(40, 76, 5),
        more=range(2, 6),
        slow=range(20, 41),
        drives=("drives", "travels", "rides a motorcycle"),
    ),
    _story(
        "ages",
        "{A} is {age} years old. {B} is twice as old as {A}, and {C} is {younger} years younger than {B}. How old "
        "will {C} be in {later} years?",
        "b = age * 2 | {B} is {b} years old.",
        "c = b - younger | {C} is {c} years old.",
        "then = c + later | In the years to come {C} will reach {then} years.",
        age=range(6, 40),
        younger=range(2, 20),
        later=range(2, 16),
    ),
    _story(
        "wages",
        "{A} earns ${rate} an hour and works {hours} hours a day for {days} days. Then {A} spends ${spent} on "
        "{thing}. How many dollars are left?",
        "time = hours * days | {A} works {time} hours.",
        "pay = time * rate | {A} earns {pay} dollars.",
        "left = pay - spent | After the shopping, {left} dollars are left.",
        rate=range(9, 26),
        hours=range(3, 9),
        days=range(2, 7),
        spent=range(20, 121),
        thing=("shoes", "books", "groceries", "tools"),
    ),
    _story(
        "orchard",
        "An orchard has {rows} rows of {trees} trees. Every tree gives {fruits} {thing}. {bad} of the {thing} are "
        "rotten, and the others are packed into crates of {crate}. How many crates are filled?",
        "all = rows * trees | There are {all} trees.",
        "crop = all * fruits | They give {crop} {thing}.",
        "good = crop - bad | Of these, {good} {thing} are good.",
        "crates = good / crate | They fill {crates} crates.",
        rows=range(2, 9),
        trees=range(3, 12),
        fruits=range(5, 16),
        bad=range(3, 40),
        crate=range(4, 13),
        thing=("apples", "pears", "oranges", "plums"),
    ),
    _story(
        "saving",
        "A {thing} costs ${price}. {A} already has ${have} and saves ${weekly} a week. In how many weeks can {A} buy "
        "it?",
        "need = price - have | {A} still needs {need} dollars.",
        "weeks = need / weekly | That takes {weeks} weeks.",
        price=range(60, 301),
        have=range(5, 60),
        weekly=range(5, 26),
        thing=("bicycle", "guitar", "camera", "telescope"),
    ),
    _story(
        "discount",
        "A {thing} that costs ${price} is on sale at {percent} percent off. {A} buys it together with a hat for "
        "${hat}. How many dollars does {A} pay?",
        "part = price * percent | The price times the percentage is {part}.",
        "off = part / 100 | So the discount is {off} dollars.",
        "now = price - off | The {thing} now costs {now} dollars.",
        "pay = now + hat | With the hat, {A} pays {pay} dollars.",
        price=range(20, 201),
        percent=(5, 10, 15, 20, 25, 30, 40, 50, 60),
        hat=range(5, 31),
        thing=("jacket", "coat", "dress", "suit"),
    ),
    _story(
        "reading",
        "{A} has a book of {pages} pages and reads {slow} pages a day for {days} days. From then on {A} reads {fast} "
        "pages a day. How many more days does it take to finish the book?",
        "read = slow * days | {A} first reads {read} pages.",
        "rest = pages - read | Then {rest} pages are left.",
        "more = rest / fast | They take {more} more days.",
        pages=range(120, 401),
        slow=range(8, 21),
        days=range(3, 8),
        fast=range(15, 41),
    ),
    _story(
        "recipe",
        "A recipe for {few} people needs {cups} cups of {thing}. {A} cooks it for {many} people and already has "
        "{have} cups. How many cups of {thing} does {A} have to buy?",
        "times = many / few | {A} has to make the recipe {times} times over.",
        "need = times * cups | That needs {need} cups of {thing}.",
        "buy = need - have | {A} has to buy {buy} cups.",
        few=range(2, 7),
        cups=range(3, 12),
        many=range(8, 61),
        have=range(2, 12),
        thing=("flour", "rice", "milk", "sugar"),
    ),
    _story(
        "tank",
        "A pump fills a tank with {rate} liters of water a minute, while a leak loses {leak} liters a minute. The "
        "tank held {start} liters at the beginning. How many liters does it hold after {minutes} minutes?",
        "net = rate - leak | The tank gains {net} liters a minute.",
        "gain = net * minutes | Over the whole time it gains {gain} liters.",
        "all = start + gain | In the end it holds {all} liters.",
        rate=range(12, 41),
        leak=range(2, 12),
        start=range(10, 101),
        minutes=range(3, 21),
    ),
    _story(
        "collections",
        "{A} has {count} {thing}. {B} has {times} times as many, and {C} has {fewer} fewer than {B}. How many {thing}"
        " do the three have altogether?",
        "b = count * times | {B} has {b} {thing}.",
        "c = b - fewer | {C} has {c} {thing}.",
        "two = count + b | {A} and {B} together have {two} {thing}.",
        "all = two + c | All three have {all} {thing}.",
        count=range(4, 40),
        times=range(3, 7),
        fewer=range(3, 30),
        thing=("marbles", "stamps", "coins", "shells"),
    ),
    _story(
        "tickets",
        "A school sells {adults} tickets to adults for ${high} each and {children} tickets to children for ${low} "
        "each. It pays ${cost} for the hall and splits what remains equally among {clubs} clubs. How many dollars "
        "does each club get?",
        "a = adults * high | The adults pay {a} dollars.",
        "c = children * low | The children pay {c} dollars.",
        "all = a + c | The school takes in {all} dollars.",
        "rest = all - cost | After paying for the hall it has {rest} dollars.",
        "share = rest / clubs | Each club gets {share} dollars.",
        adults=range(10, 41),
        high=range(6, 13),
        children=range(10, 41),
        low=range(2, 6),
        cost=range(30, 91),
        clubs=range(2, 6),
    ),
)

TEST_TEMPLATES = (
    _story(
        "bus",
        "A bus sets off with {start} passengers. At the first stop {on} people get on and {off} get off. At the "
        "second stop half of the passengers leave. How many passengers stay on the bus?",
        "more = start + on | With the new passengers there are {more} people.",
        "fewer = more - off | After the others leave, there are {fewer} people.",
        "stay = fewer / 2 | Half of them stay, which is {stay} passengers.",
        start=range(10, 41),
        on=range(3, 20),
        off=range(2, 10),
    ),
    _story(
        "fence",
        "A garden is {long} meters long and {wide} meters wide. {A} puts a fence all the way around it, at ${price} "
        "for every meter, and a gate for ${gate}. What does it cost in dollars?",
        "half = long + wide | Two sides together measure {half} meters.",
        "around = half * 2 | The way around is {around} meters.",
        "fence = around * price | The fence costs {fence} dollars.",
        "all = fence + gate | With the gate it costs {all} dollars.",
        long=range(8, 31),
        wide=range(4, 16),
        price=range(3, 13),
        gate=range(20, 81),
    ),
    _story(
        "printers",
        "One printer makes {fast} pages a minute and another makes {slow}. Both run for {minutes} minutes, and "
        "{spoiled} of the pages are spoiled. How many good pages are there?",
        "both = fast + slow | Together they make {both} pages a minute.",
        "all = both * minutes | In that time they make {all} pages.",
        "good = all - spoiled | The good ones are {good} pages.",
        fast=range(15, 41),
        slow=range(5, 15),
        minutes=range(4, 31),
        spoiled=range(3, 40),
    ),
    _story(
        "eggs",
        "On a farm {hens} hens lay {each} eggs each in a week. {A} keeps {kept} eggs and sells the others by the "
        "dozen, for ${price} a dozen. How many dollars does {A} earn?",
        "all = hens * each | The hens lay {all} eggs.",
        "sold = all - kept | {A} sells {sold} eggs.",
        "dozens = sold / 12 | These are {dozens} dozens.",
        "money = dozens * price | {A} earns {money} dollars.",
        hens=range(8, 41),
        each=range(3, 7),
        kept=range(4, 30),
        price=range(2, 9),
    ),
    _story(
        "phone",
        "A phone plan costs ${fee} a month and ${extra} for every extra gigabyte. {A} uses {used} extra gigabytes "
        "every month. What does {A} pay in {months} months, in dollars?",
        "data = extra * used | The extra gigabytes cost {data} dollars a month.",
        "month = fee + data | A month costs {month} dollars.",
        "all = month * months | In that time {A} pays {all} dollars.",
        fee=range(10, 41),
        extra=range(2, 8),
        used=range(2, 11),
        months=range(3, 13),
    ),
    _story(
        "pooling",
        "{A} picks {first} {thing} and {B} picks {second}. They put them together with {third} {thing} from {C} and "
        "fill bags with {bag} {thing} each. They eat {eaten} full bags. How many full bags are left?",
        "two = first + second | {A} and {B} pick {two} {thing}.",
        "all = two + third | With those from {C} there are {all} {thing}.",
        "bags = all / bag | They fill {bags} bags.",
        "left = bags - eaten | In the end {left} bags are left.",
        first=range(20, 80),
        second=range(20, 80),
        third=range(5, 40),
        bag=range(4, 13),
        eaten=range(2, 6),
        thing=("berries", "chestnuts", "walnuts", "cherries"),
    ),
)


class WordProblems(Sequence[Problem]):
    """Generated problems, made on access: problem i depends on (split, seed, i) alone."""

    def __init__(self, split: str, count: int, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"word problems have no split {split!r}; they have {', '.join(SPLITS)}")
        if count < 1:
            raise InputError(f"word problems: count={count} must be positive")
        self.split, self.size, self.seed = split, count, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]  # no slices
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.split}/{self.seed}/{index}")
        template = rng.choice(TEST_TEMPLATES if self.split == "test" else TRAIN_TEMPLATES)
        while True:  # until every step comes out whole and not negative, and the numbers belong to the split
            numbers = {name: rng.choice(choices) for name, choices in template.numbers.items()}
            if sum(numbers.values()) % RESIDUES in SPLITS[self.split] and (written := _work(template, numbers)):
                break
        words = dict(zip("ABC", rng.sample(_NAMES, 3), strict=True))
        words |= {name: rng.choice(choices) for name, choices in template.words.items()}
        steps = "\n".join(sentence.format(**words, **written) for _, sentence in template.steps)
        return Problem(
            f"words/{self.split}/{template.name}/{self.seed}-{index}",
            template.question.format(**words, **numbers),
            steps,
            list(written.values())[-1].rpartition(" ")[2],
        )


def _work(template: Template, numbers: Mapping[str, int]) -> dict[str, str] | None:
    """Return each step's variable as its equation, or None when a step's value is not whole or is negative."""
    known, written = dict(numbers), {}
    for step, _ in template.steps:
        target, _, left, sign, right = step.split()
        a, b = (known[x] if x in known else int(x) for x in (left, right))
        known[target] = _OPERATORS[sign](a, b)
        if known[target] < 0 or (sign == "/" and a % b):
            return None
        written[target] = f"{a} {sign} {b} = {known[target]}"
    return written


def word_problems(split: str, count: int, seed: int = 0) -> WordProblems:
    """Return `count` arithmetic problems of two to five steps with GSM8K-style solutions.

    Results are whole and not negative. Splits are "train", "validation" and "test".

    Raises: InputError for another split, or a count below one.
    """
    return WordProblems(split, count, seed)
