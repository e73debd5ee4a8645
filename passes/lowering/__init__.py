"""Forms of layers, their costs, fusion, and runs of the own kernel."""
