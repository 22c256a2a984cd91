"""Other systems' rules under their own names and conventions, computed by ours.

`byzfl` for ByzFL's aggregators and pre-aggregators, `flower` for Flower's strategies. Neither package is needed.
"""
