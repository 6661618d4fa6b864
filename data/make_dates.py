"""Write dates.tsv: the same dates in several languages, with the field (day, month, ...) that each token belongs to.

python data/make_dates.py          needs Babel
"""

import re
from datetime import date, timedelta
from pathlib import Path
from random import Random

from babel import Locale
from babel.dates import format_date, tokenize_pattern

N_DATES = 480
LANGUAGES = ["en", "de", "fr", "hu", "ja"]
FIRST, LAST = date(1990, 1, 1), date(2029, 12, 31)
FIELDS = {"E": "weekday", "d": "day", "M": "month", "y": "year"}


def tokens_and_fields(day, language):
    """The long form of a date, token by token: (["22", ".", ...], ["day", "-", ...])."""
    tokens, fields = [], []
    for kind, value in tokenize_pattern(Locale.parse(language).date_formats["full"].pattern):
        if kind == "field":
            letter, width = value
            tokens.append(format_date(day, letter * width, language))
            fields.append(FIELDS[letter])
        else:
            marks = re.findall(r"\w+|[^\w\s]", value)
            tokens += marks
            fields += ["-"] * len(marks)
    return tokens, fields


def main():
    random = Random(0)
    offsets = random.sample(range((LAST - FIRST).days + 1), N_DATES)
    lines = ["date\tlanguage\ttokens\tfields"]
    for offset in offsets:
        day = FIRST + timedelta(days=offset)
        for language in LANGUAGES:
            tokens, fields = tokens_and_fields(day, language)
            lines.append("\t".join([day.isoformat(), language, " ".join(tokens), " ".join(fields)]))
    path = Path(__file__).with_name("dates.tsv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
