"""Measuring: the timer, the roofline of this machine, the float64 oracle and the dense rivals."""
