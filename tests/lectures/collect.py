"""How a file of answers gathers them, and makes wrong kernels of a right one."""


def collect(*others):
    """Return RIGHT, WRONG, and the decorators @right(number) and @wrong(number, words) that add to them.

    RIGHT has a list of answers for each exercise; WRONG pairs each answer with words that the report must contain.
    The answers of the modules `others` come first.
    """
    rights, wrongs = {}, {}
    for other in others:
        for all_of_them, theirs in ((rights, other.RIGHT), (wrongs, other.WRONG)):
            for number, answers in theirs.items():
                all_of_them.setdefault(number, []).extend(answers)

    def right(number):
        def add(answer):
            rights.setdefault(number, []).append(answer)
            return answer

        return add

    def wrong(number, words):
        def add(answer):
            wrongs.setdefault(number, []).append((answer, words))
            return answer

        return add

    return rights, wrongs, right, wrong


def replacing(source):
    """A function of pairs (old, new) that returns `source` with each old text, which stands there once, replaced."""

    def changed(*pairs):
        text = source
        for old, new in pairs:
            assert text.count(old) == 1, (text.count(old), old)
            text = text.replace(old, new)
        return text

    return changed
