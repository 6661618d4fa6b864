"""The finished code of each lecture, extracted from solutions/ by `python course.py build`."""
