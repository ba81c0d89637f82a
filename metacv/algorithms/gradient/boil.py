"""BOIL, Body Only update in Inner Loop (Oh et al., 2021), https://arxiv.org/abs/2008.08882"""

from metacv.algorithms.gradient.maml import MAML


class BOIL(MAML):
    """MAML whose inner loop adapts all but the last layer (section 3)."""

    part = "backbone."
