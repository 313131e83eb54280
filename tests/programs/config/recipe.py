"""A recipe of a dataset that imports, defines and computes."""

import os

SHARE = 4
_half = 2


def half(x):
    return x / _half


files = ["/a/" + os.path.basename("x/b.txt")]
val_fraction = half(1 / SHARE)
