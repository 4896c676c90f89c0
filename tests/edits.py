"""Edits of files at random places, for tests in which hypothesis looks for the one that ends in a traceback."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=FIXTURES)
KINDS = st.sampled_from(["flip", "cut", "insert", "repeat"])
EDITS = st.lists(st.tuples(KINDS, st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=6)


def edited(data, edits):
    """Apply edits at relative positions, so that they mean something in a file of any length."""
    data = bytearray(data)
    for kind, where, inserted in edits:
        i = int(where * len(data))
        if kind == "flip" and i < len(data):
            data[i] ^= inserted[0] or 1
        elif kind == "cut":
            del data[i : i + 1 + len(inserted) ** 2]
        elif kind == "insert":
            data[i:i] = inserted
        elif kind == "repeat":
            data[i:i] = data[max(0, i - 50 * len(inserted)) : i]
    return bytes(data)
