"""One small network trained with LIF and with QIF in every installed host, on real images.

:mod:`.hosts` builds the network from a host's own layers with the neuron as its one argument, :mod:`.training` trains
it, :mod:`.report` turns the results into a table, a JSON file and a figure.
"""
