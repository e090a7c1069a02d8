"""A text unlike Python source, to teach the bundled model: the order book of a shop, made by chance.

`python tests/models/style.py FILE [SEED]` writes it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

NAMES = ("Keller", "Marti", "Oduya", "Lindqvist", "Haas", "Pereira", "Novak", "Tanaka", "Byrne", "Roth")
TOWNS = ("Basel", "Porto", "Lund", "Cork", "Brno", "Kyoto", "Lagos", "Graz")
THINGS = ("lamp", "chair", "table", "shelf", "clock", "mirror", "carpet", "bench")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = ("one", "two", "three", "four", "five", "six")
COLOURS = ("green", "black", "white", "oak", "walnut", "blue")
ORDERS = 2000


def order(draw: random.Random, number: int) -> str:
    """One entry: who wants what, where and when, at which price."""
    title = draw.choice(("Mr.", "Mrs."))
    items = [_item(draw) for _ in range(draw.randint(1, 3))]
    wanted = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    paid = draw.choice(("Paid in cash.", "Paid by card.", "To be paid on delivery."))
    return (
        f"Order {number}. {title} {draw.choice(NAMES)} of {draw.choice(TOWNS)} wants {wanted}, to be sent on "
        f"{draw.choice(DAYS)}. Price: {draw.randint(20, 900)}.{draw.choice(('00', '50', '90'))} francs. {paid}\n"
    )


def _item(draw: random.Random) -> str:
    count = draw.randrange(len(NUMBERS))
    return f"{NUMBERS[count]} {draw.choice(COLOURS)} {draw.choice(THINGS)}{'s' if count else ''}"


def order_book(seed: int = 0, orders: int = ORDERS) -> str:
    """The text: `orders` entries, some 120 characters each."""
    draw = random.Random(seed)
    first = draw.randint(1000, 9000)
    return "".join(order(draw, first + number) for number in range(orders))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(order_book(int(sys.argv[2]) if len(sys.argv) > 2 else 0))
