"""Write number_words.tsv: numbers below 10**9 in English and in German words, aligned word by word.

python data/make_number_words.py          needs num2words
"""

import re
from pathlib import Path
from random import Random

from num2words import num2words

N_PAIRS = 6000
DIGITS = range(1, 10)
SCALES = {"tausend": "thousand", "Million": "million", "Millionen": "million"}

# Every German word that a number is made of, with its English counterpart. "und" has none: its English "and" is dropped.
LEXICON = {num2words(n, lang="de"): num2words(n) for n in [*range(1, 20), *range(20, 100, 10)]}
LEXICON |= SCALES | {"ein": "one", "eine": "one", "hundert": "hundred", "und": None}
GERMAN_WORD = re.compile("|".join(sorted(LEXICON, key=len, reverse=True)))


def english_words(number):
    """247 -> two hundred forty seven"""
    words = re.split("[-, ]+", num2words(number))
    return [word for word in words if word != "and"]


def german_words(number):
    """247 -> zwei hundert sieben und vierzig"""
    text = num2words(number, lang="de").replace(" ", "")
    words = GERMAN_WORD.findall(text)
    assert "".join(words) == text, text
    return words


def align(english, german):
    """For each German word the index of the English word it translates, or -1.

    Thousands and millions come in the same order in both languages; what stands between two of them is matched by the
    lexicon. A word that occurs twice there ("two hundred two") keeps its order.
    """
    alignment, start = [], 0
    for word in german:
        translation = LEXICON[word]
        if translation is None:
            alignment.append(-1)
            continue
        index = start
        while english[index] != translation or index in alignment:
            index += 1
        alignment.append(index)
        if word in SCALES:
            start = index + 1
    return alignment


def sample(random):
    """Distinct numbers, as many of each length as there are, at most; in random order."""
    numbers = []
    for digits in DIGITS:
        share = (N_PAIRS - len(numbers)) // (len(DIGITS) - digits + 1)
        candidates = range(10 ** (digits - 1), 10**digits)
        numbers += random.sample(candidates, min(share, len(candidates)))
    random.shuffle(numbers)
    return numbers


def main():
    lines = ["number\tenglish\tgerman\talignment"]
    for number in sample(Random(0)):
        english, german = english_words(number), german_words(number)
        alignment = align(english, german)
        lines.append("\t".join([str(number), " ".join(english), " ".join(german), " ".join(map(str, alignment))]))
    path = Path(__file__).with_name("number_words.tsv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
