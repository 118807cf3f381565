"""Measuring: the timer, the roofline of this machine, the float64 oracle, dense rivals and peers, the benchmark."""
