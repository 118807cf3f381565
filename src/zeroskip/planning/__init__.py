"""Measure every way to run a site, choose, install: what `zs.compile` and `zs.analyze` are made of."""
