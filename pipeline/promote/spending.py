"""Alpha spending: a gate's error probability, divided among all looks at one test set. Pure functions.

The k-th look gets alpha / (k (k + 1)). These sum to alpha k / (k + 1) after k looks, so that whatever is compared, and
however often, a challenger that is no better than its champion is promoted in the whole of a test set's use with a
probability of at most alpha (Bonferroni; the looks share images and may depend on each other as they like). Of the
rules that never end it is the simplest: alpha 6 / (pi k)^2 leaves less for later looks, and alpha / 2^k is spent after
six (Lan and DeMets 1983, Foster and Stine 2008 on spending in general).
"""

from scipy.stats import binom

USED_UP = 0.95
"""The share of alpha after which a test set counts as used up."""


def level(alpha: float, look: int) -> float:
    """What McNemar's p must not exceed at the `look`-th look, from 1."""
    return alpha / (look * (look + 1))


def used_up(look: int) -> bool:
    """Whether this look, the 19th or a later one, leaves less than a twentieth of alpha for all that come after it."""
    return look / (look + 1) >= USED_UP


def needed(differing: int, at_most: float) -> int | None:
    """By how many images the challenger must be ahead, of `differing` that one alone has right, to reach that level.

    That is the smallest difference whose exact two-sided p is at most `at_most`; None: no difference is enough.
    """
    # p = 2 P(X <= champion alone), X ~ binomial(differing, 1/2): the largest count of the champion's that will do
    losses = int(binom.ppf(at_most / 2, differing, 0.5)) if differing else -1
    while losses >= 0 and 2 * binom.cdf(losses, differing, 0.5) > at_most:
        losses -= 1
    return differing - 2 * losses if losses >= 0 else None
