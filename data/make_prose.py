"""Write prose.txt: the English text of Python's own help topics.

python3.11 data/make_prose.py          nothing to install; another Python version gives a slightly different text
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main():
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f"prose.txt is made with Python 3.11, this is {sys.version_info.major}.{sys.version_info.minor}"
        )
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics))
    path = Path(__file__).with_name("prose.txt")
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
