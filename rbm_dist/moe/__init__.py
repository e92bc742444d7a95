"""Routing by memory: routing, stacked experts, dispatch (local or all-to-all), and the memory store.

Shape suffixes: B rows of a batch, R routed (row, expert) pairs, D input width, O output width, E experts,
L experts held here, k experts per row, W ranks of the expert group.
"""
