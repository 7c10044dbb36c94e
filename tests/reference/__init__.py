"""Slow twins of the methods: the papers' formulas in float64 once more, without any cleverness."""
