"""One HTML page about one run or several: curves, samples, configuration, warnings in words."""
